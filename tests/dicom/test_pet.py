"""PET headers as scanners, archives and anonymisers leave them."""

import json
from copy import deepcopy
from datetime import UTC, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pet_headers import (
    DURATION_S,
    INJECTION,
    REFERENCE_S,
    PerSlice,
    activity_per_suv,
    dt,
    enhanced_pet_header,
    mean_activity_per_suv,
    moment,
    pet_headers,
    phantom_suv,
    put_raw,
    write_enhanced_pet,
    write_pet_series,
)
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from common.dicom.pet import read_pet_series
from common.errors import StudyError
from common.suv.factors import suv_factors
from common.suv.inputs import PetSeries, Source

LEGACY_CONVERTED = "1.2.840.10008.5.1.4.1.1.128.1"
TRACERS = "RadiopharmaceuticalInformationSequence"


def read_one(**overrides: Any) -> PetSeries:
    return read_pet_series(pet_headers(1, **overrides))


def refusal(*headers: Dataset, **options: Any) -> str:
    with pytest.raises(StudyError) as caught:
        read_pet_series(headers, **options)
    return str(caught.value)


def test_every_attribute_is_read() -> None:
    series = read_pet_series(
        pet_headers(
            2,
            SUVType="BW",
            Manufacturer="GE MEDICAL SYSTEMS",
            FrameReferenceTime=PerSlice(150_000, 450_500.5),
        )
    )
    assert series.units == "BQML"
    assert series.suv_type == "BW"
    assert series.decay_correction == "START"
    assert series.corrected_image == {"NORM", "DTIM", "ATTN", "SCAT", "DECY", "RAN"}
    assert series.manufacturer == "GE"
    assert (series.weight_kg, series.height_m, series.sex) == (70.0, 1.75, "F")
    assert (series.dose_bq, series.half_life_s) == (368_080_000.0, 6586.2)
    assert series.injection == INJECTION
    assert series.injection_clock == INJECTION.time()
    assert series.series_start == moment(REFERENCE_S)
    assert [each.acquisition for each in series.slices] == [moment(REFERENCE_S)] * 2
    assert [each.frame_reference_time_s for each in series.slices] == [150.0, 450.5005]
    assert [each.frame_duration_s for each in series.slices] == [300.0] * 2
    assert series.source is Source.SINGLE_FRAME


def test_absent_and_empty_are_none() -> None:
    absent = dict.fromkeys(
        ("Units", "DecayCorrection", "PatientWeight", "PatientSize", "PatientSex", "SeriesTime")
    )
    for series in (read_one(**absent), read_one(**dict.fromkeys(absent, ""))):
        assert series.units is series.decay_correction is None
        assert series.weight_kg is series.height_m is series.sex is series.series_start is None
    without_tracer = read_one(**{TRACERS: []})
    assert without_tracer.dose_bq is without_tracer.injection is None


@pytest.mark.parametrize(
    ("name", "manufacturer"),
    [
        ("GE MEDICAL SYSTEMS", "GE"),
        ("GE", "GE"),
        ("GEMS", "GE"),
        ("General Electric", "GE"),
        ("Gerber", "OTHER"),
        ("SIEMENS", "SIEMENS"),
        ("Siemens Healthineers", "SIEMENS"),
        ("Philips Medical Systems", "PHILIPS"),
        ("UIH", "OTHER"),
        (None, "OTHER"),
    ],
)
def test_manufacturer(name: str | None, manufacturer: str) -> None:
    assert read_one(Manufacturer=name).manufacturer == manufacturer


@pytest.mark.parametrize("name", [None, "", "REMOVED"])
@pytest.mark.parametrize(
    ("tag", "creator", "manufacturer"),
    [
        (0x0009100D, "GEMS_PETD_01", "GE"),
        (0x00711022, "SIEMENS MED PT", "SIEMENS"),
        (0x70531000, "Philips PET Private Group", "PHILIPS"),
        (0x70531000, "", "OTHER"),
    ],
)
def test_a_manufacturer_whose_name_was_removed_is_told_by_the_private_blocks(
    name: str | None, tag: int, creator: str, manufacturer: str
) -> None:
    private = {tag: (creator, "LO", "1")}
    assert read_one(private=private, Manufacturer=name).manufacturer == manufacturer


