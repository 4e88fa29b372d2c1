"""Where the slices of CT and PET series lie, and which make no stack."""

import os

import numpy as np
import pydicom
import pytest
from dicom_builders import (
    ORIENTATIONS,
    affine_of,
    build_enhanced,
    noise,
    read_series,
    write_file,
    write_slices,
)
from dicom_checks import ENCODABLE, SHAPE, SYNTAXES, assert_image_is, read_image, refusal, slices
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from said import texts

from common.dicom.pixels import read_ct, read_pet
from common.dicom.series import stack_slices
from common.errors import StudyError

STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))


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
        ": export the complete series, or give --uneven-slices resample"
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


@pytest.mark.parametrize(
    ("gaps_mm", "files"),
    [
        ([3, 3, 0, 3, 3], "c and d: 0.00 mm apart"),
        ([3, 3, 6, 3, 3], "c and d: 6.00 mm apart"),
        ([3, 3, 3, 3, 1.5], "e and last: 1.50 mm apart"),
        ([3, 1, 2, 3, 3], "b and c: 1.00 mm apart; c and d: 2.00 mm apart"),
    ],
)
def test_the_files_beside_a_gap_are_named_to_the_private_mapping(tmp_path, gaps_mm, files):
    """Where the odd gap was shorter than the others, the first two files were named."""
    write_slices(tmp_path, series_with_gaps(gaps_mm), names=["first", "b", "c", "d", "e", "last"])
    with pytest.raises(StudyError) as refused:
        stack_slices(read_series(tmp_path, "PT")[0])
    assert refused.value.private == files


def test_of_many_odd_gaps_the_oddest_are_named(tmp_path):
    gaps_mm = [3, 3, 3, 3, 3, 3, 3, 3, 3, 4.1, 4.2, 4.3, 4.4, 4.5, 4.6]
    write_slices(tmp_path, series_with_gaps(gaps_mm))
    with pytest.raises(StudyError) as refused:
        stack_slices(read_series(tmp_path, "PT")[0])
    named = refused.value.private.split("; ")
    assert [each.split(": ")[1] for each in named] == [
        f"{mm:.2f} mm apart" for mm in (4.3, 4.4, 4.5, 4.6)
    ]


# --- uneven slices brought onto an even grid -------------------------------------------------

MIXED = [3.27] * 4 + [6.54] * 3
UNEVEN = {
    "two spacings": (MIXED, 3.27, 11),
    "an odd last slice": ([3.27] * 5 + [1.9], 18.25 / 10, 11),
    "a slice at a table joint": ([3.0, 3.0, 1.0, 2.0, 3.0], 1.0, 13),
    "rounded to whole mm": ([3, 3, 4, 3, 3, 3, 4], 23 / 8, 9),
    "a missing slice": ([3, 3, 6, 3], 3.0, 6),
}


def resampled(folder, modality="CT", factors=1.0):
    stack = stack_slices(*read_series(folder, modality), resample_uneven=True)
    if modality == "CT":
        return stack, read_ct(stack)
    return stack, read_pet(stack, np.broadcast_to(factors, len(stack.slices)))


def write_ramp(folder, gaps_mm, modality="CT", tilt=0.0, slopes=1.0, intercept=0.0):
    """Write slices of values that rise by 1000 a millimetre, and from column to column."""
    z_mm = np.cumsum([0, *gaps_mm])
    ramp = 1000 * z_mm + 8 * np.arange(4)[:, np.newaxis, np.newaxis]
    stored = np.rint(np.broadcast_to(ramp / slopes, (4, 5, len(z_mm)))).astype(np.uint16)
    datasets = slices(stored, modality=modality, slopes=slopes, intercept=intercept)
    for dataset, z in zip(datasets, z_mm, strict=True):
        dataset.ImagePositionPatient = [0, f"{tilt * z:.5f}", f"{z:.5f}"]
    write_slices(folder, datasets)


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize("modality", ["CT", "PT"])
@pytest.mark.parametrize(("gaps_mm", "spacing_mm", "n_planes"), UNEVEN.values(), ids=UNEVEN)
def test_uneven_slices_come_onto_their_finest_even_grid(
    tmp_path, gaps_mm, spacing_mm, n_planes, modality, tilt
):
    """What is linear in space is not changed by linear interpolation."""
    write_ramp(tmp_path, gaps_mm, modality, tilt)
    assert "give --uneven-slices resample" in refusal(tmp_path, modality)
    stack, image = resampled(tmp_path, modality)
    assert image.data.shape == stack.shape == (4, 5, n_planes)
    np.testing.assert_allclose(image.affine[:3, 2], [0, -tilt * spacing_mm, spacing_mm], atol=1e-4)
    z_mm = spacing_mm * np.arange(n_planes)
    assert z_mm[-1] == pytest.approx(sum(gaps_mm), abs=1e-3)
    expected = 1000 * z_mm + 8 * np.arange(4)[:, np.newaxis, np.newaxis]
    np.testing.assert_allclose(
        image.data, np.broadcast_to(expected, image.data.shape), atol=0.01 * spacing_mm * 1000
    )
    (warning,) = texts(stack.warnings)
    role = {"CT": "CT", "PT": "PET"}[modality]
    assert warning == (
        f"the {role} has unevenly spaced slices (ImagePositionPatient (0020,0032): gaps from "
        f"{min(gaps_mm):.2f} to {max(gaps_mm):.2f} mm, {len(gaps_mm) + 1} slices): resampled "
        f"linearly onto {n_planes} slices of {spacing_mm:.2f} mm"
    )


