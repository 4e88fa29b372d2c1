#!/usr/bin/env python3
"""Turn a project zip into one HDF5 file of 3D training volumes.

Every study is reoriented, its CT resampled to spacing and shape, PET and mask to the CT, an
isocontour of the mask taken, and CT and PET normalised to [0, 1]. The file holds image/<hash>
(2, X, Y, Z: PET, CT), mask/<hash> and mask_iso/<hash> (1, X, Y, Z).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the second that the packages below take to load is no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import logging
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import project_zip
from common.errors import IncompleteStudy, StageError, counted
from common.geometry import ORIENTATIONS
from common.hashing import fingerprint
from common.hdf5.chunks import COMPRESSIONS, COMPRESSIONS_MEAN, missing_packages
from common.hdf5.forms import form_of
from common.hdf5.parts import write_volume
from common.hdf5.studies import read_keys
from common.nifti import load_library, write_nifti_file
from common.plausibility import weight_of
from common.report.lesion_table import write_measures
from common.run import cli, stage
from common.run.console import PROGRESS, StepTimes
from common.run.output import exclusive, make_folder, writing_beside, writing_part
from common.run.pool import in_own_process
from common.run.worker import Job, Outcome, Written
from common.version import SOFTWARE
from common.volumes import Recipe, place_study

EXAMPLES = """
  python preprocessing.py project.zip -o project_3d.h5
  python preprocessing.py project.zip -o project_3d.h5 --spacing 4 4 4 --shape 100 100 --jobs 4
  python preprocessing.py project.zip -o project_3d.h5 --iso-threshold 41 --measures lesions.csv
"""

MEMORY_BASE, MEMORY_PER_VOXEL = 250_000_000, 3
"""What a worker takes at most, roughly [bytes], beside each voxel of its study's three images."""

SPACINGS_MM = (0.01, 1000)
"""Voxel sizes that images of people can have."""

MOST_VOXELS = 32767
"""Voxels along an axis that a NIfTI header can count."""

SAVED_IMAGES = ("ct", "petsuv", "mask", "mask_iso")
"""What --save-nifti writes of a study."""

TOLD_REASONS = 3
"""Studies of an empty zip, at most, whose reason is told."""

logger = logging.getLogger("tumorvolume")


@dataclass(frozen=True)
class ZippedStudy:
    """What a worker needs to preprocess one study."""

    zip_path: Path
    study: project_zip.ArchivedStudy
    recipe: Recipe
    compression: str
    profile: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    with cli.checking(parser):
        check_options(parser, options)
    return cli.run(options, lambda: preprocess(options))


# --- options ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument("zip", type=Path, metavar="PROJECT.zip", help="zip of createproject.py")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PROJECT_3d.h5", help="file to write"
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--spacing",
        type=cli.finite_float,
        nargs=3,
        default=(2.0, 2.0, 3.0),
        metavar=("X", "Y", "Z"),
        help="voxel size [mm] (default: 2 2 3)",
    )
    grid.add_argument(
        "--shape",
        type=cli.positive_int,
        nargs="+",
        default=(200, 200),
        metavar="N",
        help="voxels along x, y and, if given, z (default: 200 200, z as long as the CT)",
    )
    grid.add_argument(
        "--orientation",
        type=orientation,
        default="LAS",
        metavar="CODE",
        help="where the array axes point to (default: LAS: Left, Anterior, Superior)",
    )
    grid.add_argument(
        "--align",
        choices=("center", "corner"),
        default="center",
        help="what of the grid and the CT coincides: middles in x and y (default), or voxel 0",
    )
    values = parser.add_argument_group("values")
    for name, default, unit in (("ct", (-1000.0, 1000.0), "HU"), ("suv", (0.0, 40.0), "SUV")):
        values.add_argument(
            f"--{name}-range",
            type=cli.finite_float,
            nargs=2,
            default=default,
            metavar=("MIN", "MAX"),
            help=f"[{unit}] that become 0 and 1 (default: {default[0]:g} {default[1]:g})",
        )
    values.add_argument(
        "--iso-threshold",
        type=cli.finite_float,
        default=25.0,
        metavar="PERCENT",
        help="isocontour: voxels from this part of their lesion's SUVmax on [%%] (default: 25)",
    )
    values.add_argument(
        "--iso-suv",
        type=cli.finite_float,
        metavar="SUV",
        help="isocontour: voxels from this SUV on, instead of --iso-threshold",
    )
    values.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="type of the image values (default: float16)",
    )
    values.add_argument(
        "--labels",
        choices=("binary", "keep"),
        default="binary",
        help="what masks hold: 0 and 1 (default), or the label values, for several classes",
    )
    results = parser.add_argument_group("results")
    cli.add_compression_option(results, COMPRESSIONS, missing_packages(), COMPRESSIONS_MEAN)
    results.add_argument(
        "--save-nifti",
        type=Path,
        metavar="DIR",
        help="also write <hash>_{ct,petsuv,mask,mask_iso}.nii.gz on the target grid [HU, SUV]",
    )
    results.add_argument(
        "--measures",
        type=Path,
        metavar="FILE.csv",
        help="also write MTV [ml], SUVmax, TLG [g] and more of each lesion, on the PET's own grid",
    )
    results.add_argument(
        "--report",
        type=Path,
        metavar="FILE.html",
        help="also write a page to look at: projections, outlines, measures, warnings",
    )
    cli.add_store_option(results)
    cli.add_run_options(parser)
    parser.add_argument(
        "--profile", action="store_true", help="log the seconds that each step of a study took"
    )
    return parser


