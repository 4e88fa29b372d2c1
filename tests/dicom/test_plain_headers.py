"""Quickly scanned headers equal pydicom's, whole or damaged, and leave the pixels unread."""

import io
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import affine_of, build_slices, noise, write_file
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom import uid
from pydicom.dataelem import RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from common.dicom.attributes import items, text, texts
from common.dicom.files import read_dicom_file
from common.dicom.plain_headers import scan_header
from common.errors import StudyError

SHARED = Path(__file__).parents[3] / "shared" / "data"
SYNTAXES = [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.RLELossless]


def of_pydicom(content: bytes) -> tuple[pydicom.FileDataset, int]:
    stream = io.BytesIO(content)
    return pydicom.dcmread(stream, stop_before_pixels=True, force=True), stream.tell()


def is_scanned_alike(content: bytes) -> bool:
    """Whether a header is scanned; then it has to be pydicom's."""
    scanned = scan_header("name", content)
    if scanned is None:
        return False
    header, offset = scanned
    expected, expected_offset = of_pydicom(content)
    assert offset == expected_offset
    assert header.original_encoding == expected.original_encoding
    assert header.original_character_set == expected.original_character_set
    assert list(header.keys()) == list(expected.keys())
    try:
        expected_again = of_pydicom(content)[0]
        is_readable = expected == expected_again
    except Exception:  # values that pydicom cannot convert, which it finds on access alone
        return True
    assert is_readable
    assert header == expected
    assert header.file_meta == expected.file_meta
    return True


def rich_slice() -> Dataset:
    """A slice with sequences in sequences, of undefined and of defined length, and private data."""
    [slice_] = build_slices(noise((6, 5, 1)), affine_of(), "PT")
    slice_.SpecificCharacterSet = ["ISO 2022 IR 6", "ISO 2022 IR 87"]
    slice_.PatientName = "Yamada^Tarou=山田^太郎"
    slice_.PatientWeight, slice_.AccessionNumber, slice_.PatientSize = "70.5", "", None
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "C-111A1", "SRT"
    tracer = Dataset()
    tracer.RadionuclideTotalDose = "3.5E8"
    tracer.RadionuclideCodeSequence = Sequence([code])
    tracer.is_undefined_length_sequence_item = True
    tracer["RadionuclideCodeSequence"].is_undefined_length = True
    slice_.RadiopharmaceuticalInformationSequence = Sequence([tracer])
    slice_["RadiopharmaceuticalInformationSequence"].is_undefined_length = True
    icon = Dataset()
    icon.Rows = icon.Columns = 4
    icon.PixelData = bytes(16)
    icon["PixelData"].VR = "OB"
    slice_.IconImageSequence = Sequence([icon])
    slice_.ReferencedImageSequence = Sequence([])
    block = slice_.private_block(0x0009, "GEMS_PETD_01", create=True)
    block.add_new(0x0D, "DT", "20240301101500.00")
    block.add_new(0x10, "SQ", Sequence([code]))
    slice_[0x0009, 0x1010].is_undefined_length = True
    return slice_


def written(folder: Path, dataset: Dataset, syntax: str) -> bytes:
    write_file(folder / "slice.dcm", dataset, syntax)
    return (folder / "slice.dcm").read_bytes()


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_scanned_header_is_that_of_pydicom(syntax, tmp_path):
    content = written(tmp_path, rich_slice(), syntax)
    assert is_scanned_alike(content)
    header, _ = scan_header("name", content)
    assert text(header, "PatientName") == "Yamada^Tarou=山田^太郎"
    [tracer] = items(header, "RadiopharmaceuticalInformationSequence")
    assert text(tracer, "RadionuclideTotalDose") == "3.5E8"
    assert text(items(tracer, "RadionuclideCodeSequence")[0], "CodeValue") == "C-111A1"
    assert text(header, "PatientSize") is None


@pytest.mark.parametrize("syntax", [uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian])
def test_other_encodings_are_left_to_pydicom(syntax, tmp_path):
    assert scan_header("name", written(tmp_path, rich_slice(), syntax)) is None


def test_what_has_no_pixels_among_its_first_bytes_is_left_to_pydicom(tmp_path):
    content = written(tmp_path, rich_slice(), uid.ExplicitVRLittleEndian)
    _, offset = of_pydicom(content)
    assert scan_header("name", content[: offset + 8]) is not None
    for length in range(0, offset, 7):
        assert scan_header("name", content[:length]) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("syntax", SYNTAXES[:2])
def test_a_damaged_header_is_scanned_as_by_pydicom_or_not_at_all(syntax, tmp_path):
    content = written(tmp_path, rich_slice(), syntax)
    _, offset = of_pydicom(content)
    random = np.random.default_rng(0)
    scanned = 0
    for _ in range(400):
        damaged = bytearray(content)
        for place in random.integers(0, offset + 8, random.integers(1, 4)):
            damaged[place] = random.choice([0, 255, random.integers(256)])
        scanned += is_scanned_alike(bytes(damaged))
    assert 100 < scanned < 400


