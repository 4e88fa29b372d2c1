"""RTSTRUCT and SEG against the arrays put in, and against IBSI's rasterisation of real ones."""

import contextlib
import copy
import io
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import layouts
import nibabel
import numpy as np
import pydicom
import pytest
from dicom_builders import compress, write_bare_file
from mask_builders import (
    FRAME_UID,
    IMAGE_UID,
    LPS_TO_RAS,
    SERIES_UID,
    assert_mask_is,
    axial_affine,
    build_rtstruct,
    build_seg,
    oblique_affine,
    reorder_frames,
    spheres,
    written,
)
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import HTJ2KLossless, JPEG2000Lossless, RLELossless
from said import texts

from common.dicom.masks import (
    contoured_images,
    listed,
    referenced_images,
    referenced_series,
    region_frames,
    series_of_frames,
)
from common.dicom.rtstruct import read_rtstruct
from common.dicom.seg import DEFLATED_FRAMES, read_seg
from common.errors import StudyError
from common.geometry import Grid, Image
from common.masks import completed, embedded

DATA = Path(__file__).parents[3] / "shared" / "data"
SHAPE = (11, 9, 6)
AXIAL = axial_affine((2.0, 2.5, 3.0))


UNITED_1_2 = (
    "segments 1, 2 united (2 segments, each its own label): choose with --roi if not all of them "
    "are tumours"
)
TWO = spheres(SHAPE, ((3, 4, 2), 1.7), ((8, 5, 3), 2.1))
OVERLAPPING = spheres(SHAPE, ((4, 4, 2), 2.6), ((6, 4, 3), 2.6), ((9, 7, 2), 1.5))


def lowest_label(segments):
    numbers = np.arange(1, segments.shape[-1] + 1)
    return np.where(segments > 0, numbers, 99).min(axis=-1) * (segments > 0).any(axis=-1)


# --- SEG


def test_a_structure_set_that_ends_before_its_contours_is_refused():
    dataset = build_rtstruct({"A": []})
    del dataset.ROIContourSequence
    with pytest.raises(StudyError, match=r"ROIContourSequence \(3006,0039\) is missing"):
        read_rtstruct(dataset, SHAPE, AXIAL)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("affine", [AXIAL, oblique_affine((1.9, 2.3, 4.1))])
def test_segments_come_back_as_their_numbers_on_their_own_grid(kind, sparse, affine):
    seg = build_seg(TWO, affine, ["liver", "lesion"], kind, omit_empty_frames=sparse)
    mask = read_seg(seg)
    assert_mask_is(mask, lowest_label(TWO), affine)
    assert (mask.labels.dtype, mask.affine.dtype) == (np.uint8, np.float64)
    assert mask.labels.shape[2] == (5 if sparse else 6)
    assert texts(mask.warnings) == [UNITED_1_2]
    assert mask.regions == ("liver", "lesion")


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_the_order_of_frames_does_not_matter(kind):
    seg = build_seg(TWO, AXIAL, ["a", "b"], kind)
    order = np.random.default_rng(1).permutation(int(seg.NumberOfFrames))
    mask = read_seg(reorder_frames(seg, order))
    np.testing.assert_array_equal(mask.labels, read_seg(seg).labels)
    assert_mask_is(mask, lowest_label(TWO), AXIAL)


@pytest.mark.parametrize("flip", [(0,), (1,), (2,), (0, 1, 2)])
def test_slices_ascend_along_the_normal_whatever_the_axes(flip):
    """A flip of one axis of the phantom makes its affine left-handed, which no frame can be."""
    turn = np.eye(4)
    for axis in flip:
        turn[axis, axis], turn[axis, 3] = -1, SHAPE[axis] - 1
    mask = read_seg(
        build_seg(np.flip(TWO, flip), AXIAL @ turn, ["a", "b"], omit_empty_frames=False)
    )
    lps = (LPS_TO_RAS @ mask.affine)[:3, :3]
    assert np.dot(np.cross(lps[:, 0], lps[:, 1]), lps[:, 2]) > 0
    to_phantom = np.linalg.inv(AXIAL) @ mask.affine
    drawn = np.argwhere(mask.labels)
    moved = np.rint(drawn @ to_phantom[:3, :3].T + to_phantom[:3, 3]).astype(int)
    assert len(drawn) == np.count_nonzero(lowest_label(TWO))
    np.testing.assert_array_equal(mask.labels[tuple(drawn.T)], lowest_label(TWO)[tuple(moved.T)])


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_the_lowest_number_wins_where_segments_overlap(kind):
    seg = build_seg(OVERLAPPING, AXIAL, ["a", "b", "c"], kind)
    n_overlapping = int((OVERLAPPING.sum(axis=-1) > 1).sum())
    warning = f"segments overlap in {n_overlapping} voxels: they keep the lowest segment number"
    n_frames = int(seg.NumberOfFrames)
    for order in (range(n_frames), range(n_frames - 1, -1, -1)):
        mask = read_seg(reorder_frames(copy.deepcopy(seg), list(order)))
        assert_mask_is(mask, lowest_label(OVERLAPPING), AXIAL)
        united, overlap = texts(mask.warnings)
        assert united.startswith("segments 1-3 united (3 segments")
        assert overlap == warning


