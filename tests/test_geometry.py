"""Voxel grids: orientation against nibabel, target grids by hand."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from grid_strategies import SPACINGS, examples, grids, shapes, turn
from hypothesis import assume, given
from hypothesis import strategies as st

from common.geometry import Grid, orientation_of, reorient, target_grid

ORIENTATIONS = [
    "".join(code)
    for axes in itertools.permutations(("LR", "AP", "SI"))
    for code in itertools.product(*axes)
]


# --- orientation ------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("start", ["RAS", "LPS", "SLA"])
def test_reorient_equals_nibabel_for_all_48_orientations(start, orientation):
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    affine = turn(0.2, 0, 1) @ np.diag([2.0, 3, 4, 1])
    affine[:3, 3] = (10, -20, 30)
    image = _nibabel_reoriented(nib.Nifti1Image(array, affine), start)
    expected = _nibabel_reoriented(image, orientation)
    result, result_affine = reorient(np.asarray(image.dataobj), image.affine, orientation)
    assert "".join(nib.aff2axcodes(result_affine)) == orientation
    np.testing.assert_array_equal(result, np.asarray(expected.dataobj))
    np.testing.assert_allclose(result_affine, expected.affine)
    # Independent of nibabel's arithmetic: every value stays where it was in space.
    np.testing.assert_allclose(_positions(result, result_affine), _positions(array, affine))


def _nibabel_reoriented(image, orientation):
    return image.as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
        )
    )


def _positions(array, affine):
    """Position [mm] of each value, in the order of the values."""
    indices = np.argwhere(np.ones(array.shape, bool))
    positions = indices @ affine[:3, :3].T + affine[:3, 3]
    return positions[np.argsort(array.ravel())]


def test_reorient_is_a_view():
    array = np.zeros((2, 3, 4))
    assert np.shares_memory(reorient(array, np.eye(4), "SPL")[0], array)


@pytest.mark.parametrize("orientation", ["", "LA", "LAA", "LRS", "las", "LASL", "XYZ", "L S"])
def test_reorient_refuses_what_is_no_orientation(orientation):
    with pytest.raises(ValueError, match="not one each of L/R, A/P and S/I"):
        reorient(np.zeros((2, 3, 4)), np.eye(4), orientation)


def test_reorient_refuses_an_axis_without_direction():
    with pytest.raises(ValueError, match="axis without direction"):
        reorient(np.zeros((2, 3, 4)), np.diag([1.0, 0, 1, 1]), "LAS")


@examples(300)
@given(st.lists(st.floats(-1, 1), min_size=9, max_size=9), st.sampled_from((0.0, 0.5)))
def test_orientation_of_turned_and_sheared_axes_is_nibabels(numbers, step):
    affine = np.eye(4)
    # In steps, axes lie as close to one as to another.
    matrix = np.round(np.array(numbers) / step) * step if step else np.array(numbers)
    affine[:3, :3] = matrix.reshape(3, 3)
    assume(abs(np.linalg.det(affine)) > 1e-3)
    assert tuple(orientation_of(affine)) == nib.aff2axcodes(affine)


# --- target grid ------------------------------------------------------------------------------

CT_AFFINE = np.array(
    [[-0.9765625, 0, 0, 250.0], [0, 0.9765625, 0, -240.0], [0, 0, 3.27, -843.3], [0, 0, 0, 1]]
)


@pytest.mark.parametrize(
    ("shape", "align", "expected_shape", "origin_mm"),
    [
        # x: 250 - (511 * 0.9765625 - 199 * 2) / 2; y: -240 + the same; z: 326 * 3.27 / 3 = 355.34
        ((200, 200), "center", (200, 200, 355), (199.48828125, -189.48828125, -843.3)),
        ((200, 200), "corner", (200, 200, 355), (250, -240, -843.3)),
        ((200, 200, 300), "corner", (200, 200, 300), (250, -240, -843.3)),
        # z: -843.3 + (325 * 3.27 - 299 * 3) / 2
        ((200, 200, 300), "center", (200, 200, 300), (199.48828125, -189.48828125, -760.425)),
        # y: -240 + (511 * 0.9765625 - 300 * 2) / 2, beyond the CT
        ((200, 301), "center", (200, 301, 355), (199.48828125, -290.48828125, -843.3)),
    ],
)
def test_target_grid_by_hand(shape, align, expected_shape, origin_mm):
    target = target_grid(Grid((512, 512, 326), CT_AFFINE), (2, 2, 3), shape, align)
    assert target.shape == expected_shape
    np.testing.assert_allclose(target.affine[:3, 3], origin_mm, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(target.affine[:3, :3], np.diag([-2.0, 2, 3]))


@pytest.mark.parametrize(
    ("slices", "thickness_mm", "spacing_mm", "expected"),
    [
        (326, 3, 3, 326),
        (326, 3.0000001, 3, 326),
        (326, 2.9999999999, 3, 326),
        (1500, 1, 3, 500),
        (1501, 1, 3, 500),
        (1, 1, 3, 1),
        (2, 5, 3, 3),
        (10, 3, 0.7, 42),
    ],
)
def test_target_grid_has_as_many_slices_as_fit(slices, thickness_mm, spacing_mm, expected):
    ct = Grid((4, 4, slices), np.diag([1, 1, thickness_mm, 1]))
    assert target_grid(ct, (1, 1, spacing_mm), (4, 4)).shape[2] == expected


@examples(60)
@given(grids(oblique=True), shapes, st.tuples(*[st.sampled_from(SPACINGS)] * 3))
def test_target_grid_keeps_the_middle_and_the_directions(ct, shape, spacing_mm):
    target = target_grid(ct, spacing_mm, shape, "center")
    assert target.shape == shape
    np.testing.assert_allclose(target.spacing_mm, spacing_mm)
    np.testing.assert_allclose(_middle_mm(target), _middle_mm(ct), atol=1e-9)
    np.testing.assert_allclose(_directions(target), _directions(ct), atol=1e-12)


def _middle_mm(grid):
    return grid.affine @ [*((np.array(grid.shape) - 1) / 2), 1]


def _directions(grid):
    return grid.affine[:3, :3] / grid.spacing_mm


def test_target_grid_starts_at_voxel_0_of_the_third_axis_in_any_orientation():
    """With a third axis to I that is the superior end; the origin along it stays to the bit."""
    ct = Grid((4, 4, 10), [[1, 0, 0, 5.1], [0, 1, 0, 6.2], [0, 0, -3.3, 77.7], [0, 0, 0, 1]])
    target = target_grid(ct, (2, 2, 2), (3, 3))
    assert target.affine[2, 3] == 77.7
    assert target.affine[2, 2] == -2


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "align", "message"),
    [
        ((2, 0, 3), (9, 9), "center", "spacing"),
        ((2, np.nan, 3), (9, 9), "center", "spacing"),
        ((2, 3), (9, 9), "center", "spacing"),
        ((2, 2, 3), (9,), "center", "shape"),
        ((2, 2, 3), (9, 0), "center", "shape"),
        ((2, 2, 3), (9, 9), "middle", "align"),
    ],
)
def test_target_grid_refuses(spacing_mm, shape, align, message):
    with pytest.raises(ValueError, match=message):
        target_grid(Grid((4, 4, 4), np.eye(4)), spacing_mm, shape, align)


# --- grid -------------------------------------------------------------------------------------


def test_grid_equality_and_hash():
    grid = Grid((4, 5, 6), CT_AFFINE)
    same = Grid((4, 5, 6), CT_AFFINE + 0.0)
    assert grid == same
    assert hash(grid) == hash(same)
    assert grid != Grid((4, 5, 7), CT_AFFINE)
    assert grid != Grid((4, 5, 6), np.eye(4))
    assert grid != "grid"


def test_grid_keeps_its_own_affine():
    affine = np.eye(4)
    grid = Grid((4, 5, 6), affine)
    affine[0, 0] = 7
    assert grid.affine[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 7


def test_grid_measures_voxels():
    sheared = np.array([[3, 0, 0, 9], [4, 2, 0, 9], [0, 0, -10, 9], [0, 0, 0, 1]])
    grid = Grid((4, 5, 6), sheared)
    assert grid.spacing_mm == (5, 2, 10)
    assert grid.voxel_ml == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        ((4, 0, 6), np.eye(4)),
        ((4, 5, 6), np.eye(3)),
        ((4, 5, 6), np.full((4, 4), np.nan)),
        ((4, 5, 6), np.diag([1.0, 0, 1, 1])),
        ((4, 5, 6), np.ones((4, 4))),
    ],
)
def test_grid_refuses(shape, affine):
    with pytest.raises(ValueError, match="grid"):
        Grid(shape, affine)