def test_codes_are_dicoms_own() -> None:
    series = read_one(Units="bqml ", DecayCorrection="Doe", SUVType="JANE", PatientSex="X")
    assert series.units == "BQML"
    assert {series.decay_correction, series.suv_type, series.sex} == {"UNKNOWN"}


def test_a_correction_counts_on_every_slice_only() -> None:
    both = PerSlice(["ATTN", "DECY", "SCAT"], ["DECY", "ATTN"])
    assert read_pet_series(pet_headers(2, CorrectedImage=both)).corrected_image == {"ATTN", "DECY"}
    one = PerSlice(["ATTN", "DECY"], "DECY")
    assert read_pet_series(pet_headers(2, CorrectedImage=one)).corrected_image == {"DECY"}
    none = PerSlice(["ATTN", "DECY"], None)
    assert read_pet_series(pet_headers(2, CorrectedImage=none)).corrected_image == frozenset()


# --- times -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1105", time(11, 5)),
        ("110507", time(11, 5, 7)),
        ("110507.", time(11, 5, 7)),
        ("110507.25", time(11, 5, 7, 250_000)),
        ("110507.1234567", time(11, 5, 7, 123_456)),
        ("11:05:07.5", time(11, 5, 7, 500_000)),
        ("110560", time(11, 5, 59)),
    ],
)
def test_times_of_day(text: str, expected: time) -> None:
    (header,) = pet_headers(1)
    put_raw(header[TRACERS][0], "RadiopharmaceuticalStartTime", text.encode())
    put_raw(header, "SeriesTime", text.encode() + b" ")
    put_raw(header, "SeriesDate", b"2025.01.02")
    series = read_pet_series([header])
    assert series.injection_clock == expected
    assert series.series_start == datetime.combine(datetime(2025, 1, 2), expected)


def test_an_hour_alone_is_no_time_of_day() -> None:
    """DICOM allows it, so it must not refuse a header whose SUV needs no time."""
    (header,) = pet_headers(1, Units="GML")
    for keyword in ("SeriesTime", "AcquisitionTime"):
        put_raw(header, keyword, b"11")
    series = read_pet_series([header])
    assert series.series_start is series.slices[0].acquisition is None
    assert suv_factors(series).factors == [1]


EAST = timezone(timedelta(hours=5, minutes=30))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20250102030405.678901", datetime(2025, 1, 2, 3, 4, 5, 678_901)),
        ("20250102030405.6", datetime(2025, 1, 2, 3, 4, 5, 600_000)),
        ("20250102030405", datetime(2025, 1, 2, 3, 4, 5)),
        ("202501020304", datetime(2025, 1, 2, 3, 4)),
        ("20250102030405+0530", datetime(2025, 1, 2, 3, 4, 5, tzinfo=EAST)),
        ("20250102030405.5-0000", datetime(2025, 1, 2, 3, 4, 5, 500_000, tzinfo=UTC)),
        ("2025010203", None),
        ("20250102", None),
        ("2025", None),
        ("20250102+0100", None),
    ],
)
def test_date_times(text: str, expected: datetime | None) -> None:
    injection = read_one(RadiopharmaceuticalStartDateTime=text).injection
    assert injection == expected
    assert (injection and injection.utcoffset()) == (expected and expected.utcoffset())


def test_offset_of_the_header_holds_for_times_without_their_own() -> None:
    series = read_one(TimezoneOffsetFromUTC="+0530", RadiopharmaceuticalStartDateTime=dt(INJECTION))
    assert series.injection == INJECTION.replace(tzinfo=EAST)
    assert series.series_start == moment(REFERENCE_S).replace(tzinfo=EAST)
    assert series.slices[0].acquisition == moment(REFERENCE_S).replace(tzinfo=EAST)
    assert series.injection_clock is not None
    assert series.injection_clock.utcoffset() == timedelta(hours=5.5)
    own = read_one(
        TimezoneOffsetFromUTC="+0530",
        RadiopharmaceuticalStartDateTime=dt(INJECTION - timedelta(hours=5.5)) + "+0000",
    )
    assert own.injection == INJECTION.replace(tzinfo=EAST)
    assert suv_factors(own).factors * activity_per_suv(REFERENCE_S) == pytest.approx(1, rel=1e-9)
    assert suv_factors(own).provenance.record["reinterpretations"] == []


