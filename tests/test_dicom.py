"""CT and PET series in DICOM: which files they are, where they lie, what they hold."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import (
    ORIENTATIONS,
    affine_of,
    build_enhanced,
    build_slices,
    noise,
    read_files,
    read_series,
    write_bare_file,
    write_file,
    write_slices,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom import uid

from common.dicom import group_series, read_dicom_file
from common.dicom_pixels import read_ct, read_pet
from common.dicom_stack import stack_slices
from common.errors import StudyError

SHAPE = (7, 5, 6)
STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))
CANARY = "CANARY"


class NotOneCandidate(Exception):
    """A folder holds no candidate, or several."""


def read_image(folder, modality="CT", factors=1.0):
    """Return the only candidate of a folder as an image."""
    series = read_series(folder, modality)
    if len(series) != 1:
        raise NotOneCandidate(len(series))
    stack = stack_slices(*series)
    if modality == "CT":
        return read_ct(stack)
    return read_pet(stack, np.broadcast_to(factors, stack.shape[2]))


def refusal(folder, modality="CT"):
    """Return why a folder is refused, in words without any from its headers or paths."""
    with pytest.raises(StudyError) as refused:
        read_image(folder, modality)
    message = str(refused.value)
    assert CANARY not in message
    assert str(folder) not in message
    assert not re.search(r"IM\d{4}", message)
    return message


def reason(folder):
    """Return why a folder is refused; empty where it is not."""
    try:
        read_image(folder)
    except StudyError as error:
        return str(error)
    return ""


def slices(stored=None, affine=None, modality="CT", **options):
    """Build slices whose every free text is a canary."""
    stored = noise(SHAPE) if stored is None else stored
    named = dict.fromkeys(("PatientName", "PatientID", "SeriesDescription", "StudyID"), CANARY)
    return build_slices(
        stored, affine_of() if affine is None else affine, modality, **named, **options
    )


def assert_image_is(image, values, affine, dtype):
    assert image.data.dtype == dtype
    assert image.data.flags.f_contiguous
    np.testing.assert_allclose(image.data, values, rtol=1e-7)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)


# --- values ----------------------------------------------------------------------------------

FORMATS = {
    "8 bits": {"bits": 8, "allocated": 8},
    "8 bits signed": {"bits": 8, "allocated": 8, "signed": True},
    "10 bits": {"bits": 10},
    "12 bits": {"bits": 12},
    "12 bits signed": {"bits": 12, "signed": True},
    "16 bits": {"bits": 16},
    "16 bits signed": {"bits": 16, "signed": True},
    "20 bits": {"bits": 20, "allocated": 32},
    "32 bits": {"bits": 32, "allocated": 32},
    "32 bits signed": {"bits": 32, "allocated": 32, "signed": True},
}
SYNTAXES = {
    "implicit": uid.ImplicitVRLittleEndian,
    "explicit": uid.ExplicitVRLittleEndian,
    "big endian": uid.ExplicitVRBigEndian,
    "deflated": uid.DeflatedExplicitVRLittleEndian,
    "RLE": uid.RLELossless,
    "JPEG lossless": uid.JPEGLossless,
    "JPEG lossless SV1": uid.JPEGLosslessSV1,
    "JPEG-LS": uid.JPEGLSLossless,
    "JPEG 2000": uid.JPEG2000Lossless,
}
COMPRESSIBLE = [name for name in FORMATS if name.startswith(("12", "16"))]
ENCODABLE = (48, 40, 3)  # JPEG 2000 takes more than a few pixels


@pytest.mark.parametrize(
    ("pixels", "syntax"),
    [
        *itertools.product(FORMATS, [name for name in SYNTAXES if name[0] in "eibd"]),
        *itertools.product(COMPRESSIBLE, [name for name in SYNTAXES if name[0] in "RJ"]),
    ],
)
def test_every_pixel_format_comes_back_in_every_transfer_syntax(tmp_path, pixels, syntax):
    stored = noise(ENCODABLE, **FORMATS[pixels])
    bits = {"bits_stored": FORMATS[pixels]["bits"]}
    hu = stored.astype(np.float64) - 1024
    fits = np.abs(hu).max() < 2**15
    write_slices(tmp_path / "CT", slices(stored, intercept=-1024, **bits), SYNTAXES[syntax])
    assert_image_is(read_image(tmp_path / "CT"), hu, affine_of(), np.int16 if fits else np.float32)
    slopes = np.geomspace(0.003, 7, ENCODABLE[2])
    pet = slices(stored, modality="PT", slopes=slopes, **bits)
    write_slices(tmp_path / "PET", pet, SYNTAXES[syntax])
    written, factors = [float(each.RescaleSlope) for each in pet], [2.5e-4, 2e-4, 3e-4]
    image = read_image(tmp_path / "PET", "PT", factors)
    assert_image_is(image, stored * np.multiply(written, factors), affine_of(), np.float32)


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_are_read(tmp_path, implicit):
    stored = noise(SHAPE, 12, signed=True)
    for k, dataset in enumerate(slices(stored)):
        write_bare_file(tmp_path / f"image{k}", dataset, implicit=implicit)
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


def test_bits_beside_the_stored_ones_are_no_values(tmp_path):
    """Overlays lie above the stored bits of old files; some have values at the upper end."""
    stored = noise(SHAPE, 12, signed=True)
    low = slices((stored & 0x0FFF) | 0x5000, bits_stored=12)
    high = slices((stored << 4) | 0x0005, bits_stored=12, HighBit=15)
    for name, datasets in (("low", low), ("high", high)):
        write_slices(tmp_path / name, datasets)
        assert_image_is(read_image(tmp_path / name), stored, affine_of(), np.int16)


def test_padding_values_stay_as_they_are(tmp_path):
    stored = noise(SHAPE, 12, signed=True)
    stored[:2] = -2000
    write_slices(tmp_path, slices(stored, PixelPaddingValue=-2000))
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -1024), (1, -0.5), (1, 32000), (16, 0)])
def test_a_ct_that_is_no_int16_is_float32(tmp_path, slope, intercept):
    stored = noise(SHAPE, 12)
    write_slices(tmp_path, slices(stored, slopes=slope, intercept=intercept))
    assert_image_is(read_image(tmp_path), stored * slope + intercept, affine_of(), np.float32)


IMPLAUSIBLE_SCALE = (
    "RescaleSlope (0028,1053) or RescaleIntercept (0028,1052) is implausible: "
    "export the series again"
)


def test_a_slope_of_zero_is_for_empty_slices_alone(tmp_path):
    stored = noise(SHAPE, 12)
    stored[:, :, 0] = 0
    slopes = np.full(SHAPE[2], 0.5)
    slopes[0] = 0
    write_slices(tmp_path, slices(stored, modality="PT", slopes=slopes))
    assert_image_is(read_image(tmp_path, "PT"), stored * slopes, affine_of(), np.float32)
    write_slices(tmp_path, slices(stored + 1, modality="PT", slopes=slopes))
    assert refusal(tmp_path, "PT") == IMPLAUSIBLE_SCALE


@pytest.mark.parametrize("missing", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_values_without_their_scale_are_refused(tmp_path, modality, missing):
    datasets = slices(modality=modality)
    del datasets[2][missing]
    write_slices(tmp_path, datasets)
    assert f"malformed header ({missing} (0028,105" in refusal(tmp_path, modality)


@pytest.mark.parametrize(
    ("modality", "options", "message"),
    [
        ("PT", {"intercept": -1}, "RescaleIntercept (0028,1052) of the PET is not 0"),
        ("PT", {"slopes": -1}, "RescaleSlope (0028,1053) is negative"),
        ("CT", {"slopes": 1e300}, IMPLAUSIBLE_SCALE),
        ("CT", {"intercept": -1e300}, IMPLAUSIBLE_SCALE),
        ("CT", {"BitsAllocated": 64}, "no plain grey values (SamplesPerPixel (0028,0002)"),
        ("CT", {"SamplesPerPixel": 3}, "no plain grey values (SamplesPerPixel (0028,0002)"),
        ("CT", {"BitsStored": 12, "HighBit": 16}, "no plain grey values"),
        ("CT", {"Rows": 6}, "the pixels of a slice cannot be read (truncated"),
        ("CT", {"Rows": 0}, "the CT has an implausible size (Rows (0028,0010)"),
        ("CT", {"Rows": 65535, "Columns": 65535}, "the CT has an implausible size"),
        ("CT", {"PixelSpacing": [0, 1]}, "PixelSpacing (0028,0030) is not positive"),
        ("CT", {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "ImageOrientationPatient"),
        ("CT", {"ImageOrientationPatient": None}, "ImageOrientationPatient (0020,0037) is not 6"),
        ("CT", {"ImagePositionPatient": [1, 2]}, "ImagePositionPatient (0020,0032) is not 3"),
        ("CT", {"NumberOfFrames": 2}, "several frames without a place for each (NumberOfFrames"),
    ],
)
def test_headers_that_cannot_be_are_refused(tmp_path, modality, options, message):
    write_slices(tmp_path, slices(modality=modality, **options))
    assert message in refusal(tmp_path, modality)


# --- geometry --------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt_degrees", [0, 17.5, -12])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_voxels_stay_where_they_were_in_every_orientation(tmp_path, orientation, tilt_degrees):
    affine = affine_of(ORIENTATIONS[orientation], tilt_degrees=tilt_degrees)
    stored = noise(SHAPE)
    write_slices(tmp_path, slices(stored, affine))
    assert_image_is(read_image(tmp_path), stored, affine, np.int16)


def test_rounded_cosines_do_not_change_the_size_of_a_voxel(tmp_path):
    rounded = [0.707, 0, 0.707, 0, 1, 0]
    as_written = {"ImageOrientationPatient": rounded, "PixelSpacing": [2, 2]}
    write_slices(tmp_path, slices(affine=affine_of(rounded), **as_written))
    image = read_image(tmp_path)
    np.testing.assert_allclose(np.linalg.norm(image.affine[:3, :2], axis=0), 2, rtol=1e-12)


def test_slices_that_descend_are_turned_upwards(tmp_path):
    upwards, stored = affine_of(), noise(SHAPE)
    downwards = upwards @ np.diag([1, 1, -1, 1])
    downwards[:, 3] = upwards @ (0, 0, SHAPE[2] - 1, 1)
    write_slices(tmp_path, slices(stored[:, :, ::-1], downwards))
    assert_image_is(read_image(tmp_path), stored, upwards, np.int16)


@settings(max_examples=30 * STRESS, deadline=None)
@given(
    axes=st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    spacing_mm=st.tuples(*[st.floats(0.4, 6)] * 3),
    tilt_degrees=st.floats(-40, 40),
    order=st.permutations(range(SHAPE[2])),
)
def test_any_grid_comes_back_from_files_in_any_order(
    tmp_path_factory, axes, spacing_mm, tilt_degrees, order
):
    row, column = np.reshape(axes, (2, 3))
    assume(np.linalg.norm(np.cross(row, column)) > 0.1)
    row = row / np.linalg.norm(row)
    column = np.cross(np.cross(row, column), row)
    affine = affine_of(
        [*row, *column / np.linalg.norm(column)], spacing_mm, tilt_degrees=tilt_degrees
    )
    stored = noise(SHAPE)
    folder = tmp_path_factory.mktemp("grid")
    datasets = slices(stored, affine)
    write_slices(folder, [datasets[k] for k in order])
    assert_image_is(read_image(folder), stored, affine, np.int16)


BED = [3.27] * 9
BED_JOINTS = [*BED, 3.29, *BED, 3.19, *BED, 3.29, *BED]


def series_with_gaps(gaps_mm, modality="PT", sideways_mm=0.0):
    """Build slices whose distances [mm] are given; the third is pushed aside."""
    datasets = slices(noise((4, 4, len(gaps_mm) + 1)), modality=modality)
    for k, z_mm in enumerate(np.cumsum([0, *gaps_mm])):
        datasets[k].ImagePositionPatient = [sideways_mm * (k == 2), 0, f"{z_mm:.3f}"]
    return datasets


@pytest.mark.parametrize(
    "gaps_mm",
    [BED_JOINTS, [3.0] * 9 + [3.3] + [3.0] * 9, [2.0, 2.1, 1.9, 2.0], [3.27], [1.0, 1.15, 0.95]],
)
def test_gaps_of_real_scanners_pass(tmp_path, gaps_mm):
    write_slices(tmp_path, series_with_gaps(gaps_mm))
    image = read_image(tmp_path, "PT")
    assert image.affine[2, 2] == pytest.approx(np.mean(gaps_mm), abs=1e-3)


@pytest.mark.parametrize(
    ("gaps_mm", "shown"),
    [
        ([3, 3, 3, 6, 3, 3], "gaps from 3.00 to 6.00 mm, 7 slices"),
        ([6, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3], "gaps from 3.00 to 6.00 mm, 13 slices"),
        ([3] * 100 + [6] + [3] * 100, "gaps from 3.00 to 6.00 mm, 202 slices"),
        ([3] * 20 + [2.5] * 20, "gaps from 2.50 to 3.00 mm, 41 slices"),
        ([3, 3, 60, 3, 3], "gaps from 3.00 to 60.00 mm, 6 slices"),
        ([2.0, 2.5, 1.5, 2.0], "gaps from 1.50 to 2.50 mm, 5 slices"),
    ],
)
def test_missing_and_uneven_slices_are_refused(tmp_path, gaps_mm, shown):
    write_slices(tmp_path, series_with_gaps(gaps_mm))
    assert refusal(tmp_path, "PT") == (
        f"the PET has missing or unevenly spaced slices (ImagePositionPatient (0020,0032): {shown})"
        ": export the complete series"
    )


def test_a_slice_pushed_aside_is_refused(tmp_path):
    write_slices(tmp_path / "0.25", series_with_gaps([3] * 5, sideways_mm=0.25))
    read_image(tmp_path / "0.25", "PT")
    write_slices(tmp_path / "0.35", series_with_gaps([3] * 5, sideways_mm=0.35))
    assert "unevenly spaced slices" in refusal(tmp_path / "0.35", "PT")


@pytest.mark.parametrize("gaps_mm", [[3, 3, 0, 3], [3, 0, 3, 0, 3], [0, 0, 0], [0], [3, 0.01, 3]])
def test_slices_in_one_place_are_refused(tmp_path, gaps_mm):
    write_slices(tmp_path, series_with_gaps(gaps_mm, "CT"))
    assert refusal(tmp_path) == (
        "the CT has several slices in one place (ImagePositionPatient (0020,0032)): duplicate, "
        "dynamic or gated images; give each slice once"
    )


def test_one_slice_is_no_volume(tmp_path):
    write_slices(tmp_path, slices(noise((4, 4, 1))))
    assert refusal(tmp_path) == "the CT has one slice: give the whole series"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "orientations (ImageOrientationPatient"),
        ({"ImageOrientationPatient": [0.999, 0.0447, 0, -0.0447, 0.999, 0]}, "orientations"),
        ({"PixelSpacing": [1.5, 1.3]}, "pixel spacings (PixelSpacing (0028,0030))"),
        ({"Rows": 7, "Columns": 5}, "matrices (Rows (0028,0010), Columns (0028,0011))"),
    ],
)
def test_mixed_series_are_refused(tmp_path, change, what):
    datasets = slices()
    for keyword, value in change.items():
        setattr(datasets[3], keyword, value)
    write_slices(tmp_path, datasets)
    assert f"the CT series mixes {what}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("attributes", "what"),
    [
        ({"SeriesType": ["DYNAMIC", "IMAGE"]}, "dynamic (SeriesType (0054,1000))"),
        ({"SeriesType": ["GATED", "IMAGE"]}, "gated (SeriesType (0054,1000))"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "RESP_GATED"]}, "gated (ImageType (0008,0008))"),
    ],
)
def test_moving_pets_are_refused(tmp_path, attributes, what):
    write_slices(tmp_path, slices(modality="PT", **attributes))
    assert refusal(tmp_path, "PT") == f"the PET is {what}: give a static or whole-body series"


@pytest.mark.parametrize(("declared", "n_warnings"), [(None, 0), (6, 0), (3, 0), (9, 1)])
def test_a_pet_of_fewer_slices_than_its_headers_tell_of_is_doubted(tmp_path, declared, n_warnings):
    """Nothing else shows that slices are missing at the ends."""
    write_slices(tmp_path, slices(modality="PT", NumberOfSlices=declared))
    warnings = stack_slices(read_series(tmp_path, "PT")[0]).warnings
    expected = (
        "the PET has 6 slices, its headers tell of 9 (NumberOfSlices (0054,0081)): "
        "check that the export is complete"
    )
    assert warnings == (expected,) * n_warnings


# --- multi-frame objects ---------------------------------------------------------------------


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "RLE", "JPEG lossless", "JPEG 2000"])
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_one_enhanced_object_is_a_series(tmp_path, modality, syntax):
    stored, affine = noise(ENCODABLE), affine_of(ORIENTATIONS["oblique"])
    slopes = 1.0 if modality == "CT" else np.geomspace(0.01, 1, ENCODABLE[2])
    enhanced = build_enhanced(stored, affine, modality, slopes=slopes, order=[1, 2, 0])
    write_file(tmp_path / "enhanced", enhanced, SYNTAXES[syntax])
    assert read_series(tmp_path, modality)[0].n_images == ENCODABLE[2]
    dtype = np.int16 if modality == "CT" else np.float32
    assert_image_is(read_image(tmp_path, modality), stored * slopes, affine, dtype)


@pytest.mark.parametrize(
    "orders", [[[4, 0], [1], [5, 3, 2]], [[0, 2, 4], [1, 3, 5]], [[5], [4, 3, 2, 1, 0]]]
)
def test_several_enhanced_objects_are_a_series(tmp_path, orders):
    stored, affine = noise(SHAPE), affine_of(tilt_degrees=10)
    for number, order in enumerate(orders):
        write_file(tmp_path / str(number), build_enhanced(stored, affine, order=order))
    assert_image_is(read_image(tmp_path), stored, affine, np.int16)


def test_what_all_frames_share_may_be_said_frame_by_frame(tmp_path):
    stored = noise(SHAPE)
    enhanced = build_enhanced(stored, affine_of())
    shared = enhanced.SharedFunctionalGroupsSequence[0]
    for frame in enhanced.PerFrameFunctionalGroupsSequence:
        frame.update(shared)
    del enhanced.SharedFunctionalGroupsSequence
    write_file(tmp_path / "enhanced", enhanced)
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.PerFrameFunctionalGroupsSequence.pop(),
         "PerFrameFunctionalGroupsSequence (5200,9230) does not describe every frame"),
        (lambda e: delattr(e.PerFrameFunctionalGroupsSequence[1], "PlanePositionSequence"),
         "ImagePositionPatient (0020,0032) is not 3 numbers"),
        (lambda e: delattr(e.PerFrameFunctionalGroupsSequence[1],
                           "PixelValueTransformationSequence"), "RescaleSlope (0028,1053)"),
        (lambda e: delattr(e, "SharedFunctionalGroupsSequence"), "(0020,0037) is not 6 numbers"),
        (lambda e: delattr(e, "PerFrameFunctionalGroupsSequence"),
         "several frames without a place for each (NumberOfFrames (0028,0008))"),
    ],
)  # fmt: skip
def test_frames_without_place_or_scale_are_refused(tmp_path, change, message):
    enhanced = build_enhanced(noise(SHAPE), affine_of())
    change(enhanced)
    write_file(tmp_path / "enhanced", enhanced)
    assert message in refusal(tmp_path)


def test_several_temporal_positions_are_refused(tmp_path):
    enhanced = build_enhanced(noise(SHAPE), affine_of(), "PT", order=[0, 0, 1, 1, 2, 2])
    for number, frame in enumerate(enhanced.PerFrameFunctionalGroupsSequence):
        frame.FrameContentSequence = [pydicom.Dataset()]
        frame.FrameContentSequence[0].TemporalPositionIndex = number % 2 + 1
    write_file(tmp_path / "enhanced", enhanced)
    assert "the PET has several slices in one place" in refusal(tmp_path, "PT")


def test_an_enhanced_pet_that_says_it_is_gated_is_refused(tmp_path):
    image_type = ["ORIGINAL", "PRIMARY", "CARDRESP_GATED", "NONE"]
    enhanced = build_enhanced(noise(SHAPE), affine_of(), "PT", ImageType=image_type)
    write_file(tmp_path / "enhanced", enhanced)
    assert refusal(tmp_path, "PT").startswith("the PET is gated (ImageType (0008,0008))")


# --- files -----------------------------------------------------------------------------------


def test_order_names_and_folders_of_files_do_not_matter(tmp_path):
    names = ["Z", "a/0001", "a/b/c/1.2.840.113619", "IM-2.DCM", "scan.ima", "d e/x.y"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    stored = noise(SHAPE)
    write_slices(tmp_path, slices(stored), names=names)
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


def test_several_series_in_one_folder_are_told_apart(tmp_path):
    stored, pet = noise(SHAPE, seed=1), noise(SHAPE, seed=2)
    write_slices(tmp_path, slices(stored), names="agikmo")
    write_slices(tmp_path, slices(pet, modality="PT"), names="bdfhjl")
    other = slices(noise(SHAPE, seed=3), modality="PT", SeriesInstanceUID="1.2.3.9")
    write_slices(tmp_path, other, names="cenpqr")
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)
    first, second = group_series(reversed(read_files(tmp_path)), "PT")
    assert [file.name for file in first.files] == list("bdfhjl")
    assert [file.name for file in second.files] == list("cenpqr")
    image = read_pet(stack_slices(first), np.ones(SHAPE[2]))
    assert_image_is(image, pet, affine_of(), np.float32)


def dicomdir():
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.MediaStorageDirectoryStorage, "1.2.3"
    dataset.FileSetID = CANARY
    dataset.DirectoryRecordSequence = []
    return dataset


JUNK = {
    "empty": b"",
    "DICM alone": b"DICM",
    "text.txt": b"Patient notes\n" * 50,
    "Thumbs.db": bytes.fromhex("D0CF11E0A1B11AE1") + bytes(600),
    "zeros": bytes(4096),
    "archive.zip": b"PK\x03\x04" + bytes(200),
    "integers.raw": np.arange(2, 600, dtype="<i4").tobytes(),
    "shorts.raw": np.arange(8, 900, dtype="<i2").tobytes(),
    "eights.raw": np.full(500, 8, "<i2").tobytes(),
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(300),
}


def test_a_media_directory_and_junk_are_passed_over(tmp_path):
    stored = noise(SHAPE)
    write_slices(tmp_path, slices(stored))
    write_file(tmp_path / "DICOMDIR", dicomdir())
    for name, content in JUNK.items():
        (tmp_path / name).write_bytes(content)
    assert len(read_files(tmp_path)) == SHAPE[2]
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


NO_SLICES = {
    "localizer": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
    "Siemens topogram": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "CT_SOM5 TOP"]},
    "screen save": {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
    "screenshot": {"ImageType": ["DERIVED", "SECONDARY", "SCREENSHOT"]},
    "reformat": {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]},
    "Siemens reformat": {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 MPR"]},
    "MIP": {"ImageType": ["DERIVED", "SECONDARY", "MIP"]},
    "projection": {"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE"]},
    "enhanced MIP": {"ImageType": ["DERIVED", "PRIMARY", "VOLUME", "MAX_IP"]},
    "PET reprojection": {"SeriesType": ["WHOLE BODY", "REPROJECTION"]},
    "secondary capture": {"SOPClassUID": uid.SecondaryCaptureImageStorage},
    "colour": {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
    "derived coronal": {
        "ImageType": ["DERIVED", "SECONDARY"],
        "ImageOrientationPatient": ORIENTATIONS["coronal"],
    },
    "derived sagittal": {
        "ImageType": ["DERIVED", "PRIMARY", "AXIAL"],
        "ImageOrientationPatient": ORIENTATIONS["sagittal"],
    },
}


@pytest.mark.parametrize("attributes", NO_SLICES.values(), ids=NO_SLICES)
def test_what_is_no_slice_is_no_candidate_even_within_a_series(tmp_path, attributes):
    stored = noise(SHAPE)
    beside = slices(noise((6, 6, 2)), **attributes)
    write_slices(tmp_path / "apart", beside)
    assert read_series(tmp_path / "apart") == []
    write_slices(tmp_path / "within", slices(stored))
    write_slices(tmp_path / "within", beside, names=["one", "two"])
    assert_image_is(read_image(tmp_path / "within"), stored, affine_of(), np.int16)


@pytest.mark.parametrize(
    "image_type",
    [
        ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"],
        ["DERIVED", "SECONDARY", "AXIAL", "AVERAGE"],
        ["DERIVED", "PRIMARY", "AXIAL", "COMPRESSED"],
        ["DERIVED", "PRIMARY", "AXIAL", "JP2K COMPR"],
        None,
    ],
)
def test_axial_slices_are_candidates_derived_or_not(tmp_path, image_type):
    write_slices(tmp_path, slices(ImageType=image_type))
    assert len(read_series(tmp_path)) == 1


def test_original_coronal_slices_are_candidates(tmp_path):
    write_slices(tmp_path, slices(affine=affine_of(ORIENTATIONS["coronal"])))
    assert len(read_series(tmp_path)) == 1


def test_a_derived_coronal_enhanced_object_is_no_candidate(tmp_path):
    derived = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]
    for name, count in (("coronal", 0), ("axial, head first, supine", 1)):
        enhanced = build_enhanced(noise(SHAPE), affine_of(ORIENTATIONS[name]), ImageType=derived)
        write_file(tmp_path / "enhanced", enhanced)
        assert len(read_series(tmp_path)) == count


# --- damage ----------------------------------------------------------------------------------

DAMAGED_HEADER = "a DICOM file is damaged (its header cannot be read): export the study again"
DAMAGED_PIXELS = (
    "the pixels of a slice cannot be read (truncated, damaged, or compressed in a way that no "
    "installed decoder reads): export the series again, uncompressed"
)


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_a_file_cut_short_is_never_passed_over(tmp_path, modality, syntax):
    """Wherever the last slice ends, the series is refused, as its loss might go unseen."""
    *_, last = write_slices(
        tmp_path, slices(noise((40, 40, 4)), modality=modality), SYNTAXES[syntax]
    )
    content = last.read_bytes()
    for end in (*range(150, 1000, 41), *range(1000, len(content) - 40, len(content) // 6)):
        last.write_bytes(content[:end])
        # Cut off before its series is named, a slice is a second candidate: ambiguous.
        with contextlib.suppress(NotOneCandidate), pytest.raises(StudyError):
            read_image(tmp_path, modality)


@pytest.mark.parametrize("syntax", ["explicit", "RLE", "JPEG lossless", "JPEG-LS", "JPEG 2000"])
def test_pixels_cut_short_are_refused(tmp_path, syntax):
    *_, last = write_slices(tmp_path, slices(noise(ENCODABLE)), SYNTAXES[syntax])
    content = last.read_bytes()
    last.write_bytes(content[: len(content) * 9 // 10])
    assert refusal(tmp_path) == DAMAGED_PIXELS


def test_a_transfer_syntax_without_decoder_is_refused(tmp_path):
    *_, last = write_slices(tmp_path, slices())
    header = pydicom.dcmread(last)
    header.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    header.PixelData = pydicom.encaps.encapsulate([b"\x00\x00\x01\xb3" * 20])
    header.save_as(last)
    assert refusal(tmp_path) == DAMAGED_PIXELS


def test_compressed_pixels_that_are_declared_plain_are_refused(tmp_path):
    *_, last = write_slices(tmp_path, slices(noise((40, 40, 4))), uid.RLELossless)
    content = last.read_bytes()
    last.write_bytes(content.replace(b"1.2.840.10008.1.2.5\0", b"1.2.840.10008.1.2.1\0"))
    assert refusal(tmp_path) == DAMAGED_PIXELS


def test_pixels_of_more_bits_than_declared_are_refused(tmp_path):
    wide = slices(noise(SHAPE, 16, allocated=32), BitsAllocated=16, BitsStored=16, HighBit=15)
    write_slices(tmp_path, wide)
    assert refusal(tmp_path) == DAMAGED_PIXELS


def with_elements(path, before, elements):
    content = path.read_bytes()
    place = content.index(before)
    path.write_bytes(content[:place] + elements + content[place:])


def test_sequences_nested_without_end_are_refused(tmp_path):
    *_, last = write_slices(tmp_path, slices())
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
    with_elements(last, b"\x10\x00\x10\x00PN", (sequence + item) * 3000)
    assert refusal(tmp_path) == DAMAGED_HEADER


@pytest.mark.parametrize("vr", ["LO", "UT", "UN", "FD"])
def test_numbers_under_another_vr_are_read(tmp_path, vr):
    stored = noise(SHAPE)
    datasets = slices(stored, intercept=-1024)
    for dataset in datasets:
        dataset["RescaleIntercept"].VR = vr
        value = {"FD": -1024.0, "UN": b"-1024 "}.get(vr, "-1024")
        dataset["RescaleIntercept"].value = value
    write_slices(tmp_path, datasets)
    assert_image_is(read_image(tmp_path), stored.astype(float) - 1024, affine_of(), np.int16)


@pytest.mark.parametrize("value", ["1,5", "CANARY", "nan", "inf", "1e999", "", "1\\2", "0x10"])
def test_what_is_no_number_is_refused_and_not_shown(tmp_path, value):
    datasets = slices()
    datasets[1].add_new("RescaleSlope", "LO", value)
    write_slices(tmp_path, datasets)
    assert refusal(tmp_path) == (
        "malformed header (RescaleSlope (0028,1053) is not a number): correct it, or export the "
        "series anew"
    )


def test_headers_cut_short_are_refused_even_before_their_modality(tmp_path):
    write_slices(tmp_path, slices())
    path = tmp_path / "IM0003.dcm"
    content = path.read_bytes()
    modality = content.index(b"\x08\x00\x60\x00CS")
    for end in (200, modality, modality + 9, content.index(b"1.2.3.4.1.1") + 5):
        path.write_bytes(content[:end])
        assert refusal(tmp_path) == DAMAGED_HEADER


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_altered_files_end_in_an_image_or_a_refusal(tmp_path):
    datasets = slices(noise((8, 8, 3), 12))
    paths = write_slices(tmp_path, datasets)
    content = paths[1].read_bytes()
    random = np.random.default_rng(11)
    for _ in range(150 * STRESS):
        damaged = bytearray(content)
        for position in random.integers(132, len(damaged), size=random.integers(1, 6)):
            damaged[position] = random.integers(256)
        paths[1].write_bytes(damaged)
        with contextlib.suppress(NotOneCandidate):
            assert CANARY not in reason(tmp_path)


def test_remarks_of_pydicom_which_quote_headers_are_not_shown(tmp_path):
    (path,) = write_slices(tmp_path, slices(noise((4, 4, 1))))
    with_elements(path, b"\x08\x00\x08\x00CS", b"\x08\x00\x05\x00CS\x06\x00CANARY")
    program = (
        "import sys; from common.dicom import group_series, read_dicom_file; "
        "from common.dicom_values import joined_text; "
        "file = read_dicom_file(sys.argv[1], ''); "
        "print(len(joined_text(file.header, 'PatientName')))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, path],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (shown.stdout, shown.stderr) == ("6\n", "")


def test_what_may_not_be_read_is_refused_without_its_name(tmp_path):
    with pytest.raises(StudyError, match=r"^a file cannot be read \(No such file or directory\)"):
        read_dicom_file(str(tmp_path / "gone"), "gone")
