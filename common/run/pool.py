"""Worker processes of this machine: one call in its own, or studies over a multiprocessing.Pool.

A worker always runs in a worker process, for one job too: a decoder that crashes, or the kernel
out of memory, takes one study along and not the run. What a Pool alone does not do is added
here: a worker that is killed is noticed, its study fails with that reason, and the others go on.
"""

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing import connection
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import threadpoolctl

from common.errors import StageError, StudyError, WorkerCrashed, WorkerKilled
from common.run.lock import show_life
from common.run.signals import uninterrupted
from common.run.worker import (
    NOT_ENOUGH_MEMORY,
    Job,
    Line,
    Outcome,
    Worker,
    attempt,
    broken_off,
    keep_log_lines,
    say_nothing,
    traceback_without_text,
    unexpected,
)

logger = logging.getLogger("tumorvolume")

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Pinned, since Python's default varies. A fork starts in milliseconds, for one study too and
where a dead worker is replaced; forkserver and spawn start a fresh interpreter, which imports
for a second and looks for modules in the current folder first. Forking is safe on Linux, where
the parent computes nothing; libraries of macOS do not bear it."""

CONTEXT: Any = multiprocessing.get_context(START_METHOD)

_CALL_POLL_S = 0.05


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
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
        with _clear_start_errors():
            _spare_what_is_shared()
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_answer, args=(sender, function, arguments))
            process.start()
        sender.close()
        try:
            while not receiver.poll(_CALL_POLL_S):
                raise_interruption()
                show_life()
            result, error, lines = receiver.recv()
        except EOFError:
            process.join()
            # A signal to all processes of the run may have reached that one first.
            raise_interruption()
            about = f"{arguments[0]}: " if isinstance(next(iter(arguments), None), Path) else ""
            from_outside = -process.exitcode in (signal.SIGKILL, signal.SIGTERM)
            ended = WorkerKilled if from_outside else WorkerCrashed
            raise ended(about + _why_it_ended(process.exitcode)) from None
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
    lines = _become_worker()
    result: Any = None
    error: OSError | StageError | None = None
    try:
        result = function(*arguments)
    except (OSError, StageError) as raised:
        error = raised
    except StudyError as raised:
        error = StageError(str(raised))
    except MemoryError:
        error = StageError(NOT_ENOUGH_MEMORY)
    except Exception as raised:
        logger.debug("%s", traceback_without_text(raised))
        error = StageError(unexpected(raised))
    sender.send((result, error, lines))


@contextmanager
def _clear_start_errors() -> Iterator[None]:
    """Say what to do where the system grants no processes."""
    try:
        yield
    except OSError as error:
        raise StageError(
            f"worker processes cannot be started ({error.strerror}): make room in /dev/shm and "
            "the folder for temporary files, or raise the limits (ulimit -a)"
        ) from error


def _why_it_ended(exit_code: int | None) -> str:
    """Return why a worker process ended that should not have, and the remedy."""
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


def _spare_what_is_shared() -> None:
    """Keep the collector of garbage away from what is there now, such as all packages.

    Looking through it takes time, and would make a forked process copy its pages.
    """
    gc.freeze()


# --- what a worker process is ----------------------------------------------------------------


def _become_worker() -> list[Line]:
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


def give_back_memory() -> None:
    """Give what is free back to the kernel, for others to use."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


# --- studies over the pool -------------------------------------------------------------------

_POLL_S = 0.05
_LOOK_S = 0.2
_PATIENCE_S = 3.0
_DEATH_S = 1.0
_MOST_BREAKDOWNS = 3


_worker: Worker
_running: Any
"""Shared array: the process that runs each job, 0 before and -1 after."""
_lines: list[Line]


def _initialise(worker: Worker, running: Any) -> None:
    global _worker, _running, _lines
    _worker, _running = worker, running
    _lines = _become_worker()


def _attempt_in_worker(
    numbered: tuple[int, Job],
) -> tuple[int, Outcome | StageError, list[Line]]:
    index, job = numbered
    _lines.clear()
    _running[index] = os.getpid()
    outcome: Outcome | StageError
    try:
        outcome = attempt(_worker, job)
    except StageError as error:
        outcome = error
    # Not in a `finally`: a worker that exits in the middle has not ended its job.
    _running[index] = -1
    return index, outcome, list(_lines)