def test_acquisition_date_time_stands_in() -> None:
    series = read_one(
        AcquisitionDate=None, AcquisitionTime=None, AcquisitionDateTime=dt(moment(REFERENCE_S))
    )
    assert series.slices[0].acquisition == moment(REFERENCE_S)


# --- private attributes ----------------------------------------------------------------------

GE_CREATOR, SIEMENS_CREATOR = "GEMS_PETD_01", "SIEMENS MED PT"
PHILIPS_CREATOR = "Philips PET Private Group"


@pytest.mark.parametrize(
    ("manufacturer", "tag", "creator"),
    [
        ("GE MEDICAL SYSTEMS", 0x0009100D, GE_CREATOR),
        ("GE MEDICAL SYSTEMS", 0x0009110D, GE_CREATOR),
        ("GE MEDICAL SYSTEMS", 0x0009100D, ""),
        ("SIEMENS", 0x00711022, SIEMENS_CREATOR),
        ("SIEMENS", 0x0071FE22, SIEMENS_CREATOR),
        ("SIEMENS", 0x00711022, ""),
    ],
)
@pytest.mark.parametrize("vr", ["DT", "LO", "UN", "OB"])
@pytest.mark.parametrize("implicit", [False, True])
def test_private_decay_reference(
    tmp_path: Path, manufacturer: str, tag: int, creator: str, vr: str, implicit: bool
) -> None:
    text = "20250101105800.50 "
    value = text.encode() if vr in ("UN", "OB") else text
    headers = pet_headers(1, private={tag: (creator, vr, value)}, Manufacturer=manufacturer)
    options = {"transfer_syntax": ImplicitVRLittleEndian} if implicit else {}
    (path,) = write_pet_series(tmp_path, headers, phantom_suv(1), **options)
    expected = datetime(2025, 1, 1, 10, 58, 0, 500_000)
    for header in (headers[0], pydicom.dcmread(path)):
        (only,) = read_pet_series([header]).slices
        assert only.decay_reference == expected


@pytest.mark.parametrize("vr", ["DS", "UN", "LO"])
@pytest.mark.parametrize("creator", [PHILIPS_CREATOR, ""])
def test_private_philips_factors(tmp_path: Path, creator: str, vr: str) -> None:
    def value(text: str) -> Any:
        return text.encode() if vr == "UN" else text

    private = {
        0x70531000: (creator, vr, value("0.003515736")),
        0x70531009: (creator, vr, value("4.709921\0" if vr == "UN" else "4.709921")),
    }
    headers = pet_headers(1, private=private, Manufacturer="Philips Medical Systems")
    (path,) = write_pet_series(tmp_path, headers, phantom_suv(1))
    for header in (headers[0], pydicom.dcmread(path)):
        (only,) = read_pet_series([header]).slices
        assert only.philips_suv_factor == 0.003515736
        assert only.philips_activity_factor == 4.709921


def test_private_values_of_others_are_left_alone() -> None:
    private = {
        0x0009100D: (GE_CREATOR, "DT", "20250101105800"),
        0x70531000: (PHILIPS_CREATOR, "DS", "0.5"),
        0x70531009: (PHILIPS_CREATOR, "DS", "0.5"),
    }
    (only,) = read_one(private=private, Manufacturer="SIEMENS").slices
    assert only.decay_reference is only.philips_suv_factor is only.philips_activity_factor is None


@pytest.mark.parametrize("value", [b"", b"\xff\xfe", b"soon", b"2025", b"0.5\\0.5"])
def test_unreadable_private_values_are_absent(value: bytes) -> None:
    private = {0x70531000: (PHILIPS_CREATOR, "UN", value)}
    (only,) = read_one(private=private, Manufacturer="Philips").slices
    assert only.philips_suv_factor == (2025.0 if value == b"2025" else None)
    private = {0x00711022: (SIEMENS_CREATOR, "UN", value)}
    (only,) = read_one(private=private, Manufacturer="SIEMENS").slices
    assert only.decay_reference is None


# --- what is refused -------------------------------------------------------------------------


