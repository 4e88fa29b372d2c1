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

from common.errors import DamagedSource, StageError, Unreachable, WorkerKilled, counted
from common.run import output as outputs
from common.run.atomic import (
    clear_write_errors,
    is_there,
    list_temporaries,
    remove_listed,
)
from common.run.console import PROGRESS
from common.run.engine import Engine, run_studies
from common.run.failures import Failure, list_failures
from common.run.lock import confirm_lease
from common.run.store import N_DIGITS, study_file, study_files, subfolder, sweep
from common.run.worker import Cause, Job, Outcome, Worker

logger = logging.getLogger("tumorvolume")

ReadFinished = Callable[[Path], Mapping[str, str]]
"""Returns the fingerprints, by hash, of the studies that a present output holds; of one with a
store their first digits, empty where the study's file is not in the store."""

WriteBeside = Callable[[Path, Sequence[Outcome]], None]
"""Called with the path of the complete new output, before it takes its place, and the outcomes;
with OUTPUT itself where nothing changed."""

MOST_IN_A_FOLDER = 2000
"""Parts of more studies than this are in subfolders."""


def _write_nothing(path: Path, outcomes: Sequence[Outcome]) -> None:
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
    write_without : function
        Called with the outcomes where the old output is left for want of any study.
    name : str
        Where failed studies are to be listed beside the output: what the list calls the stage.
    known_skips : dict of hash to reason
        Skipped studies that an earlier run told of already.
    read_absent : function, optional
        Where the output tells of studies that are not in it: returns what a present one tells,
        status and reason by hash; `assemble` takes the same as `absent`.
    listed : sequence of Outcome
        Of studies that could not be planned.
    made_alike : set of hash
        Studies that the present output holds as these options make them: what it holds of them
        stays where they can't be looked at.
    store : Path, optional
        Folder where the parts stay, behind links; `assemble` then writes links to them.
    has_form : function
        Whether a present output is of the form that `assemble` writes: copies, or links.
    beside_of : function
        Which files a worker writes besides the output, of the study of a hash; those of studies
        that leave the output go with them.
    elsewhere : set of hash
        Studies of the input that are other shards': the output may lose them unasked, and what a
        worker has written besides is the other shard's.
    """

    output: Path
    studies: Sequence[Job]
    worker: Worker
    assemble: outputs.Assemble
    read_finished: ReadFinished
    write_beside: WriteBeside = _write_nothing
    write_without: Callable[[Sequence[Outcome]], None] = lambda outcomes: None
    name: str = ""
    known_skips: Mapping[str, str] = field(default_factory=dict)
    read_absent: Callable[[Path], Mapping[str, tuple[str, str]]] | None = None
    listed: Sequence[Outcome] = ()
    made_alike: Set[str] = frozenset()
    store: Path | None = None
    has_form: Callable[[Path], bool] = lambda path: True
    beside_of: Callable[[str], Sequence[Path]] = lambda study_hash: ()
    elsewhere: Set[str] = frozenset()


@dataclass(frozen=True)
class _Plan:
    """What is kept of the old output, and what is to be computed.

    Attributes
    ----------
    kept : set of hash
        Of the old output, as they are to be.
    todo : sequence of Job
        Without finished parts.
    parts : dict of hash to Path
        Of all studies that are not kept.
    replaced : sequence of Path
        What a run with other options, that never ended, has put beside the output.
    finished : dict of hash to fingerprint
        What the old output holds; {} also where that is not known.
    held : dict of hash to Path
        The files that the studies of the old output are in: itself, or those of the store.
    is_known : bool
        Whether it is known what the old output holds.
    """

    kept: Set[str]
    todo: Sequence[Job]
    parts: Mapping[str, Path]
    replaced: Sequence[Path]
    finished: Mapping[str, str]
    held: Mapping[str, Path]
    is_known: bool


def run_stage(
    stage: Stage, engine: Engine, *, force: bool = False, allow_shrink: bool = False
) -> list[Outcome]:
    """Compute what is missing, then replace the output.

    Parameters
    ----------
    stage : Stage
    engine : Engine
    force : bool
        Compute all studies anew.
    allow_shrink : bool
        Replace the output though many of its studies would be lost; see `refuse_to_shrink`.

    Returns
    -------
    list of Outcome
        Of the studies that could not be planned, and of those that were, in their order.

    Raises
    ------
    StageError
        No study at all could be written, and the old output would be lost; or many of its
        studies; or a full disk.
    """
    plan = _plan(stage, force=force, allow_shrink=allow_shrink)
    listed = [_settled(stage, plan, outcome) for outcome in stage.listed]
    for outcome in listed:
        report(outcome, stage.known_skips)
    outcomes = [*listed, *_compute(stage, plan, engine)]
    made_anew: set[Path] = set()
    while True:
        try:
            _replace(stage, plan, outcomes, allow_shrink=allow_shrink)
            return outcomes
        except DamagedSource as error:
            # A part that an interrupted run has left, or that the disk has lost meanwhile.
            if error.source in made_anew or error.source not in plan.parts.values():
                raise
            made_anew.add(error.source)
            outcomes = _make_anew(stage, plan, engine, outcomes, error.source)


# --- plan ------------------------------------------------------------------------------------


def _plan(stage: Stage, *, force: bool, allow_shrink: bool) -> _Plan:
    present = present_content(stage.output, stage.read_finished, force=force)
    finished = present or {}
    asked_for = {job.hash for job in stage.studies} | {each.hash for each in stage.listed}
    vanished = finished.keys() - asked_for
    if not allow_shrink:
        refuse_to_shrink(stage.output, finished.keys(), vanished - stage.elsewhere)
    folder = outputs.parts_folder(stage.output) if stage.store is None else stage.store
    paths = {job.hash: _part(stage, folder, job.hash, job.fingerprint) for job in stage.studies}
    replaced = {} if force else _made_otherwise(stage, folder, paths, finished)
    usable = {
        job.hash
        for job in stage.studies
        if not force and job.has_all_beside and job.hash not in replaced
    }
    kept = {
        job.hash
        for job in stage.studies
        if job.hash in usable
        and finished.get(job.hash, "")[:N_DIGITS] == job.fingerprint[:N_DIGITS]
    }
    parts = {job.hash: paths[job.hash] for job in stage.studies if job.hash not in kept}
    todo = [
        replace(job, part=parts[job.hash], beside=tuple(path.absolute() for path in job.beside))
        for job in stage.studies
        if job.hash in parts and not (job.hash in usable and parts[job.hash].exists())
    ]
    _report_plan(stage, len(kept), len(todo), vanished)
    held = {
        each: stage.output if stage.store is None else _part(stage, folder, each, made_from)
        for each, made_from in finished.items()
        if stage.store is None or made_from
    }
    stale = [path for paths_of_study in replaced.values() for path in paths_of_study]
    return _Plan(kept, todo, parts, stale, finished, held, present is not None)


def present_content(output: Path, read: ReadFinished, *, force: bool) -> Mapping[str, str] | None:
    """Return the fingerprints by hash that `read` finds in OUTPUT; {} where there is none.

    None where they are not known, because it is damaged, which is said; or whatever keeps it from
    being read, where it is to be made anew by `force`.

    Raises
    ------
    WorkerKilled, Unreachable
        They say nothing against the file.
    """
    if not is_there(output):
        return {}
    try:
        return read(output)
    except (WorkerKilled, Unreachable):
        if force:
            return None
        raise
    except StageError as error:
        logger.warning("the old output is of no use and is made anew: %s", error)
        return None


def _part(stage: Stage, folder: Path, study_hash: str, made_from: str) -> Path:
    """Return where below a folder the finished part of a study is, or is to be."""
    if stage.store is not None or len(stage.studies) > MOST_IN_A_FOLDER:
        folder = subfolder(folder, study_hash)
    return folder / study_file(study_hash, made_from, stage.output.suffix)


def _made_otherwise(
    stage: Stage, folder: Path, paths: Mapping[str, Path], finished: Mapping[str, str]
) -> dict[str, list[Path]]:
    """Return by hash what a run with other options, that never ended, has put beside OUTPUT.

    Its part of the study tells; else OUTPUT would be kept with files beside it that do not fit.
    """
    suffix = stage.output.suffix
    found: dict[str, list[Path]] = {}
    beside = {job.hash: job for job in stage.studies if job.beside}
    parts = [*sorted(folder.glob("*.*")), *study_files(folder, suffix)] if beside else []
    for part in parts:
        job = beside.get(part.name.removesuffix(suffix).rpartition(".")[0])
        if job is None:
            continue
        in_output = study_file(job.hash, finished.get(job.hash, ""), suffix)
        if part.name not in (paths[job.hash].name, in_output):
            found.setdefault(job.hash, []).extend((*job.beside, part))
    return found


def _report_plan(stage: Stage, n_kept: int, n_todo: int, vanished: Set[str]) -> None:
    n_studies = len(stage.studies)
    resumed = n_studies - n_kept - n_todo
    logger.info("%s: %d unchanged, %d to compute", counted(n_studies), n_kept, n_todo)
    if resumed:
        told = counted(resumed, "study is", "studies are")
        logger.log(PROGRESS, "resuming: %s finished already", told)
    _report_absent("{are} no longer in the input", vanished - stage.elsewhere)
    if moved := vanished & stage.elsewhere:
        logger.info("%s of the old output now of other shards", counted(len(moved)))


_LARGEST_LOSS = 0.1
"""Part of its studies that an output may lose from one run to the next unasked."""

_MOST_NAMED = 100


def refuse_to_shrink(output: Path, held: Set[str], lost: Set[str]) -> None:
    """Refuse to replace an output that would lose more than a tenth of its studies, and several.

    Raises
    ------
    StageError
        It would; which they are.
    """
    if len(lost) > max(1, _LARGEST_LOSS * len(held)):
        raise StageError(
            f"{output}: left as it was, for it would lose {len(lost)} of its {len(held)} studies "
            f"({_named(lost, _MOST_NAMED)}): check that all of the input is there, or add "
            "--allow-shrink"
        )


# --- compute ---------------------------------------------------------------------------------


def _compute(stage: Stage, plan: _Plan, engine: Engine) -> list[Outcome]:
    """Have the workers write the parts that are missing."""
    parts = outputs.parts_folder(stage.output)
    folders = sorted({path.parent for path in plan.parts.values()})
    with clear_write_errors(stage.output):
        if plan.parts:
            for folder in (parts, *folders):
                folder.mkdir(exist_ok=True)
            for path in plan.replaced:
                path.unlink(missing_ok=True)
            list_temporaries(parts, (path for job in plan.todo for path in job.beside))
    try:
        computed = run_studies(
            stage.worker,
            plan.todo,
            engine,
            lambda outcome: report(_settled(stage, plan, outcome), stage.known_skips),
            parts,
        )
    finally:
        remove_listed(parts)
    if engine.is_elsewhere:
        # A file server's client may remember that parts were not there; this makes it look again.
        for folder in folders:
            os.listdir(folder)
    found = {outcome.hash: _settled(stage, plan, outcome) for outcome in computed}
    return [
        Outcome(job.hash, "unchanged")
        if job.hash in plan.kept
        else found.get(job.hash, Outcome(job.hash, "written"))
        for job in stage.studies
    ]


def _settled(stage: Stage, plan: _Plan, outcome: Outcome) -> Outcome:
    """Return an outcome; of a study that is out of reach it says what becomes of it."""
    if not _stays(stage, plan, outcome):
        return outcome
    reason = f"{outcome.reason}; its earlier result stays in the output"
    return replace(outcome, status="failed", reason=reason)


def _stays(stage: Stage, plan: _Plan, outcome: Outcome) -> bool:
    """Tell whether what the output holds of a study stays, though it can't be looked at."""
    return (
        outcome.cause is Cause.REACH
        and outcome.hash in plan.held
        and outcome.hash in stage.made_alike
    )


