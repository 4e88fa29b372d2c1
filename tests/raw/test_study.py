"""One raw study as three images: values and places against the phantom; what is refused, why."""

import copy
import os
import shutil
from pathlib import Path

import layouts
import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import BQ_PER_ML, CT_AFFINE, HU, LABELS, N_SLICES, PET_AFFINE, SUV
from mask_builders import build_seg
from pet_headers import (
    DURATION_S,
    REFERENCE_S,
    PerSlice,
    activity_per_suv,
    da,
    dt,
    enhanced_pet_header,
    mean_activity_per_suv,
    moment,
    tm,
    write_enhanced_pet,
)
from read_studies import read_images
from said import texts

from common.errors import IncompleteStudy, StudyError
from common.raw.candidates import Patterns
from common.raw.mapping import Taken
from common.raw.roles import find_roles
from common.raw.study import Conversion, plan_study

STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))


def read(study, patterns=None, **options):
    conversion = Conversion(**options)
    roles = find_roles(str(study), Patterns(patterns or {}), header_needed=conversion.needs_header)
    return read_images(roles, conversion)


def refusal(study, **options):
    """The reason for which a study is refused: it names what to do, and holds no identity."""
    with pytest.raises(StudyError) as caught:
        read(study, **options)
    message = str(caught.value)
    assert ": " in message
    assert not any(part in message for part in (*layouts.IDENTITY, str(study)))
    return message


def assert_is_the_phantom(images, suv=SUV):
    assert images.ct.data.dtype == np.int16
    assert np.array_equal(images.ct.data, HU)
    assert np.allclose(images.ct.affine, CT_AFFINE)
    assert images.pet.data.dtype == np.float32
    assert np.abs(images.pet.data - suv).max() < 1e-5
    assert np.allclose(images.pet.affine, PET_AFFINE)
    assert np.array_equal(images.mask.data, LABELS)
    assert images.mask.data.dtype == np.uint8
    assert np.allclose(images.mask.affine, PET_AFFINE)


# --- the images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        layouts.subfolders,
        layouts.tcia,
        layouts.flat,
        layouts.nifti_mask_beside_dicom,
        layouts.nifti_with_header,
        layouts.nifti_with_header_series,
    ],
)
def test_every_layout_is_the_same_study(tmp_path, layout):
    images = read(layout(tmp_path))
    assert_is_the_phantom(images)
    assert images.warnings == ()


