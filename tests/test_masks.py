"""Masks that are less than their image: a crop gives what the whole gives, files are united."""

import numpy as np
import pytest
from grid_strategies import examples, grids, seeds
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StudyError
from common.geometry import Grid, Image
from common.image_checks import check_labels
from common.masks import completed, united
from common.resampling import resample_nearest


def cropped(whole, random, margin=0):
    """The part of a mask that holds its labels, its axes permuted and turned."""
    voxels = np.argwhere(whole.data)
    low = np.maximum(0, voxels.min(axis=0) - margin)
    high = np.minimum(whole.data.shape, voxels.max(axis=0) + 1 + margin)
    part = whole.data[tuple(map(slice, low, high))]
    order, turns = random.permutation(3), random.choice((-1, 1), 3)
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, old in enumerate(order):
        change[old, new] = turns[new]
        change[old, 3] = low[old] if turns[new] > 0 else high[old] - 1
    data = part.transpose(order)[tuple(slice(None, None, turn) for turn in turns)]
    return Image(data, whole.affine @ change)


def some_mask(grid, random):
    data = np.zeros(grid.shape, np.uint8)
    for label in range(1, random.integers(2, 5)):
        low = [random.integers(0, n) for n in grid.shape]
        high = [random.integers(a, n) + 1 for a, n in zip(low, grid.shape, strict=True)]
        data[tuple(map(slice, low, high))] = label
    return Image(data, grid.affine)


@examples(300)
@given(grids(oblique=True), seeds, st.integers(0, 1), st.booleans())
def test_any_crop_is_completed_to_the_whole_however_its_axes_run(grid, seed, margin, stored):
    random = np.random.default_rng(seed)
    whole = some_mask(grid, random)
    crop = cropped(whole, random, margin)
    affine = crop.affine.astype(np.float32).astype(float) if stored else crop.affine
    result = completed(Image(crop.data, affine), Grid((3, 3, 3), np.eye(4)), grid)
    if result.data.shape == crop.data.shape and crop.data.size == whole.data.size:
        return  # nothing was cropped: as it came, however its axes run
    np.testing.assert_array_equal(result.data, whole.data)
    np.testing.assert_array_equal(result.affine, whole.affine)
    assert result.data.dtype == whole.data.dtype


@examples(100)
@given(grids(), grids(), seeds)
def test_a_crop_on_a_lattice_of_its_own_is_resampled_as_the_whole_is(grid, target, seed):
    random = np.random.default_rng(seed)
    whole = some_mask(grid, random)
    # Labels at the end of the whole would lose half a voxel there, as nilearn has it.
    wide = completed(whole, Grid((2, 2, 2), np.diag([0.3, 0.3, 0.3, 1])))
    # Nothing lies in the middle between two voxels, where the last bit of an affine would decide.
    moved = target.affine.copy()
    moved[:3, 3] = grid.affine[:3, 3] + random.uniform(-1, 1, 3) * np.pi
    target = Grid(target.shape, moved)
    other = Grid((5, 5, 5), np.diag([0.3, 0.3, 0.3, 1]))
    part = completed(cropped(whole, random), other)
    expected = resample_nearest(wide.data, wide.grid, target)
    np.testing.assert_array_equal(resample_nearest(part.data, part.grid, target), expected)


