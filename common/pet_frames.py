"""Headers of Enhanced PET objects: what their functional groups say of each frame.

Knows pydicom.
"""

from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset

from common.dicom_times import date_time, utc_offset
from common.dicom_values import code, items, number, tag_of, text, texts
from common.errors import StudyError
from common.pet_attributes import (
    DECAY_CORRECTIONS,
    common_fields,
    require_no_intercept,
    series_fields,
)
from common.pet_series import PetSeries, PetSlice

SAME_SLOPE = 1e-4
"""Relative difference up to which two slopes are one: that of a rounded decimal string."""

UNITS_OF_UCUM = {
    "Bq/ml": ("BQML", None),
    "{counts}": ("CNTS", None),
    "{counts}/s": ("CPS", None),
    "{propcounts}": ("PROPCNTS", None),
    "{propcounts}/s": ("PROPCPS", None),
    "g/ml": ("GML", None),
    "g/ml{SUVbw}": ("GML", "BW"),
    "g/ml{SUVlbm}": ("GML", "LBM"),
    "g/ml{SUVlbm(James128)}": ("GML", "LBMJAMES128"),
    "g/ml{SUVlbm(Janma)}": ("GML", "LBMJANMA"),
    "g/ml{SUVibw}": ("GML", "IBW"),
    "cm2/ml": ("CM2ML", None),
    "cm2/ml{SUVbsa}": ("CM2ML", "BSA"),
    "g/ml{SUVbsa}": ("CM2ML", "BSA"),
}
"""Units and SUVType of the units of Enhanced PET (DICOM CID 84; the last one by IBSI's manual)."""


def series_of_frames(
    headers: Sequence[Dataset], tracer: int | None, frame_order: Sequence[tuple[int, int]] | None
) -> PetSeries:
    """Read the headers of Enhanced PET objects that make up one series; see `read_pet_series`."""
    frames = [_frames(header) for header in headers]
    order = frame_order or [(i, k) for i, each in enumerate(frames) for k in range(len(each))]
    fields = [_fields(header, each, tracer) for header, each in zip(headers, frames, strict=True)]
    return PetSeries(
        slices=tuple(_slice_of_frame(frames[i][k]) for i, k in order),
        corrected_image=frozenset.intersection(*map(_corrections, headers)),
        enhanced=True,
        reinterpretations=_reinterpretations([groups for each in frames for groups in each]),
        **common_fields(fields),
    )


def _frames(header: Dataset) -> list[tuple[Dataset, ...]]:
    """Return where the functional groups of each frame are: its own, the shared, the object."""
    per_frame = items(header, "PerFrameFunctionalGroupsSequence")
    if not per_frame:
        raise StudyError(
            f"no frames ({tag_of('PerFrameFunctionalGroupsSequence')} is missing): "
            "export the series anew"
        )
    shared = (items(header, "SharedFunctionalGroupsSequence") or [Dataset()])[0]
    return [(frame, shared, header) for frame in per_frame]


def _fields(
    header: Dataset, frames: Sequence[Sequence[Dataset]], tracer: int | None
) -> dict[str, Any]:
    fields = series_fields(header, tracer)
    fields["units"], fields["suv_type"] = _units_of_frames(frames, fields)
    fields["decay_correction"] = {"YES": "START", "NO": "NONE"}.get(_decay_corrected(header) or "")
    fields["series_start"] = None
    if fields["injection"] is not None:
        fields["injection_clock"] = None
    return fields


def _decay_corrected(header: Dataset) -> str | None:
    """Return YES or NO; by the attribute of single-frame PET where that of objects is missing."""
    single_frame = code(header, "DecayCorrection", DECAY_CORRECTIONS)
    return code(header, "DecayCorrected", frozenset({"YES", "NO"})) or {
        "START": "YES",
        "NONE": "NO",
    }.get(single_frame or "")


def _group(groups: Sequence[Dataset], keyword: str) -> list[Dataset]:
    """Items of a functional group: of the frame, else shared, else of the whole object."""
    return next(filter(None, (items(each, keyword) for each in groups)), [])


def _slice_of_frame(groups: Sequence[Dataset]) -> PetSlice:
    header = groups[-1]
    zone = utc_offset(header)
    for rescaling in _group(groups, "PixelValueTransformationSequence"):
        require_no_intercept(rescaling)
    slope = _real_world_slope(groups)
    if _decay_corrected(header) == "YES":
        reference = date_time(header, "DecayCorrectionDateTime", zone)
        return PetSlice(decay_reference=reference, real_world_slope=slope)
    content = (_group(groups, "FrameContentSequence") or [Dataset()])[0]
    duration_ms = number(content, "FrameAcquisitionDuration")
    return PetSlice(
        acquisition=date_time(content, "FrameAcquisitionDateTime", zone),
        frame_duration_s=None if duration_ms is None else duration_ms / 1000,
        decay_reference=date_time(content, "FrameReferenceDateTime", zone),
        real_world_slope=slope,
    )