def orientation(text: str) -> str:
    """Parse an orientation code such as LAS."""
    code = text.upper()
    if code not in ORIENTATIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one each of L/R, A/P and S/I")
    return code


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with status 2 where the options can't be met, before any work."""
    cli.check_paths(parser, options, [options.zip])
    least_mm, greatest_mm = SPACINGS_MM
    if not all(least_mm <= spacing_mm <= greatest_mm for spacing_mm in options.spacing):
        parser.error(f"--spacing: voxel sizes must be from {least_mm} to {greatest_mm} mm")
    if len(options.shape) not in (2, 3):
        parser.error("--shape: give two or three numbers of voxels")
    if max(options.shape) > MOST_VOXELS:
        parser.error(f"--shape: at most {MOST_VOXELS} voxels along an axis, as NIfTI can count")
    for name, (least, greatest) in (("ct", options.ct_range), ("suv", options.suv_range)):
        if not least < greatest:
            parser.error(f"--{name}-range: MIN must be below MAX")
    if not 0 <= options.iso_threshold <= 100:
        parser.error("--iso-threshold: give a percentage from 0 to 100")
    if options.iso_suv is not None and options.iso_suv <= 0:
        parser.error("--iso-suv: give an SUV above 0")
    if options.measures is not None:
        cli.check_side_output(parser, options.measures, options, [options.zip])
    if options.report is not None:
        beside = [options.zip, *([options.measures] if options.measures else [])]
        cli.check_side_output(parser, options.report, options, beside)
    if options.save_nifti is not None:
        cli.check_folder(parser, options.save_nifti, options)
    cli.check_store(parser, options)


# --- the stage -------------------------------------------------------------------------------


def preprocess(options: argparse.Namespace) -> list[Outcome]:
    """Compute what is new or changed, replace the HDF5 file and write what goes beside it."""
    recipe = Recipe(
        spacing=tuple(options.spacing),
        shape=(*options.shape, None)[:3],
        orientation=options.orientation,
        align=options.align,
        ct_range=tuple(options.ct_range),
        suv_range=tuple(options.suv_range),
        iso_threshold=options.iso_threshold,
        iso_suv=options.iso_suv,
        dtype=options.dtype,
        labels=options.labels,
    )
    load_library()
    form = form_of(options.output, options.store, recipe.parameters, SOFTWARE)
    with exclusive(options.output, force=options.force, lock=options.lock, store=options.store):
        archived = project_zip.read_directory(options.zip)
        if not archived:
            raise StageError(f"{options.zip}: {why_empty(options.zip)}")
        if options.save_nifti is not None:
            make_folder(options.save_nifti)
        studies = plan(archived, recipe, options)

        def write_what_goes_beside(path: Path, outcomes: Sequence[Outcome]) -> None:
            if options.measures is not None:
                write_measures(options.measures, path)
            if options.report is not None:
                # Slow to load, and only for those who ask for it.
                from common.report.page import write_report

                told = project_zip.read_absent(options.zip)
                absent = [
                    Outcome(study_hash, *told[study_hash])
                    for study_hash in sorted(cli.of_shard(told, options.shard))
                ]
                write_report(
                    options.report,
                    options.output.resolve(),
                    dict.fromkeys(in_own_process(read_keys, path), path),
                    [*absent, *outcomes],
                    cli.engine(options),
                    SOFTWARE,
                )

        preprocessing = stage.Stage(
            output=options.output,
            studies=studies,
            worker=preprocess_study,
            assemble=form.assemble,
            read_finished=functools.partial(in_own_process, form.read_finished),
            write_beside=write_what_goes_beside,
            beside_of=functools.partial(saved_images, options=options),
            elsewhere=archived.keys() - {study.hash for study in studies},
            name="preprocessing",
            store=options.store,
            has_form=functools.partial(in_own_process, form.is_of),
        )
        return stage.run_stage(
            preprocessing,
            cli.engine(options),
            force=options.force,
            allow_shrink=options.allow_shrink,
        )


