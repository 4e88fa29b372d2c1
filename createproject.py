#!/usr/bin/env python3
"""Turn a raw project of FDG-PET/CT studies with labelled tumours into one project zip.

Every RAW_PROJECT/<patient>/<study>/ that has a CT, a PET, a mask and a PET DICOM header is
pseudonymised, its PET converted to SUV, and written as NAME/<hash>/<hash>_{ct,petsuv,mask}.nii.gz.
Incomplete studies are skipped and listed. The private mapping from hash to patient is written
beside the zip, readable by you alone: keep it apart from the zip.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the second that the packages below take to load is no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import dicom, project_zip
from common.errors import StudyError, UnreachableStudy, counted
from common.hashing import DEFAULT_LENGTHS, LONGEST_NAME, SHORTEST_KEY, fingerprint
from common.nifti import load_library
from common.raw import mapping, pseudonyms
from common.raw.project import (
    StudyFolder,
    check_project,
    files_of,
    image_bytes,
    is_without_studies,
    list_files,
    listing,
    name_of,
)
from common.raw.pseudonyms import studies_by_hash
from common.raw.words import ROLE_NAMES, WORDS
from common.run import cli, console, stage
from common.run.atomic import behind_links
from common.run.engine import run_studies
from common.run.lock import confirm_lease, locked, show_life
from common.run.output import exclusive, writing_part
from common.run.worker import Job, Outcome, Status, Written, refused
from common.suv.body import SUV_UNITS
from common.version import SOFTWARE

if TYPE_CHECKING:
    from common.raw.candidates import Patterns
    from common.raw.study import Conversion

EXAMPLES = """
  python createproject.py RAW_PROJECT -o project.zip
  python createproject.py RAW_PROJECT -o project.zip --key-file secret.key --jobs 8
  python createproject.py autoPET -o autopet.zip --pet '*SUV*' --pet-units suv --ct '*CTres*'
  python createproject.py RAW_PROJECT -o project.zip --dry-run
