"""Doubts about CT, SUV and mask: they come where they must, and not for partial views."""

import numpy as np
import pytest
from said import texts

from common.geometry import Grid, Image
from common.lesions import dose_fraction
from common.plausibility import (
    dose_out_of_range,
    fallen_into_slices,
    implausible_images,
    implausible_volume,
    mask_far_from_uptake,
    summary_of,
)

WEIGHT_KG = 70.0
SPACING_MM = (4.0, 4.0, 5.0)


def grid(shape):
    return Grid(shape, np.diag([*SPACING_MM, 1.0]))


def image(values, spacing_mm=SPACING_MM):
    return Image(values, np.diag([*spacing_mm, 1.0]))


def body(shape=(60, 50, 40), mean_suv=1.0):
    """A body with air around it: SUV and HU."""
    suv, hu = np.zeros(shape, np.float32), np.full(shape, -1000.0, np.float32)
    suv[10:-10, 10:-10], hu[10:-10, 10:-10] = mean_suv, 30
    return suv, hu


def doubts_about(suv, hu, weight_kg=WEIGHT_KG):
    pet, ct = image(suv), image(hu)
    fraction = dose_fraction(suv, pet.affine, weight_kg)
    return texts(dose_out_of_range(fraction, weight_kg, summary_of(ct), pet))


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
    suv, hu = map(image, body())
    assert dose_out_of_range(None, None, summary_of(hu), suv) == []
    nothing = np.zeros(suv.data.shape, np.float32)
    air = summary_of(image(nothing - 1000))
    assert dose_out_of_range(0.0, WEIGHT_KG, air, image(nothing)) == []


@pytest.mark.parametrize(("mean_suv", "doubtful"), [(5, False), (37, True)])
def test_a_crop_brighter_than_any_tissue_is_told_before_it_holds_the_whole_dose(mean_suv, doubtful):
    suv, hu = body((60, 50, 1), mean_suv)
    told = doubts_about(suv, hu)
    assert bool(told) == doubtful
    if told:
        assert "dose fraction out of range" in told[0]
        assert "have a mean SUV of 37" in told[0]


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


@pytest.mark.parametrize("moves", [[(7, 1)], [(-7, 0), (4, 1), (8, 2)]])
def test_mask_that_slipped_into_even_tissue_is_told(moves):
    suv, mask = scene()
    for by, axis in moves:
        mask = np.roll(mask, by, axis)
    told = texts(mask_far_from_uptake(suv, mask, grid(suv.shape)))
    assert len(told) == 1
    assert "moved by" in told[0]
    assert "SUVmean is 1.00 in it and 1.00 at 10 mm beside it" in told[0]


@pytest.mark.parametrize("axes", [0, 1, 2, (0, 1), (0, 1, 2)])
def test_mask_that_is_mirrored_is_told(axes):
    suv, mask = scene()
    (told,) = mask_far_from_uptake(suv, np.flip(mask, axes), grid(suv.shape))
    assert "beside it, but 6.00 and 1.00 mirrored along" in told.text


def test_pale_and_necrotic_tumours_far_from_other_uptake_are_not_doubted():
    suv, mask = scene()
    suv[mask > 0] = 1
    pale = mask_far_from_uptake(suv, mask, grid(suv.shape))
    suv[21:23, 21:23, 11:13] = 0.2
    necrotic = mask_far_from_uptake(suv, mask, grid(suv.shape))
    suv[12:15, 38, 39] = 3  # a vessel, less than the mask
    assert [*pale, *necrotic, *mask_far_from_uptake(suv, mask, grid(suv.shape))] == []


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


# --- volume ----------------------------------------------------------------------------------


def labelled(suv, part):
    """A mask of a part of the body, beginning at the left."""
    mask = (suv > 0.5).astype(np.uint8)
    mask[10 + round(40 * part) :] = 0
    return image(mask)


@pytest.mark.parametrize(
    ("part", "words"), [(0.05, None), (0.15, "15% of the body"), (1, "as if the body itself were")]
)
def test_more_than_a_tenth_of_the_body_is_implausible(part, words):
    suv, hu = body((60, 50, 10))
    told = implausible_volume(labelled(suv, part), summary_of(image(hu)), image(suv).grid)
    assert bool(told) == (words is not None)
    for warning in told:
        assert "implausible volume" in warning.text
        assert words in warning.text


def test_the_body_that_the_pet_does_not_reach_does_not_count():
    suv, hu = body((60, 50, 30))
    told = implausible_volume(labelled(suv, 0.05), summary_of(image(hu)), image(suv[..., :10]).grid)
    assert "15% of the body" in told[0].text


