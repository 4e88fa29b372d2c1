"""Contours against exact arithmetic, another library's point-in-polygon test, and laws."""

import re
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_builders import axial_affine, oblique_affine
from scipy.ndimage import gaussian_filter, label
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
    """Return what `fill_contours` does, with the slices in a whole volume."""
    filled = fill_contours(contours, shape, affine)
    volume = np.zeros(shape, dtype=bool)
    for k, inside in filled.inside.items():
        volume[:, :, k] = inside
    return replace(filled, inside=volume)


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
    with pytest.raises(
        StudyError, match=r"contour points are not triplets|affine .*: export the image again"
    ):
        fill(points, affine=affine)


def test_nothing_drawn_is_an_empty_mask():
    filled = fill()
    assert filled.inside.shape == SHAPE
    assert not filled.inside.any()
    assert filled.warnings == ()


# --- outlines through voxel centres

THROUGH_CENTRES = (
    "all points are centres of voxels, as of a mask that a program outlined: what the edges run "
    "through is inside"
)


def outlines(mask, approximate):
    """Outline a mask as rt-utils and TotalSegmentator do, by OpenCV."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV comes with rt-utils")
    how = cv2.CHAIN_APPROX_SIMPLE if approximate else cv2.CHAIN_APPROX_NONE
    return [
        polygon(contour.reshape(-1, 2), k)
        for k in range(mask.shape[2])
        for contour in cv2.findContours(
            np.ascontiguousarray(mask[:, :, k].T.astype(np.uint8)), cv2.RETR_TREE, how
        )[0]
    ]


def random_masks(number):
    """Yield specks, smooth shapes, rectangles and balls with holes."""
    random = np.random.default_rng(number)
    grid = np.moveaxis(np.indices(SHAPE), 0, -1)
    away = np.linalg.norm(grid - random.random(3) * SHAPE, axis=-1)
    low = random.integers(0, SHAPE)
    yield random.random(SHAPE) < random.choice([0.2, 0.5, 0.8])
    yield gaussian_filter(random.random(SHAPE), 1) > 0.5
    yield ((grid >= low) & (grid <= random.integers(low, SHAPE))).all(axis=-1)
    yield (away < 5 * random.random() + 1) & (away >= 2 * random.random())


@pytest.mark.parametrize("approximate", [True, False])
@pytest.mark.parametrize("affine", [VOXELS, axial_affine((0.7, 0.7, 3)), oblique_affine((2, 1, 4))])
def test_outlines_through_voxel_centres_give_back_the_mask(affine, approximate):
    """225 voxels became 160, a node of 12 became 3."""
    for number in range(25):
        for mask in random_masks(number):
            in_mm = [
                np.round(points @ affine[:3, :3].T + affine[:3, 3], 3)
                for points in outlines(mask, approximate)
            ]
            filled = fill(*in_mm, affine=affine)
            np.testing.assert_array_equal(filled.inside, mask)
            assert not mask.any() or THROUGH_CENTRES in filled.warnings


@pytest.mark.parametrize(
    ("points", "n_voxels"),
    [
        ([(4, 5)], 1),
        ([(4, 5), (7, 5)], 4),
        ([(4, 5), (7, 8)], 4),
        ([(4, 5), (6, 5), (6, 7), (4, 7)], 9),
        ([(4, 5), (6, 6)], 2),
        ([(9, 8), (15, 8)], 3),
    ],
)
def test_points_and_lines_through_voxel_centres_are_voxels(points, n_voxels):
    filled = fill(polygon(points))
    assert filled.inside.sum() == n_voxels
    assert THROUGH_CENTRES in filled.warnings


def test_a_ring_one_voxel_wide_is_no_contour_given_twice():
    diamond = polygon([(4, 3), (5, 4), (4, 5), (3, 4)])
    assert fill(diamond).inside.sum() == 5
    assert fill(diamond, diamond[::-1]).inside.sum() == 4
    twice = fill(diamond, np.roll(diamond, 1, axis=0))
    assert twice.inside.sum() == 5
    assert twice.warnings[0] == "1 contour(s) are there twice: used once"


def test_contours_with_one_vertex_off_the_centres_keep_the_rule_of_centres_inside():
    square = [(2, 2), (6, 2), (6, 6), (2, 6)]
    for off in (0.06, 0.5):
        filled = fill(polygon(square), rectangle(8 + off, 10, 2, 4))
        assert filled.inside[:, :, 1][:8].sum() == 16
        assert filled.warnings == ()
    # Positions are written with few decimals.
    assert fill(polygon(np.add(square, 0.01))).inside.sum() == 25


@pytest.mark.parametrize("pixel_mm", [0.5, 0.98, 4.07])
def test_outlines_written_with_one_decimal_run_through_voxel_centres(pixel_mm):
    """A rim of voxels was lost where rounding moved the points by more than a fiftieth of one."""
    affine = axial_affine((pixel_mm, pixel_mm, 3))
    square = polygon([(2, 2), (6, 2), (6, 6), (2, 6)])
    in_mm = square @ affine[:3, :3].T + affine[:3, 3]
    assert fill(np.round(in_mm, 1), affine=affine).inside.sum() == 25


# --- overlaps


def circle(x, y, radius, k=1.0, points=90):
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return polygon(np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)]), k)


def said(filled, word):
    return [text for text in filled.warnings if word in text]


def overlap_voxels(filled):
    """Volume [ml] of an overlap as voxels of 1 mm3; 0 where nothing is said."""
    found = [re.search(r"overlap in (\S+) ml", text) for text in filled.warnings]
    return round(sum(float(each[1]) for each in found if each) * 1000)


def test_contours_that_overlap_in_part_are_told_with_their_volume():
    filled = fill(rectangle(0.5, 5.5, 0.5, 5.5), rectangle(3.5, 9.5, 2.5, 8.5))
    assert filled.inside.sum() == 25 + 36 - 2 * 6
    assert overlap_voxels(filled) == 6
    assert said(filled, "even-odd")


def test_what_is_drawn_twice_and_vanishes_is_told():
    once, again = rectangle(0.5, 5.5, 0.5, 5.5), rectangle(0.51, 5.49, 0.52, 5.48)
    assert overlap_voxels(fill(once, again)) == 25
    assert overlap_voxels(fill(np.vstack([once, once]))) == 25
    spiral = polygon([(0.5, 0.5), (9.5, 0.5), (9.5, 8.5), (2.5, 8.5), (2.5, 2.5), (7.5, 2.5),
                      (7.5, 6.5), (0.5, 6.5)])  # fmt: skip
    assert overlap_voxels(fill(spiral)) == fill(rectangle(2.5, 7.5, 2.5, 6.5)).inside.sum()


def test_rings_keyholes_and_islands_do_not_overlap():
    outer, hole = rectangle(0.5, 9.5, 0.5, 8.5), rectangle(2.5, 7.5, 2.5, 6.5)
    island = rectangle(3.5, 5.5, 3.5, 5.5)
    for contours in (
        [outer, hole, island],
        [outer, rectangle(0.5, 5.5, 0.5, 5.5)],
        [rectangle(0.5, 5.5, 0.5, 8.5), rectangle(5.5, 9.5, 0.5, 8.5)],
        [np.vstack([outer, outer[:1], hole, hole[:1]])],
        [np.vstack([outer, outer[:1], hole[::-1], hole[-1:]])],
        [circle(5, 4.3, 4), circle(5, 4.3, 2)[::-1]],
    ):
        assert fill(*contours).warnings == ()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(40, 180), st.integers(40, 140), st.integers(12, 80)),
        min_size=2,
        max_size=3,
        unique=True,
    )
)
def test_overlaps_are_what_even_odd_erases_of_circles_that_cross(circles):
    circles = [tuple(each / 20 + 0.013 for each in circle) for circle in circles]
    filled = [fill(circle(*c), rectangle(-0.5, -0.4, -0.5, -0.4)).inside[:, :, 1] for c in circles]
    erased = np.zeros(SHAPE[:2], dtype=bool)
    for one, other in combinations([f for f in filled if f.any()], 2):
        common = one & other
        is_nested = common.sum() == min(one.sum(), other.sum()) and one.sum() != other.sum()
        if not is_nested:
            erased |= common
    together = fill(*(circle(*c) for c in circles), rectangle(-0.5, -0.4, -0.5, -0.4))
    even = np.sum(filled, axis=0) % 2 == 0
    assert overlap_voxels(together) == (erased & even).sum()


# --- gaps

TALL = (40, 40, 40)


def ball(centre, radius, slices):
    """Return circles of a ball where planes cut it."""
    x, y, z = centre
    return [
        circle(x, y, (radius**2 - (k - z) ** 2) ** 0.5, k) for k in slices if abs(k - z) < radius
    ]


def pieces(filled):
    return label(filled.inside, np.ones((3, 3, 3)))[1]


def slices_of(filled):
    return np.flatnonzero(filled.inside.any(axis=(0, 1))).tolist()


@pytest.mark.parametrize("apart", [2, 3, 5 / 3.27, 3.75 / 3.27])
@pytest.mark.parametrize("first", [0.0, 0.37])
def test_contours_regularly_wider_apart_than_slices_give_one_whole_lesion(apart, first):
    """5.7 of 11.8 ml, in five pieces instead of one, and nothing said."""
    planes = first + apart * np.arange(30)
    filled = fill(*ball((20, 19, 17.3), 11, planes), shape=TALL)
    volume = 4 / 3 * np.pi * 11**3
    assert filled.inside.sum() == pytest.approx(volume, rel=0.1)
    assert pieces(filled) == 1
    (text,) = said(filled, "regularly")
    assert text.startswith(f"contours lie regularly {apart:.3g} mm apart, the slices 1 mm: ")
    assert not said(filled, "irregularly")


@pytest.mark.parametrize("apart", [1.2, 1.5, 2, 2.5, 3, 4])
def test_each_contour_takes_as_many_slices_as_contours_lie_apart(apart):
    """The law of a stack of slabs: its volume is area times spacing, whatever their phase."""
    for first in (10, 10.3, 10.5, 10.77):
        planes = first + apart * np.arange(5)
        filled = fill(*(rectangle(4.5, 9.5, 4.5, 9.5, k) for k in planes), shape=TALL)
        drawn = slices_of(filled)
        assert len(drawn) in (np.floor(5 * apart), np.ceil(5 * apart))
        assert drawn == list(range(drawn[0], drawn[-1] + 1))
        nearest = np.abs(np.subtract.outer(drawn, planes)).min(axis=1)
        assert nearest.max() <= apart / 2 + 1e-9


def test_an_irregular_gap_stays_and_is_told():
    tumour = [rectangle(4.5, 9.5, 4.5, 9.5, k) for k in (10, 11, 12, 14, 15)]
    filled = fill(*tumour, shape=TALL)
    assert slices_of(filled) == [10, 11, 12, 14, 15]
    assert filled.warnings == (
        "1 slice(s) between contours have none, irregularly, a gap of 0.025 ml: left as drawn",
    )
    # Every second, and one of these is missing.
    filled = fill(*(rectangle(4.5, 9.5, 4.5, 9.5, k) for k in (10, 12, 14, 18, 20)), shape=TALL)
    assert slices_of(filled) == [10, 11, 12, 13, 14, 15, 18, 19, 20, 21]
    assert said(filled, "2 slice(s) between contours have none, irregularly")


def test_two_lesions_of_one_region_are_not_joined():
    for planes in ((7, 8, 9, 14, 15), (7, 14), (7, 9, 11, 15, 17, 19), (5, 16, 27)):
        filled = fill(*(rectangle(4.5, 9.5, 4.5, 9.5, k) for k in planes), shape=TALL)
        assert pieces(filled) == (3 if planes == (5, 16, 27) else 2)


def test_lesions_drawn_on_alternate_slices_are_told_apart():
    """Together they are on every slice: each falls to pieces."""
    one = [rectangle(4.5, 9.5, 4.5, 9.5, k) for k in (10, 12, 14, 16)]
    other = [rectangle(20.5, 25.5, 4.5, 9.5, k) for k in (11, 13, 15, 17)]
    dense = [rectangle(4.5, 9.5, 20.5, 25.5, k) for k in (10, 11, 12, 14)]
    filled = fill(*one, *other, shape=TALL)
    assert pieces(filled) == 2
    assert filled.inside.sum() == 2 * 8 * 25
    assert pieces(fill(*one, *other, *dense, shape=TALL)) == 4


def test_small_lesions_are_filled_as_the_others_of_their_region_are():
    large = [rectangle(4.5, 9.5, 4.5, 9.5, k) for k in (10, 12, 14, 16)]
    small = [rectangle(20.5, 22.5, 4.5, 6.5, k) for k in (12, 14)]
    assert slices_of(fill(*small, shape=TALL)) == [12, 14]
    filled = fill(*large, *small, shape=TALL)
    assert np.flatnonzero(filled.inside[21, 5]).tolist() == [12, 13, 14, 15]


def test_lesions_that_branch_or_end_beside_others_have_no_gap():
    trunk = [rectangle(4.5, 20.5, 4.5, 9.5, k) for k in (10, 11)]
    branches = [rectangle(x, x + 3, 4.5, 9.5, k) for x in (5.5, 15.5) for k in (12, 13)]
    roof = [rectangle(4.5, 20.5, 4.5, 9.5, 14)]
    assert fill(*trunk, *branches, *roof, shape=TALL).warnings == ()
    # What ends below an overhang is no gap: the overhang goes on beside it.
    foot = [rectangle(14.5, 18.5, 4.5, 9.5, 9), rectangle(4.5, 9.5, 4.5, 9.5, 9)]
    waist = [rectangle(4.5, 9.5, 4.5, 9.5, 10)]
    assert fill(*foot, *waist, *(trunk[1:]), shape=TALL).warnings == ()


def test_the_direction_of_slices_does_not_matter_to_gaps():
    planes = [10, 12, 14, 16, 25]
    up = fill(*(rectangle(4.5, 9.5, 4.5, 9.5, k) for k in planes), shape=TALL)
    flip = np.diag([1, 1, -1, 1.0])
    flip[2, 3] = TALL[2] - 1
    down = fill(*(rectangle(4.5, 9.5, 4.5, 9.5, k) for k in planes), shape=TALL, affine=flip)
    assert up.inside.sum() == down.inside.sum()
    assert up.warnings == down.warnings
