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

from common.errors import StageError
from common.hashing import fingerprint
from common.hdf5 import reading
from common.hdf5.chunks import COMPRESSIONS, COMPRESSIONS_MEAN, missing_packages
from common.hdf5.forms import form_of
from common.hdf5.parts import read_as_planned, read_volume, write_projections
from common.hdf5.studies import (
    Content,
    attribute,
    content_of,
    projection_key,
    read_each,
    read_keys,
    read_parameters,
)
from common.projection import mask_mips, padded, projection_angles, training_mips
from common.quality_warnings import turned_axis
from common.report.projection_list import list_beside, write_list
from common.run import cli, stage
from common.run.output import exclusive, make_folder, writing_part
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

    `length` along z is what to pad to, for stacking; None for projections as long as they are.
    `digests` are those of the study as it was planned with (`reading.read_digests`), `pictures`
    the kinds of the job's files beside the output.
    """

    path: Path
    key: str
    digests: Sequence[str]
    angles: tuple[float, ...]
    length: int | None
    parameters: Mapping[str, Any]
    compression: str
    pictures: Sequence[str]


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
    cli.add_compression_option(projecting, COMPRESSIONS, missing_packages(), COMPRESSIONS_MEAN)
    pictures_group = parser.add_argument_group("pictures")
    pictures_group.add_argument(
        "--gif", type=Path, metavar="DIR", help="a rotating projection a study, lesions outlined"
    )
    pictures_group.add_argument("--png", type=Path, metavar="DIR", help="a still a study")
    cli.add_store_option(projecting)
    cli.add_run_options(parser)
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with status 2 where the options can't be met, before any work."""
    cli.check_paths(parser, options, [options.input])
    try:
        options.all_angles = projection_angles(*options.angles)
    except ValueError as error:
        parser.error(f"--angles: {error}")
    cli.check_side_output(parser, list_beside(options.output), options, [options.input])
    for folder in (options.gif, options.png):
        if folder is not None:
            cli.check_folder(parser, folder, options)
    cli.check_store(parser, options)
    if options.store is not None and options.stack:
        parser.error("--store keeps files of studies, --stack makes one dataset: leave out one")


# --- the stage -------------------------------------------------------------------------------


def project(options: argparse.Namespace) -> list[Outcome]:
    """Compute what is new or changed, replace the 2D file and its list."""
    with exclusive(options.output, force=options.force, lock=options.lock, store=options.store):
        source = in_own_process(read_source, options.input, options.shard)
        parameters = {**source.parameters, "angles": list(options.angles), "stack": options.stack}
        for folder in (options.gif, options.png):
            if folder is not None:
                make_folder(folder)
        studies = plan(options, source, parameters)
        form = form_of(options.output, options.store, parameters, SOFTWARE, options.all_angles)
        projecting = stage.Stage(
            output=options.output,
            studies=studies,
            worker=project_study,
            assemble=form.assemble,
            read_finished=functools.partial(in_own_process, form.read_finished),
            write_beside=lambda path, outcomes: list_held(options, source, outcomes),
            beside_of=functools.partial(pictures, options=options),
            elsewhere=source.shapes.keys() - source.digests.keys(),
            name="project_2d",
            store=options.store,
            has_form=functools.partial(in_own_process, form.is_of),
        )
        return stage.run_stage(
            projecting, cli.engine(options), force=options.force, allow_shrink=options.allow_shrink
        )


def read_source(path: Path, shard: tuple[int, int]) -> Source:
    """Read what the plan needs of a 3D file."""
    parameters = read_parameters(path)
    if content_of(parameters) is not Content.VOLUMES:
        raise StageError(f"{path}: holds projections already: give a 3D file")
    mine = cli.of_shard(read_keys(path), shard)
    digests: dict[str, Sequence[str]] = {}
    spacings_mm: dict[str, Any] = {}
    projects: dict[str, str] = {}

    def read(key: str, datasets: Sequence[Any]) -> tuple[int, ...]:
        image = datasets[0]
        if (spacing_mm := attribute(image, "spacing")) is not None:
            spacings_mm[key] = spacing_mm
        if key in mine:
            digests[key] = reading.digests_of(datasets)
            projects[key] = attribute(image, "project") or ""
        return tuple(image.shape)

    shapes = read_each(path, read)
    return Source(parameters, shapes, spacings_mm, digests, projects)


def plan(options: argparse.Namespace, source: Source, parameters: Mapping[str, Any]) -> list[Job]:
    """Return this shard's studies."""
    if not source.shapes:
        raise StageError(f"{options.input}: no study in it: nothing to project")
    if options.stack and len({shape[1] for shape in source.shapes.values()}) > 1:
        raise StageError(f"{options.input}: volumes of several widths can't be stacked")
    if options.stack:
        refuse_several_spacings(options.input, source)
    length = max(shape[3] for shape in source.shapes.values()) if options.stack else None
    studies = []
    for key, digests in source.digests.items():
        made_from = [SOFTWARE, digests, parameters, length, options.compression]
        work = StoredStudy(
            options.input.resolve(),
            key,
            digests,
            options.all_angles,
            length,
            parameters,
            options.compression,
            picture_kinds(options),
        )
        memory = MEMORY_BASE + MEMORY_PER_VALUE * math.prod(source.shapes[key])
        studies.append(
            Job(key, fingerprint(made_from), work, beside=pictures(key, options), memory=memory)
        )
    return studies


def picture_kinds(options: argparse.Namespace) -> list[str]:
    """Return which pictures are asked for, of gif (a film) and png (a still)."""
    return [kind for kind in ("gif", "png") if getattr(options, kind)]


def pictures(study_hash: str, options: argparse.Namespace) -> tuple[Path, ...]:
    """Return where the film and the still of a study go."""
    kinds = picture_kinds(options)
    return tuple(getattr(options, kind) / f"{study_hash}.{kind}" for kind in kinds)


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


def list_held(options: argparse.Namespace, source: Source, outcomes: Sequence[Outcome]) -> None:
    """Write the CSV that lists the projections of the output in the order of their keys."""
    held = [outcome.hash for outcome in outcomes if outcome.status in ("written", "unchanged")]
    keys = (projection_key(study, angle) for study in held for angle in options.all_angles)
    write_list(options.output, keys, source.projects)


# --- one study -------------------------------------------------------------------------------


def project_study(job: Job) -> Written:
    """Project one study from all angles and write its part, and pictures where asked for."""
    work: StoredStudy = job.work
    image, attributes = read_volume(work.path, work.key, work.digests)
    mips = {"image": training_mips(image, work.angles)}
    del image
    for group in ("mask", "mask_iso"):
        mask, _ = read_as_planned(work.path, group, work.key, work.digests)
        mips[group] = mask_mips(mask, work.angles)
    if work.length is not None:
        mips = {group: padded(array, work.length) for group, array in mips.items()}
    with writing_part(job.part, job.beside) as temporary:
        write_projections(
            temporary,
            work.key,
            mips,
            work.angles,
            attributes,
            work.parameters,
            compression=work.compression,
            fingerprint=job.fingerprint,
            software=SOFTWARE,
        )
        if job.beside:
            # Slow to load, and only for those who ask for pictures.
            from common.report.films import write_films

            paths = dict(zip(work.pictures, job.beside, strict=True))
            write_films(paths.get("gif"), paths.get("png"), mips, work.angles, attributes)
    return Written(turned_axis(attributes["orientation"]))


if __name__ == "__main__":
    sys.exit(main())