"""

logger = logging.getLogger("tumorvolume")

LONGEST_DIGEST = 64
"""Hex digits of a SHA-256 digest."""

MEMORY_BASE, MEMORY_PER_BYTE = 150_000_000, 3
"""What a worker takes, and takes besides for each byte of an image, at most [bytes]."""

MAPPING_PATIENCE_S = 60.0
"""How long another run, a shard of the same project say, may hold the mapping: it needs less."""

N_LOOKED_INTO = 8
"""Studies whose headers tell the size of their images."""

TABLE_HEADING = ("study", "would be", *ROLE_NAMES.values(), "SUV", "remarks")


@dataclass(frozen=True)
class RawStudy:
    """What a worker needs to convert one study.

    Attributes
    ----------
    folder : StudyFolder
    root : Path
        Of the raw project.
    listing : str
        Digest of the files that were there when the run began.
    project : str
        Name of the project in the zip.
    hash_lengths : (int, int)
        As of `--hash-length`.
    patterns : Patterns
    conversion : Conversion
    """

    folder: StudyFolder
    root: Path
    listing: str
    project: str
    hash_lengths: tuple[int, int]
    patterns: Patterns
    conversion: Conversion


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    with cli.checking(parser):
        check_options(parser, options)
    if options.dry_run:
        return cli.run(options, lambda: dry_run(options), dry_closing_line)
    return cli.run(options, lambda: create_project(options))


# --- options ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "raw_project", type=Path, metavar="RAW_PROJECT", help="folder of <patient>/<study>/"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PROJECT.zip", help="zip to write"
    )
    parser.add_argument("--name", help="name of the project in the zip (default: the folder's)")
    parser.add_argument(
        "--mapping",
        type=Path,
        metavar="FILE.csv",
        help="private table of patient, study and hash (default: PROJECT_mapping.csv by the zip)",
    )
    files = parser.add_argument_group(
        "which file is what",
        "DICOM is told by its Modality, NIfTI by whole words in its path below the study:\n"
        + "".join(f"  {name}: {', '.join(words)}\n" for name, words in WORDS.items())
        + "Where several or none fit, a pattern chooses: a glob on the path of a file or folder\n"
        "below the study, or on the SeriesDescription of a DICOM series; case counts",
    )
    for role, name in ROLE_NAMES.items():
        files.add_argument(f"--{role}", metavar="PATTERN", help=f"choose the {name}")
    files.add_argument(
        "--roi", type=cli.regex, metavar="REGEX", help="only ROIs or segments whose name matches"
    )
    files.add_argument(
        "--mask-on",
        choices=("ct", "pet"),
        help="what an RTSTRUCT was drawn on, where it names a series that is not there",
    )
    files.add_argument(
        "--uneven-slices",
        choices=("refuse", "resample"),
        default="refuse",
        help="CT or PET with unevenly spaced slices: refuse, or interpolate linearly onto their "
        "finest even grid (default: refuse)",
    )
    suv = parser.add_argument_group("SUV")
    suv.add_argument(
        "--pet-units",
        choices=("auto", "suv", "bqml"),
        default="auto",
        help="what PET values are: as the header says, SUV already, or Bq/ml (default: auto)",
    )
    suv.add_argument(
        "--suv-type",
        choices=tuple(SUV_UNITS),
        default="bw",
        help="what SUV is relative to: body weight, lean body mass by Janmahasatian or James, "
        "ideal body weight [g/ml], or body surface [cm2/ml] (default: bw)",
    )
    suv.add_argument(
        "--tracer",
        type=cli.positive_int,
        metavar="N",
        help="where a header lists several radiopharmaceuticals, use the N-th",
    )
    suv.add_argument(
        "--strict", action="store_true", help="refuse studies whose header needs reinterpretation"
    )
    checks = parser.add_argument_group("checks")
    checks.add_argument(
        "--allow-empty-mask", action="store_true", help="accept studies without a labelled voxel"
    )
    checks.add_argument(
        "--trust-geometry",
        action="store_true",
        help="accept images whose patients, frames of reference or headers do not agree",
    )
    identity = parser.add_argument_group("pseudonyms")
    identity.add_argument(
        "--patient",
        type=cli.regex,
        metavar="REGEX",
        help="finds the patient in the name of a case or in FOLDER/FOLDER: its first group, or the "
        "whole match (nnU-Net, HECKTOR; default: the case, or the upper folder)",
    )
    identity.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help=f"secret of at least {SHORTEST_KEY} bytes: pseudonyms that can't be guessed",
    )
    identity.add_argument(
        "--new-key", action=pseudonyms.NewKey, metavar="FILE", help="make such a secret and exit"
    )
    identity.add_argument(
        "--hash-length",
        type=cli.positive_int,
        nargs=2,
        default=DEFAULT_LENGTHS,
        metavar=("P", "S"),
        help="characters of the patient's and the study's part (default: 7 3)",
    )
    identity.add_argument(
        "--minimal-provenance",
        action="store_true",
        help="tell of SUV the rule, units and type alone; then there is no dose fraction either",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be done, write nothing"
    )
    cli.add_run_options(parser)
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with status 2 where the options can't be met, before any work."""
    secrets = [options.key_file] if options.key_file else []
    inputs = [options.raw_project, *secrets]
    cli.check_paths(parser, options, [options.raw_project], secrets)
    options.mapping = options.mapping or options.output.with_name(
        f"{options.output.stem}_mapping.csv"
    )
    cli.check_side_output(parser, options.mapping, options, inputs)
    if not options.raw_project.is_dir():
        parser.error(f"{options.raw_project} is not a folder")
    if max(options.hash_length) > LONGEST_DIGEST:
        parser.error(f"--hash-length: a digest has {LONGEST_DIGEST} characters")
    if sum(options.hash_length) > LONGEST_NAME:
        parser.error(f"--hash-length: a hash has at most {LONGEST_NAME} characters")
    options.name = options.name or options.raw_project.resolve().name
    if not options.name.isprintable() or not re.fullmatch(r"(?!\.\.?$)[^/\\:]+", options.name):
        parser.error(f"--name {options.name!r} can't be a folder's name: choose another by --name")
    options.key = pseudonyms.read_key(parser, options.key_file) if options.key_file else None


