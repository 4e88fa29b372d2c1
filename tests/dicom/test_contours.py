"""Contours against exact arithmetic, another library's point-in-polygon test, and laws."""

import time
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_builders import axial_affine, oblique_affine
from skimage.measure import points_in_poly

from common.dicom.contours import fill_contours
from common.errors import StudyError

SHAPE = (12, 10, 3)
VOXELS = np.eye(4)


def polygon(points, k=1.0):
    """Return (n, 3) points at slice k from (n, 2)."""
    points = np.asarray(points, dtype=float)
    return np.column_stack([points, np.full(len(points), float(k))])


def rectangle(x0, x1, y0, y1, k=1.0):
    return polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], k)


def fill(*contours, shape=SHAPE, affine=VOXELS):
    return fill_contours(contours, shape, affine)


def exactly_inside(points, shape):
    """Even-odd rule voxel by voxel in exact fractions; low edges belong, high edges don't."""
    vertices = [(Fraction(float(x)), Fraction(float(y))) for x, y in points]
    edges = list(zip(vertices, vertices[1:] + vertices[:1], strict=True))
    inside = np.zeros(shape, dtype=bool)
    for i, j in np.ndindex(shape):
        for (x0, y0), (x1, y1) in edges:
            if (y0 <= j) != (y1 <= j) and x0 + (j - y0) * (x1 - x0) / (y1 - y0) <= i:
                inside[i, j] ^= True
    return inside


# Halves put vertices and edges exactly on voxel centres, also outside the grid.
on_halves = st.tuples(st.integers(-4, 26), st.integers(-4, 22)).map(lambda p: (p[0] / 2, p[1] / 2))
anywhere = st.tuples(st.floats(-3, 14), st.floats(-3, 12))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(on_halves, min_size=3, max_size=9, unique=True))
def test_centres_on_edges_follow_the_half_open_rule_exactly(points):
    on_image = (np.min(points, axis=0) <= (11.5, 9.5)).all() and (
        np.max(points, axis=0) >= (-0.5, -0.5)
    ).all()
    if not on_image:
        with pytest.raises(StudyError, match="1 are outside the image"):
            fill(polygon([(x + 1e-3, y) for x, y in points]))
        return
    # A contour off the centres: where all points lie on some, the edge is inside.
    inside = fill(polygon(points), rectangle(-0.5, -0.4, -0.5, -0.4)).inside
    np.testing.assert_array_equal(inside[:, :, 1], exactly_inside(points, SHAPE[:2]))
    assert not inside[:, :, [0, 2]].any()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(anywhere, min_size=3, max_size=9, unique=True))
def test_agrees_with_scikit_image_away_from_edges(points):
    points = np.round(points, 3) + 0.00037  # no centre on an edge at a vertex
    inside = fill(polygon(points), rectangle(-0.5, -0.4, -0.5, -0.4)).inside[:, :, 1]
    centres = np.argwhere(np.ones(SHAPE[:2]))
    expected = points_in_poly(centres, points).reshape(SHAPE[:2])
    following = np.roll(points, -1, axis=0)
    along = following - points
    length = np.hypot(*along.T)
    distance = abs(
        along[:, 0] * (centres[:, 1:] - points[:, 1])
        - along[:, 1] * (centres[:, :1] - points[:, 0])
    ) / np.where(length > 0, length, 1)
    clear = (distance.min(axis=1) > 1e-4).reshape(SHAPE[:2])
    np.testing.assert_array_equal(inside[clear], expected[clear])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(on_halves, min_size=3, max_size=8, unique=True),
    st.integers(0, 7),
    st.booleans(),
)
def test_start_point_direction_and_repeated_points_do_not_matter(points, start, backwards):
    points = np.array([*points, (0.0, 0.0), (11.0, 0.0), (11.0, 9.0)])
    other = np.roll(points[::-1] if backwards else points, start, axis=0)
    other = np.repeat(np.vstack([other, other[:1]]), 2, axis=0)
    np.testing.assert_array_equal(fill(polygon(points)).inside, fill(polygon(other)).inside)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 18), min_size=1, max_size=4, unique=True),
    st.sampled_from([0, 0.5, 1, 2]),
)
def test_contours_that_share_edges_share_no_voxel_and_leave_none_out(cuts_x, cuts_y, slant):
    x = [-0.5, *sorted(c / 2 for c in cuts_x), 11.5]
    y = [-0.5, *sorted(c / 2 for c in cuts_y), 9.5]
    count = np.zeros(SHAPE[:2], dtype=int)
    for x0, x1 in pairwise(x):
        for y0, y1 in pairwise(y):
            if x0 < x1 and y0 < y1:
                # Slanted sides: shared by neighbours in x, as the slant depends on y alone.
                tile = [(x0 + slant * y0, y0), (x1 + slant * y0, y0)]
                tile += [(x1 + slant * y1, y1), (x0 + slant * y1, y1)]
                count += fill(polygon(tile), rectangle(0.2, 0.3, 0.2, 0.3)).inside[:, :, 1]
    i, j = np.indices(SHAPE[:2])
    np.testing.assert_array_equal(count, (i - slant * j >= -0.5) & (i - slant * j < 11.5))


