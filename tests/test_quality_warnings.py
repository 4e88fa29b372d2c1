"""Doubts about SUV scale and mask: they come where they must, and not for partial views."""

import numpy as np
import pytest
from said import texts

from common.geometry import Grid
from common.lesions import dose_fraction
from common.quality_warnings import dose_out_of_range, mask_far_from_uptake

WEIGHT_KG = 70.0
SPACING_MM = (4.0, 4.0, 5.0)


def grid(shape):
    return Grid(shape, np.diag([*SPACING_MM, 1.0]))


def body(shape=(60, 50, 40), mean_suv=1.0):
    """A body with air around it: SUV and HU."""
    suv, hu = np.zeros(shape, np.float32), np.full(shape, -1000.0, np.float32)
    suv[10:-10, 10:-10], hu[10:-10, 10:-10] = mean_suv, 30
    return suv, hu


def doubts_about(suv, hu, weight_kg=WEIGHT_KG):
    where = grid(suv.shape)
    fraction = dose_fraction(suv, where.affine, weight_kg)
    return texts(dose_out_of_range(fraction, weight_kg, suv, hu, where))


# --- dose ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "doubtful"), [(0.7, False), (1.05, False), (1.2, True)])
def test_more_than_the_injected_dose_is_told(times, doubtful):
    suv, hu = body()
    whole_body_kg = suv.sum() * grid(suv.shape).voxel_ml / 1000
    told = doubts_about(suv * np.float32(times), hu, whole_body_kg)
    assert bool(told) == doubtful
    if told:
        assert told[0].startswith("dose fraction out of range: the PET holds 1.2 times the inject")


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize(("mean_suv", "doubtful"), [(0.3, False), (0.12, False), (0.08, True)])
def test_too_little_is_told_by_the_tissue_in_view_however_small_the_crop(
    length, mean_suv, doubtful
):
    suv, hu = body((60, 50, length), mean_suv)
    told = doubts_about(suv, hu)
    assert bool(told) == doubtful
    if told:
        assert "of tissue in view have a mean SUV of 0.08" in told[0]


def test_tissue_that_the_pet_does_not_reach_does_not_count():
    suv, hu = body(mean_suv=0.5)
    suv[..., 4:] = 0
    assert doubts_about(suv, hu) == []


def test_without_weight_or_uptake_in_air_nothing_is_told_of_the_dose():
    suv, hu = body()
    assert texts(dose_out_of_range(None, None, suv, hu, grid(suv.shape))) == []
    nothing = np.zeros_like(suv)
    assert texts(dose_out_of_range(0.0, WEIGHT_KG, nothing, nothing - 1000, grid(suv.shape))) == []


# --- mask ------------------------------------------------------------------------------------


def scene():
    """A body of SUV 1 with two lesions of SUV 6, and their mask."""
    suv, _ = body()
    mask = np.zeros(suv.shape, np.uint8)
    mask[20:24, 20:24, 10:14] = mask[34:37, 26:29, 25:28] = 1
    suv[mask > 0] = 6
    return suv, mask


def test_mask_on_its_lesions_is_not_doubted():
    suv, mask = scene()
    assert texts(mask_far_from_uptake(suv, mask, grid(suv.shape))) == []
    assert texts(mask_far_from_uptake(suv, np.zeros_like(mask), grid(suv.shape))) == []


def test_mask_that_slipped_into_even_tissue_is_told():
    suv, mask = scene()
    slipped = np.roll(mask, 7, axis=1)
    told = texts(mask_far_from_uptake(suv, slipped, grid(suv.shape)))
    assert len(told) == 1
    assert "SUVmean is 1.00 in it and 1.00 at 10 mm beside it" in told[0]


def test_mask_upside_down_in_the_air_is_told_with_lesions_and_volume():
    suv, _ = scene()
    mask = np.zeros(suv.shape, np.uint8)
    mask[2:4, 2:4, 2:4] = mask[50:, 45:, 30:] = 1
    volume_ml = mask.sum() * 0.08
    (told,) = texts(mask_far_from_uptake(suv, mask, grid(suv.shape)))
    assert f"2 lesion(s) of {volume_ml:.2f} ml have none (SUV >= 0.5) within 10 mm" in told


def test_one_lesion_in_the_air_is_told_though_others_are_hot():
    suv, mask = scene()
    mask[2:4, 2:4, 2:4] = 1
    (told,) = texts(mask_far_from_uptake(suv, mask, grid(suv.shape)))
    assert "1 lesion(s) of 0.64 ml" in told


@pytest.mark.parametrize(("distance_voxels", "doubtful"), [(2, False), (4, True)])
def test_lesion_beside_uptake_is_doubted_beyond_10_mm(distance_voxels, doubtful):
    suv, mask = np.zeros((2, 20, 9, 9), np.float32)
    suv[12, 4, 4] = 3
    mask[12 - distance_voxels, 4, 4] = 1
    told = texts(mask_far_from_uptake(suv, mask, grid(suv.shape)))
    assert any("within 10 mm" in text for text in told) == doubtful


def test_cold_core_of_a_hot_rim_is_not_doubted():
    suv, mask = scene()
    suv[21:23, 21:23, 11:13] = 0.2
    assert texts(mask_far_from_uptake(suv, mask, grid(suv.shape))) == []


def test_mask_that_fills_the_image_has_no_surroundings():
    suv = np.ones((2, 2, 2), np.float32)
    assert texts(mask_far_from_uptake(suv, np.ones((2, 2, 2)), grid(suv.shape))) == []
