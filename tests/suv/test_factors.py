"""SUV factors, held against physics, digital reference objects, real headers and laws."""

import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pet_headers import (
    BACKGROUND,
    COLD,
    DOSE_BQ,
    DURATION_S,
    HALF_LIFE_S,
    HOT,
    INJECTION,
    REFERENCE_S,
    WEIGHT_KG,
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
    write_pet_series,
)
from scipy.integrate import quad
from suv_cases import (
    AT_START,
    BEDS_S,
    CONVERT,
    GE,
    GE_REFERENCE,
    N_SLICES,
    PHILIPS,
    REFUSE,
    SIEMENS,
    SIEMENS_REFERENCE,
    VENDORS,
    Case,
    of_each,
    on_days,
    two_beds,
)

from common.dicom.pet import read_pet_series
from common.errors import StudyError
from common.suv.body import body_quantity
from common.suv.decay import average_rate_time_s
from common.suv.factors import already_suv, spread_factors, suv_factors
from common.suv.inputs import PetSeries, PetSlice, Source
from common.suv.provenance import Rule, coarse

DRO = Path(__file__).parents[3] / "shared" / "data" / "suv_dro"


def test_the_table_is_complete() -> None:
    assert len(CONVERT) == 43
    assert len(REFUSE) == 15
    assert len({each.name for each in CONVERT}) == 43


@pytest.mark.parametrize("case", CONVERT, ids=lambda case: case.name)
def test_converts(case: Case, tmp_path: Path) -> None:
    headers, stored, slopes = case.write(tmp_path)
    conversion = suv_factors(read_pet_series(headers))

    assert conversion.factors * case.value_per_suv == pytest.approx(np.ones(N_SLICES), rel=2e-8)
    suv = stored * slopes * conversion.factors
    phantom = phantom_suv(N_SLICES)
    for expected in (BACKGROUND, HOT, COLD):
        assert suv[phantom == expected] == pytest.approx(expected, abs=5e-4)
    assert (suv[phantom == 0] == 0).all()
    assert conversion.provenance.record["rule"] == case.rule
    assert len(conversion.provenance.record["reinterpretations"]) == case.reinterpretations


@pytest.mark.parametrize(
    "case", [each for each in CONVERT if each.reinterpretations], ids=lambda case: case.name
)
def test_strict_refuses_every_reinterpretation(case: Case, tmp_path: Path) -> None:
    series = read_pet_series(case.write(tmp_path)[0])
    (said,) = suv_factors(series).provenance.record["reinterpretations"]
    with pytest.raises(StudyError, match=re.escape(f"refused by --strict: {said}")):
        suv_factors(series, strict=True)


def test_what_is_told_of_a_patient_is_rounded() -> None:
    """The injected dose followed to eleven digits from weight, minutes and factor."""
    header = {"PatientWeight": 71.4567, "RadionuclideTotalDose": 350123456.0}
    series = replace(read_pet_series(pet_headers(3, **header)), injection=moment(1234.5))
    conversion = suv_factors(series)
    exact, told = conversion.provenance, conversion.provenance.record
    assert exact.weight_kg == 71.4567
    assert told["weight_kg"] == 71
    assert told["minutes_to_reference"] == [39, 39]
    factor = float(f"{1000 * 71.4567 / 350123456 * 2 ** (2365.5 / series.half_life_s):.6g}")
    assert told["factor_range"] == [factor, factor]
    assert told["alternatives"]["qiba"] == factor
    dose_bq = 1000 * told["weight_kg"] / factor * 2 ** (60 * 39 / series.half_life_s)
    assert abs(dose_bq / 350123456 - 1) > 1e-4
    assert conversion.factors == pytest.approx(factor, rel=1e-5)
    assert (conversion.factors != factor).all()


def test_what_other_programs_tell_is_rounded_where_it_is_a_number() -> None:
    record = {"weight_kg": "80.25 kg", "minutes_to_reference": None, "factor_range": [math.inf, 1]}
    assert coarse(record) == record
    assert coarse({"weight_kg": 0.02512}) == {"weight_kg": 0.02512}, "no patient"
    assert coarse({"weight_kg": 80.25, "note": 1.23456789}) == {"weight_kg": 80, "note": 1.23456789}


@pytest.mark.parametrize(
    ("header", "injection_from"),
    [
        ({}, "date-time"),
        ({"RadiopharmaceuticalStartDateTime": None}, "clock time"),
        ({"DecayCorrection": "ADMIN"}, None),
        ({"Units": "GML"}, None),
    ],
)
def test_strict_accepts_a_plain_header(header: dict[str, Any], injection_from: str | None) -> None:
    """A clock time says what it says, as most headers do; that the day is inferred is kept."""
    series = read_pet_series(pet_headers(**header))
    provenance = suv_factors(series, strict=True).provenance.record
    assert provenance == suv_factors(series).provenance.record
    assert provenance["injection_from"] == injection_from


def refusal(series: PetSeries, **options: Any) -> str:
    with pytest.raises(StudyError) as caught:
        suv_factors(series, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "what"), [row[1:] for row in REFUSE], ids=[row[0] for row in REFUSE]
)
def test_refuses(header: dict[str, Any], what: str, tmp_path: Path) -> None:
    paths = write_pet_series(tmp_path, pet_headers(N_SLICES, **header), phantom_suv(N_SLICES))
    message = refusal(read_pet_series([pydicom.dcmread(path) for path in paths]))
    assert what in message
    assert re.fullmatch(r".+ \(.+\): .+", message)
    assert not re.search(r"Doe|4711|20250\d", message)


@pytest.mark.parametrize("corrections", [None, "", []])
def test_corrections_that_are_missing_are_said_to_be(corrections: Any, tmp_path: Path) -> None:
    """An empty CorrectedImage was read as not corrected."""
    headers = pet_headers(N_SLICES, CorrectedImage=corrections)
    paths = write_pet_series(tmp_path, headers, phantom_suv(N_SLICES))
    message = refusal(read_pet_series([pydicom.dcmread(path) for path in paths]))
    assert "CorrectedImage (0028,0051) is missing" in message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"corrected_image": frozenset({"DECY"})}, "CorrectedImage (0028,0051) lacks ATTN"),
        ({"corrected_image": frozenset()}, "CorrectedImage (0028,0051) is missing"),
        ({"corrected_image": frozenset({"ATTN"})}, "CorrectedImage (0028,0051) lacks DECY"),
        ({"decay_correction": None}, "DecayCorrection (0054,1102) is missing"),
        (
            {"decay_correction": "UNKNOWN"},
            "DecayCorrection (0054,1102) is none that DICOM defines",
        ),
        ({"units": None}, "Units (0054,1001) is missing"),
        ({"units": "UNKNOWN"}, "Units (0054,1001) is none that DICOM defines"),
        ({"units": "GML", "suv_type": "LBM"}, "SUVType (0054,1006) is LBM"),
        ({"units": "GML", "suv_type": "BSA"}, "SUVType (0054,1006) is BSA"),
        ({"units": "CM2ML", "height_m": 175.0}, "PatientSize (0010,1020) is 175"),
        ({"dose_bq": 0.0}, "RadionuclideTotalDose (0018,1074) is 0"),
        ({"half_life_s": 0.0}, "RadionuclideHalfLife (0018,1075) is 0"),
        ({"series_start": None}, "(SeriesTime (0008,0031) is missing, or has no minutes)"),
        ({"slices": (PetSlice(),)}, "AcquisitionTime (0008,0032) is missing"),
        # 23 h by the clock are a thousand half-lives of Rb-82
        ({"injection": None, "injection_clock": time(12, 1), "half_life_s": 76.4}, "positive"),
    ],
)
def test_refuses_more(change: dict[str, Any], what: str) -> None:
    assert what in refusal(replace(read_pet_series(pet_headers()), **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "are missing or 0): export with private tags, or as BQML"),
        (
            {"slices": (PetSlice(philips_suv_factor=1e-4),), "decay_correction": "NONE"},
            "scale factor (7053,1009) is missing or 0, and SUV scale factor (7053,1000) does not "
            "hold where DecayCorrection (0054,1102) is NONE): export with private tags, or as BQML",
        ),
        (
            {"manufacturer": "SIEMENS"},
            "Manufacturer (0008,0070) is not Philips, who alone state it): "
            "export the series as BQML",
        ),
        ({"source": Source.ENHANCED}, "Enhanced PET states none): export the series as Bq/ml"),
    ],
)
def test_counts_without_scale_are_refused_with_a_remedy_that_helps(
    change: dict[str, Any], message: str
) -> None:
    """START was blamed, and private tags were asked for, where neither could help."""
    plain = read_pet_series(pet_headers(1, Manufacturer=PHILIPS, CorrectedImage=["ATTN", "DECY"]))
    series = replace(plain, **{"units": "CNTS", **change})
    assert refusal(series).startswith("counts without scale (")
    assert refusal(series).endswith(message)


