"""DICOM segmentations: frames, placed by the geometry of each -> a label volume.

Knows pydicom, which reads them, not highdicom: one pass over the frames keeps one frame in memory,
overlapping and fractional segments are no special cases, and objects with small violations of the
standard, which are common, are read all the same. Where the frames lie: `common.dicom.seg_planes`.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from common.dicom.attributes import (
    functional_group,
    items,
    joined_text,
    number,
    tag_of,
    whole_number,
)
from common.dicom.masks import (
    LabelArray,
    Mask,
    listed,
    matching,
    names_by_number,
    no_tumours,
    refusing_malformed,
)
from common.dicom.pixels import decoding_plugin
from common.dicom.seg_planes import group_of_frames, place_frames
from common.errors import Kind, StudyError, Warning
from common.geometry import Grid

DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
"""Deflated Image Frame Compression, of 2025, which pydicom 3.0 does not know."""

NO_TUMOURS = {
    **dict.fromkeys(("123037004", "91723000", "T-D000A"), "anatomical structure"),
    **dict.fromkeys(("91720002", "T-D0080"), "body substance"),
    **dict.fromkeys(("105590001", "F-61002"), "substance"),
    **dict.fromkeys(("260787004", "A-00004"), "physical object"),
    **dict.fromkeys(("309825002", "R-42018"), "spatial concept"),
}
"""Categories of segments by their codes in SNOMED CT and SRT (CID 7150) that are no tumours where
others are. Tissue may be one: programs call so what no one has named."""

MOST_VOXELS = 2**31
"""2 GiB of labels: a damaged position must not ask for a volume without end."""


def read_seg(
    source: Dataset | Path,
    roi: re.Pattern[str] | None = None,
    images: Sequence[Grid] = (),
    *,
    is_of_images: bool = False,
) -> Mask:
    """Read a segmentation on its own grid, placed by the geometry of each frame.

    Parameters
    ----------
    source
        The segmentation or its file: binary, fractional or label map; empty planes may be absent.
    roi
        Take the segments in whose SegmentLabel it is found (case ignored); None: all of them.
    images
        Grids of what it may have been drawn on, the likeliest first.
    is_of_images
        Whether it can't be of another reconstruction: it names none that is not at hand.

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
        chosen = matching(_foreground(dataset, names), roi, "SegmentLabel")
        frames = _described_frames(dataset)
        stack = place_frames(dataset, frames, images, is_of_images=is_of_images)
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
    is_taken = np.zeros(max(chosen) + 1, dtype=bool)
    with refusing_malformed("SEG's pixel data"):
        for frame, k, segment in zip(_frames(dataset), stack.slice_of_frame, segments, strict=True):
            drawn = labels_of(frame, segment)
            is_taken[drawn] = True
            overlap = _unite(labels[:, :, k].T, drawn)
            overlaps.append(overlap + k * shape[0] * shape[1])
    taken = [number for number in chosen if is_taken[number]]
    warnings = list(stack.warnings)
    if len(taken) > 1 and roi is None:
        text = (
            f"segments {listed(taken)} united ({len(taken)} segments, each its own label): choose "
            "with --roi if not all of them are tumours"
        )
        warnings.append(Warning(Kind.REGIONS, text))
    categories = _categories(dataset)
    warnings += no_tumours(taken, categories, "SegmentedPropertyCategoryCodeSequence", "segment")
    n_overlaps = np.unique(np.concatenate(overlaps)).size
    if n_overlaps:
        text = f"segments overlap in {n_overlaps} voxels: they keep the lowest segment number"
        warnings.append(Warning(Kind.MASK, text))
    return Mask(labels, stack.affine, tuple(warnings), tuple(names[number] for number in taken))


def _foreground(dataset: Dataset, names: Mapping[int, str]) -> dict[int, str]:
    """Return the segments that are no background, which is number 0 of a label map."""
    if min(names) <= 0 and joined_text(dataset, "SegmentationType") != "LABELMAP":
        raise StudyError(
            f"a segment has the number {min(names)} ({tag_of('SegmentNumber')}), but segments "
            "count from 1: export the SEG again"
        )
    return {number: name for number, name in names.items() if number > 0}