def test_fractions_count_from_one_half():
    fractions = np.linspace(0, 1, np.prod(SHAPE)).reshape(SHAPE)
    for maximum in (255, 100, 1):
        seg = build_seg(
            fractions[..., np.newaxis], AXIAL, ["a"], "FRACTIONAL", max_fractional_value=maximum
        )
        stored = np.around(fractions * maximum)
        assert_mask_is(read_seg(seg), stored >= maximum / 2, AXIAL)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
@pytest.mark.parametrize("implicit", [True, False])
def test_a_seg_without_transfer_syntax_is_read(tmp_path, kind, implicit):
    seg = build_seg((np.indices(SHAPE).sum(0) % 3 == 0).astype(np.uint8), AXIAL, ["a"], kind=kind)
    expected = read_seg(seg)
    write_bare_file(tmp_path / "seg", seg, implicit=implicit)
    mask = read_seg(str(tmp_path / "seg"))
    np.testing.assert_array_equal(mask.labels, expected.labels)


def test_segments_are_chosen_by_label():
    seg = build_seg(OVERLAPPING, AXIAL, ["Liver", "Lesion 1", "LESION 2"])
    mask = read_seg(seg, re.compile("lesion"))
    assert_mask_is(mask, lowest_label(OVERLAPPING * [0, 1, 1]), AXIAL)
    assert mask.warnings == ()
    assert set(np.unique(read_seg(seg, re.compile("^lesion.2$")).labels)) == {0, 3}
    with pytest.raises(StudyError) as refused:
        read_seg(seg, re.compile("tumour"))
    assert str(refused.value) == (
        "none of 3 names matches (SegmentLabel (0062,0005)): give a --roi that does"
    )


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_segmentations(syntax):
    large = TWO.repeat(8, axis=0).repeat(8, axis=1)
    seg = build_seg(large, AXIAL, ["a", "b"], "FRACTIONAL")
    compress(seg, syntax)
    assert_mask_is(read_seg(written(seg)), lowest_label(large), AXIAL)


def test_label_maps_beyond_255_and_labels_without_description():
    labels = np.zeros(SHAPE, dtype=np.uint16)
    labels[2:4, 2:4, 1], labels[5:7, 2:4, 4] = 7, 300
    seg = build_seg(labels, AXIAL, [f"segment {n}" for n in range(1, 301)], "LABELMAP")
    mask = read_seg(seg)
    assert mask.labels.dtype == np.uint16
    assert_mask_is(mask, labels, AXIAL)
    assert_mask_is(read_seg(seg, re.compile("segment 7$")), labels * (labels == 7), AXIAL)
    seg.SegmentSequence = seg.SegmentSequence[:299]
    with pytest.raises(StudyError, match="labels that no segment describes"):
        read_seg(seg)


def test_small_violations_of_the_standard_are_read_all_the_same(tmp_path):
    lesion = TWO[..., :1]
    seg = build_seg(lesion, AXIAL, ["a"])
    shared, groups = seg.SharedFunctionalGroupsSequence[0], seg.PerFrameFunctionalGroupsSequence
    for group in groups:  # one segment, told nowhere; shared geometry repeated in each frame
        if "SegmentIdentificationSequence" in group:
            del group.SegmentIdentificationSequence
        group.PlaneOrientationSequence = shared.PlaneOrientationSequence
        group.PixelMeasuresSequence = shared.PixelMeasuresSequence
    for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
        delattr(shared, keyword)
    if "SegmentIdentificationSequence" in shared:
        del shared.SegmentIdentificationSequence
    for keyword in (
        "SegmentationType",
        "DimensionIndexSequence",
        "ReferencedSeriesSequence",
        "ContentLabel",
        "DimensionOrganizationSequence",
    ):
        if keyword in seg:
            delattr(seg, keyword)
    pydicom.dcmwrite(tmp_path / "seg.dcm", seg)
    assert_mask_is(read_seg(tmp_path / "seg.dcm"), lesion[..., 0], AXIAL)


def test_a_segmentation_by_dcmqi():
    """The sample in pydicom's own tests keeps 1 frame of 3 but describes all of them."""
    seg = pydicom.dcmread(get_testdata_file("liver_1frame.dcm", download=False))
    seg.PerFrameFunctionalGroupsSequence = seg.PerFrameFunctionalGroupsSequence[:1]
    mask = read_seg(seg)
    frame = seg.PerFrameFunctionalGroupsSequence[0]
    (number,) = np.unique(mask.labels[mask.labels > 0])
    assert number == frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    np.testing.assert_array_equal(mask.labels[:, :, 0].T > 0, seg.pixel_array)
    np.testing.assert_allclose(
        (LPS_TO_RAS @ mask.affine)[:3, 3], frame.PlanePositionSequence[0].ImagePositionPatient
    )
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    spacing = [*measures.PixelSpacing[::-1], measures.SpacingBetweenSlices]
    np.testing.assert_allclose(np.linalg.norm(mask.affine[:3, :3], axis=0), spacing)


