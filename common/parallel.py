"""Fan-out of studies over a multiprocessing.Pool, with progress and without a way to hang.

A worker always runs in a worker process, for one job too: a decoder that crashes, or the kernel
out of memory, takes one study along and not the run. What a Pool alone does not do is added
here: a worker that is killed is noticed, its study fails with that reason, and the others go on.
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing import connection
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from common.errors import StageError
from common.interruption import uninterrupted
from common.machine import default_jobs
from common.processes import CONTEXT, become_worker, clear_start_errors, why_it_ended
from common.progress import progress
from common.worker import Line, Outcome, Task, Worker, attempt

logger = logging.getLogger("tumorvolume")

LOCAL_CLUSTER = "local"
"""The address that stands for a dask cluster of this run's own, on this machine."""

_POLL_S = 0.05
_LOOK_S = 0.2
_PATIENCE_S = 3.0
_DEATH_S = 1.0
_MOST_BREAKDOWNS = 3


def run_studies(
    worker: Worker,
    tasks: Sequence[Task],
    jobs: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    dask: str | None = None,
    notes: Path | None = None,
) -> list[Outcome]:
    """Run `worker` on the payload of every task and return the outcomes in task order.

    A `StudyError`, any other exception, and the death of a worker process each fail one study.
    `on_outcome` is called with each outcome as it comes. `jobs` defaults to the CPUs. With `dask`,
    the address of a scheduler, its workers do the work, and take notes in the folder `notes`.

    Raises
    ------
    StageError
        Raised by a worker for all (a full disk), or workers that keep dying without work.
    """
    outcomes: dict[int, Outcome] = {}
    with (
        progress(len(tasks)) as advance,
        closing(_run(worker, tasks, jobs, dask, notes)) as results,
    ):
        for index, outcome in results:
            outcomes[index] = outcome
            on_outcome(outcome)
            advance(outcome)
    return [outcomes[index] for index in range(len(tasks))]


def _run(
    worker: Worker, tasks: Sequence[Task], jobs: int | None, dask: str | None, notes: Path | None
) -> Generator[tuple[int, Outcome]]:
    if dask is None:
        return _run_in_pool(worker, tasks, jobs or default_jobs(0))
    # Slow to load, and not there for those who do not ask for it.
    from common.dask_cluster import run_on_cluster

    return run_on_cluster(worker, tasks, dask, jobs, notes)


# --- in a worker process ---------------------------------------------------------------------

_worker: Worker
_running: Any
"""Shared array: the process that runs each task, 0 before and -1 after."""
_lines: list[Line]


def _initialise(worker: Worker, running: Any) -> None:
    global _worker, _running, _lines
    _worker, _running = worker, running
    _lines = become_worker()


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
    return Outcome(task.hash, "failed", why_it_ended(code))


@contextmanager
def _pool(worker: Worker, n_tasks: int, n_workers: int) -> Iterator[tuple[Pool, Any]]:
    """Yield a pool and the array that its workers mark the tasks in, and end both."""
    others = set(multiprocessing.active_children())
    with clear_start_errors():
        running = CONTEXT.RawArray("l", n_tasks)
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