def test_a_time_missing_in_one_slice_refuses_the_frames() -> None:
    for keyword, what in (
        ("FrameReferenceTime", "FrameReferenceTime (0054,1300) is missing"),
        ("ActualFrameDuration", "ActualFrameDuration (0018,1242) is missing"),
        ("AcquisitionTime", "AcquisitionTime (0008,0032) is missing"),
    ):
        header = two_beds(SIEMENS, 5400)
        header[keyword] = PerSlice(*header.get(keyword, [300_000] * N_SLICES)[:-1], None)
        assert what in refusal(read_pet_series(pet_headers(N_SLICES, **header)))


def test_ge_needs_no_frame_duration() -> None:
    header = {**two_beds(GE, 5400), "ActualFrameDuration": None}
    conversion = suv_factors(read_pet_series(pet_headers(N_SLICES, **header)))
    assert conversion.factors * AT_START == pytest.approx(np.ones(N_SLICES), rel=1e-9)


def test_a_private_date_time_counts_on_every_slice_only() -> None:
    given = ("GEMS_PETD_01", "DT", dt(moment(REFERENCE_S)))
    header = two_beds(GE, 5400)
    private = {GE_REFERENCE: PerSlice(given, given, given, ("GEMS_PETD_01", "DT", ""))}
    series = read_pet_series(pet_headers(N_SLICES, private=private, **header))
    assert suv_factors(series).provenance.record["rule"] == "12c"


# --- real headers ----------------------------------------------------------------------------


def series_of(
    clock: str,
    injected: str,
    acquired: list[str],
    **more: Any,
) -> PetSeries:
    """A series of one day, from times of day."""

    def at(text: str) -> datetime:
        return datetime.fromisoformat(f"2010-03-04T{text}")

    return PetSeries(
        slices=tuple(PetSlice(at(each), **more.pop("frame", {})) for each in acquired),
        units="BQML",
        decay_correction="START",
        corrected_image=frozenset({"ATTN", "DECY"}),
        injection_clock=at(injected).time(),
        series_start=at(clock),
        **more,
    )


def real_siemens() -> PetSeries:
    first, last = 10 * 3600 + 27 * 60 + 31.687, 10 * 3600 + 52 * 60 + 4.593
    beds = [str(timedelta(seconds=each)) for each in np.linspace(first, last, 9).round(3)]
    return series_of(
        "10:27:31.687",
        "08:45:00",
        [f"{bed:0>15}" for bed in beds],
        manufacturer="SIEMENS",
        weight_kg=123.6,
        dose_bq=587929992.67578,
        half_life_s=6586.2,
    )


def real_ge() -> PetSeries:
    return series_of(
        "11:20:11",
        "10:35:00",
        ["11:20:11"],
        manufacturer="GE",
        weight_kg=71.0,
        dose_bq=388777472.0,
        half_life_s=6588.0,
    )


def real_philips() -> PetSeries:
    series = series_of(
        "11:01:55",
        "10:00:58",
        ["11:01:56"],
        manufacturer="PHILIPS",
        weight_kg=64.0,
        dose_bq=126e6,
        half_life_s=6586.199707,
    )
    frame = replace(
        series.slices[0],
        frame_reference_time_s=1328.7,
        frame_duration_s=120.7,
        philips_suv_factor=0.003515736,
        philips_activity_factor=4.709921,
    )
    return replace(series, slices=(frame,))


def test_real_siemens_header() -> None:
    conversion = suv_factors(real_siemens())
    assert conversion.factors == pytest.approx(np.full(9, 0.000401664014), abs=5e-13)
    assert conversion.provenance.record["rule"] == "12b"
    assert conversion.provenance.record["warnings"] == []


def test_real_ge_header() -> None:
    conversion = suv_factors(real_ge())
    assert conversion.factors == pytest.approx(0.000242902977, abs=5e-13)
    assert conversion.provenance.record["rule"] == "12b"


def test_real_philips_header() -> None:
    conversion = suv_factors(real_philips())
    provenance = conversion.provenance.record
    assert conversion.factors == pytest.approx(7.46375e-4, abs=5e-10)
    assert provenance["vendor_factor"] == pytest.approx(7.4645e-4, abs=5e-9)
    assert provenance["alternatives"]["frame_based"] / conversion.factors[0] == pytest.approx(
        1 - 0.125, abs=5e-4
    )
    (warning,) = provenance["warnings"]
    assert warning.startswith("decay reference disagrees")
    assert "21 min" in warning


def test_alternatives_of_real_headers() -> None:
    """Worked out by hand: weight [g] over dose [Bq], times 2 to the uptake over the half-life."""

    def alternatives(series: PetSeries) -> dict[str, Any]:
        found = suv_factors(series).provenance.alternatives
        return {rule: factor for rule, factor in found.items() if factor is not None}

    of_siemens = {"autopet": 4.01664014e-4, "qiba": 4.01664014e-4}
    of_ge = {"autopet": 2.42902977e-4, "qiba": 2.42902977e-4}
    of_philips = {"autopet": 7.46453256e-4, "qiba": 7.46374701e-4, "frame_based": 6.53173069e-4}
    assert alternatives(real_siemens()) == pytest.approx(of_siemens, rel=1e-8)
    assert alternatives(real_ge()) == pytest.approx(of_ge, rel=1e-8)
    assert alternatives(real_philips()) == pytest.approx(of_philips, rel=1e-8)
    # Where the file of the last bed comes first, the script's SUV are 16.8 % higher.
    last_bed_first = alternatives(replace(real_siemens(), first_file=8))
    assert last_bed_first == pytest.approx(of_siemens | {"autopet": 4.69011855e-4}, rel=1e-8)


def test_philips_witness_warns_from_one_percent() -> None:
    series = real_philips()
    (frame,) = series.slices
    for ratio, warned in ((1.009, False), (1.011, True), (0.989, True)):
        altered = replace(frame, philips_suv_factor=7.4638e-4 * ratio, philips_activity_factor=1.0)
        warnings = suv_factors(replace(series, slices=(altered,))).provenance.record["warnings"]
        assert any("vendor's factor disagrees" in each for each in warnings) is warned


def test_philips_factors_are_no_witness_beside_counts() -> None:
    (frame,) = real_philips().slices
    counts = replace(
        real_philips(),
        units="CNTS",
        decay_correction="NONE",
        slices=(replace(frame, philips_suv_factor=1.0),),
    )
    provenance = suv_factors(counts).provenance.record
    assert (provenance["rule"], provenance["vendor_factor"]) == ("9+13", None)
    assert not any("vendor's factor" in each for each in provenance["warnings"])


# --- digital reference objects ---------------------------------------------------------------