def test_more_than_one_and_a_half_litres_are_implausible_in_any_body():
    hu = np.full((100, 100, 100), 40.0, np.float32)
    mask = np.zeros(hu.shape, np.uint8)
    mask[:15, :10, :10] = 1
    mask[0, 0, 0] = 0
    views = summary_of(image(hu, (10, 10, 10))), image(hu, (10, 10, 10)).grid
    assert implausible_volume(image(mask, (10, 10, 10)), *views) == []
    mask[50, 50, 50:52] = 1
    (told,) = implausible_volume(image(mask, (10, 10, 10)), *views)
    assert "1501 ml are labelled, 0% of the body in view (1000000 ml)" in told.text


def test_a_mask_of_all_that_is_not_tumour_is_implausible():
    suv, mask = scene()
    _, hu = body()
    assert implausible_volume(image(mask), summary_of(image(hu)), image(suv).grid) == []
    assert implausible_volume(image(1 - mask), summary_of(image(hu)), image(suv).grid) != []


def test_a_crop_to_little_more_than_the_tumour_tells_nothing():
    suv, hu = body((30, 30, 9))
    told = implausible_volume(labelled(suv, 0.2), summary_of(image(hu)), image(suv).grid)
    assert told == []


# --- CT and PET ------------------------------------------------------------------------------


def told_of(hu, suv):
    return [each.text for each in implausible_images(summary_of(image(hu)), image(suv))]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_a_mask_drawn_on_every_second_slice_alone_is_told(axis, distance):
    """11.8 ml became 5.7 in five lesions, and nothing said of it but in RTSTRUCTs."""
    ball = np.linalg.norm(np.indices((15, 15, 15)) - 7.0 * np.ones((3, 1, 1, 1)), axis=0) < 6.5
    drawn = np.zeros((15, 15, 15), np.uint8)
    every = (*[slice(None)] * axis, slice(1, None, distance))
    drawn[every] = ball[every]
    told = texts(fallen_into_slices(image(drawn)))
    n_sections = np.count_nonzero(drawn.any(axis=tuple({0, 1, 2} - {axis})))
    assert told == [
        f"{n_sections} lesions of one slice each lie {distance} slices apart, one above another: "
        "if they are one lesion that was drawn so, draw the slices between"
    ] * (distance in (2, 3))


def test_lesions_of_one_slice_are_no_sections_of_one_but_where_three_lie_in_a_row():
    mask = np.zeros((12, 12, 12), np.uint8)
    for x, z in ((1, 1), (1, 3), (5, 5), (9, 7), (5, 9)):
        mask[x : x + 2, 2:4, z] = 1
    assert fallen_into_slices(image(mask)) == []
    mask[1:3, 2:4, 5] = 1
    (told,) = texts(fallen_into_slices(image(mask)))
    assert told.startswith("3 lesions of one slice each lie 2 slices apart")
    specks = np.zeros((12, 12, 12), np.uint8)
    specks[1, 2, ::2] = 1
    assert fallen_into_slices(image(specks)) == []


def test_sound_images_are_not_doubted_nor_noise_around_zero_in_air():
    suv, hu = body()
    noise = np.random.default_rng(0).normal(0, 0.02, suv.shape).astype(np.float32)
    assert told_of(hu, suv) == told_of(hu, suv + noise) == []
    assert ((suv + noise) < 0).mean() > 0.2


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda hu: hu + 1024, id="offset lost"),
        pytest.param(lambda hu: np.clip((hu + 160) / 400 * 255, 0, 255), id="windowed"),
        pytest.param(lambda hu: hu - 1024, id="offset twice"),
    ],
)
def test_ct_that_is_no_hu_is_told(change):
    suv, hu = body()
    (told,) = told_of(change(hu), suv)
    assert "may be no HU" in told


@pytest.mark.parametrize("factor", [5000, 1e-3])
def test_pet_of_another_unit_than_suv_is_told(factor):
    suv, hu = body()
    assert any("check the unit of its values" in told for told in told_of(hu, suv * factor))


def test_ct_and_pet_that_are_swapped_are_told():
    suv, hu = body()
    assert any("swapped" in told for told in told_of(suv, hu))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda suv: np.where(suv < 0.5, -20, suv), id="padded"),
        pytest.param(lambda suv: suv - 0.5, id="offset"),
        pytest.param(lambda suv: -0.01 * suv, id="sign"),
    ],
)
def test_pet_below_zero_is_told(change):
    suv, hu = body()
    assert any("negative values" in told for told in told_of(hu, change(suv).astype(np.float32)))


def test_images_of_other_voxels_and_directions_are_held_against_each_other():
    suv, hu = body()
    fine = np.repeat(hu, 2, axis=0)[::-1]
    affine = np.diag([-2.0, 4.0, 5.0, 1.0])
    affine[0, 3] = 2.0 * (fine.shape[0] - 1) - 1
    ct = summary_of(Image(fine, affine))
    assert implausible_images(ct, image(-0.01 * suv)) != []
    assert implausible_volume(labelled(suv, 0.05), ct, image(suv).grid) == []
    (told,) = implausible_volume(labelled(suv, 0.2), ct, image(suv).grid)
    assert "20% of the body" in told.text or "21% of the body" in told.text