def remove(keyword):
    return lambda seg: delattr(seg, keyword)


def put(keyword, value):
    return lambda seg: setattr(seg, keyword, value)


def of_shared(keyword, change):
    return lambda seg: change(getattr(seg.SharedFunctionalGroupsSequence[0], keyword)[0])


def of_frame(keyword, change):
    return lambda seg: change(getattr(seg.PerFrameFunctionalGroupsSequence[1], keyword)[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("SegmentSequence"), "SegmentSequence (0062,0002) is absent"),
        (lambda s: s.SegmentSequence.append(s.SegmentSequence[0]), "uses a number twice"),
        (remove("PerFrameFunctionalGroupsSequence"), "describes 1"),
        (remove("SharedFunctionalGroupsSequence"), "without PixelMeasuresSequence (0028,9110)"),
        (lambda s: s.PerFrameFunctionalGroupsSequence.pop(), "frames (NumberOfFrames"),
        (lambda s: delattr(s.PerFrameFunctionalGroupsSequence[1], "PlanePositionSequence"),
         "without PlanePositionSequence (0020,9113)"),
        (of_frame("PlanePositionSequence", put("ImagePositionPatient", [1, 2])),
         "ImagePositionPatient (0020,0032) is not 3 plausible"),
        (of_frame("PlanePositionSequence", put("ImagePositionPatient", [0, 0, 1e9])),
         "ImagePositionPatient (0020,0032) is not 3 plausible"),
        (of_frame("PlanePositionSequence", put("ImagePositionPatient", [0, 0, 1e4])),
         "ImagePositionPatient (0020,0032) is not 3 plausible"),
        (lambda s: (setattr(s, "Rows", 65535), setattr(s, "Columns", 65535)),
         "the SEG spans (65535, 65535, 5) voxels"),
        (of_frame("SegmentIdentificationSequence", put("ReferencedSegmentNumber", 9)),
         "ReferencedSegmentNumber (0062,000B)"),
        (of_shared("PixelMeasuresSequence", put("PixelSpacing", [0, 0])), "PixelSpacing"),
        (of_shared("PixelMeasuresSequence", put("PixelSpacing", None)),
         "a value is missing in the SEG (PixelSpacing (0028,0030))"),
        (put("PixelData", b""), "the SEG has no PixelData (7FE0,0010)"),
        (of_shared("PlaneOrientationSequence", put("ImageOrientationPatient", [1, 0, 0, 1, 0, 0])),
         "not perpendicular"),
        (put("SegmentationType", "OTHER"), "SegmentationType (0062,0001) is none of"),
        (remove("MaximumFractionalValue"), "MaximumFractionalValue (0062,000E)"),
        (remove("Rows"), "Rows (0028,0010)"),
        (remove("PixelData"), "the SEG has no PixelData (7FE0,0010)"),
        (lambda s: setattr(s, "PixelData", s.PixelData[:20]),
         "PixelData (7FE0,0010) has 20 bytes, but rows x columns x frames are 792"),
        (lambda s: setattr(s, "PixelData", s.PixelData + bytes(2)),
         "PixelData (7FE0,0010) has 794 bytes"),
        (lambda s: setattr(s.SegmentSequence[0], "SegmentNumber", 0),
         "a segment has the number 0 (SegmentNumber (0062,0004)), but segments count from 1"),
        (put("NumberOfFrames", 10**6), "1000000 frames"),
    ],
)  # fmt: skip
def test_damaged_segmentations_are_refused(damage, message):
    seg = build_seg(TWO, AXIAL, ["a", "b"], "FRACTIONAL")
    damage(seg)
    with pytest.raises(StudyError) as refused:
        read_seg(seg)
    assert message in str(refused.value)


def as_deflated_frames(seg):
    """Return a SEG as a file whose frames are deflated one by one, which pydicom can't write."""
    pixels = seg.pixel_array.reshape(-1, seg.Rows * seg.Columns)
    frames = []
    for frame in np.packbits(pixels, axis=1, bitorder="little"):
        deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        frames.append(deflate.compress(frame.tobytes()) + deflate.flush())
    seg.PixelData = encapsulate([frame + bytes(len(frame) % 2) for frame in frames])
    seg["PixelData"].VR = "OB"
    seg["PixelData"].is_undefined_length = True
    seg.file_meta.TransferSyntaxUID = DEFLATED_FRAMES
    return seg


def test_deflated_frames_are_read():
    seg = as_deflated_frames(build_seg(TWO, AXIAL, ["a", "b"]))
    assert_mask_is(read_seg(seg), lowest_label(TWO), AXIAL)


def test_a_deflated_frame_that_is_no_plane_is_refused():
    seg = build_seg(TWO, AXIAL, ["a", "b"])
    rows = seg.Rows
    seg = as_deflated_frames(seg)
    for wrong in (rows + 1, rows - 1):
        seg.Rows = wrong
        with pytest.raises(StudyError, match="not as many bytes as rows x columns"):
            read_seg(seg)


