"""Fan-out of studies over a multiprocessing.Pool, with progress and without a way to hang.

A worker function is module-level, takes one study's task and returns its warnings; all that it
makes it writes itself. What a Pool alone does not do is added here: a worker that is killed is
noticed, its study fails with that reason, and the others go on.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import threadpoolctl
import tqdm

from common.errors import IncompleteStudy, StageError, StudyError

logger = logging.getLogger("tumorvolume")

PROGRESS = logging.WARNING - 5
"""Level of progress lines: shown by default, not with --quiet."""

Status = Literal["written", "unchanged", "skipped", "failed"]
Worker = Callable[[Any], Sequence[str]]

_POLL_S = 0.2
_PROGRESS_EVERY_S = 60.0
_MOST_IDLE_DEATHS = 10


@dataclass(frozen=True)
class Outcome:
    """How one study ended.

    Attributes
    ----------
    hash : str
    status : "written", "unchanged", "skipped" or "failed"
    reason : str
        Why it was skipped or failed.
    warnings : tuple of str
    private : str
        More on the reason, for the private mapping alone.
    """

    hash: str
    status: Status
    reason: str = ""
    warnings: tuple[str, ...] = ()
    private: str = ""


@dataclass(frozen=True)
class Task:
    """One study's work: the hash it is known by and what its worker needs (picklable)."""

    hash: str
    payload: Any


def available_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_studies(
    worker: Worker,
    tasks: Sequence[Task],
    jobs: int,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run `worker` on the payload of every task and return the outcomes in task order.

    A `StudyError`, any other exception, and the death of a worker process each fail one study.
    `on_outcome` is called with each outcome as it comes.

    Raises
    ------
    StageError
        Raised by a worker for all (a full disk), or workers that keep dying without work.
    """
    outcomes: dict[int, Outcome] = {}
    with _progress(len(tasks)) as advance:
        runner = _run_here if jobs == 1 or len(tasks) <= 1 else _run_in_pool
        for index, outcome in runner(worker, tasks, jobs):
            outcomes[index] = outcome
            on_outcome(outcome)
            advance(outcome)
    return [outcomes[index] for index in range(len(tasks))]


def _attempt(worker: Worker, task: Task) -> Outcome:
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
        logger.debug("%s: %s", task.hash, _identity_free_traceback(error))
        return Outcome(
            task.hash,
            "failed",
            f"unexpected {type(error).__name__}: run this study again with --debug and report it",
        )


def _identity_free_traceback(error: Exception) -> str:
    """Return where an error arose, without its message, which may quote a header or a path."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{os.path.basename(f.filename)}:{f.lineno} in {f.name}" for f in frames]
    return f"{type(error).__name__} at " + " > ".join(places)


def _run_here(worker: Worker, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Outcome]]:
    with threadpoolctl.threadpool_limits(1):
        for index, task in enumerate(tasks):
            yield index, _attempt(worker, task)


# --- the pool --------------------------------------------------------------------------------

_worker: Worker
_running: Any
"""Shared array: the process that runs each task, 0 before and -1 after."""


def _initialise(worker: Worker, running: Any) -> None:
    global _worker, _running
    _worker, _running = worker, running
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threadpoolctl.threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _attempt_in_worker(numbered: tuple[int, Task]) -> tuple[int, Outcome | StageError]:
    index, task = numbered
    _running[index] = os.getpid()
    try:
        return index, _attempt(_worker, task)
    except StageError as error:
        return index, error
    finally:
        _running[index] = -1


def _run_in_pool(worker: Worker, tasks: Sequence[Task], jobs: int) -> Iterator[tuple[int, Outcome]]:
    todo = dict(enumerate(tasks))
    idle_deaths = 0
    while todo:
        running = multiprocessing.RawArray("l", len(tasks))
        with _pool(worker, running, min(jobs, len(todo))) as (pool, processes):
            results = pool.imap_unordered(_attempt_in_worker, list(todo.items()))
            dead: list[BaseProcess] = []
            while todo and not dead:
                try:
                    index, outcome = results.next(timeout=_POLL_S)
                except multiprocessing.TimeoutError:
                    dead = [process for process in processes if process.exitcode is not None]
                    continue
                if isinstance(outcome, StageError):
                    raise outcome
                del todo[index]
                yield index, outcome
        victims = [i for i in todo if running[i] in {process.pid for process in dead}]
        for index in victims:
            yield index, _killed(todo.pop(index), dead)
        if dead and not victims:
            idle_deaths += 1
            if idle_deaths > _MOST_IDLE_DEATHS:
                raise StageError("worker processes keep being killed: check the machine's memory")


def _killed(task: Task, dead: Sequence[BaseProcess]) -> Outcome:
    signals = sorted({-code for process in dead if (code := process.exitcode or 0) < 0})
    cause = f"signal {signals[0]}" if signals else "it ended by itself"
    hint = ", probably for want of memory: use fewer --jobs" if 9 in signals else ": report it"
    return Outcome(task.hash, "failed", f"the worker process was killed ({cause}){hint}")


@contextmanager
def _pool(worker: Worker, running: Any, n_workers: int) -> Iterator[tuple[Pool, list[BaseProcess]]]:
    others = set(multiprocessing.active_children())
    pool = multiprocessing.Pool(n_workers, _initialise, (worker, running))
    processes = [p for p in multiprocessing.active_children() if p not in others]
    try:
        yield pool, processes
    finally:
        # A killed worker may have held one of the pool's locks: then terminate() never returns.
        ending = threading.Thread(target=pool.terminate, daemon=True)
        ending.start()
        ending.join(timeout=2)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        ending.join(timeout=2)


# --- progress --------------------------------------------------------------------------------


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Outcome], None]]:
    """Yield what to call with each outcome: a bar on a terminal, sparse plain lines elsewhere."""
    if sys.stderr.isatty():
        tqdm.tqdm.monitor_interval = 0
        with tqdm.tqdm(total=total, unit="study", disable=total == 0) as bar:
            yield lambda outcome: bar.update()
    else:
        yield _plain_lines(total)


def _plain_lines(total: int) -> Callable[[Outcome], None]:
    done, failed, last = 0, 0, time.monotonic()

    def advance(outcome: Outcome) -> None:
        nonlocal done, failed, last
        done += 1
        failed += outcome.status == "failed"
        if done < total and time.monotonic() - last >= _PROGRESS_EVERY_S:
            last = time.monotonic()
            logger.log(PROGRESS, "%d of %d studies done, %d failed", done, total, failed)

    return advance
