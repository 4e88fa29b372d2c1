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
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import key_lists, nnunet, splits
from common.errors import StageError, Unreachable, WorkerCrashed, WorkerKilled, counted
from common.hdf5 import index, reading
from common.hdf5 import merge as merging
from common.hdf5.studies import (
    Content,
    content_of,
    read_all_attributes,
    read_parameters,
    studies_of,
    study_of,
)
from common.report.case_table import ATTRIBUTES, write_cases
from common.report.fold_lists import plan_folds, write_fold_lists
from common.report.lesion_table import write_measures
from common.report.projection_list import list_beside, read_projects, write_list
from common.report.verification import verified_line, verify_files
from common.run import cli, stage
from common.run.console import PROGRESS
from common.run.failures import Failure, join_failures, list_failures
from common.run.output import exclusive, replace_output
from common.run.pool import in_own_process
from common.run.worker import Outcome, Status
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    with cli.checking(parser):
        check_options(parser, options)
    if options.verify:
        verify = functools.partial(verify_files, options.inputs, options.shard, cli.engine(options))
        return cli.run(options, verify, lambda outcomes, _: verified_line(outcomes))
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
    cli.check_paths(parser, options, read)
    if options.keys is not None and options.keys.is_dir():
        parser.error(f"--keys: {options.keys} is a folder: give a list or the ratings of a page")
    if options.splits == 1:
        parser.error("--splits: give at least 2 folds")
    if options.splits_dir is not None:
        if not has_folds(options):
            parser.error("--splits-dir needs --splits K or --leave-out project")
        cli.check_folder(parser, options.splits_dir, options)
    beside = [path for path in (options.cases, options.measures, options.report) if path]
    for number, path in enumerate(beside):
        cli.check_side_output(parser, path, options, [*read, *beside[:number]])
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


def merge(options: argparse.Namespace) -> list[Outcome]:
    """Check the inputs, write the merged file, and the splits if asked for."""
    with exclusive(options.output, force=options.force, lock=options.lock):
        versions = [version_of(path) for path in options.inputs]
        plan = checked_plan(options)
        is_new = not is_merged_already(options, plan)
        if is_new and not options.allow_shrink:
            refuse_losses(options, plan)
        beside = functools.partial(write_what_goes_beside, options, plan)
        failed = write_merged(options, plan, versions, beside) if is_new else beside(options.output)
    status: Status = "written" if is_new else "unchanged"
    merged = {study: Outcome(study, status) for study in studies_of(plan.sources, plan.parameters)}
    return [outcome for _, outcome in sorted((merged | failed).items())]


# --- the plan --------------------------------------------------------------------------------


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
    folds : sequence of Fold
        Those that are asked for, if any.
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
    folds: Sequence[splits.Fold]
    attributes: Mapping[str, Mapping[str, Any]]
    exported: Mapping[str, nnunet.StoredCase]
    projects: Mapping[str, str]
    failures: Sequence[Failure]


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
    refuse_what_content_lacks(options, content_of(parameters))
    is_3d = content_of(parameters) is Content.VOLUMES
    chosen = merging.find_studies(
        options.inputs,
        parameters,
        options.on_duplicate,
        chosen_keys(options, parameters),
        with_digests=not (options.link or options.force) and options.output.exists(),
    )
    mine = cli.of_shard(studies_of(chosen, parameters), options.shard)
    found = {key: each for key, each in chosen.items() if study_of(key, parameters) in mine}
    sources = {key: each.source for key, each in found.items()}
    if is_3d and not options.allow_mixed:
        merging.refuse_mixed_suv_types(found)
    parted = needs_folds(options) or options.cases is not None
    samples = reading.read_samples(sources, parameters) if parted else []
    folds: Sequence[splits.Fold] = ()
    if needs_folds(options):
        by_project = options.leave_out is not None
        folds = plan_folds(samples, options.splits, by_project, options.patient_characters)
    return MergePlan(
        parameters,
        found,
        sources,
        samples,
        folds,
        attributes=reading.read_image_attributes(sources, ATTRIBUTES) if options.cases else {},
        exported=nnunet.stored_cases(sources) if options.export_nnunet else {},
        projects={} if is_3d else read_projects(sources, options.output, parameters),
        failures=join_failures(options.failed),
    )


