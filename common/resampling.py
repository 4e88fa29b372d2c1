"""Images onto another voxel grid: the results of nilearn, an order of magnitude sooner.

Cubic spline interpolation between grids with parallel axes is separable: along each axis it is
one banded matrix (spline prefilter times spline basis), which scipy itself yields by
interpolating an identity matrix. A volume is then resampled plane by plane in a few small
matrix products, straight from its stored type; flips and axis order are folded into strides and
matrices, and an axis whose voxels fall on voxels is only sliced.

Which voxels lie inside the field of view, and which neighbour is nearest at half a voxel, hangs
on the last bit of a coordinate. Those decisions are therefore never derived here: scipy takes
them, from the very floats that nilearn would hand it. Grids that are not parallel go to nilearn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import linalg, ndimage

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
Image = npt.NDArray[np.float32]

_AXIS_OF_CODE = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}

# Grids count as parallel while a line of voxels strays at most this far [voxel] to either side:
# room for directions stored in float32, at an error below 1e-4 of the range.
_DRIFT_VOXELS = 5e-5
# Coordinates this close to whole numbers [voxel] need no interpolation.
_WHOLE_VOXELS = 1e-6
# Spline weights below this share nothing with a float32 result.
_NEGLIGIBLE_WEIGHT = 1e-7
# Source voxels spanned by one block of a banded matrix: wide enough for BLAS, narrow enough
# to skip most of the zeros.
_BLOCK_VOXELS = 32


@dataclass(frozen=True, eq=False)
class Grid:
    """A voxel grid in space.

    Parameters
    ----------
    shape : tuple of int
        Number of voxels along x, y, z.
    affine : (4, 4) array
        Voxel index -> RAS+ mm; kept as a read-only float64 copy.

    Raises
    ------
    ValueError
        If the shape is not three positive numbers or the affine is no finite, invertible
        voxel -> mm transform.
    """

    shape: tuple[int, int, int]
    affine: FloatArray

    def __post_init__(self) -> None:
        nx, ny, nz = (int(n) for n in self.shape)
        affine = np.array(self.affine, dtype=np.float64, order="C")
        if min(nx, ny, nz) < 1:
            raise ValueError(f"grid shape {self.shape} is not three positive numbers")
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError("grid affine is not a finite 4 x 4 matrix")
        if not np.array_equal(affine[3], (0, 0, 0, 1)) or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            raise ValueError("grid affine can't be inverted")
        affine.flags.writeable = False
        object.__setattr__(self, "shape", (nx, ny, nz))
        object.__setattr__(self, "affine", affine)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, (self.affine + 0.0).tobytes()))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along x, y, z [mm]."""
        dx, dy, dz = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).tolist()
        return dx, dy, dz

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel [ml], of sheared grids too."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000


def reorient(array: Array, affine: FloatArray, orientation: str) -> tuple[Array, FloatArray]:
    """Permute and flip the axes of an image so that they point the way asked for.

    Parameters
    ----------
    array : (X, Y, Z) array
    affine : (4, 4) array
        Voxel -> RAS+ mm. An oblique axis counts as the anatomical axis it is closest to, as
        nibabel's ``io_orientation`` decides.
    orientation : str
        Where the array axes point to, such as ``LAS``: one each of L/R, A/P and S/I.

    Returns
    -------
    array : view of the input
    affine : (4, 4) float64 array
        Every voxel stays where it was in space.

    Raises
    ------
    ValueError
        If `orientation` is none of the 48 codes, or the affine has an axis without direction.
    """
    from nibabel import orientations

    if sorted(_AXIS_OF_CODE.get(code, 3) for code in orientation) != [0, 1, 2]:
        raise ValueError(f"orientation {orientation!r} is not one each of L/R, A/P and S/I")
    current = orientations.io_orientation(affine)
    if np.isnan(current).any():
        raise ValueError("affine has an axis without direction")
    change = orientations.ornt_transform(current, orientations.axcodes2ornt(orientation))
    turned: Array = orientations.apply_orientation(array, change)
    new_affine: FloatArray = affine @ orientations.inv_ornt_aff(change, array.shape)
    return turned, new_affine


