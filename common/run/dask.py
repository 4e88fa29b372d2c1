"""Studies on a dask.distributed cluster: the workers, jobs and parts of the pool, elsewhere.

The one file that knows dask, which is loaded only when asked for. The scheduler retries what a
lost worker had under way. A study that has killed its worker process `MOST_DEATHS` times is
failed; it alone, since what was begun and never ended is noted beside the parts: the scheduler's
own count blames studies that were only waiting for the same worker.

The nested function that goes over the wire is pickled by value, and finds this code by its path
on the file system that all workers share.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import importlib.util
import json
import logging
import platform
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import threadpoolctl

from common.errors import StageError, Unreachable
from common.run.atomic import clear_write_errors
from common.run.lock import show_life
from common.run.pool import give_back_memory, keep_memory
from common.run.signals import uninterrupted
from common.run.worker import (
    Job,
    Line,
    Outcome,
    Worker,
    attempt,
    broken_off,
    keep_log_lines,
    saying_nothing,
)
from common.version import VERSION

logger = logging.getLogger("tumorvolume")

# --- a study in a worker process of the cluster ----------------------------------------------

Answer = tuple[Outcome | StageError, list[Line]]

MOST_DEATHS = 3
"""Worker processes that a study may kill."""

_MATTERING = ("numpy", "scipy", "nibabel", "nilearn", "h5py", "deflate", "pydicom", "scikit-image")
"""Packages of which another version may give other bytes."""

_MOST_KEPT = 0.5
"""Part of a worker's limit that it may hold between studies: from 0.8 on dask pauses it."""

_one_at_a_time = threading.Lock()
"""Log lines, the descriptors of stdout and stderr, and libhdf5 are the process's."""


def attempt_on_worker(
    worker: bytes, job: bytes, note: Path | None, expected: Mapping[str, str]
) -> Answer:
    """Attempt a study in a worker process of the cluster; return its outcome and log lines."""
    # It comes with dask.
    import cloudpickle

    outcome: Outcome | StageError
    with _one_at_a_time, saying_nothing(), threadpoolctl.threadpool_limits(1):
        lines = keep_log_lines()
        # Dask has set the opposite.
        keep_memory()
        try:
            _refuse_other_environment(expected)
            try:
                work, study = cloudpickle.loads(worker), cloudpickle.loads(job)
            except Exception as error:
                raise StageError(
                    f"the dask worker on {socket.gethostname()} cannot load the work "
                    f"({type(error).__name__}): restart it"
                ) from error
            outcome = _attempt_noted(work, study, note) if note else _attempt(work, study)
        except Unreachable as error:
            outcome = StageError(f"the dask worker on {socket.gethostname()}: {error}")
        except StageError as error:
            # Without what led to it, which holds paths.
            outcome = StageError(*error.args)
        _give_back_much()
        return outcome, lines


def _give_back_much() -> None:
    """Give back what is free where dask would soon pause this worker for what it keeps."""
    import distributed

    here = distributed.get_worker()
    limit = here.memory_manager.memory_limit
    if limit and here.monitor.get_process_memory() > _MOST_KEPT * limit:
        gc.collect()
        give_back_memory()


def _attempt(worker: Worker, job: Job) -> Outcome:
    try:
        return attempt(worker, job)
    except SystemExit:
        # Dask would end the process, and log why.
        return broken_off(job, "it ended its worker process: report it")


def _killed_too_often(job: Job) -> Outcome:
    """Return the outcome of a study that workers do not survive."""
    return broken_off(
        job,
        f"it has killed its worker process {MOST_DEATHS} times, probably for want of memory: give "
        "the workers more",
    )


def _attempt_noted(worker: Worker, job: Job, note: Path) -> Outcome:
    """Attempt a study, unless it has killed its worker too often before."""
    if not note.parent.is_dir():
        raise StageError(
            f"the dask worker on {socket.gethostname()} does not see the folder "
            f"{note.parent.name}: --dask needs a file system that all workers share"
        )
    with clear_write_errors(note), open(note, "ab") as stream:
        deaths = stream.tell()
        stream.write(b".")
    try:
        return _killed_too_often(job) if deaths >= MOST_DEATHS else _attempt(worker, job)
    finally:
        note.unlink(missing_ok=True)


@functools.cache
def environment() -> Mapping[str, str]:
    """Return the versions of all that the bytes of a part depend on."""
    packages = {name: importlib.metadata.version(name) for name in _MATTERING}
    return {"tumorvolume": VERSION, "Python": platform.python_version(), **packages}


def _refuse_other_environment(expected: Mapping[str, str]) -> None:
    here = environment()
    for name, version in expected.items():
        if here[name] != version:
            raise StageError(
                f"the dask worker on {socket.gethostname()} has {name} {here[name]}, not "
                f"{version}: give all machines the same"
            )


# --- studies on the cluster, in the parent ---------------------------------------------------

CONNECT_S = 15
"""How long a scheduler may take to answer at first."""

NO_WORKER_S = 600
"""How long a scheduler may be without any worker."""

_POLL_S = 0.1
_LOOK_S = 1.0
_CLOSE_S = 5
_ANSWER_S = 30
_TELL_S = 60

