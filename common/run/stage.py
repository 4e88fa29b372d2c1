"""What every stage shares: lock, parts, resuming, keeping what is unchanged, atomic replacement.

A stage plans its studies; each worker writes one finished part file, in the layout of the final
output, into ``OUTPUT.parts/``; the stage assembles parts and kept studies into a file beside it,
which then replaces OUTPUT. A part's name holds the fingerprint of its input and options, so a
part of other options or of an older version is never taken for this one's.
"""

import csv
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import StageError, WorkerKilled
from common.run.atomic import (
    clear_write_errors,
    list_temporaries,
    remove_listed,
    temporary_beside,
)
from common.run.console import PROGRESS
from common.run.machine import default_jobs
from common.run.output import Assemble, parts_folder, replace_output, write_beside
from common.run.pool import LOCAL_CLUSTER, run_studies
from common.run.worker import Outcome, Task, Worker

logger = logging.getLogger("tumorvolume")


@dataclass(frozen=True)
class Study:
    """One study in the plan.

    Attributes
    ----------
    hash : str
    fingerprint : str
        Digest of all that its part depends on: input, options of value, layout version.
    payload : object
        What the worker needs besides the path of its part; picklable.
    beside : tuple of Path
        Files besides OUTPUT that its worker writes; where one is missing, it runs again.
    memory_bytes : int
        What its worker takes at most, roughly; 0 where unknown.
    """

    hash: str
    fingerprint: str
    payload: Any
    beside: tuple[Path, ...] = ()
    memory_bytes: int = 0

    @property
    def all_beside(self) -> bool:
        """Whether every file that the worker writes beside OUTPUT is there."""
        return all(path.exists() for path in self.beside)


@dataclass(frozen=True)
class PartTask:
    """What a worker gets: the study's payload and where its finished part goes.

    `beside` are the files besides OUTPUT that it writes; see `Study`.
    """

    hash: str
    payload: Any
    part: Path
    beside: tuple[Path, ...] = ()


BeforeReplacing = Callable[[Path | None, Sequence[Outcome]], None]
"""Called with the path of the complete new output, before it takes its place, and the outcomes;
with OUTPUT itself where nothing changed, with None where the old output is left for want of any
study."""


def present_content(
    output: Path, read: Callable[[Path], Mapping[str, str]], *, force: bool
) -> Mapping[str, str] | None:
    """Return the fingerprints by hash that `read` finds in OUTPUT; {} where there is none.

    None where they are not known: by `force`, or because it is damaged, which is said.

    Raises
    ------
    WorkerKilled
        That says nothing against the file.
    """
    if not output.exists():
        return {}
    if force:
        return None
    try:
        return read(output)
    except WorkerKilled:
        raise
    except StageError as error:
        logger.warning("the old output is of no use and is made anew: %s", error)
        return None


def run_stage(
    output: Path,
    studies: Sequence[Study],
    finished: Mapping[str, str] | None,
    worker: Worker,
    assemble: Assemble,
    jobs: int | None,
    before_replacing: BeforeReplacing = lambda path, outcomes: None,
    failures_of: str = "",
    known_skips: Mapping[str, str] | None = None,
    dask: str | None = None,
) -> list[Outcome]:
    """Compute what is missing, then replace the output; return the outcomes in study order.

    Parameters
    ----------
    output : Path
        Locked by the caller (`exclusive`).
    studies : sequence of Study
        All that the output shall hold; their hashes differ.
    finished : dict of hash to fingerprint, or None
        What the present output holds (`present_content`).
    worker : function
        Gets a `PartTask`, writes the part (`writing_part`) and returns warnings.
    assemble : function
        Writes the whole output from parts and kept studies.
    jobs : int, optional
        Worker processes; by default what CPUs and memory suffice for.
    before_replacing : function, optional
        See `BeforeReplacing`.
    failures_of : str
        The stage's name, where failed studies are to be listed beside the output.
    known_skips : dict of hash to reason, optional
        Skipped studies that an earlier run told of already.
    dask : str, optional
        Address of a dask scheduler whose workers do the work.

    Raises
    ------
    StageError
        No study at all could be written, and the old output would be lost; or a full disk.
    """
    parts = parts_folder(output)
    finished, is_known = finished or {}, finished is not None
    _remove_replaced(parts, studies, output)
    kept = [s for s in studies if finished.get(s.hash) == s.fingerprint and s.all_beside]
    kept_hashes = {study.hash for study in kept}
    part_of = {s.hash: parts / _part_name(s, output) for s in studies if s.hash not in kept_hashes}
    todo = [
        s for s in studies if s.hash in part_of and not (part_of[s.hash].exists() and s.all_beside)
    ]
    _report_plan(studies, kept, todo, finished)
    with clear_write_errors(output):
        if part_of:
            parts.mkdir(exist_ok=True)
            list_temporaries(parts, (path for study in todo for path in study.beside))
    tasks = [Task(s.hash, _part_task(s, part_of[s.hash])) for s in todo]
    try:
        computed = {
            outcome.hash: outcome
            for outcome in run_studies(
                worker,
                tasks,
                worker_processes(jobs, dask, todo),
                lambda outcome: report(outcome, known_skips or {}),
                dask,
                parts,
            )
        }
    finally:
        remove_listed(parts)
    if dask is not None and part_of:
        # A file server's client may remember that parts were not there; this makes it look again.
        os.listdir(parts)
    outcomes = [
        Outcome(study.hash, "unchanged")
        if study.hash in kept_hashes
        else computed.get(study.hash, Outcome(study.hash, "written"))
        for study in studies
    ]
    sources = {study.hash: output for study in kept}
    sources |= {o.hash: part_of[o.hash] for o in outcomes if o.status == "written"}
    if failures_of:
        _list_failures(output, failures_of, outcomes)
    would_be_lost = output.exists() and not sources and (finished or not is_known)
    is_unchanged = output.exists() and sources.keys() == finished.keys() == kept_hashes
    if would_be_lost or is_unchanged:
        with clear_write_errors(output):
            before_replacing(None if would_be_lost else output, outcomes)
    else:
        _report_dropped(finished, outcomes)
        replace_output(output, assemble, sources, lambda path: before_replacing(path, outcomes))
    if would_be_lost:
        raise StageError(f"{output}: left as it was, for no study could be written: see above")
    return outcomes