@pytest.mark.parametrize(
    ("layout", "pattern", "role"),
    [
        (layouts.subfolders, "MASK/RS.dcm", "mask"),
        (layouts.tcia, "300*/1-1.dcm", "mask"),
        (layouts.subfolders, "CT/pet_000.dcm", "CT"),
        (layouts.subfolders, "PET/pet_005.dcm", "PET"),
        (layouts.nifti_with_header, "PET_header.dcm", "PET"),
    ],
)
def test_a_file_cut_short_fails_its_study_and_never_counts_as_absent(
    tmp_path, layout, pattern, role
):
    study = layout(tmp_path)
    (path,) = study.glob(pattern)
    content = path.read_bytes()
    # A header is complete without pixels.
    end = len(content) if role != "PET" else content.index(b"\x28\x00\x52\x10")
    for cut in (0, 1, 131, *range(132, end, max(1, end // 40)), end - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(StudyError) as caught:
            read(study)
        assert not isinstance(caught.value, IncompleteStudy), (cut, caught.value)
        if 400 < cut < content.index(b"\x08\x00\x60\x00"):
            assert f"of the {role} is damaged" in str(caught.value)


def test_masks_without_preamble_are_read(tmp_path):
    """As pydicom 3 writes a dataset that never had one."""
    for layout in (layouts.subfolders, layouts.tcia):
        study = layout(tmp_path)
        (path,) = [*study.glob("MASK/*"), *study.glob("300*/*")]
        path.write_bytes(path.read_bytes()[132:])
        assert_is_the_phantom(read(study))


def test_autopet_is_taken_as_it_is(tmp_path):
    study = layouts.autopet(tmp_path)
    images = read(study, {"ct": "*CTres*", "pet": "*SUV*"}, pet_units="suv")
    assert np.array_equal(images.pet.data, SUV.astype(np.float32))
    assert np.array_equal(images.ct.data, HU[::2, ::2])
    assert images.suv["rule"] == "given as SUV"


def test_a_record_tells_shapes_spacings_and_provenance(tmp_path):
    record = read(layouts.subfolders(tmp_path)).record
    assert record["shapes"] == {"ct": [16, 16, 6], "petsuv": [8, 8, 6], "mask": [8, 8, 6]}
    assert record["spacings"] == {"ct": [2, 2, 4], "petsuv": [4, 4, 4], "mask": [4, 4, 4]}
    assert record["warnings"] == []
    assert (record["suv"]["rule"], record["suv"]["weight_kg"]) == ("12b", 70.0)
    assert not any(part in str(record) for part in layouts.IDENTITY)


@pytest.mark.parametrize("drawn_on", ["pet", "ct"])
def test_contours_are_filled_on_the_grid_they_were_drawn_on(tmp_path, drawn_on):
    study = layouts.subfolders(tmp_path)
    uid = {"pet": layouts.PET_UID, "ct": layouts.CT_UID}[drawn_on]
    layouts.write_rtstruct(study / "MASK" / "RS.dcm", uid)
    images = read(study)
    grid = getattr(images, drawn_on)
    assert images.mask.data.shape == grid.data.shape
    assert np.array_equal(images.mask.affine, grid.affine)
    # One voxel of the PET is 2 x 2 of the CT.
    size = {"pet": 1, "ct": 2}[drawn_on]
    assert np.array_equal(images.mask.data, np.kron(LABELS, np.ones((size, size, 1))))


def test_contours_drawn_on_the_series_of_a_nifti_pet_are_filled_on_it(tmp_path):
    study = layouts.nifti_with_header_series(tmp_path)
    (study / "MASK.nii.gz").unlink()
    layouts.write_rtstruct(study / "RS.dcm")
    assert_is_the_phantom(read(study))


@pytest.mark.parametrize("drawn_on", ["pet", "ct", ""])
def test_contours_tell_which_of_two_series_they_were_drawn_on(tmp_path, drawn_on):
    """The first series that was named counted, be it the CT and the contours on the PET."""
    study = layouts.subfolders(tmp_path)
    path = layouts.write_rtstruct(study / "MASK" / "RS.dcm", layouts.CT_UID)
    rtstruct = pydicom.dcmread(path)
    (frame,) = rtstruct.ReferencedFrameOfReferenceSequence
    other = pydicom.Dataset()
    other.SeriesInstanceUID = layouts.PET_UID
    frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence.append(other)
    if drawn_on:
        image = pydicom.Dataset()
        slice_ = pydicom.dcmread(study / drawn_on.upper() / "pet_000.dcm")
        image.ReferencedSOPInstanceUID = slice_.SOPInstanceUID
        for contour in rtstruct.ROIContourSequence[0].ContourSequence:
            contour.ContourImageSequence = [image]
    rtstruct.save_as(path)
    if drawn_on:
        images = read(study)
        assert images.mask.data.shape == getattr(images, drawn_on).data.shape
    else:
        assert refusal(study).startswith("the RTSTRUCT was drawn on both the CT and the PET")


def test_contours_drawn_on_a_series_that_is_not_there_are_refused(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_rtstruct(study / "MASK" / "RS.dcm", "1.2.3.999")
    assert "RTReferencedSeriesSequence (3006,0014)" in refusal(study)


def test_contours_that_name_no_series_are_refused(tmp_path):
    study = layouts.subfolders(tmp_path)
    path = study / "MASK" / "RS.dcm"
    rtstruct = pydicom.dcmread(path)
    del rtstruct.ReferencedFrameOfReferenceSequence
    rtstruct.save_as(path)
    assert refusal(study).startswith(
        "the RTSTRUCT does not say which series it was drawn on (RTReferencedSeriesSequence "
    )


@pytest.mark.parametrize("role", ["pet", "ct"])
def test_planes_that_a_seg_leaves_out_are_empty_slices_of_the_image_it_was_drawn_on(tmp_path, role):
    """Labels could not be laid over the PET voxel by voxel."""
    study = layouts.tcia(tmp_path)
    labels = np.zeros_like(LABELS)
    labels[2, 3, 2], labels[5, 5, 4] = 1, 1
    affine = PET_AFFINE
    if role == "ct":
        labels, affine = np.kron(labels, np.ones((2, 2, 1), np.uint8)), CT_AFFINE
    path = next(study.glob("*Seg*")) / "1-1.dcm"
    seg = build_seg(labels, affine, ["Lesion"])
    seg.PatientID = layouts.PATIENT["PatientID"]
    seg.save_as(path)
    assert seg.NumberOfFrames == 2
    images = read(study)
    grid = getattr(images, role)
    assert np.array_equal(images.mask.data, labels)
    assert np.array_equal(images.mask.affine, grid.affine)


def test_a_seg_on_a_grid_of_its_own_keeps_it(tmp_path):
    study = layouts.tcia(tmp_path)
    seg = build_seg(LABELS, moved(PET_AFFINE, 1, 0, 0), ["Lesion"])
    seg.PatientID = layouts.PATIENT["PatientID"]
    seg.save_as(next(study.glob("*Seg*")) / "1-1.dcm")
    mask = read(study).mask
    # The labels touch the ends of the SEG's box, so that a border of one voxel is added.
    assert np.allclose(mask.affine, moved(PET_AFFINE, 1, 0, 0) @ moved(np.eye(4), -1, -1, -1))
    assert np.array_equal(mask.data, np.pad(LABELS, 1))


def test_regions_are_chosen_by_name(tmp_path):
    study = layouts.tcia(tmp_path)
    labels = LABELS.copy()
    labels[5, 5, 2] = 2
    layouts.write_seg(next(study.glob("*Seg*")) / "1-1.dcm", labels)
    assert np.array_equal(np.unique(read(study).mask.data), [0, 1, 2])
    assert np.array_equal(np.unique(read(study, roi="lesion 2").mask.data), [0, 2])
    assert "--roi" in refusal(study, roi="kidney")


def test_a_mask_without_names_says_that_none_are_chosen(tmp_path):
    study = layouts.nifti_mask_beside_dicom(tmp_path)
    assert read(study).warnings == ()
    (warning,) = texts(read(study, roi="lesion 2").warnings)
    assert warning == "a NIfTI mask names no regions: all its labels are kept, whatever --roi"


# --- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "stored_as", "dtype"),
    [
        (1, np.uint8, np.uint8),
        (255, np.int16, np.uint8),
        (256, np.int32, np.uint16),
        (300, np.float32, np.uint16),
        (65535, np.float64, np.uint16),
    ],
)
@pytest.mark.parametrize("grid", ["pet", "ct"])
def test_labels_are_kept(tmp_path, value, stored_as, dtype, grid):
    study = layouts.nifti_mask_beside_dicom(tmp_path)
    labels = LABELS.astype(float) if grid == "pet" else np.kron(LABELS, np.ones((2, 2, 1)))
    affine = PET_AFFINE if grid == "pet" else CT_AFFINE
    path = study / "MASK" / "lesions.nii.gz"
    layouts.write_nifti(path, (labels * value).astype(stored_as), affine)
    mask = read(study).mask
    assert mask.data.dtype == dtype
    assert np.array_equal(mask.data, labels * value)
    assert np.array_equal(mask.affine, affine)


def test_labels_scaled_by_their_nifti_header_are_whole_numbers(tmp_path):
    study = layouts.nifti_mask_beside_dicom(tmp_path)
    image = nibabel.Nifti1Image(LABELS * np.uint8(255), PET_AFFINE)
    image.header.set_slope_inter(1 / 255, 0)
    image.to_filename(study / "MASK" / "lesions.nii.gz")
    assert_is_the_phantom(read(study))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (LABELS * 0.5, "the mask has values that are not whole numbers"),
        (LABELS * np.int8(-1), "the mask has labels from -1 to 0"),
        (LABELS * 65536.0, "the mask has labels from 0 to 65536"),
        (LABELS * np.nan, "the mask holds values that are not finite"),
        (LABELS * 0, "the mask is empty"),
        (np.stack([LABELS] * 2, axis=-1), "the mask holds 2 volumes"),
    ],
)
def test_what_is_no_label_volume_is_refused(tmp_path, labels, reason):
    study = layouts.nifti_mask_beside_dicom(tmp_path)
    layouts.write_nifti(study / "MASK" / "lesions.nii.gz", labels.astype(np.float32))
    assert refusal(study).startswith(reason)


@pytest.mark.parametrize("affine", [PET_AFFINE, CT_AFFINE], ids=["pet", "ct"])
def test_a_nifti_mask_cropped_to_the_lesion_is_completed_on_its_image(tmp_path, affine):
    study = layouts.nifti_mask_beside_dicom(tmp_path)
    path = study / "MASK" / "lesions.nii.gz"
    labels = LABELS if affine is PET_AFFINE else np.kron(LABELS, np.ones((2, 2, 1), np.uint8))
    low, high = np.argwhere(labels).min(axis=0), np.argwhere(labels).max(axis=0)
    crop = labels[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    there = affine.copy()
    there[:3, 3] = (affine @ (*low, 1))[:3]
    layouts.write_nifti(path, crop, there)
    mask = read(study).mask
    assert np.array_equal(mask.data, labels)
    assert np.array_equal(mask.affine, affine)


def one_file_a_lesion(folder):
    """The hot rod in two halves, and a third lesion, each a file."""
    study = layouts.nifti_mask_beside_dicom(folder)
    (study / "MASK" / "lesions.nii.gz").unlink()
    halves = [LABELS.copy(), LABELS.copy(), LABELS * 0]
    halves[0][:, :, 3:] = halves[1][:, :, :3] = 0
    halves[2][6, 6, 5] = 1
    for name, labels in zip(("b", "a", "c"), halves, strict=True):
        layouts.write_nifti(study / "MASK" / f"{name}.nii.gz", labels)
    return study, halves


def test_mask_files_that_one_pattern_names_are_united_in_the_order_of_their_names(tmp_path):
    study, (second, first, third) = one_file_a_lesion(tmp_path)
    images = read(study, {"mask": "MASK/*"})
    assert np.array_equal(images.mask.data, first + 2 * second + 3 * third)
    assert texts(images.warnings) == [
        "3 mask files are united: they are labels 1 to 3 in the order of their names"
    ]


def test_several_mask_files_without_a_pattern_are_candidates(tmp_path):
    study, _ = one_file_a_lesion(tmp_path)
    assert refusal(study).startswith("3 candidates for mask (NIfTI file; NIfTI file; NIfTI file)")


def test_an_empty_mask_is_allowed_where_asked_for(tmp_path):
    study = layouts.nifti_mask_beside_dicom(tmp_path)
    layouts.write_nifti(study / "MASK" / "lesions.nii.gz", LABELS * 0)
    assert "--allow-empty-mask" in refusal(study)
    assert not read(study, allow_empty_mask=True).mask.data.any()


# --- CT --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (HU.astype(np.float32), np.int16),
        (HU.astype(np.float64) + 0.25, np.float32),
        (HU.astype(np.int32) + 40000, np.float32),
        (HU.astype(np.int32) - 40000, np.float32),
        (np.where(HU > 0, 32767, -32768).astype(np.float64), np.int16),
    ],
)
def test_a_ct_is_int16_where_that_loses_nothing(tmp_path, values, dtype):
    study = layouts.nifti_with_header(tmp_path)
    layouts.write_nifti(study / "CT.nii.gz", values, CT_AFFINE)
    ct = read(study).ct
    assert ct.data.dtype == dtype
    assert np.array_equal(ct.data, values.astype(np.float32))