def test_whole_masks_and_masks_of_another_lattice_stay_as_they_are():
    grid = Grid((6, 5, 4), np.diag([2.0, 2, 3, 1]))
    data = np.zeros(grid.shape, np.uint8)
    data[0, 0, 0] = 1
    whole = Image(data, grid.affine)
    assert completed(whole, grid) is whole
    turned = Image(
        data[::-1],
        grid.affine @ np.array([[-1.0, 0, 0, 5], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    assert completed(turned, grid) is turned
    inner = np.zeros((3, 3, 3), np.uint8)
    inner[1, 1, 1] = 1
    between = Image(inner, at((1, 0, 0), (2.0, 2, 3)))
    assert completed(between, grid) is between


def at(first_mm, spacing_mm):
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = first_mm
    return affine


def box(low, high, shape=(8, 8, 8)):
    data = np.zeros(shape, np.uint8)
    data[tuple(map(slice, low, high))] = 1
    return data


def test_masks_of_one_lesion_each_are_united_by_number():
    affine = np.diag([2.0, 2, 2.5, 1])
    first, second = box((1, 1, 1), (3, 3, 3)), 7 * box((5, 5, 5), (8, 7, 6))
    mask, warnings = united([Image(first, affine), Image(second, affine)])
    np.testing.assert_array_equal(mask.data, first + 2 * (second > 0))
    np.testing.assert_array_equal(mask.affine, affine)
    assert [w.text for w in warnings] == [
        "2 mask files are united: they are labels 1 to 2 in the order of their names"
    ]


def test_crops_are_united_on_a_grid_that_holds_them_all():
    random = np.random.default_rng(0)
    affine = np.diag([2.0, -2, 2.5, 1])
    masks = [Image(box(low, np.add(low, 2)), affine) for low in ((5, 5, 5), (1, 2, 0), (3, 6, 4))]
    mask, _ = united([cropped(each, random) for each in masks])
    whole = completed(mask, Grid((8, 8, 8), affine))
    expected = masks[0].data + 2 * masks[1].data + 3 * masks[2].data
    np.testing.assert_array_equal(whole.data, expected)


def test_what_two_files_label_stays_the_first_ones_and_is_told_as_are_empty_files():
    affine = np.diag([10.0, 10, 10, 1])
    one, other = box((1, 1, 1), (4, 4, 4)), box((3, 1, 1), (6, 4, 4))
    nothing = Image(np.zeros_like(one), affine)
    mask, warnings = united([Image(one, affine), nothing, Image(other, affine)])
    np.testing.assert_array_equal(mask.data, np.where(one, 1, 3 * other))
    assert [w.text for w in warnings][1:] == [
        "mask file(s) 2 label nothing",
        "9 ml are labelled by several mask files: the first of them counts",
    ]


def test_labels_within_one_of_several_files_become_one_which_is_told():
    affine = np.eye(4)
    two = box((1, 1, 1), (2, 2, 2)) + 2 * box((4, 4, 4), (5, 5, 5))
    mask, warnings = united([Image(box((6, 6, 6), (7, 7, 7)), affine), Image(two, affine)])
    np.testing.assert_array_equal(np.unique(mask.data[two > 0]), [2])
    assert warnings[1].text == (
        "mask file(s) 2 hold several labels: they become one, that of their file"
    )


def test_files_of_other_voxels_are_not_united():
    one = Image(box((1, 1, 1), (2, 2, 2)), np.eye(4))
    other = Image(one.data, np.diag([1, 1, 1.5, 1]))
    with pytest.raises(StudyError, match=r"mask file 3 of 3, .* other voxels than the first"):
        united([one, one, other])
    with pytest.raises(StudyError, match="far apart"):
        united([one, Image(one.data, at((1e6, 1e6, 1e6), (1, 1, 1)))])


# --- labels ----------------------------------------------------------------------------------


def checked(values):
    return check_labels(Image(np.asarray(values).reshape(-1, 1, 1), np.eye(4))).data.ravel()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0, 1, 255], np.int64), np.uint8),
        (np.array([0, 1, 256], np.float32), np.uint16),
        (np.array([3e-8, 0.9999, 2.0004], np.float32), np.uint8),  # scaled by a NIfTI's header
    ],
)
def test_labels_become_the_smallest_type(values, dtype):
    result = checked(values)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, np.rint(values))


@pytest.mark.parametrize(
    "values",
    [[0, -1], [0.0, 0.5], [0.5, 1.5], [1e-7, 1.0], [0.0, 0.02, 1.0], [0, 65536], [0.0, -1e-6, 1.0]],
)
def test_what_is_no_whole_number_from_0_on_is_refused(values):
    with pytest.raises(StudyError, match=r"the mask has (labels from|values that are not whole)"):
        checked(np.array(values, np.float32 if any(v % 1 for v in values) else np.int32))
