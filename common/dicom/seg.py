"""Where the frames of a DICOM segmentation lie: an evenly spaced stack, absent planes included.

Knows pydicom. DICOM's LPS coordinates end here: affines are RAS+.

DICOM segmentations: frames, placed by the geometry of each -> a label volume.

Knows pydicom, which reads them, not highdicom: one pass over the frames keeps one frame in memory,
overlapping and fractional segments are no special cases, and objects with small violations of the
standard, which are common, are read all the same.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import iter_pixels

from common.dicom.attributes import (
    functional_group,
    items,
    joined_text,
    number,
    tag_of,
    to_ras,
    whole_number,
)
from common.dicom.masks import LabelArray, Mask, matching, names_by_number, refusing_malformed
from common.dicom.pixels import decoding_plugin
from common.errors import Kind, StudyError, Warning

# --- dicom seg planes ------------------------------------------------------------------------

POSITION_TOLERANCE = 0.1
"""Distance of a plane from the evenly spaced grid [slice spacings]: as for image series."""

SAME_PLANE_MM = 0.01
"""Frames of several segments repeat the position of their plane, rounded differently at worst."""

ORIENTATION_TOLERANCE = 2e-3
"""Direction cosines are often written with 3 or 4 decimals."""

LARGEST_MM, SMALLEST_MM = 1e4, 1e-3
"""Beyond 10 m from the origin, and for spacings below 1 um, numbers are damaged."""

FloatArray = NDArray[np.float64]


class FramePlaces(NamedTuple):
    """Where the frames of a SEG lie."""

    slice_of_frame: NDArray[np.intp]
    n_slices: int
    affine: FloatArray
    warnings: list[Warning]


def place_frames(dataset: Dataset, frames: Sequence[Dataset]) -> FramePlaces:
    """Place the frames on an evenly spaced stack of slices, absent planes included.

    Parameters
    ----------
    dataset : pydicom.Dataset
        The segmentation.
    frames : sequence of pydicom.Dataset
        The functional groups of each frame's own.

    Raises
    ------
    StudyError
        They form no regular volume.
    """
    measures = group_of_frames(dataset, frames, "PixelMeasuresSequence")
    row_mm, column_mm = _common([_numbers(item, "PixelSpacing", 2) for item in measures], 0.01)
    cosines = _common(
        [
            _numbers(item, "ImageOrientationPatient", 6)
            for item in group_of_frames(dataset, frames, "PlaneOrientationSequence")
        ],
        ORIENTATION_TOLERANCE,
    ).reshape(2, 3)
    skew = abs(cosines @ cosines.T - np.eye(2)).max()
    if skew > ORIENTATION_TOLERANCE or min(row_mm, column_mm) < SMALLEST_MM:
        raise StudyError(
            f"the SEG's axes are not perpendicular ({tag_of('ImageOrientationPatient')}) or its "
            f"{tag_of('PixelSpacing')} is not positive: export it again"
        )
    positions = np.array(
        [
            _numbers(item, "ImagePositionPatient", 3)
            for item in group_of_frames(dataset, frames, "PlanePositionSequence")
        ]
    )
    normal = np.cross(*cosines)
    plane_of_frame, plane_mm = _planes(positions @ normal)
    slice_of_plane, spacing_mm, notes = _slices(plane_mm, measures[0])
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
            f"the SEG's frames are shifted against each other ({tag_of('ImagePositionPatient')}): "
            "give the mask as NIfTI"
        )
    affine = np.eye(4)
    columns = (cosines[0] * column_mm, cosines[1] * row_mm, step, positions[first])
    affine[:3] = to_ras(np.array(columns)).T
    return FramePlaces(
        slice_of_frame, n_steps + 1, affine, [Warning(Kind.MASK, note) for note in notes]
    )


def group_of_frames(dataset: Dataset, frames: Sequence[Dataset], keyword: str) -> list[Dataset]:
    """Return a functional group for each frame.

    Raises
    ------
    StudyError
        A frame has none.
    """
    groups = [functional_group(dataset, frame, keyword) for frame in frames]
    present = [group for group in groups if group is not None]
    if len(present) < len(frames):
        raise StudyError(f"the SEG has frames without {tag_of(keyword)}: give the mask as NIfTI")
    return present


def _planes(along_mm: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
    """Return the plane of each frame, and each plane's position along the normal, ascending."""
    order = np.argsort(along_mm, kind="stable")
    starts = np.diff(along_mm[order], prepend=-np.inf) > SAME_PLANE_MM
    plane_of_frame = np.empty(len(order), dtype=np.intp)
    plane_of_frame[order] = np.cumsum(starts) - 1
    return plane_of_frame, along_mm[order][starts]


