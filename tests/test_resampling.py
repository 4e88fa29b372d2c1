"""Resampling against nilearn and nibabel themselves, voxel for voxel.

TUMORVOLUME_STRESS=200 makes every property test that many times longer.
"""

import itertools
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from grid_strategies import examples, grids, seeds, shapes, turn
from hypothesis import given
from hypothesis import strategies as st
from nilearn.image import resample_img, resample_to_img
from nilearn.image.resampling import BoundingBoxError

from common.geometry import Grid, reorient, target_grid
from common.resampling import resample_cubic, resample_nearest, separable

DATA = Path(__file__).parents[2] / "shared" / "data" / "sts_nifti"


# --- the oracle -------------------------------------------------------------------------------


def nilearn_resampled(volume, source, target, interpolation, fill_value=0.0, clip=True):
    """What nilearn returns, None where it refuses a target beside the image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = resample_img(
                nib.Nifti1Image(volume, source.affine),
                target_affine=target.affine.copy(),
                target_shape=target.shape,
                interpolation=interpolation,
                fill_value=fill_value,
                clip=clip,
                force_resample=True,
                copy_header=True,
            )
        except BoundingBoxError:
            return None
    return np.asarray(image.dataobj)


def assert_cubic_equals_nilearn(volume, source, target, fill_value=0.0, clip=True):
    expected = nilearn_resampled(volume, source, target, "continuous", fill_value, clip)
    if expected is None:
        return
    result = resample_cubic(volume, source, target, fill_value, clip=clip)
    assert result.dtype == np.float32
    assert result.shape == target.shape
    value_range = max(float(volume.max()), 0.0) - min(float(volume.min()), 0.0)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * max(value_range, 1e-6))


def assert_nearest_equals_nilearn(labels, source, target):
    expected = nilearn_resampled(labels, source, target, "nearest")
    if expected is None:
        return
    result = resample_nearest(labels, source, target)
    assert result.dtype == labels.dtype
    np.testing.assert_array_equal(result, expected)


# --- what is drawn ----------------------------------------------------------------------------


@st.composite
def parallel_grids(draw, oblique=False):
    """A source and a target whose voxels meet, miss by half a voxel, or fall anywhere."""
    source = draw(grids(oblique=oblique))
    shape = draw(shapes)
    voxel_map = np.zeros((4, 4))
    voxel_map[3, 3] = 1
    for target_axis, source_axis in enumerate(draw(st.permutations(range(3)))):
        ratio = draw(st.sampled_from((1, 1, 0.5, 2, 3, 1.5, 2 / 3)) | st.floats(0.3, 4))
        step = ratio * draw(st.sampled_from((1, 1, -1)))
        last = source.shape[source_axis] - 1
        reach = step * (shape[target_axis] - 1)
        voxel_map[source_axis, target_axis] = step
        voxel_map[source_axis, 3] = draw(
            st.sampled_from((0, 0.5, -0.5, 1.5, last, last - reach, (last - reach) / 2))
            | st.floats(-3, last + 1)
        )
    return source, Grid(shape, source.affine @ voxel_map)


@st.composite
def grids_that_meet(draw):
    """Unrounded spacings and origins; along each axis the first or last voxels coincide.

    Whether those are inside is up to the last bit of a coordinate.
    """
    spacing = st.floats(0.4, 6)
    order = draw(st.sampled_from(((0, 1, 2), (0, 1, 2), (1, 2, 0), (2, 1, 0))))
    source_shape, target_shape = draw(shapes), draw(shapes)
    source, target = np.zeros((2, 4, 4))
    source[3, 3] = target[3, 3] = 1
    for axis, target_axis in enumerate(order):
        source[axis, axis] = draw(spacing)
        target[axis, target_axis] = draw(spacing)
        source[axis, 3] = target[axis, 3] = draw(st.floats(-900, 900))
        if draw(st.booleans()):
            target[axis, 3] += source[axis, axis] * (source_shape[axis] - 1)
            target[axis, 3] -= target[axis, target_axis] * (target_shape[target_axis] - 1)
    return Grid(source_shape, source), Grid(target_shape, target)


def random_volume(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "u":
        return rng.integers(0, 200, shape).astype(dtype)
    return rng.normal(rng.choice((0, -900, 700)), 500, shape).astype(dtype)


# --- cubic ------------------------------------------------------------------------------------

signed_types = st.sampled_from((np.int16, np.int32, np.float32, np.float64, np.int8))


@examples(150)
@given(parallel_grids(), signed_types, seeds, st.sampled_from((0, -1024)), st.booleans())
def test_cubic_equals_nilearn_on_parallel_grids(pair, dtype, seed, fill_value, clip):
    source, target = pair
    assert separable(source, target)
    volume = random_volume(seed, source.shape, np.float64)
    if dtype == np.int8:
        volume = volume.clip(-128, 127)
    assert_cubic_equals_nilearn(volume.astype(dtype), source, target, fill_value, clip)


@examples(60)
@given(parallel_grids(oblique=True), seeds)
def test_cubic_equals_nilearn_on_oblique_grids_with_parallel_axes(pair, seed):
    source, target = pair
    assert separable(source, target)
    volume = random_volume(seed, source.shape, np.float32)
    assert_cubic_equals_nilearn(volume, source, target, fill_value=-1024)


@examples(60)
@given(parallel_grids(), st.floats(-9, -2), st.permutations(range(3)), seeds)
def test_grids_that_are_nearly_parallel(pair, exponent, axes, seed):
    """Turned about the middle of the source by less than the tolerance, or a little more."""
    source, target = pair
    middle = np.eye(4)
    middle[:3, 3] = (source.affine @ [*(np.array(source.shape) - 1) / 2, 1])[:3]
    turned = middle @ turn(10**exponent, *axes[:2]) @ np.linalg.inv(middle) @ source.affine
    source = Grid(source.shape, turned)
    labels = np.random.default_rng(seed).integers(0, 5, source.shape).astype(np.uint8)
    assert_nearest_equals_nilearn(labels, source, target)
    volume = random_volume(seed, source.shape, np.float32)
    expected = nilearn_resampled(volume, source, target, "continuous", -1024)
    if expected is not None:
        result = resample_cubic(volume, source, target, -1024)
        value_range = max(float(volume.max()), 0.0) - min(float(volume.min()), 0.0)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * value_range)


@examples(60)
@given(grids(), grids(), seeds)
def test_cubic_equals_nilearn_on_unrelated_grids(source, target, seed):
    volume = random_volume(seed, source.shape, np.int16)
    assert_cubic_equals_nilearn(volume, source, target, fill_value=-1024)


@examples(15)
@given(grids(oblique=True), grids(), seeds)
def test_cubic_equals_nilearn_on_grids_that_are_not_parallel(source, target, seed):
    centre = target.affine.copy()
    centre[:3, 3] = source.affine[:3, 3]
    target = Grid(target.shape, centre)
    volume = random_volume(seed, source.shape, np.float32)
    assert_cubic_equals_nilearn(volume, source, target, fill_value=-1024)


@examples(200)
@given(grids_that_meet(), seeds)
def test_voxels_on_the_edge_are_inside_where_nilearn_has_them_inside(pair, seed):
    source, target = pair
    volume = 100 + random_volume(seed, source.shape, np.int16) % 100
    assert_cubic_equals_nilearn(volume, source, target, fill_value=-1024, clip=False)
    assert_nearest_equals_nilearn(volume, source, target)


@examples(60)
@given(grids(oblique=True), shapes, seeds)
def test_grids_of_one_affine_and_two_shapes(source, shape, seed):
    volume = 100 + random_volume(seed, source.shape, np.int16) % 100
    target = Grid(shape, source.affine)
    assert_cubic_equals_nilearn(volume, source, target, fill_value=-1024)
    assert_nearest_equals_nilearn(volume, source, target)


def test_cubic_allows_for_directions_stored_in_float32():
    """Two oblique grids whose axes are parallel but for rounding: the fast way is near enough."""
    turned = turn(0.4, 0, 1) @ turn(0.3, 1, 2)
    source = Grid((90, 60, 50), (turned @ np.diag([1, 1.5, 2, 1])).astype(np.float32))
    target = Grid((60, 50, 40), (turned @ np.diag([1.4, 1.7, 2.3, 1])).astype(np.float32))
    assert np.count_nonzero(np.linalg.inv(source.affine) @ target.affine) > 7
    assert separable(source, target)
    volume = random_volume(8, source.shape, np.float32)
    result = resample_cubic(volume, source, target)
    expected = nilearn_resampled(volume, source, target, "continuous")
    np.testing.assert_allclose(result, expected, rtol=0, atol=5e-6 * np.ptp(volume))


def test_cubic_strays_by_less_than_a_ten_thousandth_of_a_voxel():
    """On a ramp, which splines reproduce, an error in value is an error in place."""
    source = Grid((80, 41, 3), np.eye(4))
    ramp = np.broadcast_to(np.arange(-40, 40, dtype=np.float32)[:, None, None], source.shape)
    for drift, fast in ((4.5e-5, True), (5.5e-5, False)):
        sheared = np.eye(4)
        sheared[0, 1] = 2 * drift / 40
        sheared[0, 3] = 30.5
        target = Grid((20, 41, 3), sheared)
        assert separable(source, target) == fast
        expected = nilearn_resampled(np.array(ramp), source, target, "continuous")
        errors = np.abs(resample_cubic(ramp, source, target) - expected)
        assert errors.max() == pytest.approx(drift if fast else 0, abs=4e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_cubic_rounds_unsigned_integers_as_nilearn_does(dtype):
    source = Grid((9, 8, 7), np.diag([2.0, 2, 3, 1]))
    target = Grid((12, 11, 9), np.diag([1.5, 1.5, 2, 1]))
    volume = random_volume(4, source.shape, dtype)
    expected = nilearn_resampled(volume, source, target, "continuous", -1024)
    result = resample_cubic(volume, source, target, -1024)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(result, np.round(result))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_cubic_in_many_blocks_whatever_the_memory_order(order, dtype):
    """Long axes, which are cut into blocks, in each memory order, with a flip in each axis."""
    shape = (150, 75, 170)
    source = Grid(shape, np.diag([-0.9765625, 1.2, 1, 1]))
    target = target_grid(source, (2, 1.5, 2.7), (60, 70), "center")
    stored = random_volume(7, [shape[axis] for axis in order], dtype)
    volume = stored[::-1, ::-1, ::-1].transpose(np.argsort(order))
    expected = nilearn_resampled(volume, source, target, "continuous", -1024)
    result = resample_cubic(volume, source, target, -1024)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.ptp(volume))
    flipped = resample_cubic(volume[:, :, ::-1], _flip_z(source), target, -1024)
    np.testing.assert_allclose(flipped, result, rtol=0, atol=1e-5 * np.ptp(volume))


def _flip_z(grid):
    flip = np.diag([1.0, 1, -1, 1])
    flip[2, 3] = grid.shape[2] - 1
    return Grid(grid.shape, grid.affine @ flip)


def test_cubic_clips_like_resample_img_and_not_like_resample_to_img():
    """The two functions of nilearn differ in their default; both can be had."""
    source = Grid((20, 1, 1), np.eye(4))
    target = Grid((40, 1, 1), np.diag([0.5, 1, 1, 1]))
    volume = np.repeat([0.0, 10.0], 10).astype(np.float32).reshape(20, 1, 1)
    image = nib.Nifti1Image(volume, source.affine)
    template = nib.Nifti1Image(np.zeros(target.shape, np.float32), target.affine)
    overshooting = resample_to_img(image, template, interpolation="continuous").get_fdata()
    assert overshooting.max() > 10.5
    unclipped = resample_cubic(volume, source, target, clip=False)
    np.testing.assert_allclose(unclipped, overshooting, atol=1e-5)
    clipped = resample_cubic(volume, source, target)
    np.testing.assert_allclose(clipped, overshooting.clip(0, 10), atol=1e-5)


def test_cubic_clips_the_fill_value_as_nilearn_does():
    source = Grid((4, 4, 4), np.eye(4))
    target = Grid((8, 4, 4), np.eye(4))
    volume = np.full(source.shape, -1000, np.int16)
    assert resample_cubic(volume, source, target, -1024)[6, 0, 0] == -1000
    assert resample_cubic(volume, source, target, -1024, clip=False)[6, 0, 0] == -1024


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_cubic_treats_non_finite_voxels_as_nilearn_does(value):
    source = Grid((9, 9, 9), np.diag([2.0, 2, 2, 1]))
    target = Grid((12, 12, 12), np.diag([1.5, 1.5, 1.5, 1]))
    volume = random_volume(3, source.shape, np.float32)
    volume[4, 4, 4] = value
    expected = nilearn_resampled(volume, source, target, "continuous")
    result = resample_cubic(volume, source, target)
    assert np.isnan(expected).any()
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("side", [-1, 1])
def test_target_beside_the_image_is_filled(oblique, side):
    """nilearn raises BoundingBoxError on one side and fills on the other."""
    source = Grid((5, 6, 7), np.diag([2.0, 2, 3, 1]))
    affine = turn(0.3, 0, 1) if oblique else np.eye(4)
    affine[2, 3] = side * 1000
    target = Grid((4, 4, 4), affine)
    volume = random_volume(1, source.shape, np.int16) - np.int16(500)
    filled = resample_cubic(volume, source, target, -1024, clip=False)
    np.testing.assert_array_equal(filled, np.full(target.shape, -1024))
    labels = np.ones(source.shape, np.uint8)
    assert not resample_nearest(labels, source, target).any()


def test_equal_grids_return_the_image_as_nilearn_does():
    source = Grid((5, 6, 7), np.diag([2.0, 2, 3, 1]))
    nearly = source.affine.copy()
    nearly[0, 3] = 1e-9
    volume = random_volume(5, source.shape, np.int16)
    result = resample_cubic(volume, source, Grid(source.shape, nearly), -1024)
    np.testing.assert_array_equal(result, volume)
    labels = np.ones(source.shape, np.uint8)
    copy = resample_nearest(labels, source, source)
    assert np.array_equal(copy, labels)
    assert not np.shares_memory(copy, labels)


def test_cubic_leaves_its_input_alone():
    source, target = Grid((6, 6, 6), np.eye(4)), Grid((4, 4, 4), np.diag([1.5, 1.5, 1.5, 1]))
    volume = random_volume(6, source.shape, np.float32)
    before = volume.copy()
    volume.flags.writeable = False
    result = resample_cubic(volume, source, target)
    assert np.array_equal(volume, before)
    assert result.flags.writeable


def test_cubic_holds_no_float_copy_of_the_volume():
    source = Grid((256, 256, 160), np.diag([-0.9765625, 0.9765625, 1.5, 1]))
    target = target_grid(source, (2, 2, 3), (100, 100))
    volume = np.zeros(source.shape, np.int16, order="F")[:, ::-1]
    tracemalloc.start()
    result = resample_cubic(volume, source, target, -1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - result.nbytes < volume.size  # A float32 copy would take four times that.


# --- nearest ----------------------------------------------------------------------------------

label_types = st.sampled_from((np.uint8, np.uint16, np.int16, np.int32))


@examples(250)
@given(parallel_grids(), label_types, seeds)
def test_nearest_equals_nilearn_on_parallel_grids(pair, dtype, seed):
    labels = np.random.default_rng(seed).integers(0, 5, pair[0].shape).astype(dtype)
    assert_nearest_equals_nilearn(labels, *pair)


@examples(80)
@given(parallel_grids(oblique=True), seeds)
def test_nearest_equals_nilearn_on_oblique_grids_with_parallel_axes(pair, seed):
    labels = np.random.default_rng(seed).integers(0, 5, pair[0].shape).astype(np.uint8)
    assert_nearest_equals_nilearn(labels, *pair)


@examples(80)
@given(grids(), grids(oblique=True), seeds)
def test_nearest_equals_nilearn_on_grids_that_are_not_parallel(source, target, seed):
    labels = np.random.default_rng(seed).integers(0, 5, source.shape).astype(np.uint8)
    assert_nearest_equals_nilearn(labels, source, target)


def test_nearest_keeps_bool():
    source, target = Grid((6, 6, 6), np.eye(4)), Grid((3, 3, 3), np.diag([2.0, 2, 2, 1]))
    labels = np.random.default_rng(0).random(source.shape) > 0.5
    result = resample_nearest(labels, source, target)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, labels[::2, ::2, ::2])


# --- real images ------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data/sts_nifti is not at hand")
def test_real_study_equals_nilearn():
    folder = min(path.parent for path in DATA.rglob("CT.nii.gz"))
    images = {}
    for role in ("CT", "PET", "MASK"):
        image = nib.load(folder / f"{role}.nii.gz")
        array, affine = reorient(np.asarray(image.dataobj), image.affine, "LAS")
        images[role] = array, Grid(array.shape, affine)
    target = target_grid(images["CT"][1], (2, 2, 3), (120, 120))
    assert_cubic_equals_nilearn(*images["CT"], target, -1024)
    assert_cubic_equals_nilearn(*images["PET"], target, clip=False)
    assert_nearest_equals_nilearn(*images["MASK"], target)


# --- separable --------------------------------------------------------------------------------


def test_separable_tells_parallel_from_turned_and_sheared_grids():
    straight = Grid((20, 20, 20), np.diag([2.0, 2, 3, 1]))
    sheared = np.diag([2.0, 2, 3, 1])
    sheared[1, 2] = 0.5
    assert separable(straight, Grid((30, 30, 30), np.diag([-1.0, 1, 1, 1])))
    assert not separable(straight, Grid((20, 20, 20), turn(0.01, 0, 1) @ straight.affine))
    assert not separable(straight, Grid((20, 20, 20), sheared))
    assert separable(Grid((20, 20, 20), sheared), Grid((9, 9, 9), sheared @ np.diag([2, 2, 2, 1])))
