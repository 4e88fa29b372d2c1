"""Rotated projections against scipy, closed forms and laws.

``TUMORVOLUME_STRESS=20`` in the environment tries twenty times as many cases.
"""

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from common import projection
from common.projection import angle_name, image_mips, mask_mips, projection_angles

# Of the largest magnitude; the contract asks for 1e-3.
IMAGE_TOLERANCE = 1e-6


def cases(count):
    return settings(
        max_examples=count * int(os.environ.get("TUMORVOLUME_STRESS", "1")),
        deadline=None,
        derandomize=True,
        database=None,
    )


def scipy_mips(volumes, angles, order):
    """The definition: rotate every plane of every channel, then take the maximum over y."""
    n_x, n_y, n_z = volumes.shape[-3:]
    stacked = volumes.reshape(-1, n_x, n_y, n_z)
    return np.stack(
        [
            np.stack(
                [
                    ndimage.rotate(
                        volume, angle, (1, 0), reshape=False, order=order, mode="constant", cval=0
                    ).max(axis=1)
                    for volume in stacked
                ]
            ).reshape(*volumes.shape[:-3], n_x, n_z)
            for angle in angles
        ]
    )


def assert_images_agree(images, angles):
    before = images.copy()
    mips = image_mips(images, angles)
    expected = scipy_mips(images.astype(np.float64), angles, order=3)
    assert mips.dtype == np.float32
    assert mips.shape == expected.shape
    magnitude = np.abs(images.astype(np.float64)).max()
    np.testing.assert_allclose(mips, expected, rtol=0, atol=IMAGE_TOLERANCE * magnitude)
    np.testing.assert_array_equal(images, before)


def assert_masks_agree(masks, angles):
    mips = mask_mips(masks, angles)
    assert mips.dtype == masks.dtype
    np.testing.assert_array_equal(mips, scipy_mips(masks, angles, order=0))


sizes = st.one_of(st.integers(1, 4), st.integers(5, 33))
planes = st.one_of(st.tuples(sizes, sizes), sizes.map(lambda n: (n, n)))
channels = st.sampled_from([(), (1,), (2,), (2, 2)])
tie_angles = st.sampled_from([0.0, 30.0, 45.0, 53.130102, 60.0, 90.0, 135.0, 180.0, 225.0, 270.0])
some_angles = st.one_of(
    tie_angles,
    st.integers(0, 999).map(float),
    st.integers(0, 999_999_999).map(lambda millionths: millionths / 1e6),
)
# An angle is likely to meet its own quarter turns, which share work.
angle_lists = st.lists(
    st.builds(lambda angle, turns: angle + 90 * turns, some_angles, st.integers(0, 4)),
    min_size=1,
    max_size=4,
).flatmap(lambda angles: st.just([*angles, angles[0] + 90, angles[0] + 180]))
seeds = st.integers(0, 2**32 - 1)