def _slices(plane_mm: FloatArray, measures: Dataset) -> tuple[NDArray[np.intp], float, list[str]]:
    """Number the slices on which the planes lie; return also the spacing [mm] and notes.

    The declared spacing rules, for only it tells which planes are absent.
    """
    declared_mm = _positive(measures, "SpacingBetweenSlices")
    thickness_mm = _positive(measures, "SliceThickness")
    if len(plane_mm) == 1:
        spacing_mm = declared_mm or thickness_mm
        if spacing_mm is None:
            raise StudyError(
                f"the SEG has one plane and no {tag_of('SpacingBetweenSlices')}: give the mask as "
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
        f"the SEG's planes are not evenly spaced ({tag_of('ImagePositionPatient')}): "
        "give the mask as NIfTI"
    )


def _spacing_notes(
    steps: NDArray[np.intp], spacing_mm: float, declared_mm: float | None
) -> list[str]:
    keyword = tag_of("SpacingBetweenSlices")
    if declared_mm is None or abs(spacing_mm - declared_mm) > POSITION_TOLERANCE * declared_mm:
        return [f"{keyword} is absent or wrong: spacing of {spacing_mm:.3f} mm from the planes"]
    if steps.min() > 1:
        return [f"no two planes are neighbours by {keyword}, {spacing_mm:.3f} mm: taken as sparse"]
    return []


def _positive(item: Dataset, keyword: str) -> float | None:
    """Return a length [mm] without its sign (some spacings are negative); None if absent or 0."""
    if item.get(keyword) is None:
        return None
    value = abs(float(_numbers(item, keyword, 1)[0]))
    return value if value >= SMALLEST_MM else None