def test_frames_padded_to_whole_bytes_are_refused():
    """Read as if packed, each frame slipped by some bits: 374 wrong voxels, nothing said."""
    seg = build_seg(TWO, AXIAL, ["a", "b"])
    pixels = seg.pixel_array.reshape(-1, seg.Rows * seg.Columns)
    assert pixels.shape[1] % 8
    seg.PixelData = np.packbits(pixels, axis=1, bitorder="little").tobytes()
    with pytest.raises(StudyError, match=r"PixelData \(7FE0,0010\) has \d+ bytes, but rows x"):
        read_seg(seg)


def test_a_compression_that_can_not_be_decoded_is_named():
    seg = build_seg(TWO, AXIAL, ["a", "b"])
    seg.PixelData = encapsulate([bytes(8)] * int(seg.NumberOfFrames))
    seg["PixelData"].VR = "OB"
    seg.file_meta.TransferSyntaxUID = HTJ2KLossless
    with pytest.raises(StudyError) as refused:
        read_seg(seg)
    assert "High-Throughput JPEG 2000" in str(refused.value)
    assert "1.2.840.10008.1.2.4.201" in str(refused.value)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_altered_structure_sets_end_in_a_mask_or_a_refusal():
    file = io.BytesIO()
    pydicom.dcmwrite(file, build_rtstruct({"a": [square(0.5, 4.5, 0.5, 4.5, 1)]}))
    random = np.random.default_rng(6)
    for _ in range(150):
        damaged = bytearray(file.getvalue())
        for position in random.integers(600, len(damaged), size=5):
            damaged[position] = random.integers(256)
        with contextlib.suppress(StudyError):
            rtstruct = pydicom.dcmread(io.BytesIO(damaged))
            assert read_rtstruct(rtstruct, SHAPE, AXIAL).labels.shape == SHAPE


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_files_cut_short_or_altered_end_in_a_mask_or_a_refusal(tmp_path):
    path = tmp_path / "seg.dcm"
    pydicom.dcmwrite(path, build_seg(TWO, AXIAL, ["a", "b"]))
    whole = path.read_bytes()
    random = np.random.default_rng(5)
    for _ in range(150):
        damaged = bytearray(
            whole[: random.integers(len(whole))] if random.random() < 0.3 else whole
        )
        for position in random.integers(len(damaged), size=5) if len(damaged) else ():
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(StudyError):
            assert read_seg(path).labels.ndim == 3
    with pytest.raises(StudyError, match="cannot read the SEG"):
        read_seg(tmp_path / "absent.dcm")


# --- RTSTRUCT


def square(x0, x1, y0, y1, k, affine=AXIAL):
    corners = np.array([(x0, y0, k), (x1, y0, k), (x1, y1, k), (x0, y1, k)], dtype=float)
    return corners @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("affine", [AXIAL, oblique_affine((1.9, 2.3, 4.1))])
def test_regions_are_united_and_chosen_by_name(affine):
    regions = {
        "GTV 1": [square(0.5, 4.5, 0.5, 4.5, 1, affine), square(1.5, 3.5, 1.5, 3.5, 1, affine)],
        "gtv 2": [square(1.5, 7.5, 0.5, 3.5, 1, affine), square(1.5, 7.5, 0.5, 3.5, 2, affine)],
        "Lung": [square(0.5, 8.5, 5.5, 7.5, 4, affine)],
    }
    first, second, lung = np.zeros((3, *SHAPE), dtype=np.uint8)
    first[1:5, 1:5, 1], first[2:4, 2:4, 1] = 1, 0
    second[2:8, 1:4, 1:3] = 1
    lung[1:9, 6:8, 4] = 1
    rtstruct = build_rtstruct(regions)
    mask = read_rtstruct(rtstruct, SHAPE, affine)
    np.testing.assert_array_equal(mask.labels, first | second | lung)
    np.testing.assert_array_equal(mask.affine, affine)
    assert mask.labels.dtype == np.uint8
    assert texts(mask.warnings) == [
        "regions 1-3 united (3 regions): choose with --roi if not all of them are tumours"
    ]
    assert mask.regions == ("GTV 1", "gtv 2", "Lung")
    mask = read_rtstruct(rtstruct, SHAPE, affine, re.compile("gtv"))
    np.testing.assert_array_equal(mask.labels, first | second)
    assert (mask.warnings, mask.regions) == ((), ("GTV 1", "gtv 2"))
    mask = read_rtstruct(rtstruct, SHAPE, affine, re.compile("^GTV.2"))
    np.testing.assert_array_equal(mask.labels, second)
    with pytest.raises(StudyError) as refused:
        read_rtstruct(rtstruct, SHAPE, affine, re.compile("PTV"))
    assert str(refused.value) == (
        "none of 3 names matches (ROIName (3006,0026)): give a --roi that does"
    )


