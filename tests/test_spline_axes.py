"""What resampling does along an axis, against scipy to the bit where the bit decides."""

import numpy as np
from grid_strategies import examples, grids
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg, ndimage

from common.geometry import voxel_map
from common.spline_axes import Line, nearest_on_line, spline_matrix

steps = st.sampled_from((0.5, 1.0, 2.0, 1.5, 2 / 3, 1 + 2**-52)) | st.floats(0.2, 3)
starts = st.sampled_from((0.0, 0.5, -0.5, 1e-14, -1e-14)) | st.floats(-3, 3)
lengths = st.integers(1, 40)


@examples(300)
@given(grids(), grids())
def test_voxel_map_is_nilearns_to_the_bit(source, target):
    expected = np.dot(linalg.inv(source.affine), target.affine)
    if np.array_equal(source.affine, target.affine):
        expected = np.eye(4)
    np.testing.assert_array_equal(voxel_map(source, target), expected)


@examples(500)
@given(lengths, lengths, steps, starts, st.booleans())
def test_nearest_voxels_are_scipys(n_source, n_target, step, start, flipped):
    step = -step if flipped else step
    line = Line(n_source, n_target, 0, step, start, exact=True, diagonal=True)
    numbered = ndimage.affine_transform(
        np.arange(1, n_source + 1), [step], offset=start, output_shape=(n_target,), order=0
    )
    np.testing.assert_array_equal(nearest_on_line(line), numbered - 1)


@examples(100)
@given(lengths, lengths, steps, starts, st.booleans())
def test_spline_matrix_is_what_scipy_makes_of_unit_impulses(
    n_source, n_target, step, start, flipped
):
    step = -step if flipped else step
    expected = ndimage.affine_transform(
        np.eye(n_source),
        [step, 1],
        offset=[start, 0],
        output_shape=(n_target, n_source),
        order=3,
        mode="mirror",
    )
    matrix = spline_matrix(step * np.arange(n_target) + start, n_source)
    np.testing.assert_allclose(matrix, expected, atol=1e-12)
