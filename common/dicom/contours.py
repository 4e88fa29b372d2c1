"""Closed planar contours -> the voxels whose centres they enclose (pure geometry).

Everything happens in voxel indices of the grid at hand, so that any orientation is the same
work: voxel (i, j, k) has its centre at exactly (i, j, k), and slice k is the plane of all points
whose third index is k.

The rule of the fill: a centre is inside where an odd number of contours of its plane enclose it,
which makes holes and keyholes what they are meant to be. A centre exactly on an edge belongs to
the contour at whose low-index side that edge lies (x_low <= i < x_high, y_low <= j < y_high), so
that contours which share an edge share no voxel and leave none out.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import StudyError
from common.geometry import inverse

# Of the slice spacing. Contours are drawn on slices and written with 2 or 3 decimals: rounding
# moves them by less than a hundredth of a slice, a drawing on other slices by tenths.
SLICE_TOLERANCE = 0.1
# Voxels. Far below any drawing's accuracy and far above rounding errors of the affine: what lies
# on an edge is decided by the numbers in the file and not by the last bit of a product.
SNAP_DECIMALS = 6
# 1 km. Beyond it coordinates are damaged, and their squares no longer exact.
LARGEST_COORDINATE_MM = 1e6

_WARNINGS = {
    "thin": "with fewer than three different points enclose no area: ignored",
    "not planar": "are not parallel to the slices: ignored",
    "outside": "lie outside the image: ignored",
    "beyond": "reach beyond the edge of the image: cut off there",
    "between": "lie between slices, by more than 10 % of the spacing: put on the nearest slice",
    "duplicate": "are there twice: used once",
    "no voxel": "enclose no voxel centre: nothing of them is in the mask",
}


@dataclass(frozen=True)
class FilledContours:
    """The voxels inside the contours of one region of interest, and what was not as it should be.

    Attributes
    ----------
    inside
        Boolean array [x, y, z] in Fortran order (slices are contiguous).
    warnings
        One sentence a kind of problem, with the number of contours; no identity.
    """

    inside: npt.NDArray[np.bool_]
    warnings: tuple[str, ...]


class _Contour(NamedTuple):
    edges: npt.NDArray[np.float64]  # (m, 4): x, y of one end, x, y of the other, in voxels
    slice_index: float


def fill_contours(
    contours: Iterable[npt.NDArray[np.float64]],
    shape: tuple[int, int, int],
    affine: npt.NDArray[np.float64],
) -> FilledContours:
    """Find the voxels whose centres lie inside the contours of one region of interest.

    Parameters
    ----------
    contours
        Closed planar polygons, each (n, 3) in RAS+ [mm]; the last point joins the first.
    shape, affine
        Grid of the voxels: counts along x, y, z and (4, 4) voxel -> RAS+ mm, slices along z.

    Returns
    -------
    FilledContours
        Contours on one slice combine by the even-odd rule. Contours between slices go to the
        nearest one; where those of several planes meet on a slice they are united, because
        even-odd across planes would erase what is common to neighbours.

    Raises
    ------
    StudyError
        Points or grid are no usable numbers, or contours are there and none lies on a slice.
    """
    to_voxels = _to_voxels(affine)
    inside = np.zeros(shape, dtype=bool, order="F")
    found: Counter[str] = Counter()
    on_grid = []
    for points_mm in contours:
        contour = _place(_voxel_points(points_mm, to_voxels), shape, found)
        if contour is not None:
            on_grid.append(contour)
    if not on_grid and (found["not planar"] or found["outside"]):
        raise StudyError(
            f"no contour lies on the image's slices (ContourData (3006,0050)): {found['outside']} "
            f"are outside the image, {found['not planar']} not parallel to its slices: give the "
            "image they were drawn on, or the mask as NIfTI"
        )
    for plane in _planes(on_grid):
        k = _nearest(plane[0].slice_index)
        inside[:, :, k] |= _fill_plane(plane, (shape[0], shape[1]), found)
    return FilledContours(inside, _sentences(found))


def _to_voxels(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.linalg.det(matrix[:3, :3]):
        raise StudyError("the image has no usable affine: its contours can't be placed")
    return inverse(matrix)


def _voxel_points(
    points_mm: npt.NDArray[np.float64], to_voxels: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    points = np.asarray(points_mm, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not (abs(points) < LARGEST_COORDINATE_MM).all():
        raise StudyError(
            "contour points are not triplets of plausible numbers [mm] (ContourData (3006,0050)): "
            "export the contours again"
        )
    voxels = points @ to_voxels[:3, :3].T + to_voxels[:3, 3]
    return np.round(voxels, SNAP_DECIMALS) + 0.0  # + 0.0: no negative zeros, equal means equal


def _place(
    points: npt.NDArray[np.float64], shape: tuple[int, int, int], found: Counter[str]
) -> _Contour | None:
    """Reduce (n, 3) voxel points to edges on a slice; None, and counted, where that can't be."""
    edges = _edges(points[:, :2])
    if len(edges) < 3:
        found["thin"] += 1
        return None
    low, high = points.min(axis=0), points.max(axis=0)
    if high[2] - low[2] > SLICE_TOLERANCE:
        found["not planar"] += 1
        return None
    slice_index = float(low[2] + high[2]) / 2
    in_plane_end = np.array(shape[:2]) - 0.5
    misses = bool((high[:2] < -0.5).any() or (low[:2] > in_plane_end).any())
    if misses or not 0 <= _nearest(slice_index) < shape[2]:
        found["outside"] += 1
        return None
    found["beyond"] += bool((low[:2] < -0.5).any() or (high[:2] > in_plane_end).any())
    off_slice = abs(slice_index - _nearest(slice_index)) > SLICE_TOLERANCE
    found["between"] += off_slice
    return _Contour(edges, slice_index if off_slice else float(_nearest(slice_index)))


