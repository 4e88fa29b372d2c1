"""Rotated maximum-intensity projections (MIPs), fast and equal to scipy; their angles' names. Pure.

For every angle the results are those of ::

    rotate(volume, angle, axes=(1, 0), reshape=False, order=3, mode="constant", cval=0)

of `scipy.ndimage` (masks: ``order=0``), followed by ``np.max`` along y. The rotation is about z, so
it is one sparse operator on the x-y plane, the same for every z and every channel:

* images: one cubic-spline prefilter a study, then 16 weights a pixel and angle. The rotated planes
  are made a strip of x at a time, small enough for the processor's cache, and reduced there;
* angles a quarter turn apart share one rotated volume, projected along y and along x;
* masks: scipy rotates a plane of voxel numbers, by which the labelled columns are gathered.

Operators are not kept from study to study: building one takes a sixth of the time of using it, and
holding those of 36 angles would take 77 MB at 200 x 200 and four times that at 400 x 400.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from common.spline_axes import cubic_basis

if TYPE_CHECKING:
    from scipy import sparse

ANGLE_DECIMALS = 6
MAX_ANGLES = 3_600


def projection_angles(start: float, stop: float, step: float) -> tuple[float, ...]:
    """Angles START, START + STEP, ... < STOP.

    They are counted in decimals, as they were typed: ``0 1 0.1`` gives 10 angles, not 11.

    Parameters
    ----------
    start, stop, step : float
        [degrees]

    Returns
    -------
    tuple of float
        Angles [degrees], each with a name of its own (`angle_name`).

    Raises
    ------
    ValueError
        The range is empty, not finite or has too many angles, STEP is not positive, an angle is
        outside [0, 1000) or has more decimals than a name can hold.
    """
    for name, value in (("START", start), ("STOP", stop), ("STEP", step)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: give a finite number of degrees")
    if step <= 0:
        raise ValueError(f"STEP is {step}: give a number of degrees above 0")
    if start >= stop:
        raise ValueError(f"no angle from START {start} to below STOP {stop}: raise STOP")
    _check_decimals("STEP", step)
    angle_name(start)

    first, limit, stride = (Decimal(repr(float(value))) for value in (start, stop, step))
    count = math.ceil((limit - first) / stride)
    if count > MAX_ANGLES:
        raise ValueError(f"more than {MAX_ANGLES} angles: raise STEP or lower STOP")
    angles = tuple(float(first + number * stride) for number in range(count))
    angle_name(angles[-1])
    return angles


def angle_name(angle: float) -> str:
    """Name of an angle: three digits, and as few decimals as it needs.

    Parameters
    ----------
    angle : float
        [degrees]

    Returns
    -------
    str
        ``035`` for 35, ``007.5`` for 7.5; ``float`` of it is `angle` again.

    Raises
    ------
    ValueError
        The angle is outside [0, 1000) or has more than six decimals: names would collide.
    """
    if not 0 <= angle < 1000:
        raise ValueError(f"angle {angle}: give angles from 0 to below 1000 degrees")
    _check_decimals("angle", angle)
    return f"{abs(angle):0{4 + ANGLE_DECIMALS}.{ANGLE_DECIMALS}f}".rstrip("0").rstrip(".")


def _check_decimals(name: str, degrees: float) -> None:
    if round(degrees, ANGLE_DECIMALS) != degrees:
        raise ValueError(f"{name} {degrees}: give at most {ANGLE_DECIMALS} decimals")


_STRIP_BYTES = 2 << 20  # one strip of rotated columns: what a core's cache holds
_FADED = np.float32(1e-10)  # share of the greatest coefficient that is as good as 0
_PHASE_DECIMALS = 9  # finer than names tell apart, coarser than the rounding of angle % 90

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Scalar = TypeVar("Scalar", bound=np.generic)
Label = TypeVar("Label", bound=np.unsignedinteger)


def image_mips(images: npt.NDArray[np.floating], angles: Sequence[float]) -> Float32Array:
    """Rotate images about z by cubic splines, and take the maximum along y, for every angle.

    Parameters
    ----------
    images : ndarray, shape (..., X, Y, Z)
        float16, float32 or float64 without NaN; leading axes are channels.
    angles : sequence of float
        [degrees]

    Returns
    -------
    ndarray of float32, shape (n_angles, ..., X, Z)
        What scipy gives, to about 1e-6 of the range of `images`. Nothing is clipped, and splines
        overshoot: values may leave the range of `images`.

    Notes
    -----
    Holds one float32 copy of `images`. Every z is computed by itself, so that long images may be
    given in slabs of z.
    """
    plane_shape = images.shape[-3:-1]
    coefficients = _spline_coefficients(images)
    filled = _filled_around(coefficients, plane_shape)
    mips = np.empty((len(angles), plane_shape[0], coefficients.shape[1]), np.float32)
    for angle, members in _quarter_turn_families(plane_shape, angles):
        operator = _rotation_operator(plane_shape, angle, filled)
        along_y, along_x = _maxima(operator, coefficients, plane_shape)
        for position, quarter_turns in members.items():
            mip = along_x if quarter_turns % 2 else along_y
            mips[position] = mip[::-1] if quarter_turns in (1, 2) else mip
    return _split_channels(mips, images.shape)


def training_mips(image: npt.NDArray[np.floating], angles: Sequence[float]) -> npt.NDArray[Any]:
    """Return `image_mips` of an image in [0, 1], clipped to that, in the type of `image`."""
    return np.clip(image_mips(image, angles), 0, 1).astype(image.dtype)


def padded(mips: npt.NDArray[Scalar], length: int) -> npt.NDArray[Scalar]:
    """Return projections (N, C, X, Z) with zeros at the superior end up to `length`."""
    return np.pad(mips, ((0, 0), (0, 0), (0, 0), (0, length - mips.shape[-1])))


def mask_mips(masks: npt.NDArray[Label], angles: Sequence[float]) -> npt.NDArray[Label]:
    """Rotate masks about z by nearest neighbour, and take the maximum along y, for every angle.

    Parameters
    ----------
    masks : ndarray, shape (..., X, Y, Z)
        Labels of an unsigned integer type, 0 the background; leading axes are channels.
    angles : sequence of float
        [degrees]

    Returns
    -------
    ndarray of the dtype of `masks`, shape (n_angles, ..., X, Z)
        Voxel for voxel what scipy gives.
    """
    plane_shape = masks.shape[-3:-1]
    columns = _channels_last(masks).reshape(math.prod(plane_shape), -1)
    labelled: npt.NDArray[np.bool_] = np.any(columns, axis=1)
    labels = columns[labelled]
    levels = np.flatnonzero(np.any(labels, axis=0))
    labels = labels[:, levels]
    row_of_voxel = np.cumsum(labelled) - 1
    mips = np.zeros((len(angles), plane_shape[0], columns.shape[1]), masks.dtype)
    for mip, angle in zip(mips, angles, strict=True):
        sources = _source_voxels(plane_shape, angle)
        hit = (sources >= 0) & labelled[sources]
        rays, first_hits = np.unique(np.nonzero(hit)[0], return_index=True)
        if rays.size:
            found = labels[row_of_voxel[sources[hit]]]
            mip[np.ix_(rays, levels)] = np.maximum.reduceat(found, first_hits, axis=0)
    return _split_channels(mips, masks.shape)


def _channels_last(volumes: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """View of (..., X, Y, Z) as (X, Y, channels, Z)."""
    *channels, n_x, n_y, n_z = volumes.shape
    return np.moveaxis(volumes.reshape(math.prod(channels), n_x, n_y, n_z), 0, 2)


def _split_channels(
    mips: npt.NDArray[Scalar], volumes_shape: tuple[int, ...]
) -> npt.NDArray[Scalar]:
    """(n_angles, X, channels * Z) -> (n_angles, ..., X, Z)."""
    *channels, n_x, _, n_z = volumes_shape
    apart = np.moveaxis(mips.reshape(len(mips), n_x, math.prod(channels), n_z), 2, 1)
    return np.ascontiguousarray(apart).reshape(len(mips), *channels, n_x, n_z)


def _source_voxels(plane_shape: tuple[int, ...], angle: float) -> Int32Array:
    """Number of the nearest voxel from which each rotated voxel (X, Y) comes; -1: from outside.

    scipy says it itself, so that its rounding at ties and its idea of the border hold here.
    """
    # Slow to load, here as below, and of no use where nothing is new.
    from scipy import ndimage

    voxels = np.arange(math.prod(plane_shape), dtype=np.int32).reshape(plane_shape)
    sources: Int32Array = ndimage.rotate(
        voxels, angle, axes=(1, 0), reshape=False, order=0, mode="constant", cval=-1
    )
    return sources


def _inside(plane_shape: tuple[int, ...], angle: float) -> npt.NDArray[np.bool_]:
    """Rotated voxels (X, Y) that come from inside the plane."""
    return _source_voxels(plane_shape, angle) >= 0


def _quarter_turn_families(
    plane_shape: tuple[int, ...], angles: Sequence[float]
) -> Iterator[tuple[float, dict[int, int]]]:
    """Angles whose rotated planes are one plane, turned by quarters.

    Yields
    ------
    angle, members
        Members are {position in `angles`: quarter turns to it from `angle`}, so that the plane
        rotated to that position is ``np.rot90(plane rotated to angle, quarter turns)``.
    """
    by_phase: dict[float, list[int]] = {}
    for position, angle in enumerate(angles):
        by_phase.setdefault(round(angle % 90, _PHASE_DECIMALS) % 90, []).append(position)
    for same_phase in by_phase.values():
        waiting = same_phase
        while waiting:
            first_angle = angles[waiting[0]]
            inside = _inside(plane_shape, first_angle)
            turns = {place: round((angles[place] - first_angle) / 90) % 4 for place in waiting}
            # Oblong planes have no quarter turn, and a tie at the border may be rounded either way.
            members = {
                place: turn
                for place, turn in turns.items()
                if np.array_equal(_inside(plane_shape, angles[place]), np.rot90(inside, turn))
            }
            yield first_angle, members
            waiting = [place for place in waiting if place not in members]


def _spline_coefficients(images: npt.NDArray[np.floating]) -> Float32Array:
    """Cubic B-spline coefficients of every x-y plane, shape (X * Y, channels * Z).

    The mirrored border is what scipy uses for ``mode="constant"``, too.
    """
    from scipy import ndimage

    coefficients = _channels_last(images).astype(np.float32, order="C")
    for axis in (0, 1):
        ndimage.spline_filter1d(coefficients, 3, axis, output=coefficients, mode="mirror")
    # In air of one value they fade with the distance from the body: to nothing soon, but in the
    # end to numbers so small that many processors take a hundred times as long to multiply them.
    faded = _FADED * max(coefficients.max(), -coefficients.min())
    for plane in coefficients:
        plane[np.abs(plane) < faded] = 0
    return coefficients.reshape(math.prod(coefficients.shape[:2]), -1)


def _filled_around(
    coefficients: Float32Array, plane_shape: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Whether not all coefficients are 0 that a spline has from a voxel (X, Y) on to the next."""
    filled = coefficients.any(axis=1).reshape(plane_shape)
    padded = np.pad(filled, (1, 2), mode="reflect")
    taps = np.lib.stride_tricks.sliding_window_view(padded, (4, 4))
    return np.asarray(taps.any(axis=(2, 3)))


