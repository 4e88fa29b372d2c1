"""Headers whose SUV is known, and headers that must be refused.

The two tables are those of the IBSI digital reference objects for SUV (oncoray/suv_computation),
built anew: 43 that must convert and 15 that must not. Expected values come from the physics in
`pet_headers` and from body masses worked out by hand.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pet_headers import (
    DURATION_S,
    HOT,
    INJECTION,
    REFERENCE_S,
    WEIGHT_KG,
    Array,
    PerSlice,
    activity_per_suv,
    da,
    ds,
    dt,
    enhanced_pet_header,
    frame_reference_time_s,
    mean_activity_per_suv,
    moment,
    pet_headers,
    phantom_suv,
    tm,
    write_enhanced_pet,
    write_pet_series,
)
from pydicom.dataset import Dataset

from common.dicom.pet import read_pet_series
from common.suv.inputs import PetSeries

N_SLICES = 4
GE, SIEMENS, PHILIPS = "GE MEDICAL SYSTEMS", "SIEMENS", "Philips Medical Systems"
VENDORS = {"Siemens": SIEMENS, "GE": GE, "Philips": PHILIPS, "other": "Synthetic"}
GE_REFERENCE, SIEMENS_REFERENCE = 0x0009100D, 0x00711022
PHILIPS_SUV, PHILIPS_ACTIVITY = 0x70531000, 0x70531009
PHILIPS_GROUP = "Philips PET Private Group"
GA68_S, ZR89_S = 4057.7, 282_240.0

# 70 kg, 175 cm: the masses [kg] and the surface [m2], worked out by hand.
JAMES_KG = {"M": 56.52, "F": 51.22, "O": 53.87}
IDEAL_KG = {"M": 72.38, "F": 66.43, "O": 69.405}
JANMAHASATIAN_KG = {"M": 55.857107723, "F": 45.197014925, "O": 50.527061324}
SURFACE_M2 = 1.848143018


# --- headers that must convert ---------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A header, and the rescaled value that physics gives to an SUVbw of 1 in each slice."""

    name: str
    value_per_suv: Any
    rule: str
    reinterpretations: int = 0
    private: dict[int, Any] = field(default_factory=dict)
    enhanced: dict[str, Any] | None = None
    header: dict[str, Any] = field(default_factory=dict)
    slope_ratios: tuple[float, ...] = (1, 1, 1, 1)

    def build(self, slopes: Array) -> list[Dataset]:
        """Headers in memory."""
        if self.enhanced is not None:
            return [enhanced_pet_header(N_SLICES, slopes=slopes.tolist(), **self.enhanced)]
        scaled = {"RescaleSlope": of_each(ds, slopes), **self.header}
        return pet_headers(N_SLICES, private=self.private, **scaled)

    def series(self) -> PetSeries:
        """What the headers say."""
        return read_pet_series(self.build(np.ones(N_SLICES)))

    def write(
        self, folder: Path, change: Callable[[Dataset], None] = lambda header: None
    ) -> tuple[list[Dataset], Array, Array]:
        """Headers as read back from files, after `change` of each; stored values and slopes."""
        wanted = np.broadcast_to(np.asarray(self.value_per_suv, dtype=float), (N_SLICES,))
        steps = wanted * HOT / 20_000 * np.array(self.slope_ratios)
        slopes = np.array([float(ds(step)) for step in steps])
        stored = np.rint(phantom_suv(N_SLICES) * wanted / slopes)
        headers = self.build(slopes)
        for header in headers:
            change(header)
        if self.enhanced is not None:
            paths = [write_enhanced_pet(folder / "enhanced.dcm", headers[0], stored)]
        else:
            paths = write_pet_series(folder, headers, stored)
        return [pydicom.dcmread(path) for path in paths], stored, slopes


BEDS_S = np.array([3600.0, 3600.0, 3960.0, 3960.0])
"""Acquisition of each slice in two bed positions, seconds after injection."""


def of_each(convert: Callable[[Any], Any], values: Iterable[Any]) -> PerSlice:
    return PerSlice(*(convert(each) for each in values))


def bed_times() -> dict[str, Any]:
    return {
        "AcquisitionDate": of_each(da, map(moment, BEDS_S)),
        "AcquisitionTime": of_each(tm, map(moment, BEDS_S)),
    }