def test_a_circle_has_its_area():
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    circle = polygon(np.column_stack([50.3 + 40 * np.cos(angle), 49.6 + 40 * np.sin(angle)]), 0)
    n_voxels = fill(circle, shape=(101, 100, 1)).inside.sum()
    assert n_voxels == pytest.approx(np.pi * 40**2, rel=5e-3)


def test_holes_islands_in_holes_and_keyholes():
    outer, hole = rectangle(0.5, 9.5, 0.5, 8.5), rectangle(2.5, 7.5, 2.5, 6.5)
    island = rectangle(3.5, 5.5, 3.5, 5.5)
    expected = np.zeros(SHAPE, dtype=bool)
    expected[1:10, 1:9, 1] = True
    expected[3:8, 3:7, 1] = False
    np.testing.assert_array_equal(fill(outer, hole).inside, expected)
    keyhole = np.vstack([outer, outer[:1], hole, hole[:1]])
    np.testing.assert_array_equal(fill(keyhole).inside, expected)
    expected[4:6, 4:6, 1] = True
    np.testing.assert_array_equal(fill(island, outer, hole).inside, expected)


def test_the_same_contour_twice_counts_once():
    outer, hole = rectangle(0.5, 9.5, 0.5, 8.5), rectangle(2.5, 7.5, 2.5, 6.5)
    again = np.roll(outer[::-1], 2, axis=0)
    filled = fill(outer, hole, again)
    np.testing.assert_array_equal(filled.inside, fill(outer, hole).inside)
    assert filled.warnings == ("1 contour(s) are there twice: used once",)
    assert fill(outer, hole, rectangle(0.5, 9.5, 0.5, 8.5, k=2)).warnings == ()


def test_points_lines_and_contours_between_centres_are_counted():
    filled = fill(
        rectangle(0.5, 3.5, 0.5, 3.5),
        polygon([(1, 1)]),
        polygon([(1, 1), (4, 4)]),
        polygon([(1, 1), (4, 4), (1, 1)]),
        rectangle(5.1, 5.9, 5.1, 5.9),
    )
    assert filled.inside.sum() == 9
    assert filled.warnings == (
        "3 contour(s) with fewer than three different points enclose no area: ignored",
        "1 contour(s) enclose no voxel centre: nothing of them is in the mask",
    )
    assert not fill(polygon([(1.2, 1)])).inside.any()


def test_contours_between_slices_go_to_the_nearest_and_say_so():
    for k, slice_index in ((0.92, 1), (1.08, 1)):
        filled = fill(rectangle(0.5, 3.5, 0.5, 3.5, k))
        assert filled.inside[:, :, slice_index].sum() == 9
        assert filled.warnings == ()
    for k, slice_index in ((1.3, 1), (1.7, 2), (-0.4, 0), (2.49, 2)):
        filled = fill(rectangle(0.5, 3.5, 0.5, 3.5, k))
        assert filled.inside.sum() == filled.inside[:, :, slice_index].sum() == 9
        assert "1 contour(s) lie between slices" in filled.warnings[0]


