"""nnU-Net v2's raw layout: a dataset of CT, PET and labels on the training grid, and its folds.

The only module that knows it::

    DIR/Dataset001_NAME/imagesTr/<hash>_0000.nii.gz    float32 [HU]
    DIR/Dataset001_NAME/imagesTr/<hash>_0001.nii.gz    float32 [SUV]
    DIR/Dataset001_NAME/labelsTr/<hash>.nii.gz         uint8, or uint16 of over 255 labels
    DIR/Dataset001_NAME/dataset.json
    DIR/Dataset001_NAME/splits_final.json

Files of a case are complete or not there; ``dataset.json`` lists those that are, at any instant.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import StageError, StudyError, counted
from common.geometry import Grid, Image
from common.hashing import fingerprint
from common.hdf5.reading import keys_by_file, read_digests
from common.hdf5.studies import read_attributes, read_dataset, read_shapes
from common.nifti import is_sheared, load_library, write_nifti_file
from common.run.console import PROGRESS
from common.run.engine import Engine, run_studies
from common.run.output import make_folder, write_beside, writing_beside
from common.run.worker import Job, Outcome, Written
from common.splits import Fold
from common.version import SOFTWARE

logger = logging.getLogger("tumorvolume")

N_FOLDS = 5
"""nnU-Net trains five, unless told otherwise."""

LARGEST_ID = 999
"""nnU-Net writes the number of a dataset with three digits."""

CHANNEL_NAMES = {"0": "CT", "1": "CT"}
"""CT [HU], and PET [SUV] under the name that has nnU-Net scale it as a quantity.

A channel called CT is clipped and scaled by the statistics of all tumours of the collection, so
that an SUV of 4 is the same number in every patient; nnU-Net's own conversion of autoPET names
both channels so. Under any other name each image is scaled by its own mean and deviation: then the
activity in the bladder decides how bright a tumour is."""

_DESCRIPTION = (
    "channel 0 is CT [HU]; channel 1 is PET [SUV], named CT so that nnU-Net scales it by the "
    "statistics of the whole collection: SUVs compare between patients"
)

_READER_OF_SHEARED = "NibabelIOWithReorient"
"""ITK, by which nnU-Net reads else, has no sheared grids, as a CT with gantry tilt makes."""

_MEMORY_BASE, _MEMORY_PER_VOXEL = 150_000_000, 16
"""What writing a case takes, and takes besides for each voxel of the grid, at most [bytes]."""


@dataclass(frozen=True)
class StoredCase:
    """A study in a 3D file.

    Attributes
    ----------
    source : Path
    content : str
        Digest of all that its files depend on.
    grid : Grid
    """

    source: Path
    content: str
    grid: Grid


@dataclass(frozen=True)
class Dataset:
    """Where a dataset lies: ``root/Dataset<number>_<name>``."""

    root: Path
    number: int
    name: str

    @property
    def folder(self) -> Path:
        """The dataset's own folder."""
        return self.root / f"Dataset{self.number:03d}_{re.sub('[^A-Za-z0-9]+', '_', self.name)}"

    def files(self, key: str) -> tuple[Path, Path, Path]:
        """Return where CT, PET and labels of a case go."""
        images, labels = self.folder / "imagesTr", self.folder / "labelsTr"
        return (
            images / f"{key}_0000.nii.gz",
            images / f"{key}_0001.nii.gz",
            labels / f"{key}.nii.gz",
        )

    @property
    def description(self) -> Path:
        """The file that tells nnU-Net of the dataset."""
        return self.folder / "dataset.json"

    @property
    def folds(self) -> Path:
        """The file of the folds."""
        return self.folder / "splits_final.json"


@dataclass(frozen=True)
class _Case:
    """What a worker needs to write one case; without `values` every label becomes 1."""

    source: Path
    affine: NDArray[np.float64]
    values: Sequence[int]