def two_beds(vendor: str, series_s: float) -> dict[str, Any]:
    """Two beds corrected for decay to the start of the first; the series says `series_s`."""
    offsets_s = (
        BEDS_S - REFERENCE_S
        if vendor == GE
        else frame_reference_time_s(BEDS_S, DURATION_S, REFERENCE_S)
    )
    return {
        **bed_times(),
        "Manufacturer": vendor,
        "SeriesDate": da(moment(series_s)),
        "SeriesTime": tm(moment(series_s)),
        "FrameReferenceTime": of_each(ds, offsets_s * 1000),
    }


def on_days(start: datetime, injected: datetime, **more: Any) -> dict[str, Any]:
    """Scan and injection at other moments than usual."""
    return {
        "SeriesDate": da(start),
        "SeriesTime": tm(start),
        "AcquisitionDate": da(start),
        "AcquisitionTime": tm(start),
        "RadiopharmaceuticalStartDateTime": dt(injected),
        "RadiopharmaceuticalStartTime": tm(injected),
        **more,
    }


AT_START = float(activity_per_suv(REFERENCE_S))
MIDNIGHT = datetime(2025, 1, 2, 0, 30)
EVENING = datetime(2025, 1, 1, 23, 30)
OTHER_YEAR = timedelta(days=-9000)
DAYS_S = 3 * 86_400.0

CONVERT = [
    Case("default", AT_START, "12b"),
    Case("several slopes", AT_START, "12b", slope_ratios=(1, 2, 3, 1.5)),
    Case("GML", 1.0, "7", header={"Units": "GML", "SUVType": "BW"}),
    *(
        Case(
            f"GML {suv_type} {sex}",
            mass_kg / WEIGHT_KG,
            "7",
            header={"Units": "GML", "SUVType": suv_type, "PatientSex": sex},
        )
        for suv_type, masses_kg in (
            ("LBMJAMES128", JAMES_KG),
            ("IBW", IDEAL_KG),
            ("LBMJANMA", JANMAHASATIAN_KG),
        )
        for sex, mass_kg in masses_kg.items()
    ),
    Case("CM2ML", SURFACE_M2 * 1e4 / (WEIGHT_KG * 1e3), "8", header={"Units": "CM2ML"}),
    Case(
        "CNTS, Philips SUV factor",
        1 / 0.0005,
        "9",
        header={"Units": "CNTS", "Manufacturer": PHILIPS},
        private={PHILIPS_SUV: (PHILIPS_GROUP, "DS", "0.0005")},
    ),
    Case(
        "CNTS, Philips activity factor",
        AT_START / 2.5,
        "9+12b",
        header={"Units": "CNTS", "Manufacturer": PHILIPS},
        private={
            PHILIPS_SUV: (PHILIPS_GROUP, "DS", "0"),
            PHILIPS_ACTIVITY: (PHILIPS_GROUP, "DS", "2.5"),
        },
    ),
    Case("dose in MBq", AT_START, "12b", 1, header={"RadionuclideTotalDose": 368.08}),
    Case("ADMIN", float(activity_per_suv(0)), "11", header={"DecayCorrection": "ADMIN"}),
    *(
        Case(f"series after acquisition, {name}", AT_START, "12c", header=two_beds(vendor, 5400))
        for name, vendor in VENDORS.items()
    ),
    *(
        Case(
            f"series after acquisition, private date-time, {name}",
            AT_START,
            "12a",
            header={**two_beds(VENDORS[name], 5400), "FrameReferenceTime": None},
            private={tag: (creator, "DT", dt(moment(REFERENCE_S)))},
        )
        for name, tag, creator in (
            ("Siemens", SIEMENS_REFERENCE, "SIEMENS MED PT"),
            ("GE", GE_REFERENCE, "GEMS_PETD_01"),
        )
    ),
    *(
        Case(
            f"no decay correction, {name}",
            mean_activity_per_suv(BEDS_S, DURATION_S) / (2.5 if name == "Philips" else 1),
            "9+13" if name == "Philips" else "13",
            header={
                **bed_times(),
                "Manufacturer": vendor,
                "Units": "CNTS" if name == "Philips" else "BQML",
                "DecayCorrection": "NONE",
                "CorrectedImage": ["ATTN", "SCAT"],
            },
            private={
                PHILIPS_SUV: (PHILIPS_GROUP, "DS", "0.0005"),
                PHILIPS_ACTIVITY: (PHILIPS_GROUP, "DS", "2.5"),
            }
            if name == "Philips"
            else {},
        )
        for name, vendor in VENDORS.items()
    ),
    *(
        Case(
            f"series with acquisition, {name}",
            AT_START,
            "12b",
            header=two_beds(vendor, REFERENCE_S),
        )
        for name, vendor in VENDORS.items()
    ),
    Case("start date-time only", AT_START, "12b", header={"RadiopharmaceuticalStartTime": None}),
    Case("start time only", AT_START, "12b", header={"RadiopharmaceuticalStartDateTime": None}),
    Case(
        "across midnight, time only",
        AT_START,
        "12b",
        header=on_days(MIDNIGHT, EVENING, RadiopharmaceuticalStartDateTime=None),
    ),
    Case("across midnight, date-time", AT_START, "12b", header=on_days(MIDNIGHT, EVENING)),
    Case(
        "across midnight, anonymised acquisition",
        AT_START,
        "12b",
        1,
        header=on_days(MIDNIGHT + OTHER_YEAR, EVENING),
    ),
    Case(
        "Zr-89 after three days, date-time",
        float(activity_per_suv(DAYS_S, half_life_s=ZR89_S)),
        "12b",
        header=on_days(moment(DAYS_S), INJECTION, RadionuclideHalfLife=ZR89_S),
    ),
    Case(
        "Ga-68",
        float(activity_per_suv(REFERENCE_S, half_life_s=GA68_S)),
        "12b",
        header={"RadionuclideHalfLife": GA68_S},
    ),
    Case("enhanced", AT_START, "15", enhanced={}),
    Case("enhanced, several slopes", AT_START, "15", enhanced={}, slope_ratios=(1, 2, 3, 1.5)),
    Case("enhanced, GML", 1.0, "7", enhanced={"unit": "g/ml{SUVbw}"}),
    Case(
        "enhanced, series after decay correction",
        AT_START,
        "15",
        enhanced={"SeriesTime": tm(moment(9000))},
    ),
    Case(
        "enhanced, no decay correction",
        activity_per_suv(BEDS_S + 150),
        "15",
        enhanced={
            "DecayCorrected": "NO",
            "DecayCorrectionDateTime": None,
            "frame_references": [dt(moment(each)) for each in BEDS_S + 150],
        },
    ),
]


