"""Who does the work: worker processes of this machine or of a cluster, with progress."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from common.run.console import progress
from common.run.machine import default_jobs
from common.run.pool import run_in_pool
from common.run.worker import Job, Outcome, Worker

logger = logging.getLogger("tumorvolume")

LOCAL_CLUSTER = "local"
"""Stands for a dask cluster of this run's own, on this machine."""


@dataclass(frozen=True)
class Engine:
    """Who does the work.

    Attributes
    ----------
    n_workers : int, optional
        Worker processes; None: as many as fit. On a cluster of others: studies under way at most.
    dask : str, optional
        Address of a scheduler, or its file, whose workers do the work; or `LOCAL_CLUSTER`.
    """

    n_workers: int | None = None
    dask: str | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether workers may be on other machines, which see what is written here later."""
        return self.dask is not None


def run_studies(
    worker: Worker,
    jobs: Sequence[Job],
    engine: Engine,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    notes: Path | None = None,
) -> list[Outcome]:
    """Run `worker` on every job and return the outcomes in their order.

    A `StudyError`, any other exception, and the death of a worker process each fail one study.

    Parameters
    ----------
    worker : function
        Module-level; what it returns is in the outcome.
    jobs : sequence of Job
    engine : Engine
    on_outcome : function, optional
        Called with each outcome as it comes.
    notes : Path, optional
        Folder in which the workers of a cluster note what they have begun.

    Raises
    ------
    StageError
        Raised by a worker for all (a full disk), or workers that keep dying without work.
    """
    outcomes: dict[int, Outcome] = {}
    with (
        progress(len(jobs)) as advance,
        closing(_outcomes(worker, jobs, engine, notes)) as results,
    ):
        for index, outcome in results:
            outcomes[index] = outcome
            on_outcome(outcome)
            advance(outcome)
    return [outcomes[index] for index in range(len(jobs))]


def _outcomes(
    worker: Worker, jobs: Sequence[Job], engine: Engine, notes: Path | None
) -> Generator[tuple[int, Outcome]]:
    if engine.dask is None:
        return run_in_pool(worker, jobs, engine.n_workers or _fitting_workers(jobs))
    # Slow to load, and not there for those who do not ask for it.
    from common.run.dask import run_on_cluster, run_on_local_cluster

    if engine.dask == LOCAL_CLUSTER:
        n_workers = engine.n_workers or _fitting_workers(jobs)
        return run_on_local_cluster(worker, jobs, n_workers, notes)
    return run_on_cluster(worker, jobs, engine.dask, engine.n_workers, notes)


def _fitting_workers(jobs: Sequence[Job]) -> int:
    """Return how many of the largest studies this machine can work on at once."""
    needed = max((job.memory for job in jobs), default=0)
    n_workers = default_jobs(needed)
    if needed:
        logger.info(
            "%d worker processes; the largest study takes about %.1f GB", n_workers, needed / 1e9
        )
    return n_workers
