"""DICOM RTSTRUCT and SEG objects -> label volumes (the only module that knows these two).

Arrays leave as [column, row, slice], slices ascending along cross(row, column), with an affine to
RAS+ mm: the convention of the image series. pydicom reads the segmentations, not highdicom: one
pass over the frames keeps one frame in memory, overlapping and fractional segments are no special
cases, and objects with small violations of the standard, which are common, are read all the same.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.pixels import iter_pixels
from pydicom.tag import Tag

from common.contours import fill_contours
from common.errors import StudyError

FloatArray = npt.NDArray[np.float64]
LabelArray = npt.NDArray[np.uint8 | np.uint16]

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
# Of the slice spacing, between a plane's position and the evenly spaced grid: as for image series.
POSITION_TOLERANCE = 0.1
# Frames of several segments repeat the position of their plane, rounded differently at worst.
SAME_PLANE_MM = 0.01
# Direction cosines are often written with 3 or 4 decimals.
ORIENTATION_TOLERANCE = 2e-3
# Beyond 10 m from the origin, and for spacings below 1 um, numbers are damaged.
LARGEST_MM, SMALLEST_MM = 1e4, 1e-3
# 2 GiB of labels: a damaged position must not ask for a volume without end.
MOST_VOXELS = 2**31
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Mask:
    """A label volume.

    Attributes
    ----------
    labels
        uint8 or uint16 array [x, y, z] in Fortran order; 0 is background.
    affine
        (4, 4) voxel -> RAS+ mm.
    warnings
        What was put right or left out; no identity.
    """

    labels: LabelArray
    affine: FloatArray
    warnings: tuple[str, ...] = ()


def referenced_series(dataset: pydicom.Dataset) -> tuple[str, ...]:
    """Return the SeriesInstanceUIDs an RTSTRUCT or SEG was drawn on; () where it names none."""
    with _refusing_malformed("mask object"):
        series = [*_rt_referenced_series(dataset), *_items(dataset, "ReferencedSeriesSequence")]
        return _unique(series, "SeriesInstanceUID")


def referenced_images(dataset: pydicom.Dataset) -> tuple[str, ...]:
    """Return the SOPInstanceUIDs an RTSTRUCT was drawn on, named by series and by contour.

    They find the images where the series is not named.
    """
    with _refusing_malformed("mask object"):
        groups = _rt_referenced_series(dataset)
        for region in _items(dataset, "ROIContourSequence"):
            groups += _items(region, "ContourSequence")
        images = [image for group in groups for image in _items(group, "ContourImageSequence")]
        return _unique(images, "ReferencedSOPInstanceUID")


def frame_of_reference(dataset: pydicom.Dataset) -> str | None:
    """Return the FrameOfReferenceUID of an RTSTRUCT's regions or of a SEG; None without one.

    Raises
    ------
    StudyError
        The regions of an RTSTRUCT lie in different frames of reference.
    """
    with _refusing_malformed("mask object"):
        regions = _items(dataset, "StructureSetROISequence")
        frames = _items(dataset, "ReferencedFrameOfReferenceSequence")
        # A region's coordinates are in the frame which it names itself; the rest are fallbacks.
        found = (
            _unique(regions, "ReferencedFrameOfReferenceUID")
            or _unique(frames, "FrameOfReferenceUID")
            or _unique([dataset], "FrameOfReferenceUID")
        )
    if len(found) > 1:
        raise StudyError(
            f"the RTSTRUCT's regions lie in {len(found)} frames of reference "
            f"({_named('ReferencedFrameOfReferenceUID')}): export only those drawn on PET or CT"
        )
    return found[0] if found else None


# --- RTSTRUCT


def read_rtstruct(
    dataset: pydicom.Dataset,
    shape: tuple[int, int, int],
    affine: FloatArray,
    roi: re.Pattern[str] | None = None,
) -> Mask:
    """Rasterise the regions of an RTSTRUCT on the grid of the series that it references.

    Parameters
    ----------
    dataset
        The RT structure set.
    shape, affine
        Grid of the series: counts along x, y, z and (4, 4) voxel -> RAS+ mm.
    roi
        Unite the regions in whose ROIName it is found (case ignored); None: all of them.

    Returns
    -------
    Mask
        Label 1 where a voxel's centre lies inside any of the regions.

    Raises
    ------
    StudyError
        Malformed, no region matches, or a region can't be placed on the grid.
    """
    with _refusing_malformed("RTSTRUCT"):
        contours_of = _contours_by_region(dataset)
        names = dict.fromkeys(contours_of, "") | _names(
            dataset, "StructureSetROISequence", "ROINumber", "ROIName"
        )
        chosen = _matching(names, roi, "ROIName")
        warnings = _body_outlines(dataset, chosen)
        labels = np.zeros(shape, dtype=np.uint8, order="F")
        n_closed, n_others = 0, 0
        for number in chosen:
            drawn = contours_of.get(number, [])
            contours = [
                _points(each) for each in drawn if each.get("ContourGeometricType") in CLOSED
            ]
            filled = fill_contours(contours, shape, affine)
            labels |= filled.inside.view(np.uint8)
            warnings += [
                f"region {number}: {note}"
                for note in (*_left_out(len(drawn), len(contours)), *filled.warnings)
            ]
            n_closed += len(contours)
            n_others += len(drawn) - len(contours)
    if n_others and not n_closed:
        raise StudyError(
            f"the regions have only points or open lines ({_named('ContourGeometricType')}): "
            "choose others with --roi, or give the mask as NIfTI"
        )
    return Mask(labels, np.array(affine, dtype=np.float64), tuple(warnings))


def _rt_referenced_series(dataset: pydicom.Dataset) -> list[pydicom.Dataset]:
    return [
        series
        for frame in _items(dataset, "ReferencedFrameOfReferenceSequence")
        for study in _items(frame, "RTReferencedStudySequence")
        for series in _items(study, "RTReferencedSeriesSequence")
    ]


def _contours_by_region(dataset: pydicom.Dataset) -> dict[int, list[pydicom.Dataset]]:
    contours: dict[int, list[pydicom.Dataset]] = {}
    for region in _items(dataset, "ROIContourSequence"):
        number = _integer(region, "ReferencedROINumber")
        contours.setdefault(number, []).extend(_items(region, "ContourSequence"))
    return contours


def _body_outlines(dataset: pydicom.Dataset, chosen: Sequence[int]) -> list[str]:
    """Warn where the outline of the body is among several regions: it would swallow them all."""
    outlines = [
        _integer(observation, "ReferencedROINumber")
        for observation in _items(dataset, "RTROIObservationsSequence")
        if observation.get("RTROIInterpretedType") == "EXTERNAL"
    ]
    return [
        f"region {number}: it is the outline of the body ({_named('RTROIInterpretedType')} "
        "EXTERNAL): choose the tumours with --roi"
        for number in chosen
        if number in outlines
    ]


def _left_out(n_drawn: int, n_closed: int) -> list[str]:
    if not n_drawn:
        return ["no contours"]
    n_open = n_drawn - n_closed
    return [f"{n_open} contour(s) are points or open lines: ignored"] if n_open else []


def _points(contour: pydicom.Dataset) -> FloatArray:
    """Parse ContourData into (n, 3) RAS+ mm, from its bytes: pydicom's numbers are 20x slower."""
    element = contour.get_item(Tag("ContourData"))
    value = element.value if element is not None else None
    numbers = value.strip(b" \0").split(b"\\") if isinstance(value, bytes) else value
    try:
        points = np.array(numbers, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError) as error:
        raise StudyError(
            f"{_named('ContourData')} is not a list of points x\\y\\z: export the RTSTRUCT again"
        ) from error
    declared = contour.get("NumberOfContourPoints")
    if declared is not None and int(declared) != len(points):
        raise StudyError(
            f"{_named('ContourData')} has {len(points)} points, {_named('NumberOfContourPoints')} "
            f"says {int(declared)}: export the RTSTRUCT again"
        )
    return points * LPS_TO_RAS.diagonal()[:3]


