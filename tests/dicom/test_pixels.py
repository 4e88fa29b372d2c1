"""Voxels of CT and PET series against the arrays put in."""

import itertools
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import affine_of, noise, write_bare_file, write_slices
from dicom_checks import ENCODABLE, SHAPE, SYNTAXES, assert_image_is, read_image, refusal, slices
from pydicom import uid
from pydicom.filewriter import write_file_meta_info

ROOT = Path(__file__).parents[2]

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
COMPRESSIBLE = [name for name in FORMATS if name.startswith(("12", "16"))]


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


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("intercept", [-40000, -32768, -32767, -1024, -0.5, 0, 1, 32767])
@pytest.mark.parametrize("slope", [1, 2])
def test_ct_is_int16_where_values_fit_whatever_the_intercept(tmp_path, signed, intercept, slope):
    stored = noise(SHAPE, 16, signed=signed)
    hu = stored.astype(np.float64) * slope + intercept
    fits = intercept != -0.5 and hu.min() >= -(2**15) and hu.max() < 2**15
    write_slices(tmp_path, slices(stored, slopes=slope, intercept=intercept))
    assert_image_is(read_image(tmp_path), hu, affine_of(), np.int16 if fits else np.float32)


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_are_read(tmp_path, implicit):
    stored = noise(SHAPE, 12, signed=True)
    for k, dataset in enumerate(slices(stored)):
        write_bare_file(tmp_path / f"image{k}", dataset, implicit=implicit)
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


@pytest.mark.parametrize("declared", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, None])
@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_vr_contrary_to_the_declared_transfer_syntax_is_read(
    tmp_path, declared, implicit, modality
):
    stored = noise(SHAPE, 12)
    for k, dataset in enumerate(slices(stored, modality=modality)):
        path = tmp_path / f"image{k}"
        write_bare_file(path, dataset, implicit=implicit)
        meta = dataset.file_meta
        if declared is None:
            del meta.TransferSyntaxUID
        else:
            meta.TransferSyntaxUID = declared
        beginning = BytesIO()
        write_file_meta_info(beginning, meta, enforce_standard=False)
        path.write_bytes(bytes(128) + b"DICM" + beginning.getvalue() + path.read_bytes())
    dtype = np.int16 if modality == "CT" else np.float32
    assert_image_is(read_image(tmp_path, modality), stored, affine_of(), dtype)


@pytest.mark.parametrize("syntax", ["explicit", "deflated", "RLE"])
def test_files_that_begin_with_their_meta_information_are_read(tmp_path, syntax):
    """As pydicom 3 writes a dataset that never had a preamble: they were passed over."""
    stored = noise(SHAPE)
    for path in write_slices(tmp_path, slices(stored), SYNTAXES[syntax]):
        content = path.read_bytes()
        without_group_length = content[144:]
        path.write_bytes(without_group_length)
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


def test_bits_beside_the_stored_ones_are_no_values(tmp_path):
    """Overlays lie above the stored bits of old files; some have values at the upper end."""
    stored = noise(SHAPE, 12, signed=True)
    low = slices((stored & 0x0FFF) | 0x5000, bits_stored=12)
    high = slices((stored << 4) | 0x0005, bits_stored=12, HighBit=15)
    for name, datasets in (("low", low), ("high", high)):
        write_slices(tmp_path / name, datasets)
        assert_image_is(read_image(tmp_path / name), stored, affine_of(), np.int16)


@pytest.mark.parametrize("bits", [12, 13, 15])
@pytest.mark.parametrize("syntax", [name for name in SYNTAXES if name[0] in "RJ"])
def test_signed_values_are_read_though_their_stream_says_unsigned(tmp_path, syntax, bits):
    """Signed CT of 13 bits in a JPEG 2000 stream of 16 had air at +7192 HU."""
    stored = noise(ENCODABLE, bits, signed=True)
    stored[:, :, 1] = np.abs(stored[:, :, 1]) // 2
    low = slices((stored & ((1 << bits) - 1)).astype(np.uint16))
    for path in write_slices(tmp_path, low, SYNTAXES[syntax]):
        header = pydicom.dcmread(path)
        header.BitsStored, header.HighBit, header.PixelRepresentation = bits, bits - 1, 1
        header.save_as(path)
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