@pytest.mark.parametrize("role", ["CT", "PET"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, role, value):
    study = layouts.nifti_with_header(tmp_path)
    volume = np.where(np.arange(8) == 3, value, SUV.T).T.astype(np.float32)
    layouts.write_nifti(study / f"{role}.nii.gz", volume)
    assert f"the {role} holds values that are not finite" in refusal(study)


# --- units of the PET ------------------------------------------------------------------------

GML = {"Units": "GML", "SUVType": "BW", "RescaleSlope": 0.001}
PER_BQML = 1 / (BQ_PER_ML.max() / SUV.max())


@pytest.mark.parametrize(
    ("header", "pet_units", "per_value"),
    [
        ({}, "auto", PER_BQML),
        ({}, "bqml", PER_BQML),
        ({}, "suv", 1),
        (GML, "auto", 1),
        (GML, "bqml", PER_BQML),
        (GML, "suv", 1),
        # A header that does not know the unit: the user does.
        ({"Units": None}, "bqml", PER_BQML),
        ({"Units": "PROPCNTS"}, "suv", 1),
    ],
)
@pytest.mark.parametrize("images", ["DICOM", "NIfTI"])
def test_pet_units_in_every_combination(tmp_path, images, header, pet_units, per_value):
    stored = np.rint(SUV * 1000) * header.get("RescaleSlope", 1 / PER_BQML / 1000)
    if images == "DICOM":
        study = layouts.subfolders(tmp_path)
        layouts.write_pet(study / "PET", **header)
    else:
        study = layouts.nifti_with_header(tmp_path)
        layouts.write_pet(tmp_path, **header)[0].rename(study / "PET_header.dcm")
        layouts.write_nifti(study / "PET.nii.gz", stored.astype(np.float32))
    pet = read(study, pet_units=pet_units).pet.data
    assert pet == pytest.approx(stored * per_value, rel=1e-6)


@pytest.mark.parametrize("header", [{"Units": None}, {"Units": "PROPCNTS"}])
def test_an_unknown_unit_is_refused(tmp_path, header):
    study = layouts.subfolders(tmp_path)
    layouts.write_pet(study / "PET", **header)
    assert "Units (0054,1001)" in refusal(study)


@pytest.mark.parametrize("pet_units", ["auto", "bqml", "suv"])
def test_the_weight_is_kept_whatever_the_units(tmp_path, pet_units):
    suv = read(layouts.subfolders(tmp_path), pet_units=pet_units).suv
    assert suv["weight_kg"] == 70


def test_values_that_are_given_as_suv_need_no_sound_header(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_pet(study / "PET", PatientWeight=None, RadionuclideTotalDose=None, **GML)
    assert read(study, pet_units="suv").suv["weight_kg"] is None


@pytest.mark.parametrize(
    ("suv_type", "ratio"), [("bw", 1), ("lbm-janma", 49.2144 / 75), ("bsa", 1.98138 * 10 / 75)]
)
def test_the_type_of_suv_asked_for(tmp_path, suv_type, ratio):
    # The checks of SUV.md: 75 kg, 185 cm.
    study = layouts.subfolders(tmp_path)
    layouts.write_pet(study / "PET", PatientWeight=75, PatientSize=1.85)
    pet = read(study, suv_type=suv_type)
    suvbw = read(study).pet.data
    assert pet.pet.data == pytest.approx(suvbw * ratio, rel=1e-5)
    assert pet.suv["suv_type"] == suv_type


def test_strict_refuses_what_needs_a_reinterpretation(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_pet(study / "PET", PatientWeight=70_000)
    images = read(study)
    assert_is_the_phantom(images)
    assert any("PatientWeight (0010,1030)" in warning for warning in texts(images.warnings))
    assert "--strict" in refusal(study, strict=True)


def test_a_tracer_is_chosen_by_number(tmp_path):
    study = layouts.subfolders(tmp_path)
    for file in (study / "PET").iterdir():
        image = pydicom.dcmread(file)
        sequence = image.RadiopharmaceuticalInformationSequence
        sequence.append(copy.deepcopy(sequence[0]))
        sequence[1].RadionuclideTotalDose = sequence[0].RadionuclideTotalDose * 2
        image.save_as(file)
    assert "--tracer 1 to 2" in refusal(study)
    assert_is_the_phantom(read(study, tracer=1))
    assert_is_the_phantom(read(study, tracer=2), SUV / 2)


@pytest.mark.parametrize(("factor", "largest"), [(1e-5, "4e-05"), (1000, "4e+03")])
def test_values_that_can_hardly_be_suv_are_told(tmp_path, factor, largest):
    study = layouts.nifti_with_header(tmp_path)
    layouts.write_nifti(study / "PET.nii.gz", (SUV * factor).astype(np.float32))
    (warning,) = texts(read(study, pet_units="suv").warnings)
    assert warning.startswith(f"the largest SUV of the PET is {largest}: check the unit")


# --- the header of a NIfTI PET ---------------------------------------------------------------

ACQUIRED_S = REFERENCE_S + DURATION_S * np.arange(N_SLICES)
BY_SLICE = {
    "DecayCorrection": "NONE",
    "CorrectedImage": ["ATTN"],
    "AcquisitionDate": PerSlice(*(da(moment(s)) for s in ACQUIRED_S)),
    "AcquisitionTime": PerSlice(*(tm(moment(s)) for s in ACQUIRED_S)),
}
"""A PET not corrected for decay: each slice has a factor of its own."""

DECAYED = SUV * mean_activity_per_suv(ACQUIRED_S, DURATION_S)


def reoriented(volume, affine, axes, flips):
    """The same image, its axes in another order and direction."""
    image = nibabel.Nifti1Image(volume, affine)
    orientation = np.array([[axes.index(axis), flips[axis]] for axis in range(3)])
    turned = image.as_reoriented(orientation)
    return np.asarray(turned.dataobj), turned.affine


AXES = st.permutations(range(3))
FLIPS = st.tuples(*[st.sampled_from([1, -1])] * 3)


@settings(deadline=None, derandomize=STRESS == 1, max_examples=20 * STRESS)
@given(axes=AXES, flips=FLIPS, order=st.permutations(range(N_SLICES)))
def test_a_factor_goes_to_its_slice_whatever_the_orientation(tmp_path_factory, axes, flips, order):
    study = layouts.write_nifti_images(tmp_path_factory.mktemp("a") / "a")
    for number, file in zip(order, layouts.write_pet(study / "header", **BY_SLICE), strict=True):
        file.rename(file.with_name(f"{number}.dcm"))
    volume, affine = reoriented(DECAYED.astype(np.float32), PET_AFFINE, axes, flips)
    layouts.write_nifti(study / "PET.nii.gz", volume, affine)
    pet = read(study).pet
    expected, _ = reoriented(SUV, PET_AFFINE, axes, flips)
    assert pet.data == pytest.approx(expected, rel=2e-6)
    assert np.allclose(pet.affine, affine)


@pytest.mark.parametrize("kept", [[2], [0, 1, 2, 3, 4]])
def test_headers_of_some_slices_do_not_stand_for_the_others(tmp_path, kept):
    # One factor was taken for all slices, though without decay correction each has its own.
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    for number, file in enumerate(layouts.write_pet(study / "header", **BY_SLICE)):
        if number not in kept:
            file.unlink()
    assert "give the header of every slice" in refusal(study)


def test_headers_without_a_place_stand_for_slices_of_one_factor_only(tmp_path):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    layouts.write_pet(study / "header", ImagePositionPatient=None)
    assert_is_the_phantom(read(study))
    layouts.write_pet(study / "header", ImagePositionPatient=None, **BY_SLICE)
    assert "give the header of every slice" in refusal(study)


def write_beds(study, **of_second):
    """Write the PET as two Enhanced PET objects, each with the decay reference of its bed."""
    k, slope = np.arange(N_SLICES), float(activity_per_suv(REFERENCE_S)) / 1000
    for bed, chosen in enumerate((k[:4], k[4:])):
        header = enhanced_pet_header(
            len(chosen),
            slopes=[slope] * len(chosen),
            **{
                **layouts.PATIENT,
                "SeriesInstanceUID": layouts.PET_UID,
                "FrameOfReferenceUID": layouts.FRAME_UID,
                "SOPInstanceUID": f"{layouts.PET_UID}.{bed}",
                **(of_second if bed else {}),
            },
        )
        for frame, slice_ in zip(header.PerFrameFunctionalGroupsSequence, chosen, strict=True):
            frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 4 * int(slice_)]
        write_enhanced_pet(
            study / "PET" / f"bed{1 - bed}.dcm", header, np.rint(SUV * 1000)[..., chosen]
        )


def test_several_enhanced_objects_of_one_series_are_one_pet(tmp_path):
    study = layouts.subfolders(tmp_path)
    shutil.rmtree(study / "PET")
    write_beds(study)
    assert_is_the_phantom(read(study))
    later = {"DecayCorrectionDateTime": dt(moment(REFERENCE_S + 600))}
    write_beds(study, **later)
    suv = SUV * np.where(np.arange(N_SLICES) < 4, 1, 2 ** (600 / 6586.2))
    assert_is_the_phantom(read(study), suv)
    write_beds(study, PatientWeight=80)
    assert "contradict each other (PatientWeight (0010,1030) differs)" in refusal(study)


@pytest.mark.parametrize("kind", ["DYNAMIC", "GATED"])
def test_the_header_of_a_moving_series_is_refused(tmp_path, kind):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    layouts.write_pet(study / "header", SeriesType=[kind, "IMAGE"])
    assert refusal(study).startswith(f"the PET is {kind.lower()} (SeriesType (0054,1000))")


def test_an_enhanced_object_gives_each_slice_its_factor(tmp_path):
    study = layouts.write_nifti_images(tmp_path / "a" / "b")
    header = enhanced_pet_header(
        N_SLICES,
        DecayCorrected="NO",
        frame_references=[dt(moment(s)) for s in ACQUIRED_S[::-1]],
        PatientID=None,
    )
    for k, frame in enumerate(header.PerFrameFunctionalGroupsSequence):
        frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 4 * (N_SLICES - 1 - k)]
    write_enhanced_pet(study / "PET_header.dcm", header, SUV)
    at_reference = SUV * 0.5 ** ((ACQUIRED_S - REFERENCE_S) / 6586.2) / PER_BQML
    layouts.write_nifti(study / "PET.nii.gz", at_reference.astype(np.float32))
    assert read(study).pet.data == pytest.approx(SUV, rel=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"ImagePositionPatient": [2, 0, 8]},
        {"ImagePositionPatient": [0, 4, 8]},
        {"ImagePositionPatient": [0, 0, 6]},
        {"ImagePositionPatient": [0, 0, 24]},
        {"ImagePositionPatient": [0, 0, -4]},
        {"PixelSpacing": [4, 5]},
        {"PixelSpacing": [2, 2], "Rows": 15, "Columns": 15},
        {"Rows": 7},
        {"Columns": 16},
        {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]},
        {"ImageOrientationPatient": [0.8, 0.6, 0, -0.6, 0.8, 0]},
    ],
    ids=str,
)
def test_a_header_of_another_series_is_refused(tmp_path, other):
    study = layouts.nifti_with_header(tmp_path)
    assert_is_the_phantom(read(study))
    header = pydicom.dcmread(study / "PET_header.dcm")
    for keyword, value in other.items():
        setattr(header, keyword, value)
    header.save_as(study / "PET_header.dcm")
    assert refusal(study).startswith("the header belongs to another series than the PET (Rows")
    images = read(study, trust_geometry=True)
    assert_is_the_phantom(images)
    assert images.warnings[0].text.endswith("does not fit): trusted")


