"""DICOM segmentations: frames, placed by the geometry of each -> a label volume.

Knows pydicom, which reads them, not highdicom: one pass over the frames keeps one frame in memory,
overlapping and fractional segments are no special cases, and objects with small violations of the
standard, which are common, are read all the same.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import iter_pixels

from common.dicom_masks import LabelArray, Mask, matching, names_by_number, refusing_malformed
from common.dicom_pixels import decoding_plugin
from common.dicom_seg_planes import group_of_frames, place_frames
from common.dicom_values import functional_group, items, joined_text, number, tag_of, whole_number
from common.errors import StudyError

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
            f"segments overlap in {n_overlaps} voxels: they keep the lowest segment number"
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