_TALKATIVE = ("distributed", "distributed.client", "tornado", "tornado.application", "asyncio")


def run_on_cluster(
    worker: Worker, jobs: Sequence[Job], address: str, most: int | None, notes: Path | None
) -> Generator[tuple[int, Outcome]]:
    """Yield the number of each job and its outcome, in the order in which they end.

    Parameters
    ----------
    worker : function
    jobs : sequence of Job
        All their paths are absolute.
    address : str
        Of the scheduler, or the path of its scheduler file.
    most : int, optional
        How many studies may be under way at once.
    notes : Path, optional
        Folder that all workers share, for notes on the studies under way; without it the
        scheduler's setting ``allowed-failures`` decides when a study is failed.

    Raises
    ------
    StageError
        Raised by a worker for all; no scheduler there, or none any more; workers with another
        software; no worker for `NO_WORKER_S`.
    """
    if not jobs:
        return
    with uninterrupted() as raise_interruption, _client(address) as client:
        raise_interruption()
        yield from _outcomes(client, worker, jobs, most, notes, raise_interruption)


def run_on_local_cluster(
    worker: Worker, jobs: Sequence[Job], n_workers: int, notes: Path | None
) -> Generator[tuple[int, Outcome]]:
    """Do as `run_on_cluster` does, by a cluster on this machine that ends with the run."""
    if not jobs:
        return
    with (
        uninterrupted() as raise_interruption,
        _local_client(min(n_workers, len(jobs))) as client,
    ):
        raise_interruption()
        yield from _outcomes(client, worker, jobs, None, notes, raise_interruption)


def _outcomes(
    client: Any,
    worker: Worker,
    jobs: Sequence[Job],
    most: int | None,
    notes: Path | None,
    raise_interruption: Callable[[], None],
) -> Iterator[tuple[int, Outcome]]:
    send = _sender(client, worker, jobs, notes)
    waiting = deque(range(len(jobs)))
    under_way: dict[str, tuple[int, Any]] = {}
    lost: Counter[int] = Counter()
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    room = _room(client, most)
    while waiting or under_way:
        raise_interruption()
        show_life()
        at_once = next(room)
        while waiting and len(under_way) < at_once:
            index = waiting.popleft()
            future = send(index)
            under_way[future.key] = index, future
            future.add_done_callback(ended.put)
        try:
            future = ended.get(timeout=_POLL_S)
            answer = _answer(future)
        except queue.Empty:
            continue
        except TimeoutError:
            # Its result is on the way, or went down with its worker and is made again.
            ended.put(future)
            continue
        index, _ = under_way.pop(future.key)
        future.release()
        if answer is not None:
            yield index, _outcome(*answer)
        elif notes is not None and lost[index] < MOST_DEATHS:
            lost[index] += 1
            waiting.append(index)
        else:
            yield index, _killed_too_often(jobs[index])


def _outcome(outcome: Outcome | StageError, lines: Sequence[Line]) -> Outcome:
    for level, line in lines:
        logger.log(level, "%s", line)
    if isinstance(outcome, StageError):
        raise outcome
    return outcome


# --- scheduler and client --------------------------------------------------------------------


