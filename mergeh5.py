#!/usr/bin/env python3
"""Merge HDF5 files of preprocessing.py, or of project_2d.py, into one.

Every study is copied with its attributes, chunks and filters as they are. Files made with other
spacing, shape, ranges, orientation, type or thresholds are refused unless --allow-mixed is given.
With --verify nothing is written: each file is held against its own checksums and attributes.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the second that the packages below take to load is no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import nnunet, splits
from common.errors import (
    StageError,
    StudyError,
    Unreachable,
    WorkerCrashed,
    WorkerKilled,
    counted,
)
from common.hdf5 import index, reading
from common.hdf5 import merge as merging
from common.hdf5.studies import (
    Content,
    content_of,
    read_all_attributes,
    read_attributes,
    read_parameters,
    split_projection_key,
    studies_of,
    study_of,
)
from common.hdf5.verify import faults_of, keys_to_check, read_indices
from common.key_lists import listed_keys
from common.report.case_table import ATTRIBUTES, COLUMNS, case_rows
from common.report.lesion_table import write_measures
from common.report.projection_list import list_beside, read_projects, write_list
from common.run import cli, stage
from common.run.console import PROGRESS
from common.run.engine import Engine, run_studies
from common.run.failures import Failure, list_failures, read_failures
from common.run.output import exclusive, make_folder, replace_output, write_beside, write_table
from common.run.pool import in_own_process
from common.run.worker import Job, Outcome, Status
from common.version import SOFTWARE

EXAMPLES = """
  python mergeh5.py a_3d.h5 b_3d.h5 -o all_3d.h5
  python mergeh5.py old_3d.h5 new_3d.h5 -o all_3d.h5 --on-duplicate replace
  python mergeh5.py shards/*.h5 -o index.h5 --link
  python mergeh5.py a_3d.h5 b_3d.h5 -o all_3d.h5 --report all.html
  python mergeh5.py a_3d.h5 b_3d.h5 -o accepted_3d.h5 --keys ratings.json
  python mergeh5.py a_3d.h5 b_3d.h5 -o all_3d.h5 --splits 5 --splits-dir splits
  python mergeh5.py a_3d.h5 b_3d.h5 -o all_3d.h5 --leave-out project --splits-dir splits
  python mergeh5.py a_3d.h5 b_3d.h5 -o all_3d.h5 --export-nnunet nnUNet_raw --dataset-id 221
  python mergeh5.py --verify all_3d.h5 all_2d.h5 --jobs 4
"""

logger = logging.getLogger("tumorvolume")

FOLD_FILE = re.compile(r"fold(\d+)_(train|val)\.txt", re.ASCII)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    with cli.checking(parser):
        check_options(parser, options)
    if options.verify:
        return cli.run(options, lambda: verify(options), verify_line)
    return cli.run(options, lambda: merge(options))


# --- options ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument("inputs", type=Path, nargs="+", metavar="FILE.h5", help="files to merge")
    parser.add_argument("-o", "--output", type=Path, metavar="ALL.h5", help="file to write")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="write nothing: check every dataset of the files, by --jobs worker processes (copying "
        "takes one); status 3 where one is damaged",
    )
    group = parser.add_argument_group("merging")
    group.add_argument(
        "--on-duplicate",
        choices=("error", "skip", "replace"),
        default="error",
        help="where files hold the same study with other content: stop (default), keep the first "
        "file's, or take the last file's",
    )
    group.add_argument(
        "--allow-mixed", action="store_true", help="merge files that were made with other options"
    )
    group.add_argument(
        "--link",
        action="store_true",
        help="write an index of links to the inputs instead of copies; keep them together",
    )
    group.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="take only the studies that FILE lists, a hash a line, or accepts: the ratings that "
        "the page of --report saves",
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="also write the page of preprocessing.py --report, of all studies",
    )
    group.add_argument(
        "--measures",
        type=Path,
        metavar="FILE.csv",
        help="also write the table of preprocessing.py --measures, of all studies",
    )
    group.add_argument(
        "--failed",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE.csv",
        help="lists of failed studies, IN_failed.csv, to join in ALL_failed.csv; status is 3 where "
        "they name any",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--splits",
        type=cli.positive_int,
        metavar="K",
        help="write K train/validation key lists, and nnU-Net's splits_final.json: no patient and "
        "no image is on both sides",
    )
    training.add_argument(
        "--splits-dir", type=Path, metavar="DIR", help="where to (default: beside the output)"
    )
    training.add_argument(
        "--leave-out",
        choices=("project",),
        help="a fold a project: validate with it, train on the others",
    )
    training.add_argument(
        "--patient-characters",
        type=cli.positive_int,
        metavar="P",
        help="characters of a hash that tell the patient, as of --hash-length P S (default: as "
        "the files say)",
    )
    training.add_argument(
        "--cases",
        type=Path,
        metavar="FILE.csv",
        help="also write a row a study: project, patient's part of the hash, SUV rule, uptake "
        "[minutes], voxel sizes [mm], volumes [ml], warnings",
    )
    training.add_argument(
        "--export-nnunet",
        type=Path,
        metavar="DIR",
        help="also write nnU-Net's raw layout, DIR/Dataset<N>_<ALL>, with whole patients in its "
        "folds",
    )
    training.add_argument(
        "--dataset-id",
        type=cli.positive_int,
        metavar="N",
        help="number of the dataset (default: 1)",
    )
    cli.add_run_options(parser, cluster=False)
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with status 2 where the options can't be met, before any work."""
    if options.verify:
        writes = options.output, options.link, options.cases, options.keys, options.report
        more = options.measures, options.failed
        if any([*writes, *more]) or needs_folds(options):
            parser.error(
                "--verify writes nothing: leave out -o, --link, --keys, --report, --measures, "
                "--failed, --splits, --leave-out, --cases and --export-nnunet"
            )
        cli.check_files(parser, options.inputs)
        cli.check_log_file(parser, options, options.inputs)
        return
    if options.output is None:
        parser.error("give the file to write: -o ALL.h5")
    read = [*options.inputs, *options.failed, *([options.keys] if options.keys else [])]
    cli.check_files(parser, read)
    cli.check_paths(parser, options, read)
    if options.keys is not None and options.keys.is_dir():
        parser.error(f"--keys: {options.keys} is a folder: give a list or the ratings of a page")
    if options.splits == 1:
        parser.error("--splits: give at least 2 folds")
    if options.splits_dir is not None:
        if not has_folds(options):
            parser.error("--splits-dir needs --splits K or --leave-out project")
        cli.check_folder(parser, options.splits_dir, options)
    tables = [path for path in (options.cases, options.measures) if path is not None]
    for number, path in enumerate(tables):
        cli.check_side_output(parser, path, options, [*read, *tables[:number]])
    if options.report is not None:
        cli.check_side_output(parser, options.report, options, [*read, *tables])
    if options.export_nnunet is not None:
        cli.check_folder(parser, options.export_nnunet, options)
        if (options.dataset_id or 1) > nnunet.LARGEST_ID:
            parser.error(f"--dataset-id: nnU-Net counts up to {nnunet.LARGEST_ID}")
    elif options.dataset_id is not None:
        parser.error("--dataset-id needs --export-nnunet DIR")
    options.dataset_id = options.dataset_id or 1


def has_folds(options: argparse.Namespace) -> bool:
    """Whether lists of folds are asked for."""
    return options.splits is not None or options.leave_out is not None


def needs_folds(options: argparse.Namespace) -> bool:
    """Whether folds are needed: nnU-Net's own ones would part patients."""
    return has_folds(options) or options.export_nnunet is not None


# --- the stage -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergePlan:
    """What the merged file shall hold.

    Attributes
    ----------
    parameters : dict
        Options of value that the files have in common.
    found : dict of key to Found
    sources : dict of key to file
        As they were given.
    samples : sequence of Sample
        Of each key, where folds or patients are needed; else empty.
    attributes : dict of key to dict
        What `--cases` tells of; else empty.
    exported : dict of key to StoredCase
        What `--export-nnunet` writes; else empty.
    projects : dict by hash
        Of projections; else empty.
    failures : sequence of Failure
        What the lists of `--failed` tell.
    """

    parameters: Mapping[str, Any]
    found: Mapping[str, merging.Found]
    sources: Mapping[str, Path]
    samples: Sequence[splits.Sample]
    attributes: Mapping[str, Mapping[str, Any]]
    exported: Mapping[str, nnunet.StoredCase]
    projects: Mapping[str, str]
    failures: Sequence[Failure]


def merge(options: argparse.Namespace) -> list[Outcome]:
    """Check the inputs, write the merged file, and the splits if asked for."""
    with exclusive(options.output, force=options.force, lock=options.lock):
        versions = [version_of(path) for path in options.inputs]
        plan = checked_plan(options)
        folds = planned_folds(options, plan) if needs_folds(options) else []
        status: Status = "unchanged" if is_merged_already(options, plan) else "written"
        if status == "written" and not options.allow_shrink:
            refuse_losses(options, plan)
        beside = functools.partial(write_what_goes_beside, options, plan, folds)
        if status == "written":
            failed = write_merged(options, plan, versions, beside)
        else:
            failed = beside(options.output)
    merged = studies_of(plan.sources, plan.parameters)
    return [
        failed.get(study, Outcome(study, status)) for study in sorted({*merged, *failed.keys()})
    ]


def write_what_goes_beside(
    options: argparse.Namespace, plan: MergePlan, folds: Sequence[splits.Fold], path: Path
) -> dict[str, Outcome]:
    """Write what is asked for besides the merged file, and return the studies that failed.

    The merged file is at `path`, before it takes its place.
    """
    failed = {each.hash: Outcome(each.hash, "failed", each.reason) for each in plan.failures}
    if options.failed:
        list_failures(options.output, plan.failures)
    if content_of(plan.parameters) is not Content.VOLUMES:
        write_list(options.output, plan.sources, plan.projects)
    if has_folds(options):
        write_splits(options, folds)
    if options.cases is not None:
        write_table(options.cases, COLUMNS, cases(options, plan))
    if options.measures is not None:
        write_measures(options.measures, path)
    if options.report is not None:
        # Slow to load, and only for those who ask for it.
        from common.report.page import write_report

        write_report(
            options.report,
            options.output.resolve(),
            plan.sources,
            list(failed.values()),
            Engine(options.jobs),
            SOFTWARE,
        )
    exported = export_nnunet(options, plan, folds) if options.export_nnunet is not None else []
    return failed | {outcome.hash: outcome for outcome in exported if outcome.status == "failed"}


def refuse_losses(options: argparse.Namespace, plan: MergePlan) -> None:
    """Refuse to replace an output that would lose many of its studies.

    Raises
    ------
    StageError
        It would; which they are.
    """
    read = functools.partial(in_own_process, held_studies)
    held = stage.present_content(options.output, read, force=options.force) or {}
    merged = studies_of(plan.sources, plan.parameters)
    stage.refuse_to_shrink(options.output, held.keys(), held.keys() - set(merged))


def held_studies(path: Path) -> dict[str, str]:
    """Return the studies that a file holds, each without what it was made from."""
    return dict.fromkeys(studies_of(reading.read_keys_of_any(path), read_parameters(path)), "")


def version_of(path: Path) -> tuple[int, int, int]:
    """Return what tells a file from one that is put in its place."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def checked_plan(options: argparse.Namespace) -> MergePlan:
    """Plan in a process of its own; where libhdf5 ends that, name the file."""
    try:
        plan: MergePlan = in_own_process(plan_merge, options)
    except WorkerCrashed:
        for path in options.inputs:
            in_own_process(read_all_attributes, path)
        raise
    return plan


def plan_merge(options: argparse.Namespace) -> MergePlan:
    """Read what the inputs hold."""
    parameters = merging.merged_parameters(options.inputs, options.allow_mixed)
    is_wanted = wanted_keys(options, parameters) if options.keys is not None else None
    stacked = content_of(parameters) is Content.STACK
    if stacked and (options.link or needs_folds(options)):
        raise StageError(
            "--link, --splits and --leave-out take no stacks: leave them out, or give plain 2D "
            "files, or 3D ones"
        )
    chosen = merging.find_studies(
        options.inputs,
        parameters,
        options.on_duplicate,
        is_wanted,
        with_digests=not (options.link or options.force) and options.output.exists(),
    )
    mine = cli.of_shard(studies_of(chosen, parameters), options.shard)
    found = {key: each for key, each in chosen.items() if study_of(key, parameters) in mine}
    sources = {key: each.source for key, each in found.items()}
    is_3d = content_of(parameters) is Content.VOLUMES
    if is_3d and not options.allow_mixed:
        merging.refuse_mixed_suv_types(found)
    of_volumes = options.cases, options.report, options.measures, options.export_nnunet
    if not is_3d and any(of_volumes):
        raise StageError(
            "--cases, --measures, --report and --export-nnunet need 3D files, not 2D ones: give "
            "files of preprocessing.py"
        )
    parted = needs_folds(options) or options.cases is not None
    return MergePlan(
        parameters,
        found,
        sources,
        samples=reading.read_samples(sources, parameters) if parted else [],
        attributes=reading.read_image_attributes(sources, ATTRIBUTES) if options.cases else {},
        exported=nnunet.stored_cases(sources) if options.export_nnunet else {},
        projects={} if is_3d else read_listed_projects(options, sources, stacked=stacked),
        failures=sorted(
            (each for path in options.failed for each in read_failures(path)),
            key=lambda failure: failure.hash,
        ),
    )


def read_listed_projects(
    options: argparse.Namespace, sources: Mapping[str, Path], *, stacked: bool
) -> dict[str, str]:
    """Return the project of each study of 2D files; of stacks the lists beside them tell.

    Raises
    ------
    StageError
        The list of the merged file would take the place of another file.
    """
    listed = list_beside(options.output)
    if listed in (options.output, options.keys, options.log_file):
        raise StageError(f"{listed}: the list of the projections goes there: choose another name")
    projects: dict[str, str] = {}
    for path, keys in reading.keys_by_file(sources).items():
        if stacked:
            found = read_projects(path)
        else:
            # All projections of a study tell the same.
            first = {split_projection_key(key)[0]: key for key in reversed(keys)}
            of_keys = read_attributes(path, list(first.values()), "project")
            found = {study: str(of_keys.get(key, "")) for study, key in first.items()}
        studies = {split_projection_key(key)[0] for key in keys}
        if not studies <= found.keys():
            logger.warning(
                "%s does not list all of its studies: their projects stay empty in %s",
                list_beside(path).name,
                listed.name,
            )
        projects |= {study: found.get(study, "") for study in studies}
    return projects


def wanted_keys(
    options: argparse.Namespace, parameters: Mapping[str, Any]
) -> Callable[[str], bool]:
    """Return what tells the keys that --keys lists, and say who is left out and who is missing.

    Raises
    ------
    StageError
        No list and no ratings, or of other files than the inputs.
    """
    path: Path = options.keys
    try:
        listed = set(listed_keys(path.read_bytes().decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: is no text in UTF-8: give a list of hashes") from error
    except StageError as error:
        raise StageError(f"{path}: {error}") from error

    def is_wanted(key: str) -> bool:
        # A hash in a list stands for all projections of its study.
        return key in listed or study_of(key, parameters) in listed

    present = {key for source in options.inputs for key in reading.read_keys_of_any(source)}
    studies = set(studies_of(present, parameters))
    unknown = sorted(listed - present - studies)
    taken = set(studies_of(filter(is_wanted, present), parameters))
    if not taken:
        raise StageError(f"{path}: none of its studies is in the input files: give their own list")
    if unknown:
        named = ", ".join(unknown[:10]) + (" ..." if len(unknown) > 10 else "")
        logger.warning("not in the input files, though %s lists them: %s", path.name, named)
    if studies - taken:
        left_out, of_all = len(studies - taken), counted(len(studies))
        logger.log(PROGRESS, "%s leaves out %d of %s", path.name, left_out, of_all)
    return is_wanted


def is_merged_already(options: argparse.Namespace, plan: MergePlan) -> bool:
    """Whether the present output holds just these studies, copied or linked as asked for."""
    if options.force or not options.output.exists():
        return False
    try:
        is_there = merging.links_to if options.link else merging.holds
        return bool(in_own_process(is_there, options.output, plan.parameters, plan.found))
    except (WorkerKilled, Unreachable):
        raise
    except StageError:
        return False


def write_merged(
    options: argparse.Namespace,
    plan: MergePlan,
    versions: Sequence[tuple[int, int, int]],
    beside: Callable[[Path], dict[str, Outcome]],
) -> dict[str, Outcome]:
    """Replace the output by copies of, or links to, the studies in the plan.

    Before that `beside` is called, and what it returns is returned.

    Raises
    ------
    StageError
        An input is not of the version that was planned with.
    """
    made_by = {"parameters": plan.parameters, "software": SOFTWARE}
    assemble = functools.partial(merging.assemble_merged, **made_by)
    sources = plan.sources
    if options.link:
        assemble = functools.partial(index.assemble_links, **made_by, output=options.output)
        sources = {key: each.file for key, each in plan.found.items()}
    failed: dict[str, Outcome] = {}

    def before_replacing(path: Path) -> None:
        for source, version in zip(options.inputs, versions, strict=True):
            if version_of(source) != version:
                raise StageError(f"{source}: has been made anew since this run began: run again")
        failed.update(beside(path))

    replace_output(options.output, assemble, sources, before_replacing, links=options.link)
    return failed


# --- folds -----------------------------------------------------------------------------------


def planned_folds(options: argparse.Namespace, plan: MergePlan) -> list[splits.Fold]:
    """Return the folds that are asked for, and say what they keep together.

    Raises
    ------
    StageError
        The patients, or the projects, can't be parted so.
    """
    n_characters = splits.patient_characters(plan.samples, options.patient_characters)
    for studies in splits.equal_images(plan.samples):
        logger.warning(
            "%s: hold the same image, and are never in training and validation at once",
            ", ".join(studies),
        )
    groups = splits.inseparable(plan.samples, n_characters)
    if options.leave_out is None:
        n_folds = options.splits or min(nnunet.N_FOLDS, len(groups))
        if n_folds == 1:
            logger.warning("one patient alone makes no folds: nnU-Net will part its studies")
            return []
        return splits.balanced_folds(groups, n_folds)
    folds = splits.project_folds(groups)
    if options.splits not in (None, len(folds)):
        raise StageError(
            f"--leave-out project makes {len(folds)} folds, one a project, not {options.splits}: "
            "leave out --splits"
        )
    for number, (project, fold) in enumerate(folds.items(), start=1):
        n_apart = len(plan.samples) - len(fold.train) - len(fold.validation)
        logger.log(PROGRESS, "fold %d validates with project %s", number, project)
        if n_apart:
            logger.warning(
                "fold %d does not train on %d images of other projects: their patients, or equal "
                "images, are in the project that it validates with",
                number,
                n_apart,
            )
    return list(folds.values())


def write_splits(options: argparse.Namespace, folds: Sequence[splits.Fold]) -> None:
    """Write fold<i>_train.txt and fold<i>_val.txt, a key a line, and nnU-Net's list of them."""
    folder = options.splits_dir or options.output.parent
    make_folder(folder)
    for number, fold in enumerate(folds, start=1):
        for name, keys in (("train", fold.train), ("val", fold.validation)):
            text = "".join(f"{key}\n" for key in keys)
            write_beside(folder / f"fold{number}_{name}.txt", text)
    write_beside(folder / "splits_final.json", nnunet.splits_json(folds))
    for path in sorted(folder.iterdir()):
        # Of an earlier run with more folds, in which patients are spread differently.
        found = FOLD_FILE.fullmatch(path.name)
        if found and int(found[1]) > len(folds):
            path.unlink()


# --- cases -----------------------------------------------------------------------------------


def cases(options: argparse.Namespace, plan: MergePlan) -> list[list[str]]:
    """Return the rows of all studies; who the patient is stays empty where nothing tells it."""
    try:
        n_characters = splits.patient_characters(plan.samples, options.patient_characters)
    except StageError as error:
        if options.patient_characters is not None:
            raise
        logger.warning("the column patient of %s is empty: %s", options.cases.name, error)
        n_characters = 0
    return case_rows(
        (key, key[:n_characters], attributes) for key, attributes in sorted(plan.attributes.items())
    )


# --- nnU-Net ---------------------------------------------------------------------------------


def export_nnunet(
    options: argparse.Namespace, plan: MergePlan, folds: Sequence[splits.Fold]
) -> list[Outcome]:
    """Write nnU-Net's raw layout, and return how each study fared."""
    dataset = nnunet.Dataset(
        options.export_nnunet.absolute(), options.dataset_id, options.output.stem
    )
    outcomes = nnunet.export(
        dataset,
        plan.exported,
        folds,
        "labels" in plan.parameters,
        Engine(options.jobs),
        stage.report,
    )
    n_failed = sum(outcome.status == "failed" for outcome in outcomes)
    n_cases = counted(len(outcomes) - n_failed, "case", "cases")
    logger.log(PROGRESS, "%s for nnU-Net in %s", n_cases, dataset.folder)
    return outcomes


# --- verifying -------------------------------------------------------------------------------


def verify(options: argparse.Namespace) -> list[Outcome]:
    """Check every dataset of every file, and go on after a damaged one."""
    stored, unreadable = [], set()
    for path in options.inputs:
        try:
            keys, parameters = in_own_process(keys_to_check, path)
        except StageError as error:
            logger.error("%s", error)
            unreadable.add(path)
            continue
        mine = cli.of_shard((study_of(key, parameters) for key in keys), options.shard)
        stored += [
            Job(key, "", StoredDatasets(path, key, parameters))
            for key in keys
            if study_of(key, parameters) in mine
        ]
    outcomes = run_studies(verify_datasets, stored, Engine(options.jobs), stage.report)
    if all(outcome.status == "written" for outcome in outcomes):
        for path in (path for path in options.inputs if path not in unreadable):
            try:
                in_own_process(read_indices, path)
            except StageError as error:
                logger.error("%s", error)
                unreadable.add(path)
    if unreadable:
        raise StageError(
            f"{len(unreadable)} of {len(options.inputs)} files cannot be read: see above"
        )
    return outcomes


@dataclass(frozen=True)
class StoredDatasets:
    """An image and its masks in a file that was made with `parameters`."""

    path: Path
    key: str
    parameters: Mapping[str, Any]


def verify_datasets(job: Job) -> None:
    """Hold an image and its masks against their digests and attributes.

    Raises
    ------
    StudyError
        They differ, or can't be read.
    """
    stored: StoredDatasets = job.work
    try:
        faults = faults_of(stored.path, stored.key, stored.parameters)
    except StageError as error:
        raise StudyError(str(error)) from error
    if faults:
        raise StudyError(f"{'; '.join(faults)} in {stored.path}: make that file again")


def verify_line(outcomes: Sequence[Outcome], output: Path | None) -> str:
    """Return ``12 datasets: 11 sound, 1 failed``; a dataset has an image and its masks."""
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    checked = counted(len(outcomes), "dataset", "datasets")
    return f"{checked}: {len(outcomes) - failed} sound, {failed} failed"


if __name__ == "__main__":
    sys.exit(main())
