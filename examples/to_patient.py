#!/usr/bin/env python3
"""Bring a predicted mask from the training grid back to the patient: onto the PET's own grid.

Every voxel of the PET takes the label that is predicted where its centre lies, so that labels keep
their values; a lesion between the centres keeps the voxel nearest to it. Written is a NIfTI file
on the very grid of the PET in the project zip.

With --raw and --mapping it is a DICOM SEG that refers to the patient's PET series, for the
viewer: a segment a label value, numbered from 1 as DICOM demands and called "label <value>". It
belongs to the patient, so IT HOLDS THE PATIENT'S NAME, ID AND DATES, as the PET series does; only
you can read it. Its own dates are the PET's: the same prediction makes the same object.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import generate_uid

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import nifti, project_zip
from common.components import components
from common.dicom.files import group_series
from common.dicom.pixels import read_pet
from common.dicom.series import Stack, stack_slices
from common.errors import StageError, StudyError
from common.geometry import (
    Grid,
    Image,
    corners,
    moved,
    orientation_of,
    reorient,
    target_grid,
    voxel_map,
)
from common.hashing import fingerprint
from common.image_checks import check_labels
from common.raw import mapping
from common.raw.project import StudyFolder
from common.raw.study_files import read_files
from common.resampling import resample_nearest
from common.run.output import writing_beside

EPILOG = """examples:
  python examples/to_patient.py predictions/0a1b2c3d4e.nii.gz project.zip
  python examples/to_patient.py case_7.nii.gz project.zip --hash 0a1b2c3d4e -o lesions.nii.gz
  python examples/to_patient.py predictions/0a1b2c3d4e.nii.gz project.zip \\
      --raw raw_project --mapping project_mapping.csv
