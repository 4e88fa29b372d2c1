"""The steps of preprocessing one study."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.geometry import ORIENTATIONS, Grid, Image
from common.volumes import (
    Recipe,
    Volume,
    half_precision,
    number_lesions,
    outline,
    training_image,
)

UNIT = Grid((5, 4, 3), np.eye(4))

HALVES = np.arange(0x2400, 0x3C01, dtype=np.uint16).view(np.float16)
"""Every half-precision number from 2**-6 to 1."""

STEPS = np.arange(0, 1025, dtype=np.float32) / 2**16
"""The numbers from 0 to 2**-6 that images have."""


def volume(data):
    return Volume(data, Grid(data.shape, np.eye(4)), Grid(data.shape, np.eye(4)))


def test_there_are_48_orientations():
    assert len(ORIENTATIONS) == 48
    assert {"LAS", "RPI", "SLA"} <= ORIENTATIONS
    assert not {"LRS", "las", "LAX"} & ORIENTATIONS


def rounded(values):
    """Values in the steps of float16 from 2**-6 on, and in steps of 2**-16 below, slowly."""
    steps_of_2_to_minus_16 = np.round(values.astype(np.float64) * 2**16) / 2**16
    return np.where(values < 2**-6, steps_of_2_to_minus_16, values).astype(np.float16)


@pytest.mark.parametrize("numbers", [HALVES, STEPS])
def test_every_number_that_images_have_stays_as_it_is(numbers):
    np.testing.assert_array_equal(half_precision(numbers.astype(np.float32)), numbers)


@pytest.mark.parametrize("numbers", [HALVES, STEPS])
def test_ties_between_the_numbers_that_images_have_go_to_even(numbers):
    exact = numbers.astype(np.float32)
    ties = (exact[1:] + exact[:-1]) / 2
    for values in (ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1))):
        np.testing.assert_array_equal(half_precision(values), rounded(values))


@given(arrays(np.float32, (3, 5), elements=st.floats(0, 1, width=32)))
def test_half_precision_is_what_astype_gives_but_for_tiny_steps(values):
    result = half_precision(values)
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result.view(np.uint16), rounded(values).view(np.uint16))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_training_image_is_pet_then_ct_from_their_ranges_to_0_and_1(dtype):
    random = np.random.default_rng(0)
    # More slices than are normalised at a time.
    suv = random.uniform(-1, 50, (6, 5, 37)).astype(np.float32)
    hu = random.uniform(-1200, 1200, (6, 5, 37)).astype(np.float32)
    recipe = Recipe(ct_range=(-150, 250), suv_range=(2, 30), dtype=dtype)
    image = training_image(volume(suv), volume(np.asfortranarray(hu)), recipe)
    assert image.dtype == dtype
    expected = np.clip([(suv - 2) / 28, (hu + 150) / 400], 0, 1)
    np.testing.assert_allclose(image, expected, atol=2.5e-4 if dtype == "float16" else 1e-6)


def test_float16_images_have_no_steps_below_2_to_minus_16():
    values = np.linspace(0, 1 / 32, 7001, dtype=np.float32).reshape(1, 1, -1)
    recipe = Recipe(ct_range=(0, 1), suv_range=(0, 1))
    for channel in training_image(volume(values), volume(values), recipe):
        expected = np.where(values < 2**-6, np.round(values * 2.0**16) / 2.0**16, values)
        np.testing.assert_array_equal(channel, expected.astype(np.float16))


def test_lesions_are_numbered_in_the_smallest_type():
    mask = np.zeros((40, 40, 3), np.uint16)
    mask[::4, ::4, 1] = 7
    few = number_lesions(Image(mask, np.eye(4)))
    assert few.data.dtype == np.uint8
    assert few.data.max() == 100
    mask[2::4, 2::4, 1] = 7
    mask[::4, 2::4, 1] = 7
    many = number_lesions(Image(mask, np.eye(4)))
    assert many.data.max() == 300
    assert many.data.dtype == np.uint16
    np.testing.assert_array_equal(many.data > 0, mask > 0)


def test_outline_takes_every_label_and_the_brightest_of_each_lesion():
    ids = np.zeros((7, 3, 3), np.uint8)
    ids[1:3, 1, 1], ids[5, 1, 1] = 1, 2
    suv = np.zeros((7, 3, 3), np.float32)
    suv[:, 1, 1] = (50, 8, 1.9, 0, 0, 0.5, 0)
    mask, contour = outline(volume(suv), volume(ids), Recipe())
    assert mask.dtype == contour.dtype == np.uint8
    assert mask[:, 1, 1].tolist() == [0, 1, 1, 0, 0, 1, 0]
    assert contour[:, 1, 1].tolist() == [0, 1, 0, 0, 0, 1, 0]
