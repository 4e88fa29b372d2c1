"""What a worker process does with one study, whoever runs it: a pool, or a dask cluster.

A worker function is module-level, takes one study's job and returns what is to be said of it; all
that it makes it writes itself. Whatever it raises becomes the study's outcome. It says nothing: log
lines go back with the outcome, and what libraries say, which may quote headers, goes nowhere.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from common.errors import (
    UNREACHABLE,
    IncompleteStudy,
    StageError,
    StudyError,
    Unreachable,
    UnreachableStudy,
    Warning,
)

logger = logging.getLogger("tumorvolume")

Status = Literal["written", "unchanged", "skipped", "failed"]
Line = tuple[int, str]
"""Level and text of a log line that a worker leaves to its parent to write."""

_LIBRARIES = ("pydicom", "nibabel", "nilearn")


@dataclass(frozen=True)
class Job:
    """One study, from the plan to its worker.

    Attributes
    ----------
    hash : str
        What it is known by.
    fingerprint : str
        Digest of all that its part depends on: input, options of value, layout version.
    work : object
        What the worker needs besides; picklable.
    part : Path
        Where its finished part goes; set by the stage.
    beside : tuple of Path
        Files besides the output that its worker writes; where one is missing, it runs again.
    memory : int
        What its worker takes at most, roughly [bytes]; 0 where unknown.
    """

    hash: str
    fingerprint: str
    work: Any
    part: Path = Path()
    beside: tuple[Path, ...] = ()
    memory: int = 0

    @property
    def has_all_beside(self) -> bool:
        """Whether every file that the worker writes beside the output is there."""
        return all(path.exists() for path in self.beside)


@dataclass(frozen=True)
class Written:
    """What a worker says of a study that it has written.

    Attributes
    ----------
    warnings : sequence of Warning
    private : object
        What the private mapping alone may hold.
    """

    warnings: Sequence[Warning] = ()
    private: Any = None


Worker = Callable[[Job], Any]


class Cause(Enum):
    """What it was that kept a study from being written."""

    CONTENT = "what it holds, or lacks"
    REACH = "it could not be looked at"
    WORKER = "the worker process"


@dataclass(frozen=True)
class Outcome:
    """How one study ended.

    Attributes
    ----------
    hash : str
    status : "written", "unchanged", "skipped" or "failed"
    reason : str
        Why it was skipped or failed.
    private : str
        More on the reason, for the private mapping alone.
    made : object
        What the worker returned: `Written` from those of a stage.
    cause : Cause
        Of a study that was skipped or failed.
    """

    hash: str
    status: Status
    reason: str = ""
    private: str = ""
    made: Any = None
    cause: Cause = Cause.CONTENT

    @property
    def warnings(self) -> Sequence[Warning]:
        """Warnings of a study that was written."""
        return self.made.warnings if isinstance(self.made, Written) else ()


NOT_ENOUGH_MEMORY = "not enough memory: use fewer --jobs"


def unexpected(error: Exception, again: str = "again") -> str:
    """Return what to say of an error that no one foresaw; its text may quote a header."""
    return f"unexpected {type(error).__name__}: run {again} with --debug and report it"


def attempt(worker: Worker, job: Job) -> Outcome:
    """Call the worker and return how the study ended.

    Raises
    ------
    StageError
        Raised by the worker: no study can go on.
    Unreachable
        A disk or file server does not answer.
    """
    try:
        return Outcome(job.hash, "written", made=worker(job))
    except StudyError as error:
        return refused(job.hash, error)
    except StageError:
        raise
    except MemoryError:
        return broken_off(job, NOT_ENOUGH_MEMORY)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise Unreachable(
                f"files cannot be read or written ({error.strerror}): check the disk or the file "
                "server, and run again; finished studies are kept"
            ) from error
        logger.debug("%s: %s", job.hash, traceback_without_text(error))
        return broken_off(job, unexpected(error, "this study again"))


def refused(study_hash: str, error: StudyError) -> Outcome:
    """Return how a study ends that can't go on."""
    is_incomplete = isinstance(error, IncompleteStudy)
    is_out_of_reach = isinstance(error, UnreachableStudy) or (
        isinstance(error, IncompleteStudy) and error.lacks_files
    )
    return Outcome(
        study_hash,
        "skipped" if is_incomplete else "failed",
        str(error),
        private=error.private,
        cause=Cause.REACH if is_out_of_reach else Cause.CONTENT,
    )


def broken_off(job: Job, reason: str) -> Outcome:
    """Return how a study ends through no fault of its own that is known."""
    return Outcome(job.hash, "failed", reason, cause=Cause.WORKER)


def traceback_without_text(error: BaseException) -> str:
    """Return where an error and what led to it arose; their texts may quote a header or a path."""
    cause = error.__cause__ or error.__context__
    frames = "".join(traceback.format_tb(error.__traceback__))
    here = f"Traceback (most recent call last):\n{frames}{type(error).__name__}"
    return here if cause is None else f"{traceback_without_text(cause)}, which led to:\n{here}"


# --- what a worker process says --------------------------------------------------------------


def say_nothing() -> None:
    """Send to nowhere what this process would say on stdout and stderr."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)


@contextmanager
def saying_nothing() -> Iterator[None]:
    """As `say_nothing`, in the body alone."""
    streams, descriptors = (sys.stdout, sys.stderr), [os.dup(1), os.dup(2)]
    say_nothing()
    nowhere = sys.stdout
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for number, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        nowhere.close()


def keep_log_lines() -> list[Line]:
    """Return the list that log lines go to from now on; those of libraries are dropped.

    The parent writes them with the outcome; a worker that is killed while it writes would leave
    half a line, or a lock held.
    """
    handler = _KeepingHandler()
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for library in map(logging.getLogger, _LIBRARIES):
        library.handlers = [logging.NullHandler()]
        library.propagate = False
    return handler.lines


class _KeepingHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))