@pytest.mark.parametrize("offset_voxels", [0.05, -0.05, 0.15])
def test_the_place_of_a_header_may_be_off_by_a_tenth_of_a_voxel(tmp_path, offset_voxels):
    study = layouts.nifti_with_header(tmp_path)
    header = pydicom.dcmread(study / "PET_header.dcm")
    header.ImagePositionPatient = [0, 0, 8 + 4 * offset_voxels]
    header.save_as(study / "PET_header.dcm")
    if abs(offset_voxels) < 0.1:
        assert_is_the_phantom(read(study))
    else:
        refusal(study)


def test_a_header_beside_a_dicom_pet_has_to_be_of_that_series(tmp_path):
    study = layouts.subfolders(tmp_path)
    first = layouts.write_pet(tmp_path / "copy")[0]
    (study / "HEADER").mkdir()
    first.rename(study / "HEADER" / "1.dcm")
    assert_is_the_phantom(read(study))
    header = pydicom.dcmread(study / "HEADER" / "1.dcm")
    header.SeriesInstanceUID = "1.2.3"
    header.save_as(study / "HEADER" / "1.dcm")
    assert refusal(study).startswith("PET versus DICOM header do not belong together (Series")


# --- who and where ---------------------------------------------------------------------------

WRITERS = {
    "CT": lambda study, **other: layouts.write_ct(study / "CT", **other),
    "PET": lambda study, **other: layouts.write_pet(study / "PET", **other),
    "mask": lambda study, **other: layouts.write_seg(study / "MASK" / "RS.dcm", **other),
}


