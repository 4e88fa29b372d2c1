"""What every stage does with its studies: plan, compute, replace.

A stage plans its studies; each worker writes one finished part file, in the layout of the final
output, into ``OUTPUT.parts/``; the stage assembles parts and kept studies into a file beside it,
which then replaces OUTPUT. A part's name holds the fingerprint of its input and options, so a
part of other options or of an older version is never taken for this one's.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import DamagedSource, StageError, Unreachable, WorkerKilled
from common.run import output as outputs
from common.run.atomic import (
    clear_write_errors,
    list_temporaries,
    remove_listed,
    temporary_beside,
)
from common.run.console import PROGRESS
from common.run.fan_out import Engine, run_studies
from common.run.worker import Job, Outcome, Worker

logger = logging.getLogger("tumorvolume")

ReadFinished = Callable[[Path], Mapping[str, str]]
"""Returns the fingerprints, by hash, of the studies that a present output holds."""

WriteBeside = Callable[[Path | None, Sequence[Outcome]], None]
"""Called with the path of the complete new output, before it takes its place, and the outcomes;
with OUTPUT itself where nothing changed, with None where the old output is left for want of any
study."""


def _write_nothing(path: Path | None, outcomes: Sequence[Outcome]) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """What one stage does.

    Attributes
    ----------
    output : Path
        Locked by the caller (`exclusive`).
    studies : sequence of Job
        All that the output shall hold; their hashes differ.
    worker : function
        Gets a `Job` with its part's path, writes the part (`writing_part`), returns `Written`.
    assemble : function
        Writes the whole output from parts and kept studies.
    read_finished : function
        See `ReadFinished`.
    write_beside : function
        See `WriteBeside`.
    name : str
        Where failed studies are to be listed beside the output: what the list calls the stage.
    known_skips : dict of hash to reason
        Skipped studies that an earlier run told of already.
    read_absent : function, optional
        Where the output tells of studies that are not in it: returns what a present one tells,
        status and reason by hash; `assemble` takes the same as `absent`.
    listed : sequence of Outcome
        Of studies that ended before they could be planned.
    """

    output: Path
    studies: Sequence[Job]
    worker: Worker
    assemble: outputs.Assemble
    read_finished: ReadFinished
    write_beside: WriteBeside = _write_nothing
    name: str = ""
    known_skips: Mapping[str, str] = field(default_factory=dict)
    read_absent: Callable[[Path], Mapping[str, tuple[str, str]]] | None = None
    listed: Sequence[Outcome] = ()


@dataclass(frozen=True)
class _Plan:
    """What is kept of the old output, and what is to be computed.

    Attributes
    ----------
    kept : set of hash
    todo : sequence of Job
        Without finished parts.
    parts : dict of hash to Path
        Of all studies that are not kept.
    finished : dict of hash to fingerprint
        What the old output holds; {} also where that is not known.
    is_known : bool
        Whether it is known what the old output holds.
    """

    kept: Set[str]
    todo: Sequence[Job]
    parts: Mapping[str, Path]
    finished: Mapping[str, str]
    is_known: bool


def run_stage(stage: Stage, engine: Engine, *, force: bool = False) -> list[Outcome]:
    """Compute what is missing, then replace the output; return the outcomes in study order.

    Parameters
    ----------
    stage : Stage
    engine : Engine
    force : bool
        Compute all studies anew.

    Raises
    ------
    StageError
        No study at all could be written, and the old output would be lost; or a full disk.
    """
    plan = _plan(stage, force=force)
    outcomes = _compute(stage, plan, engine)
    made_anew: set[Path] = set()
    while True:
        try:
            _replace(stage, plan, outcomes)
            return outcomes
        except DamagedSource as error:
            # A part that an interrupted run has left, or that the disk has lost meanwhile.
            if error.source in made_anew or error.source not in plan.parts.values():
                raise
            made_anew.add(error.source)
            outcomes = _make_anew(stage, plan, engine, outcomes, error.source)


# --- plan ------------------------------------------------------------------------------------


def _plan(stage: Stage, *, force: bool) -> _Plan:
    present = present_content(stage.output, stage.read_finished, force=force)
    finished = present or {}
    _remove_replaced(stage)
    folder = outputs.parts_folder(stage.output)
    kept = {
        job.hash
        for job in stage.studies
        if finished.get(job.hash) == job.fingerprint and job.has_all_beside
    }
    parts = {
        job.hash: folder / part_name(job, stage.output)
        for job in stage.studies
        if job.hash not in kept
    }
    todo = [
        replace(job, part=parts[job.hash], beside=tuple(path.absolute() for path in job.beside))
        for job in stage.studies
        if job.hash in parts and not (parts[job.hash].exists() and job.has_all_beside)
    ]
    _report_plan(stage, len(kept), len(todo), finished)
    return _Plan(kept, todo, parts, finished, present is not None)


def present_content(output: Path, read: ReadFinished, *, force: bool) -> Mapping[str, str] | None:
    """Return the fingerprints by hash that `read` finds in OUTPUT; {} where there is none.

    None where they are not known: by `force`, or because it is damaged, which is said.

    Raises
    ------
    WorkerKilled, Unreachable
        They say nothing against the file.
    """
    if not output.exists():
        return {}
    if force:
        return None
    try:
        return read(output)
    except (WorkerKilled, Unreachable):
        raise
    except StageError as error:
        logger.warning("the old output is of no use and is made anew: %s", error)
        return None


def part_name(job: Job, output: Path) -> str:
    """Return the name of a study's finished part, which tells what it was made from."""
    return f"{job.hash}.{job.fingerprint[:16]}{output.suffix}"


