"""The slices of a CT or PET file, each with its place in space and the scale of its values.

Knows pydicom. Coordinates are DICOM's: LPS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom import DicomFile
from common.dicom_values import (
    functional_group,
    items,
    joined_text,
    number,
    required_number,
    required_numbers,
    tag_of,
    whole_number,
)
from common.errors import StudyError

_PERPENDICULAR_UNITS = 0.01


@dataclass(frozen=True, eq=False)
class Slice:
    """One image plane.

    Attributes
    ----------
    file : DicomFile
    frame : int
        Its place in the file, from 0.
    position_mm : (3,) array
        Centre of the first pixel [LPS].
    orientation : (6,) array
        Unit vectors from column to column and from row to row [LPS].
    pixel_spacing_mm : (2,) array
        From row to row, and from column to column, as DICOM has it.
    matrix : (int, int)
        Columns, rows.
    slope, intercept : float
        From stored value to HU or the unit of the PET.
    """

    file: DicomFile
    frame: int
    position_mm: NDArray[np.float64]
    orientation: NDArray[np.float64]
    pixel_spacing_mm: NDArray[np.float64]
    matrix: tuple[int, int]
    slope: float
    intercept: float


def slices_of(file: DicomFile) -> list[Slice]:
    """Return the slices of a file, one or one a frame.

    Raises
    ------
    StudyError
        A slice without its place or rescaling, or one that cannot be.
    """
    frames = items(file.header, "PerFrameFunctionalGroupsSequence")
    if frames:
        return _slices_of_frames(file, frames)
    if file.n_frames > 1:
        raise StudyError(
            f"several frames without a place for each ({tag_of('NumberOfFrames')}): "
            "export the series as single images or as an enhanced object",
            file.name,
        )
    header = file.header
    return [_slice(file, 0, header, header, header, header)]


def _slices_of_frames(file: DicomFile, frames: Sequence[Dataset]) -> list[Slice]:
    if len(frames) != file.n_frames:
        raise StudyError(
            f"{tag_of('PerFrameFunctionalGroupsSequence')} does not describe every frame: "
            "export the series again",
            file.name,
        )
    keywords = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    slices = []
    for index, frame in enumerate(frames):
        position, orientation, measures = (
            functional_group(file.header, frame, keyword) or Dataset() for keyword in keywords
        )
        rescaling = _rescaling(file.header, frame)
        slices.append(_slice(file, index, position, orientation, measures, rescaling))
    return slices


def _rescaling(header: Dataset, frame: Dataset) -> Dataset:
    """Return what rescales a frame; of a PET whose mapping to real values stands alone, nothing."""
    found = functional_group(header, frame, "PixelValueTransformationSequence")
    if found is not None:
        return found
    identity = Dataset()
    mapping = functional_group(header, frame, "RealWorldValueMappingSequence")
    if mapping is not None and joined_text(header, "Modality") == "PT":
        identity.RescaleSlope = 1
    return identity


def _slice(
    file: DicomFile,
    frame: int,
    position: Dataset,
    orientation: Dataset,
    measures: Dataset,
    rescaling: Dataset,
) -> Slice:
    """Make a slice of the header, or of the functional groups, that tell its place and scale."""
    axes = required_numbers(orientation, "ImageOrientationPatient", 6).reshape(2, 3)
    pixel_spacing_mm = required_numbers(measures, "PixelSpacing", 2)
    if np.abs(axes @ axes.T - np.eye(2)).max() > _PERPENDICULAR_UNITS:
        raise StudyError(
            f"{tag_of('ImageOrientationPatient')} is not a pair of perpendicular unit vectors: "
            "export the series again",
            file.name,
        )
    if (pixel_spacing_mm <= 0).any():
        raise StudyError(
            f"{tag_of('PixelSpacing')} is not positive: export the series again", file.name
        )
    slope = required_number(rescaling, "RescaleSlope")
    if slope < 0:
        raise StudyError(
            f"{tag_of('RescaleSlope')} is {slope:g}, negative: export the series again", file.name
        )
    return Slice(
        file,
        frame,
        required_numbers(position, "ImagePositionPatient", 3),
        (axes / np.linalg.norm(axes, axis=1, keepdims=True)).ravel(),
        pixel_spacing_mm,
        (whole_number(file.header, "Columns"), whole_number(file.header, "Rows")),
        slope,
        _intercept(file, rescaling),
    )


def _intercept(file: DicomFile, rescaling: Dataset) -> float:
    """Return the intercept; of a PET that lacks it 0, which is all that DICOM allows there."""
    is_pet = joined_text(file.header, "Modality") == "PT"
    if is_pet and number(rescaling, "RescaleIntercept") is None:
        return 0.0
    return required_number(rescaling, "RescaleIntercept")