@pytest.mark.parametrize(
    ("keyword", "tag"),
    [
        ("PatientID", "(0010,0020)"),
        ("PatientBirthDate", "(0010,0030)"),
        ("FrameOfReferenceUID", "(0020,0052)"),
    ],
)
@pytest.mark.parametrize("role", WRITERS)
def test_images_that_differ_in_identity_are_refused(tmp_path, role, keyword, tag):
    study = layouts.subfolders(tmp_path)
    WRITERS["mask"](study)
    WRITERS[role](study, **{keyword: "1.9.8" if keyword[0] == "F" else "19010101"})
    message = refusal(study)
    others = " and ".join(each for each in WRITERS if each != role)
    sides = (f"{role} versus {others}", f"{others} versus {role}")
    assert message.startswith(sides)
    assert f"({keyword} {tag} differs)" in message
    images = read(study, trust_geometry=True)
    assert_is_the_phantom(images)
    assert any("differs): trusted" in warning for warning in texts(images.warnings))


@pytest.mark.parametrize("keyword", ["PatientID", "FrameOfReferenceUID"])
@pytest.mark.parametrize("role", ["CT", "PET"])
def test_slices_that_differ_in_identity_within_one_series_are_refused(tmp_path, role, keyword):
    study = layouts.subfolders(tmp_path)
    usual = {"PatientID": "ID-4711", "FrameOfReferenceUID": layouts.FRAME_UID}[keyword]
    WRITERS[role](study, **{keyword: PerSlice(*[usual] * (N_SLICES - 1), "1.9.8")})
    assert refusal(study).startswith(f"the files of the {role} do not belong together ({keyword} ")
    assert len(read(study, trust_geometry=True).warnings) == 1