def saved_images(study_hash: str, options: argparse.Namespace) -> tuple[Path, ...]:
    """Return where `--save-nifti` puts the images of a study."""
    saved = SAVED_IMAGES if options.save_nifti else ()
    return tuple(options.save_nifti / f"{study_hash}_{name}.nii.gz" for name in saved)


def why_empty(path: Path) -> str:
    """Say why a zip holds no study, as far as it tells."""
    absent = project_zip.read_absent(path)
    if not absent:
        return "no study in it; members must end in <hash>/<hash>_{ct,petsuv,mask}.nii.gz"
    reasons = [
        f"{study_hash} {status}, {reason if reason.isprintable() else repr(reason)}"
        for study_hash, (status, reason) in absent.items()
    ]
    told = "; ".join(reasons[:TOLD_REASONS]) + (" ..." if len(reasons) > TOLD_REASONS else "")
    return f"no study in it, for createproject.py wrote none of {counted(len(absent))}: {told}"


def plan(
    archived: Mapping[str, project_zip.ArchivedStudy], recipe: Recipe, options: argparse.Namespace
) -> list[Job]:
    """Return this shard's studies."""
    studies = []
    mine = cli.of_shard(archived, options.shard)
    for study_hash, study in archived.items():
        if study_hash not in mine:
            continue
        made_from = [SOFTWARE, study.content, recipe.parameters, options.compression]
        digest = fingerprint(made_from)
        work = ZippedStudy(
            options.zip.resolve(),
            study,
            recipe,
            options.compression,
            options.profile,
        )
        beside = saved_images(study_hash, options)
        studies.append(Job(study_hash, digest, work, beside=beside, memory=memory_bytes(study)))
    return studies


def memory_bytes(study: project_zip.ArchivedStudy) -> int:
    """Return what preprocessing a study takes at most, roughly [bytes]."""
    try:
        shapes = study.record["shapes"].values()
        n_voxels = sum(math.prod(map(operator.index, shape)) for shape in shapes)
    except (KeyError, AttributeError, TypeError):
        # A zip of another make: gzipped CT, PET and mask together take about a byte a voxel.
        n_voxels = sum(member.size for member in study.members.values())
    return MEMORY_BASE + MEMORY_PER_VOXEL * n_voxels


# --- one study -------------------------------------------------------------------------------


def preprocess_study(job: Job) -> Written:
    """Bring one study onto the target grid and write its part."""
    work: ZippedStudy = job.work
    study = work.study
    if study.missing:
        raise IncompleteStudy("no " + ", no ".join(study.missing))
    times = StepTimes()
    weight_kg = weight_of(study.provenance)

    read = functools.partial(project_zip.read_image, work.zip_path, study)
    placed = place_study(read, work.recipe, weight_kg, study.warnings, times.end)
    with writing_part(job.part, job.beside) as temporary:
        write_volume(
            temporary,
            study,
            placed,
            work.recipe,
            compression=work.compression,
            fingerprint=job.fingerprint,
            software=SOFTWARE,
        )
        saved = SAVED_IMAGES if job.beside else ()
        for name, path in zip(saved, job.beside, strict=True):
            with writing_beside(path) as nifti:
                write_nifti_file(nifti, placed.images[name])
    times.end("writing")
    logger.info("%s: resampled %s", job.hash, placed.how_resampled)
    if work.profile:
        logger.log(PROGRESS, "%s: %s", job.hash, times)
    return Written(placed.warnings)


if __name__ == "__main__":
    sys.exit(main())
