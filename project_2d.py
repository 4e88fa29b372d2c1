#!/usr/bin/env python3
"""Turn 3D training volumes into 2D maximum-intensity projections from many angles.

Each volume is rotated about its z axis and projected along y by maximum. The file holds
image/<hash>_<angle> (2, X, Z: PET, CT), mask/<hash>_<angle> and mask_iso/<hash>_<angle> (1, X, Z);
a CSV of the same name lists them.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the second that the packages below take to load is no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import Kind, StageError, StudyError, Warning
from common.geometry import ORIENTATIONS
from common.hashing import array_digest, as_hash_lengths, fingerprint
from common.hdf5 import merge
from common.hdf5.studies import (
    COMPRESSIONS,
    GROUPS,
    create_file,
    has_blosc,
    read_attributes,
    read_dataset,
    read_parameters,
    read_shapes,
    write_dataset,
)
from common.projection import angle_name, image_mips, mask_mips, projection_angles
from common.run import cli, stage
from common.run.output import exclusive, make_folder, write_table, writing_beside, writing_part
from common.run.pool import in_own_process
from common.run.worker import Job, Outcome, Written
from common.version import SOFTWARE

EXAMPLES = """
  python project_2d.py all_3d.h5 -o all_2d.h5
  python project_2d.py all_3d.h5 -o all_2d.h5 --angles 0 180 10 --stack
  python project_2d.py all_3d.h5 -o all_2d.h5 --gif movies --png stills
"""

logger = logging.getLogger("tumorvolume")

MEMORY_BASE, MEMORY_PER_VALUE = 150_000_000, 8
"""What a worker takes, and takes besides for each value of an image, at most [bytes]."""


@dataclass(frozen=True)
class StoredStudy:
    """What a worker needs to project one study.

    `slab` is the length along z to pad to, for stacking; None for projections as long as they are.
    `digests` are those of the study as it was planned with (`merge.read_digests`).
    """

    path: Path
    key: str
    digests: Sequence[str]
    angles: tuple[float, ...]
    slab: int | None
    parameters: Mapping[str, Any]
    compression: str
    gif: Path | None
    png: Path | None


@dataclass(frozen=True)
class Source:
    """What a 3D file holds.

    Attributes
    ----------
    parameters : dict
        Options of value that it was made with.
    shapes : dict of hash to (2, X, Y, Z)
        Of all its studies.
    spacings_mm : dict of hash to (x, y, z)
        Of all its studies.
    digests, projects : dict by hash
        Of this shard's.
    """

    parameters: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    spacings_mm: Mapping[str, Any]
    digests: Mapping[str, Sequence[str]]
    projects: Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    with cli.checking(parser):
        check_options(parser, options)
    return cli.run(options, lambda: project(options))


# --- options ---------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.make_parser(__doc__, EXAMPLES)
    parser.add_argument("input", type=Path, metavar="ALL_3d.h5", help="file of 3D volumes")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="ALL_2d.h5", help="file to write"
    )
    projecting = parser.add_argument_group("projections")
    projecting.add_argument(
        "--angles",
        type=cli.finite_float,
        nargs=3,
        default=(0.0, 180.0, 5.0),
        metavar=("START", "STOP", "STEP"),
        help="START, START+STEP, ... < STOP [degrees] (default: 0 180 5)",
    )
    projecting.add_argument(
        "--stack",
        action="store_true",
        help="one dataset a group, (N, 2, X, Z) and (N, 1, X, Z), and their keys in dataset key",
    )
    projecting.add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default="gzip",
        help="of the HDF5 file (default: gzip, read everywhere; blosc, the fastest to read in "
        "patches, needs hdf5plugin)",
    )
    pictures_group = parser.add_argument_group("pictures")
    pictures_group.add_argument(
        "--gif", type=Path, metavar="DIR", help="a rotating projection a study, lesions outlined"
    )
    pictures_group.add_argument("--png", type=Path, metavar="DIR", help="a still a study")
    cli.add_run_options(parser)
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with status 2 where the options can't be met, before any work."""
    cli.check_files(parser, [options.input])
    cli.check_paths(parser, options, [options.input])
    try:
        options.all_angles = projection_angles(*options.angles)
    except ValueError as error:
        parser.error(f"--angles: {error}")
    cli.check_side_output(parser, csv_path(options.output), options, [options.input])
    for folder in (options.gif, options.png):
        if folder is not None:
            cli.check_folder(parser, folder, options)
    if options.compression == "blosc" and not has_blosc():
        parser.error("--compression blosc needs the package hdf5plugin: pip install hdf5plugin")


def csv_path(output: Path) -> Path:
    """Return the path of the list beside the output."""
    return output.with_suffix(".csv")


# --- the stage -------------------------------------------------------------------------------