def refuse_what_content_lacks(options: argparse.Namespace, content: Content) -> None:
    """Refuse options that files of this content can't meet.

    Raises
    ------
    StageError
        There are some.
    """
    if content is Content.STACK and (options.link or needs_folds(options)):
        raise StageError(
            "--link, --splits and --leave-out take no stacks: leave them out, or give plain 2D "
            "files, or 3D ones"
        )
    if content is Content.VOLUMES:
        return
    if any([options.cases, options.report, options.measures, options.export_nnunet]):
        raise StageError(
            "--cases, --measures, --report and --export-nnunet need 3D files, not 2D ones: give "
            "files of preprocessing.py"
        )
    listed = list_beside(options.output)
    if listed in (options.output, options.keys, options.log_file):
        raise StageError(f"{listed}: the list of the projections goes there: choose another name")


def chosen_keys(options: argparse.Namespace, parameters: Mapping[str, Any]) -> Set[str] | None:
    """Return the keys that --keys lists, None without; say who is left out and who is missing."""
    path: Path | None = options.keys
    if path is None:
        return None
    held = (key for source in options.inputs for key in reading.read_keys_of_any(source))
    studies = {key: study_of(key, parameters) for key in held}
    try:
        choice = key_lists.choose(path.read_bytes(), studies)
    except StageError as error:
        raise StageError(f"{path}: {error}") from error
    if choice.unknown:
        named = ", ".join(choice.unknown[:10]) + (" ..." if len(choice.unknown) > 10 else "")
        logger.warning("not in the input files, though %s lists them: %s", path.name, named)
    if choice.n_left_out:
        left_out, of_all = choice.n_left_out, counted(choice.n_studies)
        logger.log(PROGRESS, "%s leaves out %d of %s", path.name, left_out, of_all)
    return choice.keys


# --- the present output ----------------------------------------------------------------------


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


# --- writing ---------------------------------------------------------------------------------


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


def version_of(path: Path) -> tuple[int, int, int]:
    """Return what tells a file from one that is put in its place."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def write_what_goes_beside(
    options: argparse.Namespace, plan: MergePlan, path: Path
) -> dict[str, Outcome]:
    """Write what is asked for besides the merged file, and return the studies that failed.

    The merged file is at `path`, before it takes its place.
    """
    failed = {each.hash: Outcome(each.hash, "failed", each.reason) for each in plan.failures}
    list_failures(options.output, plan.failures)
    if content_of(plan.parameters) is not Content.VOLUMES:
        write_list(options.output, plan.sources, plan.projects)
    if has_folds(options):
        write_fold_lists(options.splits_dir or options.output.parent, plan.folds)
    if options.cases is not None:
        write_cases(options.cases, plan.attributes, plan.samples, options.patient_characters)
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
            cli.engine(options),
            SOFTWARE,
        )
    exported = export_nnunet(options, plan) if options.export_nnunet is not None else []
    return failed | {outcome.hash: outcome for outcome in exported if outcome.status == "failed"}


def export_nnunet(options: argparse.Namespace, plan: MergePlan) -> list[Outcome]:
    """Write nnU-Net's raw layout, and return how each study fared."""
    name = options.output.stem
    dataset = nnunet.Dataset(options.export_nnunet.absolute(), options.dataset_id, name)
    keeps_labels = "labels" in plan.parameters
    return nnunet.export(
        dataset, plan.exported, plan.folds, keeps_labels, cli.engine(options), stage.report
    )


if __name__ == "__main__":
    sys.exit(main())