def test_accents_in_names_may_be_spelled_differently():
    regions = {"L\u00e4sion": [square(0.5, 4.5, 0.5, 4.5, 1)], "Lung": []}
    rtstruct = build_rtstruct(regions)
    rtstruct.StructureSetROISequence[0].ROIName = "La\u0308sion"
    for spelling in ("l\u00e4sion", "La\u0308sion"):
        for dataset in (rtstruct, build_rtstruct(regions)):
            mask = read_rtstruct(dataset, SHAPE, AXIAL, re.compile(spelling))
            assert mask.labels.sum() == 16


def test_a_region_of_number_zero_is_no_background():
    # It was left out, or refused by a message that no name matches.
    rtstruct = build_rtstruct({"a": [square(0.5, 4.5, 0.5, 4.5, 1)]})
    rtstruct.StructureSetROISequence[0].ROINumber = 0
    rtstruct.ROIContourSequence[0].ReferencedROINumber = 0
    assert read_rtstruct(rtstruct, SHAPE, AXIAL).labels.sum() == 16


def test_what_a_region_leaves_out_is_told_by_its_number():
    rtstruct = build_rtstruct(
        {"a": [square(0.5, 4.5, 0.5, 4.5, 1)], "b": [square(0.5, 4.5, 0.5, 4.5, k) for k in (2, 3)],
         "c": []}
    )  # fmt: skip
    drawn = rtstruct.ROIContourSequence
    drawn[1].ContourSequence[0].ContourGeometricType = "OPEN_PLANAR"
    rtstruct.RTROIObservationsSequence[0].RTROIInterpretedType = "EXTERNAL"
    del rtstruct.ROIContourSequence[2].ContourSequence
    mask = read_rtstruct(rtstruct, SHAPE, AXIAL)
    assert mask.labels.sum(axis=(0, 1)).tolist() == [0, 0, 0, 16, 0, 0]
    assert tuple(texts(mask.warnings)) == (
        "the outline of the body is left out (RTROIInterpretedType (3006,00A4) EXTERNAL): region "
        "1; choose with --roi if it is a tumour",
        "region 2: 1 contour(s) are points or open lines: ignored",
        "region 3: no contours",
    )
    assert mask.regions == ("b",)
    chosen = read_rtstruct(rtstruct, SHAPE, AXIAL, re.compile("[ab]"))
    assert chosen.labels.sum(axis=(0, 1)).tolist() == [0, 16, 0, 16, 0, 0]
    assert texts(chosen.warnings)[0] == (
        "regions chosen by --roi are the outline of the body (RTROIInterpretedType (3006,00A4) "
        "EXTERNAL): 1"
    )
    for observation in rtstruct.RTROIObservationsSequence:
        observation.RTROIInterpretedType = "EXTERNAL"
    with pytest.raises(StudyError, match="all regions are outlines of the body"):
        read_rtstruct(rtstruct, SHAPE, AXIAL)


def test_regions_of_points_stand_beside_tumours_but_not_alone():
    rtstruct = build_rtstruct({"tumour": [square(0.5, 4.5, 0.5, 4.5, 1)], "isocentre": [[0, 0, 0]]})
    rtstruct.ROIContourSequence[1].ContourSequence[0].ContourGeometricType = "POINT"
    mask = read_rtstruct(rtstruct, SHAPE, AXIAL)
    assert mask.labels.sum() == 16
    assert texts(mask.warnings) == ["region 2: 1 contour(s) are points or open lines: ignored"]
    with pytest.raises(StudyError, match=r"only points or open lines \(ContourGeometricType"):
        read_rtstruct(rtstruct, SHAPE, AXIAL, re.compile("iso"))


def test_contours_that_exclude_each_other_by_their_type_may_overlap():
    squares = {"a": [square(0.5, 4.5, 0.5, 4.5, 1), square(2.5, 6.5, 2.5, 6.5, 1)]}
    (warning,) = texts(read_rtstruct(build_rtstruct(squares), SHAPE, AXIAL).warnings)
    assert warning.startswith("region 1: contours of one slice overlap in 0.06 ml")
    mask = read_rtstruct(build_rtstruct(squares, geometric_type="CLOSEDPLANAR_XOR"), SHAPE, AXIAL)
    assert mask.labels.sum() == 2 * (16 - 4)
    assert mask.warnings == ()


def test_a_contour_that_does_not_say_whether_it_is_closed_is_refused():
    rtstruct = build_rtstruct({"a": [square(0.5, 4.5, 0.5, 4.5, 1)]})
    del rtstruct.ROIContourSequence[0].ContourSequence[0].ContourGeometricType
    with pytest.raises(StudyError, match=r"ContourGeometricType \(3006,0042\) is absent"):
        read_rtstruct(rtstruct, SHAPE, AXIAL)