@contextmanager
def _client(address: str) -> Iterator[Any]:
    """Yield a client of the cluster; at the end what is under way is given up."""
    import distributed

    _silence_dask()
    try:
        place = _scheduler_address(address)
        _await_scheduler(place)
        client = distributed.Client(place, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise StageError(
            f"--dask {address}: no scheduler answers there: check the address, and that it runs"
        ) from error
    try:
        yield client
    finally:
        with suppress(TimeoutError, OSError):
            client.close(timeout=_CLOSE_S)


def _silence_dask() -> None:
    for name in _TALKATIVE:
        logging.getLogger(name).handlers = [logging.NullHandler()]
        logging.getLogger(name).propagate = False


def _scheduler_address(address: str) -> str:
    """Return the address, or the one that a scheduler file holds."""
    if not Path(address).is_file():
        return address
    found = json.loads(Path(address).read_text())
    if not isinstance(found, dict) or not isinstance(found.get("address"), str):
        raise ValueError("not a scheduler file")
    return str(found["address"])


def _await_scheduler(address: str) -> None:
    """Wait until a scheduler speaks; dask's client waits for ever for one that never does.

    Raises
    ------
    OSError, ValueError
        None does in time; no address.
    """
    from distributed.comm import get_address_host_port

    place = get_address_host_port(address)
    # Encrypted ones speak when they are spoken to.
    speaks_first = "://" not in address or address.startswith("tcp://")
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            with socket.create_connection(place, timeout=CONNECT_S) as connection:
                if not speaks_first or connection.recv(1):
                    return
                raise ConnectionError("closed")
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


@contextmanager
def _local_client(n_workers: int) -> Iterator[Any]:
    """Yield a client of a cluster of its own."""
    import distributed

    _silence_dask()
    with (
        _local_cluster(n_workers) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _local_cluster(n_workers: int) -> Iterator[Any]:
    import dask
    import distributed

    with (
        tempfile.TemporaryDirectory(prefix="dask-", ignore_cleanup_errors=True) as folder,
        dask.config.set({"temporary-directory": folder}),
    ):
        # Ctrl-C is for this process alone. Workers inherit the mask from the threads that start
        # them; the tracker would change it, if it were started with the first of them.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            cluster = distributed.LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                memory_limit=0,
                dashboard_address="127.0.0.1:0",
                local_directory=folder,
                silence_logs=logging.CRITICAL,
            )
        except (OSError, RuntimeError, TimeoutError) as error:
            raise StageError(
                f"the local dask cluster cannot be started ({type(error).__name__}): run without "
                "--dask"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if importlib.util.find_spec("bokeh") is not None:
            logger.info("dashboard: %s", cluster.dashboard_link)
        try:
            yield cluster
        finally:
            with suppress(TimeoutError, OSError):
                cluster.close(timeout=_CLOSE_S)


def _room(client: Any, most: int | None) -> Iterator[int]:
    """Yield how many studies may be under way: `most`, or two a worker, so that none waits."""
    n_workers, last_look, last_seen, last_told = 0, 0.0, time.monotonic(), 0.0
    told_of: set[str] = set()
    while True:
        now = time.monotonic()
        if now - last_look > _LOOK_S:
            last_look = now
            threads = _threads_of_workers(client)
            n_workers = len(threads)
            _warn_of_threads(threads, told_of)
        if n_workers:
            last_seen = now
        elif now - last_seen > NO_WORKER_S:
            raise StageError(
                f"no worker has been connected to the dask scheduler for {NO_WORKER_S} s: start "
                "workers, and run again; finished studies are kept"
            )
        elif now - last_told > _TELL_S and now - last_seen > _LOOK_S:
            last_told = now
            logger.warning("no worker is connected to the dask scheduler: waiting for one")
        yield max(1, most or 0, 0 if most else 2 * n_workers)


def _warn_of_threads(threads: Mapping[str, int], told_of: set[str]) -> None:
    """Say once of which machines the workers have threads that stay idle."""
    several = {
        address.split("://")[-1].rpartition(":")[0] for address, n in threads.items() if n > 1
    }
    if several - told_of:
        logger.warning(
            "dask workers on %s have several threads, and do one study at a time: start more "
            "workers, with --nthreads 1",
            ", ".join(sorted(several - told_of)),
        )
        told_of |= several


def _threads_of_workers(client: Any) -> dict[str, int]:
    """Return the threads of each worker by its address."""
    try:
        return dict(client.sync(client.scheduler.ncores, callback_timeout=_ANSWER_S))
    except (OSError, TimeoutError, AttributeError) as error:
        # A client that has given up has no scheduler.
        raise _scheduler_gone() from error


def _scheduler_gone() -> StageError:
    return StageError(
        "the dask scheduler does not answer any more: start it, and run again; finished studies "
        "are kept"
    )


def _sender(
    client: Any, worker: Worker, jobs: Sequence[Job], notes: Path | None
) -> Callable[[int], Any]:
    """Return what submits the job of a number and returns its future."""
    import cloudpickle

    function = _portable(cloudpickle.dumps(worker))
    # Another run on the same scheduler may have the same studies.
    run = uuid.uuid4().hex
    numbers = iter(range(sys.maxsize))

    def send(index: int) -> Any:
        job = jobs[index]
        note = None if notes is None else notes / f"{job.hash}.begun.tmp"
        return client.submit(
            function,
            cloudpickle.dumps(job),
            note,
            key=f"{job.hash}-{run}-{next(numbers)}",
            pure=False,
            retries=0,
        )

    return send


def _answer(future: Any) -> Answer | None:
    """Return what a worker sent back; None where the scheduler has lost too many workers to it.

    Raises
    ------
    TimeoutError
        The answer is not there yet.
    """
    import distributed

    try:
        answer: Answer | str = future.result(timeout=_POLL_S)
    except distributed.KilledWorker:
        return None
    except TimeoutError:
        raise
    except (distributed.CancelledError, OSError) as error:
        raise _scheduler_gone() from error
    except Exception as error:
        raise StageError(
            f"the dask workers cannot load the work ({type(error).__name__}): give them the Python "
            "and the packages of this machine"
        ) from error
    if isinstance(answer, str):
        raise StageError(answer)
    return answer


def _portable(worker: bytes) -> Callable[[bytes, Path | None], Answer | str]:
    """Return a function that any Python can load, and that never raises.

    Dask logs the arguments of a function that raises: they hold the raw project's paths.
    """
    root = str(Path(__file__).resolve().parents[2])
    expected = environment()

    def attempt_there(job: bytes, note: Path | None) -> Answer | str:
        import socket
        import sys

        if root not in sys.path:
            sys.path.append(root)
        try:
            from common.run.dask import attempt_on_worker
        except Exception as error:
            return (
                f"the dask worker on {socket.gethostname()} cannot load this software "
                f"({type(error).__name__}): workers need the file system and the packages of this "
                "machine"
            )
        return attempt_on_worker(worker, job, note, expected)

    return attempt_there