@pytest.mark.skipif(not DRO.is_dir(), reason="the digital reference objects are not at hand")
@pytest.mark.parametrize("name", sorted(each.name for each in DRO.glob("DRO_*")))
def test_digital_reference_object(name: str) -> None:
    headers = [pydicom.dcmread(path) for path in (DRO / name / "PT").glob("*.dcm")]
    headers.sort(key=lambda header: float(header.ImagePositionPatient[2]))
    factors = suv_factors(read_pet_series(headers)).factors
    suv = np.stack(
        [
            header.pixel_array.T * float(header.RescaleSlope) * factor
            for header, factor in zip(headers, factors, strict=True)
        ],
        axis=-1,
    )
    mask = np.asarray(nibabel.load(DRO / name / "mask" / "DRO_mask.nii.gz").dataobj) > 0
    found = suv[mask].min(), np.median(suv[mask]), suv[mask].max()
    assert tuple(round(float(each), 2) for each in found) == (0.20, 1.00, 4.00)


# --- formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suv_type", "sex", "expected"),
    [
        ("bw", None, 75_000),
        ("lbm-janma", "M", 60_915.3),
        ("lbm-janma", "F", 49_214.4),
        ("lbm-janma", "O", (60_915.3 + 49_214.4) / 2),
        ("bsa", None, 19_813.8),
    ],
)
def test_body_quantity(suv_type: str, sex: str | None, expected: float) -> None:
    assert body_quantity(suv_type, 75.0, 1.85, sex) == pytest.approx(expected, abs=0.06)


def test_a_formula_without_positive_mass_is_refused() -> None:
    with pytest.raises(StudyError, match="lbm-james formula gives no positive mass"):
        body_quantity("lbm-james", 250.0, 1.5, "F")


@pytest.mark.parametrize("half_life_s", [76.4, HALF_LIFE_S, 282_240.0])
@pytest.mark.parametrize("duration_s", [0.5, 120.7, 1800.0])
def test_average_rate_time(half_life_s: float, duration_s: float) -> None:
    def activity(time_s: float) -> float:
        return 0.5 ** (time_s / half_life_s)

    at = average_rate_time_s(np.array([duration_s]), half_life_s)[0]
    mean = quad(activity, 0, duration_s)[0] / duration_s
    assert activity(at) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("header_type", ["BW", "LBMJANMA", "LBMJAMES128", "IBW"])
@pytest.mark.parametrize("suv_type", ["bw", "lbm-janma", "lbm-james", "ibw", "bsa"])
def test_types_convert_into_each_other(header_type: str, suv_type: str) -> None:
    name = {"BW": "bw", "LBMJANMA": "lbm-janma", "LBMJAMES128": "lbm-james", "IBW": "ibw"}
    series = read_pet_series(pet_headers(1))
    activity = suv_factors(series, suv_type)
    stored = suv_factors(series, name[header_type])
    converted = suv_factors(replace(series, units="GML", suv_type=header_type), suv_type)
    assert stored.factors * converted.factors == pytest.approx(activity.factors, rel=1e-12)
    unit = "cm2/ml" if suv_type == "bsa" else "g/ml"
    assert converted.provenance.record["suv_type"] == suv_type
    assert converted.provenance.record["suv_units"] == unit


def test_type_of_suv_scales_by_the_body(case_of_man: PetSeries) -> None:
    for suv_type, share in (
        ("lbm-james", 56.52 / 70),
        ("ibw", 72.38 / 70),
        ("lbm-janma", 55.857107723 / 70),
        ("bsa", 18481.43018 / 70_000),
    ):
        conversion = suv_factors(case_of_man, suv_type)
        assert conversion.factors * AT_START == pytest.approx(share, rel=1e-9)
        assert conversion.provenance.alternatives["autopet"] * AT_START == pytest.approx(share)


@pytest.fixture
def case_of_man() -> PetSeries:
    return read_pet_series(pet_headers(1, PatientSex="M"))


def test_an_unknown_type_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="suv"):
        suv_factors(read_pet_series(pet_headers()), "suv")


# --- reinterpretations -----------------------------------------------------------------------


def test_weight_in_grams() -> None:
    conversion = suv_factors(read_pet_series(pet_headers(PatientWeight=70_000)))
    assert conversion.factors * AT_START == pytest.approx(np.ones(N_SLICES), rel=1e-9)
    assert conversion.provenance.record["weight_kg"] == 70
    (said,) = conversion.provenance.record["reinterpretations"]
    assert "PatientWeight (0010,1030)" in said


@pytest.mark.parametrize(
    ("change", "weight_kg", "dose_bq"),
    [
        ({"weight_kg": 999.9}, 999.9, DOSE_BQ),
        ({"weight_kg": 1000.0}, 1.0, DOSE_BQ),
        ({"dose_bq": 20.0}, WEIGHT_KG, 20e6),
        ({"dose_bq": 20e6}, WEIGHT_KG, 20e6),
        ({"dose_bq": 5000.0}, WEIGHT_KG, 5e9),
        ({"dose_bq": 5e9}, WEIGHT_KG, 5e9),
    ],
)
def test_where_grams_and_megabecquerels_begin(
    change: dict[str, float], weight_kg: float, dose_bq: float
) -> None:
    series = replace(read_pet_series(pet_headers(1)), **change)
    per_suv = activity_per_suv(REFERENCE_S, weight_kg=weight_kg, dose_bq=dose_bq)
    assert suv_factors(series).factors * per_suv == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("dose", [0.3, 8.1, 19.9, 5000.1, 9999.9, 10_000.0, 300_000.0, 5.001e9])
@pytest.mark.parametrize("decay_correction", ["START", "ADMIN"])
def test_doses_in_gbq_or_mci_are_refused(dose: float, decay_correction: str) -> None:
    """8.1 mCi was taken as 8.1 MBq: SUVs 37 times too large."""
    header = {"RadionuclideTotalDose": dose, "DecayCorrection": decay_correction}
    message = refusal(read_pet_series(pet_headers(1, **header)))
    assert f"RadionuclideTotalDose (0018,1074) is {dose:g}" in message
    assert "correct it in the header [Bq]" in message


def test_the_dose_is_not_looked_at_where_the_values_are_suv() -> None:
    series = read_pet_series(pet_headers(1, RadionuclideTotalDose=8.1, Units="GML"))
    assert suv_factors(series).factors == pytest.approx(1)


def test_strict_tells_every_reinterpretation() -> None:
    header = {"PatientWeight": 70_000, "RadionuclideTotalDose": 368.08}
    message = refusal(read_pet_series(pet_headers(**header)), strict=True)
    assert "PatientWeight" in message
    assert "RadionuclideTotalDose" in message


@pytest.mark.parametrize(
    ("injected_s", "half_life_s", "uptake_s", "reinterpretations"),
    [
        (0, HALF_LIFE_S, 3600, 0),
        # An hour later than the reference is still taken by the word, a second more is not.
        (7200, HALF_LIFE_S, -3600, 0),
        (7201, HALF_LIFE_S, 86_400 - 3601, 1),
        # Two half-lives are not an uptake any more, but the clock may say the same.
        (-2 * HALF_LIFE_S + 3601, HALF_LIFE_S, 2 * HALF_LIFE_S - 1, 0),
        (-2 * HALF_LIFE_S + 3599, HALF_LIFE_S, 2 * HALF_LIFE_S + 1, 0),
        (-86_400, HALF_LIFE_S, 3600, 1),
        (-86_400, 41_399.0, 3600, 1),
        (-40_000, 41_401.0, 43_600, 0),
    ],
)
def test_window_of_the_injection(
    injected_s: float, half_life_s: float, uptake_s: float, reinterpretations: int
) -> None:
    series = replace(
        read_pet_series(pet_headers(1)),
        injection=moment(injected_s),
        injection_clock=None,
        half_life_s=half_life_s,
    )
    provenance = suv_factors(series).provenance
    assert provenance.minutes_to_reference == pytest.approx([uptake_s / 60] * 2)
    assert len(provenance.reinterpretations) == reinterpretations


