"""PET headers: the attributes that decide the SUV, read into plain values for `common.suv`.

Knows pydicom. First what all headers of a series say alike (patient, tracer, units, start), then
what the functional groups of Enhanced PET say of each frame, then the series as a whole.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from pydicom.dataset import Dataset

from common.dicom.attributes import (
    clock_time,
    code,
    date_and_time,
    date_time,
    has_creator,
    items,
    joined_text,
    number,
    private_date_time,
    private_number,
    tag_of,
    text,
    texts,
    utc_offset,
)
from common.dicom.rescale import (
    Rescale,
    mappings_of_rescaled,
    real_world_mappings,
    refuse_intercept,
    rescale_of,
)
from common.errors import StudyError
from common.suv.inputs import PetSeries, PetSlice, Source
from common.suv.nuclides import HALF_LIFE_S, nuclide_in
from common.suv.vendors import PHILIPS_ACTIVITY_FACTOR, PHILIPS_SUV_FACTOR, STATED_REFERENCE

# --- pet attributes --------------------------------------------------------------------------

UNITS = frozenset(
    {"NONE", "CNTS", "CM2", "CM2ML", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING"}
    | {"MLG", "1CM", "UMOLML", "PROPCNTS", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV"}
)
SUV_TYPES = frozenset({"BSA", "BW", "LBM", "LBMJANMA", "LBMJAMES128", "IBW"})
DECAY_CORRECTIONS = frozenset({"NONE", "START", "ADMIN"})
SEXES = frozenset({"M", "F", "O"})

NUCLIDE_OF_CODE = {
    **dict.fromkeys(("C-105A1", "40565003"), "C11"),
    **dict.fromkeys(("C-107A1", "21576001"), "N13"),
    **dict.fromkeys(("C-B1038", "129504001"), "O15"),
    **dict.fromkeys(("C-111A1", "77004003"), "F18"),
    **dict.fromkeys(("C-127A1", "71425003"), "CU61"),
    **dict.fromkeys(("C-127A2", "3932008"), "CU64"),
    **dict.fromkeys(("C-131A3", "35337001"), "GA68"),
    **dict.fromkeys(("C-113A2", "79523006"), "BR76"),
    **dict.fromkeys(("C-159A2", "79197006"), "RB82"),
    **dict.fromkeys(("C-162A3", "10738001"), "Y86"),
    **dict.fromkeys(("C-168A4", "63360001"), "ZR89"),
    **dict.fromkeys(("C-114A5", "40937006"), "I124"),
}
"""Nuclides by SRT and SNOMED CT codes of DICOM CID 4020."""

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
    "nuclide_half_life_s": "RadionuclideCodeSequence",
    "injection": "RadiopharmaceuticalStartDateTime",
    "injection_clock": "RadiopharmaceuticalStartTime",
    "series_start": "SeriesTime",
}


def _series_fields(header: Dataset, tracer: int | None) -> dict[str, Any]:
    """Read what a header says of the series, by the names in `PetSeries`."""
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
        "nuclide_half_life_s": _nuclide_half_life_s(tracer_item),
        "injection": date_time(tracer_item, "RadiopharmaceuticalStartDateTime", zone),
        "injection_clock": clock_time(tracer_item, "RadiopharmaceuticalStartTime", zone),
        "series_start": date_and_time(header, "SeriesDate", "SeriesTime", zone),
    }


def _common_fields(fields: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return what headers agree on.

    Raises
    ------
    StudyError
        They contradict each other.
    """
    first, *others = fields
    for name, keyword in _KEYWORD_OF_FIELD.items():
        if any(each[name] != first[name] for each in others):
            raise StudyError(
                f"the slices of the PET series contradict each other ({tag_of(keyword)} differs): "
                "give the files of one series, as the scanner exported them"
            )
    return first


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


def _nuclide_half_life_s(tracer_item: Dataset) -> float | None:
    """Return the half-life of the nuclide named by its code, else by the code's meaning."""
    nuclides = items(tracer_item, "RadionuclideCodeSequence")
    if len(nuclides) != 1:
        return None
    nuclide = NUCLIDE_OF_CODE.get(joined_text(nuclides[0], "CodeValue"))
    return HALF_LIFE_S.get(nuclide or nuclide_in(joined_text(nuclides[0], "CodeMeaning")) or "")