def test_no_header() -> None:
    assert "no PET header" in refusal()


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"Modality": "CT"}, "Modality (0008,0060) is not PT"),
        ({"Modality": None}, "Modality (0008,0060) is not PT"),
        ({"SOPClassUID": LEGACY_CONVERTED}, "legacy-converted PET"),
        ({"RescaleIntercept": -1024}, "RescaleIntercept (0028,1052)"),
        ({TRACERS: [Dataset(), Dataset()]}, "choose one by --tracer 1 to 2"),
    ],
)
def test_refuses(overrides: dict[str, Any], what: str) -> None:
    assert what in refusal(*pet_headers(1, **overrides))


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientWeight", b"abc"),
        ("PatientWeight", b"70\\80"),
        ("PatientWeight", b"70,5"),
        ("PatientWeight", b"7_0"),
        ("PatientWeight", b"nan"),
        ("PatientWeight", b"1e999"),
        ("PatientSize", b"inf"),
        ("PatientSex", b"M\\F"),
        ("Units", b"BQML\\GML"),
        ("SeriesTime", b"11h"),
        ("SeriesTime", b"256161"),
        ("SeriesDate", b"20251301"),
        ("SeriesDate", b"00000000"),
        ("AcquisitionTime", b"eleven"),
        ("ActualFrameDuration", b"long"),
        ("FrameReferenceTime", b"1 2"),
        ("TimezoneOffsetFromUTC", b"CET"),
        ("TimezoneOffsetFromUTC", b"+9900"),
        ("RescaleIntercept", b"zero"),
        (TRACERS, b"FDG "),
    ],
)
def test_malformed_values(keyword: str, value: bytes) -> None:
    (header,) = pet_headers(1)
    vr = "LO" if keyword == TRACERS else None
    put_raw(header, keyword, value, vr)
    message = refusal(header)
    assert keyword in message
    assert value.decode().strip() not in message.replace(keyword, "")


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("RadionuclideTotalDose", b"10 mCi"),
        ("RadionuclideHalfLife", b"110 min"),
        ("RadiopharmaceuticalStartTime", b"10 o'clock"),
        ("RadiopharmaceuticalStartDateTime", b"20250101109900"),
        ("RadiopharmaceuticalStartDateTime", b"20250101100000+2500"),
        ("RadiopharmaceuticalStartDateTime", b"yesterday"),
    ],
)
def test_malformed_values_of_the_tracer(keyword: str, value: bytes) -> None:
    (header,) = pet_headers(1)
    put_raw(header[TRACERS][0], keyword, value)
    assert keyword in refusal(header)


FUZZED = (
    *("PatientWeight", "PatientSex", "Units", "Manufacturer", "CorrectedImage", "SeriesDate"),
    *("SeriesTime", "AcquisitionTime", "ActualFrameDuration", "TimezoneOffsetFromUTC"),
)


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(
    keyword=st.sampled_from(FUZZED),
    vr=st.sampled_from([None, "UN", "LO", "FD", "US", "SQ", "OB"]),
    value=st.binary(max_size=16) | st.text("0123456789.+-\\: eE", max_size=16).map(str.encode),
)
def test_no_value_breaks_the_reading(keyword: str, vr: str | None, value: bytes) -> None:
    (header,) = pet_headers(1)
    put_raw(header, keyword, value, vr)
    try:
        said = json.dumps(suv_factors(read_pet_series([header])).provenance.record, allow_nan=False)
    except StudyError as error:
        said = str(error)
    text = value.decode("latin-1").strip(" \0")
    assert len(text) < 6 or text not in said


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("PatientWeight", PerSlice(70, 71)),
        ("Units", PerSlice("BQML", "GML")),
        ("SeriesTime", PerSlice("110000", "110001")),
        ("RadionuclideTotalDose", PerSlice(1e8, None)),
        ("DecayCorrection", PerSlice("START", "NONE")),
    ],
)
def test_contradicting_headers(keyword: str, values: PerSlice) -> None:
    message = refusal(*pet_headers(2, **{keyword: values}))
    assert f"{keyword} (" in message
    assert "differs" in message


def test_the_same_number_written_twice_is_no_contradiction() -> None:
    headers = pet_headers(2)
    put_raw(headers[1], "PatientWeight", b" 70.000")
    assert read_pet_series(headers).weight_kg == 70


# --- tracers ---------------------------------------------------------------------------------