def project(options: argparse.Namespace) -> list[Outcome]:
    """Compute what is new or changed, replace the 2D file and its list."""
    with exclusive(options.output, force=options.force, lock=options.lock):
        source = in_own_process(read_source, options.input, options.shard)
        parameters = {**source.parameters, "angles": list(options.angles), "stack": options.stack}
        for folder in (options.gif, options.png):
            if folder is not None:
                make_folder(folder)
        studies = plan(options, source, parameters)
        by_key = {
            two_d_key(study.hash, angle): study.hash
            for study in studies
            for angle in options.all_angles
        }

        def list_projections(path: Path | None, outcomes: Sequence[Outcome]) -> None:
            if path is not None:
                write_list(options, source, by_key, outcomes)

        projecting = stage.Stage(
            output=options.output,
            studies=studies,
            worker=project_study,
            assemble=functools.partial(
                assemble_projections, by_key=by_key, parameters=parameters, stack=options.stack
            ),
            read_finished=functools.partial(in_own_process, merge.read_projected),
            write_beside=list_projections,
            name="project_2d",
        )
        return stage.run_stage(projecting, cli.engine(options), force=options.force)


def assemble_projections(
    path: Path,
    sources: Mapping[str, Path],
    by_key: Mapping[str, str],
    parameters: Mapping[str, Any],
    stack: bool,
) -> None:
    """Write the 2D file from files that hold the projections of a study."""
    of_keys = {key: sources[study] for key, study in by_key.items() if study in sources}
    assemble = merge.assemble_stack if stack else merge.assemble
    assemble(path, of_keys, parameters, SOFTWARE)


def two_d_key(study_hash: str, angle: float) -> str:
    """Return the key of one projection."""
    return f"{study_hash}_{angle_name(angle)}"


def read_source(path: Path, shard: tuple[int, int]) -> Source:
    """Read what the plan needs of a 3D file."""
    parameters = read_parameters(path)
    if "angles" in parameters:
        raise StageError(f"{path}: holds projections already: give a 3D file")
    shapes = read_shapes(path)
    keys = [key for key in shapes if cli.in_shard(key, shard)]
    digests = merge.read_digests(dict.fromkeys(keys, path))
    spacings_mm = read_attributes(path, list(shapes), "spacing")
    projects = read_attributes(path, keys, "project")
    return Source(parameters, shapes, spacings_mm, digests, projects)


def plan(options: argparse.Namespace, source: Source, parameters: Mapping[str, Any]) -> list[Job]:
    """Return this shard's studies."""
    if not source.shapes:
        raise StageError(f"{options.input}: no study in it: nothing to project")
    if options.stack and len({shape[1] for shape in source.shapes.values()}) > 1:
        raise StageError(f"{options.input}: volumes of several widths can't be stacked")
    if options.stack:
        refuse_several_spacings(options.input, source)
    slab = max(shape[3] for shape in source.shapes.values()) if options.stack else None
    studies = []
    for key, digests in source.digests.items():
        made_from = [SOFTWARE, digests, parameters, slab, options.compression]
        work = StoredStudy(
            options.input.resolve(),
            key,
            digests,
            options.all_angles,
            slab,
            parameters,
            options.compression,
            options.gif and options.gif.absolute(),
            options.png and options.png.absolute(),
        )
        beside = [f / f"{key}.{kind}" for kind in ("gif", "png") if (f := getattr(options, kind))]
        memory = MEMORY_BASE + MEMORY_PER_VALUE * math.prod(source.shapes[key])
        studies.append(Job(key, fingerprint(made_from), work, beside=tuple(beside), memory=memory))
    return studies


def refuse_several_spacings(path: Path, source: Source) -> None:
    """Raise where volumes differ in spacing; what is no spacing fails its study later."""
    spacings_mm = set()
    for spacing_mm in source.spacings_mm.values():
        with suppress(ValueError, TypeError):
            spacings_mm.add(str(np.round(np.asarray(spacing_mm, np.float64), 6).tolist()))
    if len(spacings_mm) > 1:
        raise StageError(
            f"{path}: volumes of several spacings ({', '.join(sorted(spacings_mm))} mm) can't be "
            "stacked: a stack has one: leave out --stack, or make them alike"
        )


def write_list(
    options: argparse.Namespace,
    source: Source,
    by_key: Mapping[str, str],
    outcomes: Sequence[Outcome],
) -> None:
    """Write the CSV that lists the projections in the order of their keys."""
    held = {outcome.hash for outcome in outcomes if outcome.status in ("written", "unchanged")}
    keys = sorted(key for key, study in by_key.items() if study in held)
    rows = []
    for number, key in enumerate(keys):
        study_hash, _, angle = key.rpartition("_")
        rows.append((number, study_hash, angle, source.projects.get(study_hash, ""), key))
    heading = ("number", "hash", "angle", "project", "dataset")
    write_table(csv_path(options.output), heading, rows)


