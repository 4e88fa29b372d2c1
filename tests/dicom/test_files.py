"""Which files are DICOM, and which of them are the slices of a CT or PET series."""

import contextlib
import copy
import os
import resource
import subprocess
import sys
import zlib
from pathlib import Path

import layouts
import numpy as np
import pydicom
import pytest
from dicom_builders import (
    ORIENTATIONS,
    affine_of,
    build_enhanced,
    noise,
    read_files,
    read_series,
    write_file,
    write_slices,
)
from dicom_checks import (
    CANARY,
    SHAPE,
    SYNTAXES,
    NotOneCandidate,
    assert_image_is,
    read_image,
    reason,
    refusal,
    slices,
)
from pydicom import uid
from pydicom.dataset import Dataset

from common.dicom.files import group_series, read_dicom_file
from common.dicom.pixels import read_pet
from common.dicom.series import stack_slices
from common.errors import StudyError

STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))


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
    "effective atomic number": {"RescaleType": "Z_EFF"},
    "electron density": {"RescaleType": "EDW"},
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


@pytest.mark.parametrize("rescale_type", ["HU", "HU_MOD", "US", "", None])
def test_ct_values_are_hu_unless_they_are_said_not_to_be(tmp_path, rescale_type):
    write_slices(tmp_path, slices(RescaleType=rescale_type))
    assert len(read_series(tmp_path)) == 1


def of_units(*codes):
    """A mapping to real values in each of some units."""
    mappings = []
    for code in codes:
        unit, mapping = Dataset(), Dataset()
        unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = code, "UCUM", code
        mapping.RealWorldValueSlope, mapping.MeasurementUnitsCodeSequence = 1.0, [unit]
        mappings.append(mapping)
    return mappings


@pytest.mark.parametrize("place", ["per frame", "shared", "one frame of many"])
@pytest.mark.parametrize(
    ("rescale_type", "units", "is_ct"),
    [
        ("HU", (), True),
        ("hu", (), True),
        ("HU_MOD", (), False),
        ("", (), True),
        ("HU", ("[hnsf'U]",), True),
        ("", ("mg/ml", "[hnsf'U]"), True),
        ("US", (), False),
        ("Z_EFF", (), False),
        ("MGML", (), False),
        ("", ("mg/ml",), False),
        ("HU", ("ml/min/100ml", "1"), False),
    ],
)
def test_an_enhanced_ct_in_another_unit_than_hu_is_no_candidate(
    tmp_path, place, rescale_type, units, is_ct
):
    """A map of relative cerebral blood flow was written as a CT."""
    enhanced = build_enhanced(noise(SHAPE), affine_of(), ImageType=["DERIVED", "PRIMARY"])
    frames = enhanced.PerFrameFunctionalGroupsSequence
    said = Dataset()
    rescaling = copy.deepcopy(frames[0].PixelValueTransformationSequence[0])
    rescaling.RescaleType = rescale_type
    said.PixelValueTransformationSequence = [rescaling]
    if units:
        said.RealWorldValueMappingSequence = of_units(*units)
    if place == "shared":
        for frame in frames:
            del frame.PixelValueTransformationSequence
        enhanced.SharedFunctionalGroupsSequence[0].update(said)
    for frame in {"shared": [], "per frame": frames, "one frame of many": frames[-1:]}[place]:
        frame.update(said)
    write_file(tmp_path / "enhanced", enhanced)
    assert len(read_series(tmp_path)) == is_ct


@pytest.mark.parametrize(("units", "is_ct"), [(("mg/ml",), False), (("mg/ml", "[hnsf'U]"), True)])
def test_a_mapping_to_another_unit_than_hu_makes_single_images_a_map(tmp_path, units, is_ct):
    write_slices(tmp_path, slices(RealWorldValueMappingSequence=of_units(*units)))
    assert len(read_series(tmp_path)) == is_ct


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