@pytest.mark.parametrize("keyword", ["PatientID", "PatientBirthDate", "FrameOfReferenceUID"])
def test_what_an_anonymiser_removed_does_not_count(tmp_path, keyword):
    study = layouts.subfolders(tmp_path)
    layouts.write_ct(study / "CT", **{keyword: None})
    assert_is_the_phantom(read(study))


@pytest.mark.parametrize("role", WRITERS)
def test_names_tell_the_patient_where_no_number_does(tmp_path, role):
    study = layouts.subfolders(tmp_path)
    WRITERS["mask"](study)
    WRITERS[role](study, PatientName="Roe^John", PatientID="")
    message = refusal(study)
    assert "do not belong together (PatientName (0010,0010) differs)" in message
    assert "Roe" not in message
    assert_is_the_phantom(read(study, trust_geometry=True))


@pytest.mark.parametrize("name", ["DOE^JANE^^Dr", "Jane Doe", "Doe^Jane=Doe^Jane", ""])
def test_one_name_may_be_spelled_differently(tmp_path, name):
    study = layouts.subfolders(tmp_path)
    layouts.write_ct(study / "CT", PatientName=name, PatientID="")
    assert read(study).warnings == ()


def test_other_names_of_one_patient_are_told(tmp_path):
    study = layouts.subfolders(tmp_path)
    WRITERS["mask"](study)
    layouts.write_ct(study / "CT", PatientName="D?e^Jane")
    (warning,) = texts(read(study).warnings)
    assert warning == (
        "CT versus PET and mask differ in PatientName (0010,0010), but not in PatientID (0010,0020)"
    )


def rtstruct_of(study, change):
    """Change the RTSTRUCT of a study."""
    path = study / "MASK" / "RS.dcm"
    rtstruct = pydicom.dcmread(path)
    change(rtstruct)
    rtstruct.save_as(path)
    return study


def other_frame(rtstruct, uid="1.9.8"):
    rtstruct.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = uid


def other_frames(rtstruct):
    other_frame(rtstruct)
    rtstruct.ReferencedFrameOfReferenceSequence[0].FrameOfReferenceUID = "1.9.8"


@pytest.mark.parametrize("change", [other_frame, other_frames], ids=["IBSI", "rt-utils 1.2.0"])
def test_regions_in_another_frame_are_read_where_the_series_they_name_is_there(tmp_path, change):
    """They were refused, by a message that named a tag which was equal."""
    study = rtstruct_of(layouts.subfolders(tmp_path), change)
    images = read(study)
    assert_is_the_phantom(images)
    (warning,) = images.warnings
    assert warning.text == (
        "region 1 of the RTSTRUCT names another frame of reference (ReferencedFrameOfReferenceUID "
        "(3006,0024)) than the PET has: read all the same, as the series that it was drawn on is "
        "there"
    )