def test_a_tracer_is_chosen_by_number() -> None:
    (header,) = pet_headers(1)
    second = Dataset()
    second.RadionuclideTotalDose = 1e8
    second.RadionuclideHalfLife = 1223.4
    header[TRACERS].value.append(second)
    assert read_pet_series([header], tracer=1).dose_bq == 368_080_000
    assert read_pet_series([header], tracer=2).half_life_s == 1223.4
    assert "no tracer 3 (RadiopharmaceuticalInformationSequence (0054,0016) has 2)" in refusal(
        header, tracer=3
    )
    assert "no tracer 0" in refusal(header, tracer=0)
    assert read_pet_series(pet_headers(1), tracer=1).dose_bq == 368_080_000


# --- the first file --------------------------------------------------------------------------


def test_the_first_file_is_first_by_name(tmp_path: Path) -> None:
    paths = write_pet_series(tmp_path, pet_headers(3), phantom_suv(3))
    headers = [pydicom.dcmread(path) for path in reversed(paths)]
    assert read_pet_series(headers).first_file == 2
    assert read_pet_series(pet_headers(3)).first_file == 0


# --- Enhanced PET ----------------------------------------------------------------------------


def test_enhanced_object_from_a_file(tmp_path: Path) -> None:
    path = write_enhanced_pet(tmp_path / "pet.dcm", enhanced_pet_header(4), phantom_suv(4))
    series = read_pet_series([pydicom.dcmread(path)])
    assert series.source is Source.ENHANCED
    assert (series.units, series.decay_correction) == ("BQML", "START")
    assert series.corrected_image == {"ATTN", "DECY"}
    assert [each.decay_reference for each in series.slices] == [moment(REFERENCE_S)] * 4
    assert series.injection == INJECTION


@pytest.mark.parametrize("unit_in", ["mapping", "frame", "shared"])
@pytest.mark.parametrize(
    ("unit", "units", "suv_type"),
    [
        ("Bq/ml", "BQML", None),
        ("Bq/mL", "BQML", None),
        ("g/ml", "GML", None),
        ("g/ml{SUVbw}", "GML", "BW"),
        ("g/ml{SUVlbm}", "GML", "LBM"),
        ("g/ml{SUVlbm(James128)}", "GML", "LBMJAMES128"),
        ("g/ml{SUVlbm(Janma)}", "GML", "LBMJANMA"),
        ("g/ml{SUVibw}", "GML", "IBW"),
        ("cm2/ml{SUVbsa}", "CM2ML", "BSA"),
        ("g/ml{SUVbsa}", "CM2ML", "BSA"),
        ("{counts}", "CNTS", None),
        ("{propcounts}", "PROPCNTS", None),
        ("kBq/ml", "UNKNOWN", None),
    ],
)
def test_enhanced_units(unit_in: str, unit: str, units: str, suv_type: str | None) -> None:
    series = read_pet_series([enhanced_pet_header(2, unit=unit, unit_in=unit_in)])
    assert (series.units, series.suv_type) == (units, suv_type)


def test_enhanced_units_may_stand_in_the_header() -> None:
    assert read_pet_series([enhanced_pet_header(2, unit=None, Units="BQML")]).units == "BQML"
    assert read_pet_series([enhanced_pet_header(2, unit=None)]).units is None


def test_frames_are_taken_in_the_order_asked_for() -> None:
    times = [moment(4000 + 100 * index) for index in range(3)]
    header = enhanced_pet_header(3, DecayCorrected="NO", frame_references=[dt(t) for t in times])
    assert [each.decay_reference for each in read_pet_series([header]).slices] == times
    turned = read_pet_series([header], frame_order=[(0, 2), (0, 0), (0, 1)]).slices
    assert [each.decay_reference for each in turned] == [times[2], times[0], times[1]]
    factors = suv_factors(read_pet_series([header], frame_order=[(0, 2), (0, 0), (0, 1)])).factors
    after = np.array([4200.0, 4000.0, 4100.0])
    assert factors * activity_per_suv(after) == pytest.approx(np.ones(3), rel=1e-9)