def _remove_replaced(stage: Stage) -> None:
    """Remove what a run with other options, that never ended, has put beside OUTPUT.

    Its part of the study tells; else OUTPUT would be kept with files beside it that do not fit.
    """
    output = stage.output
    parts = outputs.parts_folder(output)
    beside = {job.hash: job for job in stage.studies if job.beside}
    for part in sorted(parts.iterdir()) if beside and parts.is_dir() else ():
        job = beside.get(part.name.removesuffix(output.suffix).rpartition(".")[0])
        if job is not None and part.name != part_name(job, output):
            for path in (*job.beside, part):
                path.unlink(missing_ok=True)


def _report_plan(stage: Stage, n_kept: int, n_todo: int, finished: Mapping[str, str]) -> None:
    n_studies = len(stage.studies)
    resumed = n_studies - n_kept - n_todo
    logger.info("%d studies: %d unchanged, %d to compute", n_studies, n_kept, n_todo)
    if resumed:
        logger.log(PROGRESS, "resuming: %d studies are finished already", resumed)
    vanished = finished.keys() - {job.hash for job in stage.studies}
    _report_absent("are no longer in the input", vanished)


# --- compute ---------------------------------------------------------------------------------


def _compute(stage: Stage, plan: _Plan, engine: Engine) -> list[Outcome]:
    """Have the workers write the parts that are missing."""
    parts = outputs.parts_folder(stage.output)
    with clear_write_errors(stage.output):
        if plan.parts:
            parts.mkdir(exist_ok=True)
            list_temporaries(parts, (path for job in plan.todo for path in job.beside))
    try:
        computed = run_studies(
            stage.worker,
            plan.todo,
            engine,
            lambda outcome: report(outcome, stage.known_skips),
            parts,
        )
    finally:
        remove_listed(parts)
    if engine.dask is not None and plan.parts:
        # A file server's client may remember that parts were not there; this makes it look again.
        os.listdir(parts)
    found = {outcome.hash: outcome for outcome in computed}
    return [
        Outcome(job.hash, "unchanged")
        if job.hash in plan.kept
        else found.get(job.hash, Outcome(job.hash, "written"))
        for job in stage.studies
    ]


def _make_anew(
    stage: Stage, plan: _Plan, engine: Engine, outcomes: Sequence[Outcome], part: Path
) -> list[Outcome]:
    """Have a worker write a damaged part once more; return the outcomes with that study's."""
    [damaged] = (job for job in stage.studies if plan.parts.get(job.hash) == part)
    logger.warning("%s: its finished part is damaged and is made anew", damaged.hash)
    part.unlink(missing_ok=True)
    job = replace(damaged, part=part, beside=tuple(path.absolute() for path in damaged.beside))
    again = _compute(stage, replace(plan, todo=[job]), engine)
    return [
        new if new.hash == damaged.hash else old for old, new in zip(outcomes, again, strict=True)
    ]


# --- replace ---------------------------------------------------------------------------------


def _replace(stage: Stage, plan: _Plan, outcomes: Sequence[Outcome]) -> None:
    """Put a new output in OUTPUT's place, unless it would be the same or empty."""
    output = stage.output
    sources = dict.fromkeys((job.hash for job in stage.studies if job.hash in plan.kept), output)
    sources |= {o.hash: plan.parts[o.hash] for o in outcomes if o.status == "written"}
    if stage.name:
        _list_failures(output, stage.name, outcomes)
    would_be_lost = output.exists() and not sources and (plan.finished or not plan.is_known)
    is_unchanged = output.exists() and sources.keys() == plan.finished.keys() == plan.kept
    assemble = stage.assemble
    if stage.read_absent is not None:
        absent = {
            outcome.hash: (outcome.status, outcome.reason)
            for outcome in (*stage.listed, *outcomes)
            if outcome.status in ("skipped", "failed")
        }
        assemble = functools.partial(stage.assemble, absent=absent)  # type: ignore[call-arg]
        is_unchanged = is_unchanged and stage.read_absent(output) == absent
    if would_be_lost or is_unchanged:
        with clear_write_errors(output):
            stage.write_beside(None if would_be_lost else output, outcomes)
    else:
        _report_dropped(plan.finished, outcomes)
        outputs.replace_output(
            output, assemble, sources, lambda path: stage.write_beside(path, outcomes)
        )
    if would_be_lost:
        raise StageError(f"{output}: left as it was, for no study could be written: see above")


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
    rows = ((outcome.hash, stage, outcome.reason) for outcome in failed)
    outputs.write_table(path, ("hash", "stage", "reason"), rows)
    logger.log(PROGRESS, "failed studies are listed in %s", path)


# --- what is said of studies -----------------------------------------------------------------


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