# --- SEG


class _Stack(NamedTuple):
    """Where the frames of a SEG lie."""

    slice_of_frame: npt.NDArray[np.intp]
    n_slices: int
    affine: FloatArray
    warnings: list[str]


def read_seg(source: pydicom.Dataset | Path, roi: re.Pattern[str] | None = None) -> Mask:
    """Read a segmentation on its own grid, placed by the geometry of each frame.

    Parameters
    ----------
    source
        The segmentation or its file: binary, fractional or label map; empty planes may be absent.
    roi
        Take the segments in whose SegmentLabel it is found (case ignored); None: all of them.

    Returns
    -------
    Mask
        Segment numbers; where segments overlap, the lowest. A fractional voxel belongs to its
        segment from half of MaximumFractionalValue on. The grid reaches from the first plane
        present to the last; planes absent in between are empty.

    Raises
    ------
    StudyError
        Malformed, undecodable, no segment matches, or the frames form no regular volume.
    """
    with _refusing_malformed("SEG"):
        dataset = source if isinstance(source, pydicom.Dataset) else pydicom.dcmread(source)
        names = _names(dataset, "SegmentSequence", "SegmentNumber", "SegmentLabel")
        chosen = _matching(names, roi, "SegmentLabel")
        groups = _frame_groups(dataset)
        stack = _stack(dataset, groups)
        labels_of = _frame_labels(dataset, names, chosen)
        segments = _segment_of_frames(dataset, groups, names)
        shape = (_integer(dataset, "Columns"), _integer(dataset, "Rows"), stack.n_slices)
    if int(np.prod(shape, dtype=object)) > MOST_VOXELS:
        raise StudyError(
            f"the SEG spans {shape} voxels ({_named('ImagePositionPatient')}): its geometry is "
            "damaged, export it again"
        )
    labels = np.zeros(shape, dtype=np.min_scalar_type(max(chosen)), order="F")
    overlaps = [np.empty(0, dtype=np.intp)]
    with _refusing_malformed("SEG's pixel data"):
        for frame, k, segment in zip(_frames(dataset), stack.slice_of_frame, segments, strict=True):
            overlap = _unite(labels[:, :, k].T, labels_of(frame, segment))
            overlaps.append(overlap + k * shape[0] * shape[1])
    n_overlaps = np.unique(np.concatenate(overlaps)).size
    if n_overlaps:
        stack.warnings.append(
            f"segments overlap in {n_overlaps} voxels: they keep the lowest segment number"
        )
    return Mask(labels, stack.affine, tuple(stack.warnings))