# --- the pool, in the parent -----------------------------------------------------------------


def run_in_pool(
    worker: Worker, jobs: Sequence[Job], n_workers: int
) -> Generator[tuple[int, Outcome]]:
    """Yield the number of each job and its outcome, with a new pool where one broke down.

    Raises
    ------
    StageError
        Raised by a worker for all (a full disk), or workers that keep dying without work.
    """
    todo = dict(enumerate(jobs))
    breakdowns = 0
    while todo:
        n_before = len(todo)
        patience_s = _PATIENCE_S * 2**breakdowns
        with closing(_until_breakdown(worker, dict(todo), n_workers, patience_s)) as results:
            for index, outcome in results:
                del todo[index]
                yield index, outcome
        breakdowns = breakdowns + 1 if len(todo) == n_before else 0
        if breakdowns > _MOST_BREAKDOWNS:
            raise StageError(
                "worker processes die before they begin, as where memory is short: use fewer "
                "--jobs, or a machine, a container or a job with more memory"
            )


def _until_breakdown(
    worker: Worker, todo: Mapping[int, Job], n_workers: int, patience_s: float
) -> Generator[tuple[int, Outcome]]:
    """Yield outcomes until all are there, or none runs and none comes for `patience_s`.

    A worker that dies in its job holds none of the pool's locks: the study failed, the pool
    puts another worker in its place. One that dies between jobs may have taken a job, a result
    or a lock along: then nothing moves any more, and what is left needs a new pool.
    """
    left = dict(todo)
    with (
        uninterrupted() as raise_interruption,
        _pool(worker, max(left) + 1, min(n_workers, len(left))) as (pool, running),
    ):
        results = pool.imap_unordered(_attempt_in_worker, list(left.items()))
        processes = {p.pid: p for p in multiprocessing.active_children()}
        suspects: set[int] = set()
        last_look = last_movement = time.monotonic()
        while left:
            raise_interruption()
            show_life()
            with suppress(multiprocessing.TimeoutError):
                index, outcome, lines = results.next(timeout=_POLL_S)
                for level, line in lines:
                    logger.log(level, "%s", line)
                if isinstance(outcome, StageError):
                    raise outcome
                last_movement = time.monotonic()
                if left.pop(index, None) is not None:
                    yield index, outcome
            alive = {p.pid: p for p in multiprocessing.active_children()}
            processes |= alive
            if time.monotonic() - last_look < _LOOK_S:
                continue
            last_look = time.monotonic()
            busy = {index for index in left if running[index] > 0}
            orphans = {index for index in busy if running[index] not in alive}
            # Seen twice: in between, one that had just begun or ended its job is told apart.
            for index in sorted(orphans & suspects):
                yield index, _killed(left.pop(index), processes.get(running[index]))
            suspects = orphans
            if busy:
                last_movement = last_look
            elif last_look - last_movement > patience_s:
                return


def _killed(job: Job, process: BaseProcess | None) -> Outcome:
    # One that was born and died between two looks is not known.
    code = process.exitcode if process is not None else None
    return broken_off(job, _why_it_ended(code))


@contextmanager
def _pool(worker: Worker, n_jobs: int, n_workers: int) -> Iterator[tuple[Pool, Any]]:
    """Yield a pool and the array that its workers mark the jobs in, and end both."""
    others = set(multiprocessing.active_children())
    with _clear_start_errors():
        _spare_what_is_shared()
        running = CONTEXT.RawArray("l", n_jobs)
        pool = CONTEXT.Pool(n_workers, _initialise, (worker, running))
    try:
        yield pool, running
    finally:
        # A killed worker may have held one of the pool's locks: then terminate() never returns.
        ending = threading.Thread(target=pool.terminate, daemon=True)
        ending.start()
        ending.join(timeout=1)
        left = set(multiprocessing.active_children()) - others
        for process in left:
            process.kill()
        # One that is in a call of the system, creating a file say, ends when that does.
        for process in left:
            connection.wait([process.sentinel], timeout=_DEATH_S)
        ending.join(timeout=0.5)
