"""How stored values become values in a unit: RescaleSlope, RescaleIntercept, RealWorldValueSlope.

Knows pydicom. All three of a slice or frame are read and checked here, and go on together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset

from common.dicom.attributes import (
    functional_group,
    functional_groups,
    items,
    joined_text,
    number,
    required_number,
    tag_of,
)
from common.errors import StudyError

SAME_SLOPE = 1e-4
"""Relative difference up to which two slopes are one: that of a rounded decimal string."""


@dataclass(frozen=True)
class Rescale:
    """From the stored values of a slice to values in the unit of its series.

    Attributes
    ----------
    slope, intercept : float
        From stored to rescaled value: HU, or of a PET a value in its Units. A PET's intercept is 0.
    real_world_slope : float
        Value in the unit of the series per rescaled value: other than 1 where, in a frame of a
        PET, the mapping to real values alone scales. The factors to SUV contain it.
    """

    slope: float
    intercept: float
    real_world_slope: float = 1.0


def rescale_of(header: Dataset, frame: Dataset | None = None) -> Rescale:
    """Read how an image, or one frame of an object, is rescaled.

    Raises
    ------
    StudyError
        No slope; a PET that is offset, or whose frame is scaled in several ways; malformed values.
    """
    is_pet = joined_text(header, "Modality") == "PT"
    rescaling: Dataset | None = header
    mappings: list[Dataset] = []
    if frame is not None:
        rescaling = functional_group(header, frame, "PixelValueTransformationSequence")
        mappings = real_world_mappings(header, frame) if is_pet else []
        if rescaling is None and mappings:
            return Rescale(1.0, 0.0, _real_world_slope(1.0, mappings))
        rescaling = rescaling or Dataset()
    slope = required_number(rescaling, "RescaleSlope")
    if is_pet:
        refuse_intercept(rescaling)
    intercept = 0.0 if is_pet else required_number(rescaling, "RescaleIntercept")
    return Rescale(slope, intercept, _real_world_slope(slope, mappings))


def refuse_intercept(rescaling: Dataset) -> None:
    """Refuse values of a PET that are offset, which DICOM forbids.

    Raises
    ------
    StudyError
        A RescaleIntercept other than 0.
    """
    intercept = number(rescaling, "RescaleIntercept")
    if intercept:
        raise StudyError(
            f"the values are offset ({tag_of('RescaleIntercept')} of the PET is {intercept:g}): "
            "export the original series"
        )


# --- real world values -----------------------------------------------------------------------


def real_world_mappings(header: Dataset, frame: Dataset) -> list[Dataset]:
    """Return the mappings to real values of a frame: its own, else shared, else the object's."""
    keyword = "RealWorldValueMappingSequence"
    return functional_groups(header, frame, keyword) or items(header, keyword)


def mappings_of_rescaled(
    slope: float, mappings: Sequence[Dataset]
) -> tuple[Sequence[Dataset], bool]:
    """Return which mappings speak of rescaled values, and whether that is a reinterpretation.

    They are those whose RealWorldValueSlope is the RescaleSlope, as they map stored values just as
    the rescale does. Without any, those whose RealWorldValueSlope is 1, which is a
    reinterpretation: they must map rescaled values, as no scale is left. Without either, all of
    them where the RescaleSlope is 1, so that the mapping alone scales; else none.
    """
    for expected in (slope, 1.0):
        found = [each for each in mappings if _has_slope(each, expected)]
        if found:
            return found, expected != slope
    return (mappings if slope == 1 else ()), False


def _has_slope(mapping: Dataset, slope: float) -> bool:
    own = number(mapping, "RealWorldValueSlope")
    return own is None or abs(own - slope) <= SAME_SLOPE * abs(slope)


def _real_world_slope(slope: float, mappings: Sequence[Dataset]) -> float:
    """Return the slope of the mapping where it alone scales the stored values, else 1."""
    if not mappings or slope != 1:
        return 1.0
    found, _ = mappings_of_rescaled(slope, mappings)
    named = (number(each, "RealWorldValueSlope") for each in found)
    slopes = {1.0 if each is None else each for each in named}
    if len(slopes) > 1 or any(number(each, "RealWorldValueIntercept") for each in found):
        raise StudyError(
            "the values of a frame are scaled in several ways, or offset "
            f"({tag_of('RealWorldValueSlope')}, {tag_of('RealWorldValueIntercept')}): "
            "export the series as Bq/ml"
        )
    return slopes.pop()
