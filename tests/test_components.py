"""Components of masks against scipy's, whatever their shape, density and order in memory."""

import numpy as np
import pytest
from grid_strategies import examples
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from common.components import components, voxels_above_zero


def labels_of(mask):
    found = components(mask)
    labels = np.zeros(mask.shape, int)
    labels[tuple(found.voxels)] = found.numbers
    assert found.voxels.shape == (3, found.sizes.sum())
    np.testing.assert_array_equal(found.starts, np.cumsum([0, *found.sizes])[:-1])
    return labels


def scipys(mask):
    return ndimage.label(mask > 0, np.ones((3, 3, 3)))[0]


@examples(300)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.sampled_from((0.0, 0.03, 0.1, 0.3, 0.6, 1.0)),
    st.integers(0, 2**32 - 1),
    st.permutations(range(3)),
    st.tuples(*[st.sampled_from((1, -1))] * 3),
)
def test_components_are_scipys_in_any_memory_order(shape, density, seed, axes, steps):
    mask = (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)
    mask = mask.transpose(axes)[tuple(slice(None, None, step) for step in steps)]
    np.testing.assert_array_equal(labels_of(mask), scipys(mask))
    voxels = voxels_above_zero(mask)
    assert sorted(map(tuple, voxels.T)) == list(map(tuple, np.argwhere(mask)))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_components_of_noise(density):
    mask = np.asfortranarray(np.random.default_rng(0).random((60, 50, 40)) < density)
    np.testing.assert_array_equal(labels_of(mask), scipys(mask))


def test_long_and_winding_components():
    mask = np.zeros((40, 40, 5), np.uint8)
    mask[::2, :, 2] = 1
    mask[1::4, -1, 2] = mask[3::4, 0, 2] = 1
    spiral, apart = labels_of(mask), mask.copy()
    assert spiral.max() == 1
    apart[1::4, -1, 2] = 0
    assert labels_of(apart).max() == 11
    np.testing.assert_array_equal(labels_of(apart), scipys(apart))


def test_values_at_or_below_zero_belong_to_none():
    mask = np.array([[[1.5, 0.0, -2.0, 0.5]]])
    np.testing.assert_array_equal(labels_of(mask), [[[1, 0, 0, 2]]])