class TestAngles:
    def test_default_range_has_36_angles(self):
        assert projection_angles(0, 180, 5) == tuple(5.0 * k for k in range(36))

    def test_decimal_steps_do_not_drift(self):
        assert projection_angles(0, 1, 0.1) == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        assert projection_angles(0, 360, 0.7)[-1] == 359.8

    def test_stop_is_excluded_and_need_not_be_met(self):
        assert projection_angles(10, 11, 5) == (10,)
        assert projection_angles(10, 20.001, 5) == (10, 15, 20)
        assert projection_angles(990, 1000, 5) == (990, 995)

    @given(
        start=st.integers(0, 900_000_000),
        step=st.integers(1, 10_000_000),
        count=st.integers(1, 100),
        short_of_next=st.floats(0, 0.99),
    )
    @cases(100)
    def test_counts_like_integers_and_names_are_unique(self, start, step, count, short_of_next):
        step = min(step, (999_999_999 - start) // count)
        stop = start + count * step - int(short_of_next * step)
        angles = projection_angles(start / 1e6, stop / 1e6, step / 1e6)
        assert angles == tuple(number / 1e6 for number in range(start, stop, step))
        names = [angle_name(angle) for angle in angles]
        assert len(set(names)) == len(angles)
        assert [float(name) for name in names] == list(angles)
        assert names == sorted(names)

    @pytest.mark.parametrize(
        ("angles", "message"),
        [
            ((0, 180, 0), "STEP is 0: give a number of degrees above 0"),
            ((0, 180, -5), "STEP is -5: give a number of degrees above 0"),
            ((180, 0, 5), "no angle from START 180 to below STOP 0: raise STOP"),
            ((90, 90, 5), "no angle from START 90 to below STOP 90: raise STOP"),
            ((0, float("inf"), 5), "STOP is inf: give a finite number of degrees"),
            ((float("nan"), 180, 5), "START is nan: give a finite number of degrees"),
            ((0, 180, float("nan")), "STEP is nan: give a finite number of degrees"),
            ((-5, 180, 5), "angle -5: give angles from 0 to below 1000 degrees"),
            ((0, 1001, 5), "angle 1000.0: give angles from 0 to below 1000 degrees"),
            ((0, 180, 180 / 7), "STEP 25.714285714285715: give at most 6 decimals"),
            ((1e-7, 180, 5), "angle 1e-07: give at most 6 decimals"),
            ((0, 180, 1e-6), "more than 3600 angles: raise STEP or lower STOP"),
            ((0, 1e308, 1), "more than 3600 angles: raise STEP or lower STOP"),
        ],
    )
    def test_refuses(self, angles, message):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
            projection_angles(*angles)
        assert str(error.value) == message

    @pytest.mark.parametrize(
        ("angle", "name"),
        [
            (0, "000"),
            (-0.0, "000"),
            (5, "005"),
            (35.0, "035"),
            (100, "100"),
            (7.5, "007.5"),
            (7.25, "007.25"),
            (0.703125, "000.703125"),
            (999.999999, "999.999999"),
        ],
    )
    def test_names(self, angle, name):
        assert angle_name(angle) == name

    @pytest.mark.parametrize("angle", [-1, 1000, 0.1234567, float("nan"), float("inf")])
    def test_has_no_name(self, angle):
        with pytest.raises(ValueError, match=r"^angle .+: give"):
            angle_name(angle)


class TestImagesAgainstScipy:
    @given(
        plane=planes,
        n_z=st.integers(1, 3),
        channels=channels,
        angles=angle_lists,
        dtype=st.sampled_from([np.float16, np.float32, np.float64]),
        spread=st.sampled_from([(0, 1), (-1, 1), (-1024, 3071), (0, 1e-4)]),
        seed=seeds,
    )
    @example((11, 11), 2, (), [53.130102, 143.130102, 233.130102], np.float32, (0, 1), 0)
    @example((3, 3), 1, (), [1e-6, 90.000001, 180.000001, 270.000001], np.float32, (0, 1), 0)
    @example((2, 1), 1, (), [45, 90], np.float64, (0, 1), 0)
    @cases(150)
    def test_noise(self, plane, n_z, channels, angles, dtype, spread, seed):
        noise = np.random.default_rng(seed).uniform(*spread, (*channels, *plane, n_z))
        assert_images_agree(noise.astype(dtype), angles)

    @given(plane=planes, angles=angle_lists)
    @cases(40)
    def test_steepest_edges(self, plane, angles):
        """A checkerboard has the largest spline coefficients there are for its range."""
        board = np.indices((*plane, 2)).sum(axis=0) % 2
        assert_images_agree(board * 2.0 - 1, angles)

    @given(plane=planes, angles=angle_lists)
    @cases(40)
    def test_border(self, plane, angles):
        """Below zero everywhere: any voxel from outside shows as the 0 it is filled with."""
        assert_images_agree(np.full((*plane, 2), -1, np.float32), angles)

    @pytest.mark.parametrize("plane", [(200, 200), (129, 160)])
    def test_full_size_plane_and_default_angles(self, plane):
        noise = np.random.default_rng(7).random((2, *plane, 2), np.float32)
        assert_images_agree(noise.astype(np.float16), projection_angles(0, 180, 5))

    def test_many_columns_are_reduced_in_strips(self):
        noise = np.random.default_rng(8).random((40, 30, 900), np.float32)
        assert_images_agree(noise, [20, 110])

    def test_any_memory_layout(self):
        noise = np.random.default_rng(9).random((4, 12, 9, 2), np.float32)
        assert_images_agree(noise.T[:, ::2, ::-1, 1:3], [33])


class TestMasksAgainstScipy:
    @given(
        plane=planes,
        n_z=st.integers(1, 3),
        channels=channels,
        angles=angle_lists,
        dtype=st.sampled_from([np.uint8, np.uint16]),
        labelled_fraction=st.sampled_from([0, 0.003, 0.05, 0.5, 1]),
        seed=seeds,
    )
    @cases(200)
    def test_labels(self, plane, n_z, channels, angles, dtype, labelled_fraction, seed):
        random = np.random.default_rng(seed)
        shape = (*channels, *plane, n_z)
        labels = random.integers(1, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        assert_masks_agree(labels * (random.random(shape) < labelled_fraction), angles)

    @given(plane=planes, angles=angle_lists)
    @cases(60)
    def test_which_voxel_wins_a_tie(self, plane, angles):
        """Every column another label: the projection tells which voxel each ray ended in."""
        numbers = np.arange(1, plane[0] * plane[1] + 1, dtype=np.uint16)
        assert_masks_agree(numbers.reshape(*plane, 1), angles)

    @pytest.mark.parametrize("n", [199, 200])
    def test_lesions_in_a_full_size_plane(self, n):
        random = np.random.default_rng(n)
        mask = np.zeros((1, n, n, 4), np.uint8)
        for x, y in random.integers(0, n - 9, (12, 2)):
            mask[0, x : x + 9, y : y + 9, random.integers(0, 4)] = 1
        assert_masks_agree(mask, [*projection_angles(0, 180, 15), 45, 135])

    def test_empty_mask(self):
        mips = mask_mips(np.zeros((1, 5, 4, 3), np.uint8), [0, 30])
        np.testing.assert_array_equal(mips, np.zeros((2, 1, 5, 3), np.uint8))


class TestClosedForms:
    def test_right_angles_are_plain_maxima(self):
        random = np.random.default_rng(1)
        image = random.random((24, 24, 5), np.float32)
        mask = (random.random((24, 24, 5)) < 0.01).astype(np.uint8)
        for volume, mips in ((image, image_mips), (mask, mask_mips)):
            at_0, at_90, at_180, at_270, at_360 = mips(volume, [0, 90, 180, 270, 360])
            along_y, along_x = volume.max(axis=1), volume.max(axis=0)
            np.testing.assert_allclose(at_0, along_y, rtol=0, atol=1e-6)
            np.testing.assert_allclose(at_90, along_x[::-1], rtol=0, atol=1e-6)
            np.testing.assert_allclose(at_180, along_y[::-1], rtol=0, atol=1e-6)
            np.testing.assert_allclose(at_270, along_x, rtol=0, atol=1e-6)
            np.testing.assert_allclose(at_360, along_y, rtol=0, atol=1e-6)

    @given(
        x=st.floats(-14, 14),
        y=st.floats(-14, 14),
        angle=some_angles,
        plane=st.sampled_from([(61, 61), (60, 60), (61, 66)]),
    )
    @cases(60)
    def test_a_source_lands_where_trigonometry_puts_it(self, x, y, angle, plane):
        """A small Gaussian at (x, y) from the middle comes to x cos(angle) - y sin(angle)."""
        grid_x, grid_y = (np.arange(n) - (n - 1) / 2 for n in plane)
        source = np.exp(-(((grid_x[:, None] - x) ** 2 + (grid_y - y) ** 2) / (2 * 1.5**2)))
        profile = image_mips(source[:, :, None].astype(np.float32), [angle])[0, :, 0]
        centroid = (profile * grid_x).sum() / profile.sum()
        radians = np.deg2rad(angle)
        assert centroid == pytest.approx(x * np.cos(radians) - y * np.sin(radians), abs=0.02)

        lesion = mask_mips((source > 0.5).astype(np.uint8)[:, :, None], [angle])[0, :, 0]
        assert abs(grid_x[lesion > 0].mean() - centroid) < 1


class TestLaws:
    @given(plane=planes, angles=angle_lists, seed=seeds)
    @cases(30)
    def test_channels_and_slices_are_independent(self, plane, angles, seed):
        noise = np.random.default_rng(seed).random((2, *plane, 4), np.float32)
        mips = image_mips(noise, angles)
        for channel in range(2):
            np.testing.assert_array_equal(image_mips(noise[channel], angles), mips[:, channel])
        np.testing.assert_array_equal(image_mips(noise[..., 2:], angles), mips[..., 2:])

    @given(plane=planes, angles=angle_lists, seed=seeds)
    @cases(30)
    def test_an_angle_gives_the_same_alone_and_in_company(self, plane, angles, seed):
        """But for rounding: quarter turns share work."""
        noise = np.random.default_rng(seed).random((*plane, 2), np.float32)
        mips = image_mips(noise, angles)
        for mip, angle in zip(mips, angles, strict=True):
            np.testing.assert_allclose(mip, image_mips(noise, [angle])[0], rtol=0, atol=1e-6)

    def test_no_angles(self):
        assert image_mips(np.zeros((2, 5, 4, 3), np.float16), []).shape == (0, 2, 5, 3)
        assert mask_mips(np.zeros((1, 5, 4, 3), np.uint8), []).shape == (0, 1, 5, 3)


def test_nothing_is_computed_with_numbers_too_small_for_float32(monkeypatch):
    """Air of one value, which fades into them, took twice as long as noise."""
    given_to = []
    maxima = projection._maxima
    monkeypatch.setattr(
        projection, "_maxima", lambda *given: given_to.append(given[1]) or maxima(*given)
    )
    bright = np.zeros((1, 200, 3, 2), np.float32)
    bright[0, 5, 1, 1] = 1
    image_mips(bright, [30])
    (coefficients,) = (abs(each) for each in given_to)
    assert coefficients.max() > 1
    assert not ((coefficients > 0) & (coefficients < np.finfo(np.float32).tiny)).any()