def _numbers(item: Dataset, keyword: str, count: int) -> FloatArray:
    try:
        numbers = np.atleast_1d(np.array(item.get(keyword), dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise StudyError(f"{tag_of(keyword)} is not a number: export the mask again") from error
    if numbers.shape != (count,) or not (abs(numbers) < LARGEST_MM).all():
        raise StudyError(
            f"{tag_of(keyword)} is not {count} plausible number(s): export the mask again"
        )
    return numbers


def _common(values: Sequence[FloatArray], tolerance: float) -> FloatArray:
    """Return the first of values that must agree in all frames."""
    if np.ptp(values, axis=0).max() > tolerance:
        raise StudyError(
            f"the SEG's frames differ in {tag_of('ImageOrientationPatient')} or "
            f"{tag_of('PixelSpacing')}: give the mask as NIfTI"
        )
    return values[0]


# --- dicom seg -------------------------------------------------------------------------------

MOST_VOXELS = 2**31
"""2 GiB of labels: a damaged position must not ask for a volume without end."""


def read_seg(source: Dataset | Path, roi: re.Pattern[str] | None = None) -> Mask:
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
    with refusing_malformed("SEG"):
        dataset = source if isinstance(source, Dataset) else pydicom.dcmread(source, force=True)
        names = names_by_number(dataset, "SegmentSequence", "SegmentNumber", "SegmentLabel")
        foreground = {number: name for number, name in names.items() if number > 0}
        chosen = matching(foreground, roi, "SegmentLabel")
        frames = _described_frames(dataset)
        stack = place_frames(dataset, frames)
        labels_of = _frame_labels(dataset, names, chosen)
        segments = _segment_of_frames(dataset, frames, names)
        shape = (whole_number(dataset, "Columns"), whole_number(dataset, "Rows"), stack.n_slices)
    if int(np.prod(shape, dtype=object)) > MOST_VOXELS:
        raise StudyError(
            f"the SEG spans {shape} voxels ({tag_of('ImagePositionPatient')}): its geometry is "
            "damaged, export it again"
        )
    labels = np.zeros(shape, dtype=np.min_scalar_type(max(chosen)), order="F")
    overlaps = [np.empty(0, dtype=np.intp)]
    with refusing_malformed("SEG's pixel data"):
        for frame, k, segment in zip(_frames(dataset), stack.slice_of_frame, segments, strict=True):
            overlap = _unite(labels[:, :, k].T, labels_of(frame, segment))
            overlaps.append(overlap + k * shape[0] * shape[1])
    n_overlaps = np.unique(np.concatenate(overlaps)).size
    if n_overlaps:
        stack.warnings.append(
            Warning(
                Kind.MASK,
                f"segments overlap in {n_overlaps} voxels: they keep the lowest segment number",
            )
        )
    return Mask(labels, stack.affine, tuple(stack.warnings))


def _frames(dataset: Dataset) -> Iterator[NDArray[Any]]:
    """Yield the stored values (rows, columns) frame by frame."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        yield from iter_pixels(dataset, raw=True, decoding_plugin=decoding_plugin(syntax))
        return
    if dataset.BitsAllocated > 1:
        yield from iter_pixels(dataset, raw=True)
        return
    # Not left to pydicom 3.0: it fails where a frame starts in the middle of a byte.
    packed = np.frombuffer(dataset.PixelData, dtype=np.uint8)
    n_pixels = dataset.Rows * dataset.Columns
    for start in range(0, n_pixels * int(number(dataset, "NumberOfFrames") or 1), n_pixels):
        first_byte, skipped_bits = divmod(start, 8)
        end_byte = -(-(start + n_pixels) // 8)
        bits = np.unpackbits(packed[first_byte:end_byte], bitorder="little")
        yield bits[skipped_bits : skipped_bits + n_pixels].reshape(dataset.Rows, dataset.Columns)


def _unite(labels: LabelArray, frame: LabelArray) -> NDArray[np.intp]:
    """Put one frame's labels into a slice; return the flat indices that had another label."""
    drawn = frame > 0
    overlap = np.flatnonzero(drawn & (labels > 0) & (labels != frame))
    np.copyto(labels, frame, where=drawn & ((labels == 0) | (labels > frame)))
    return overlap


def _frame_labels(
    dataset: Dataset, names: Mapping[int, str], chosen: Sequence[int]
) -> Callable[[NDArray[Any], int], LabelArray]:
    """Return the function (frame, its segment) -> labels for this type of segmentation."""
    kept = np.zeros(2**16, dtype=np.min_scalar_type(max(chosen)))
    kept[chosen] = chosen
    kind = joined_text(dataset, "SegmentationType")
    if kind == "LABELMAP":
        known = np.zeros(2**16, dtype=bool)
        known[[0, int(number(dataset, "PixelPaddingValue") or 0), *names]] = True

        def of_label_map(frame: NDArray[Any], _: int) -> LabelArray:
            if not known[frame].all():
                raise StudyError(
                    f"the SEG holds labels that no segment describes ({tag_of('SegmentSequence')}):"
                    " export it again"
                )
            labels: LabelArray = kept[frame]
            return labels

        return of_label_map
    if kind == "FRACTIONAL":
        threshold = whole_number(dataset, "MaximumFractionalValue") / 2
    elif kind == "BINARY" or (not kind and number(dataset, "BitsAllocated") == 1):
        threshold = 1
    else:
        raise StudyError(
            f"{tag_of('SegmentationType')} is none of BINARY, FRACTIONAL and LABELMAP: "
            "give the mask as NIfTI"
        )
    return lambda frame, segment: (frame >= threshold) * kept[segment]


def _described_frames(dataset: Dataset) -> list[Dataset]:
    """Return the functional groups of each frame's own."""
    n_frames = int(number(dataset, "NumberOfFrames") or 1)
    frames = items(dataset, "PerFrameFunctionalGroupsSequence") or [Dataset()]
    if len(frames) != n_frames:
        raise StudyError(
            f"the SEG has {n_frames} frames ({tag_of('NumberOfFrames')}) but describes "
            f"{len(frames)} ({tag_of('PerFrameFunctionalGroupsSequence')}): export it again"
        )
    return frames


def _segment_of_frames(
    dataset: Dataset, frames: Sequence[Dataset], names: Mapping[int, str]
) -> list[int]:
    keyword = "SegmentIdentificationSequence"
    identified = any(functional_group(dataset, frame, keyword) is not None for frame in frames)
    is_label_map = joined_text(dataset, "SegmentationType") == "LABELMAP"
    if is_label_map or (len(names) == 1 and not identified):
        return [min(names)] * len(frames)
    groups = group_of_frames(dataset, frames, keyword)
    segments = [whole_number(group, "ReferencedSegmentNumber") for group in groups]
    if not set(segments) <= set(names):
        raise StudyError(
            f"the SEG has frames of a segment that is not described "
            f"({tag_of('ReferencedSegmentNumber')}): export it again"
        )
    return segments
