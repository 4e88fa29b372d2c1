"""Masks that are less than the image they were drawn on: crops, and one file a lesion. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import Kind, StudyError, Warning
from common.geometry import SAME_VOXEL, Grid, Image, corners, moved, voxel_map

SAME_LATTICE = 1e-3
"""Distance [voxels] up to which voxels of two grids are the same: what float32 affines leave."""

LARGEST_VOLUME = 2**31
"""Voxels beyond which a union is taken as one of files that do not belong together."""

Array = NDArray[Any]


@dataclass(frozen=True)
class _Part:
    """Which voxels of a grid those of another are.

    `axes` and `turns` bring the other's array axes into the grid's order and direction (1 or -1);
    its voxels then begin at `start`, and end before `stop`.
    """

    axes: tuple[int, ...]
    turns: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def array(self, data: Array) -> Array:
        turned = data.transpose(self.axes)
        return turned[tuple(slice(None, None, turn) for turn in self.turns)]

    def is_within(self, shape: Sequence[int]) -> bool:
        """Whether a grid of this shape has all the voxels."""
        return min(self.start) >= 0 and bool(np.less_equal(self.stop, shape).all())


def _part_of(grid: Grid, other: Grid) -> _Part | None:
    """Which voxels of `grid`, or of its lattice beyond it, those of the other are; None if none."""
    to_grid = voxel_map(grid, other)
    steps = np.rint(to_grid[:3, :3])
    if not np.array_equal(np.abs(steps) @ np.ones(3), np.ones(3)) or abs(np.linalg.det(steps)) != 1:
        return None
    own = corners(other.shape)
    there = moved(to_grid, own)
    if np.abs(there - (steps @ own + np.rint(to_grid[:3, 3:]))).max() > SAME_LATTICE:
        return None
    voxels = np.rint(there).astype(int)
    return _Part(
        tuple(np.abs(steps).argmax(axis=1).tolist()),
        tuple(steps.sum(axis=1).astype(int).tolist()),
        tuple(voxels.min(axis=1).tolist()),
        tuple((voxels.max(axis=1) + 1).tolist()),
    )


def _on_grid(grid: Grid, data: Array, start: Sequence[int], stop: Sequence[int]) -> Image:
    """Labels on a grid of which their voxels are a part, 0 around them."""
    whole = np.zeros(grid.shape, data.dtype, order="F")
    whole[tuple(map(slice, start, stop))] = data
    return Image(whole, grid.affine)


def embedded(mask: Image, *drawn_on: Grid) -> Image:
    """Return a mask of DICOM frames on the grid of the image that they were drawn on.

    Positions of frames are rounded, and of a single one nothing tells the next slice: unlike in
    `completed` voxels are the same up to `SAME_VOXEL`, and only the corners must meet.

    Parameters
    ----------
    mask : Image
        Its axes run as those of the image.
    drawn_on : Grid
        The grids of the images that it may have been drawn on, the likeliest first.

    Returns
    -------
    Image
        On the first of these grids of which its voxels are a part; else the mask as it is.
    """
    own = corners(mask.data.shape)
    for grid in drawn_on:
        there = moved(voxel_map(grid, mask.grid), own)
        start = np.rint(there[:, 0]).astype(int)
        stop = start + mask.data.shape
        is_shift = np.abs(there - own - start[:, np.newaxis]).max() <= SAME_VOXEL
        if is_shift and (start >= 0).all() and (stop <= grid.shape).all():
            return _on_grid(grid, mask.data, start.tolist(), stop.tolist())
    return mask


def completed(mask: Image, *drawn_on: Grid) -> Image:
    """Return a mask that was cropped with what the crop left out: voxels without a label.

    Parameters
    ----------
    mask : Image
    drawn_on : Grid
        The grids of the images that it may be a crop of, those of the PET and the CT.

    Returns
    -------
    Image
        On the first of these grids that has the mask's voxels and more. Else the mask as it is,
        with a border of one voxel where a label touches the end of its box: by nearest neighbour
        what lies beyond the last voxel's centre is outside, and so half a voxel would be lost.
    """
    for grid in drawn_on:
        part = _part_of(grid, mask.grid)
        if part is None or not part.is_within(grid.shape):
            continue
        if part.stop == grid.shape and not any(part.start):
            return mask
        return _on_grid(grid, part.array(mask.data), part.start, part.stop)
    if not any(mask.data.take(end, axis).any() for axis in range(3) for end in (0, -1)):
        return mask
    affine = mask.affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(axis=1)
    data = np.zeros([n + 2 for n in mask.data.shape], mask.data.dtype, order="F")
    data[1:-1, 1:-1, 1:-1] = mask.data
    return Image(data, affine)


def united(masks: Sequence[Image]) -> tuple[Image, tuple[Warning, ...]]:
    """Unite masks of one lesion each; what the first of them labels becomes 1, of the second 2.

    Parameters
    ----------
    masks : Image
        On one lattice of voxels, each of its own extent.

    Returns
    -------
    mask : Image
        On the grid of the first mask, made larger where others reach beyond it.
    warnings : tuple of Warning
        How many were united; which are empty, or hold several labels; what several of them label.

    Raises
    ------
    StudyError
        Their voxels are not the same.
    """
    first = masks[0]
    parts = [_part_of(first.grid, mask.grid) for mask in masks]
    different = [number for number, part in enumerate(parts, start=1) if part is None]
    if different:
        raise StudyError(
            f"mask file {different[0]} of {len(masks)}, in the order of their names, has other "
            "voxels than the first: export all of them on one grid"
        )
    found = [part for part in parts if part is not None]
    low = np.min([part.start for part in found], axis=0)
    shape = np.max([part.stop for part in found], axis=0) - low
    if math.prod(shape.tolist()) > LARGEST_VOLUME:
        raise StudyError(
            f"the mask files lie far apart (together {shape.tolist()} voxels): export all of them "
            "on one grid"
        )
    data = np.zeros(shape, np.min_scalar_type(len(masks)), order="F")
    affine = first.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    empty, several, n_twice = [], [], 0
    for number, (mask, part) in enumerate(zip(masks, found, strict=True), start=1):
        labelled = part.array(mask.data) > 0
        place = data[tuple(map(slice, part.start - low, part.stop - low))]
        n_twice += int(np.count_nonzero(place[labelled]))
        # What an earlier file labels stays its.
        place[labelled & (place == 0)] = number
        if not labelled.any():
            empty.append(number)
        elif np.ptp(mask.data[mask.data > 0]):
            several.append(number)
    texts = [
        f"{len(masks)} mask files are united: they are labels 1 to {len(masks)} in the order of "
        "their names"
    ]
    if empty:
        texts.append(f"mask file(s) {', '.join(map(str, empty))} label nothing")
    if several:
        texts.append(
            f"mask file(s) {', '.join(map(str, several))} hold several labels: they become one, "
            "that of their file"
        )
    if n_twice:
        texts.append(
            f"{n_twice * first.grid.voxel_ml:.3g} ml are labelled by several mask files: the first "
            "of them counts"
        )
    return Image(data, affine), tuple(Warning(Kind.MASK, text) for text in texts)