def _make_anew(
    stage: Stage, plan: _Plan, engine: Engine, outcomes: Sequence[Outcome], part: Path
) -> list[Outcome]:
    """Have a worker write a damaged part once more; return the outcomes with that study's."""
    [damaged] = (job for job in stage.studies if plan.parts.get(job.hash) == part)
    logger.warning("%s: its finished part is damaged and is made anew", damaged.hash)
    part.unlink(missing_ok=True)
    job = replace(damaged, part=part, beside=tuple(path.absolute() for path in damaged.beside))
    once_more = replace(plan, todo=[job], replaced=())
    again = {each.hash: each for each in _compute(stage, once_more, engine)}
    return [again[job.hash] if each.hash == job.hash else each for each in outcomes]


# --- replace ---------------------------------------------------------------------------------


def _replace(stage: Stage, plan: _Plan, outcomes: Sequence[Outcome], *, allow_shrink: bool) -> None:
    """Put a new output in OUTPUT's place, unless it would be the same, empty or much smaller."""
    output, sources = stage.output, _sources(stage, plan, outcomes)
    if stage.name:
        failed = (Failure(o.hash, stage.name, o.reason) for o in outcomes if o.status == "failed")
        list_failures(output, failed)
    at_stake = plan.finished.keys() - stage.elsewhere
    if is_there(output) and not sources and (at_stake or not plan.is_known):
        with clear_write_errors(output):
            stage.write_without(outcomes)
        raise StageError(f"{output}: left as it was, for no study could be written: see above")
    lost = plan.finished.keys() - sources.keys()
    if lost and not allow_shrink:
        _refuse_losses(output, plan, outcomes, lost - stage.elsewhere)
    assemble, absent = stage.assemble, _absent(outcomes, sources)
    if stage.read_absent is not None:
        assemble = functools.partial(stage.assemble, absent=absent)  # type: ignore[call-arg]
    is_new = any(outcome.status == "written" for outcome in outcomes)
    if not (is_new or lost) and _tells_the_same(stage, plan, absent):
        confirm_lease(output)
        with clear_write_errors(output):
            stage.write_beside(output, outcomes)
    else:
        _report_dropped(lost, outcomes)

        def write_beside(path: Path) -> None:
            stage.write_beside(path, outcomes)
            _remove_stale(stage, lost - stage.elsewhere)

        is_linked = stage.store is not None
        outputs.replace_output(output, assemble, sources, write_beside, links=is_linked)
    if stage.store is not None:
        # Another run's new files would be swept away.
        confirm_lease(output)
        sweep(stage.store, output.suffix, sources.values())


