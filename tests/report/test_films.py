"""Films: the right way up, dark where uptake is, lesions outlined, films that play on."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from common.report import films

SPACING_MM = (2.0, 3.0)


def frames(pet, masks=None, orientation="LAS", suv_range=(0.0, 40.0), angles=None):
    masks = np.zeros(pet.shape, np.uint8) if masks is None else masks
    angles = [0.0] * len(pet) if angles is None else angles
    return films.mip_frames(
        pet.astype(np.float16), masks, angles, suv_range, SPACING_MM, orientation
    )


def rgb(frame):
    return np.asarray(frame.convert("RGB")).astype(int)


def projection_of(frame):
    """The part of a frame left of the bar of SUVs."""
    return rgb(frame)[:, : frame.width - films._MARGIN]


def test_no_uptake_is_white_and_much_is_black():
    pet = np.zeros((1, 20, 20))
    pet[0, 10:] = 10 / 40
    (frame,) = frames(pet)
    body = projection_of(frame)
    assert np.mean(body[:, 40] == 255) > 0.9
    assert np.mean(body[:, -40] == 0) > 0.9


def test_half_the_brightest_suv_is_medium_grey():
    (frame,) = frames(np.full((1, 8, 8), (5 - 1) / 39), suv_range=(1.0, 40.0))
    assert np.median(np.abs(projection_of(frame) - 127)) <= 4


@pytest.mark.parametrize(("shape", "size"), [((30, 20), (400, 400)), ((300, 400), (300, 600))])
def test_pixels_are_square_none_is_dropped_and_short_scans_are_high_enough(shape, size):
    (frame,) = frames(np.zeros((1, *shape)))
    assert projection_of(frame).shape[1::-1] == size


def test_sides_change_places_on_the_other_side_and_are_left_out_in_between():
    pet = np.zeros((3, 40, 40))
    front, side, back = (projection_of(f)[180:220] for f in frames(pet, angles=[0.0, 90.0, 180.0]))
    assert (side == 255).all()
    assert (front < 255).any()
    assert not np.array_equal(front, back)


@pytest.mark.parametrize(
    ("orientation", "rows_down", "left_on_the_right"),
    [("LAS", True, True), ("RAS", True, False), ("LAI", False, True), ("RPI", False, False)],
)
def test_head_is_up_and_the_patients_left_on_the_right(orientation, rows_down, left_on_the_right):
    pet = np.zeros((1, 12, 12))
    pet[0, 11, 11] = 1  # the far end of the first and the last axis
    (frame,) = frames(pet, orientation=orientation)
    dark = ndimage.uniform_filter(projection_of(frame)[..., 0].astype(float), 9)
    row, column = np.unravel_index(dark.argmin(), dark.shape)
    height, width = projection_of(frame).shape[:2]
    assert bool(row < height / 2) == rows_down
    assert bool(column > width / 2) == left_on_the_right


def test_lesion_has_an_outline_around_and_not_over_it():
    pet, mask = np.full((1, 20, 20), 0.1), np.zeros((1, 20, 20), np.uint8)
    mask[0, 8:12, 8:12] = 1
    (frame,) = frames(pet, mask)
    red = (rgb(frame) == films.OUTLINE_RGB).all(axis=-1)
    assert red.any()
    inside = films.LEAST_HEIGHT // 2
    assert not red[inside - 30 : inside + 30, inside * 2 // 3 - 20 : inside * 2 // 3 + 20].any()
    plain = rgb(frames(pet)[0])
    np.testing.assert_array_equal(rgb(frame)[~red], plain[~red])


def test_png_is_read_back_as_it_was(tmp_path):
    (frame,) = frames(np.random.default_rng(0).random((1, 20, 20)) / 4)
    films.write_png(tmp_path / "a.png", frame)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(rgb(image), rgb(frame))


@pytest.mark.parametrize(
    ("angles", "n_frames"), [([0, 60, 120], 6), ([0, 120, 240], 3), ([0, 45, 90], 3), ([0], 1)]
)
def test_film_plays_on_and_half_a_turn_is_completed(angles, n_frames, tmp_path):
    pet = np.random.default_rng(0).random((len(angles), 20, 20)) / 4
    masks = np.zeros(pet.shape, np.uint8)
    pets, masks, turned = films.full_turn(pet, masks, angles)
    stills = frames(pets, masks, angles=turned)
    films.write_gif(tmp_path / "a.gif", stills)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == n_frames
        if n_frames > 1:
            assert film.info["loop"] == 0
            assert film.info["duration"] == films.FRAME_MS
        film.seek(n_frames - 1)
        np.testing.assert_array_equal(rgb(film), rgb(stills[-1]))
    if n_frames == 2 * len(angles):
        np.testing.assert_array_equal(pets[len(angles)], pet[0][::-1])
        assert turned[len(angles)] == angles[0] + 180


def test_noisy_film_of_a_long_patient_stays_below_3_mb(tmp_path):
    random = np.random.default_rng(0)
    pet = random.gamma(60, 2.5 / 60 / 40, (36, 200, 350))
    pet[:, :40] = pet[:, 160:] = 0
    path = tmp_path / "a.gif"
    full = films.full_turn(pet, np.zeros(pet.shape, np.uint8), [5.0 * n for n in range(36)])
    films.write_gif(path, frames(full[0], full[1], angles=full[2]))
    assert path.stat().st_size < 3_000_000


def test_same_frames_give_the_same_bytes(tmp_path):
    stills = frames(np.random.default_rng(0).random((3, 20, 20)))
    for name in ("a.gif", "b.gif"):
        films.write_gif(tmp_path / name, stills)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
