"""The ways in which work ends: a study is incomplete or can't go on, or the whole run can't."""


class StudyError(Exception):
    """One study can't go on: unreadable, inconsistent or refused. The others do.

    The message reads ``what is wrong (DICOM keyword and tag, or file role): what to do``
    and holds no patient identity: no names, ids, dates, UIDs or paths.

    Attributes
    ----------
    private : str
        More for the private mapping alone, such as the descriptions of candidate series.
    """

    def __init__(self, message: str, private: str = "") -> None:
        super().__init__(message)
        self.private = private


class IncompleteStudy(StudyError):
    """One study lacks a role, such as a mask; it is skipped and listed, which is no error."""


class StageError(Exception):
    """The whole run can't go on; an existing output stays as it was."""


class WorkerCrashed(StageError):
    """The process that did the work ended in the middle: what it read is damaged, probably."""


class WorkerKilled(StageError):
    """The process that did the work was ended from outside, as where memory is short."""