def test_contours_of_several_planes_on_one_slice_are_united():
    thin_slices = [rectangle(0.5, 6.5, 0.5, 6.5, 1 + dk) for dk in (-0.3, 0, 0.3)]
    filled = fill(*thin_slices, rectangle(2.5, 4.5, 2.5, 4.5, 1.32))
    np.testing.assert_array_equal(filled.inside, fill(thin_slices[1]).inside)
    # A hole is one of its own plane, also where rounding or the middle between slices part them.
    with_hole = fill(rectangle(0.5, 6.5, 0.5, 6.5, 1.49), rectangle(2.5, 4.5, 2.5, 4.5, 1.51))
    assert with_hole.inside.sum() == with_hole.inside[:, :, 1].sum() == 36 - 4


def test_contours_outside_or_across_the_image():
    tumour = rectangle(0.5, 3.5, 0.5, 3.5)
    tilted = tumour + np.array([[0, 0, 0], [0, 0, 0.15], [0, 0, 0.15], [0, 0, 0]])
    outside = [
        rectangle(0.5, 3.5, 0.5, 3.5, 2.6),
        rectangle(0.5, 3.5, 0.5, 3.5, -0.6),
        rectangle(12, 14, 0.5, 3.5),
        rectangle(0.5, 3.5, -4, -1),
    ]
    filled = fill(tumour, tilted, *outside, rectangle(9.5, 20, 7.5, 20))
    assert filled.inside.sum() == 9 + 2 * 2
    assert filled.warnings == (
        "1 contour(s) are not parallel to the slices: ignored",
        "4 contour(s) lie outside the image: ignored",
        "1 contour(s) reach beyond the edge of the image: cut off there",
    )
    with pytest.raises(StudyError, match="4 are outside the image, 1 not parallel") as refused:
        fill(tilted, *outside)
    assert "give the image they were drawn on" in str(refused.value)


@pytest.mark.parametrize("affine", [axial_affine((2, 2, 3)), oblique_affine((2.1, 1.7, 4.3))])
def test_any_orientation_gives_the_same_voxels(affine):
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    in_voxels = [
        polygon(np.column_stack([5 + r * np.cos(angle), 4.27 + r * np.sin(angle)]), k)
        for r, k in ((4.1, 0), (2.2, 0), (3.3, 2))
    ]
    in_mm = [points @ affine[:3, :3].T + affine[:3, 3] for points in in_voxels]
    expected = fill(*in_voxels)
    assert 40 < expected.inside.sum() < 100
    np.testing.assert_array_equal(fill(*in_mm, affine=affine).inside, expected.inside)
    # ... and on the same grid with its axes permuted in plane and its slices reversed.
    other = affine @ np.array(
        [[0, -1, 0, SHAPE[0] - 1], [1, 0, 0, 0], [0, 0, -1, SHAPE[2] - 1], [0, 0, 0, 1.0]]
    )
    turned = fill(*in_mm, shape=(SHAPE[1], SHAPE[0], SHAPE[2]), affine=other)
    np.testing.assert_array_equal(np.swapaxes(turned.inside, 0, 1)[::-1, :, ::-1], expected.inside)


@pytest.mark.parametrize(
    ("points", "affine"),
    [
        (np.zeros((4, 2)), VOXELS),
        (np.zeros(12), VOXELS),
        (np.full((4, 3), np.nan), VOXELS),
        (np.full((4, 3), 1e200), VOXELS),
        (np.zeros((4, 3)), np.diag([1, 1, 0, 1.0])),
        (np.zeros((4, 3)), np.full((4, 4), np.nan)),
    ],
)
def test_what_is_no_geometry_is_refused(points, affine):
    with pytest.raises(StudyError, match=r"contour points are not triplets|no usable affine"):
        fill(points, affine=affine)


def test_nothing_drawn_is_an_empty_mask():
    filled = fill()
    assert filled.inside.shape == SHAPE
    assert not filled.inside.any()
    assert filled.warnings == ()


def test_a_whole_body_of_contours_takes_less_than_a_second():
    angle = np.linspace(0, 2 * np.pi, 500, endpoint=False)
    lobed = np.column_stack([256 + 200 * np.cos(angle), 256 + 150 * np.sin(9 * angle)])
    contours = [polygon(lobed, k) for k in range(200)]
    start = time.process_time()
    fill(*contours, shape=(512, 512, 200))
    assert time.process_time() - start < 1