def test_offsets_of_enhanced_objects() -> None:
    header = enhanced_pet_header(
        2,
        RadiopharmaceuticalStartDateTime="20250101100000+0100",
        RadiopharmaceuticalStartTime="100000",
        DecayCorrectionDateTime="20250101100000+0000",
    )
    conversion = suv_factors(read_pet_series([header]), strict=True)
    assert conversion.factors * activity_per_suv(3600) == pytest.approx(np.ones(2), rel=1e-9)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"DecayCorrectionDateTime": None}, "DecayCorrectionDateTime (0018,9701) is missing"),
        ({"DecayCorrected": "NO"}, "FrameReferenceDateTime (0018,9151), or FrameAcquisitionDate"),
        ({"DecayCorrected": None}, "DecayCorrected (0018,9758) is neither YES nor NO"),
        (
            {"DecayCorrected": None, "CorrectedImage": ["DECY"]},
            "DecayCorrected (0018,9758) is missing",
        ),
        ({"AttenuationCorrected": "NO"}, "AttenuationCorrected (0018,9759) is not YES"),
        ({"unit": None}, "MeasurementUnitsCodeSequence (0040,08EA) is missing"),
        ({"unit": "{counts}"}, "MeasurementUnitsCodeSequence (0040,08EA) is CNTS"),
        ({"unit": "kBq/ml"}, "MeasurementUnitsCodeSequence (0040,08EA) is none that DICOM"),
        ({"unit": "g/ml{SUVlbm}"}, "MeasurementUnitsCodeSequence (0040,08EA) is LBM"),
    ],
)
def test_enhanced_refusals_of_the_conversion(overrides: dict[str, Any], what: str) -> None:
    with pytest.raises(StudyError) as caught:
        suv_factors(read_pet_series([enhanced_pet_header(2, **overrides)]))
    assert what in str(caught.value)


def test_enhanced_objects_may_tell_corrections_as_single_frames_do() -> None:
    told = {"AttenuationCorrected": None, "DecayCorrected": None}
    told |= {"CorrectedImage": ["ATTN", "DECY"], "DecayCorrection": "START"}
    plain, other = (enhanced_pet_header(2, **each) for each in ({}, told))
    assert read_pet_series([other]) == read_pet_series([plain])
    refuted = read_pet_series([enhanced_pet_header(2, **told | {"AttenuationCorrected": "NO"})])
    assert refuted.corrected_image == {"DECY"}


def test_enhanced_object_without_frames() -> None:
    header = enhanced_pet_header(1)
    del header.PerFrameFunctionalGroupsSequence
    assert "PerFrameFunctionalGroupsSequence (5200,9230)" in refusal(header)


def test_several_enhanced_objects_are_one_series() -> None:
    beds = [
        enhanced_pet_header(2, DecayCorrectionDateTime=dt(moment(after_s)))
        for after_s in (3600, 4200)
    ]
    series = read_pet_series(beds)
    assert [each.decay_reference for each in series.slices] == [
        moment(after_s) for after_s in (3600, 3600, 4200, 4200)
    ]
    order = [(1, 0), (0, 1), (0, 0), (1, 1)]
    factors = suv_factors(read_pet_series(beds, frame_order=order)).factors
    after = np.array([4200.0, 3600.0, 3600.0, 4200.0])
    assert factors * activity_per_suv(after) == pytest.approx(np.ones(4), rel=1e-9)


@pytest.mark.parametrize(
    ("other", "keyword"),
    [
        ({"PatientWeight": 80}, "PatientWeight (0010,1030)"),
        ({"RadionuclideTotalDose": 1e8}, "RadionuclideTotalDose (0018,1074)"),
        ({"unit": "g/ml"}, "Units (0054,1001)"),
        ({"DecayCorrected": "NO"}, "DecayCorrection (0054,1102)"),
    ],
)
def test_enhanced_objects_that_contradict_each_other(other: dict[str, Any], keyword: str) -> None:
    message = refusal(enhanced_pet_header(1), enhanced_pet_header(1, **other))
    assert f"contradict each other ({keyword} differs)" in message


def test_a_correction_counts_in_every_enhanced_object_only() -> None:
    headers = [enhanced_pet_header(1), enhanced_pet_header(1, AttenuationCorrected="NO")]
    assert read_pet_series(headers).corrected_image == {"DECY"}


def test_enhanced_objects_among_single_images() -> None:
    message = refusal(enhanced_pet_header(1), *pet_headers(1))
    assert "single images and multi-frame objects in one PET series" in message


def test_enhanced_intercept() -> None:
    header = enhanced_pet_header(2)
    frame = header.PerFrameFunctionalGroupsSequence[1]
    frame.PixelValueTransformationSequence[0].RescaleIntercept = 1
    assert "RescaleIntercept (0028,1052)" in refusal(header)


