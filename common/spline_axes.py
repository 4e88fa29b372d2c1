"""How the axes of two grids run along each other, and what resampling does along each. Pure.

Which voxels lie inside the field of view, and which neighbour is nearest at half a voxel, hangs
on the last bit of a coordinate. Here are the very floats of nilearn and scipy: their arithmetic
in a few lines where the axes are not turned, which spares most runs the loading of scipy, and
their own functions for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.geometry import Grid, voxel_map

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
Weights = npt.NDArray[np.floating[Any]]

DRIFT_VOXELS = 5e-5
"""Grids count as parallel while a line of voxels strays at most this far [voxel] to either side:
room for directions stored in float32, at an error below 1e-4 of the range."""

# Coordinates this close to whole numbers [voxel] need no interpolation.
_WHOLE_VOXELS = 1e-6
# Spline weights below this share nothing with a result of that type.
_NEGLIGIBLE_WEIGHT = {np.float32: 1e-7, np.float64: 1e-16}
# Source voxels spanned by one block of a banded matrix: wide enough for BLAS, narrow enough
# to skip most of the zeros.
_BLOCK_VOXELS = 32
# Root of z**2 + 4 z + 1: what a voxel shares with a spline coefficient falls by it a voxel.
_POLE = 3**0.5 - 2
# Voxels beyond which that is below float64.
_REACH = 28


@dataclass(frozen=True)
class Line:
    """One axis of the source and the axis of the target that runs along it.

    Source index = `step` * target index + `start` [voxel]. Where not `exact`, scipy's coordinates
    carry traces of the other axes. `diagonal`: scipy takes its path for diagonal matrices,
    which rounds in another way.
    """

    n_source: int
    n_target: int
    target_axis: int
    step: float
    start: float
    exact: bool
    diagonal: bool


@dataclass(frozen=True)
class Block:
    """Dense part of a banded matrix: what source `columns` weigh in target `rows`."""

    rows: slice
    columns: slice
    weights: Weights


@dataclass(frozen=True)
class AxisStep:
    """What happens along one axis: target voxels `rows` come from source voxels `used`.

    `blocks` count from the first of either; without blocks voxels fall on voxels.
    """

    rows: slice
    used: slice
    blocks: tuple[Block, ...] = ()

    @property
    def n_rows(self) -> int:
        """Target voxels that `blocks` make."""
        stops: list[int] = [block.rows.stop for block in self.blocks]
        return max(stops)


def axis_lines(source: Grid, target: Grid) -> list[Line] | None:
    """Pair the axes of two grids, in the order of the source; None if they are not parallel."""
    to_source = voxel_map(source, target)
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    target_axes = np.abs(matrix).argmax(axis=1)
    if sorted(target_axes) != [0, 1, 2]:
        return None
    stray = matrix.copy()
    stray[np.arange(3), target_axes] = 0
    middle = (np.array(target.shape) - 1) / 2
    if (np.abs(stray) @ middle).max() > DRIFT_VOXELS:
        return None
    start = offset + stray @ middle
    exact = not stray.any()
    diagonal = np.array_equal(matrix, np.diag(np.diag(matrix)))
    return [
        Line(
            n_source=source.shape[axis],
            n_target=target.shape[target_axes[axis]],
            target_axis=int(target_axes[axis]),
            step=float(matrix[axis, target_axes[axis]]),
            start=float(start[axis]),
            exact=exact,
            diagonal=diagonal,
        )
        for axis in range(3)
    ]


def nearest_on_line(line: Line) -> npt.NDArray[np.intp]:
    """Nearest source voxel of each target voxel, -1 outside, both as scipy decides."""
    if line.diagonal:
        position = (np.arange(line.n_target) + line.start / line.step) * line.step
        outside = (position < 0) | (position > line.n_source - 1)
        return np.where(outside, -1, np.floor(position + 0.5)).astype(np.intp)
    # Slow to load; images turned to one orientation do not come here.
    from scipy import ndimage

    numbered = ndimage.affine_transform(
        np.arange(1, line.n_source + 1),
        [[line.step]],
        offset=line.start,
        output_shape=(line.n_target,),
        order=0,
    )
    nearest: npt.NDArray[np.intp] = numbered - 1
    return nearest


def axis_step(line: Line, precision: type[np.floating[Any]] = np.float32) -> AxisStep:
    """What cubic spline interpolation does along an axis."""
    position = line.step * np.arange(line.n_target, dtype=np.float64) + line.start
    if line.exact:
        inside = np.flatnonzero(nearest_on_line(line) >= 0)
    else:
        margin = 2 * DRIFT_VOXELS
        inside = np.flatnonzero((position >= -margin) & (position <= line.n_source - 1 + margin))
    if not inside.size:
        return AxisStep(slice(0, 0), slice(0, 0))
    rows = as_slice(inside)
    whole = np.rint(position[rows]).astype(int)
    if np.abs(position[rows] - whole).max() <= _WHOLE_VOXELS:
        return AxisStep(rows, as_slice(whole))
    blocks = _banded(spline_matrix(position[rows], line.n_source), abs(line.step), precision)
    first, last = blocks[0].columns.start, max(block.columns.stop for block in blocks)
    return AxisStep(
        rows,
        slice(first, last),
        tuple(
            Block(b.rows, slice(b.columns.start - first, b.columns.stop - first), b.weights)
            for b in blocks
        ),
    )


def as_slice(indices: npt.NDArray[np.int_]) -> slice:
    """The slice that picks evenly spaced indices, descending ones too."""
    if not len(indices):
        return slice(0, 0)
    first = int(indices[0])
    step = int(indices[1]) - first if len(indices) > 1 else 1
    stop = first + step * len(indices)
    return slice(first, stop if stop >= 0 else None, step)


def cubic_basis(fraction: FloatArray) -> FloatArray:
    """Weights (n, 4) of the cubic B-spline at n places, each a fraction [0, 1) past a voxel.

    They are those of the voxel before, the voxel itself, and the two after it.
    """
    t, u = fraction, 1 - fraction
    return np.stack([u**3, 4 - 3 * t**2 * (1 + u), 4 - 3 * u**2 * (1 + t), t**3], axis=1) / 6


def spline_matrix(position: FloatArray, n_source: int) -> FloatArray:
    """Cubic spline interpolation along a line whose values go on mirrored beyond its ends.

    Parameters
    ----------
    position : (n_target,) array
        [source voxel]
    n_source : int

    Returns
    -------
    (n_target, n_source) array
        Prefilter and basis in one, as ``mode="mirror"`` of `scipy.ndimage` has them.

    Notes
    -----
    Unser, IEEE Signal Processing Magazine 1999;16(6):22-38: the prefilter answers an impulse by
    sqrt(3) (sqrt(3) - 2)^distance, and the cubic B-spline has four weights.
    """
    floor = np.floor(position)
    taps, reach = np.arange(-1, 3), np.arange(-_REACH, _REACH + 2)
    prefilter = 3**0.5 * _POLE ** np.abs(taps[:, None] - reach)
    period = max(1, 2 * (n_source - 1))
    source = (floor[:, None].astype(int) + reach) % period
    mirrored = np.minimum(source, period - source) if n_source > 1 else source
    matrix = np.zeros((len(position), n_source))
    np.add.at(
        matrix,
        (np.arange(len(position))[:, None], mirrored),
        cubic_basis(position - floor) @ prefilter,
    )
    return matrix


def _banded(matrix: FloatArray, step: float, precision: type[np.floating[Any]]) -> list[Block]:
    """Cut a banded matrix into dense blocks, those of the first source voxels first."""
    height = max(1, round(_BLOCK_VOXELS / step))
    blocks = []
    for first in range(0, len(matrix), height):
        band = matrix[first : first + height]
        columns = np.flatnonzero((np.abs(band) > _NEGLIGIBLE_WEIGHT[precision]).any(axis=0))
        window = slice(int(columns[0]), int(columns[-1]) + 1)
        weights = np.ascontiguousarray(band[:, window], dtype=precision)
        blocks.append(Block(slice(first, first + len(band)), window, weights))
    return sorted(blocks, key=lambda block: block.columns.start)