# --- the stage -------------------------------------------------------------------------------


def create_project(options: argparse.Namespace) -> list[Outcome]:
    """Convert what is new or changed and replace the zip and the mapping."""
    load_library()
    with exclusive(options.output, force=options.force, lock=options.lock):
        known = {
            row.hash: row for row in mapping.read(options.mapping) if row.project == options.name
        }
        everyone = pseudonymised(options, known.values())
        folders = this_shard(everyone, options)
        studies, listed = plan(folders, options)
        made_with = fingerprint(options_of_value(options))
        converting = stage.Stage(
            output=options.output,
            studies=studies,
            worker=convert_study,
            assemble=functools.partial(project_zip.assemble, project=options.name),
            read_finished=functools.partial(read_finished, known=known),
            write_beside=lambda path, done: write_mapping(path, everyone, studies, done, options),
            write_without=lambda done: write_mapping(None, everyone, studies, done, options),
            known_skips={row.hash: row.reason for row in known.values() if row.status == "skipped"},
            read_absent=project_zip.read_absent,
            listed=listed,
            made_alike={row.hash for row in known.values() if row.options == made_with},
            elsewhere=everyone.keys() - folders.keys(),
        )
        outcomes = stage.run_stage(
            converting, cli.engine(options), force=options.force, allow_shrink=options.allow_shrink
        )
    return sorted(outcomes, key=lambda outcome: outcome.hash)


def pseudonymised(
    options: argparse.Namespace, known: Iterable[mapping.Row]
) -> dict[str, StudyFolder]:
    """Return the study folders of all shards by hash, after checking the hashes.

    They are in the order of hashes, which says nothing of names. Studies that the mapping knows
    are among them where their patient's folder is empty or can't be looked at: a disk may not be
    mounted.
    """
    folders = studies_by_hash(
        options.raw_project, options.key, options.hash_length, options.patient
    )
    lacking = {each.patient: each.path for each in folders.values() if is_without_studies(each)}
    for row in known if lacking else ():
        # With --patient a study's name is its path.
        above, _, below = row.study.rpartition("/") if options.patient else ("", "", row.study)
        patient = above or row.patient
        if row.status == "written" and row.hash not in folders and patient in lacking:
            path = os.path.join(lacking[patient], name_of(below))
            folders[row.hash] = StudyFolder(row.patient, row.study, path)
    return {h: folders[h] for h in sorted(folders)}


def this_shard(
    everyone: Mapping[str, StudyFolder], options: argparse.Namespace
) -> dict[str, StudyFolder]:
    """Return the study folders of this shard."""
    mine = cli.of_shard(everyone, options.shard)
    return {study_hash: folder for study_hash, folder in everyone.items() if study_hash in mine}


def options_of_value(options: argparse.Namespace) -> list[Any]:
    """Return what a study's images depend on, besides its files."""
    patterns, conversion = how_to_convert(options)
    lengths = tuple(options.hash_length)
    return [SOFTWARE, options.name, lengths, dict(patterns.by_role), asdict(conversion)]


def how_to_convert(options: argparse.Namespace) -> tuple[Patterns, Conversion]:
    """Return which file is what, and how images are made of them."""
    # What reads DICOM is slow to load: not to see that an option is wrong, but before workers fork.
    dicom.load_library()
    from common.raw.candidates import Patterns
    from common.raw.study import Conversion

    patterns = Patterns({r: p for r in ROLE_NAMES if (p := getattr(options, r)) is not None})
    conversion = Conversion(
        pet_units=options.pet_units,
        suv_type=options.suv_type,
        strict=options.strict,
        tracer=options.tracer,
        roi=options.roi,
        allow_empty_mask=options.allow_empty_mask,
        trust_geometry=options.trust_geometry,
        mask_on=options.mask_on,
        uneven_slices=options.uneven_slices,
        minimal_provenance=options.minimal_provenance,
    )
    return patterns, conversion