def target_grid(
    ct: Grid,
    spacing_mm: Sequence[float],
    shape: Sequence[int],
    align: Literal["center", "corner"] = "center",
) -> Grid:
    """Grid with the axes and directions of the CT and a given voxel size and shape.

    Parameters
    ----------
    ct : Grid
        The CT, reoriented.
    spacing_mm : three floats
    shape : (X, Y) or (X, Y, Z)
        Without Z, voxel 0 of both grids coincides along the third axis, which is the inferior
        end for orientations such as LAS (the superior end where the third axis points to I),
        and Z is the number of whole target voxels that the CT's voxels fill, at least 1.
    align : {"center", "corner"}
        ``center``: the middles of both voxel grids, (n - 1) / 2, coincide in x and y, and in z
        where Z is given. ``corner``: voxel 0 of both coincides.

    Raises
    ------
    ValueError
        If a spacing or a number of voxels is not positive, or `align` is unknown.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError(f"spacing {tuple(spacing_mm)} is not three positive lengths in mm")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"shape {tuple(shape)} is not two or three positive numbers")
    if align not in ("center", "corner"):
        raise ValueError(f"align {align!r} is neither 'center' nor 'corner'")
    ct_spacing = np.array(ct.spacing_mm)
    # 1e-6: an extent of 326 x 3 mm, stored with rounding, still holds 326 voxels of 3 mm.
    filled = math.floor(ct.shape[2] * ct_spacing[2] / spacing[2] + 1e-6)
    n_target = (shape[0], shape[1], shape[2] if len(shape) == 3 else max(1, filled))
    directions = ct.affine[:3, :3] / ct_spacing
    lead_mm = ((np.array(ct.shape) - 1) * ct_spacing - (np.array(n_target) - 1) * spacing) / 2
    if align == "corner":
        lead_mm[:] = 0
    elif len(shape) == 2:
        lead_mm[2] = 0
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = ct.affine[:3, 3] + directions @ lead_mm
    return Grid(n_target, affine)


def separable(source: Grid, target: Grid) -> bool:
    """Whether :func:`resample_cubic` can take its fast path between two grids.

    Unsigned or non-finite volumes go to nilearn all the same.
    """
    return _same_for_nilearn(source, target) or _axis_lines(source, target) is not None


def resample_cubic(
    volume: Array, source: Grid, target: Grid, fill_value: float = 0.0, *, clip: bool = True
) -> Image:
    """Interpolate an image by cubic splines.

    Parameters
    ----------
    volume : (X, Y, Z) array of integers or floats
        Any strides: a reoriented view costs no copy.
    source, target : Grid
    fill_value : float
        For voxels whose centre lies outside the box of the source's voxel centres.
    clip : bool
        Keep the result, `fill_value` included, within the values of `volume` and 0.

    Returns
    -------
    (X, Y, Z) float32 array on the target grid, its memory in the axis order of `volume`
        What ``nilearn.image.resample_img(..., interpolation="continuous")`` returns, with
        `clip` its default of True, and of ``resample_to_img``, whose default is False; to 1e-5
        of the range of `volume` (1e-4 where two oblique affines agree only to float32).
        Where `source` and `target` are the same to 1e-5, nilearn returns the image as it is.
        Unlike nilearn, a target beside the image is not an error: it holds `fill_value`.

    Notes
    -----
    nilearn itself runs for grids that are not parallel, for unsigned integers (whose results
    it rounds, ties at the mercy of the last bit) and for volumes with NaN or infinities.
    """
    if _same_for_nilearn(source, target):
        return volume.astype(np.float32)
    lines = _axis_lines(source, target)
    # Minimum or maximum is NaN or infinite if any voxel is.
    bounds = (float(min(volume.min(), 0)), float(max(volume.max(), 0)))
    if lines is None or volume.dtype.kind == "u" or not np.isfinite(bounds).all():
        return _nilearn_cubic(volume, source, target, fill_value, clip)
    if clip:
        fill_value = min(max(fill_value, bounds[0]), bounds[1])

    slow_to_fast = _memory_order(volume)
    lines = [lines[axis] for axis in slow_to_fast]
    steps = [_axis_step(line) for line in lines]
    out = np.full([line.n_target for line in lines], fill_value, dtype=np.float32)
    inside = out[tuple(step.rows for step in steps)]
    if inside.size:
        used = volume.transpose(slow_to_fast)[tuple(step.used for step in steps)]
        _resample_planes(used, steps, inside, bounds if clip else None)
    out = np.moveaxis(out, (0, 1, 2), [line.target_axis for line in lines])
    if not all(line.exact for line in lines):
        out[_outside(source, target)] = fill_value
    return out


def resample_nearest(labels: Array, source: Grid, target: Grid) -> Array:
    """Take the nearest label; 0 outside the box of the source's voxel centres.

    Parameters
    ----------
    labels : (X, Y, Z) array
        Any dtype without NaN.
    source, target : Grid

    Returns
    -------
    (X, Y, Z) array of the dtype of `labels`
        Voxel for voxel what ``nilearn.image.resample_to_img(..., interpolation="nearest")``
        returns, half voxels included.
    """
    if _same_for_nilearn(source, target):
        return labels.copy()
    lines = _axis_lines(source, target)
    if lines is None or not all(line.exact for line in lines):
        return _scipy_nearest(labels, source, target)
    slow_to_fast = _memory_order(labels)
    lines = [lines[axis] for axis in slow_to_fast]
    out = np.zeros([line.n_target for line in lines], dtype=labels.dtype)
    nearest = [_nearest_on_line(line) for line in lines]
    inside = [np.flatnonzero(line >= 0) for line in nearest]
    picks = np.ix_(*(line[rows] for line, rows in zip(nearest, inside, strict=True)))
    out[tuple(_as_slice(rows) for rows in inside)] = labels.transpose(slow_to_fast)[picks]
    return np.moveaxis(out, (0, 1, 2), [line.target_axis for line in lines])


@dataclass(frozen=True)
class _Line:
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
class _Block:
    """Dense part of a banded matrix: what source `columns` weigh in target `rows`."""

    rows: slice
    columns: slice
    weights: Image


@dataclass(frozen=True)
class _AxisStep:
    """What happens along one axis: target voxels `rows` come from source voxels `used`.

    `blocks` count from the first of either; without blocks voxels fall on voxels.
    """

    rows: slice
    used: slice
    blocks: tuple[_Block, ...] = ()


def _same_for_nilearn(source: Grid, target: Grid) -> bool:
    return source.shape == target.shape and np.allclose(target.affine, source.affine)


def _voxel_map(source: Grid, target: Grid) -> FloatArray:
    """Target index -> source index, (4, 4), in the very floats that nilearn computes."""
    if np.array_equal(target.affine, source.affine):
        return np.eye(4)
    voxel_map: FloatArray = np.dot(linalg.inv(source.affine), target.affine)
    return voxel_map


def _axis_lines(source: Grid, target: Grid) -> list[_Line] | None:
    """Pair the axes of two grids, in the order of the source; None if they are not parallel."""
    voxel_map = _voxel_map(source, target)
    matrix, offset = voxel_map[:3, :3], voxel_map[:3, 3]
    target_axes = np.abs(matrix).argmax(axis=1)
    if sorted(target_axes) != [0, 1, 2]:
        return None
    stray = matrix.copy()
    stray[np.arange(3), target_axes] = 0
    middle = (np.array(target.shape) - 1) / 2
    if (np.abs(stray) @ middle).max() > _DRIFT_VOXELS:
        return None
    start = offset + stray @ middle
    exact = not stray.any()
    diagonal = np.array_equal(matrix, np.diag(np.diag(matrix)))
    return [
        _Line(
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


def _nearest_on_line(line: _Line) -> npt.NDArray[np.intp]:
    """Nearest source voxel of each target voxel, -1 outside, both as scipy decides."""
    numbered = ndimage.affine_transform(
        np.arange(1, line.n_source + 1),
        [line.step] if line.diagonal else [[line.step]],
        offset=line.start,
        output_shape=(line.n_target,),
        order=0,
    )
    nearest: npt.NDArray[np.intp] = numbered - 1
    return nearest


def _scipy_nearest(labels: Array, source: Grid, target: Grid) -> Array:
    """What nilearn calls for interpolation="nearest" and a matrix that is not diagonal."""
    voxel_map = _voxel_map(source, target)
    nearest: Array = ndimage.affine_transform(
        labels,
        voxel_map[:3, :3],
        offset=voxel_map[:3, 3],
        output_shape=target.shape,
        order=0,
    )
    return nearest


def _outside(source: Grid, target: Grid) -> npt.NDArray[np.bool_]:
    """Target voxels outside the source, where rounding may fray the border voxel by voxel."""
    ones = np.broadcast_to(np.uint8(1), source.shape)
    outside: npt.NDArray[np.bool_] = _scipy_nearest(ones, source, target) == 0
    return outside


def _memory_order(array: Array) -> list[int]:
    """Axes from the slowest to the fastest: in this order memory is read from end to end."""
    return sorted(range(3), key=lambda axis: -abs(array.strides[axis]))


def _axis_step(line: _Line) -> _AxisStep:
    position = line.step * np.arange(line.n_target) + line.start
    if line.exact:
        inside = np.flatnonzero(_nearest_on_line(line) >= 0)
    else:
        margin = 2 * _DRIFT_VOXELS
        inside = np.flatnonzero((position >= -margin) & (position <= line.n_source - 1 + margin))
    if not inside.size:
        return _AxisStep(slice(0, 0), slice(0, 0))
    rows = _as_slice(inside)
    whole = np.rint(position[rows]).astype(int)
    if np.abs(position[rows] - whole).max() <= _WHOLE_VOXELS:
        return _AxisStep(rows, _as_slice(whole))
    blocks = _banded(_spline_matrix(line)[rows], abs(line.step))
    first, last = blocks[0].columns.start, max(block.columns.stop for block in blocks)
    return _AxisStep(
        rows,
        slice(first, last),
        tuple(
            _Block(b.rows, slice(b.columns.start - first, b.columns.stop - first), b.weights)
            for b in blocks
        ),
    )


def _as_slice(indices: npt.NDArray[np.int_]) -> slice:
    """The slice that picks evenly spaced indices, descending ones too."""
    if not len(indices):
        return slice(0, 0)
    first = int(indices[0])
    step = int(indices[1]) - first if len(indices) > 1 else 1
    stop = first + step * len(indices)
    return slice(first, stop if stop >= 0 else None, step)


def _spline_matrix(line: _Line) -> FloatArray:
    """Cubic spline interpolation along a line, (n_target, n_source): prefilter and basis."""
    matrix: FloatArray = ndimage.affine_transform(
        np.eye(line.n_source),
        [line.step, 1],
        offset=[line.start, 0],
        output_shape=(line.n_target, line.n_source),
        order=3,
        mode="mirror",
    )
    return matrix


def _banded(matrix: FloatArray, step: float) -> list[_Block]:
    """Cut a banded matrix into dense blocks, those of the first source voxels first."""
    height = max(1, round(_BLOCK_VOXELS / step))
    blocks = []
    for first in range(0, len(matrix), height):
        band = matrix[first : first + height]
        columns = np.flatnonzero((np.abs(band) > _NEGLIGIBLE_WEIGHT).any(axis=0))
        window = slice(int(columns[0]), int(columns[-1]) + 1)
        weights = np.ascontiguousarray(band[:, window], dtype=np.float32)
        blocks.append(_Block(slice(first, first + len(band)), window, weights))
    return sorted(blocks, key=lambda block: block.columns.start)


def _resample_planes(
    used: Array, steps: Sequence[_AxisStep], inside: Image, bounds: tuple[float, float] | None
) -> None:
    """Resample along all axes into `inside`, clipped to `bounds`, holding few planes at a time."""
    slow, rows, columns = steps
    if not slow.blocks:
        for plane, result in zip(used, inside, strict=True):
            _resample_plane(plane, rows, columns, result)
            _clip(result, bounds)
        return
    depth = max(block.columns.stop - block.columns.start for block in slow.blocks)
    window = np.empty((depth, *inside.shape[1:]), dtype=np.float32)
    first = done = 0
    for block in slow.blocks:
        start, stop = block.columns.start, block.columns.stop
        kept = max(0, done - start)
        window[:kept] = window[start - first : start - first + kept]
        for index in range(start + kept, stop):
            _resample_plane(used[index], rows, columns, window[index - start])
        first, done = start, stop
        stacked = block.weights @ window[: stop - start].reshape(stop - start, -1)
        _clip(stacked, bounds)
        inside[block.rows] = stacked.reshape(-1, *inside.shape[1:])


def _resample_plane(plane: Array, rows: _AxisStep, columns: _AxisStep, result: Image) -> None:
    values = np.ascontiguousarray(plane, dtype=np.float32)
    if rows.blocks:
        between = np.empty((result.shape[0], values.shape[1]), dtype=np.float32)
        for block in rows.blocks:
            np.matmul(block.weights, values[block.columns], out=between[block.rows])
        values = between
    if not columns.blocks:
        result[...] = values
    for block in columns.blocks:
        np.matmul(values[:, block.columns], block.weights.T, out=result[:, block.rows])


def _clip(values: Image, bounds: tuple[float, float] | None) -> None:
    if bounds is not None:
        np.clip(values, *bounds, out=values)


def _nilearn_cubic(
    volume: Array, source: Grid, target: Grid, fill_value: float, clip: bool
) -> Image:
    from nibabel import Nifti1Image
    from nilearn.image import resample_img
    from nilearn.image.resampling import BoundingBoxError

    if volume.dtype == np.int64:  # Images of int64 are refused by nibabel.
        volume = volume.astype(np.float64)
    with warnings.catch_warnings():
        # Nothing a user could act on: integers cast to floats, binary images, NaN.
        warnings.simplefilter("ignore")
        try:
            image = resample_img(
                Nifti1Image(volume, source.affine),
                target_affine=target.affine,
                target_shape=target.shape,
                interpolation="continuous",
                fill_value=fill_value,
                clip=clip,
                force_resample=True,
                copy_header=True,
            )
        except BoundingBoxError:
            if clip:
                fill_value = np.clip(
                    fill_value, min(np.nanmin(volume), 0), max(np.nanmax(volume), 0)
                )
            return np.full(target.shape, fill_value, dtype=np.float32)
    return np.asarray(image.dataobj, dtype=np.float32)