def _rotation_operator(
    plane_shape: tuple[int, ...], angle: float, filled: npt.NDArray[np.bool_]
) -> sparse.csr_array:
    """Matrix (X * Y, X * Y) from the spline coefficients of a plane to the rotated plane.

    Rows of voxels that come from outside the plane are empty, and those that will be 0, from where
    nothing is `filled` (X, Y): air of one value.
    """
    from scipy import sparse, special

    centre_x, centre_y = ((n - 1) / 2 for n in plane_shape)
    x, y = np.nonzero(_inside(plane_shape, angle))
    from_x, from_y = x - centre_x, y - centre_y
    cos, sin = special.cosdg(angle), special.sindg(angle)
    place_x = centre_x + cos * from_x + sin * from_y
    place_y = centre_y - sin * from_x + cos * from_y
    found = filled[place_x.astype(np.int32), place_y.astype(np.int32)]
    weights_x, taps_x = _cubic_taps(place_x[found], plane_shape[0])
    weights_y, taps_y = _cubic_taps(place_y[found], plane_shape[1])
    weights = weights_x[:, :, None] * weights_y[:, None, :]
    taps = taps_x[:, :, None] * np.int32(plane_shape[1]) + taps_y[:, None, :]
    row_ends = np.zeros(math.prod(plane_shape) + 1, np.int32)
    row_ends[1 + x[found] * plane_shape[1] + y[found]] = 16
    np.cumsum(row_ends, out=row_ends)
    return sparse.csr_array(
        (weights.ravel(), taps.ravel(), row_ends), shape=(len(row_ends) - 1, len(row_ends) - 1)
    )