@pytest.mark.parametrize("kind", ["ORGAN", "AVOIDANCE", "SUPPORT", "PTV"])
def test_what_is_no_tumour_beside_others_is_told(kind):
    """A liver typed ORGAN: 1,659 ml for 96, and nothing said."""
    squares = [[square(0.5, 4.5, 0.5, 4.5, k)] for k in (1, 2, 3)]
    rtstruct = build_rtstruct(dict(zip("abc", squares, strict=True)))
    rtstruct.RTROIObservationsSequence[1].RTROIInterpretedType = kind
    united, told = texts(read_rtstruct(rtstruct, SHAPE, AXIAL).warnings)
    assert united.startswith("regions 1-3 united")
    assert told == (
        f"{kind} by RTROIInterpretedType (3006,00A4), united with other regions: region 2; choose "
        "with --roi if it is no tumour"
    )
    assert texts(read_rtstruct(rtstruct, SHAPE, AXIAL, re.compile("[ab]")).warnings) == [told]
    assert read_rtstruct(rtstruct, SHAPE, AXIAL, re.compile("b")).warnings == ()


@pytest.mark.parametrize(
    ("code", "category"),
    [
        ("123037004", "anatomical structure"),
        ("T-D000A", "anatomical structure"),
        ("85756007", None),  # tissue, as 3D Slicer calls what no one has named
        ("49755003", None),  # morphologically abnormal structure
    ],
)
def test_segments_that_are_no_tumour_beside_others_are_told(code, category):
    seg = build_seg(TWO, AXIAL, ["a", "b"])
    (item,) = seg.SegmentSequence[1].SegmentedPropertyCategoryCodeSequence
    item.CodeValue = code
    told = [each for each in texts(read_seg(seg).warnings) if "united with other" in each]
    assert told == [
        f"{category} by SegmentedPropertyCategoryCodeSequence (0062,0003), united with other "
        "segments: segment 2; choose with --roi if it is no tumour"
    ] * (category is not None)
    assert read_seg(seg, re.compile("b")).warnings == ()


def test_numbers_are_listed_in_short():
    assert listed([3, 1, 2, 7, 8, 10]) == "1-3, 7, 8, 10"
    assert listed([2, 1]) == "1, 2"
    assert listed([5]) == "5"


@pytest.mark.parametrize("options", [{}, {"use_pin_hole": True}, {"approximate_contours": False}])
def test_what_rt_utils_writes_is_read_as_it_reads_it_itself(tmp_path, options):
    rt_utils = pytest.importorskip("rt_utils")
    layouts.write_pet(tmp_path / "PET")
    for path in sorted((tmp_path / "PET").iterdir()):
        header = pydicom.dcmread(path)
        header.StudyID = header.PatientSex = header.PatientBirthDate = ""
        header.save_as(path)
    shape = (8, 8, layouts.N_SLICES)
    tumour = spheres(shape, ((3, 4, 2), 2.6), ((6, 2, 3), 0.5))
    tumour[3, 4, 1:4, 0] = 0
    drawn = tumour.any(axis=-1)
    # Its arrays are rows, columns, slices.
    structures = rt_utils.RTStructBuilder.create_new(str(tmp_path / "PET"))
    structures.add_roi(np.swapaxes(drawn, 0, 1), name="tumour", **options)
    structures.save(str(tmp_path / "RS.dcm"))
    again = rt_utils.RTStructBuilder.create_from(str(tmp_path / "PET"), str(tmp_path / "RS.dcm"))
    theirs = np.swapaxes(again.get_roi_mask_by_name("tumour"), 0, 1)
    mask = read_rtstruct(pydicom.dcmread(tmp_path / "RS.dcm"), *series_grid(tmp_path / "PET"))
    np.testing.assert_array_equal(mask.labels, theirs)
    if "use_pin_hole" not in options:
        np.testing.assert_array_equal(mask.labels, drawn)


def test_what_highdicom_reads_of_its_segmentation_is_read(tmp_path):
    import highdicom

    for kind in ("BINARY", "FRACTIONAL", "LABELMAP"):
        path = tmp_path / f"{kind}.dcm"
        build_seg(TWO, AXIAL, ["a", "b"], kind).save_as(path)
        volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
        # Theirs is slice, row, column, to DICOM's LPS.
        to_theirs = np.linalg.inv(LPS_TO_RAS @ volume.affine) @ read_seg(path).affine
        drawn = np.argwhere(read_seg(path).labels)
        there = np.rint(drawn @ to_theirs[:3, :3].T + to_theirs[:3, 3]).astype(int)
        theirs = np.asarray(volume.array)
        assert len(drawn) == np.count_nonzero(theirs)
        np.testing.assert_array_equal(read_seg(path).labels[tuple(drawn.T)], theirs[tuple(there.T)])


def dcmqi(command, *arguments):
    """Run a program of dcmqi; skip where it is not installed."""
    program = Path(sys.executable).with_name(command)
    if not program.exists():
        pytest.skip("dcmqi is not installed: pip install dcmqi")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


CODES = {
    "SegmentedPropertyCategoryCodeSequence": ("49755003", "Morphologically Abnormal Structure"),
    "SegmentedPropertyTypeCodeSequence": ("4147007", "Mass"),
}