@pytest.mark.parametrize("microsecond", [1, 100_000, 123_456, 687_000, 999_999])
def test_limits_hold_to_the_microsecond(microsecond: int) -> None:
    """The hour after which an injection counts as one of the day before was missed by rounding.

    So the factor was 9000 times too large.
    """
    plain = read_pet_series(pet_headers(1))
    reference = moment(REFERENCE_S).replace(microsecond=microsecond)
    step = timedelta(microseconds=1)
    for later_s, minutes in ((3600, -60), (0, 0)):
        injection = reference + timedelta(seconds=later_s)
        series = replace(plain, series_start=reference, slices=(PetSlice(reference),))
        for found in (
            replace(series, injection=injection, injection_clock=None),
            replace(series, injection=None, injection_clock=injection.time()),
        ):
            provenance = suv_factors(found).provenance.record
            assert provenance["minutes_to_reference"] == pytest.approx([minutes] * 2, abs=1e-6)
            assert ("injection is later" in str(provenance["warnings"])) is (minutes < 0)
    later = replace(
        series, injection=None, injection_clock=(reference + timedelta(hours=1) + step).time()
    )
    assert suv_factors(later).provenance.record["minutes_to_reference"][0] > 1379
    for series_start, rule in ((timedelta(seconds=1), "12b"), (timedelta(seconds=1) + step, "12c")):
        slices = (PetSlice(reference, frame_reference_time_s=0.0, frame_duration_s=60.0),)
        at = replace(plain, series_start=reference + series_start, slices=slices)
        assert suv_factors(at).provenance.record["rule"] == rule


@pytest.mark.parametrize(
    ("clock", "minutes"),
    [(time(10), 60), (time(11, 30), -30), (time(12), -60), (time(12, 1), 1379), (time(23), 720)],
)
def test_day_of_a_clock_time(clock: time, minutes: float) -> None:
    series = replace(read_pet_series(pet_headers(1)), injection=None, injection_clock=clock)
    assert suv_factors(series).provenance.record["minutes_to_reference"] == [minutes, minutes]


def test_long_half_lives_need_the_day() -> None:
    series = replace(read_pet_series(pet_headers(1)), half_life_s=50_000.0)
    for half_life_s, refused in ((41_399.0, False), (41_400.0, True)):
        undated = replace(series, injection=None, half_life_s=half_life_s)
        if refused:
            assert "RadiopharmaceuticalStartDateTime (0018,1078) is missing" in refusal(undated)
        else:
            assert suv_factors(undated).provenance.record["minutes_to_reference"] == [60, 60]
    within = replace(series, injection=moment(REFERENCE_S - 99_999))
    assert suv_factors(within).provenance.record["reinterpretations"] == []
    assert "does not fit" in refusal(replace(series, injection=moment(REFERENCE_S - 100_000)))


@pytest.mark.parametrize(("apart_s", "warned"), [(-61, True), (-59, False)])
def test_the_series_and_its_frames_may_differ_by_a_minute(apart_s: float, warned: bool) -> None:
    series = read_pet_series(pet_headers(N_SLICES, **two_beds(SIEMENS, REFERENCE_S + apart_s)))
    provenance = suv_factors(series).provenance.record
    assert provenance["rule"] == "12b"
    assert any("decay reference disagrees" in w for w in provenance["warnings"]) is warned


@pytest.mark.parametrize(
    ("series_s", "rule"),
    [(3000, "12b"), (3600, "12b"), (3601, "12b"), (3601.1, "12c"), (3700, "12c")],
)
def test_the_series_must_start_with_the_first_bed(series_s: float, rule: str) -> None:
    series = read_pet_series(pet_headers(N_SLICES, **two_beds(SIEMENS, series_s)))
    assert suv_factors(series).provenance.record["rule"] == rule


@pytest.mark.parametrize("decay_correction", ["START", "NONE"])
@pytest.mark.parametrize("vendor", VENDORS.values())
@pytest.mark.parametrize("injection", ["date-time", "clock time"])
def test_a_date_that_did_not_change_at_midnight_does_no_harm(
    vendor: str, decay_correction: str, injection: str
) -> None:
    """The beds after midnight had factors 9000 times too large, then the study was refused."""
    injected = datetime(2025, 1, 1, 22, 30)
    after_s = np.array([5100.0, 5100.0, 5700.0, 5700.0])
    beds = [moment(each, injected) for each in after_s]
    offsets_s = (
        after_s - after_s[0]
        if vendor == GE
        else frame_reference_time_s(after_s, DURATION_S, after_s[0])
    )
    header = on_days(
        beds[0],
        injected,
        Manufacturer=vendor,
        DecayCorrection=decay_correction,
        AcquisitionTime=of_each(tm, beds),
        FrameReferenceTime=of_each(ds, offsets_s * 1000),
    )
    if injection == "clock time":
        header["RadiopharmaceuticalStartDateTime"] = None
    if decay_correction == "NONE":
        header["CorrectedImage"] = ["ATTN"]
    missed = suv_factors(read_pet_series(pet_headers(4, **header)))
    header["AcquisitionDate"] = of_each(da, beds)
    plain = suv_factors(read_pet_series(pet_headers(4, **header)))
    assert missed.factors == pytest.approx(plain.factors, rel=1e-9)
    expected = (
        mean_activity_per_suv(after_s, DURATION_S)
        if decay_correction == "NONE"
        else activity_per_suv(after_s[0])
    )
    assert plain.factors * expected == pytest.approx(np.ones(4), rel=1e-9)


@pytest.mark.parametrize("half_life_s", [HALF_LIFE_S, 282_240.0])
def test_slices_on_both_sides_of_the_injection_are_refused(half_life_s: float) -> None:
    """By the clock; and with a long half-life, which takes a missed midnight by the word."""
    slices = tuple(
        PetSlice(moment(after_s), frame_duration_s=60.0) for after_s in (-3700, -3000, 90_000)
    )
    series = replace(
        read_pet_series(pet_headers(1)),
        slices=slices[:2] if half_life_s == HALF_LIFE_S else slices[1:],
        decay_correction="NONE",
        half_life_s=half_life_s,
    )
    assert "more than half a day apart, or on both sides of the injection" in refusal(series)


def test_one_injection_for_slices_on_both_sides_of_midnight() -> None:
    start = datetime(2025, 1, 1, 23, 55)
    beds = [start, start, start + timedelta(minutes=5), start + timedelta(minutes=5)]
    series = replace(
        read_pet_series(pet_headers()),
        slices=tuple(PetSlice(bed, frame_duration_s=300.0) for bed in beds),
        decay_correction="NONE",
        injection=None,
        injection_clock=time(22, 55),
    )
    minutes = suv_factors(series).provenance.minutes_to_reference
    assert minutes == pytest.approx([60 + 2.493, 65 + 2.493], abs=1e-3)


def headers_of_nuclide(code: str, half_life_s: float, meaning: str = "") -> list[pydicom.Dataset]:
    headers = pet_headers(2, RadionuclideHalfLife=half_life_s)
    for header in headers:
        nuclide = pydicom.Dataset()
        nuclide.CodeValue, nuclide.CodeMeaning = code, meaning
        header.RadiopharmaceuticalInformationSequence[0].RadionuclideCodeSequence = [nuclide]
    return headers


@pytest.mark.parametrize(
    ("code", "half_life_s", "warned"),
    [
        ("C-111A1", 6586.2, False),
        ("77004003", 6588.0, False),
        ("C-111A1", 6586.2 * 1.011, True),
        ("C-111A1", 6586.2 * 0.901, True),
        ("35337001", 4062.6, False),
        ("40937006", 360_806.4, False),
        ("no such code", 1200.0, False),
    ],
)
def test_a_half_life_off_that_of_the_nuclide_is_a_warning(
    code: str, half_life_s: float, warned: bool
) -> None:
    headers = headers_of_nuclide(code, half_life_s)
    warnings = suv_factors(read_pet_series(headers)).provenance.record["warnings"]
    assert any(each.startswith("half-life disagrees") for each in warnings) is warned