def test_signed_values_beyond_the_bits_that_a_header_tells_stay_as_decoded(tmp_path):
    """BitsStored is wrong in them, not the sign: 12 bits end at 2047."""
    stored = np.clip(noise(ENCODABLE, 16, signed=True), -1024, 3071)
    for path in write_slices(tmp_path, slices(stored), uid.JPEGLSLossless):
        header = pydicom.dcmread(path)
        header.BitsStored, header.HighBit = 12, 11
        header.save_as(path)
    assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)


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


def test_a_ct_whose_last_slice_is_no_int16_is_float32_as_a_whole(tmp_path):
    stored, slopes = noise(SHAPE, 12), np.ones(SHAPE[2])
    slopes[-1] = 0.5
    write_slices(tmp_path, slices(stored, slopes=slopes, intercept=-1024))
    assert_image_is(read_image(tmp_path), stored * slopes - 1024, affine_of(), np.float32)


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


@pytest.mark.parametrize(
    ("modality", "missing"),
    [("CT", "RescaleSlope"), ("CT", "RescaleIntercept"), ("PT", "RescaleSlope")],
)
def test_values_without_their_scale_are_refused(tmp_path, modality, missing):
    datasets = slices(modality=modality)
    del datasets[2][missing]
    write_slices(tmp_path, datasets)
    assert f"a value is missing in the header ({missing} (0028,105" in refusal(tmp_path, modality)


def test_a_pet_without_intercept_has_the_only_one_that_dicom_allows(tmp_path):
    stored = noise(SHAPE)
    datasets = slices(stored, modality="PT", slopes=0.5)
    for dataset in datasets:
        del dataset.RescaleIntercept
    write_slices(tmp_path, datasets)
    assert_image_is(read_image(tmp_path, "PT"), stored * 0.5, affine_of(), np.float32)


@pytest.mark.parametrize(
    ("modality", "options", "message"),
    [
        ("PT", {"intercept": -1}, "RescaleIntercept (0028,1052) of the PET is -1"),
        ("PT", {"slopes": -1}, "RescaleSlope (0028,1053) is -1, negative"),
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
        ("CT", {"ImageOrientationPatient": None}, "header (ImageOrientationPatient (0020,0037)):"),
        ("CT", {"ImagePositionPatient": [1, 2]}, "ImagePositionPatient (0020,0032) is not 3"),
        ("CT", {"NumberOfFrames": 2}, "several frames without a place for each (NumberOfFrames"),
    ],
)
def test_headers_that_cannot_be_are_refused(tmp_path, modality, options, message):
    write_slices(tmp_path, slices(modality=modality, **options))
    assert message in refusal(tmp_path, modality)


# --- damage ----------------------------------------------------------------------------------


DAMAGED_PIXELS = (
    "the pixels of a slice cannot be read (truncated, damaged, or compressed in a way that no "
    "installed decoder reads): export the series again, uncompressed"
)


@pytest.mark.parametrize("syntax", ["JPEG lossless", "JPEG-LS", "JPEG 2000"])
def test_decoders_are_loaded_when_they_are_needed(tmp_path, syntax):
    stored = noise(ENCODABLE)
    write_slices(tmp_path, slices(stored), SYNTAXES[syntax])
    program = (
        "import sys\n"
        "from common import dicom\n"
        "dicom.load_library()\n"
        "print(sorted({'gdcm', 'PIL', 'requests'} & sys.modules.keys()))\n"
        "from pathlib import Path\n"
        "from dicom_checks import read_image\n"
        "print(read_image(Path(sys.argv[1])).data.sum(dtype=int))"
    )
    there = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "builders")])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": there},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[:2] == ["[]", str(read_image(tmp_path).data.sum(dtype=int))]


@pytest.mark.parametrize("syntax", ["explicit", "RLE", "JPEG lossless", "JPEG-LS", "JPEG 2000"])
def test_pixels_cut_short_are_refused(tmp_path, syntax):
    *_, last = write_slices(tmp_path, slices(noise(ENCODABLE)), SYNTAXES[syntax])
    content = last.read_bytes()
    last.write_bytes(content[: len(content) * 9 // 10])
    assert refusal(tmp_path) == DAMAGED_PIXELS


def test_a_slice_without_pixels_is_refused(tmp_path):
    datasets = slices()
    del datasets[1].PixelData
    write_slices(tmp_path, datasets)
    assert "a slice has no pixels (PixelData (7FE0,0010) is missing)" in refusal(tmp_path)


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