def test_what_dcmqi_writes_is_read_as_it_reads_it_itself(tmp_path):
    """Nodes of one plane each, and a segment that overlaps one of them."""
    layouts.write_pet(tmp_path / "PET")
    nodes = np.zeros((8, 8, layouts.N_SLICES), np.uint8)
    nodes[2:4, 3, 1], nodes[6, 2:7, 4] = 1, 1
    other = np.zeros_like(nodes)
    other[5:8, 5:8, 3:5] = 1
    for name, labels in (("a", nodes), ("b", other)):
        layouts.write_nifti(tmp_path / f"{name}.nii.gz", labels)
    codes = {
        keyword: {"CodeValue": code, "CodingSchemeDesignator": "SCT", "CodeMeaning": meaning}
        for keyword, (code, meaning) in CODES.items()
    }
    segment = {"labelID": 1, "SegmentLabel": "a", "SegmentAlgorithmType": "MANUAL", **codes}
    meta = {"SeriesNumber": "300", "InstanceNumber": "1", "segmentAttributes": [[segment]] * 2}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    images = f"{tmp_path / 'a.nii.gz'},{tmp_path / 'b.nii.gz'}"
    dcmqi("itkimage2segimage", "--inputImageList", images, "--inputDICOMDirectory",
          tmp_path / "PET", "--inputMetadata", tmp_path / "meta.json", "--outputDICOM",
          tmp_path / "seg.dcm", "--skip")  # fmt: skip
    dcmqi("segimage2itkimage", "--inputDICOM", tmp_path / "seg.dcm", "--outputDirectory",
          tmp_path, "--outputType", "nii")  # fmt: skip
    for number, drawn in ((1, nodes), (2, other)):
        file = nibabel.load(tmp_path / f"{number}.nii.gz")
        theirs = completed(Image(np.asarray(file.dataobj), file.affine), LAYOUT_GRID)
        np.testing.assert_array_equal(theirs.data > 0, drawn)
    mask = read_seg(tmp_path / "seg.dcm", images=[LAYOUT_GRID], is_of_images=True)
    whole = embedded(Image(mask.labels, mask.affine), LAYOUT_GRID)
    np.testing.assert_array_equal(whole.data, np.where(nodes, 1, 2 * other))
    assert len(mask.warnings) == 2  # united, and overlapping


LAYOUT_GRID = Grid((8, 8, layouts.N_SLICES), layouts.PET_AFFINE)


def test_numbers_may_be_padded_and_already_parsed():
    square_mm = square(0.5, 4.5, 0.5, 4.5, 1)
    parsed = build_rtstruct({"a": [square_mm]})
    for contour in parsed.ROIContourSequence[0].ContourSequence:
        assert len(contour.ContourData) == 12
    padded = build_rtstruct({"a": [square_mm]}, decimals=2)
    padded.ROIContourSequence[0].ContourSequence[0].ContourData = [
        f" {value:+.3e} " for value in (square_mm * [-1, -1, 1]).ravel()
    ]
    for rtstruct in (parsed, written(padded)):
        assert read_rtstruct(rtstruct, SHAPE, AXIAL).labels.sum() == 16


def raw_contour(value):
    def change(rtstruct):
        contour = rtstruct.ROIContourSequence[0].ContourSequence[0]
        contour.get_item("ContourData")
        contour["ContourData"] = contour.get_item("ContourData")._replace(value=value)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("StructureSetROISequence"), "StructureSetROISequence (3006,0020) is absent"),
        (lambda r: delattr(r.ROIContourSequence[0], "ReferencedROINumber"),
         "ReferencedROINumber (3006,0084)"),
        (lambda r: delattr(r.ROIContourSequence[0].ContourSequence[0], "ContourData"),
         "a contour has no points (ContourData (3006,0050) is missing)"),
        (raw_contour(rb"1\2\3\4"), "ContourData (3006,0050) is not a list of points"),
        (raw_contour(rb"1\2\three\4\5\6"), "ContourData (3006,0050) is not a list of points"),
        (raw_contour(b"1,5\\2\\3"), "ContourData (3006,0050) is not a list of points"),
        (raw_contour(rb"1\2\3\4\5\6"), "has 2 points, NumberOfContourPoints (3006,0046) says 4"),
        (raw_contour(rb"1\2\3\4\5\6\1\1\1\nan\1\1"), "not triplets of plausible numbers"),
        (raw_contour(b""), "a contour has no points (ContourData (3006,0050) is missing)"),
        (lambda r: setattr(r.ROIContourSequence[0].ContourSequence[0], "ContourGeometricType",
                           "POINT"), "ContourGeometricType (3006,0042)"),
        (raw_contour(rb"0\0\900\1\0\900\1\1\900\0\1\900"), "1 are outside the image"),
    ],
)  # fmt: skip
def test_damaged_structure_sets_are_refused(damage, message):
    rtstruct = build_rtstruct({"a": [square(0.5, 4.5, 0.5, 4.5, 1)]})
    damage(rtstruct)
    with pytest.raises(StudyError) as refused:
        read_rtstruct(rtstruct, SHAPE, AXIAL)
    assert message in str(refused.value)