def test_the_headers_of_real_scanners_are_scanned_as_by_pydicom():
    paths = sorted(SHARED.glob("s*/**/*.dcm"))
    if not paths:
        pytest.skip("the real patients are not here")
    of_images = [path for path in paths if path.parent.name in ("CT", "PET", "PT")]
    assert len(of_images) > 300
    assert all(is_scanned_alike(path.read_bytes()) for path in of_images)


def test_headers_of_one_series_share_what_they_say_alike_and_nothing_else(tmp_path):
    datasets = build_slices(noise((4, 4, 2)), affine_of())
    for dataset, name in zip(datasets, ("ISO_IR 100", "ISO_IR 101"), strict=True):
        dataset.SpecificCharacterSet = name
        dataset.PatientName = dataset.SeriesDescription = ""
    headers = [
        scan_header("name", written(tmp_path, dataset, uid.ExplicitVRLittleEndian))[0]
        for dataset in datasets
    ]
    # The same bytes, of two alphabets.
    for header in headers:
        raw = header.get_item("SeriesDescription")
        header["SeriesDescription"] = raw._replace(value=b"G\xb1owa ", length=6)
    assert [text(header, "SeriesDescription") for header in headers] == ["G±owa", "Gąowa"]
    assert texts(headers[0], "ImagePositionPatient") != texts(headers[1], "ImagePositionPatient")
    assert texts(headers[0], "PixelSpacing") is texts(headers[0], "PixelSpacing")


def test_a_header_is_read_in_one_go_without_its_pixels(tmp_path):
    counts = Path("/proc/self/io")
    if not counts.exists():
        pytest.skip("only Linux counts what is read")
    [slice_] = build_slices(noise((512, 512, 1)), affine_of())
    path = tmp_path / "slice.dcm"
    write_file(path, slice_)
    assert path.stat().st_size > 500_000

    def reads() -> np.ndarray:
        words = counts.read_text().split()
        return np.array([int(words[words.index(name) + 1]) for name in ("rchar:", "syscr:")])

    read_dicom_file(str(path), path.name)
    before, again = reads(), reads()
    file = read_dicom_file(str(path), path.name)
    n_bytes, n_reads = reads() - again - (again - before)
    assert text(file.header, "Modality") == "CT"
    assert (n_bytes, n_reads) == (2**15, 1)
    assert os.path.getsize(path) > file.pixel_offset


@pytest.mark.parametrize("vr", ["SQ", "UN"])
def test_an_empty_sequence_is_one_each_time_it_is_read(vr):
    """It was shared as an empty list, and its header was then malformed."""
    tag = Tag("ContourSequence")
    header = Dataset()
    for _ in range(2):
        header[tag] = RawDataElement(tag, vr, 0, b"", 0, False, True)
        assert items(header, "ContourSequence") == []


OF_VR = {
    "UI": "SOPInstanceUID",
    "CS": "ImageType",
    "DA": "SeriesDate",
    "TM": "AcquisitionTime",
    "IS": "ActualFrameDuration",
    "DS": "ImagePositionPatient",
}


@given(
    st.sampled_from(sorted(OF_VR)),
    st.booleans(),
    st.lists(st.text("0123456789.+-eE_ AZaz\0", max_size=9), min_size=1, max_size=3),
)
@example("DS", False, ["1.", " +1.50E-03 "])
@example("DS", True, ["-0", "1e5", "007"])
@example("IS", False, ["+12"])
@example("UI", False, ["1.2.3\0"])
@example("CS", True, ["ORIGINAL", " PRIMARY", "A_B "])
@example("TM", False, ["101530.25 "])
def test_values_are_pydicoms_texts(vr, implicit, parts):
    keyword, value = OF_VR[vr], "\\".join(parts).encode()
    raw = RawDataElement(
        Tag(keyword), None if implicit else vr, len(value), value, 0, implicit, True
    )
    header = Dataset({raw.tag: raw})
    header.set_original_encoding(implicit, True, ["iso8859"])
    try:
        expected = convert_raw_data_element(raw, encoding=["iso8859"]).value
        several = isinstance(expected, pydicom.multival.MultiValue)
        strings = [str(each) for each in (expected if several else [expected])]
    except Exception:
        with pytest.raises(StudyError, match="readable"):
            texts(header, keyword)
    else:
        found = list(texts(header, keyword))
        assert found == ([] if expected is None else [each.strip(" \0") for each in strings])


def test_a_sequence_that_headers_say_alike_is_read_once(tmp_path):
    headers = [
        scan_header("name", written(tmp_path, rich_slice(), uid.ExplicitVRLittleEndian))[0]
        for _ in range(2)
    ]
    tracers = [items(h, "RadiopharmaceuticalInformationSequence")[0] for h in headers]
    assert tracers[0] is tracers[1]
    assert text(tracers[0], "RadionuclideTotalDose") == "3.5E8"
