"""What all headers of a PET series say alike: patient, tracer, units and start of the series.

Knows pydicom.
"""

import re
from collections.abc import Iterable
from typing import Any

from pydicom.dataset import Dataset

from common.dicom_times import clock_time, date_and_time, date_time, utc_offset
from common.dicom_values import (
    PrivateTag,
    code,
    has_creator,
    items,
    joined_text,
    number,
    tag_of,
    texts,
)
from common.errors import StudyError

UNITS = frozenset(
    {"NONE", "CNTS", "CM2", "CM2ML", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING"}
    | {"MLG", "1CM", "UMOLML", "PROPCNTS", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV"}
)
SUV_TYPES = frozenset({"BSA", "BW", "LBM", "LBMJANMA", "LBMJAMES128", "IBW"})
DECAY_CORRECTIONS = frozenset({"NONE", "START", "ADMIN"})
SEXES = frozenset({"M", "F", "O"})

NUCLIDE_HALF_LIFE_S = {
    **dict.fromkeys(("C-111A1", "77004003"), 6586.2),  # F-18
    **dict.fromkeys(("C-131A3", "35337001"), 4057.7),  # Ga-68
    **dict.fromkeys(("C-105A1", "40565003"), 1221.8),  # C-11
    **dict.fromkeys(("C-127A2", "3932008"), 45_723.6),  # Cu-64
    **dict.fromkeys(("C-168A4", "63360001"), 282_276.0),  # Zr-89
}
"""Half-lives [s] by SRT and SNOMED CT codes of DICOM CID 4020 (NNDC, Brookhaven)."""

PHILIPS_SUV_FACTOR = PrivateTag(0x7053, 0x00, "Philips PET Private Group")
PHILIPS_ACTIVITY_FACTOR = PrivateTag(0x7053, 0x09, "Philips PET Private Group")
DECAY_REFERENCE = {
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
    "nuclide_half_life_s": "RadionuclideCodeSequence",
    "injection": "RadiopharmaceuticalStartDateTime",
    "injection_clock": "RadiopharmaceuticalStartTime",
    "series_start": "SeriesTime",
}


def series_fields(header: Dataset, tracer: int | None) -> dict[str, Any]:
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


def common_fields(fields: Iterable[dict[str, Any]]) -> dict[str, Any]:
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


def require_no_intercept(header: Dataset) -> None:
    """Refuse values that are offset, which DICOM forbids for PET."""
    intercept = number(header, "RescaleIntercept")
    if intercept:
        raise StudyError(
            f"the values are offset ({tag_of('RescaleIntercept')} of the PET is {intercept:g}): "
            "export the original series"
        )


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
    nuclides = items(tracer_item, "RadionuclideCodeSequence")
    codes = [joined_text(each, "CodeValue") for each in nuclides]
    return NUCLIDE_HALF_LIFE_S.get(codes[0]) if len(codes) == 1 else None


def _manufacturer(header: Dataset) -> str:
    """Return who made the scanner, by the private blocks where the name was removed."""
    name = " ".join(texts(header, "Manufacturer")).upper()
    if re.match(r"(GE|GEMS|GENERAL ELECTRIC)\b", name):
        return "GE"
    named = next((each for each in ("SIEMENS", "PHILIPS") if each in name), None)
    creators = {**DECAY_REFERENCE, "PHILIPS": PHILIPS_SUV_FACTOR}
    return named or next((m for m, tag in creators.items() if has_creator(header, tag)), "OTHER")