def test_regions_in_the_frame_of_another_series_are_refused(tmp_path):
    def drawn_elsewhere(rtstruct):
        other_frame(rtstruct)
        frame = copy.deepcopy(rtstruct.ReferencedFrameOfReferenceSequence[0])
        frame.FrameOfReferenceUID = "1.9.8"
        (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
        series.SeriesInstanceUID = "1.9.9"
        rtstruct.ReferencedFrameOfReferenceSequence.append(frame)

    study = rtstruct_of(layouts.subfolders(tmp_path), drawn_elsewhere)
    assert "ReferencedFrameOfReferenceUID (3006,0024)) than the PET has: leave" in refusal(study)
    assert_is_the_phantom(read(study, trust_geometry=True))


def test_mask_on_tells_what_contours_were_drawn_on_whose_series_is_not_there(tmp_path):
    study = layouts.subfolders(tmp_path)
    layouts.write_rtstruct(study / "MASK" / "RS.dcm", "1.2.3.999")
    assert "--mask-on ct or --mask-on pet" in refusal(study)
    images = read(study, mask_on="pet")
    assert_is_the_phantom(images)
    assert texts(images.warnings) == [
        "the RTSTRUCT does not tell that it was drawn on the PET (RTReferencedSeriesSequence "
        "(3006,0014)): trusted (--mask-on)"
    ]
    on_ct = read(study, mask_on="ct").mask
    assert np.array_equal(on_ct.data, np.kron(LABELS, np.ones((2, 2, 1))))
    rtstruct_of(study, other_frame)
    assert "ReferencedFrameOfReferenceUID (3006,0024)" in refusal(study, mask_on="pet")
    assert_is_the_phantom(read(study, mask_on="pet", trust_geometry=True))


def test_mask_on_does_not_contradict_the_series_that_is_named(tmp_path):
    images = read(layouts.subfolders(tmp_path), mask_on="ct")
    assert_is_the_phantom(images)
    assert texts(images.warnings) == [
        "the RTSTRUCT names the PET as what it was drawn on: read so, whatever --mask-on ct"
    ]


@pytest.mark.parametrize(("role", "is_drawn_on"), [("CT", False), ("PET", True)])
def test_unevenly_spaced_slices_are_resampled_if_asked_for(tmp_path, role, is_drawn_on):
    """The phantom is alike in all slices but for the first and the last: none is missed."""
    study = layouts.subfolders(tmp_path)
    (study / role / "pet_003.dcm").unlink()
    assert "unevenly spaced slices" in refusal(study)
    images = read(study, uneven_slices="resample")
    assert_is_the_phantom(images)
    warnings = texts(images.warnings)
    assert any(
        each.startswith(f"the {role} has unevenly spaced slices")
        and each.endswith("resampled linearly onto 6 slices of 4.00 mm")
        for each in warnings
    )
    assert any("was drawn on the unevenly spaced" in each for each in warnings) is is_drawn_on


def test_what_was_taken_is_told_for_the_private_mapping(tmp_path):
    taken = read(layouts.subfolders(tmp_path)).taken
    assert taken == Taken("GK p.v. 3 Doe (6 slices)", "PET corr. Doe (6 slices)", "MASK/RS.dcm",
                          "Lesion")  # fmt: skip
    nifti = read(layouts.nifti_with_header(tmp_path)).taken
    assert nifti == Taken("CT.nii.gz", "PET.nii.gz", "MASK.nii.gz", "")


def test_an_empty_mask_is_refused_with_what_was_found_in_it(tmp_path):
    """A contour smaller than a voxel: "empty" alone sent the reader to look for another file."""
    study = layouts.subfolders(tmp_path)

    def shrink(rtstruct):
        for contour in rtstruct.ROIContourSequence[0].ContourSequence:
            x, y, z = contour.ContourData[:3]
            small = [(x - 1, y + 1), (x - 0.5, y + 1), (x - 0.5, y + 0.5)]
            contour.ContourData = [value for each in small for value in (*each, z)]
            contour.NumberOfContourPoints = 3

    rtstruct_of(study, shrink)
    assert "the mask is empty (region 1: 6 contour(s) enclose no voxel centre" in refusal(study)


@pytest.mark.parametrize("value", [1, 4])
def test_several_labels_of_a_file_are_told_for_no_name_says_what_they_are(tmp_path, value):
    study = layouts.nifti_with_header(tmp_path)
    labels = LABELS.copy()
    labels[0, 0, 0] = value
    layouts.write_nifti(study / "MASK.nii.gz", labels)
    told = [each for each in texts(read(study).warnings) if "labels" in each]
    assert told == [
        "labels 1, 4 (2 labels) all count as tumour, unless preprocessing.py --labels keep "
        "keeps them apart: check that none is an organ"
    ] * (value == 4)


@pytest.mark.parametrize("declared_mm", [None, 8.0])
@pytest.mark.parametrize("role", ["pet", "ct"])
def test_lesions_of_one_plane_are_not_as_thick_as_the_gap_between_them(tmp_path, role, declared_mm):
    """26 ml instead of 4: the planes of a SEG without a spacing were taken as neighbours."""
    study = layouts.tcia(tmp_path)
    labels = np.zeros_like(LABELS)
    labels[2, 3, 2], labels[5, 5, 4] = 1, 1
    affine = PET_AFFINE
    if role == "ct":
        labels, affine = np.kron(labels, np.ones((2, 2, 1), np.uint8)), CT_AFFINE
    seg = build_seg(labels, affine, ["Lesion"])
    (measures,) = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    del measures.SpacingBetweenSlices, measures.SliceThickness
    if declared_mm:
        measures.SpacingBetweenSlices = declared_mm
    seg.PatientID, seg.PatientName = (layouts.PATIENT[k] for k in ("PatientID", "PatientName"))
    seg.save_as(next(study.glob("*Seg*")) / "1-1.dcm")
    images = read(study)
    assert np.array_equal(images.mask.data, labels)
    assert np.array_equal(images.mask.affine, getattr(images, role).affine)
    wrong = "SpacingBetweenSlices (0018,0088) is wrong, 8.000 mm: the planes lie on a grid of 4.000"
    assert texts(images.warnings) == ([f"{wrong} mm"] if declared_mm else [])


@pytest.mark.parametrize("names", ["the PET", "nothing", "another series"])
def test_only_a_mask_of_another_series_may_have_slices_further_apart(tmp_path, names):
    """On every second slice, three nodes of one plane were one lesion twice as thick."""
    study = layouts.tcia(tmp_path)
    labels = np.zeros_like(LABELS)
    labels[2, 3, 1:6:2] = 1
    seg = build_seg(labels, PET_AFFINE, ["Lesion"])
    (measures,) = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    measures.SpacingBetweenSlices = measures.SliceThickness = 8
    if names == "nothing":
        del seg.ReferencedSeriesSequence
    elif names == "the PET":
        header = pydicom.dcmread(next(study.glob("*PET*/*.dcm")), stop_before_pixels=True)
        seg.ReferencedSeriesSequence[0].SeriesInstanceUID = header.SeriesInstanceUID
    seg.PatientID, seg.PatientName = (layouts.PATIENT[k] for k in ("PatientID", "PatientName"))
    seg.save_as(next(study.glob("*Seg*")) / "1-1.dcm")
    mask = read(study).mask
    assert np.count_nonzero(mask.data) == 3
    assert mask.affine[2, 2] == (8 if names == "another series" else 4)


def test_the_header_of_another_patient_is_refused(tmp_path):
    study = layouts.nifti_with_header(tmp_path)
    (study / "CT.nii.gz").unlink()
    layouts.write_ct(study / "ct", PatientID="other")
    assert "CT versus DICOM header do not belong together (PatientID" in refusal(study)


def moved(affine, *by_mm):
    there = affine.copy()
    there[:3, 3] += by_mm
    return there


# The PET spans 32 x 32 x 24 mm.
@pytest.mark.parametrize("by_mm", [(33, 0, 0), (0, -33, 0), (0, 0, 25), (0, 0, -5000)])
def test_images_that_lie_apart_are_refused(tmp_path, by_mm):
    study = layouts.nifti_with_header(tmp_path)
    layouts.write_nifti(study / "CT.nii.gz", HU, moved(CT_AFFINE, *by_mm))
    assert refusal(study).startswith("the PET and the CT do not overlap in space")
    layouts.write_nifti(study / "CT.nii.gz", HU, moved(CT_AFFINE, *np.multiply(by_mm, 0.004)))
    assert read(study).warnings == ()


def test_oblique_images_that_lie_apart_are_refused(tmp_path):
    # The boxes along the axes of the PET overlap, those along the axes of the CT do not.
    study = layouts.nifti_with_header(tmp_path)
    turn = np.eye(4)
    turn[:2, :2] = np.array([[1, -1], [1, 1]]) / np.sqrt(2)
    middle = np.mean([PET_AFFINE @ (0, 0, 0, 1), PET_AFFINE @ (7, 7, 5, 1)], axis=0)[:3]
    oblique = moved(np.eye(4), *middle) @ turn @ moved(np.eye(4), *-middle) @ CT_AFFINE
    for corner_mm, apart in ((30.0, True), (20.0, False)):
        affine = moved(oblique, corner_mm, corner_mm, 0)
        layouts.write_nifti(study / "CT.nii.gz", HU, affine)
        if apart:
            assert "do not overlap" in refusal(study)
        else:
            read(study)


def test_a_mask_beside_the_pet_is_refused(tmp_path):
    study = layouts.nifti_with_header(tmp_path)
    layouts.write_nifti(study / "MASK.nii.gz", LABELS, moved(PET_AFFINE, 0, 0, 25))
    assert "the mask's labelled voxels and the PET do not overlap" in refusal(study)


def test_only_labelled_voxels_count_for_the_place_of_a_mask(tmp_path):
    # Two lesions, one on either side of the PET: the box around them would cover it.
    study = layouts.nifti_with_header(tmp_path)
    large = np.zeros((40, 8, 6), np.uint8)
    large[[0, -1]] = 1
    layouts.write_nifti(study / "MASK.nii.gz", large, moved(PET_AFFINE, 64, 0, 0))
    assert "the mask's labelled voxels and the PET do not overlap" in refusal(study)


def test_labels_beside_the_pet_are_told_with_their_volume(tmp_path):
    study = layouts.nifti_with_header(tmp_path)
    # Two of six slices lie above the PET: 2 x 2 voxels of 64 microlitres.
    layouts.write_nifti(study / "MASK.nii.gz", LABELS, moved(PET_AFFINE, 0, 0, 8))
    assert texts(read(study).warnings) == ["0.256 ml of the mask lie outside the PET"]


def test_a_nifti_whose_sform_and_qform_differ_is_refused(tmp_path):
    study = layouts.nifti_with_header(tmp_path)
    image = nibabel.load(study / "PET.nii.gz")
    image.set_qform(moved(PET_AFFINE, 1.5, 0, 0), code=1)
    image.to_filename(study / "PET.nii.gz")
    assert "sform and qform" in refusal(study)


# --- the plan --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "rule"),
    [({}, "BQML, rule 12b"), (GML, "GML, rule 7"), ({"DecayCorrection": "ADMIN"}, "BQML, rule 11")],
)
def test_a_plan_tells_the_rule_without_reading_voxels(tmp_path, header, rule):
    study = layouts.subfolders(tmp_path)
    for file in layouts.write_pet(study / "PET", **header):
        image = pydicom.dcmread(file)
        image.PixelData = b""
        image.save_as(file)
    plan = plan_study(find_roles(str(study), Patterns()), Conversion())
    assert plan.suv_rule == rule