def _sources(stage: Stage, plan: _Plan, outcomes: Sequence[Outcome]) -> dict[str, Path]:
    """Return by hash the files to assemble: the old output or its store's, and finished parts."""
    stay = {outcome.hash for outcome in outcomes if _stays(stage, plan, outcome)}
    old = {each: plan.held[each] for each in sorted(plan.kept | stay)}
    return old | {o.hash: plan.parts[o.hash] for o in outcomes if o.status == "written"}


def _absent(outcomes: Sequence[Outcome], sources: Mapping[str, Path]) -> dict[str, tuple[str, str]]:
    """Return status and reason by hash of the studies that will not be in the output."""
    return {
        outcome.hash: (outcome.status, outcome.reason)
        for outcome in outcomes
        if outcome.status in ("skipped", "failed") and outcome.hash not in sources
    }


def _tells_the_same(stage: Stage, plan: _Plan, absent: Mapping[str, tuple[str, str]]) -> bool:
    """Tell whether OUTPUT, whose studies are as they are to be, is so in all else."""
    return (
        is_there(stage.output)
        and plan.is_known
        and stage.has_form(stage.output)
        and (stage.read_absent is None or stage.read_absent(stage.output) == absent)
    )


def _refuse_losses(output: Path, plan: _Plan, outcomes: Sequence[Outcome], lost: Set[str]) -> None:
    """Refuse to lose what can't be looked at, and much else; what was refused stays out."""
    causes = {o.hash: o.cause for o in outcomes if o.hash in lost}
    out_of_reach = {each for each, cause in causes.items() if cause is Cause.REACH}
    if out_of_reach:
        raise StageError(
            f"{output}: left as it was, for studies of it can't be looked at, and it holds them as "
            f"other options make them ({_named(out_of_reach, _MOST_NAMED)}): see that they can be "
            "read, or add --allow-shrink to leave them out"
        )
    refused = {each for each, cause in causes.items() if cause is Cause.CONTENT}
    refuse_to_shrink(output, plan.finished.keys(), lost - refused)


def _remove_stale(stage: Stage, lost: Set[str]) -> None:
    """Remove the pictures and images of studies that leave OUTPUT: they would look current."""
    stale = [path for each in sorted(lost) for path in stage.beside_of(each) if path.is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    if stale:
        logger.log(PROGRESS, "removed with them: %s", ", ".join(map(str, stale[:_MOST_NAMED])))


# --- what is said of studies -----------------------------------------------------------------


def _report_dropped(lost: Set[str], outcomes: Sequence[Outcome]) -> None:
    _report_absent("failed or {are} incomplete now", lost & {o.hash for o in outcomes})


def _report_absent(why: str, hashes: Set[str]) -> None:
    if hashes:
        are, stay = ("is", "stays") if len(hashes) == 1 else ("are", "stay")
        told = f"{counted(len(hashes))} of the old output {why.format(are=are)} and {stay} out"
        logger.warning("%s: %s", told, _named(hashes, _MOST_NAMED))


def _named(hashes: Set[str], most: int) -> str:
    return ", ".join(sorted(hashes)[:most]) + (" ..." if len(hashes) > most else "")


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