def _manufacturer(header: Dataset) -> str:
    """Return who made the scanner, by the private blocks where the name was removed."""
    name = " ".join(texts(header, "Manufacturer")).upper()
    if re.match(r"(GE|GEMS|GENERAL ELECTRIC)\b", name):
        return "GE"
    named = next((each for each in ("SIEMENS", "PHILIPS") if each in name), None)
    creators = {**STATED_REFERENCE, "PHILIPS": PHILIPS_SUV_FACTOR}
    return named or next((m for m, tag in creators.items() if has_creator(header, tag)), "OTHER")


# --- pet frames ------------------------------------------------------------------------------

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


class _Frame(NamedTuple):
    """Where the functional groups of a frame are (its own, the shared, the object); its scale."""

    groups: tuple[Dataset, Dataset, Dataset]
    rescale: Rescale


def _enhanced_series(
    headers: Sequence[Dataset], tracer: int | None, frame_order: Sequence[tuple[int, int]] | None
) -> PetSeries:
    """Read the headers of Enhanced PET objects that make up one series; see `read_pet_series`."""
    frames = [_frames(header) for header in headers]
    order = frame_order or [(i, k) for i, each in enumerate(frames) for k in range(len(each))]
    fields = [_fields(header, each, tracer) for header, each in zip(headers, frames, strict=True)]
    return PetSeries(
        slices=tuple(_slice_of_frame(frames[i][k]) for i, k in order),
        corrected_image=frozenset.intersection(*map(_frame_corrections, headers)),
        source=Source.ENHANCED,
        reinterpretations=_reinterpretations([frame for each in frames for frame in each]),
        **_common_fields(fields),
    )


def _frames(header: Dataset) -> list[_Frame]:
    per_frame = items(header, "PerFrameFunctionalGroupsSequence")
    if not per_frame:
        raise StudyError(
            f"no frames ({tag_of('PerFrameFunctionalGroupsSequence')} is missing): "
            "export the series anew"
        )
    shared = (items(header, "SharedFunctionalGroupsSequence") or [Dataset()])[0]
    return [_Frame((each, shared, header), rescale_of(header, each)) for each in per_frame]


def _fields(header: Dataset, frames: Sequence[_Frame], tracer: int | None) -> dict[str, Any]:
    fields = _series_fields(header, tracer)
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


def _slice_of_frame(frame: _Frame) -> PetSlice:
    header = frame.groups[-1]
    zone = utc_offset(header)
    content = (_group(frame.groups, "FrameContentSequence") or [Dataset()])[0]
    duration_ms = number(content, "FrameAcquisitionDuration")
    return PetSlice(
        acquisition=date_time(content, "FrameAcquisitionDateTime", zone),
        frame_duration_s=None if duration_ms is None else duration_ms / 1000,
        decay_reference=(
            date_time(header, "DecayCorrectionDateTime", zone)
            if _decay_corrected(header) == "YES"
            else date_time(content, "FrameReferenceDateTime", zone)
        ),
        real_world_slope=frame.rescale.real_world_slope,
    )


def _frame_corrections(header: Dataset) -> frozenset[str]:
    """Return what was corrected for; by CorrectedImage where the object does not say."""
    attenuation = code(header, "AttenuationCorrected", frozenset({"YES"}))
    states = {"ATTN": attenuation, "DECY": _decay_corrected(header)}
    as_single_frame = {each.upper() for each in texts(header, "CorrectedImage")}
    return frozenset(
        correction
        for correction, state in states.items()
        if state == "YES" or (state is None and correction in as_single_frame)
    )


def _reinterpretations(frames: Sequence[_Frame]) -> tuple[str, ...]:
    if not any(_unit_carriers(frame)[1] for frame in frames):
        return ()
    return (
        f"{tag_of('RealWorldValueSlope')} is 1, unlike {tag_of('RescaleSlope')}: its unit is taken "
        "as that of the rescaled values",
    )


def _units_of_frames(
    frames: Sequence[_Frame], fields: dict[str, Any]
) -> tuple[str | None, str | None]:
    """Units and SUVType; those of the header itself where the frames name none."""
    found = set(map(_units_of_frame, frames))
    if len(found) > 1:
        raise StudyError(
            f"the frames differ in unit ({tag_of('MeasurementUnitsCodeSequence')}): "
            "export the series as Bq/ml"
        )
    units, suv_type = found.pop() or (fields["units"], None)
    return units, suv_type or fields["suv_type"]