def test_a_plan_refuses_a_header_of_another_series(tmp_path):
    """A dry run said that the study would be written."""
    study = layouts.nifti_with_header(tmp_path)
    header = pydicom.dcmread(study / "PET_header.dcm")
    header.ImagePositionPatient = [0, 0, 900]
    header.save_as(study / "PET_header.dcm")
    with pytest.raises(StudyError, match="belongs to another series"):
        plan_study(find_roles(str(study), Patterns()), Conversion())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda study: layouts.write_pet(study / "PET", PatientWeight=None),
        lambda study: layouts.write_ct(study / "CT", PatientID="other"),
        lambda study: layouts.write_rtstruct(study / "MASK" / "RS.dcm", "1.2.3.999"),
        lambda study: (study / "CT" / "pet_003.dcm").unlink(),
        lambda study: (study / "PET" / "pet_003.dcm").unlink(),
    ],
    ids=["SUV", "identity", "series of contours", "slice of CT", "slice of PET"],
)
def test_a_plan_refuses_what_headers_tell(tmp_path, spoil):
    study = layouts.subfolders(tmp_path)
    spoil(study)
    roles = find_roles(str(study), Patterns())
    with pytest.raises(StudyError):
        plan_study(roles, Conversion())


def test_a_pet_that_says_it_had_more_slices_is_told(tmp_path):
    study = layouts.subfolders(tmp_path)
    (study / "PET" / f"pet_{N_SLICES - 1:03d}.dcm").unlink()
    assert any("NumberOfSlices (0054,0081)" in warning for warning in texts(read(study).warnings))


# --- real patients ---------------------------------------------------------------------------

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared real studies are not here")
def test_headers_of_other_patients_are_refused():
    found = {
        study.parent.name: find_roles(str(study), Patterns())
        for study in sorted((DATA / "sts_nifti").glob("*/*"))
    }
    assert len(found) == 3
    for name, roles in found.items():
        for other, others in found.items():
            swapped = type(roles)(roles.ct, roles.pet, roles.mask, others.header)
            if name == other:
                read_images(swapped, Conversion())
            else:
                with pytest.raises(StudyError, match="belongs to another series"):
                    read_images(swapped, Conversion())
