"""Images onto another voxel grid: the results of nilearn, an order of magnitude sooner.

Cubic spline interpolation between grids with parallel axes is separable: along each axis it is
one banded matrix, spline prefilter times spline basis (`spline_axes`). A volume is then resampled
plane by plane in a few small matrix products, straight from its stored type; flips and axis order
are folded into strides and matrices, and an axis whose voxels fall on voxels is only sliced.
Grids that are not parallel go to nilearn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.components import labelled_lines
from common.geometry import Grid, extremes, slow_to_fast, voxel_map
from common.spline_axes import (
    AxisStep,
    as_slice,
    axis_lines,
    axis_step,
    nearest_on_line,
)

Array = npt.NDArray[Any]
Image = npt.NDArray[np.float32]

_LARGEST = 1e30
"""Values from here on are left to nilearn, which computes in float64."""


def separable(source: Grid, target: Grid) -> bool:
    """Whether :func:`resample_cubic` can take its fast path between two grids.

    Volumes with NaN or infinities go to nilearn all the same.
    """
    return _same_for_nilearn(source, target) or axis_lines(source, target) is not None


def resample_cubic(
    volume: Array,
    source: Grid,
    target: Grid,
    fill_value: float = 0.0,
    *,
    clip: bool = True,
    known_extremes: tuple[float, float] | None = None,
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
    known_extremes : (float, float), optional
        Least and greatest value of `volume`, where they need not be looked for.

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
    nilearn itself runs for grids that are not parallel, and for volumes with NaN, infinities or
    values so large that products of theirs may become infinite.
    Results of unsigned integers are whole numbers, as nilearn's are: they are computed in float64,
    so that no more than ties, which hang on the last bit, may be rounded the other way.
    """
    if _same_for_nilearn(source, target):
        return volume.astype(np.float32)
    lines = axis_lines(source, target)
    least, greatest = extremes(volume) if known_extremes is None else known_extremes
    if lines is None or not -_LARGEST < least <= greatest < _LARGEST:
        return _nilearn_cubic(volume, source, target, fill_value, clip)
    # Of the volume and 0, or what unsigned integers can hold.
    bounds: tuple[float, float] | None = None
    if clip:
        bounds = min(least, 0.0), max(greatest, 0.0)
    elif volume.dtype.kind == "u":
        bounds = 0.0, float(np.iinfo(volume.dtype).max)
    finish = _Finish(volume.dtype.kind == "u", bounds)

    order = slow_to_fast(volume)
    lines = [lines[axis] for axis in order]
    steps = [axis_step(line, finish.precision) for line in lines]
    out = np.empty([line.n_target for line in lines], dtype=np.float32)
    inside = out[tuple(step.rows for step in steps)]
    fill_value = finish(np.array(fill_value, finish.precision)).item()
    if inside.size < out.size:
        out[...] = fill_value
    if inside.size:
        used = volume.transpose(order)[tuple(step.used for step in steps)]
        _resample_planes(used, steps, inside, finish)
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
    lines = axis_lines(source, target)
    if lines is None or not all(line.exact for line in lines):
        return _scipy_nearest(labels, source, target)
    order = slow_to_fast(labels)
    lines = [lines[axis] for axis in order]
    out = np.zeros([line.n_target for line in lines], dtype=labels.dtype)
    nearest = [nearest_on_line(line) for line in lines]
    inside = [np.flatnonzero(line >= 0) for line in nearest]
    slow, rows, columns = (line[axis] for line, axis in zip(nearest, inside, strict=True))
    volume = labels.transpose(order)
    # Most lines hold no label, and zeros are there already.
    found = labelled_lines(volume)[np.ix_(slow, rows)]
    picked = volume[np.repeat(slow, found.sum(axis=1)), np.broadcast_to(rows, found.shape)[found]]
    part = out[tuple(as_slice(axis) for axis in inside)]
    part[found] = picked[:, columns]
    return np.moveaxis(out, (0, 1, 2), [line.target_axis for line in lines])


def _same_for_nilearn(source: Grid, target: Grid) -> bool:
    return source.shape == target.shape and np.allclose(target.affine, source.affine)


def _scipy_nearest(labels: Array, source: Grid, target: Grid) -> Array:
    """What nilearn calls for interpolation="nearest" and a matrix that is not diagonal."""
    # Slow to load, and needed for turned images only.
    from scipy import ndimage

    to_source = voxel_map(source, target)
    nearest: Array = ndimage.affine_transform(
        labels,
        to_source[:3, :3],
        offset=to_source[:3, 3],
        output_shape=target.shape,
        order=0,
    )
    return nearest


def _outside(source: Grid, target: Grid) -> npt.NDArray[np.bool_]:
    """Target voxels outside the source, where rounding may fray the border voxel by voxel."""
    ones = np.broadcast_to(np.uint8(1), source.shape)
    outside: npt.NDArray[np.bool_] = _scipy_nearest(ones, source, target) == 0
    return outside


@dataclass(frozen=True)
class _Finish:
    """What becomes of interpolated values: `whole` numbers, within `bounds`."""

    whole: bool
    bounds: tuple[float, float] | None

    @property
    def precision(self) -> type[np.floating[Any]]:
        return np.float64 if self.whole else np.float32

    def __call__(self, values: Array) -> Array:
        if self.whole:
            values = np.floor(values + 0.5)
        return values if self.bounds is None else np.clip(values, *self.bounds)


def _resample_planes(
    used: Array, steps: Sequence[AxisStep], inside: Image, finish: _Finish
) -> None:
    """Resample along all axes into `inside`, holding few planes at a time."""
    slow, rows, columns = steps
    if not slow.blocks:
        for plane, result in zip(used, inside, strict=True):
            result[...] = finish(_resampled_plane(plane, rows, columns, finish.precision))
        return
    depth = max(block.columns.stop - block.columns.start for block in slow.blocks)
    window = np.empty((depth, *inside.shape[1:]), finish.precision)
    first = done = 0
    for block in slow.blocks:
        start, stop = block.columns.start, block.columns.stop
        kept = max(0, done - start)
        window[:kept] = window[start - first : start - first + kept]
        for index in range(start + kept, stop):
            window[index - start] = _resampled_plane(used[index], rows, columns, finish.precision)
        first, done = start, stop
        stacked = block.weights @ window[: stop - start].reshape(stop - start, -1)
        inside[block.rows] = finish(stacked).reshape(-1, *inside.shape[1:])


def _resampled_plane(
    plane: Array, rows: AxisStep, columns: AxisStep, precision: type[np.floating[Any]]
) -> Array:
    values: Array = np.ascontiguousarray(plane, dtype=precision)
    if rows.blocks:
        between = np.empty((rows.n_rows, values.shape[1]), precision)
        for block in rows.blocks:
            np.matmul(block.weights, values[block.columns], out=between[block.rows])
        values = between
    if columns.blocks:
        result = np.empty((values.shape[0], columns.n_rows), precision)
        for block in columns.blocks:
            np.matmul(values[:, block.columns], block.weights.T, out=result[:, block.rows])
        values = result
    return values


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