@pytest.mark.parametrize(
    ("code", "half_life_s"),
    [
        ("C-111A1", 4057.7),
        ("C-111A1", 109.77),
        ("77004003", 6586.2 * 1.101),
        ("35337001", 6586.2),
        ("35337001", 67.6),
    ],
)
def test_a_half_life_in_minutes_or_of_another_nuclide_is_refused(
    code: str, half_life_s: float
) -> None:
    """109.77, taken as seconds, made SUVs of 4e10."""
    message = refusal(read_pet_series(headers_of_nuclide(code, half_life_s)))
    assert "RadionuclideHalfLife (0018,1075) is " in message
    assert "minutes?" in message


@pytest.mark.parametrize(
    ("meaning", "half_life_s"),
    [("^18^Fluorine", 109.77), ("F-18", 4057.7), ("Gallium 68", 67.6), ("[11C]", 20.36)],
)
def test_the_nuclide_of_an_unknown_code_is_read_from_its_meaning(
    meaning: str, half_life_s: float
) -> None:
    headers = headers_of_nuclide("99LOCAL", half_life_s, meaning)
    assert "that of the nuclide in RadionuclideCodeSequence" in refusal(read_pet_series(headers))


@pytest.mark.parametrize("half_life_s", [109.77, 67.63, 20.36, 1.8295])
def test_a_half_life_in_minutes_or_hours_is_refused_without_a_code_too(half_life_s: float) -> None:
    """109.77, taken as seconds, made SUVs of 5e9 where the header names no nuclide."""
    message = refusal(read_pet_series(pet_headers(RadionuclideHalfLife=half_life_s)))
    assert "RadionuclideHalfLife (0018,1075) is " in message
    assert "minutes?" in message


@pytest.mark.parametrize(("half_life_s", "warned"), [(65_862.0, True), (6586.2, False)])
def test_a_half_life_of_no_nuclide_is_a_warning(half_life_s: float, warned: bool) -> None:
    series = read_pet_series(pet_headers(RadionuclideHalfLife=half_life_s))
    warnings = suv_factors(series).provenance.record["warnings"]
    assert any("the half-life may be wrong" in each for each in warnings) is warned


@pytest.mark.parametrize("vendor", ["GE", "Siemens"])
@pytest.mark.parametrize(
    ("stated", "rule", "uptake_s", "disagrees"),
    [
        (moment(REFERENCE_S), "12a", REFERENCE_S, False),
        (moment(REFERENCE_S + 59), "12a", REFERENCE_S + 59, False),
        (moment(REFERENCE_S + 61), "12a", REFERENCE_S + 61, True),
        (moment(REFERENCE_S + 7200), "12a", REFERENCE_S + 7200, True),
        (moment(-3600), "12a", -3600, True),
        (moment(-3601), "12b", REFERENCE_S, False),
        (moment(43_200), "12a", 43_200, True),
        (moment(43_201), "12b", REFERENCE_S, False),
        (datetime(2025, 1, 1), "12b", REFERENCE_S, False),
        (datetime(1900, 1, 1), "12b", REFERENCE_S, False),
        (datetime(1900, 1, 1, 11), "12b", REFERENCE_S, False),
        (datetime(2031, 5, 1, 11), "12b", REFERENCE_S, False),
    ],
)
def test_the_stated_decay_reference_is_held_against_series_and_frames(
    vendor: str, stated: datetime, rule: str, uptake_s: float, disagrees: bool
) -> None:
    """Two hours off gave SUV x 2.13 silently; overwritten by midnight x 201."""
    header = two_beds(VENDORS[vendor], REFERENCE_S)
    provenance = suv_factors(stating(vendor, stated, **header)).provenance
    assert provenance.rule == rule
    assert provenance.minutes_to_reference == pytest.approx([uptake_s / 60] * 2)
    warned = [each for each in provenance.record["warnings"] if "decay reference disagrees" in each]
    assert bool(warned) is disagrees
    said = provenance.reinterpretations
    assert [REFERENCE_TAG[vendor] in each for each in [*warned, *said]] == [True] * (
        disagrees + (rule == "12b")
    )


REFERENCE_TAG = {"GE": "(0009,100D)", "Siemens": "(0071,1022)"}


def stating(vendor: str, reference: datetime, **header: Any) -> PetSeries:
    """A series whose vendor states the decay reference."""
    tag, creator = {
        "GE": (GE_REFERENCE, "GEMS_PETD_01"),
        "Siemens": (SIEMENS_REFERENCE, "SIEMENS MED PT"),
    }[vendor]
    private = {tag: (creator, "DT", dt(reference))}
    return read_pet_series(pet_headers(N_SLICES, private=private, **header))


def test_the_stated_decay_reference_stands_where_series_and_frames_do_not_agree() -> None:
    """The series may start earlier, with a scout view; then its start is no witness."""
    series = stating("Siemens", moment(REFERENCE_S), **two_beds(SIEMENS, REFERENCE_S - 300))
    scouted = replace(series, series_start=moment(REFERENCE_S - 900))
    provenance = suv_factors(scouted).provenance.record
    assert (provenance["rule"], provenance["warnings"]) == ("12a", [])


def test_the_stated_decay_reference_of_a_rewritten_series_is_held_against_its_frames() -> None:
    """The series was rewritten, so that its start says nothing of the injection."""
    series = stating("GE", moment(50_000), **two_beds(GE, REFERENCE_S))
    late = replace(series, series_start=moment(REFERENCE_S + 5400))
    assert suv_factors(late).provenance.record["rule"] == "12c"
    silent = replace(
        late, slices=tuple(replace(each, frame_reference_time_s=None) for each in late.slices)
    )
    assert suv_factors(silent).provenance.record["rule"] == "12a"
    midnight = stating("GE", datetime(1900, 1, 1), **two_beds(GE, REFERENCE_S))
    late = replace(midnight, series_start=moment(REFERENCE_S + 5400))
    assert suv_factors(late).provenance.record["rule"] == "12c"
    assert suv_factors(late).factors == pytest.approx(suv_factors(midnight).factors, rel=1e-9)


@pytest.mark.parametrize("vendor", ["GE", "Siemens"])
@pytest.mark.parametrize(
    ("series_s", "with_frames", "named"),
    [
        (REFERENCE_S + 5400, True, ["FrameReferenceTime"]),
        (REFERENCE_S, False, ["SeriesTime"]),
        (REFERENCE_S - 900, True, ["SeriesTime", "FrameReferenceTime"]),
        (REFERENCE_S + 5400, False, None),
    ],
)
def test_a_stated_decay_reference_far_from_whatever_else_tells_it_is_a_warning(
    vendor: str, series_s: float, with_frames: bool, named: list[str] | None
) -> None:
    """Two hours off gave SUV x 2.13 silently where the series was rewritten, or had no frames."""
    header = two_beds(VENDORS[vendor], series_s)
    if not with_frames:
        header["FrameReferenceTime"] = None
    provenance = suv_factors(stating(vendor, moment(REFERENCE_S + 7200), **header)).provenance
    warned = [each for each in provenance.record["warnings"] if "decay reference disagrees" in each]
    assert provenance.rule == "12a"
    assert len(warned) == (named is not None)
    assert all(name in each for each in warned for name in named or ())
    right = suv_factors(stating(vendor, moment(REFERENCE_S), **header)).provenance
    assert right.warnings == ()