DAMAGED_HEADER = (
    "a DICOM file of the CT is damaged (its header cannot be read): export the study again"
)
NO_MODALITY = "a DICOM file of the CT has no Modality (0008,0060): export the study again"


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_a_file_cut_short_is_never_passed_over(tmp_path, modality, syntax):
    """Wherever the last slice ends, the series is refused, as its loss might go unseen."""
    *_, last = write_slices(
        tmp_path, slices(noise((40, 40, 4)), modality=modality), SYNTAXES[syntax]
    )
    content = last.read_bytes()
    for end in (0, 131, *range(132, 1000, 41), *range(1000, len(content) - 40, len(content) // 6)):
        last.write_bytes(content[:end])
        # Cut off before its series is named, a slice is a second candidate: ambiguous.
        with contextlib.suppress(NotOneCandidate), pytest.raises(StudyError):
            read_image(tmp_path, modality)


NO_ROLES = {
    "dose report": ("SR", uid.XRayRadiationDoseSRStorage),
    "screen save": ("OT", uid.SecondaryCaptureImageStorage),
    "screen save of a CT": ("CT", uid.SecondaryCaptureImageStorage),
    "MR": ("MR", uid.MRImageStorage),
    "a vendor's own": ("OT", "1.3.12.2.1107.5.9.1"),
}


@pytest.mark.parametrize(("modality", "sop_class"), NO_ROLES.values(), ids=NO_ROLES)
def test_a_damaged_file_that_no_role_needs_is_passed_over(tmp_path, modality, sop_class):
    """It failed its study."""
    stored = noise(SHAPE)
    write_slices(tmp_path, slices(stored))
    [beside] = write_slices(
        tmp_path, slices(noise((6, 6, 1)), SOPClassUID=sop_class, Modality=modality), names=["none"]
    )
    content = beside.read_bytes()
    pixels = content.index(b"\xe0\x7f\x10\x00")
    class_end = content.index(sop_class.encode()) + len(sop_class) + 2
    for end in range(class_end, pixels - 8, 17):
        beside.write_bytes(content[:end])
        assert_image_is(read_image(tmp_path), stored, affine_of(), np.int16)
    for position in range(class_end, pixels, 29):
        beside.write_bytes(content[:position] + b"\xff" * 16 + content[position + 16 :])
        read_image(tmp_path)


@pytest.mark.parametrize(
    "sop_class",
    [
        uid.CTImageStorage,
        uid.SegmentationStorage,
        "1.2.840.10009.5.1.4.1.1.2",  # CT, a byte flipped
        "1.2.840.10008.5.1.4.1.1.88.999",  # of a newer edition of DICOM, or another flipped
    ],
)
def test_a_damaged_file_that_may_be_needed_is_refused(tmp_path, sop_class):
    write_slices(tmp_path, slices())
    [beside] = write_slices(
        tmp_path, slices(noise((6, 6, 1)), SOPClassUID=sop_class), names=["none"]
    )
    content = beside.read_bytes()
    beside.write_bytes(content[: content.index(b"\x28\x00\x10\x00") + 5])
    assert "is damaged (its header cannot be read)" in refusal(tmp_path)


@pytest.mark.parametrize("padding", [b"\0", bytes(7), bytes(512), b"\n"])
def test_bytes_after_the_last_element_are_padding_only_if_they_are_zeros(tmp_path, padding):
    """Fewer than eight others may be all that is left of the next element, such as contours."""
    mask = layouts.write_rtstruct(tmp_path / "RS.dcm")
    mask.write_bytes(mask.read_bytes() + padding)
    if any(padding):
        with pytest.raises(StudyError, match=r"^a DICOM file of the mask is damaged"):
            read_dicom_file(str(mask), mask.name)
    else:
        assert read_dicom_file(str(mask), mask.name) is not None


@pytest.mark.parametrize("megabytes", [1, 600])
def test_a_deflated_file_that_would_fill_the_memory_is_refused(tmp_path, megabytes):
    (dataset,) = slices(noise((4, 4, 1)))
    write_file(tmp_path / "IM", dataset, uid.DeflatedExplicitVRLittleEndian)
    content = (tmp_path / "IM").read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    whole = deflater.compress(zlib.decompress(content[start:], -zlib.MAX_WBITS))
    whole += deflater.flush(zlib.Z_FULL_FLUSH)
    megabyte = deflater.compress(bytes(2**20)) + deflater.flush(zlib.Z_FULL_FLUSH)
    (tmp_path / "IM").write_bytes(content[:start] + whole + megabyte * megabytes + deflater.flush())
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if megabytes == 1:
        assert read_files(tmp_path)
        return
    with pytest.raises(StudyError, match=r"^a deflated DICOM file inflates beyond"):
        read_files(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before < 100_000  # kB


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


@pytest.mark.parametrize("value", ["1,5", "CANARY", "nan", "inf", "1e999", "1\\2", "0x10"])
def test_what_is_no_number_is_refused_and_not_shown(tmp_path, value):
    datasets = slices()
    datasets[1].add_new("RescaleSlope", "LO", value)
    write_slices(tmp_path, datasets)
    assert refusal(tmp_path) == (
        "malformed header (RescaleSlope (0028,1053) is not a number): correct it, or export the "
        "series anew"
    )


@pytest.mark.parametrize("value", ["", None])
def test_an_absent_number_is_called_missing(tmp_path, value):
    """It was "malformed ... not a number"."""
    datasets = slices()
    if value is None:
        del datasets[1].RescaleSlope
    else:
        datasets[1].RescaleSlope = value
    write_slices(tmp_path, datasets)
    assert refusal(tmp_path) == (
        "a value is missing in the header (RescaleSlope (0028,1053)): export the series anew"
    )


def test_headers_cut_short_are_refused_even_before_their_modality(tmp_path):
    write_slices(tmp_path, slices())
    path = tmp_path / "IM0003.dcm"
    content = path.read_bytes()
    modality = content.index(b"\x08\x00\x60\x00CS")
    for end in (200, modality, modality + 9, content.index(b"1.2.3.4.1.1") + 5):
        path.write_bytes(content[:end])
        assert refusal(tmp_path) == DAMAGED_HEADER


def test_a_modality_that_is_missing_is_said_to_be(tmp_path):
    """It was called damage."""
    datasets = slices()
    for dataset in datasets:
        del dataset.Modality
    write_slices(tmp_path, datasets)
    assert refusal(tmp_path) == NO_MODALITY


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
        "import sys; from common.dicom.files import group_series, read_dicom_file; "
        "from common.dicom.attributes import joined_text; "
        "file = read_dicom_file(sys.argv[1], ''); "
        "print(len(joined_text(file.header, 'PatientName')))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (shown.stdout, shown.stderr) == ("6\n", "")


def test_what_may_not_be_read_is_refused_without_its_name(tmp_path):
    with pytest.raises(StudyError, match=r"^a file cannot be read \(No such file or directory\)"):
        read_dicom_file(str(tmp_path / "gone"), "gone")
