"""Pictures: the right way up, dark where uptake is, lesions outlined, films that play on."""

import numpy as np
import pytest
from PIL import Image

from common.report import pictures

SPACING_MM = (2.0, 3.0)


def frames(pet, masks=None, orientation="LAS", suv_range=(0.0, 40.0)):
    masks = np.zeros(pet.shape, np.uint8) if masks is None else masks
    return pictures.mip_frames(pet.astype(np.float16), masks, suv_range, SPACING_MM, orientation)


def rgb(frame):
    return np.asarray(frame.convert("RGB")).astype(int)


def test_no_uptake_is_white_and_much_is_black():
    pet = np.zeros((1, 20, 20))
    pet[0, 10:] = 10 / 40
    (frame,) = frames(pet)
    assert (rgb(frame)[:, 0] == 255).all()
    assert (rgb(frame)[:, -1] == 0).all()


def test_half_the_brightest_suv_is_medium_grey():
    (frame,) = frames(np.full((1, 8, 8), (5 - 1) / 39), suv_range=(1.0, 40.0))
    assert np.abs(rgb(frame) - 127).max() <= 4


def test_pixels_are_square_and_none_is_dropped():
    (frame,) = frames(np.zeros((1, 30, 20)))
    assert frame.size == (30, 30)


@pytest.mark.parametrize(
    ("orientation", "rows_down", "left_on_the_right"),
    [("LAS", True, True), ("RAS", True, False), ("LAI", False, True), ("RPI", False, False)],
)
def test_head_is_up_and_the_patients_left_on_the_right(orientation, rows_down, left_on_the_right):
    pet = np.zeros((1, 12, 12))
    pet[0, 11, 11] = 1  # the far end of the first and the last axis
    (frame,) = frames(pet, orientation=orientation)
    row, column = np.unravel_index(rgb(frame)[..., 0].argmin(), frame.size[::-1])
    assert bool(row < 9) == rows_down
    assert bool(column > 6) == left_on_the_right


def test_lesion_has_an_outline_around_and_not_over_it():
    pet, mask = np.full((1, 20, 20), 0.1), np.zeros((1, 20, 20), np.uint8)
    mask[0, 8:12, 8:12] = 1
    (frame,) = frames(pet, mask)
    red = (rgb(frame) == pictures.OUTLINE_RGB).all(axis=-1)
    assert red.any()
    assert not red[12:18, 8:12].any()
    plain = rgb(frames(pet)[0])
    np.testing.assert_array_equal(rgb(frame)[~red], plain[~red])


def test_png_is_read_back_as_it_was(tmp_path):
    (frame,) = frames(np.random.default_rng(0).random((1, 20, 20)) / 4)
    pictures.write_png(tmp_path / "a.png", frame)
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(rgb(image), rgb(frame))


@pytest.mark.parametrize(
    ("angles", "n_frames"), [([0, 60, 120], 6), ([0, 120, 240], 3), ([0, 45, 90], 3), ([0], 1)]
)
def test_film_plays_on_and_half_a_turn_is_completed(angles, n_frames, tmp_path):
    pet = np.random.default_rng(0).random((len(angles), 20, 20)) / 4
    stills = frames(pet)
    pictures.write_gif(tmp_path / "a.gif", stills, angles)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == n_frames
        if n_frames > 1:
            assert film.info["loop"] == 0
            assert film.info["duration"] == pictures.FRAME_MS
        film.seek(len(angles) - 1)
        np.testing.assert_array_equal(rgb(film), rgb(stills[-1]))
        if n_frames == 2 * len(angles):
            film.seek(len(angles))
            np.testing.assert_array_equal(rgb(film), rgb(stills[0])[:, ::-1])


def test_noisy_film_of_a_long_patient_stays_below_3_mb(tmp_path):
    random = np.random.default_rng(0)
    pet = random.gamma(60, 2.5 / 60 / 40, (36, 200, 350))
    pet[:, :40] = pet[:, 160:] = 0
    path = tmp_path / "a.gif"
    pictures.write_gif(path, frames(pet), [5.0 * n for n in range(36)])
    assert path.stat().st_size < 3_000_000


def test_same_frames_give_the_same_bytes(tmp_path):
    stills = frames(np.random.default_rng(0).random((3, 20, 20)))
    for name in ("a.gif", "b.gif"):
        pictures.write_gif(tmp_path / name, stills, [0, 60, 120])
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
