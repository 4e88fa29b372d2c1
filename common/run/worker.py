"""What a worker process does with one study, whoever runs it: a pool, or a dask cluster.

A worker function is module-level, takes one study's task and returns its warnings; all that it
makes it writes itself. Whatever it raises becomes the study's outcome. It says nothing: log
lines go back with the outcome, and what libraries say, which may quote headers, goes nowhere.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import IncompleteStudy, StageError, StudyError, Warning

logger = logging.getLogger("tumorvolume")

Status = Literal["written", "unchanged", "skipped", "failed"]
Worker = Callable[[Any], Sequence[Warning]]
Line = tuple[int, str]
"""Level and text of a log line that a worker leaves to its parent to write."""

_LIBRARIES = ("pydicom", "highdicom", "nibabel", "nilearn")


@dataclass(frozen=True)
class Outcome:
    """How one study ended.

    Attributes
    ----------
    hash : str
    status : "written", "unchanged", "skipped" or "failed"
    reason : str
        Why it was skipped or failed.
    warnings : tuple of Warning
    private : str
        More on the reason, for the private mapping alone.
    """

    hash: str
    status: Status
    reason: str = ""
    warnings: tuple[Warning, ...] = ()
    private: str = ""


@dataclass(frozen=True)
class Task:
    """One study's work: the hash it is known by and what its worker needs (picklable)."""

    hash: str
    payload: Any


def attempt(worker: Worker, task: Task) -> Outcome:
    """Call the worker and return how the study ended.

    Raises
    ------
    StageError
        Raised by the worker: no study can go on.
    """
    try:
        return Outcome(task.hash, "written", warnings=tuple(worker(task.payload)))
    except IncompleteStudy as error:
        return Outcome(task.hash, "skipped", str(error), private=error.private)
    except StudyError as error:
        return Outcome(task.hash, "failed", str(error), private=error.private)
    except StageError:
        raise
    except MemoryError:
        return Outcome(task.hash, "failed", "not enough memory: use fewer --jobs")
    except Exception as error:
        logger.debug("%s: %s", task.hash, traceback_without_text(error))
        return Outcome(
            task.hash,
            "failed",
            f"unexpected {type(error).__name__}: run this study again with --debug and report it",
        )


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