def _cubic_taps(coordinates: npt.NDArray[np.float64], n: int) -> tuple[Float32Array, Int32Array]:
    """Weights and coefficient numbers (m, 4) of the cubic B-spline at m `coordinates` in [0, n)."""
    floor = np.floor(coordinates)
    mirrored = np.pad(np.arange(n, dtype=np.int32), 2, mode="reflect")
    taps = mirrored[floor.astype(np.int32)[:, None] + np.arange(1, 5, dtype=np.int32)]
    return cubic_basis(coordinates - floor).astype(np.float32), taps


def _maxima(
    operator: sparse.csr_array, coefficients: Float32Array, plane_shape: tuple[int, ...]
) -> tuple[Float32Array, Float32Array]:
    """Maxima of the rotated planes along y (X, columns) and along x (Y, columns)."""
    n_x, n_y = plane_shape
    n_columns = coefficients.shape[1]
    along_y = np.empty((n_x, n_columns), np.float32)
    along_x = np.full((n_y, n_columns), -np.inf, np.float32)
    thickness = max(1, _STRIP_BYTES // (n_y * n_columns * 4))
    for x in range(0, n_x, thickness):
        rows = slice(x * n_y, (x + thickness) * n_y)
        strip = (operator[rows] @ coefficients).reshape(-1, n_y, n_columns)
        strip.max(axis=1, out=along_y[x : x + thickness])
        np.maximum(along_x, strip.max(axis=0), out=along_x)
    return along_y, along_x