def test_a_frame_reference_time_of_0_is_no_witness() -> None:
    header = {**two_beds(SIEMENS, REFERENCE_S + 5400), "FrameReferenceTime": 0}
    assert suv_factors(stating("Siemens", moment(REFERENCE_S), **header)).provenance.warnings == ()


@pytest.mark.parametrize("vendor", VENDORS.values())
def test_frames_of_a_rewritten_series_that_refer_to_several_moments_are_a_warning(
    vendor: str,
) -> None:
    """FrameReferenceTime 0 in two beds of a GE scan: the second was 4 % high, silently."""
    rewritten = two_beds(vendor, REFERENCE_S + 5400)
    plain = suv_factors(read_pet_series(pet_headers(**rewritten))).provenance
    assert (plain.rule, plain.warnings) == ("12c", ())
    rewritten["FrameReferenceTime"] = PerSlice(1000, 1000, 1000, 1000)
    warned = suv_factors(read_pet_series(pet_headers(**rewritten))).provenance.record["warnings"]
    assert any("the slices refer to moments 6 min apart" in each for each in warned)


def test_a_dummied_date_of_injection_dummies_no_decay_reference() -> None:
    stated = stating("GE", moment(REFERENCE_S), **two_beds(GE, REFERENCE_S))
    dummied = replace(stated, injection=datetime(1900, 1, 1, 10))
    assert suv_factors(dummied).provenance.record["rule"] == "12a"
    assert suv_factors(dummied).factors == pytest.approx(suv_factors(stated).factors, rel=1e-9)
    both = replace(
        stating("GE", moment(-7200), **two_beds(GE, REFERENCE_S)),
        injection=datetime(1900, 1, 1, 10),
    )
    assert suv_factors(both).provenance.record["rule"] == "12b"
    assert suv_factors(both).factors == pytest.approx(suv_factors(stated).factors, rel=1e-9)


def test_a_long_half_life_allows_a_late_decay_reference() -> None:
    late = stating("GE", moment(200_000), **two_beds(GE, REFERENCE_S), RadionuclideHalfLife=282_276)
    assert suv_factors(late).provenance.record["rule"] == "12a"


def test_a_dummied_decay_reference_of_a_long_half_life_is_not_used() -> None:
    header = {**two_beds(GE, REFERENCE_S), "RadionuclideHalfLife": 282_276}
    provenance = suv_factors(stating("GE", datetime(1900, 1, 1, 11), **header)).provenance
    assert provenance.rule == "12b"
    assert provenance.minutes_to_reference == pytest.approx([REFERENCE_S / 60] * 2)


@pytest.mark.parametrize(
    ("reference", "warned"),
    [
        (dt(moment(REFERENCE_S)), False),
        (dt(moment(0)), False),
        (dt(moment(REFERENCE_S + 7200)), True),
        ("19000101000000", True),
    ],
)
def test_the_decay_reference_of_an_enhanced_object_is_held_against_its_frames(
    reference: str, warned: bool
) -> None:
    """Two hours off gave SUV x 2.13 silently."""
    header = enhanced_pet_header(2, DecayCorrectionDateTime=reference)
    for frame in header.PerFrameFunctionalGroupsSequence:
        frame.FrameContentSequence[0].FrameAcquisitionDateTime = dt(moment(REFERENCE_S))
    warnings = suv_factors(read_pet_series([header])).provenance.record["warnings"]
    assert any("decay reference disagrees" in each for each in warnings) is warned


def test_a_dummied_decay_reference_is_refused_by_strict() -> None:
    series = stating("GE", datetime(1900, 1, 1), **two_beds(GE, REFERENCE_S))
    message = refusal(series, strict=True)
    assert "(0009,100D) reads 00:00:00: it is not used" in message


DATES = ("SeriesDate", "AcquisitionDate")


@pytest.mark.parametrize("vendor", VENDORS.values())
@pytest.mark.parametrize("series_s", [REFERENCE_S, REFERENCE_S + 5400])
@pytest.mark.parametrize("injection", ["date-time", "clock time"])
@pytest.mark.parametrize("missing", [DATES, DATES[:1], DATES[1:]])
@pytest.mark.parametrize("injected", [datetime(2025, 1, 1, 10), datetime(2025, 1, 1, 22, 57, 30)])
def test_times_whose_dates_were_dropped_count_by_the_clock(
    vendor: str, series_s: float, injection: str, missing: tuple[str, ...], injected: datetime
) -> None:
    """The second injection: the series starts before midnight, its second bed after it."""
    beds = [moment(each, injected) for each in BEDS_S]
    header = two_beds(vendor, series_s) | {
        "SeriesDate": da(moment(series_s, injected)),
        "SeriesTime": tm(moment(series_s, injected)),
        "AcquisitionDate": of_each(da, beds),
        "AcquisitionTime": of_each(tm, beds),
        "RadiopharmaceuticalStartDateTime": dt(injected) if injection == "date-time" else None,
        "RadiopharmaceuticalStartTime": tm(injected),
    }
    dated = suv_factors(read_pet_series(pet_headers(N_SLICES, **header)))
    found = suv_factors(read_pet_series(pet_headers(N_SLICES, **(header | dict.fromkeys(missing)))))
    assert found.factors == pytest.approx(dated.factors, rel=1e-9)
    assert found.provenance.record["rule"] == dated.provenance.record["rule"]
    said = [
        each
        for each in found.provenance.record["reinterpretations"]
        if "by the clock alone" in each
    ]
    assert [[keyword in each for keyword in DATES] for each in said] == [
        [keyword in missing for keyword in DATES]
    ]


@pytest.mark.parametrize("stated", [datetime(1900, 1, 1), datetime(2025, 1, 1, 11, 58)])
def test_dropped_dates_keep_a_scan_together_whatever_the_vendors_date(stated: datetime) -> None:
    """The series starts at 11:58, before noon, its second bed is at 12:03."""
    injected = datetime(2025, 1, 1, 10, 58)
    header = two_beds(GE, REFERENCE_S) | {
        "SeriesDate": None,
        "SeriesTime": tm(moment(REFERENCE_S, injected)),
        "AcquisitionDate": None,
        "AcquisitionTime": of_each(tm, [moment(each, injected) for each in BEDS_S]),
        "RadiopharmaceuticalStartDateTime": None,
        "RadiopharmaceuticalStartTime": tm(injected),
    }
    provenance = suv_factors(stating("GE", stated, **header)).provenance
    assert provenance.rules == (
        (Rule.BQML, Rule.SERIES_START if stated.year == 1900 else Rule.STATED_REFERENCE)
    )
    assert provenance.minutes_to_reference == pytest.approx((60, 60))
    assert provenance.warnings == ()


def test_no_date_of_the_scan_is_refused_for_long_half_lives_and_by_strict() -> None:
    header = dict.fromkeys(DATES)
    long_lived = read_pet_series(pet_headers(1, RadionuclideHalfLife=282_276.0, **header))
    assert "SeriesDate (0008,0021) and AcquisitionDate (0008,0022) missing" in refusal(long_lived)
    assert "by the clock alone" in refusal(read_pet_series(pet_headers(1, **header)), strict=True)
    acquired = pet_headers(1, RadionuclideHalfLife=282_276.0, AcquisitionDate=None)
    provenance = suv_factors(read_pet_series(acquired)).provenance.record
    assert provenance["minutes_to_reference"] == [60, 60]


