"""What there is to say of a study or a run: warnings, and the ways in which work ends early."""

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What a warning is about; the page's filter shows these words."""

    OUTSIDE_GRID = "tumour outside the grid"
    VANISHED = "vanished lesions"
    MERGED = "merged lesions"
    SPLIT = "split lesions"
    NOT_MEASURED = "lesions missing in the measures"
    CLIPPED = "clipped uptake"
    NOT_COVERED = "PET not covered by CT"
    DOSE_FRACTION = "dose fraction"
    FAR_FROM_UPTAKE = "mask far from uptake"
    DECAY_REFERENCE = "decay reference disagrees"
    REINTERPRETED = "reinterpreted header"
    SUV = "SUV header"
    LEFT_OUT = "files left out"
    SERIES = "series"
    MASK = "mask as it was read"
    REGIONS = "regions united or left out"
    TRUSTED = "trusted"
    IMPLAUSIBLE = "implausible values"
    OTHER = "other warnings"


@dataclass(frozen=True)
class Warning:
    """What the user should know of a study that was written; no identity in it."""

    kind: Kind
    text: str

    def __str__(self) -> str:
        return self.text


def counted(number: int, one: str = "study", many: str = "studies") -> str:
    """Return a number with its noun: 1 study, 2 studies."""
    return f"{number} {one if number == 1 else many}"


def texts_and_kinds(warnings: Iterable[Warning]) -> dict[str, list[str]]:
    """Return warnings as files hold them: plain texts, their kinds beside them."""
    listed = list(warnings)
    return {
        "warnings": [warning.text for warning in listed],
        "warning_kinds": [warning.kind.value for warning in listed],
    }


def warnings_from(texts: Sequence[Any], kinds: Sequence[Any] = ()) -> list[Warning]:
    """Return warnings from what a file holds; those without a known kind are of kind OTHER."""
    known = {kind.value: kind for kind in Kind}
    padded = [*kinds, *[""] * len(texts)]
    return [
        Warning(known.get(str(kind), Kind.OTHER), str(text))
        for text, kind in zip(texts, padded, strict=False)
    ]


UNREACHABLE = frozenset(
    {errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV}
)
"""Errors of disks, mounts and file servers; they say nothing of a file."""


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
    """One study lacks a role, such as a mask; it is skipped and listed, which is no error.

    Attributes
    ----------
    lacks_files : bool
        It has no file at all, or links that lead nowhere: a disk may not be mounted.
    """

    def __init__(self, message: str, private: str = "", *, lacks_files: bool = False) -> None:
        super().__init__(message, private)
        self.lacks_files = lacks_files


class UnreachableStudy(StudyError):
    """One study can't be looked at just now; nothing is said against what was made of it before."""


def system_error(error: BaseException | None) -> OSError | None:
    """Return the system's refusal among an error and what led to it; None where there is none.

    To seek to a place that damaged bytes name is a refusal too (EINVAL), which is not meant.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            return error
        error = error.__cause__ or error.__context__
    return None


class StageError(Exception):
    """The whole run can't go on; an existing output stays as it was."""


class Unreachable(StageError):
    """Files can't be looked at just now: a lock, a mount that is gone. They are not at fault."""


class DamagedSource(StageError):
    """A file that studies are copied from is damaged; a part can be made anew.

    Attributes
    ----------
    source : Path
    """

    def __init__(self, message: str, source: Any) -> None:
        super().__init__(message, source)
        self.source = source

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def blaming(source: Any) -> Iterator[None]:
    """Blame a file for what keeps the body from going on, unless it is out of reach."""
    try:
        yield
    except (DamagedSource, Unreachable):
        raise
    except StageError as error:
        raise DamagedSource(str(error), source) from error


class WorkerCrashed(StageError):
    """The process that did the work ended in the middle: what it read is damaged, probably."""


class WorkerKilled(StageError):
    """The process that did the work was ended from outside, as where memory is short."""