def _categories(dataset: Dataset) -> dict[int, str]:
    """Return the categories of those segments that are no tumours by them."""
    found = {}
    for segment in items(dataset, "SegmentSequence"):
        for code in items(segment, "SegmentedPropertyCategoryCodeSequence"):
            category = NO_TUMOURS.get(joined_text(code, "CodeValue"))
            if category:
                found[whole_number(segment, "SegmentNumber")] = category
    return found


def _frames(dataset: Dataset) -> Iterator[NDArray[Any]]:
    """Yield the stored values (rows, columns) frame by frame."""
    # Slow to load, and needed for masks of this kind only.
    from pydicom.encaps import generate_frames
    from pydicom.pixels import iter_pixels

    n_frames = int(number(dataset, "NumberOfFrames") or 1)
    # A file that names no syntax is not compressed.
    syntax = dataset.file_meta.setdefault("TransferSyntaxUID", ExplicitVRLittleEndian).value
    if not dataset.get("PixelData"):
        raise StudyError(f"the SEG has no {tag_of('PixelData')}: export it again")
    if syntax == DEFLATED_FRAMES:
        frames = generate_frames(dataset.PixelData, number_of_frames=n_frames)
        yield from _unpacked(dataset, (_inflated(dataset, frame) for frame in frames))
        return
    if syntax.is_encapsulated:
        yield from _decoded(dataset, syntax, n_frames)
        return
    n_bits = dataset.Rows * dataset.Columns * n_frames * whole_number(dataset, "BitsAllocated")
    n_bytes = -(-n_bits // 8)
    if len(dataset.PixelData) not in (n_bytes, n_bytes + n_bytes % 2):
        raise StudyError(
            f"{tag_of('PixelData')} has {len(dataset.PixelData)} bytes, but rows x columns x "
            f"frames are {n_bytes}: its frames are cut off, or packed in another way than DICOM's; "
            "export the SEG again with another program, or give the mask as NIfTI"
        )
    if dataset.BitsAllocated > 1:
        yield from iter_pixels(dataset, raw=True)
        return
    # Not left to pydicom 3.0: it fails where a frame starts in the middle of a byte.
    packed = np.frombuffer(dataset.PixelData, dtype=np.uint8)
    n_pixels = dataset.Rows * dataset.Columns
    for start in range(0, n_pixels * n_frames, n_pixels):
        first_byte, skipped_bits = divmod(start, 8)
        end_byte = -(-(start + n_pixels) // 8)
        bits = np.unpackbits(packed[first_byte:end_byte], bitorder="little")
        yield bits[skipped_bits : skipped_bits + n_pixels].reshape(dataset.Rows, dataset.Columns)


def _decoded(dataset: Dataset, syntax: UID, n_frames: int) -> Iterator[NDArray[Any]]:
    # Slow to load, and needed for masks of this kind only.
    from pydicom.pixels import iter_pixels

    n_decoded = 0
    try:
        for frame in iter_pixels(dataset, raw=True, decoding_plugin=decoding_plugin(syntax)):
            yield frame
            n_decoded += 1
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise StudyError(
            f"the SEG's frames are compressed as {syntax.name} ({syntax}) and can't be decoded: "
            "export it again uncompressed, or give the mask as NIfTI"
        ) from error
    if n_decoded != n_frames:
        raise StudyError(
            f"{tag_of('PixelData')} has {n_decoded} frames, {tag_of('NumberOfFrames')} says "
            f"{n_frames}: export the SEG again"
        )


def _inflated(dataset: Dataset, frame: bytes) -> bytes:
    """Undo Deflated Image Frame Compression; no frame may grow beyond its pixels."""
    n_bytes = -(-dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8)
    inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, n_bytes + 2)
    if len(inflated) not in (n_bytes, n_bytes + n_bytes % 2):
        raise StudyError(
            f"a deflated frame of the SEG ({tag_of('PixelData')}, syntax {DEFLATED_FRAMES}) has "
            "not as many bytes as rows x columns: export it again uncompressed"
        )
    return inflated[:n_bytes]


def _unpacked(dataset: Dataset, frames: Iterable[bytes]) -> Iterator[NDArray[Any]]:
    shape = (dataset.Rows, dataset.Columns)
    for frame in frames:
        if dataset.BitsAllocated == 1:
            bits = np.unpackbits(np.frombuffer(frame, np.uint8), bitorder="little")
            yield bits[: math.prod(shape)].reshape(shape)
        else:
            yield np.frombuffer(frame, f"<u{dataset.BitsAllocated // 8}").reshape(shape)


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