@pytest.mark.parametrize(
    ("vendor", "frame_reference_ms", "warned"),
    [(SIEMENS, 0, True), ("CPS", 0, True), (GE, 0, False), (SIEMENS, 150_000, False)],
)
def test_a_frame_reference_time_of_0_is_a_warning_with_what_qiba_gives(
    vendor: str, frame_reference_ms: int, warned: bool
) -> None:
    """QIBA refers to the first acquisition; so that T_ave of 180 s is the difference."""
    header = {
        "Manufacturer": vendor,
        "FrameReferenceTime": frame_reference_ms,
        "ActualFrameDuration": 180_000,
        "SeriesTime": tm(moment(REFERENCE_S + 2700)),
    }
    provenance = suv_factors(read_pet_series(pet_headers(2, **header))).provenance.record
    assert provenance["rule"] == "12c"
    assert [
        each.startswith("FrameReferenceTime (0054,1300) is 0") for each in provenance["warnings"]
    ] == ([True] * warned)
    if warned:
        by_qiba = 1 / activity_per_suv(REFERENCE_S)
        (warning,) = provenance["warnings"]
        assert f"{by_qiba:.6g} (-0.94%)" in warning
        assert pytest.approx(-0.0094, abs=5e-5) == 2 ** (-90 / HALF_LIFE_S) - 1


def test_a_frame_reference_time_of_0_is_no_matter_where_the_series_starts_in_time() -> None:
    series = read_pet_series(pet_headers(2, FrameReferenceTime=0, ActualFrameDuration=60_000))
    assert suv_factors(series).provenance.record["warnings"] == []


def test_disagreeing_times_of_injection_are_a_warning() -> None:
    series = read_pet_series(pet_headers(RadiopharmaceuticalStartTime=tm(moment(-600))))
    (warning,) = suv_factors(series).provenance.record["warnings"]
    assert warning.startswith("injection times disagree")
    assert "10 min" in warning
    assert suv_factors(series).factors * AT_START == pytest.approx(np.ones(N_SLICES), rel=1e-9)


@pytest.mark.parametrize("day", ["19000101", "20250101"])
def test_an_injection_dummied_to_midnight_takes_the_clock_time(day: str) -> None:
    """It gave SUV x 44, with warnings."""
    header = read_pet_series(pet_headers(RadiopharmaceuticalStartDateTime=day + "000000"))
    conversion = suv_factors(header)
    plain = suv_factors(read_pet_series(pet_headers()))
    assert conversion.factors == pytest.approx(plain.factors, rel=1e-12)
    assert "reads 00:00:00 and does not fit" in conversion.provenance.reinterpretations[0]
    assert conversion.provenance.warnings == ()


def test_an_injection_at_midnight_is_no_dummy() -> None:
    midnight = datetime(2025, 1, 2)
    series = read_pet_series(pet_headers(**on_days(midnight + timedelta(hours=1), midnight)))
    provenance = suv_factors(series).provenance
    assert (provenance.reinterpretations, provenance.warnings) == ((), ())
    assert provenance.minutes_to_reference == pytest.approx([60, 60])


def test_times_that_are_one_dummy_are_a_warning() -> None:
    """All times overwritten by midnight: no decay at all, which was silent."""
    series = read_pet_series(pet_headers(**on_days(datetime(1900, 1, 1), datetime(1900, 1, 1))))
    warnings = suv_factors(series).provenance.record["warnings"]
    assert any("less than a minute apart" in each for each in warnings)


def test_values_that_refer_to_the_injection_are_no_dummies() -> None:
    """The series starts with the injection, as the clock of some list-mode scans does."""
    header = {"SeriesTime": tm(INJECTION), "FrameReferenceTime": None}
    series = read_pet_series(pet_headers(**header))
    assert suv_factors(series).provenance.warnings == ()


def test_injection_after_the_scan_is_a_warning() -> None:
    series = replace(
        read_pet_series(pet_headers()), injection=moment(REFERENCE_S + 60), injection_clock=None
    )
    assert suv_factors(series).provenance.record["warnings"] == [
        "injection is later than the decay reference"
    ]


# --- UTC offsets -----------------------------------------------------------------------------


def test_offsets_are_honoured() -> None:
    series = read_pet_series(pet_headers())
    east = timezone(timedelta(hours=2))
    aware = replace(
        series,
        injection=INJECTION.replace(tzinfo=east).astimezone(UTC),
        injection_clock=INJECTION.time().replace(tzinfo=east),
        series_start=moment(REFERENCE_S).replace(tzinfo=east),
        slices=tuple(
            replace(each, acquisition=moment(REFERENCE_S).replace(tzinfo=east))
            for each in series.slices
        ),
    )
    assert (suv_factors(aware).factors == suv_factors(series).factors).all()
    assert suv_factors(aware).provenance.record["reinterpretations"] == []
    assert suv_factors(aware).provenance.record["warnings"] == []


def test_times_without_offset_are_taken_at_the_one_there_is() -> None:
    series = read_pet_series(pet_headers())
    mixed = replace(series, injection=INJECTION.replace(tzinfo=timezone(timedelta(hours=2))))
    conversion = suv_factors(mixed)
    assert (conversion.factors == suv_factors(series).factors).all()
    (said,) = conversion.provenance.record["reinterpretations"]
    assert "TimezoneOffsetFromUTC (0008,0201)" in said


def test_times_without_offset_beside_two_offsets_are_refused() -> None:
    series = read_pet_series(pet_headers())
    reference = moment(REFERENCE_S).replace(tzinfo=UTC)
    mixed = replace(
        series,
        injection=INJECTION.replace(tzinfo=timezone(timedelta(hours=2))),
        slices=tuple(replace(each, decay_reference=reference) for each in series.slices),
    )
    assert "TimezoneOffsetFromUTC (0008,0201)" in refusal(mixed)


def test_an_injection_in_two_zones_leaves_that_of_the_scan_open() -> None:
    """10:00 at UTC+2 was written as 08:00 UTC: the scan at 11:00 was taken as 11:00 UTC."""
    plain = read_pet_series(pet_headers())
    utc = replace(plain, injection=(INJECTION - timedelta(hours=2)).replace(tzinfo=UTC))
    assert "different time zones" in refusal(utc)
    assert "TimezoneOffsetFromUTC (0008,0201) is missing" in refusal(utc)
    # A few minutes between them are a matter of care, not of zones.
    careless = replace(plain, injection=(INJECTION - timedelta(minutes=14)).replace(tzinfo=UTC))
    minutes = suv_factors(careless).provenance.record["minutes_to_reference"]
    assert minutes == pytest.approx([74] * 2)
    by_date_time_alone = replace(utc, injection_clock=None)
    assert suv_factors(by_date_time_alone).provenance.record["minutes_to_reference"] == [180, 180]


def test_the_day_of_a_clock_time_is_that_of_its_zone() -> None:
    """23:30 before a scan at 00:30 local time, which is 22:30 before 23:30 in UTC."""
    east = timezone(timedelta(hours=1))
    start = datetime(2025, 1, 2, 0, 30, tzinfo=east)
    series = replace(
        read_pet_series(pet_headers(1)),
        injection=None,
        injection_clock=time(0, 10, tzinfo=east),
        series_start=datetime(2025, 1, 1, 23, 50, tzinfo=east),
        slices=(PetSlice(datetime(2025, 1, 1, 23, 50, tzinfo=east)),),
    )
    assert suv_factors(series).provenance.record["minutes_to_reference"] == [1420.0, 1420.0]
    later = replace(
        series,
        injection_clock=time(23, 30, tzinfo=east),
        series_start=start,
        slices=(PetSlice(start),),
    )
    assert suv_factors(later).provenance.record["minutes_to_reference"] == [60.0, 60.0]


# --- alternatives ----------------------------------------------------------------------------


def test_alternatives_of_a_rewritten_series() -> None:
    headers = pet_headers(**two_beds(SIEMENS, 5400))
    headers[0].filename, headers[3].filename = "b.dcm", "a.dcm"
    for header in headers[1:3]:
        header.filename = "c.dcm"
    alternatives = suv_factors(read_pet_series(headers)).provenance.alternatives
    # The script takes the first file alone, here of the second bed, six minutes on.
    assert alternatives["autopet"] * activity_per_suv(3960) == pytest.approx(1)
    assert alternatives["qiba"] * AT_START == pytest.approx(1)
    assert alternatives["frame_based"] * AT_START == pytest.approx(1)