def test_what_a_structure_set_was_drawn_on():
    rtstruct = build_rtstruct({"a": [square(0.5, 4.5, 0.5, 4.5, 1)], "b": []})
    assert referenced_series(rtstruct) == (SERIES_UID,)
    assert referenced_images(rtstruct) == (IMAGE_UID,)
    assert region_frames(rtstruct) == {1: FRAME_UID, 2: FRAME_UID}
    assert series_of_frames(rtstruct) == {FRAME_UID: (SERIES_UID,)}
    by_image = build_rtstruct({"a": []}, series_uid=None)
    assert referenced_series(by_image) == ()
    image = pydicom.Dataset()
    image.ReferencedSOPInstanceUID = "1.2.9"
    contour = pydicom.Dataset()
    contour.ContourImageSequence = [image]
    by_image.ROIContourSequence[0].ContourSequence = [contour]
    assert referenced_images(by_image) == (IMAGE_UID,)
    assert contoured_images(by_image) == ("1.2.9",)
    rtstruct.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = "1.2.8"
    del rtstruct.StructureSetROISequence[1].ReferencedFrameOfReferenceUID
    assert region_frames(rtstruct) == {1: "1.2.8", 2: FRAME_UID}


def test_what_a_segmentation_and_an_empty_object_were_drawn_on():
    seg = build_seg(TWO, AXIAL, ["a", "b"])
    seg.ReferencedSeriesSequence = [pydicom.Dataset()]
    seg.ReferencedSeriesSequence[0].SeriesInstanceUID = SERIES_UID
    assert referenced_series(seg) == (SERIES_UID,)
    empty = pydicom.Dataset()
    assert (referenced_series(empty), referenced_images(empty)) == ((), ())
    assert (region_frames(empty), series_of_frames(empty)) == ({}, {})


# --- real structure sets


def series_grid(folder):
    """Return shape and affine of a real axial series from its headers."""
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in sorted(folder.iterdir())]
    headers.sort(key=lambda header: header.ImagePositionPatient[2])
    first, last = headers[0], headers[-1]
    assert np.allclose(first.ImageOrientationPatient, [1, 0, 0, 0, 1, 0])
    origin, end = (np.array(each.ImagePositionPatient, dtype=float) for each in (first, last))
    affine = np.diag([first.PixelSpacing[1], first.PixelSpacing[0], 1.0, 1.0])
    affine[:3, 2] = (end - origin) / (len(headers) - 1)
    affine[:3, 3] = origin
    return (first.Columns, first.Rows, len(headers)), LPS_TO_RAS @ affine


def canonical(data, affine):
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(data.astype(np.uint8), affine))
    return np.asarray(image.dataobj), image.affine


def real(path):
    if not (DATA / path).exists():
        pytest.skip(f"real data {path} are not at hand")
    return DATA / path


@pytest.mark.parametrize(
    ("study", "n_voxels"),
    [
        ("STS_002/20060128_PETCT", 555),
        ("STS_025/20001004_PETCT", 606),
        ("STS_042/20040519_PETCT", 356),
    ],
)
def test_sarcomas_equal_the_rasterisation_of_ibsi_in_every_voxel(study, n_voxels):
    raw = real(f"sts_dicom/{study}")
    reference = nibabel.load(real(f"sts_nifti/{study}") / "MASK.nii.gz")
    rtstruct = pydicom.dcmread(raw / "MASK" / "RS.dcm")
    pet = pydicom.dcmread(next((raw / "PET").iterdir()), stop_before_pixels=True)
    assert referenced_series(rtstruct) == (pet.SeriesInstanceUID,)
    assert set(region_frames(rtstruct).values()) == {pet.FrameOfReferenceUID}
    mask = read_rtstruct(rtstruct, *series_grid(raw / "PET"))
    labels, affine = canonical(mask.labels, mask.affine)
    expected, expected_affine = canonical(np.asarray(reference.dataobj) > 0, reference.affine)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_allclose(affine, expected_affine, atol=1e-4)
    assert labels.sum() == n_voxels


def test_reference_object_lies_within_its_phantom():
    """The contour is a viewer's isocontour, the mask the whole phantom: a rim and 2 slices more."""
    folder = real("suv_dro/DRO_0_0")
    rtstruct = pydicom.dcmread(folder / "RS" / "RS_dro_0_0.dcm")
    mask = read_rtstruct(rtstruct, *series_grid(folder / "PT"))
    labels, _ = canonical(mask.labels, mask.affine)
    reference = nibabel.load(folder / "mask" / "DRO_mask.nii.gz")
    phantom, _ = canonical(np.asarray(reference.dataobj) > 0, reference.affine)
    assert not (labels > phantom).any()
    drawn = np.flatnonzero(labels.any(axis=(0, 1)))
    assert (drawn[0], drawn[-1]) == (2, 17)
    rim = (phantom > labels)[:, :, 2:18].sum(axis=(0, 1))
    outline_px = 2 * np.pi * np.sqrt(phantom[:, :, 5].sum() / np.pi)
    assert (rim < 1.3 * outline_px).all()