def worker_processes(jobs: int | None, dask: str | None, todo: Sequence[Study]) -> int | None:
    """Return how many worker processes to start; None where a cluster has its own."""
    if jobs is not None or dask not in (None, LOCAL_CLUSTER):
        return jobs
    needed = max((study.memory_bytes for study in todo), default=0)
    jobs = default_jobs(needed)
    logger.info("%d worker processes; the largest study takes about %.1f GB", jobs, needed / 1e9)
    return jobs


def _part_task(study: Study, part: Path) -> PartTask:
    # Workers of a cluster are in other folders.
    beside = tuple(path.absolute() for path in study.beside)
    return PartTask(study.hash, study.payload, part, beside)


def _report_plan(
    studies: Sequence[Study],
    kept: Sequence[Study],
    todo: Sequence[Study],
    finished: Mapping[str, str],
) -> None:
    resumed = len(studies) - len(kept) - len(todo)
    logger.info("%d studies: %d unchanged, %d to compute", len(studies), len(kept), len(todo))
    if resumed:
        logger.log(PROGRESS, "resuming: %d studies are finished already", resumed)
    vanished = finished.keys() - {study.hash for study in studies}
    _report_absent("are no longer in the input", vanished)


def _report_dropped(finished: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    held = {o.hash for o in outcomes if o.status in ("written", "unchanged")}
    _report_absent(
        "failed or are incomplete now", {o.hash for o in outcomes} & finished.keys() - held
    )


def _report_absent(why: str, hashes: Set[str]) -> None:
    if hashes:
        listed = ", ".join(sorted(hashes)[:10]) + (" ..." if len(hashes) > 10 else "")
        logger.warning("%d studies of the old output %s and stay out: %s", len(hashes), why, listed)


def report(outcome: Outcome, known_skips: Mapping[str, str] | None = None) -> None:
    """Log one outcome by the study's hash; a skip that is known already only with --verbose."""
    for warning in outcome.warnings:
        logger.warning("%s: %s", outcome.hash, warning)
    if outcome.status == "failed":
        logger.error("%s: %s", outcome.hash, outcome.reason)
    elif outcome.status == "skipped":
        known = (known_skips or {}).get(outcome.hash) == outcome.reason
        level = logging.INFO if known else logging.WARNING
        logger.log(level, "%s: skipped, %s", outcome.hash, outcome.reason)
    else:
        logger.info("%s: %s", outcome.hash, outcome.status)


def failures_file(output: Path) -> Path:
    """Return where failed studies are listed."""
    return output.with_name(f"{output.stem}_failed.csv")


def _list_failures(output: Path, stage: str, outcomes: Sequence[Outcome]) -> None:
    """Write ``OUTPUT_failed.csv``; where no study failed, there is none."""
    path = failures_file(output)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if not failed:
        for stale in (path, temporary_beside(path)):
            stale.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("hash", "stage", "reason"))
    writer.writerows((outcome.hash, stage, outcome.reason) for outcome in failed)
    write_beside(path, text.getvalue())
    logger.log(PROGRESS, "failed studies are listed in %s", path)


def _part_name(study: Study, output: Path) -> str:
    return f"{study.hash}.{study.fingerprint[:16]}{output.suffix}"


def _remove_replaced(parts: Path, studies: Sequence[Study], output: Path) -> None:
    """Remove what a run with other options, that never ended, has put beside OUTPUT.

    Its part of the study tells; else OUTPUT would be kept with files beside it that do not fit.
    """
    beside = {study.hash: study for study in studies if study.beside}
    for part in sorted(parts.iterdir()) if beside and parts.is_dir() else ():
        study = beside.get(part.name.removesuffix(output.suffix).rpartition(".")[0])
        if study is not None and part.name != _part_name(study, output):
            for path in (*study.beside, part):
                path.unlink(missing_ok=True)
