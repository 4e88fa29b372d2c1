"""Where the frames of a SEG lie: absent planes, spacings that are wrong or missing, tilts."""

import copy

import numpy as np
import pytest
from mask_builders import assert_mask_is, axial_affine, build_seg, oblique_affine, spheres
from said import texts

from common.dicom.seg import read_seg
from common.errors import StudyError
from common.geometry import Grid

AXIAL = axial_affine((2.0, 2.5, 3.0))
TWO = spheres((11, 9, 6), ((3, 4, 2), 1.7), ((8, 5, 3), 2.1))


def test_absent_planes_are_empty_slices():
    lesions = spheres((8, 8, 30), ((3, 3, 3), 1.5), ((4, 4, 9), 1.2), ((5, 5, 24), 2.2))
    lesions = lesions.any(axis=-1).astype(np.uint8)
    seg = build_seg(lesions, AXIAL, ["lesion"])
    assert seg.NumberOfFrames < 12
    mask = read_seg(seg)
    assert mask.labels.shape == (8, 8, 25)
    assert_mask_is(mask, lesions, AXIAL)


def test_one_plane_takes_its_declared_spacing():
    seg = build_seg(TWO[:, :, 2:3, :1], AXIAL, ["lesion"])
    mask = read_seg(seg)
    assert_mask_is(mask, TWO[:, :, 2:3, 0], AXIAL)
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    del measures.SpacingBetweenSlices
    measures.SliceThickness = 4
    assert read_seg(seg).affine[2, 2] == pytest.approx(4)
    del measures.SliceThickness
    with pytest.raises(StudyError, match=r"neither SpacingBetweenSlices \(0018,0088\) nor"):
        read_seg(seg)


def measures_of(seg):
    return seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def test_the_planes_tell_the_spacing_where_the_header_does_not():
    dense = np.ones((4, 4, 5), dtype=np.uint8)
    seg = build_seg(dense, AXIAL, ["a"])
    del measures_of(seg).SpacingBetweenSlices
    mask = read_seg(seg)
    assert_mask_is(mask, dense, AXIAL)
    assert texts(mask.warnings) == [
        "SpacingBetweenSlices (0018,0088) is absent: spacing of 3.000 mm from SliceThickness "
        "(0018,0050)"
    ]
    del measures_of(seg).SliceThickness
    mask = read_seg(seg)
    assert_mask_is(mask, dense, AXIAL)
    assert "absent: spacing of 3.000 mm from the planes" in mask.warnings[0].text
    measures_of(seg).SpacingBetweenSlices = 2
    mask = read_seg(seg)
    assert_mask_is(mask, dense, AXIAL)
    assert "is wrong, 2.000 mm: the planes lie on a grid of 3.000 mm" in mask.warnings[0].text
    measures_of(seg).SpacingBetweenSlices = -3
    assert read_seg(seg).warnings == ()
    measures_of(seg).SpacingBetweenSlices = 1.5
    mask = read_seg(seg)
    assert mask.labels.shape == (4, 4, 9)
    assert "no two planes are neighbours" in mask.warnings[0].text


def moved_frame(seg, index, shift_mm):
    position = seg.PerFrameFunctionalGroupsSequence[index].PlanePositionSequence[0]
    moved = np.array(position.ImagePositionPatient, dtype=float) + shift_mm
    position.ImagePositionPatient = [f"{value:.4f}" for value in moved]


@pytest.mark.parametrize(
    ("shift_mm", "accepted"),
    [((0, 0, 0.25), True), ((0, 0, 0.8), False), ((0.2, 0, 0), True), ((0.9, 0, 0), False)],
)
def test_planes_may_be_off_by_a_tenth_of_the_spacing(shift_mm, accepted):
    dense = np.ones((4, 4, 8), dtype=np.uint8)
    seg = build_seg(dense, AXIAL, ["a"])
    moved_frame(seg, 3, shift_mm)
    if accepted:
        assert_mask_is(read_seg(seg), dense, AXIAL)
    else:
        with pytest.raises(StudyError, match=r"ImagePositionPatient \(0020,0032\)"):
            read_seg(seg)


def test_gantry_tilt_stays_in_the_affine():
    dense = np.ones((4, 4, 8), dtype=np.uint8)
    seg = build_seg(dense, AXIAL, ["a"])
    for index, group in enumerate(seg.PerFrameFunctionalGroupsSequence):
        height_mm = group.PlanePositionSequence[0].ImagePositionPatient[2] - AXIAL[2, 3]
        moved_frame(seg, index, (0, 0.7 / 3.0 * height_mm, 0))
    tilted = AXIAL.copy()
    tilted[1, 2] -= 0.7
    assert_mask_is(read_seg(seg), dense, tilted)


# --- planes and slices of images


def without_spacing(seg, **measures):
    (item,) = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    del item.SpacingBetweenSlices, item.SliceThickness
    for keyword, value in measures.items():
        setattr(item, keyword, value)
    return seg