def _corrections(header: Dataset) -> frozenset[str]:
    """Return what was corrected for; by CorrectedImage where the object does not say."""
    attenuation = code(header, "AttenuationCorrected", frozenset({"YES"}))
    states = {"ATTN": attenuation, "DECY": _decay_corrected(header)}
    as_single_frame = {each.upper() for each in texts(header, "CorrectedImage")}
    return frozenset(
        correction
        for correction, state in states.items()
        if state == "YES" or (state is None and correction in as_single_frame)
    )


def _reinterpretations(frames: Sequence[Sequence[Dataset]]) -> tuple[str, ...]:
    if not any(_unit_carriers(groups)[1] for groups in frames):
        return ()
    return (
        f"{tag_of('RealWorldValueSlope')} is 1, unlike {tag_of('RescaleSlope')}: its unit is taken "
        "as that of the rescaled values",
    )


def _units_of_frames(
    frames: Sequence[Sequence[Dataset]], fields: dict[str, Any]
) -> tuple[str | None, str | None]:
    """Units and SUVType; those of the header itself where the frames name none."""
    found = {_units_of_frame(groups) for groups in frames}
    if len(found) > 1:
        raise StudyError(
            f"the frames differ in unit ({tag_of('MeasurementUnitsCodeSequence')}): "
            "export the series as Bq/ml"
        )
    units, suv_type = found.pop() or (fields["units"], None)
    return units, suv_type or fields["suv_type"]


def _units_of_frame(groups: Sequence[Dataset]) -> tuple[str, str | None] | None:
    """Units and SUVType of a frame's rescaled values, None where it names none."""
    carriers, _ = _unit_carriers(groups)
    names = {
        (text(unit, "CodeValue") or "").replace("mL", "ml")
        for each in carriers
        for unit in items(each, "MeasurementUnitsCodeSequence")
    }
    if len(names) > 1:
        raise StudyError(
            f"several units for one frame ({tag_of('MeasurementUnitsCodeSequence')}): "
            "export the series as Bq/ml"
        )
    return UNITS_OF_UCUM.get(names.pop(), ("UNKNOWN", None)) if names else None


def _unit_carriers(groups: Sequence[Dataset]) -> tuple[list[Dataset], bool]:
    """Return what may name the unit of rescaled values, and whether that is a reinterpretation."""
    rescaling = _group(groups, "PixelValueTransformationSequence")
    mappings = _group(groups, "RealWorldValueMappingSequence")
    if not mappings:
        return [*groups, *rescaling], False
    slope = _rescale_slope(groups)
    for expected in (slope, 1.0):
        carriers = [each for each in mappings if _has_slope(each, expected)]
        if carriers:
            return carriers, expected != slope
    if slope == 1:  # which says nothing: the mapping alone scales
        return mappings, False
    raise StudyError(
        f"the unit of the rescaled values is unknown ({tag_of('RealWorldValueSlope')} differs from "
        f"{tag_of('RescaleSlope')}): export the series as Bq/ml"
    )


def _real_world_slope(groups: Sequence[Dataset]) -> float:
    """Return the slope of the mapping where it alone scales the stored values, else 1."""
    mappings = _group(groups, "RealWorldValueMappingSequence")
    if not mappings or _rescale_slope(groups) != 1:
        return 1.0
    carriers, _ = _unit_carriers(groups)
    slopes = {_or_one(number(each, "RealWorldValueSlope")) for each in carriers}
    if len(slopes) > 1 or any(number(each, "RealWorldValueIntercept") for each in carriers):
        raise StudyError(
            "the values of a frame are scaled in several ways, or offset "
            f"({tag_of('RealWorldValueSlope')}, {tag_of('RealWorldValueIntercept')}): "
            "export the series as Bq/ml"
        )
    return slopes.pop()


def _rescale_slope(groups: Sequence[Dataset]) -> float:
    rescaling = _group(groups, "PixelValueTransformationSequence")
    return _or_one(number(rescaling[0], "RescaleSlope") if rescaling else None)


def _or_one(slope: float | None) -> float:
    return 1.0 if slope is None else slope


def _has_slope(mapping: Dataset, slope: float) -> bool:
    own = number(mapping, "RealWorldValueSlope")
    return own is None or abs(own - slope) <= SAME_SLOPE * abs(slope)
