"""What RTSTRUCT and SEG have in common: the mask they become, their regions, what they refer to.

Knows pydicom. Arrays leave as [column, row, slice], slices ascending along cross(row, column),
with an affine to RAS+ mm: the convention of the image series.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom.attributes import items, joined_text, tag_of, whole_number
from common.errors import StudyError, Warning

LabelArray = NDArray[np.uint8 | np.uint16]


@dataclass(frozen=True, eq=False)
class Mask:
    """A label volume.

    Attributes
    ----------
    labels : (X, Y, Z) array of uint8 or uint16
        In Fortran order; 0 is background.
    affine : (4, 4) float64 array
        Voxel index to RAS+ [mm].
    warnings : tuple of Warning
        What was put right or left out; no identity.
    """

    labels: LabelArray
    affine: NDArray[np.float64]
    warnings: tuple[Warning, ...] = ()


@contextmanager
def refusing_malformed(what: str) -> Iterator[None]:
    """Turn whatever pydicom raises on damaged bytes, which may be anything, into a refusal."""
    try:
        yield
    except (StudyError, MemoryError):
        raise
    except Exception as error:
        raise StudyError(
            f"the {what} can't be read ({type(error).__name__}): export it again, or give the "
            "mask as NIfTI"
        ) from error


# --- regions and segments --------------------------------------------------------------------


def names_by_number(dataset: Dataset, sequence: str, number: str, name: str) -> dict[int, str]:
    """Return number -> name of the regions or segments that a sequence describes.

    Raises
    ------
    StudyError
        The sequence is absent, or uses a number twice.
    """
    described = items(dataset, sequence)
    names = {whole_number(item, number): joined_text(item, name) for item in described}
    if not described or len(names) < len(described):
        raise StudyError(
            f"{tag_of(sequence)} is absent or uses a number twice ({tag_of(number)}): export the "
            "mask again"
        )
    return names


def matching(names: Mapping[int, str], roi: re.Pattern[str] | None, keyword: str) -> list[int]:
    """Return the numbers of the names in which `roi` is found.

    Neither case nor the Unicode spelling of accents matters.

    Raises
    ------
    StudyError
        There are none; `keyword` is where the names are from.
    """
    if roi is not None:
        roi = re.compile(_composed(roi.pattern), roi.flags | re.IGNORECASE)
    chosen = [number for number in sorted(names) if not roi or roi.search(_composed(names[number]))]
    if not chosen:
        raise StudyError(
            f"none of {len(names)} names matches ({tag_of(keyword)}): give a --roi that does"
        )
    return chosen


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# --- what a mask refers to -------------------------------------------------------------------


def referenced_series(dataset: Dataset) -> tuple[str, ...]:
    """Return the SeriesInstanceUIDs an RTSTRUCT or SEG was drawn on; () where it names none."""
    with refusing_malformed("mask object"):
        series = [*_rt_referenced_series(dataset), *items(dataset, "ReferencedSeriesSequence")]
        return _unique(series, "SeriesInstanceUID")


def referenced_images(dataset: Dataset) -> tuple[str, ...]:
    """Return the SOPInstanceUIDs that an RTSTRUCT names with the series it was drawn on.

    They find the series where it is not named itself.
    """
    with refusing_malformed("mask object"):
        return _images_of(_rt_referenced_series(dataset))


def contoured_images(dataset: Dataset) -> tuple[str, ...]:
    """Return the SOPInstanceUIDs that the contours of an RTSTRUCT name themselves."""
    with refusing_malformed("mask object"):
        regions = items(dataset, "ROIContourSequence")
        return _images_of(each for r in regions for each in items(r, "ContourSequence"))


def _images_of(groups: Iterable[Dataset]) -> tuple[str, ...]:
    images = (image for group in groups for image in items(group, "ContourImageSequence"))
    return _unique(images, "ReferencedSOPInstanceUID")


def frame_of_reference(dataset: Dataset) -> str | None:
    """Return the FrameOfReferenceUID of an RTSTRUCT's regions or of a SEG; None without one.

    Raises
    ------
    StudyError
        The regions of an RTSTRUCT lie in different frames of reference.
    """
    with refusing_malformed("mask object"):
        regions = items(dataset, "StructureSetROISequence")
        frames = items(dataset, "ReferencedFrameOfReferenceSequence")
        # A region's coordinates are in the frame which it names itself; the rest are fallbacks.
        found = (
            _unique(regions, "ReferencedFrameOfReferenceUID")
            or _unique(frames, "FrameOfReferenceUID")
            or _unique([dataset], "FrameOfReferenceUID")
        )
    if len(found) > 1:
        raise StudyError(
            f"the RTSTRUCT's regions lie in {len(found)} frames of reference "
            f"({tag_of('ReferencedFrameOfReferenceUID')}): export only those drawn on PET or CT"
        )
    return found[0] if found else None


def _rt_referenced_series(dataset: Dataset) -> list[Dataset]:
    return [
        series
        for frame in items(dataset, "ReferencedFrameOfReferenceSequence")
        for study in items(frame, "RTReferencedStudySequence")
        for series in items(study, "RTReferencedSeriesSequence")
    ]


def _unique(datasets: Iterable[Dataset], keyword: str) -> tuple[str, ...]:
    values = (joined_text(dataset, keyword) for dataset in datasets)
    return tuple(dict.fromkeys(value for value in values if value))