# --- headers that must be refused ------------------------------------------------------------

IBW = {"Units": "GML", "SUVType": "IBW"}
ZR89_LATE = on_days(moment(DAYS_S), INJECTION, RadionuclideHalfLife=ZR89_S)

REFUSE: list[tuple[str, dict[str, Any], str]] = [
    ("weight missing", {"PatientWeight": None}, "PatientWeight (0010,1030) is missing"),
    ("weight 0", {"PatientWeight": 0}, "PatientWeight (0010,1030) is 0"),
    ("sex missing", {**IBW, "PatientSex": None}, "PatientSex (0010,0040) is missing"),
    ("sex other", {**IBW, "PatientSex": "X"}, "PatientSex (0010,0040) is none of M, F, O"),
    ("height missing", {**IBW, "PatientSize": None}, "PatientSize (0010,1020) is missing"),
    ("height 0", {**IBW, "PatientSize": 0}, "PatientSize (0010,1020) is 0"),
    (
        "counts without factor",
        {"Units": "CNTS", "Manufacturer": PHILIPS},
        "factor (7053,1009) are missing",
    ),
    ("PROPCNTS", {"Units": "PROPCNTS"}, "Units (0054,1001) is PROPCNTS"),
    (
        "dose missing",
        {"RadionuclideTotalDose": None},
        "RadionuclideTotalDose (0018,1074) is missing",
    ),
    (
        "dose negative",
        {"RadionuclideTotalDose": -368e6},
        "RadionuclideTotalDose (0018,1074) is -3.68e+08",
    ),
    (
        "frame duration missing",
        {**two_beds(SIEMENS, 5400), "ActualFrameDuration": None},
        "ActualFrameDuration (0018,1242) is missing",
    ),
    (
        "no injection time",
        {"RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": None},
        "RadiopharmaceuticalStartDateTime (0018,1078) and RadiopharmaceuticalStartTime (0018,1072)",
    ),
    (
        "uptake over a day, time only",
        {**ZR89_LATE, "RadiopharmaceuticalStartDateTime": None},
        "RadiopharmaceuticalStartDateTime (0018,1078) is missing",
    ),
    (
        "uptake over a day, anonymised",
        {**ZR89_LATE, "RadiopharmaceuticalStartDateTime": dt(INJECTION + OTHER_YEAR)},
        "RadiopharmaceuticalStartDateTime (0018,1078) does not fit",
    ),
    (
        "half-life missing",
        {"RadionuclideHalfLife": None},
        "RadionuclideHalfLife (0018,1075) is missing",
    ),
]
