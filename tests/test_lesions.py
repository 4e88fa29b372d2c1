"""Lesions against plain loops, skimage's components and closed-form phantoms.

TUMORVOLUME_STRESS=200 makes every property test that many times longer.
"""

import itertools
import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import label as skimage_label

from common.lesions import (
    Lesion,
    dose_fraction,
    isocontour,
    label_lesions,
    measure_lesions,
    tumour_burden,
)

STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))
PEAK_RADIUS_MM = 6.2035


def examples(count):
    return settings(max_examples=count * STRESS, deadline=None, derandomize=True, database=None)


shapes = st.tuples(*[st.integers(1, 9)] * 3)


@st.composite
def masks_and_suvs(draw):
    """Sparse masks, so that several lesions fit, and SUVs of few values, so that some are equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(shapes)
    mask = (rng.random(shape) < draw(st.sampled_from((0.05, 0.15, 0.4)))).astype(np.uint8)
    suv = (rng.integers(draw(st.sampled_from((-4, 0))), 41, shape) / 4).astype(np.float32)
    return mask, suv


# --- components -------------------------------------------------------------------------------


@examples(150)
@given(masks_and_suvs())
def test_lesions_are_the_26_connected_components(drawn):
    mask, _ = drawn
    labels, count = label_lesions(mask)
    assert labels.dtype == np.int32
    assert labels.shape == mask.shape
    expected = skimage_label(mask, connectivity=3)
    assert count == expected.max()
    np.testing.assert_array_equal(labels > 0, mask > 0)
    pairs = set(zip(labels[mask > 0].tolist(), expected[mask > 0].tolist(), strict=True))
    assert len(pairs) == count
    firsts = [int(np.flatnonzero(labels == label)[0]) for label in range(1, count + 1)]
    assert firsts == sorted(firsts)


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = 1
    assert label_lesions(mask)[1] == 2


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.float32])
def test_labels_do_not_depend_on_type_or_memory_order(dtype):
    mask = np.random.default_rng(1).random((9, 8, 7)) < 0.1
    expected, count = label_lesions(mask)
    labels, same_count = label_lesions(np.asfortranarray(mask.astype(dtype) * dtype(3)))
    np.testing.assert_array_equal(labels, expected)
    assert count == same_count > 5


def test_no_lesion():
    labels, count = label_lesions(np.zeros((3, 4, 5), np.uint8))
    assert count == 0
    assert not labels.any()
    assert not isocontour(np.ones((3, 4, 5), np.float32), np.zeros((3, 4, 5))).any()
    assert measure_lesions(np.ones((3, 4, 5)), np.zeros((3, 4, 5)), np.eye(4)) == ()


# --- isocontour -------------------------------------------------------------------------------


def isocontour_by_loops(suv, mask, threshold_percent):
    lesions = skimage_label(mask > 0, connectivity=3)
    contour = np.zeros(mask.shape, bool)
    for voxel in np.ndindex(mask.shape):
        if lesions[voxel]:
            suv_max = max(
                suv[other] for other in np.ndindex(mask.shape) if lesions[other] == lesions[voxel]
            )
            contour[voxel] = suv_max > 0 and suv[voxel] * 100 >= threshold_percent * suv_max
    return contour


@examples(60)
@given(masks_and_suvs(), st.sampled_from((0, 25, 50, 75, 100)))
def test_isocontour_equals_plain_loops(drawn, threshold_percent):
    mask, suv = (volume[:6, :6, :6] for volume in drawn)
    contour = isocontour(suv, mask, threshold_percent)
    assert contour.dtype == bool
    np.testing.assert_array_equal(contour, isocontour_by_loops(suv, mask, threshold_percent))


@examples(60)
@given(masks_and_suvs(), st.permutations(range(3)), st.tuples(*[st.sampled_from((1, -1))] * 3))
def test_isocontour_turns_with_the_image(drawn, order, steps):
    mask, suv = drawn
    flips = tuple(slice(None, None, step) for step in steps)
    turned = isocontour(suv.transpose(order)[flips], mask.transpose(order)[flips], 41)
    np.testing.assert_array_equal(turned, isocontour(suv, mask, 41).transpose(order)[flips])


@examples(60)
@given(masks_and_suvs(), st.integers(-2, 6))
def test_isocontour_of_a_power_of_two_times_the_suv_is_the_same(drawn, exponent):
    mask, suv = drawn
    scaled = isocontour(suv * np.float32(2.0**exponent), mask, 41)
    np.testing.assert_array_equal(scaled, isocontour(suv, mask, 41))


@examples(60)
@given(masks_and_suvs(), st.floats(0, 100), st.floats(0, 100))
def test_isocontours_shrink_with_the_threshold_and_keep_the_maximum(drawn, one, other):
    mask, suv = drawn
    larger, smaller = (isocontour(suv, mask, t) for t in sorted((one, other)))
    assert not (smaller & ~larger).any()
    assert not (larger & ~(mask > 0)).any()
    lesions = skimage_label(mask, connectivity=3)
    for lesion in range(1, lesions.max() + 1):
        voxels = lesions == lesion
        if suv[voxels].max() > 0:
            assert (smaller & voxels & (suv == suv[voxels].max())).any()


def test_each_lesion_has_a_threshold_of_its_own():
    suv = np.array([10.0, 4.0, 2.0, 0.0, 0.0, 1.0, 0.5, 0.2], np.float32).reshape(8, 1, 1)
    mask = np.array([1, 1, 1, 0, 0, 1, 1, 1]).reshape(8, 1, 1)
    assert isocontour(suv, mask, 40).ravel().tolist() == [1, 1, 0, 0, 0, 1, 1, 0]


def test_isocontour_at_a_fixed_suv():
    suv = np.array([10.0, 4.0, 2.0, 9.0, 0.0, 1.0, 0.5, 0.2], np.float32).reshape(8, 1, 1)
    mask = np.array([1, 1, 1, 0, 0, 1, 1, 1]).reshape(8, 1, 1)
    contour = isocontour(suv, mask, threshold_suv=4)
    assert contour.ravel().tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("suv_max", [0.0, -0.5])
def test_lesions_without_uptake_have_no_isocontour(suv_max):
    mask = np.ones((2, 2, 2), np.uint8)
    suv = np.full(mask.shape, suv_max, np.float32)
    assert not isocontour(suv, mask, 25).any()
    (lesion,) = measure_lesions(suv, mask, np.eye(4))
    assert (lesion.iso_mtv_ml, lesion.iso_suv_mean, lesion.iso_tlg_g) == (0, 0, 0)
    assert lesion.suv_max == suv_max


# --- measures of phantoms ---------------------------------------------------------------------


def turned(affine, angle=0.3):
    turn = np.eye(4)
    turn[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return turn @ affine


SHEARED = np.array([[2.0, 0.4, 0.3, -60], [0, 2, 0.5, -60], [0, 0, 3, -60], [0, 0, 0, 1]])
AFFINES = {
    "2 x 2 x 3 mm": np.diag([2.0, 2, 3, 1]),
    "4 mm": np.diag([4.0, 4, 4, 1]),
    "LAS": np.diag([-2.04, 2.04, 3.27, 1]),
    "oblique": turned(np.diag([2.5, 3, 2.5, 1])),
    "sheared": SHEARED,
}


def distance_mm(shape, affine, centre_mm):
    """Distance of each voxel from a point."""
    indices = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.linalg.norm(indices @ affine[:3, :3].T + affine[:3, 3] - centre_mm, axis=-1)


def around_the_middle(affine, width_mm):
    """Shape, and the affine shifted so that the grid's middle is near (1, 2, 3) mm."""
    shape = tuple(int(n) for n in np.ceil(width_mm / np.linalg.norm(affine[:3, :3], axis=0)))
    affine = affine.copy()
    affine[:3, 3] = np.array([1, 2, 3]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_sphere_of_known_volume_and_uptake(affine):
    radius_mm = 40.0
    shape, affine = around_the_middle(affine, 130)
    sphere = distance_mm(shape, affine, (1, 2, 3)) <= radius_mm
    suv = np.where(sphere, 8.0, 1.0).astype(np.float32)
    (lesion,) = measure_lesions(suv, sphere, affine)
    volume_ml = 4 / 3 * math.pi * radius_mm**3 / 1000
    assert lesion.mtv_ml == pytest.approx(volume_ml, rel=0.01)
    assert lesion.iso_mtv_ml == lesion.mtv_ml
    assert (lesion.suv_max, lesion.suv_mean) == (8, 8)
    assert lesion.suv_peak == pytest.approx(8, rel=1e-6)
    assert lesion.tlg_g == pytest.approx(8 * volume_ml, rel=0.01)
    assert lesion.centroid_mm == pytest.approx((1, 2, 3), abs=0.1)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_isocontour_of_a_gaussian_lesion_is_a_sphere_of_known_volume(affine):
    sigma_mm = 35.0
    shape, affine = around_the_middle(affine, 240)
    radius = distance_mm(shape, affine, (1, 2, 3))
    suv = 12 * np.exp(-(radius**2) / (2 * sigma_mm**2))
    (lesion,) = measure_lesions(suv, radius < 90, affine, threshold_percent=41)
    iso_radius_mm = sigma_mm * math.sqrt(-2 * math.log(0.41 * lesion.suv_max / 12))
    assert lesion.iso_mtv_ml == pytest.approx(4 / 3 * math.pi * iso_radius_mm**3 / 1000, rel=0.01)
    assert lesion.iso_tlg_g == pytest.approx(lesion.iso_suv_mean * lesion.iso_mtv_ml)
    assert 0.41 * 12 < lesion.iso_suv_mean < 12


def gaussian_peak(sigma_mm):
    """Mean of exp(-r^2 / 2 sigma^2) in a sphere of 1 ml around its top."""
    r = PEAK_RADIUS_MM
    integral = sigma_mm**3 * math.sqrt(math.pi / 2) * math.erf(r / sigma_mm / math.sqrt(2))
    integral -= sigma_mm**2 * r * math.exp(-(r**2) / (2 * sigma_mm**2))
    return 3 / r**3 * integral


@pytest.mark.parametrize("sigma_mm", [12.0, 20.0, 30.0])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_suv_peak_of_a_gaussian_lesion(affine, sigma_mm):
    shape, affine = around_the_middle(affine, 60)
    shape = tuple(n | 1 for n in shape)
    affine[:3, 3] = np.array([1, 2, 3]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    suv = 10 * np.exp(-(distance_mm(shape, affine, (1, 2, 3)) ** 2) / (2 * sigma_mm**2))
    (lesion,) = measure_lesions(suv, suv > 5, affine)
    assert lesion.suv_max == pytest.approx(10)
    assert lesion.suv_peak == pytest.approx(10 * gaussian_peak(sigma_mm), rel=0.01)


@pytest.mark.parametrize(
    ("spacing_mm", "share_ml"),
    [((2, 2, 3), 0.012), ((1, 1, 1), 0.001), ((4, 4, 4), 0.064), ((30, 30, 30), 1.0)],
)
def test_one_hot_voxel_counts_by_its_volume_within_the_sphere(spacing_mm, share_ml):
    suv = np.zeros((31, 31, 31), np.float32)
    suv[15, 15, 15] = 50
    (lesion,) = measure_lesions(suv, suv > 0, np.diag([*spacing_mm, 1.0]))
    assert lesion.suv_peak == pytest.approx(50 * share_ml, rel=0.01)


def test_suv_peak_is_the_best_placed_sphere_not_the_one_around_the_maximum():
    suv = np.ones((60, 20, 20), np.float32)
    suv[5:15, 5:15, 5:15] = 1.5
    suv[10, 10, 10] = 20
    suv[40:55, 4:16, 4:16] = 8
    suv[15:40, 10, 10] = 2
    lesion_mask = suv > 1
    (lesion,) = measure_lesions(suv, lesion_mask, np.diag([2.0, 2, 2, 1]))
    assert lesion.suv_max == 20
    assert lesion.suv_peak == pytest.approx(8)


def test_suv_peak_may_reach_beyond_the_lesion_but_not_beyond_the_image():
    suv = np.full((12, 12, 12), 3.0, np.float32)
    corner = np.zeros(suv.shape, np.uint8)
    corner[0, 0, 0] = corner[11, 11, 11] = 1
    for lesion in measure_lesions(suv, label_lesions(corner)[0], np.diag([2.0, 2, 3, 1])):
        assert lesion.suv_peak == pytest.approx(3)
    cold = np.zeros(suv.shape, np.float32)
    cold[5, 5, 5] = 3
    (lesion,) = measure_lesions(cold, cold > 0, np.diag([5.0, 5, 5, 1]))
    assert 0 < lesion.suv_peak < 1


@examples(25)
@given(masks_and_suvs(), st.permutations(range(3)), st.tuples(*[st.sampled_from((1, -1))] * 3))
def test_measures_do_not_depend_on_axis_order_and_flips(drawn, order, steps):
    mask, suv = drawn
    voxel_map = np.zeros((4, 4))
    voxel_map[3, 3] = 1
    for new_axis, axis in enumerate(order):
        voxel_map[axis, new_axis] = steps[new_axis]
        voxel_map[axis, 3] = 0 if steps[new_axis] == 1 else mask.shape[axis] - 1
    flips = tuple(slice(None, None, step) for step in steps)
    labels, _ = label_lesions(mask)
    plain = measure_lesions(suv, labels, SHEARED)
    turned_measures = measure_lesions(
        suv.transpose(order)[flips], labels.transpose(order)[flips], SHEARED @ voxel_map
    )
    assert len(plain) == len(turned_measures)
    for one, other in zip(_sorted(plain), _sorted(turned_measures), strict=True):
        for field in ("mtv_ml", "suv_max", "suv_mean", "suv_peak", "tlg_g", "iso_mtv_ml"):
            assert getattr(one, field) == pytest.approx(getattr(other, field))
        assert one.centroid_mm == pytest.approx(other.centroid_mm)


def _sorted(lesions):
    return sorted(lesions, key=lambda lesion: tuple(np.round(lesion.centroid_mm, 6)))


@examples(60)
@given(masks_and_suvs())
def test_measures_of_each_lesion_are_those_of_its_voxels(drawn):
    mask, suv = drawn
    labels, count = label_lesions(mask)
    lesions = measure_lesions(suv, labels, SHEARED, threshold_percent=50)
    contour = isocontour(suv, mask, 50)
    assert [lesion.label for lesion in lesions] == list(range(1, count + 1))
    for lesion in lesions:
        voxels = labels == lesion.label
        assert lesion.mtv_ml == pytest.approx(voxels.sum() * 0.012)
        assert lesion.suv_max == suv[voxels].max()
        assert lesion.suv_mean == pytest.approx(suv[voxels].mean(dtype=float))
        assert lesion.tlg_g == pytest.approx(lesion.suv_mean * lesion.mtv_ml)
        assert lesion.iso_mtv_ml == pytest.approx((voxels & contour).sum() * 0.012)
        centroid = SHEARED @ [*np.argwhere(voxels).mean(axis=0), 1]
        assert lesion.centroid_mm == pytest.approx(tuple(centroid[:3]))


def test_lesions_keep_their_numbers_where_they_touch_or_fall_apart():
    suv = np.ones((9, 3, 3), np.float32)
    suv[:3] = 4
    ids = np.zeros(suv.shape, np.uint8)
    ids[:3, 1, 1], ids[3:5, 1, 1], ids[8, 1, 1] = 7, 2, 2
    two, seven = measure_lesions(suv, ids, np.diag([10.0, 10, 10, 1]))
    measured = (two.label, two.mtv_ml, two.suv_max, two.iso_mtv_ml)
    assert measured == pytest.approx((2, 3, 1, 3))
    assert (seven.label, seven.mtv_ml, seven.suv_max) == pytest.approx((7, 3, 4))


def test_rows_of_labels_have_the_isocontours_of_their_lesions():
    suv = np.zeros((9, 3, 3), np.float32)
    suv[:, 1, 1] = (8, 3, 1, 0, 0, 2, 1, 0, 0)
    ids, labels = np.zeros((2, *suv.shape), np.uint8)
    ids[:3, 1, 1], ids[5:7, 1, 1] = 1, 2
    labels[:2, 1, 1], labels[2, 1, 1], labels[5:7, 1, 1] = 5, 3, 3
    affine = np.diag([10.0, 10, 10, 1])
    three, five = measure_lesions(suv, ids, affine, 30, rows=labels)
    measured = (three.label, three.mtv_ml, three.suv_max, three.tlg_g)
    assert measured == pytest.approx((3, 3, 2, 4))
    # SUV 1 of the first lesion is below 30 % of its 8; that of the second is not below of its 2.
    assert (three.iso_mtv_ml, three.iso_tlg_g) == pytest.approx((2, 3))
    assert (five.label, five.mtv_ml, five.iso_mtv_ml) == pytest.approx((5, 2, 2))


# --- measures of a study ----------------------------------------------------------------------


def lesion_at(centroid_mm, mtv_ml=1.0, tlg_g=2.0):
    return Lesion(1, mtv_ml, 5, 2, 3, tlg_g, mtv_ml / 2, 4, tlg_g / 2, centroid_mm)


def test_tumour_burden_by_hand():
    lesions = [
        lesion_at((0.0, 0.0, 0.0), 1.5, 3.0),
        lesion_at((3.0, 4.0, 0.0), 2.5, 4.0),
        lesion_at((0.0, 0.0, -12.0), 4.0, 5.0),
    ]
    burden = tumour_burden(lesions)
    assert (burden.lesion_count, burden.tmtv_ml, burden.tlg_g) == (3, 8, 12)
    assert (burden.iso_tmtv_ml, burden.iso_tlg_g) == (4, 6)
    assert burden.dmax_mm == 13  # (3, 4, 0) to (0, 0, -12)


def test_dmax_is_the_longest_of_all_pairs():
    centroids = np.random.default_rng(2).uniform(-500, 500, (30, 3))
    burden = tumour_burden([lesion_at(tuple(centroid)) for centroid in centroids])
    longest = max(math.dist(one, other) for one, other in itertools.combinations(centroids, 2))
    assert burden.dmax_mm == pytest.approx(longest)


@pytest.mark.parametrize("lesions", [[], [lesion_at((1.0, 2.0, 3.0))]])
def test_dmax_needs_two_lesions(lesions):
    burden = tumour_burden(lesions)
    assert burden.lesion_count == len(lesions)
    assert burden.dmax_mm == 0


@examples(20)
@given(hnp.arrays(np.float32, (4, 5, 6), elements=st.floats(0, 50, width=16)))
def test_dose_fraction_is_activity_over_injected_activity(suv):
    """SUV = concentration * weight / dose, so the dose in view comes back."""
    weight_g, dose_bq = 70_000.0, 300e6
    concentration_bq_ml = suv.astype(float) * dose_bq / weight_g
    voxel_ml = 0.012
    expected = concentration_bq_ml.sum() * voxel_ml / dose_bq
    assert dose_fraction(suv, SHEARED, weight_g / 1000) == pytest.approx(expected)


def test_dose_fraction_of_a_body_with_even_uptake_is_1():
    body = np.ones((50, 50, 100), np.float32)  # 2 ml a voxel: 500 l
    assert dose_fraction(body, np.diag([10.0, 10, 20, 1]), 500) == pytest.approx(1)
