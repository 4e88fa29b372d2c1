"""Studies over worker processes, those of this machine or of a cluster, with progress."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path

from common.run.console import progress
from common.run.machine import default_jobs
from common.run.pool import run_in_pool
from common.run.worker import Job, Outcome, Worker


def run_studies(
    worker: Worker,
    jobs: Sequence[Job],
    n_workers: int | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    dask: str | None = None,
    notes: Path | None = None,
) -> list[Outcome]:
    """Run `worker` on every job and return the outcomes in their order.

    A `StudyError`, any other exception, and the death of a worker process each fail one study.

    Parameters
    ----------
    worker : function
        Module-level; what it returns is in the outcome.
    jobs : sequence of Job
    n_workers : int, optional
        Worker processes; the CPUs by default.
    on_outcome : function, optional
        Called with each outcome as it comes.
    dask : str, optional
        Address of a scheduler whose workers do the work, and take notes in the folder `notes`.
    notes : Path, optional

    Raises
    ------
    StageError
        Raised by a worker for all (a full disk), or workers that keep dying without work.
    """
    outcomes: dict[int, Outcome] = {}
    with (
        progress(len(jobs)) as advance,
        closing(_outcomes(worker, jobs, n_workers, dask, notes)) as results,
    ):
        for index, outcome in results:
            outcomes[index] = outcome
            on_outcome(outcome)
            advance(outcome)
    return [outcomes[index] for index in range(len(jobs))]


def _outcomes(
    worker: Worker,
    jobs: Sequence[Job],
    n_workers: int | None,
    dask: str | None,
    notes: Path | None,
) -> Generator[tuple[int, Outcome]]:
    if dask is None:
        return run_in_pool(worker, jobs, n_workers or default_jobs(0))
    # Slow to load, and not there for those who do not ask for it.
    from common.run.dask import run_on_cluster

    return run_on_cluster(worker, jobs, dask, n_workers, notes)