def _frames(dataset: pydicom.Dataset) -> Iterator[npt.NDArray[Any]]:
    """Yield the stored values (rows, columns) frame by frame."""
    if dataset.BitsAllocated > 1 or dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        yield from iter_pixels(dataset, raw=True)
        return
    # Not left to pydicom 3.0: it fails where a frame starts in the middle of a byte.
    packed = np.frombuffer(dataset.PixelData, dtype=np.uint8)
    n_pixels = dataset.Rows * dataset.Columns
    for start in range(0, n_pixels * int(dataset.get("NumberOfFrames") or 1), n_pixels):
        first_byte, skipped_bits = divmod(start, 8)
        end_byte = -(-(start + n_pixels) // 8)
        bits = np.unpackbits(packed[first_byte:end_byte], bitorder="little")
        yield bits[skipped_bits : skipped_bits + n_pixels].reshape(dataset.Rows, dataset.Columns)


def _unite(labels: LabelArray, frame: LabelArray) -> npt.NDArray[np.intp]:
    """Put one frame's labels into a slice; return the flat indices that had another label."""
    drawn = frame > 0
    overlap = np.flatnonzero(drawn & (labels > 0) & (labels != frame))
    np.copyto(labels, frame, where=drawn & ((labels == 0) | (labels > frame)))
    return overlap


def _frame_labels(
    dataset: pydicom.Dataset, names: Mapping[int, str], chosen: Sequence[int]
) -> Callable[[npt.NDArray[Any], int], LabelArray]:
    """Return the function (frame, its segment) -> labels for this type of segmentation."""
    kept = np.zeros(2**16, dtype=np.min_scalar_type(max(chosen)))
    kept[chosen] = chosen
    kind = dataset.get("SegmentationType")
    if kind == "LABELMAP":
        known = np.zeros(2**16, dtype=bool)
        known[[0, int(dataset.get("PixelPaddingValue") or 0), *names]] = True

        def of_label_map(frame: npt.NDArray[Any], _: int) -> LabelArray:
            if not known[frame].all():
                raise StudyError(
                    f"the SEG holds labels that no segment describes ({_named('SegmentSequence')}):"
                    " export it again"
                )
            labels: LabelArray = kept[frame]
            return labels

        return of_label_map
    if kind == "FRACTIONAL":
        threshold = _integer(dataset, "MaximumFractionalValue") / 2
    elif kind == "BINARY" or (kind is None and dataset.get("BitsAllocated") == 1):
        threshold = 1
    else:
        raise StudyError(
            f"{_named('SegmentationType')} is none of BINARY, FRACTIONAL and LABELMAP: "
            "give the mask as NIfTI"
        )
    return lambda frame, segment: (frame >= threshold) * kept[segment]


def _frame_groups(dataset: pydicom.Dataset) -> list[pydicom.Dataset]:
    n_frames = int(dataset.get("NumberOfFrames") or 1)
    groups = _items(dataset, "PerFrameFunctionalGroupsSequence") or [pydicom.Dataset()]
    if len(groups) != n_frames:
        raise StudyError(
            f"the SEG has {n_frames} frames ({_named('NumberOfFrames')}) but describes "
            f"{len(groups)} ({_named('PerFrameFunctionalGroupsSequence')}): export it again"
        )
    return groups


def _macro(
    dataset: pydicom.Dataset, groups: Sequence[pydicom.Dataset], keyword: str
) -> list[pydicom.Dataset]:
    """Return the item of a functional group for each frame: its own, else the shared one."""
    shared = [
        item
        for group in _items(dataset, "SharedFunctionalGroupsSequence")
        for item in _items(group, keyword)
    ]
    items = [_items(group, keyword) or shared for group in groups]
    if not all(items):
        raise StudyError(f"the SEG has frames without {_named(keyword)}: give the mask as NIfTI")
    return [item[0] for item in items]


def _segment_of_frames(
    dataset: pydicom.Dataset, groups: Sequence[pydicom.Dataset], names: Mapping[int, str]
) -> list[int]:
    identified = any(
        "SegmentIdentificationSequence" in group
        for group in [*groups, *_items(dataset, "SharedFunctionalGroupsSequence")]
    )
    if dataset.get("SegmentationType") == "LABELMAP" or (len(names) == 1 and not identified):
        return [min(names)] * len(groups)
    items = _macro(dataset, groups, "SegmentIdentificationSequence")
    segments = [_integer(item, "ReferencedSegmentNumber") for item in items]
    if not set(segments) <= set(names):
        raise StudyError(
            f"the SEG has frames of a segment that is not described "
            f"({_named('ReferencedSegmentNumber')}): export it again"
        )
    return segments


def _stack(dataset: pydicom.Dataset, groups: Sequence[pydicom.Dataset]) -> _Stack:
    """Place the frames on an evenly spaced stack of slices, absent planes included."""
    measures = _macro(dataset, groups, "PixelMeasuresSequence")
    row_mm, column_mm = _common([_numbers(item, "PixelSpacing", 2) for item in measures], 0.01)
    cosines = _common(
        [
            _numbers(item, "ImageOrientationPatient", 6)
            for item in _macro(dataset, groups, "PlaneOrientationSequence")
        ],
        ORIENTATION_TOLERANCE,
    ).reshape(2, 3)
    skew = abs(cosines @ cosines.T - np.eye(2)).max()
    if skew > ORIENTATION_TOLERANCE or min(row_mm, column_mm) < SMALLEST_MM:
        raise StudyError(
            f"the SEG's axes are not perpendicular ({_named('ImageOrientationPatient')}) or its "
            f"{_named('PixelSpacing')} is not positive: export it again"
        )
    positions = np.array(
        [
            _numbers(item, "ImagePositionPatient", 3)
            for item in _macro(dataset, groups, "PlanePositionSequence")
        ]
    )
    normal = np.cross(*cosines)
    plane_of_frame, plane_mm = _planes(positions @ normal)
    slice_of_plane, spacing_mm, warnings = _slices(plane_mm, measures[0])
    slice_of_frame = slice_of_plane[plane_of_frame]
    first, last = slice_of_frame.argmin(), slice_of_frame.argmax()
    n_steps = int(slice_of_frame[last])
    # Not along the normal where the gantry was tilted.
    step = (positions[last] - positions[first]) / n_steps if n_steps else normal * spacing_mm
    off_grid_mm = np.linalg.norm(
        positions - positions[first] - slice_of_frame[:, np.newaxis] * step, axis=1
    )
    if off_grid_mm.max() > POSITION_TOLERANCE * spacing_mm:
        raise StudyError(
            f"the SEG's frames are shifted against each other ({_named('ImagePositionPatient')}): "
            "give the mask as NIfTI"
        )
    affine = np.eye(4)
    affine[:3] = np.column_stack(
        [cosines[0] * column_mm, cosines[1] * row_mm, step, positions[first]]
    )
    return _Stack(slice_of_frame, n_steps + 1, LPS_TO_RAS @ affine, warnings)


def _planes(along_mm: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Return the plane of each frame, and each plane's position along the normal, ascending."""
    order = np.argsort(along_mm, kind="stable")
    starts = np.diff(along_mm[order], prepend=-np.inf) > SAME_PLANE_MM
    plane_of_frame = np.empty(len(order), dtype=np.intp)
    plane_of_frame[order] = np.cumsum(starts) - 1
    return plane_of_frame, along_mm[order][starts]


def _slices(
    plane_mm: FloatArray, measures: pydicom.Dataset
) -> tuple[npt.NDArray[np.intp], float, list[str]]:
    """Number the slices on which the planes lie; return also the spacing [mm] and warnings.

    The declared spacing rules, for only it tells which planes are absent.
    """
    declared_mm = _positive(measures, "SpacingBetweenSlices")
    thickness_mm = _positive(measures, "SliceThickness")
    if len(plane_mm) == 1:
        spacing_mm = declared_mm or thickness_mm
        if spacing_mm is None:
            raise StudyError(
                f"the SEG has one plane and no {_named('SpacingBetweenSlices')}: give the mask as "
                "NIfTI"
            )
        return np.zeros(1, dtype=np.intp), spacing_mm, []
    gaps_mm = np.diff(plane_mm)
    for candidate_mm in (declared_mm, float(gaps_mm.min()), thickness_mm):
        if candidate_mm is None:
            continue
        # Gap by gap: small deviations of real tables must not add up along the stack.
        steps = np.rint(gaps_mm / candidate_mm).astype(np.intp)
        slice_of_plane = np.concatenate([[0], np.cumsum(steps)])
        spacing_mm = float((plane_mm[-1] - plane_mm[0]) / max(slice_of_plane[-1], 1))
        off_mm = abs(plane_mm - plane_mm[0] - slice_of_plane * spacing_mm).max()
        if (
            steps.min() > 0
            and abs(spacing_mm - candidate_mm) <= POSITION_TOLERANCE * candidate_mm
            and off_mm <= POSITION_TOLERANCE * spacing_mm
        ):
            return slice_of_plane, spacing_mm, _spacing_notes(steps, spacing_mm, declared_mm)
    raise StudyError(
        f"the SEG's planes are not evenly spaced ({_named('ImagePositionPatient')}): "
        "give the mask as NIfTI"
    )


def _spacing_notes(
    steps: npt.NDArray[np.intp], spacing_mm: float, declared_mm: float | None
) -> list[str]:
    keyword = _named("SpacingBetweenSlices")
    if declared_mm is None or abs(spacing_mm - declared_mm) > POSITION_TOLERANCE * declared_mm:
        return [f"{keyword} is absent or wrong: spacing of {spacing_mm:.3f} mm from the planes"]
    if steps.min() > 1:
        return [f"no two planes are neighbours by {keyword}, {spacing_mm:.3f} mm: taken as sparse"]
    return []


# --- what malformed objects are met with


@contextmanager
def _refusing_malformed(what: str) -> Iterator[None]:
    """Turn whatever pydicom raises on damaged bytes, which may be anything, into a refusal."""
    try:
        yield
    except (StudyError, MemoryError):
        raise
    except Exception as error:
        raise StudyError(
            f"the {what} can't be read ({type(error).__name__}): export it again, or give the "
            "mask as NIfTI"
        ) from error


def _named(keyword: str) -> str:
    tag = Tag(tag_for_keyword(keyword) or 0)
    return f"{keyword} ({tag.group:04X},{tag.elem:04X})"


def _items(dataset: pydicom.Dataset, keyword: str) -> list[pydicom.Dataset]:
    return list(dataset.get(keyword) or [])


def _unique(items: Iterable[pydicom.Dataset], keyword: str) -> tuple[str, ...]:
    values = (item.get(keyword) for item in items)
    return tuple(dict.fromkeys(str(value) for value in values if value))


def _names(dataset: pydicom.Dataset, keyword: str, number: str, name: str) -> dict[int, str]:
    """Return number -> name of the regions or segments that the sequence ``keyword`` describes."""
    items = _items(dataset, keyword)
    names = {_integer(item, number): str(item.get(name) or "") for item in items}
    if not items or len(names) < len(items):
        raise StudyError(
            f"{_named(keyword)} is absent or uses a number twice ({_named(number)}): export the "
            "mask again"
        )
    return names


def _matching(names: Mapping[int, str], roi: re.Pattern[str] | None, keyword: str) -> list[int]:
    """Return the numbers of the names in which ``roi`` is found; 0 is background."""
    if roi is not None:
        roi = re.compile(roi.pattern, roi.flags | re.IGNORECASE)
    chosen = [
        number for number in sorted(names) if number > 0 and (not roi or roi.search(names[number]))
    ]
    if not chosen:
        raise StudyError(
            f"none of {len(names)} names matches ({_named(keyword)}): give a --roi that does"
        )
    return chosen


def _integer(item: pydicom.Dataset, keyword: str) -> int:
    try:
        return int(item.get(keyword))
    except (TypeError, ValueError) as error:
        raise StudyError(f"{_named(keyword)} is no whole number: export the mask again") from error


def _positive(item: pydicom.Dataset, keyword: str) -> float | None:
    """Return a length [mm] without its sign (some spacings are negative); None if absent or 0."""
    if item.get(keyword) is None:
        return None
    value = abs(float(_numbers(item, keyword, 1)[0]))
    return value if value >= SMALLEST_MM else None


def _numbers(item: pydicom.Dataset, keyword: str, count: int) -> FloatArray:
    try:
        numbers = np.atleast_1d(np.array(item.get(keyword), dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise StudyError(f"{_named(keyword)} is not a number: export the mask again") from error
    if numbers.shape != (count,) or not (abs(numbers) < LARGEST_MM).all():
        raise StudyError(
            f"{_named(keyword)} is not {count} plausible number(s): export the mask again"
        )
    return numbers


def _common(values: Sequence[FloatArray], tolerance: float) -> FloatArray:
    """Return the first of values that must agree in all frames."""
    if np.ptp(values, axis=0).max() > tolerance:
        raise StudyError(
            f"the SEG's frames differ in {_named('ImageOrientationPatient')} or "
            f"{_named('PixelSpacing')}: give the mask as NIfTI"
        )
    return values[0]
