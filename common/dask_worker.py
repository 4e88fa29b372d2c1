"""A study in a worker process of a dask cluster, which this code shares with code of others.

Knows no dask: `dask_cluster` sends here, pickled, what is to be done.
"""

import functools
import importlib.metadata
import platform
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

import threadpoolctl

from common.atomic_files import clear_write_errors
from common.cli import VERSION
from common.errors import StageError
from common.processes import keep_memory
from common.worker import Line, Outcome, Task, Worker, attempt, keep_log_lines, saying_nothing

Answer = tuple[Outcome | StageError, list[Line]]

MOST_DEATHS = 3
"""Worker processes that a study may kill."""

_MATTERING = ("numpy", "scipy", "nibabel", "nilearn", "h5py", "isal", "pydicom", "scikit-image")
"""Packages of which another version may give other bytes."""

_one_at_a_time = threading.Lock()
"""Log lines, the descriptors of stdout and stderr, and libhdf5 are the process's."""


def attempt_on_worker(
    worker: bytes, task: bytes, note: Path | None, expected: Mapping[str, str]
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
                work, study = cloudpickle.loads(worker), cloudpickle.loads(task)
            except Exception as error:
                raise StageError(
                    f"a dask worker cannot load the work ({type(error).__name__}): restart it"
                ) from error
            outcome = _attempt_noted(work, study, note) if note else _attempt(work, study)
        except StageError as error:
            # Without what led to it, which holds paths.
            outcome = StageError(*error.args)
        return outcome, lines


def _attempt(worker: Worker, task: Task) -> Outcome:
    try:
        return attempt(worker, task)
    except SystemExit:
        # Dask would end the process, and log why.
        return Outcome(task.hash, "failed", "it ended its worker process: report it")


def killer(task: Task) -> Outcome:
    """Return the outcome of a study that workers do not survive."""
    return Outcome(
        task.hash,
        "failed",
        "it has killed its worker process three times, probably for want of memory: give the "
        "workers more",
    )


def _attempt_noted(worker: Worker, task: Task, note: Path) -> Outcome:
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
        return killer(task) if deaths >= MOST_DEATHS else _attempt(worker, task)
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