def test_alternatives_of_the_script_ignore_the_header() -> None:
    series = read_pet_series(pet_headers(DecayCorrection="ADMIN"))
    alternatives = suv_factors(series).provenance.alternatives
    assert alternatives["autopet"] * AT_START == pytest.approx(1)
    assert alternatives["qiba"] is None
    assert alternatives["frame_based"] is None


def test_qiba_takes_the_earliest_acquisition_at_last() -> None:
    header = {**two_beds(GE, 5400), "FrameReferenceTime": 0}
    private = {GE_REFERENCE: ("GEMS_PETD_01", "DT", dt(moment(1800)))}
    without = read_pet_series(pet_headers(**header))
    stated = read_pet_series(pet_headers(private=private, **header))
    for series, activity in ((without, AT_START), (stated, activity_per_suv(1800))):
        alternatives = suv_factors(series).provenance.alternatives
        assert alternatives["qiba"] * activity == pytest.approx(1)


def test_qiba_knows_the_private_date_time_of_ge_alone() -> None:
    private = {SIEMENS_REFERENCE: ("SIEMENS MED PT", "DT", dt(moment(1800)))}
    conversion = suv_factors(
        read_pet_series(pet_headers(private=private, **two_beds(SIEMENS, 5400)))
    )
    assert conversion.factors * activity_per_suv(1800) == pytest.approx(np.ones(N_SLICES))
    assert conversion.provenance.alternatives["qiba"] * AT_START == pytest.approx(1)


def test_qiba_of_other_units() -> None:
    series = read_pet_series(pet_headers(1, Manufacturer=PHILIPS))
    counts = replace(series, units="CNTS")

    def qiba(of: PetSeries) -> float | None:
        return suv_factors(of).provenance.alternatives["qiba"]

    scaled = replace(series.slices[0], philips_suv_factor=0.0005, philips_activity_factor=2.5)
    assert qiba(replace(series, units="GML", suv_type="LBMJAMES128")) == 1
    assert qiba(replace(series, units="CM2ML")) is None
    assert qiba(replace(counts, slices=(scaled,))) == 0.0005
    by_activity = replace(scaled, philips_suv_factor=None)
    assert qiba(replace(counts, slices=(by_activity,))) == pytest.approx(2.5 / AT_START)


def test_alternatives_that_cannot_be_formed_are_null() -> None:
    series = replace(
        read_pet_series(pet_headers(1)), units="GML", weight_kg=None, injection_clock=None
    )
    provenance = suv_factors(series).provenance.record
    assert provenance["alternatives"] == {"autopet": None, "qiba": 1.0, "frame_based": None}
    assert provenance["weight_kg"] is None
    # Rb-82 by the clocks of the script: so many half-lives that no number holds the factor.
    rubidium = replace(
        read_pet_series(pet_headers(1)),
        half_life_s=76.4,
        decay_correction="ADMIN",
        injection_clock=time(0, 0),
    )
    rubidium = replace(rubidium, slices=(PetSlice(datetime(2025, 1, 1, 23, 59)),))
    assert suv_factors(rubidium).provenance.alternatives["autopet"] is None


# --- values that are SUV, and one header for many slices -------------------------------------


def test_already_suv() -> None:
    series = read_pet_series(pet_headers(PatientWeight=70_000))
    conversion = already_suv([1.0] * 3, "lbm-janma", series)
    assert (conversion.factors == np.ones(3)).all()
    assert conversion.provenance.record["rule"] == "given as SUV"
    assert conversion.provenance.record["suv_type"] == "lbm-janma"
    assert conversion.provenance.record["weight_kg"] == 70
    assert conversion.provenance.record.keys() == suv_factors(series).provenance.record.keys()
    assert already_suv([1.0] * 3).provenance.record["weight_kg"] is None
    with pytest.raises(StudyError, match="refused by --strict: PatientWeight"):
        already_suv([1.0] * 3, "bw", series, strict=True)


def test_units_can_be_overridden() -> None:
    series = replace(read_pet_series(pet_headers(Units="GML")), units="BQML", suv_type=None)
    assert suv_factors(series).factors * AT_START == pytest.approx(np.ones(N_SLICES), rel=1e-9)


def test_one_header_stands_for_all_slices() -> None:
    one = suv_factors(read_pet_series(pet_headers(1)))
    assert (spread_factors(one, 5) == np.full(5, one.factors[0])).all()
    two = suv_factors(read_pet_series(pet_headers(2)))
    assert spread_factors(two, 2) is two.factors
    with pytest.raises(StudyError, match="2 PET headers for 5 slices"):
        spread_factors(two, 5)


def test_one_header_cannot_stand_for_uncorrected_slices() -> None:
    conversion = suv_factors(read_pet_series(pet_headers(1, DecayCorrection="NONE")))
    assert len(spread_factors(conversion, 1)) == 1
    with pytest.raises(StudyError, match="DecayCorrection"):
        spread_factors(conversion, 5)


def test_decay_both_corrected_and_not_is_a_warning() -> None:
    series = read_pet_series(pet_headers(1, DecayCorrection="NONE"))
    (warning,) = suv_factors(series).provenance.record["warnings"]
    assert "DECY" in warning


# --- laws ------------------------------------------------------------------------------------

uptakes = st.floats(0, 1.9 * HALF_LIFE_S)


@settings(deadline=None, derandomize=True, database=None)
@given(share=st.floats(0.1, 10), uptake_s=uptakes)
def test_factor_grows_with_weight_and_falls_with_dose(share: float, uptake_s: float) -> None:
    series = replace(
        read_pet_series(pet_headers(2)), injection=moment(REFERENCE_S - uptake_s), sex=None
    )
    factors = suv_factors(series).factors
    heavier = suv_factors(replace(series, weight_kg=WEIGHT_KG * share)).factors
    stronger = suv_factors(replace(series, dose_bq=DOSE_BQ * share)).factors
    assert heavier == pytest.approx(factors * share, rel=1e-12)
    assert stronger == pytest.approx(factors / share, rel=1e-12)
    assert factors * activity_per_suv(uptake_s) == pytest.approx(np.ones(2), rel=1e-9)


@settings(deadline=None, derandomize=True, database=None)
@given(
    case=st.sampled_from([each for each in CONVERT if "time only" not in each.name]),
    shift=st.timedeltas(timedelta(days=-20_000), timedelta(days=20_000)),
)
def test_only_differences_of_time_count(case: Case, shift: timedelta) -> None:
    series = case.series()
    if not series.injection or suv_factors(series).provenance.record["reinterpretations"]:
        shift = timedelta(days=shift.days)  # the time of day counts, the day does not

    def later(at: datetime | None) -> datetime | None:
        return None if at is None else at + shift

    clock = series.injection_clock and (datetime.combine(INJECTION, series.injection_clock) + shift)
    shifted = replace(
        series,
        injection=later(series.injection),
        injection_clock=clock and clock.time(),
        series_start=later(series.series_start),
        slices=tuple(
            replace(
                each,
                acquisition=later(each.acquisition),
                decay_reference=later(each.decay_reference),
            )
            for each in series.slices
        ),
    )
    assert suv_factors(shifted).factors == pytest.approx(suv_factors(series).factors, rel=1e-9)
    assert suv_factors(shifted).provenance.record["rule"] == case.rule


@pytest.mark.parametrize("case", CONVERT, ids=lambda case: case.name)
def test_provenance_is_json_without_identity(case: Case) -> None:
    provenance = suv_factors(case.series()).provenance.record
    text = json.dumps(provenance, allow_nan=False)
    assert json.loads(text) == provenance
    assert not re.search(r"Doe|4711|\b(19|20)\d{6}|\d{4}-\d\d-\d\d|\d\d:\d\d", text)
    assert provenance["factor_range"][0] <= provenance["factor_range"][1]
