"""What resampling loses is told with its volume, and nothing else is."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import texts

from common.geometry import Grid
from common.lesions import label_lesions
from common.quality_warnings import (
    clipped_uptake,
    lesion_losses,
    uncovered_uptake,
    unmeasured_lesions,
)
from common.resampling import resample_nearest


def grid(shape, spacing_mm=(1.0, 1.0, 1.0), first_mm=(0.0, 0.0, 0.0), turn=None):
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, :3] = (np.eye(3) if turn is None else turn) @ affine[:3, :3]
    affine[:3, 3] = first_mm
    return Grid(shape, affine)


def told(ids, source, target):
    return texts(lesion_losses(ids, source, resample_nearest(ids, source, target), target))


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+|\d+", text)]


def blocks(shape, *corners):
    """Lesions 1, 2, ... of 2 x 2 x 2 voxels each."""
    ids = np.zeros(shape, np.uint8)
    for number, (x, y, z) in enumerate(corners, start=1):
        ids[x : x + 2, y : y + 2, z : z + 2] = number
    return ids


def test_nothing_is_told_where_nothing_is_lost():
    ids = blocks((10, 10, 10), (1, 1, 1), (6, 6, 6))
    assert told(ids, grid((10, 10, 10)), grid((20, 20, 20), (0.5, 0.5, 0.5), (0.1,) * 3)) == []


def test_no_lesions_no_losses():
    ids = np.zeros((5, 5, 5), np.uint8)
    assert told(ids, grid((5, 5, 5)), grid((2, 2, 2))) == []


def test_voxels_outside_the_grid_are_counted_in_ml():
    ids = blocks((10, 10, 10), (4, 1, 1), (7, 7, 7))
    source, target = grid((10, 10, 10), (10.0, 10.0, 10.0)), grid((5, 10, 10), (10.0, 10.0, 10.0))
    (text,) = told(ids, source, target)
    assert text.startswith("12.00 ml of 2 lesion(s) lie outside the training grid")


def test_lesion_that_falls_between_voxels_vanishes():
    ids = blocks((12, 12, 12), (0, 0, 0), (5, 5, 5))
    source, target = grid((12, 12, 12), (5, 5, 5)), grid((3, 3, 3), (20, 20, 20))
    (text,) = told(ids, source, target)
    assert text.startswith("1 lesion(s) of 1.00 ml vanish by resampling")


def test_mask_that_loses_all_is_told_to_be_empty():
    ids = blocks((12, 12, 12), (5, 5, 5))
    source, target = grid((12, 12, 12), (5, 5, 5)), grid((3, 3, 3), (20, 20, 20))
    assert told(ids, source, target)[1] == "the mask of 1.00 ml becomes empty on the training grid"


def test_lesion_wholly_outside_has_not_vanished_by_resampling():
    ids = blocks((10, 10, 10), (1, 1, 1), (8, 8, 8))
    texts = told(ids, grid((10, 10, 10)), grid((6, 6, 6)))
    assert len(texts) == 1
    assert "outside" in texts[0]


def test_lesions_that_come_to_touch_merge():
    ids = blocks((12, 4, 4), (1, 1, 1), (4, 1, 1), (9, 1, 1))
    source, target = grid((12, 4, 4), (5, 5, 5)), grid((4, 2, 2), (15, 10, 10), (5, 5, 5))
    resampled = resample_nearest(ids, source, target)
    (text,) = texts(lesion_losses(ids, source, resampled, target))
    assert text.startswith("2 lesions of 3.00 ml merge into 1 by resampling")
    assert (resampled[:, 0, 0] > 0).tolist() == [True, True, False, True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.6, 1.0, 1.7, 3.1]), st.integers(3, 12))
def test_sums_are_those_of_a_voxel_by_voxel_count(seed, spacing, n):
    random = np.random.default_rng(seed)
    ids = np.zeros((11, 9, 10), np.uint8)
    for number in range(1, 5):
        x, y, z = random.integers(0, (9, 7, 8))
        box = ids[x : x + 2, y : y + 2, z : z + 2]
        box[box == 0] = number
    source, target = grid(ids.shape), grid((n, n, n), (spacing,) * 3, (0.31, 0.23, 0.17))
    resampled = resample_nearest(ids, source, target)
    top = (np.array(target.shape) - 0.5) * spacing + (0.31, 0.23, 0.17)
    bottom = np.array((0.31, 0.23, 0.17)) - spacing / 2
    inside = {number: [] for number in np.unique(ids[ids > 0])}
    for voxel in np.argwhere(ids):
        inside[ids[tuple(voxel)]].append(bool((voxel >= bottom).all() and (voxel <= top).all()))
    lost = sum(not here for found in inside.values() for here in found)
    gone = [k for k, found in inside.items() if any(found) and k not in resampled]

    texts = {text.split("(s)")[-1].split()[0]: text for text in told(ids, source, target)}
    outside = [text for text in texts.values() if "outside" in text]
    assert bool(outside) is bool(lost)
    if lost:
        assert numbers(outside[0])[0] == pytest.approx(lost / 1000, abs=0.005)
        assert numbers(outside[0])[1] == sum(not all(found) for found in inside.values())
    vanished = [text for text in texts.values() if "vanish" in text]
    assert bool(vanished) is bool(gone)
    if gone:
        assert numbers(vanished[0])[0] == len(gone)
    assert any("empty" in text for text in told(ids, source, target)) is (not resampled.any())


def test_lesion_that_falls_apart_is_told():
    ids = np.zeros((12, 6, 6), np.uint8)
    ids[:4, 1:3, 1:3] = ids[8:, 1:3, 1:3] = 1
    ids[4:8, 1, 1] = 1  # a bridge between two voxels of the target
    source, target = grid(ids.shape, (5, 5, 5)), grid((6, 3, 3), (10, 10, 10), (0, 10, 10))
    (text,) = told(ids, source, target)
    assert text == (
        "1 lesion(s) of 4.00 ml fall into 2 parts by resampling to the training grid: use a finer "
        "--spacing"
    )


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.4, 2.3, 3.1, 4.6]))
def test_the_number_of_lesions_never_changes_in_silence(seed, spacing):
    random = np.random.default_rng(seed)
    mask = np.zeros((20, 18, 16), np.uint8)
    for _ in range(random.integers(1, 7)):
        low = random.integers(0, np.array(mask.shape) - 1)
        mask[tuple(map(slice, low, low + random.integers(1, 6, 3)))] = 1
    ids, count = label_lesions(mask)
    source = grid(mask.shape)
    target = grid((9, 8, 9), (spacing,) * 3, random.uniform(-1, 1, 3))
    resampled = resample_nearest(ids, source, target)
    if label_lesions(resampled)[1] != count:
        assert told(ids, source, target)
    missing = texts(unmeasured_lesions(ids, source, resampled, target))
    n_missing = sum(int(numbers(text)[0]) for text in missing)
    # Numbers are carried over, so that none of those that are left can merge or fall apart.
    assert np.unique(resampled[resampled > 0]).size + n_missing == count


def test_lesions_that_are_not_measured_are_told_with_volume_and_reason():
    ids = blocks((12, 12, 12), (0, 0, 0), (5, 5, 5), (10, 10, 10))
    source, pet = grid((12, 12, 12), (5, 5, 5)), grid((2, 2, 2), (20, 20, 20))
    found = unmeasured_lesions(ids, source, resample_nearest(ids, source, pet), pet)
    assert texts(found) == [
        "1 lesion(s) of 1.00 ml fall between the voxels of the PET's own grid: they are missing "
        "in the measures",
        "1 lesion(s) of 1.00 ml lie outside the PET: they are missing in the measures",
    ]


def test_clipped_uptake_is_told_with_volume_and_maximum():
    suv = np.zeros((4, 4, 4), np.float32)
    suv[1, 1, :3] = (39.0, 41.0, 55.5)
    suv[3, 3, 3] = 90.0  # no tumour
    mask = np.zeros((4, 4, 4), np.uint8)
    mask[1, 1] = 1
    (text,) = texts(clipped_uptake(suv, mask, 40.0, grid((4, 4, 4), (10, 10, 10))))
    assert text.startswith(
        "2.00 ml of lesions are brighter than the SUV range (SUVmax 55.5 > 40 on the training grid)"
    )
    assert texts(clipped_uptake(suv, mask, 56.0, grid((4, 4, 4)))) == []


def turned(degrees):
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


@pytest.mark.parametrize("degrees", [0, 90, 180, 30, 1e-3])
def test_uncovered_uptake_is_that_of_a_voxel_by_voxel_count(degrees):
    random = np.random.default_rng(0)
    suv = random.gamma(1.0, 1.0, (14, 12, 9)).astype(np.float32)
    pet = grid(suv.shape, (10, 10, 10), (-70.0, -60.0, -45.0))
    ct = grid((9, 8, 11), (9.1, 9.3, 5.7), turned(degrees) @ (-36.3, -32.2, -31.1), turned(degrees))
    uncovered = 0
    for voxel in np.argwhere(suv >= 0.5):
        there = np.linalg.solve(ct.affine, pet.affine @ (*voxel, 1))[:3]
        uncovered += bool((there < -0.5).any() or (there > np.array(ct.shape) - 0.5).any())
    (text,) = texts(uncovered_uptake(suv, pet, ct))
    assert text.startswith(f"{uncovered:.1f} ml of PET with uptake (SUV >= 0.5) are not covered")


def test_air_beyond_the_ct_is_no_loss():
    suv = np.full((10, 10, 10), 0.1, np.float32)
    suv[3:6, 3:6, 3:6] = 5
    assert (
        texts(uncovered_uptake(suv, grid(suv.shape), grid((6, 6, 6), first_mm=(2.0, 2.0, 2.0))))
        == []
    )


def test_ct_beside_the_pet_covers_nothing():
    suv = np.ones((5, 5, 5), np.float32)
    far = grid((5, 5, 5), first_mm=(100.0, 0.0, 0.0))
    (text,) = texts(uncovered_uptake(suv, grid(suv.shape, (10, 10, 10)), far))
    assert text.startswith("125.0 ml ")