# --- one study -------------------------------------------------------------------------------


def project_study(job: Job) -> Written:
    """Project one study from all angles and write its part."""
    work: StoredStudy = job.work
    image, attributes = read_as_planned(work, "image")
    check_attributes(attributes)
    warnings = [] if attributes["orientation"][2] in "SI" else [turned_warning(attributes)]
    mips = {"image": np.clip(image_mips(image, work.angles), 0, 1).astype(image.dtype)}
    del image
    for group in ("mask", "mask_iso"):
        mask, _ = read_as_planned(work, group)
        if work.slab is not None and "labels" in work.parameters:
            # The masks of a stack are of one type, whichever labels a study has.
            mask = mask.astype(np.uint16)
        mips[group] = mask_mips(mask, work.angles)
    if work.slab is not None:
        mips = {group: padded(array, work.slab) for group, array in mips.items()}
    shared = {
        "project": str(attributes.get("project", "")),
        "hash": work.key,
        "spacing": np.array(attributes["spacing"])[[0, 2]],
    }
    of_image: dict[str, Any] = {"fingerprint": job.fingerprint}
    lengths = as_hash_lengths(attributes.get("hash_lengths"), work.key)
    if lengths is not None:
        of_image["hash_lengths"] = np.array(lengths)
    with writing_part(job.part, job.beside) as temporary:
        with create_file(temporary, work.parameters, SOFTWARE) as file:
            for i, angle in enumerate(work.angles):
                for group in GROUPS:
                    more = of_image if group == "image" else {}
                    write_dataset(
                        file,
                        group,
                        two_d_key(work.key, angle),
                        mips[group][i],
                        {**shared, "angle": angle, **more},
                        work.compression,
                    )
        write_pictures(work, mips, attributes)
    return Written(warnings)


def read_as_planned(work: StoredStudy, group: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a dataset and its attributes.

    Raises
    ------
    StageError
        The file is another one now; of both, no mixture is made.
    """
    array, attributes = read_dataset(work.path, group, work.key)
    made_from, *of_groups = work.digests
    planned = dict(zip(GROUPS, of_groups, strict=True))
    is_other = group == "image" and str(attributes.get("fingerprint")) != made_from
    if is_other or attributes.get("sha256", array_digest(array)) != planned[group]:
        raise StageError(f"{work.path}: has been made anew since this run began: run again")
    return array, attributes


def turned_warning(attributes: Mapping[str, Any]) -> Warning:
    """Say that projections turn the body about another axis than its own."""
    return Warning(
        Kind.OTHER,
        f"the third axis of its orientation {attributes['orientation']} is not the body's: the "
        "projections turn about another axis: make the 3D file with an orientation that ends in "
        "S or I",
    )


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Refuse a volume that does not say, or says nonsense of, its place and its values."""
    for name, count in (("spacing", 3), ("suv_range", 2)):
        try:
            values = np.array(attributes[name], np.float64)
            sound = values.shape == (count,) and bool(np.isfinite(values).all())
        except (KeyError, ValueError, TypeError):
            sound = False
        if sound:
            sound = bool((values > 0).all()) if name == "spacing" else bool(values[0] < values[1])
        if not sound:
            raise StudyError(f"its attribute {name!r} is missing or damaged: make the file again")
    if str(attributes.get("orientation")) not in ORIENTATIONS:
        raise StudyError("its attribute 'orientation' is missing or damaged: make the file again")


def padded(mips: np.ndarray, length: int) -> np.ndarray:
    """Return projections (N, C, X, Z) with zeros at the superior end up to `length`."""
    return np.pad(mips, ((0, 0), (0, 0), (0, 0), (0, length - mips.shape[-1])))


def write_pictures(
    work: StoredStudy, mips: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> None:
    """Write the rotating projection and the still, where asked for."""
    if work.gif is None and work.png is None:
        return
    # Slow to load, and only for those who ask for them.
    from common.report import pictures

    pet, masks, angles = pictures.full_turn(mips["image"][:, 0], mips["mask"][:, 0], work.angles)
    frames = pictures.mip_frames(
        pet,
        masks,
        angles,
        suv_range=attributes["suv_range"],
        spacing_mm=(attributes["spacing"][0], attributes["spacing"][2]),
        orientation=attributes["orientation"],
    )
    if work.png is not None:
        with writing_beside(work.png / f"{work.key}.png") as path:
            pictures.write_png(path, frames[0])
    if work.gif is not None:
        with writing_beside(work.gif / f"{work.key}.gif") as path:
            pictures.write_gif(path, frames)


if __name__ == "__main__":
    sys.exit(main())