def plan(
    folders: Mapping[str, StudyFolder], options: argparse.Namespace
) -> tuple[list[Job], list[Outcome]]:
    """Return the studies to be in the zip, and the outcomes of folders that can't be listed."""
    patterns, conversion = how_to_convert(options)
    fixed = options_of_value(options)
    lengths, root = tuple(options.hash_length), options.raw_project.absolute()
    studies, outcomes, sizes = [], [], {}
    for study_hash, folder in folders.items():
        show_life()
        try:
            files = list_files(folder)
        except StudyError as error:
            outcomes.append(refused(study_hash, error))
            continue
        seen = [[file.name, file.size, file.changed_ns] for file in files]
        there = replace(folder, path=os.path.abspath(folder.path))
        raw = RawStudy(there, root, listing(files), options.name, lengths, patterns, conversion)
        studies.append(Job(study_hash, fingerprint([*fixed, study_hash, seen]), raw))
        sizes[study_hash] = sum(file.size or 0 for file in files)
    return with_memory(studies, sizes), outcomes


def with_memory(studies: Sequence[Job], file_bytes: Mapping[str, int]) -> list[Job]:
    """Return studies with what their workers take at most [bytes], by the size of their files.

    To look into every study would take longer than planning: those of the largest files stand
    for all.
    """
    sizes = dict(file_bytes)
    for study in sorted(studies, key=lambda study: sizes[study.hash])[-N_LOOKED_INTO:]:
        with suppress(StudyError):
            folder = study.work.folder
            sizes[study.hash] = image_bytes(folder.path, files_of(folder))
    return [
        replace(study, memory=MEMORY_BASE + MEMORY_PER_BYTE * sizes[study.hash])
        for study in studies
    ]


def read_finished(path: Path, known: Mapping[str, mapping.Row]) -> dict[str, str]:
    """Return the fingerprints of the studies that a zip holds, unknown ones empty."""
    archived = project_zip.read_directory(path)
    input_of = {row.output: row.input for row in known.values()}
    finished = {study.hash: input_of.get(study.content, "") for study in archived.values()}
    if not all(finished.values()):
        logger.warning(
            "studies of the old output (%d) are not as the mapping says: they are not kept",
            list(finished.values()).count(""),
        )
    return finished


def convert_study(job: Job) -> Written:
    """Convert one study and write its part."""
    from common.raw import roles
    from common.raw.study import plan_study, read_study

    raw: RawStudy = job.work
    try:
        check_listing(raw)
        needed = raw.conversion.needs_header
        found = roles.find_roles(raw.folder, raw.patterns, header_needed=needed)
        planned = plan_study(found, raw.conversion)
        with (
            writing_part(job.part) as temporary,
            project_zip.part_of_study(temporary, raw.project, job.hash) as part,
        ):
            study = read_study(planned, part.add_image)
            part.add_record({**study.record, "hash_lengths": raw.hash_lengths})
    except StudyError:
        check_project(raw.root)
        raise
    return Written(study.warnings, study.taken)


def check_listing(raw: RawStudy) -> None:
    """See whether the files of a study are those that were there when the run began.

    Raises
    ------
    UnreachableStudy
        They are not: a disk is gone, or they are being copied.
    """
    if listing(files_of(raw.folder)) != raw.listing:
        raise UnreachableStudy(
            "its files are others than when this run began: check that its disk is mounted, and "
            "run again when all are there"
        )


def write_mapping(
    zip_path: Path | None,
    everyone: Mapping[str, StudyFolder],
    studies: Sequence[Job],
    outcomes: Sequence[Outcome],
    options: argparse.Namespace,
) -> None:
    """Write the private table that links hashes to patients, readable by its owner alone.

    Rows of other projects and of other shards are kept. Without a new zip no study is written.
    """
    jobs = {study.hash: study for study in studies}
    made_with = fingerprint(options_of_value(options))
    archived = project_zip.read_directory(zip_path) if zip_path is not None else {}
    with locked(behind_links(options.mapping), MAPPING_PATIENCE_S, lock=options.lock):
        old = mapping.read(options.mapping)
        known = {row.hash: row for row in old if row.project == options.name}
        new = []
        for outcome in outcomes:
            folder, held = everyone[outcome.hash], archived.get(outcome.hash)
            row = mapping.Row(
                project=options.name,
                patient=folder.patient,
                study=folder.study,
                hash=outcome.hash,
                status="written" if held is not None else outcome.status,
                reason=mapping.shortened(outcome.reason),
                found=mapping.shortened(outcome.private),
            )
            before = known.get(outcome.hash)
            if held is not None and outcome.status == "failed" and before is not None:
                # It stays as it was made before.
                row = replace(before, reason=row.reason, found=row.found)
            elif held is not None:
                job = jobs[outcome.hash]
                taken = sources_of(outcome, job, before)
                row = replace(
                    row, **taken, input=job.fingerprint, output=held.content, options=made_with
                )
            new.append(row)
        elsewhere = everyone.keys() - this_shard(everyone, options).keys()
        asked_for = cli.of_shard(known.keys() | everyone.keys(), options.shard) - elsewhere
        confirm_lease(options.mapping)
        mapping.write(options.mapping, mapping.merged(old, new, options.name, asked_for))


