"""Worker processes of this machine: how they begin and end, and one call in one of its own."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import threadpoolctl

from common.errors import StageError, StudyError, WorkerCrashed, WorkerKilled
from common.interruption import uninterrupted
from common.worker import Line, keep_log_lines, say_nothing, traceback_without_text

logger = logging.getLogger("tumorvolume")

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Pinned, since Python's default varies. A fork starts in milliseconds, for one study too and
where a dead worker is replaced; forkserver and spawn start a fresh interpreter, which imports
for a second and looks for modules in the current folder first. Forking is safe on Linux, where
the parent computes nothing; libraries of macOS do not bear it."""

CONTEXT: Any = multiprocessing.get_context(START_METHOD)

_POLL_S = 0.05


def call_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a worker process of its own; a crash of it is an error.

    Function, arguments and result are picklable. Where the process ends in the middle, a first
    argument that is a path is named.

    Raises
    ------
    OSError
        Raised by the function.
    StageError
        Raised by the function, or it failed otherwise.
    WorkerCrashed, WorkerKilled
        Its process ended by itself, or from outside.
    """
    with uninterrupted() as raise_interruption:
        with clear_start_errors():
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_answer, args=(sender, function, arguments))
            process.start()
        sender.close()
        try:
            while not receiver.poll(_POLL_S):
                raise_interruption()
            result, error, lines = receiver.recv()
        except EOFError:
            process.join()
            # A signal to all processes of the run may have reached that one first.
            raise_interruption()
            about = f"{arguments[0]}: " if isinstance(next(iter(arguments), None), Path) else ""
            from_outside = -process.exitcode in (signal.SIGKILL, signal.SIGTERM)
            ended = WorkerKilled if from_outside else WorkerCrashed
            raise ended(about + why_it_ended(process.exitcode)) from None
        finally:
            process.kill()
            process.join()
            receiver.close()
    for level, line in lines:
        logger.log(level, "%s", line)
    if error is not None:
        raise error
    return result


def _answer(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    lines = become_worker()
    result: Any = None
    error: OSError | StageError | None = None
    try:
        result = function(*arguments)
    except (OSError, StageError) as raised:
        error = raised
    except StudyError as raised:
        error = StageError(str(raised))
    except MemoryError:
        error = StageError("not enough memory: use fewer --jobs")
    except Exception as raised:
        logger.debug("%s", traceback_without_text(raised))
        error = StageError(
            f"unexpected {type(raised).__name__}: run again with --debug and report it"
        )
    sender.send((result, error, lines))


@contextmanager
def clear_start_errors() -> Iterator[None]:
    """Say what to do where the system grants no processes."""
    try:
        yield
    except OSError as error:
        raise StageError(
            f"worker processes cannot be started ({error.strerror}): make room in /dev/shm and "
            "the folder for temporary files, or raise the limits (ulimit -a)"
        ) from error


def why_it_ended(exit_code: int | None) -> str:
    """Return why a worker process ended that should not have; None where that is not known."""
    if exit_code == -signal.SIGPROF:
        return "reading it never ends, it is damaged: make it again"
    if exit_code is None:
        return "the worker process was killed: report it"
    if exit_code == -signal.SIGKILL:
        return (
            "the worker process was killed (signal 9), probably for want of memory: "
            "use fewer --jobs"
        )
    cause = f"signal {-exit_code}" if exit_code < 0 else "it ended by itself"
    return f"the worker process was killed ({cause}): report it"


# --- in a worker process ---------------------------------------------------------------------


def become_worker() -> list[Line]:
    """Make this process a worker, and return the list that its log lines go to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_parent()
    keep_memory()
    say_nothing()
    threadpoolctl.threadpool_limits(1)
    return keep_log_lines()


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone; elsewhere a thread watches."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    # It may be gone by now.
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def keep_memory() -> None:
    """Spare the kernel the work of clearing and joining pages, which volumes need many of."""
    _take_small_pages()
    _keep_freed_memory()


def _take_small_pages() -> None:
    """Do without huge pages, which numpy asks for.

    Where memory is fragmented, putting them together takes the kernel as long as a study takes;
    the studies after that would be faster by 4 %.
    """
    if sys.platform == "linux":
        disable_huge_pages = 41  # PR_SET_THP_DISABLE of prctl(2)
        ctypes.CDLL(None).prctl(disable_huge_pages, 1, 0, 0, 0)


def _keep_freed_memory() -> None:
    """Have what one volume frees serve the next: the kernel clears every page that is new."""
    libc = ctypes.CDLL(None)
    # Other C libraries than GNU's have no such options.
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        most_apart, trim_threshold, none, never = -4, -1, 0, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
        libc.mallopt(most_apart, none)
        libc.mallopt(trim_threshold, never)
