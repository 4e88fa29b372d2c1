"""PET headers: the attributes that decide the SUV, read into plain values for `common.suv`.

Knows pydicom.
"""

import re
from collections.abc import Sequence
from datetime import timezone
from typing import Any

from pydicom.dataset import Dataset

from common.dicom_values import (
    PrivateTag,
    clock_time,
    code,
    date_and_time,
    date_time,
    items,
    number,
    private_date_time,
    private_number,
    tag_of,
    text,
    texts,
    utc_offset,
)
from common.errors import StudyError
from common.pet_series import PetSeries, PetSlice

ENHANCED_PET = "1.2.840.10008.5.1.4.1.1.130"
LEGACY_CONVERTED_PET = "1.2.840.10008.5.1.4.1.1.128.1"

SAME_SLOPE = 1e-6
"""Relative difference up to which two slopes are one."""

UNITS = frozenset(
    {"NONE", "CNTS", "CM2", "CM2ML", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING"}
    | {"MLG", "1CM", "UMOLML", "PROPCNTS", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV"}
)
SUV_TYPES = frozenset({"BSA", "BW", "LBM", "LBMJANMA", "LBMJAMES128", "IBW"})
DECAY_CORRECTIONS = frozenset({"NONE", "START", "ADMIN"})
SEXES = frozenset({"M", "F", "O"})

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
}
"""Units and SUVType of the units of Enhanced PET (DICOM CID 84)."""

_PHILIPS_SUV_FACTOR = PrivateTag(0x7053, 0x00, "Philips PET Private Group")
_PHILIPS_ACTIVITY_FACTOR = PrivateTag(0x7053, 0x09, "Philips PET Private Group")
_DECAY_REFERENCE = {
    "GE": PrivateTag(0x0009, 0x0D, "GEMS_PETD_01"),
    "SIEMENS": PrivateTag(0x0071, 0x22, "SIEMENS MED PT"),
}

_KEYWORD_OF_FIELD = {
    "units": "Units",
    "decay_correction": "DecayCorrection",
    "suv_type": "SUVType",
    "manufacturer": "Manufacturer",
    "weight_kg": "PatientWeight",
    "height_m": "PatientSize",
    "sex": "PatientSex",
    "dose_bq": "RadionuclideTotalDose",
    "half_life_s": "RadionuclideHalfLife",
    "injection": "RadiopharmaceuticalStartDateTime",
    "injection_clock": "RadiopharmaceuticalStartTime",
    "series_start": "SeriesTime",
}


def read_pet_series(
    headers: Sequence[Dataset],
    tracer: int | None = None,
    frame_order: Sequence[int] | None = None,
) -> PetSeries:
    """Read the headers of one PET series.

    Parameters
    ----------
    headers : sequence of pydicom.Dataset
        In slice order; or one that stands for all slices; or one Enhanced PET object.
    tracer : int, optional
        Which item of RadiopharmaceuticalInformationSequence to use, from 1; needed where there
        are several.
    frame_order : sequence of int, optional
        Frames of an Enhanced PET object in slice order, from 0; as stored by default.

    Raises
    ------
    StudyError
        Not PET, a legacy-converted object, several tracers, a RescaleIntercept other than 0,
        malformed values, or headers that contradict each other.
    """
    if not headers:
        raise StudyError("no PET header: give the DICOM header of the PET series")
    for header in headers:
        _require_pet(header)
    if text(headers[0], "SOPClassUID") != ENHANCED_PET:
        return _series_of_slices(headers, tracer)
    if len(headers) > 1:
        raise StudyError(
            f"several multi-frame PET objects in one series ({tag_of('SOPClassUID')}): give one"
        )
    return _series_of_frames(headers[0], tracer, frame_order)


def _require_pet(header: Dataset) -> None:
    if text(header, "Modality") != "PT":
        raise StudyError(
            f"the header is not one of a PET ({tag_of('Modality')} is not PT): "
            "give a header of the PET series"
        )
    if text(header, "SOPClassUID") == LEGACY_CONVERTED_PET:
        raise StudyError(
            f"legacy-converted PET lacks what SUV needs ({tag_of('SOPClassUID')}): "
            "give the original single-frame series"
        )


def _series_of_slices(headers: Sequence[Dataset], tracer: int | None) -> PetSeries:
    fields = [_series_fields(header, tracer) for header in headers]
    for name, keyword in _KEYWORD_OF_FIELD.items():
        if any(each[name] != fields[0][name] for each in fields):
            raise StudyError(
                f"the slices of the PET series contradict each other ({tag_of(keyword)} differs): "
                "give the files of one series, as the scanner exported them"
            )
    filenames = [str(getattr(header, "filename", None) or "") for header in headers]
    return PetSeries(
        slices=tuple(_slice(header, fields[0]["manufacturer"]) for header in headers),
        corrected_image=frozenset.intersection(*map(_corrections, headers)),
        first_file=filenames.index(min(filenames)),
        **fields[0],
    )


def _series_fields(header: Dataset, tracer: int | None) -> dict[str, Any]:
    zone = utc_offset(header)
    tracer_item = _tracer_item(header, tracer)
    return {
        "units": code(header, "Units", UNITS),
        "decay_correction": code(header, "DecayCorrection", DECAY_CORRECTIONS),
        "suv_type": code(header, "SUVType", SUV_TYPES),
        "manufacturer": _manufacturer(header),
        "weight_kg": number(header, "PatientWeight"),
        "height_m": number(header, "PatientSize"),
        "sex": code(header, "PatientSex", SEXES),
        "dose_bq": number(tracer_item, "RadionuclideTotalDose"),
        "half_life_s": number(tracer_item, "RadionuclideHalfLife"),
        "injection": date_time(tracer_item, "RadiopharmaceuticalStartDateTime", zone),
        "injection_clock": clock_time(tracer_item, "RadiopharmaceuticalStartTime", zone),
        "series_start": date_and_time(header, "SeriesDate", "SeriesTime", zone),
    }


def _tracer_item(header: Dataset, tracer: int | None) -> Dataset:
    keyword = "RadiopharmaceuticalInformationSequence"
    tracers = items(header, keyword)
    if tracer is not None and not 1 <= tracer <= len(tracers):
        raise StudyError(
            f"there is no tracer {tracer} ({tag_of(keyword)} has {len(tracers)}): "
            "correct --tracer, or leave it out"
        )
    if tracer is None and len(tracers) > 1:
        raise StudyError(
            f"several tracers ({tag_of(keyword)} has {len(tracers)}): "
            f"choose one by --tracer 1 to {len(tracers)}"
        )
    return tracers[(tracer or 1) - 1] if tracers else Dataset()


def _manufacturer(header: Dataset) -> str:
    name = " ".join(texts(header, "Manufacturer")).upper()
    if re.match(r"(GE|GEMS|GENERAL ELECTRIC)\b", name):
        return "GE"
    return next((each for each in ("SIEMENS", "PHILIPS") if each in name), "OTHER")


def _slice(header: Dataset, manufacturer: str) -> PetSlice:
    _require_no_intercept(header)
    zone = utc_offset(header)
    acquired = date_and_time(header, "AcquisitionDate", "AcquisitionTime", zone)
    stated = _DECAY_REFERENCE.get(manufacturer)
    by_philips = manufacturer == "PHILIPS"
    return PetSlice(
        acquisition=acquired or date_time(header, "AcquisitionDateTime", zone),
        frame_reference_time_s=_seconds(header, "FrameReferenceTime"),
        frame_duration_s=_seconds(header, "ActualFrameDuration"),
        decay_reference=private_date_time(header, stated, zone) if stated else None,
        philips_suv_factor=private_number(header, _PHILIPS_SUV_FACTOR) if by_philips else None,
        philips_activity_factor=(
            private_number(header, _PHILIPS_ACTIVITY_FACTOR) if by_philips else None
        ),
    )


def _corrections(header: Dataset) -> frozenset[str]:
    return frozenset(each.upper() for each in texts(header, "CorrectedImage"))


def _seconds(header: Dataset, keyword: str) -> float | None:
    milliseconds = number(header, keyword)
    return None if milliseconds is None else milliseconds / 1000


def _require_no_intercept(header: Dataset) -> None:
    if number(header, "RescaleIntercept"):
        raise StudyError(
            f"the values are offset ({tag_of('RescaleIntercept')} of the PET is not 0): "
            "export the original series"
        )


# --- Enhanced PET ----------------------------------------------------------------------------


def _series_of_frames(
    header: Dataset, tracer: int | None, frame_order: Sequence[int] | None
) -> PetSeries:
    per_frame = items(header, "PerFrameFunctionalGroupsSequence")
    if not per_frame:
        raise StudyError(
            f"no frames ({tag_of('PerFrameFunctionalGroupsSequence')} is missing): "
            "export the series anew"
        )
    shared = (items(header, "SharedFunctionalGroupsSequence") or [Dataset()])[0]
    order = range(len(per_frame)) if frame_order is None else frame_order
    frames = [(per_frame[index], shared, header) for index in order]
    decay_corrected = code(header, "DecayCorrected", frozenset({"YES", "NO"}))
    fields = _series_fields(header, tracer)
    fields["units"], fields["suv_type"] = _units_of_frames(frames, fields)
    fields["decay_correction"] = {"YES": "START", "NO": "NONE"}.get(decay_corrected or "")
    fields["series_start"] = None
    if fields["injection"] is not None:
        fields["injection_clock"] = None
    return PetSeries(
        slices=tuple(_frame(groups, decay_corrected, utc_offset(header)) for groups in frames),
        corrected_image=_enhanced_corrections(header),
        enhanced=True,
        **fields,
    )


def _group(groups: Sequence[Dataset], keyword: str) -> list[Dataset]:
    """Items of a functional group: of the frame, else shared, else of the whole object."""
    return next(filter(None, (items(each, keyword) for each in groups)), [])


def _frame(
    groups: Sequence[Dataset], decay_corrected: str | None, zone: timezone | None
) -> PetSlice:
    for rescaling in _group(groups, "PixelValueTransformationSequence"):
        _require_no_intercept(rescaling)
    if decay_corrected == "YES":
        return PetSlice(decay_reference=date_time(groups[-1], "DecayCorrectionDateTime", zone))
    content = (_group(groups, "FrameContentSequence") or [Dataset()])[0]
    return PetSlice(decay_reference=date_time(content, "FrameReferenceDateTime", zone))


def _enhanced_corrections(header: Dataset) -> frozenset[str]:
    yes = frozenset({"YES"})
    return frozenset(
        correction
        for correction, keyword in (("ATTN", "AttenuationCorrected"), ("DECY", "DecayCorrected"))
        if code(header, keyword, yes) == "YES"
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
    rescaling = _group(groups, "PixelValueTransformationSequence")
    mappings = _group(groups, "RealWorldValueMappingSequence")
    if mappings:
        slope = number(rescaling[0], "RescaleSlope") if rescaling else None
        carriers = [each for each in mappings if _has_slope(each, slope)]
        if not carriers:
            raise StudyError(
                f"the unit of the rescaled values is unknown ({tag_of('RealWorldValueSlope')} "
                f"differs from {tag_of('RescaleSlope')}): export the series as Bq/ml"
            )
    else:
        carriers = [*groups, *rescaling]
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


def _has_slope(mapping: Dataset, slope: float | None) -> bool:
    own = number(mapping, "RealWorldValueSlope")
    expected = 1.0 if slope is None else slope
    return own is None or abs(own - expected) <= SAME_SLOPE * abs(expected)