def stored_cases(sources: Mapping[str, Path]) -> dict[str, StoredCase]:
    """Return each study of 3D files (key to file) as `export` needs it.

    Raises
    ------
    StageError
        A study has no affine.
    """
    digests = read_digests(sources)
    cases = {}
    for path, keys in keys_by_file(sources).items():
        shapes, affines = read_shapes(path), read_attributes(path, keys, "affine")
        for key in keys:
            try:
                grid = Grid(shapes[key][1:], affines[key])  # type: ignore[arg-type]
            except (KeyError, TypeError, ValueError) as error:
                raise StageError(
                    f"{path}: study {key} has no sound affine: make it again"
                ) from error
            cases[key] = StoredCase(path.absolute(), fingerprint(digests[key]), grid)
    return cases


def export(
    dataset: Dataset,
    cases: Mapping[str, StoredCase],
    folds: Sequence[Fold],
    labels_kept: bool,
    engine: Engine,
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Write a dataset; cases that are there already, of the same content, are left as they are.

    Parameters
    ----------
    dataset : Dataset
    cases : dict of key to StoredCase
    folds : sequence of Fold
        May be none.
    labels_kept : bool
        Whether masks hold label values; these become 1, 2 and so on, as nnU-Net has them.
    engine, on_outcome
        As `run_studies` takes them.

    Returns
    -------
    list of Outcome
        Of each case; one that fails is not in the dataset, nor in its folds.

    Raises
    ------
    StageError
        Another dataset has the folder or the number.
    """
    there = _listed_cases(dataset)
    for name in ("imagesTr", "labelsTr"):
        make_folder(dataset.folder / name)
        # Of workers of an earlier run that were killed.
        _remove(dataset.folder.glob(f"{name}/.*.tmp.gz"))
    values = _label_values(cases, engine) if labels_kept else ()
    jobs = [
        Job(
            key,
            fingerprint([SOFTWARE, case.content, values]),
            _Case(case.source, case.grid.affine, values),
            beside=dataset.files(key),
            memory=_memory_of(case),
        )
        for key, case in sorted(cases.items())
    ]
    kept = {
        job.hash: job.fingerprint
        for job in jobs
        if there.get(job.hash) == job.fingerprint and job.has_all_beside
    }
    reader = _READER_OF_SHEARED if any(is_sheared(case.grid) for case in cases.values()) else None
    write_beside(dataset.description, _description(dataset, kept, values, reader))
    for key in there.keys() - cases.keys():
        _remove(dataset.files(key))
    load_library()
    new = run_studies(
        _write_case, [job for job in jobs if job.hash not in kept], engine, on_outcome
    )
    failed = {outcome.hash for outcome in new if outcome.status == "failed"}
    for key in failed:
        _remove(dataset.files(key))
    written = {job.hash: job.fingerprint for job in jobs if job.hash not in failed}
    _write_folds(dataset, folds, written)
    write_beside(dataset.description, _description(dataset, written, values, reader))
    n_cases = counted(len(written), "case", "cases")
    logger.log(PROGRESS, "%s for nnU-Net in %s", n_cases, dataset.folder)
    return [*(Outcome(key, "unchanged") for key in kept), *new]


def _memory_of(case: StoredCase) -> int:
    return _MEMORY_BASE + _MEMORY_PER_VOXEL * math.prod(case.grid.shape)


def _remove(files: Iterable[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)


def splits_json(folds: Sequence[Fold]) -> str:
    """Return folds as nnU-Net reads them."""
    listed = [{"train": list(fold.train), "val": list(fold.validation)} for fold in folds]
    return json.dumps(listed, indent=1) + "\n"


def _write_folds(dataset: Dataset, folds: Sequence[Fold], written: Mapping[str, str]) -> None:
    left = [
        Fold(
            [key for key in fold.train if key in written],
            [key for key in fold.validation if key in written],
        )
        for fold in folds
    ]
    if left:
        write_beside(dataset.folds, splits_json(left))
    else:
        dataset.folds.unlink(missing_ok=True)


# --- dataset.json ----------------------------------------------------------------------------


def _description(
    dataset: Dataset, cases: Mapping[str, str], values: Sequence[int], reader: str | None
) -> str:
    names = [f"label {value}" for value in values] or ["tumour"]
    return (
        json.dumps(
            {
                "channel_names": CHANNEL_NAMES,
                "labels": {"background": 0}
                | {name: number for number, name in enumerate(names, start=1)},
                "numTraining": len(cases),
                "file_ending": ".nii.gz",
                "name": dataset.folder.name,
                "description": _DESCRIPTION,
                "software": SOFTWARE,
                **({"overwrite_image_reader_writer": reader} if reader else {}),
                "cases": dict(sorted(cases.items())),
            },
            indent=1,
        )
        + "\n"
    )


def _listed_cases(dataset: Dataset) -> dict[str, str]:
    """Return the cases of an earlier export, each with the digest of what it was made from."""
    number = f"Dataset{dataset.number:03d}_"
    for path in sorted(dataset.root.glob(f"{number}*")):
        if path.name != dataset.folder.name:
            raise StageError(
                f"{path}: has the number {dataset.number} already, and nnU-Net tells datasets by "
                "it: choose another with --dataset-id N"
            )
    if not dataset.folder.exists():
        return {}
    try:
        cases = json.loads(dataset.description.read_bytes())["cases"]
        return {str(key): str(digest) for key, digest in cases.items()}
    except FileNotFoundError:
        if not any(dataset.folder.rglob("*.nii.gz")):
            return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise StageError(
        f"{dataset.folder}: is a dataset of another make: choose another with --dataset-id N, or "
        "remove it"
    )


# --- one case --------------------------------------------------------------------------------


def _label_values(cases: Mapping[str, StoredCase], engine: Engine) -> list[int]:
    """Return the label values of all masks in order."""
    jobs = [Job(key, "", case.source, memory=_memory_of(case)) for key, case in cases.items()]
    found: set[int] = set()
    for outcome in run_studies(_labels_in, jobs, engine):
        # What can't be read now can't be written either, which is told then.
        found.update(outcome.made or ())
    return sorted(found)


def _labels_in(job: Job) -> list[int]:
    mask, _ = read_dataset(job.work, "mask", job.hash)
    return [int(value) for value in np.unique(mask) if value]


def _write_case(job: Job) -> Written:
    """Write CT, PET and labels of one study."""
    case: _Case = job.work
    image, attributes = read_dataset(case.source, "image", job.hash)
    mask, _ = read_dataset(case.source, "mask", job.hash)
    affine, ranges = case.affine, _ranges(attributes)
    ct_file, pet_file, label_file = job.beside
    for path, channel, (least, greatest) in (
        (ct_file, image[1], ranges["ct_range"]),
        (pet_file, image[0], ranges["suv_range"]),
    ):
        values = channel.astype(np.float32) * np.float32(greatest - least) + np.float32(least)
        with writing_beside(path) as temporary:
            write_nifti_file(temporary, Image(values, affine))
    labels = _as_classes(mask[0], case.values)
    with writing_beside(label_file) as temporary:
        write_nifti_file(temporary, Image(labels, affine))
    return Written()


def _as_classes(mask: NDArray[Any], values: Sequence[int]) -> NDArray[Any]:
    """Return a mask whose n-th label value is n; without values every label is 1."""
    if not values:
        return (mask > 0).astype(np.uint8)
    classes = np.searchsorted([0, *values], mask)
    return classes.astype(np.uint8 if len(values) < 256 else np.uint16)


def _ranges(attributes: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
    """Return what 0 and 1 stand for in CT [HU] and PET [SUV]."""
    try:
        ranges = {name: np.array(attributes[name], float) for name in ("ct_range", "suv_range")}
    except (KeyError, TypeError, ValueError):
        ranges = {}
    if not ranges or any(found.shape != (2,) for found in ranges.values()):
        raise StudyError("ct_range or suv_range is missing in the HDF5 file: make the file again")
    return ranges