def test_planes_that_lie_on_slices_are_those_slices(tmp_path):
    stored = noise((4, 4, 8)) * 2
    datasets = slices(stored, intercept=-1024)
    # As scanners round them, to a hundredth of a millimetre.
    for dataset, z_mm in zip(datasets, np.cumsum([0, *MIXED]), strict=True):
        dataset.ImagePositionPatient = [0, 0, f"{z_mm - 700.004:.2f}"]
    write_slices(tmp_path, datasets)
    _, image = resampled(tmp_path)
    hu = stored.astype(int) - 1024
    assert image.data.dtype == np.int16
    np.testing.assert_array_equal(image.data[:, :, [0, 1, 2, 3, 4, 6, 8, 10]], hu)
    np.testing.assert_array_equal(image.data[:, :, 5], (hu[:, :, 4] + hu[:, :, 5]) / 2)


def test_uneven_slices_have_their_own_factors_to_suv(tmp_path):
    slopes = np.linspace(1, 3, len(MIXED) + 1)
    write_ramp(tmp_path, MIXED, "PT", slopes=slopes)
    _, plain = resampled(tmp_path, "PT")
    factors = np.linspace(2, 1, len(MIXED) + 1)
    _, image = resampled(tmp_path, "PT", factors)
    on_slices = [0, 1, 2, 3, 4, 6, 8, 10]
    np.testing.assert_allclose(
        image.data[:, :, on_slices], plain.data[:, :, on_slices] * factors, rtol=1e-6
    )


def test_even_slices_are_not_resampled(tmp_path):
    stored = noise(SHAPE)
    write_slices(tmp_path, slices(stored))
    stack, image = resampled(tmp_path)
    assert (stack.places, stack.warnings) == (None, ())
    assert_image_is(image, stored, affine_of(), np.int16)


def test_slices_pushed_aside_or_in_one_place_are_refused_all_the_same(tmp_path):
    for name, datasets in (
        ("aside", series_with_gaps([3] * 5, sideways_mm=0.35)),
        ("twice", series_with_gaps([3, 3, 0.01, 3])),
    ):
        write_slices(tmp_path / name, datasets)
        with pytest.raises(StudyError) as refused:
            resampled(tmp_path / name, "PT")
        assert "--uneven-slices" not in str(refused.value)


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
    assert texts(warnings) == [expected] * n_warnings


@pytest.mark.parametrize(("modality", "role"), [("CT", "CT"), ("PT", "PET")])
@pytest.mark.parametrize(("lossy", "n_warnings"), [(None, 0), ("00", 0), ("01", 1)])
def test_lossy_compression_is_told(tmp_path, modality, role, lossy, n_warnings):
    write_slices(tmp_path, slices(modality=modality, LossyImageCompression=lossy))
    warnings = stack_slices(read_series(tmp_path, modality)[0]).warnings
    expected = (
        f"the {role} was compressed with loss (LossyImageCompression (0028,2110)): its values are "
        "not those measured; export it without"
    )
    assert texts(warnings) == [expected] * n_warnings


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
         "a value is missing in the header (ImagePositionPatient (0020,0032))"),
        (lambda e: delattr(e.PerFrameFunctionalGroupsSequence[1],
                           "PixelValueTransformationSequence"), "RescaleSlope (0028,1053)"),
        (lambda e: delattr(e, "SharedFunctionalGroupsSequence"), "missing in the header (ImageOr"),
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
