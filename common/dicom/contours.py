"""Closed planar contours -> the voxels that they enclose (pure geometry).

Everything happens in voxel indices of the grid at hand, so that any orientation is the same
work: voxel (i, j, k) has its centre at exactly (i, j, k), and slice k is the plane of all points
whose third index is k.

The rule of the fill: a centre is inside where an odd number of contours of its plane enclose it,
which makes holes and keyholes what they are meant to be. A centre exactly on an edge belongs to
the contour at whose low-index side that edge lies (x_low <= i < x_high, y_low <= j < y_high), so
that contours which share an edge share no voxel and leave none out.

Where all points are centres of voxels, a program outlined a mask through the voxels at its rim,
those around its holes included (OpenCV, and so rt-utils and TotalSegmentator): every centre on an
edge is inside.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.dicom.contour_gaps import FilledPlane, Patch, Slices, nearest, stacked
from common.errors import StudyError
from common.geometry import inverse, voxel_ml

# Of the slice spacing. Contours are drawn on slices and written with 2 or 3 decimals: rounding
# moves them by less than a hundredth of a slice, a drawing on other slices by tenths.
SLICE_TOLERANCE = 0.1
# Voxels. Far below any drawing's accuracy and far above rounding errors of the affine: what lies
# on an edge is decided by the numbers in the file and not by the last bit of a product.
SNAP_DECIMALS = 6
# A drawing by hand has no point, or few, so close to the centre of a voxel: what one decimal of a
# millimetre leaves, and a fiftieth of a voxel; on the finest grids a tenth.
CENTRE_TOLERANCE_MM, CENTRE_TOLERANCE, LARGEST_CENTRE_TOLERANCE = 0.051, 0.02, 0.1
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
        The slices that hold anything, by z: boolean arrays [x, y] in Fortran order.
    warnings
        One sentence a kind of problem, with the number of contours or the volume; no identity.
    """

    inside: Slices
    warnings: tuple[str, ...]


class _Contour(NamedTuple):
    points: npt.NDArray[np.float64]  # (n, 2): x, y in voxels
    slice_index: float


def fill_contours(
    contours: Iterable[npt.NDArray[np.float64]],
    shape: tuple[int, int, int],
    affine: npt.NDArray[np.float64],
    *,
    may_overlap: bool = False,
) -> FilledContours:
    """Find the voxels whose centres lie inside the contours of one region of interest.

    Parameters
    ----------
    contours
        Closed planar polygons, each (n, 3) in RAS+ [mm]; the last point joins the first.
    shape, affine
        Grid of the voxels: counts along x, y, z and (4, 4) voxel -> RAS+ mm, slices along z.
    may_overlap
        Whether what overlaps is meant to be outside, so that nothing is said of it.

    Returns
    -------
    FilledContours
        Contours on one slice combine by the even-odd rule. Contours between slices go to the
        nearest one; where those of several planes meet on a slice they are united, because
        even-odd across planes would erase what is common to neighbours. Slices between contours
        that lie regularly wider apart take the nearest: see `contour_gaps.stacked`.

    Raises
    ------
    StudyError
        Points or grid are no usable numbers, or contours are there and none lies on a slice.
    """
    to_voxels = _to_voxels(affine)
    found: Counter[str] = Counter()
    placed = []
    for points_mm in contours:
        contour = _place(_voxel_points(points_mm, to_voxels), shape, found)
        if contour is not None:
            placed.append(contour)
    edges_mm = np.linalg.norm(affine[:3, :2], axis=0)
    near = (CENTRE_TOLERANCE_MM / edges_mm).clip(CENTRE_TOLERANCE, LARGEST_CENTRE_TOLERANCE)
    through_centres = bool(placed) and all(_runs_through_centres(each, near) for each in placed)
    if through_centres:
        drawn = [each._replace(points=np.rint(each.points)) for each in placed]
    else:
        drawn = [each for each in placed if len(_edges(each.points)) >= 3]
        found["thin"] += len(placed) - len(drawn)
    if not drawn and (found["not planar"] or found["outside"]):
        raise StudyError(
            f"no contour lies on the image's slices (ContourData (3006,0050)): {found['outside']} "
            f"are outside the image, {found['not planar']} not parallel to its slices: give the "
            "image they were drawn on, or the mask as NIfTI"
        )
    n_erased = 0
    filled = []
    for plane in _planes(drawn):
        inside, erased = _fill_plane(plane, (shape[0], shape[1]), through_centres, found)
        n_erased += erased
        filled.append(FilledPlane(plane[0].slice_index, inside))
    slices, gaps = stacked(filled, shape, affine)
    warnings = list(_sentences(found))
    if through_centres:
        warnings.append(
            "all points are centres of voxels, as of a mask that a program outlined: what the "
            "edges run through is inside"
        )
    if n_erased and not may_overlap:
        warnings.append(
            f"contours of one slice overlap in {n_erased * voxel_ml(affine):.3g} ml, which are "
            "outside by the even-odd rule, as holes are: check that nothing was drawn twice"
        )
    return FilledContours(slices, (*warnings, *gaps))