def _edges(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Join (n, 2) points to (m, 4) edges of non-zero length, each from its lower-y end.

    Points given twice in a row, and a last point equal to the first, thereby don't matter; nor
    does the direction in which a contour runs.
    """
    following = np.roll(points, -1, axis=0)
    x, y, next_x, next_y = points[:, 0], points[:, 1], following[:, 0], following[:, 1]
    downwards = (next_y < y) | ((next_y == y) & (next_x < x))
    edges: npt.NDArray[np.float64] = np.where(
        downwards[:, np.newaxis], np.hstack([following, points]), np.hstack([points, following])
    )
    has_length = (edges[:, :2] != edges[:, 2:]).any(axis=1)
    return np.compress(has_length, edges, axis=0)


def _planes(contours: Sequence[_Contour]) -> list[list[_Contour]]:
    """Group contours that were drawn on the same plane, within the tolerance."""
    planes: list[list[_Contour]] = []
    for contour in sorted(contours, key=lambda each: each.slice_index):
        if planes and contour.slice_index - planes[-1][0].slice_index <= SLICE_TOLERANCE:
            planes[-1].append(contour)
        else:
            planes.append([contour])
    return planes


def _fill_plane(
    plane: Sequence[_Contour], shape: tuple[int, int], found: Counter[str]
) -> npt.NDArray[np.bool_]:
    """Fill (x, y) by the even-odd rule; the same polygon twice counts once, or it would vanish."""
    inside = np.zeros(shape, dtype=bool, order="F")
    seen = set()
    for contour in plane:
        same = contour.edges[np.lexsort(contour.edges.T)].tobytes()
        if same in seen:
            found["duplicate"] += 1
            continue
        seen.add(same)
        found["no voxel"] += not _toggle_inside(inside, contour.edges)
    return inside


def _toggle_inside(plane: npt.NDArray[np.bool_], edges: npt.NDArray[np.float64]) -> bool:
    """Invert the voxels of ``plane`` (x, y) inside one polygon; tell whether there are any.

    Scan lines: each edge crosses the rows j with y_low <= j < y_high; from a crossing on, every
    voxel of that row changes sides.
    """
    x_low, y_low, x_high, y_high = edges.T
    first = np.ceil(y_low).clip(0, plane.shape[1]).astype(np.intp)
    end = np.ceil(y_high).clip(0, plane.shape[1]).astype(np.intp)
    crossed = end - first
    edge = np.repeat(np.arange(len(edges)), crossed)
    if not edge.size:
        return False
    row = np.arange(edge.size) - np.repeat(np.cumsum(crossed) - crossed - first, crossed)
    slope = (x_high - x_low)[edge] / (y_high - y_low)[edge]
    crossing = np.round(x_low[edge] + (row - y_low[edge]) * slope, SNAP_DECIMALS)
    column = np.ceil(crossing).clip(0, plane.shape[0]).astype(np.intp)
    x0, y0 = column.min(), row.min()
    width, height = column.max() - x0, row.max() + 1 - y0
    toggles = np.bincount((row - y0) * (width + 1) + column - x0, minlength=height * (width + 1))
    # Whether a count is odd survives the overflow of uint8, which is fast.
    passed = np.cumsum(toggles.reshape(height, width + 1)[:, :width], axis=1, dtype=np.uint8)
    patch = (passed & 1).view(np.bool_).T
    plane[x0 : x0 + width, y0 : y0 + height] ^= patch
    return bool(patch.any())


def _nearest(slice_index: float) -> int:
    return int(np.floor(slice_index + 0.5))


def _sentences(found: Counter[str]) -> tuple[str, ...]:
    return tuple(
        f"{found[kind]} contour(s) {sentence}"
        for kind, sentence in _WARNINGS.items()
        if found[kind]
    )