def sources_of(outcome: Outcome, job: Job, known: mapping.Row | None) -> dict[str, str]:
    """Return what a study was made from: the cells of its row in the mapping.

    Its worker told, or the mapping does; of a part that an interrupted run has finished only
    the files are named.
    """
    if outcome.made is not None:
        taken = outcome.made.private
    elif known is not None and known.input == job.fingerprint:
        taken = known.taken
    else:
        from common.raw import roles
        from common.raw.study import taken_from

        raw: RawStudy = job.work
        needed = raw.conversion.needs_header
        try:
            found = roles.find_roles(raw.folder, raw.patterns, header_needed=needed)
            taken = taken_from(found, ())
        except StudyError:
            return {}
    return {name: mapping.shortened(text) for name, text in asdict(taken).items()}


# --- the dry run -----------------------------------------------------------------------------


def dry_run(options: argparse.Namespace) -> list[Outcome]:
    """Read headers, print what would be done with each study, write nothing."""
    folders = this_shard(pseudonymised(options, ()), options)
    studies, listed = plan(folders, options)
    looked_at = run_studies(foresee_study, studies, cli.engine(options))
    foreseen = {
        outcome.hash: outcome.made or Foreseen(outcome.status, remarks=outcome.reason)
        for outcome in [*listed, *looked_at]
    }
    rows = [(study_hash, *foreseen[study_hash].cells) for study_hash in sorted(foreseen)]
    console.say_table([TABLE_HEADING, *rows])
    return [Outcome(study_hash, foreseen[study_hash].status) for study_hash in sorted(foreseen)]


@dataclass(frozen=True)
class Foreseen:
    """What would become of a study, by its headers."""

    status: Status
    by_role: tuple[str, ...] = ("",) * len(ROLE_NAMES)
    suv_rule: str = ""
    remarks: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row in the table of a dry run, after the hash."""
        return (self.status, *self.by_role, self.suv_rule, self.remarks)


def foresee_study(job: Job) -> Foreseen:
    """Read a study's headers and say what would become of it."""
    from common.raw import roles
    from common.raw.study import plan_study

    raw: RawStudy = job.work
    found = roles.survey(raw.folder, raw.patterns, header_needed=raw.conversion.needs_header)
    by_role = tuple(found.summary(role) for role in ROLE_NAMES)
    try:
        planned = plan_study(roles.choose(found, has_mapping=False), raw.conversion)
    except StudyError as error:
        # Who may see the raw project may see names: a dry run writes no mapping to look them up.
        remarks = f"{error}; {error.private}" if error.private else str(error)
        return Foreseen(refused(job.hash, error).status, by_role, remarks=remarks)
    remarks = "; ".join(map(str, planned.warnings))
    return Foreseen("written", by_role, planned.suv_rule, remarks)


def dry_closing_line(outcomes: Sequence[Outcome], output: Path) -> str:
    """Return the closing line of a dry run."""
    counts = [sum(o.status == s for o in outcomes) for s in ("written", "skipped", "failed")]
    return (
        f"dry run of {counted(len(outcomes))}: {counts[0]} would be written, {counts[1]} skipped, "
        f"{counts[2]} failed; nothing is written"
    )


if __name__ == "__main__":
    sys.exit(main())