def _units_of_frame(frame: _Frame) -> tuple[str, str | None] | None:
    """Units and SUVType of a frame's rescaled values, None where it names none."""
    carriers, _ = _unit_carriers(frame)
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


def _unit_carriers(frame: _Frame) -> tuple[Sequence[Dataset], bool]:
    """Return what may name the unit of rescaled values, and whether that is a reinterpretation."""
    own, _, header = frame.groups
    mappings = real_world_mappings(header, own)
    if not mappings:
        rescaling = _group(frame.groups, "PixelValueTransformationSequence")
        return [*frame.groups, *rescaling], False
    carriers, is_reinterpretation = mappings_of_rescaled(frame.rescale.slope, mappings)
    if carriers:
        return carriers, is_reinterpretation
    raise StudyError(
        f"the unit of the rescaled values is unknown ({tag_of('RealWorldValueSlope')} differs from "
        f"{tag_of('RescaleSlope')}): export the series as Bq/ml"
    )


# --- pet header ------------------------------------------------------------------------------

ENHANCED_PET = "1.2.840.10008.5.1.4.1.1.130"
LEGACY_CONVERTED_PET = "1.2.840.10008.5.1.4.1.1.128.1"


def read_pet_series(
    headers: Sequence[Dataset],
    tracer: int | None = None,
    frame_order: Sequence[tuple[int, int]] | None = None,
) -> PetSeries:
    """Read the headers of one PET series.

    Parameters
    ----------
    headers : sequence of pydicom.Dataset
        In slice order; or one that stands for all slices; or Enhanced PET objects.
    tracer : int, optional
        Which item of RadiopharmaceuticalInformationSequence to use, from 1; needed where there
        are several.
    frame_order : sequence of (int, int), optional
        Object and frame of each slice of Enhanced PET, from 0; as stored by default.

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
    are_enhanced = {text(header, "SOPClassUID") == ENHANCED_PET for header in headers}
    if len(are_enhanced) > 1:
        raise StudyError(
            f"single images and multi-frame objects in one PET series ({tag_of('SOPClassUID')}): "
            "give the one or the other"
        )
    if are_enhanced == {True}:
        return _enhanced_series(headers, tracer, frame_order)
    fields = _common_fields(_series_fields(header, tracer) for header in headers)
    filenames = [str(getattr(header, "filename", None) or "") for header in headers]
    return PetSeries(
        slices=tuple(_slice(header, fields["manufacturer"]) for header in headers),
        corrected_image=frozenset.intersection(*map(_corrections, headers)),
        first_file=filenames.index(min(filenames)),
        **fields,
    )


def attenuation_corrected(header: Dataset) -> bool | None:
    """Tell whether attenuation was corrected for; None where a PET header does not say.

    Raises
    ------
    StudyError
        Malformed values.
    """
    if text(header, "SOPClassUID") == ENHANCED_PET:
        found, is_said = _frame_corrections(header), "AttenuationCorrected" in header
    else:
        found, is_said = _corrections(header), False
    return "ATTN" in found if found or is_said else None


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


def _slice(header: Dataset, manufacturer: str) -> PetSlice:
    # A header beside a NIfTI PET is rescaled, and so checked, nowhere else.
    refuse_intercept(header)
    zone = utc_offset(header)
    acquired = date_and_time(header, "AcquisitionDate", "AcquisitionTime", zone)
    if not isinstance(acquired, datetime):
        acquired = date_time(header, "AcquisitionDateTime", zone) or acquired
    stated = STATED_REFERENCE.get(manufacturer)
    by_philips = manufacturer == "PHILIPS"
    return PetSlice(
        acquisition=acquired,
        frame_reference_time_s=_seconds(header, "FrameReferenceTime"),
        frame_duration_s=_seconds(header, "ActualFrameDuration"),
        decay_reference=private_date_time(header, stated, zone) if stated else None,
        philips_suv_factor=private_number(header, PHILIPS_SUV_FACTOR) if by_philips else None,
        philips_activity_factor=(
            private_number(header, PHILIPS_ACTIVITY_FACTOR) if by_philips else None
        ),
    )


def _corrections(header: Dataset) -> frozenset[str]:
    return frozenset(each.upper() for each in texts(header, "CorrectedImage") if each)


def _seconds(header: Dataset, keyword: str) -> float | None:
    milliseconds = number(header, keyword)
    return None if milliseconds is None else milliseconds / 1000
