"""Fan-out of studies over a multiprocessing.Pool, with progress and without a way to hang.

A worker always runs in a worker process, for one job too: a decoder that crashes, or the kernel
out of memory, takes one study along and not the run. What a Pool alone does not do is added
here: a worker that is killed is noticed, its study fails with that reason, and the others go on.
"""

import ctypes
import functools
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

from common.errors import StageError
from common.interruption import uninterrupted
from common.machine import default_jobs
from common.progress import progress
from common.worker import Line, Outcome, Task, Worker, attempt, keep_log_lines, say_nothing

logger = logging.getLogger("tumorvolume")

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Pinned, since Python's default varies. A fork starts in milliseconds, for one study too and
where a dead worker is replaced; forkserver and spawn start a fresh interpreter, which imports
for a second and looks for modules in the current folder first. Forking is safe on Linux, where
the parent computes nothing; libraries of macOS do not bear it."""

_CONTEXT = multiprocessing.get_context(START_METHOD)

_POLL_S = 0.05
_LOOK_S = 0.2
_PATIENCE_S = 3.0
_MOST_BREAKDOWNS = 3


def run_studies(
    worker: Worker,
    tasks: Sequence[Task],
    jobs: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run `worker` on the payload of every task and return the outcomes in task order.

    A `StudyError`, any other exception, and the death of a worker process each fail one study.
    `on_outcome` is called with each outcome as it comes. `jobs` defaults to the CPUs.

    Raises
    ------
    StageError
        Raised by a worker for all (a full disk), or workers that keep dying without work.
    """
    outcomes: dict[int, Outcome] = {}
    with (
        progress(len(tasks)) as advance,
        closing(_run_in_pool(worker, tasks, jobs or default_jobs(0))) as results,
    ):
        for index, outcome in results:
            outcomes[index] = outcome
            on_outcome(outcome)
            advance(outcome)
    return [outcomes[index] for index in range(len(tasks))]


def run_apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a worker process of its own, so that its crash is an error here.

    Raises
    ------
    StageError
        Raised by the function, or it failed otherwise, or its process was killed.
    """
    for outcome in _outcomes_apart(function, [Task("", arguments)]):
        if outcome.status != "written":
            raise StageError(outcome.reason)


def check_apart(check: Callable[[Path], None], paths: Sequence[Path]) -> None:
    """Call a function with each path in a worker process, so that its crash is an error here.

    Raises
    ------
    StageError
        Raised by the function, or, naming the path, its process was killed.
    """
    for outcome in _outcomes_apart(check, [Task(str(path), (path,)) for path in paths]):
        if outcome.status != "written":
            raise StageError(f"{outcome.hash}: {outcome.reason}")


def _outcomes_apart(function: Callable[..., None], calls: Sequence[Task]) -> Generator[Outcome]:
    worker = functools.partial(_apply, function)
    with closing(_run_in_pool(worker, calls, 1)) as results:
        for _, outcome in results:
            yield outcome


def _apply(function: Callable[..., None], arguments: Sequence[Any]) -> Sequence[str]:
    function(*arguments)
    return ()


# --- in a worker process ---------------------------------------------------------------------

_worker: Worker
_running: Any
"""Shared array: the process that runs each task, 0 before and -1 after."""
_lines: list[Line]


def _initialise(worker: Worker, running: Any) -> None:
    global _worker, _running, _lines
    _worker, _running = worker, running
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_parent()
    say_nothing()
    _lines = keep_log_lines()
    threadpoolctl.threadpool_limits(1)


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


def _attempt_in_worker(
    numbered: tuple[int, Task],
) -> tuple[int, Outcome | StageError, list[Line]]:
    index, task = numbered
    _lines.clear()
    _running[index] = os.getpid()
    outcome: Outcome | StageError
    try:
        outcome = attempt(_worker, task)
    except StageError as error:
        outcome = error
    # Not in a `finally`: a worker that exits in the middle has not ended its task.
    _running[index] = -1
    return index, outcome, list(_lines)


# --- the pool, in the parent -----------------------------------------------------------------


def _run_in_pool(
    worker: Worker, tasks: Sequence[Task], jobs: int
) -> Generator[tuple[int, Outcome]]:
    """Yield the number of each task and its outcome, with a new pool where one broke down."""
    todo = dict(enumerate(tasks))
    breakdowns = 0
    while todo:
        n_before = len(todo)
        patience_s = _PATIENCE_S * 2**breakdowns
        with closing(_until_breakdown(worker, dict(todo), jobs, patience_s)) as results:
            for index, outcome in results:
                del todo[index]
                yield index, outcome
        breakdowns = breakdowns + 1 if len(todo) == n_before else 0
        if breakdowns > _MOST_BREAKDOWNS:
            raise StageError("worker processes die before they begin: check the machine's memory")


def _until_breakdown(
    worker: Worker, todo: Mapping[int, Task], jobs: int, patience_s: float
) -> Generator[tuple[int, Outcome]]:
    """Yield outcomes until all are there, or none runs and none comes for `patience_s`.

    A worker that dies in its task holds none of the pool's locks: the study failed, the pool
    puts another worker in its place. One that dies between tasks may have taken a task, a result
    or a lock along: then nothing moves any more, and what is left needs a new pool.
    """
    left = dict(todo)
    with (
        uninterrupted() as raise_interruption,
        _pool(worker, max(left) + 1, min(jobs, len(left))) as (pool, running),
    ):
        results = pool.imap_unordered(_attempt_in_worker, list(left.items()))
        processes = {p.pid: p for p in multiprocessing.active_children()}
        suspects: set[int] = set()
        last_look = last_movement = time.monotonic()
        while left:
            raise_interruption()
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
            # Seen twice: in between, one that had just begun or ended its task is told apart.
            for index in sorted(orphans & suspects):
                yield index, _killed(left.pop(index), processes.get(running[index]))
            suspects = orphans
            if busy:
                last_movement = last_look
            elif last_look - last_movement > patience_s:
                return


def _killed(task: Task, process: BaseProcess | None) -> Outcome:
    # One that was born and died between two looks is not known.
    code = process.exitcode if process is not None else None
    if code == -signal.SIGPROF:
        return Outcome(task.hash, "failed", "reading it never ends, it is damaged: make it again")
    cause = "" if code is None else f" (signal {-code})" if code < 0 else " (it ended by itself)"
    hint = ", probably for want of memory: use fewer --jobs" if code == -9 else ": report it"
    return Outcome(task.hash, "failed", f"the worker process was killed{cause}{hint}")


@contextmanager
def _pool(worker: Worker, n_tasks: int, n_workers: int) -> Iterator[tuple[Pool, Any]]:
    """Yield a pool and the array that its workers mark the tasks in, and end both."""
    others = set(multiprocessing.active_children())
    try:
        running = _CONTEXT.RawArray("l", n_tasks)
        pool = _CONTEXT.Pool(n_workers, _initialise, (worker, running))
    except OSError as error:
        raise StageError(
            f"worker processes cannot be started ({error.strerror}): make room in /dev/shm and "
            "the folder for temporary files, or raise the limits (ulimit -a)"
        ) from error
    try:
        yield pool, running
    finally:
        # A killed worker may have held one of the pool's locks: then terminate() never returns.
        ending = threading.Thread(target=pool.terminate, daemon=True)
        ending.start()
        ending.join(timeout=1)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        ending.join(timeout=0.5)