def _to_voxels(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or not np.linalg.det(matrix[:3, :3]):
        raise StudyError(
            "the image that the contours were drawn on has no usable affine (voxel sizes or axes "
            "are 0, or no numbers): export the image again"
        )
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
    """Put (n, 3) voxel points on a slice; None, and counted, where that can't be."""
    low, high = points.min(axis=0), points.max(axis=0)
    slice_index = float(low[2] + high[2]) / 2
    in_plane_end = np.array(shape[:2]) - 0.5
    misses = bool((high[:2] < -0.5).any() or (low[:2] > in_plane_end).any())
    is_planar = high[2] - low[2] <= SLICE_TOLERANCE
    if not is_planar or misses or not 0 <= nearest(slice_index) < shape[2]:
        is_thin = len(_edges(points[:, :2])) < 3
        found["thin" if is_thin else "outside" if is_planar else "not planar"] += 1
        return None
    found["beyond"] += bool((low[:2] < -0.5).any() or (high[:2] > in_plane_end).any())
    contour = _Contour(points[:, :2], slice_index)
    found["between"] += not _is_on_slice(contour)
    return contour


def _is_on_slice(contour: _Contour) -> bool:
    return abs(contour.slice_index - nearest(contour.slice_index)) <= SLICE_TOLERANCE


def _runs_through_centres(contour: _Contour, near: npt.NDArray[np.float64]) -> bool:
    off = np.abs(contour.points - np.rint(contour.points))
    return _is_on_slice(contour) and bool((off <= near).all())


def _edges(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Join (n, 2) points to (m, 5) edges of non-zero length, each from its lower-y end.

    The last column is 1 where the contour runs upwards there, else -1. Points given twice in a
    row, and a last point equal to the first, thereby don't matter.
    """
    following = np.roll(points, -1, axis=0)
    x, y, next_x, next_y = points[:, 0], points[:, 1], following[:, 0], following[:, 1]
    downwards = ((next_y < y) | ((next_y == y) & (next_x < x)))[:, np.newaxis]
    ends = np.where(downwards, np.hstack([following, points]), np.hstack([points, following]))
    edges: npt.NDArray[np.float64] = np.hstack([ends, np.where(downwards, -1.0, 1.0)])
    has_length = (ends[:, :2] != ends[:, 2:]).any(axis=1)
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
    plane: Sequence[_Contour], shape: tuple[int, int], through_centres: bool, found: Counter[str]
) -> tuple[Patch, int]:
    """Fill one plane by the even-odd rule; return also how many voxels overlaps have erased.

    The same polygon twice counts once, or it would vanish. Only the outline of a mask may come
    back the other way: that is the hole of a ring one voxel wide.
    """
    inside = np.zeros(shape, dtype=bool, order="F")
    rim = np.zeros(shape, dtype=bool, order="F")
    overlap = np.zeros(shape, dtype=bool, order="F")
    patches: list[Patch] = []
    seen = set()
    for contour in plane:
        edges = _edges(contour.points)
        same: object = edges[np.lexsort(edges[:, :4].T), :4].tobytes()
        if through_centres:
            point = contour.points[:1].tobytes() if not edges.size else b""
            same = (same, point, _runs_clockwise(contour.points))
        if same in seen:
            found["duplicate"] += 1
            continue
        seen.add(same)
        winding = _winding(edges, shape)
        patch = Patch(winding.x0, winding.y0, (winding.voxels & 1) != 0)
        patch.of(inside)[...] ^= patch.voxels
        patches.append(patch)
        _mark_own_overlap(overlap, contour.points, winding, shape)
        if through_centres:
            _mark_rim(rim, contour.points)
        else:
            found["no voxel"] += not patch.voxels.any()
    _mark_overlaps(overlap, patches, or_equal=not through_centres)
    inside |= rim
    return Patch.around(inside), int(np.count_nonzero(overlap & ~inside))


def _runs_clockwise(points: npt.NDArray[np.float64]) -> bool:
    following = np.roll(points, -1, axis=0)
    doubled_area = (points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum()
    return bool(doubled_area < 0)


def _winding(edges: npt.NDArray[np.float64], shape: tuple[int, int]) -> Patch:
    """Return how often one polygon winds around each voxel (x, y); odd numbers are inside.

    Scan lines: each edge crosses the rows j with y_low <= j < y_high; from a crossing on, every
    voxel of that row has its direction added. Winding numbers are int16, which may overflow but
    stay odd.
    """
    x_low, y_low, x_high, y_high, direction = edges.T
    first = np.ceil(y_low).clip(0, shape[1]).astype(np.intp)
    end = np.ceil(y_high).clip(0, shape[1]).astype(np.intp)
    crossed = end - first
    edge = np.repeat(np.arange(len(edges)), crossed)
    if not edge.size:
        return Patch(0, 0, np.zeros((0, 0), dtype=np.int16))
    row = np.arange(edge.size) - np.repeat(np.cumsum(crossed) - crossed - first, crossed)
    slope = (x_high - x_low)[edge] / (y_high - y_low)[edge]
    crossing = np.round(x_low[edge] + (row - y_low[edge]) * slope, SNAP_DECIMALS)
    column = np.ceil(crossing).clip(0, shape[0]).astype(np.intp)
    x0, y0 = int(column.min()), int(row.min())
    width, height = int(column.max()) - x0, int(row.max()) + 1 - y0
    steps = np.bincount(
        (row - y0) * (width + 1) + column - x0,
        weights=direction[edge],
        minlength=height * (width + 1),
    ).astype(np.int16)
    passed = np.cumsum(steps.reshape(height, width + 1)[:, :width], axis=1, dtype=np.int16)
    return Patch(x0, y0, passed.T)


def _mark_rim(rim: npt.NDArray[np.bool_], points: npt.NDArray[np.float64]) -> None:
    """Mark all voxels whose centres a polygon of centres runs through."""
    start = points.astype(np.int64)
    step = np.roll(start, -1, axis=0) - start
    n_steps = np.gcd(step[:, 0], step[:, 1])
    unit = step // np.maximum(n_steps, 1)[:, np.newaxis]
    # An edge of no length is a point.
    counts = np.maximum(n_steps, 1)
    edge = np.repeat(np.arange(len(start)), counts)
    along = np.arange(edge.size) - np.repeat(np.cumsum(counts) - counts, counts)
    x, y = (start[edge] + along[:, np.newaxis] * unit[edge]).T
    is_on = (x >= 0) & (y >= 0) & (x < rim.shape[0]) & (y < rim.shape[1])
    rim[x[is_on], y[is_on]] = True


# --- overlaps --------------------------------------------------------------------------------


def _mark_overlaps(
    overlap: npt.NDArray[np.bool_], patches: Sequence[Patch], *, or_equal: bool
) -> None:
    """Mark what polygons of one slice have in common where neither lies in the other.

    One in another is a hole, or an island in a hole.
    """
    filled = [patch for patch in patches if patch.voxels.any()]
    for one, other in _pairs_in_touch(filled):
        a, b = one.cut(other), other.cut(one)
        common = a.voxels & b.voxels
        n_common = np.count_nonzero(common)
        n_one, n_other = np.count_nonzero(one.voxels), np.count_nonzero(other.voxels)
        is_same = n_common == n_one == n_other
        if n_common and (n_common < min(n_one, n_other) or (is_same and or_equal)):
            a.of(overlap)[...] |= common


def _pairs_in_touch(patches: Sequence[Patch]) -> Iterator[tuple[Patch, Patch]]:
    """Yield the pairs of patches whose boxes overlap."""
    if len(patches) < 2:
        return
    low = np.array([(p.x0, p.y0) for p in patches])
    high = low + [p.voxels.shape for p in patches]
    touch = (low[:, np.newaxis] < high).all(axis=2) & (low < high[:, np.newaxis]).all(axis=2)
    for i, j in np.argwhere(np.triu(touch, k=1)):
        yield patches[i], patches[j]


def _mark_own_overlap(
    overlap: npt.NDArray[np.bool_],
    points: npt.NDArray[np.float64],
    winding: Patch,
    shape: tuple[int, int],
) -> None:
    """Mark where a polygon overlaps itself: what it winds around twice, but for keyholes.

    The hole of a keyhole that runs in the direction of the outline is wound around twice, too: it
    shows as a loop of its own, because the outline comes back to where it left for the hole.
    """
    twice = (winding.voxels != 0) & (winding.voxels & 1 == 0)
    if not twice.any():
        return
    loops = [_winding(_edges(loop), shape) for loop in _loops(points)]
    for loop in loops:
        loop.of(overlap)[...] |= (loop.voxels != 0) & (loop.voxels & 1 == 0)
    odd = [Patch(loop.x0, loop.y0, (loop.voxels & 1) != 0) for loop in loops]
    _mark_overlaps(overlap, odd, or_equal=True)


def _loops(points: npt.NDArray[np.float64]) -> Iterator[npt.NDArray[np.float64]]:
    """Take a polygon apart wherever it comes back to a point where it has been."""
    path: list[tuple[float, float]] = []
    place: dict[tuple[float, float], int] = {}
    for point in map(tuple, points.tolist()):
        if point in place:
            start = place[point]
            yield np.array(path[start:])
            for passed in path[start + 1 :]:
                del place[passed]
            del path[start + 1 :]
        else:
            place[point] = len(path)
            path.append(point)
    yield np.array(path)


def _sentences(found: Counter[str]) -> tuple[str, ...]:
    return tuple(
        f"{found[kind]} contour(s) {sentence}"
        for kind, sentence in _WARNINGS.items()
        if found[kind]
    )