@pytest.mark.parametrize("measures", [{}, {"SpacingBetweenSlices": 12}, {"SliceThickness": 3}])
@pytest.mark.parametrize("affine", [AXIAL, oblique_affine((1.9, 2.3, 3.0))])
@pytest.mark.parametrize("finer", [1, 2])
def test_planes_on_slices_of_an_image_are_as_far_apart_as_these(affine, measures, finer):
    """Two nodes of one plane were one lesion as thick as the gap between them."""
    nodes = spheres((8, 8, 30), ((3, 3, 5), 0.9), ((5, 4, 9), 0.9)).any(axis=-1).astype(np.uint8)
    pixels = affine.copy()
    pixels[:3, :2] /= finer
    seg = without_spacing(build_seg(nodes, pixels, ["node"]), **measures)
    image = Grid((8, 8, 30), affine)
    turned = affine @ np.diag([-1, 1, -1, 1.0])
    turned[:3, 3] = affine[:3, 3] + affine[:3, 0] * 7 + affine[:3, 2] * 29
    far = affine.copy()
    far[:3, 3] += 1000
    for grid in (image, Grid((8, 8, 30), turned)):
        mask = read_seg(seg, images=[Grid((8, 8, 30), far), grid])
        assert_mask_is(mask, nodes, pixels)
        assert mask.labels.shape[2] == 5
        if finer == 1:
            assert bool(mask.warnings) == ("SpacingBetweenSlices" in measures)


def test_a_spacing_that_is_seen_twice_rules_beside_an_image_of_other_pixels():
    dense = np.ones((4, 4, 5), dtype=np.uint8)
    seg = without_spacing(build_seg(dense, AXIAL, ["a"]), SpacingBetweenSlices=3)
    fine = AXIAL @ np.diag([0.5, 0.5, 0.5, 1])
    assert_mask_is(read_seg(seg, images=[Grid((16, 16, 40), fine)]), dense, AXIAL)


@pytest.mark.parametrize("thickness_mm", [3, None])
def test_planes_of_a_coarser_reconstruction_are_as_thick_as_they_say(thickness_mm):
    """On every second slice of the CT at hand, a lesion would have fallen into slices."""
    dense = np.ones((4, 4, 5), dtype=np.uint8)
    measures = {"SpacingBetweenSlices": 3} | (
        {"SliceThickness": thickness_mm} if thickness_mm else {}
    )
    seg = without_spacing(build_seg(dense, AXIAL, ["a"]), **measures)
    finer = Grid((4, 4, 20), AXIAL @ np.diag([1, 1, 0.5, 1]))
    assert_mask_is(read_seg(seg, images=[finer]), dense, AXIAL)
    # Three nodes evenly apart, whose gap was declared, are no such planes.
    nodes = np.zeros((4, 4, 20), dtype=np.uint8)
    nodes[1, 2, [3, 9, 15]] = 1
    seg = without_spacing(
        build_seg(nodes, finer.affine, ["a"]), SpacingBetweenSlices=9, SliceThickness=1.5
    )
    for pixels in (1, 2):
        image = Grid(
            (4 * pixels, 4 * pixels, 20), finer.affine @ np.diag([1 / pixels, 1 / pixels, 1, 1])
        )
        assert_mask_is(read_seg(seg, images=[image]), nodes, finer.affine)


@pytest.mark.parametrize("thickness", [{}, {"SliceThickness": 12}])
def test_evenly_spaced_nodes_of_the_image_itself_are_no_coarser_reconstruction(thickness):
    """Five nodes of one plane were one lesion of four times their volume: the gap was declared."""
    nodes = np.zeros((4, 4, 20), dtype=np.uint8)
    nodes[1, 2, [1, 5, 9, 13, 17]] = 1
    seg = without_spacing(build_seg(nodes, AXIAL, ["a"]), SpacingBetweenSlices=12, **thickness)
    mask = read_seg(seg, images=[Grid((4, 4, 20), AXIAL)], is_of_images=True)
    assert_mask_is(mask, nodes, AXIAL)
    assert "wrong, 12.000 mm: the planes lie on a grid of 3.000 mm" in mask.warnings[0].text


def test_planes_far_apart_that_the_declared_spacing_alone_makes_neighbours_are_warned_of():
    nodes = np.zeros((4, 4, 2), dtype=np.uint8)
    nodes[1, 2] = 1
    seg = without_spacing(build_seg(nodes, AXIAL, ["a"]), SpacingBetweenSlices=3)
    for slice_mm, is_warned in ((1.9, True), (2.1, False)):
        image = Grid((4, 4, 30), moved_by(AXIAL, 0.3) @ np.diag([1, 1, slice_mm / 3, 1]))
        warnings = read_seg(seg, images=[image]).warnings
        assert ["3.000 mm apart and taken as neighbours" in w.text for w in warnings] == (
            [True] * is_warned
        )


def moved_by(affine, z_mm):
    there = affine.copy()
    there[2, 3] += z_mm
    return there


def test_the_gap_between_lesions_is_never_the_thickness_of_a_plane():
    nodes = np.zeros((6, 6, 12), dtype=np.uint8)
    nodes[2, 2, 2], nodes[3, 3, 8] = 1, 1
    seg = without_spacing(build_seg(nodes, AXIAL, ["a"]), SliceThickness=3)
    assert_mask_is(read_seg(seg), nodes, AXIAL)
    with pytest.raises(StudyError, match="nothing tells the spacing of the SEG's 2 plane"):
        read_seg(without_spacing(build_seg(nodes, AXIAL, ["a"])))


def test_mixed_orientations_are_refused():
    seg = build_seg(TWO, AXIAL, ["a", "b"])
    orientation = copy.deepcopy(seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence)
    orientation[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    seg.PerFrameFunctionalGroupsSequence[2].PlaneOrientationSequence = orientation
    with pytest.raises(StudyError, match=r"differ in ImageOrientationPatient \(0020,0037\)"):
        read_seg(seg)