def test_frames_of_different_units() -> None:
    header = enhanced_pet_header(2)
    other = enhanced_pet_header(2, unit="g/ml{SUVbw}").PerFrameFunctionalGroupsSequence[1]
    header.PerFrameFunctionalGroupsSequence[1] = other
    assert "the frames differ in unit" in refusal(header)


def test_the_unit_is_that_of_the_rescaled_values() -> None:
    header = enhanced_pet_header(1, slopes=[2.0])
    (mapping,) = header.PerFrameFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    (suv,) = (
        enhanced_pet_header(1, slopes=[0.001], unit="g/ml{SUVbw}")
        .PerFrameFunctionalGroupsSequence[0]
        .RealWorldValueMappingSequence
    )
    frame = header.PerFrameFunctionalGroupsSequence[0]
    frame.RealWorldValueMappingSequence = [suv, mapping]
    assert read_pet_series([header]).units == "BQML"
    assert read_pet_series([header]).reinterpretations == ()
    frame.RealWorldValueMappingSequence = [suv]
    assert "RealWorldValueSlope (0040,9225) differs" in refusal(header)
    suv.RealWorldValueSlope = 1.0
    series = read_pet_series([header])
    assert series.suv_type == "BW"
    assert series.reinterpretations[0].startswith("RealWorldValueSlope (0040,9225) is 1, unlike")
    with pytest.raises(StudyError, match="refused by --strict: RealWorldValueSlope"):
        suv_factors(series, strict=True)
    suv.RealWorldValueSlope = 2.0
    frame.RealWorldValueMappingSequence = [suv, mapping]
    assert "several units for one frame" in refusal(header)


@pytest.mark.parametrize("rescaled_by", ["one", "nothing"])
def test_a_mapping_to_real_values_may_stand_alone(rescaled_by: str) -> None:
    """Without a slope other than 1 beside it, its slope is what scales the stored values."""
    header = enhanced_pet_header(2, slopes=[2.0, 3.0])
    for frame in header.PerFrameFunctionalGroupsSequence:
        if rescaled_by == "one":
            frame.PixelValueTransformationSequence[0].RescaleSlope = 1
        else:
            del frame.PixelValueTransformationSequence
    series = read_pet_series([header])
    assert (series.units, series.reinterpretations) == ("BQML", ())
    factors = suv_factors(series, strict=True).factors
    assert factors * activity_per_suv(REFERENCE_S) == pytest.approx([2, 3], rel=1e-9)

    (mapping,) = header.PerFrameFunctionalGroupsSequence[1].RealWorldValueMappingSequence
    mapping.RealWorldValueIntercept = 5.0
    assert "RealWorldValueIntercept (0040,9224)" in refusal(header)
    mapping.RealWorldValueIntercept = 0.0
    mapping.RealWorldValueSlope = 0.0
    with pytest.raises(StudyError, match="not a positive number"):
        suv_factors(read_pet_series([header]))
    mapping.RealWorldValueSlope = 3.0
    other = deepcopy(mapping)
    other.RealWorldValueSlope = 4.0
    frame.RealWorldValueMappingSequence = [mapping, other]
    assert "scaled in several ways" in refusal(header)


def test_frames_without_reference_tell_when_they_were_acquired() -> None:
    header = enhanced_pet_header(2, DecayCorrected="NO", DecayCorrectionDateTime=None)
    after_s = np.array([3600.0, 4000.0])
    for frame, each in zip(header.PerFrameFunctionalGroupsSequence, after_s, strict=True):
        frame.FrameContentSequence[0].FrameAcquisitionDateTime = dt(moment(each))
    conversion = suv_factors(read_pet_series([header]))
    expected = mean_activity_per_suv(after_s, DURATION_S)
    assert conversion.factors * expected == pytest.approx(np.ones(2), rel=1e-9)
    assert conversion.provenance.record["rule"] == "15"
    frame.FrameContentSequence[0].FrameReferenceDateTime = dt(moment(5000))
    (_, factor) = suv_factors(read_pet_series([header])).factors
    assert factor * activity_per_suv(5000) == pytest.approx(1, rel=1e-9)
    del header.PerFrameFunctionalGroupsSequence[0].FrameContentSequence[0].FrameAcquisitionDuration
    with pytest.raises(StudyError, match=r"FrameAcquisitionDuration \(0018,9220\)"):
        suv_factors(read_pet_series([header]))