"""

SAME_GRID = 0.1
"""Distance of corners [voxels] within which two grids are one: affines are rounded to float32."""

SAME_VALUES = 1e-3
"""Difference [of a slice's largest value] within which two PET slices are the same."""

MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
"""What a SEG takes over from its PET, and exports without it are common."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the mask, print a line, and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if (options.raw is None) != (options.mapping is None):
        parser.error("--raw and --mapping go together: a SEG needs both")
    suffix = ".nii.gz" if options.raw is None else ".dcm"
    options.output = options.output or beside(options.prediction, suffix)
    if not options.output.name.endswith(suffix):
        parser.error(f"-o {options.output}: name it *{suffix}")
    if not options.output.parent.is_dir():
        parser.error(f"-o {options.output}: its folder does not exist")
    if options.output.resolve() in (options.prediction.resolve(), options.zip.resolve()):
        parser.error(f"-o {options.output}: is an input")
    try:
        print(to_patient(options))
    except (StageError, StudyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "prediction", type=Path, metavar="PREDICTION.nii.gz", help="labels on the training grid"
    )
    parser.add_argument(
        "zip", type=Path, metavar="PROJECT.zip", help="what the training file was made from"
    )
    parser.add_argument(
        "--hash",
        metavar="H",
        help="the study (default: that whose hash the file's name begins with)",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: beside PREDICTION, <name>_on_pet.nii.gz or .dcm)",
    )
    parser.add_argument(
        "--raw", type=Path, metavar="RAW_PROJECT", help="write a DICOM SEG: where the PET lies"
    )
    parser.add_argument(
        "--mapping", type=Path, metavar="FILE.csv", help="which folder there is the study's"
    )
    parser.add_argument(
        "--algorithm", default="network", metavar="NAME", help="who predicted (default: network)"
    )
    return parser


def to_patient(options: argparse.Namespace) -> str:
    """Do what the options ask for, and return what there is to say of it."""
    study = study_of(options)
    try:
        prediction = check_labels(nifti.read_nifti_file(options.prediction, "prediction"))
        require_training_grid(prediction, project_zip.read_image(options.zip, study, "ct"))
        pet = project_zip.read_image(options.zip, study, "petsuv")
        found = onto_grid(prediction, pet.grid)
        mask = Image(found.labels, pet.affine)
        if options.raw is None:
            with writing_beside(options.output) as temporary:
                nifti.write_nifti_file(temporary, mask)
        else:
            folder = folder_of(study, options.raw, mapping.read(options.mapping))
            seg = dicom_seg(mask, pet_series(folder, pet), options.algorithm)
            with writing_beside(options.output) as temporary:
                temporary.touch(0o600)
                seg.save_as(temporary, enforce_file_format=True)
    except StudyError as error:
        raise StudyError(f"{study.hash}: {error}") from error
    return f"{study.hash}: {found} -> {options.output}"


def beside(prediction: Path, suffix: str) -> Path:
    """Return where the result goes unless told."""
    name = prediction.name.removesuffix(".gz").removesuffix(".nii")
    return prediction.with_name(f"{name}_on_pet{suffix}")


def study_of(options: argparse.Namespace) -> project_zip.ArchivedStudy:
    """Return the study that is named, or whose hash the prediction's name begins with."""
    studies = project_zip.read_directory(options.zip)
    name = options.prediction.name
    # The longest first: one hash may begin with another.
    of_name = sorted((h for h in studies if name.startswith(h)), key=len, reverse=True)
    chosen = options.hash or next(iter(of_name), None)
    if chosen is None:
        raise StageError(f"{name}: begins with no hash of {options.zip}: say which by --hash H")
    if chosen not in studies:
        raise StageError(f"{options.zip}: has no study {chosen}: check --hash, or give its zip")
    # Another patient's images may lie on the same grid: no later check would tell.
    if of_name and chosen not in of_name:
        raise StageError(f"{name}: begins with the hash of another study than --hash {chosen}")
    study = studies[chosen]
    if missing := {"CT", "PET"}.intersection(study.missing):
        raise StageError(f"{options.zip}: study {chosen} lacks its {', '.join(sorted(missing))}")
    return study


# --- from grid to grid -----------------------------------------------------------------------


def require_training_grid(prediction: Image, ct: Image) -> None:
    """Refuse a prediction on a grid that preprocessing.py does not make of a CT.

    Raises
    ------
    StudyError
        It may be of another patient.
    """
    grid = prediction.grid
    turned = Image(*reorient(ct.data, ct.affine, orientation_of(prediction.affine))).grid
    for n_axes in (2, 3):
        for align in ("center", "corner"):
            made = target_grid(turned, grid.spacing_mm, grid.shape[:n_axes], align)
            ends = corners(grid.shape)
            off = np.abs(moved(voxel_map(made, grid), ends) - ends).max()
            if off <= SAME_GRID:
                return
    raise StudyError(
        "the prediction is not on a training grid of this study's CT (its affine differs): give "
        "the right --hash, and the prediction as it was made of the file of preprocessing.py"
    )


@dataclass(frozen=True, eq=False)
class Found:
    """Labels (X, Y, Z) on the grid of a PET, and what became of the lesions.

    A lesion is a 26-connected component of one label.
    """

    labels: NDArray[Any]
    n_lesions: int
    n_nearest: int
    n_outside: int
    before_ml: float
    after_ml: float

    def __str__(self) -> str:
        text = f"{self.n_lesions} lesions, {self.before_ml:.2f} ml on the training grid, "
        text += f"{self.after_ml:.2f} ml on the PET's"
        if self.n_nearest:
            text += f"; {self.n_nearest} between voxel centres kept their nearest voxel"
        if self.n_outside:
            text += f"; LOST, as they lie outside the PET: {self.n_outside}"
        return text


def onto_grid(prediction: Image, target: Grid) -> Found:
    """Bring labels onto another grid: the nearest, and no lesion without a voxel in it."""
    numbers = np.zeros(prediction.data.shape, np.int32)
    values, voxels = [0], []
    for value in map(int, np.unique(prediction.data[prediction.data > 0])):
        lesions = components(prediction.data == value)
        numbers[tuple(lesions.voxels)] = lesions.numbers + len(values) - 1
        voxels += np.split(lesions.voxels, lesions.starts[1:], axis=1)[: lesions.count]
        values += [value] * lesions.count
    # Zeros around: a voxel reaches half its size beyond its centre, also at the border.
    source = Image(np.pad(numbers, 1), prediction.affine @ shift_of(-1))
    found = resample_nearest(source.data, source.grid, target)
    lost = sorted({*range(1, len(values))}.difference(np.unique(found).tolist()))
    n_outside = 0
    for number in lost:
        nearest = nearest_voxel(voxels[number - 1], prediction.grid, target, found)
        if nearest is None:
            n_outside += 1
        else:
            found[nearest] = number
    labels = np.array(values, prediction.data.dtype)[found]
    return Found(
        labels,
        len(values) - 1,
        len(lost) - n_outside,
        n_outside,
        np.count_nonzero(numbers) * prediction.grid.voxel_ml,
        np.count_nonzero(labels) * target.voxel_ml,
    )


def shift_of(n_voxels: int) -> NDArray[np.float64]:
    """Return the map (4, 4) that moves by as many voxels along each axis."""
    shift = np.eye(4)
    shift[:3, 3] = n_voxels
    return shift


def nearest_voxel(
    lesion: NDArray[Any], source: Grid, target: Grid, taken: NDArray[Any]
) -> tuple[int, ...] | None:
    """Return the voxel of `target` nearest to the middle of a lesion, if it lies there at all.

    One that no other lesion has is taken first.
    """
    middle = moved(voxel_map(target, source), lesion).mean(axis=1)
    steps = np.indices((3, 3, 3)).reshape(3, -1).T - 1
    around = np.rint(middle).astype(int) + steps
    inside = ((around >= 0) & (around < target.shape)).all(axis=1)
    if not inside[len(steps) // 2]:
        return None
    around = around[inside]
    far_mm = np.linalg.norm((around - middle) @ target.affine[:3, :3].T, axis=1)
    is_taken = taken[tuple(around.T)] > 0
    return tuple(around[np.lexsort((far_mm, is_taken))[0]].tolist())


# --- the patient's PET -----------------------------------------------------------------------


def folder_of(
    study: project_zip.ArchivedStudy, raw: Path, rows: Sequence[mapping.Row]
) -> StudyFolder:
    """Return the folder of the raw project that the mapping names for a study."""
    row = next((r for r in rows if r.key == (study.project, study.hash) and r.study), None)
    if row is None:
        raise StudyError(
            f"the mapping has no row of it in project {study.project!r}: give the mapping that "
            "createproject.py wrote with this zip"
        )
    # With createproject.py --patient a study's name is its path.
    name = row.study if "/" in row.study else f"{row.patient}/{row.study}"
    path = raw / os.fsdecode(name.encode("utf-8", "surrogateescape"))
    if not path.is_dir():
        raise StudyError(
            "the raw project does not hold the folder that the mapping names: give --raw the "
            "project that the zip was made from"
        )
    return StudyFolder(row.patient, row.study, str(path))


def pet_series(folder: StudyFolder, pet: Image) -> Stack:
    """Return the DICOM PET series whose slices and values are those of a PET in the zip."""
    found = group_series(read_files(folder).dicom, "PT")
    if not found:
        raise StudyError("the study has no DICOM PET series for a SEG to refer to: write NIfTI")
    reasons = []
    for series in found:
        try:
            stack = stack_slices(series)
            if is_of(stack, pet):
                return stack
        except StudyError as error:
            reasons.append(str(error))
    raise StudyError(
        "no PET series in the study's folder has the slices and values of the PET in the zip"
        + (f" ({'; '.join(reasons)})" if reasons else "")
        + ": give the raw project and the mapping that the zip was made from; of a PET that was "
        "NIfTI there, with a DICOM header beside it, write NIfTI"
    )


def is_of(stack: Stack, pet: Image) -> bool:
    """Tell whether slices lie where those of a PET in SUV do, and hold its values but for a factor.

    A wrong mapping would send the mask to another patient.
    """
    grid, ends = Grid(stack.shape, stack.affine), corners(pet.data.shape)
    if grid.shape != pet.grid.shape:
        return False
    if np.abs(moved(voxel_map(grid, pet.grid), ends) - ends).max() > SAME_GRID:
        return False
    raw = read_pet(stack, np.ones(len(stack.slices))).data
    for k in range(pet.data.shape[2]):
        one, other = raw[:, :, k], pet.data[:, :, k]
        top, other_top = np.abs(one).max(), np.abs(other).max()
        if not np.allclose(
            one * other_top, other * top, rtol=0, atol=SAME_VALUES * top * other_top
        ):
            return False
    return True


# --- DICOM SEG -------------------------------------------------------------------------------


def dicom_seg(mask: Image, stack: Stack, algorithm: str) -> Dataset:
    """Return a SEG of a mask on the slices of a PET series, a segment a label value."""
    import highdicom
    from pydicom.sr.codedict import codes

    values = np.unique(mask.data[mask.data > 0]).tolist()
    if not values:
        raise StudyError("the prediction holds no lesion: a SEG has to have one, write NIfTI")
    sources, frame_of_slice = source_images(stack)
    planes = np.empty(mask.data.T.shape, mask.data.dtype)
    planes[frame_of_slice] = mask.data.T  # slices, rows, columns
    told = highdicom.AlgorithmIdentificationSequence(
        name=algorithm, family=codes.DCM.ArtificialIntelligence, version="1"
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"label {value}",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type="AUTOMATIC",
            algorithm_identification=told,
        )
        for number, value in enumerate(values, start=1)
    ]
    for number, segment in enumerate(segments):
        segment.RecommendedDisplayCIELabValue = colour(number)
    first = sources[0]
    origin = [first.SeriesInstanceUID, algorithm, fingerprint(planes.tobytes().hex())]
    try:
        seg = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=np.searchsorted([0, *values], planes).astype(np.uint16),
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=uid_of("series", *origin),
            series_number=int(first.get("SeriesNumber") or 0) + 1000,
            series_description=f"{algorithm}, predicted on PET/CT",
            sop_instance_uid=uid_of("object", *origin),
            instance_number=1,
            manufacturer="tumorvolume",
            manufacturer_model_name="to_patient.py",
            software_versions="1",
            device_serial_number="1",
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StudyError(
            f"highdicom can make no SEG of the PET's headers ({type(error).__name__}: {error}): "
            "write NIfTI"
        ) from error
    # What highdicom makes up, the time and UIDs, differs from run to run.
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        seg.pop(keyword, None)
    seg.ContentDate, seg.ContentTime = first.get("StudyDate"), first.get("StudyTime")
    seg.pop("ContributingEquipmentSequence", None)
    seg.ContentCreatorName = ""
    for element in seg.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = uid_of("dimensions", *origin)
    return seg


def colour(number: int) -> list[int]:
    """Return a colour in CIELab as DICOM stores it: red, then far from those before."""
    hue = np.radians(40 + 137.5 * number)
    ab = 60 * np.array([np.cos(hue), np.sin(hue)])
    return [65535 * 55 // 100, *np.rint((ab + 128) / 255 * 65535).astype(int).tolist()]


def source_images(stack: Stack) -> tuple[list[Dataset], list[int]]:
    """Return the headers that a SEG refers to, and which frame of them each slice is."""
    sources = []
    for header in stack.headers:
        source = Dataset()
        source.update(header)
        source.file_meta = header.file_meta
        for keyword in MAY_BE_EMPTY:
            source.setdefault(keyword, "")
        sources.append(source)
    return sources, [header + frame for header, frame in stack.header_and_frame]


def uid_of(*origin: str) -> str:
    """Return a UID that the same origin gives every time."""
    return str(generate_uid(entropy_srcs=list(origin)))


if __name__ == "__main__":
    sys.exit(main())
