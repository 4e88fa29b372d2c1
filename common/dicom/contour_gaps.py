"""Filled planes of contours -> slices: what is on those between them (pure geometry).

Whether a slice without a contour was left out by the reader or lies beside the lesion, only its
neighbours tell. They are looked at lesion by lesion, because two lesions of one region may be
drawn on every slice and on every second: parts of planes are linked to the parts of the nearest
plane above and below that overlap them, and what is linked is one lesion.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.components import components
from common.geometry import voxel_ml

WIDEST_SPACING_MM = 10.0
"""No reader draws less often than this; contours wider apart are lesions of their own."""

LONGEST_GAP_MM = 20.0
"""Beyond it nothing is missing between two contours: they are of two lesions."""

EVEN = 0.1
"""Part of the spacing by which regularly spaced contours may lie off: as slices of series may."""

_EXACT, _ROUNDED = 1e-6, 5e-3
"""Slice spacings: what arithmetic leaves, and what positions of 2 or 3 decimals [mm] leave."""


Slices = dict[int, NDArray[np.bool_]]
"""Planes [x, y] in Fortran order by their z."""


class Patch(NamedTuple):
    """A part of a slice: where it begins, and an array [x, y]."""

    x0: int
    y0: int
    voxels: NDArray[Any]

    @staticmethod
    def around(plane: NDArray[np.bool_]) -> "Patch":
        """Return the smallest part that holds all of a plane, as a copy."""
        columns, rows = np.flatnonzero(plane.any(axis=1)), np.flatnonzero(plane.any(axis=0))
        if not columns.size:
            return Patch(0, 0, np.zeros((0, 0), dtype=bool))
        x, y = slice(columns[0], columns[-1] + 1), slice(rows[0], rows[-1] + 1)
        return Patch(int(columns[0]), int(rows[0]), plane[x, y].copy(order="F"))

    def of(self, plane: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the view of a whole plane where the patch lies."""
        width, height = self.voxels.shape
        return plane[self.x0 : self.x0 + width, self.y0 : self.y0 + height]

    def cut(self, other: "Patch") -> "Patch":
        """Return what lies in the box of another."""
        x0, y0 = max(self.x0, other.x0), max(self.y0, other.y0)
        x1 = min(self.x0 + self.voxels.shape[0], other.x0 + other.voxels.shape[0])
        y1 = min(self.y0 + self.voxels.shape[1], other.y0 + other.voxels.shape[1])
        own = self.voxels[x0 - self.x0 : max(x1 - self.x0, x0 - self.x0), :]
        return Patch(x0, y0, own[:, y0 - self.y0 : max(y1 - self.y0, y0 - self.y0)])


class FilledPlane(NamedTuple):
    """What the contours of one plane enclose."""

    slice_index: float
    inside: Patch


@dataclass(eq=False)
class _Part:
    """A connected part of a plane, and the parts of the same lesion next above and below it.

    `is_met` tells whether anything overlaps it below and above, of its lesion or not.
    """

    plane: int
    slice_index: float
    patch: Patch
    above: "list[_Part]" = field(default_factory=list)
    below: "list[_Part]" = field(default_factory=list)
    is_met: dict[str, bool] = field(default_factory=lambda: {"below": False, "above": False})


Lesion = list[_Part]
"""What is linked, in ascending order."""


def nearest(slice_index: float) -> int:
    """Return the slice on which a plane is put; the upper one where it lies in the middle."""
    return math.floor(slice_index + 0.5)


def stacked(
    planes: Sequence[FilledPlane], shape: tuple[int, int, int], affine: NDArray[np.float64]
) -> tuple[Slices, list[str]]:
    """Put planes on their slices; fill slices between those that lie regularly wider apart.

    Parameters
    ----------
    planes
        In ascending order; where several meet on a slice, they are united.
    shape, affine
        Grid of the voxels, slices along z.

    Returns
    -------
    inside : dict of int to (X, Y) bool array
        The slices that hold anything. Where three or more contours of a lesion lie evenly apart,
        wider than the slices, a slice without takes the nearest within half that distance; so do
        lesions of fewer contours in a region whose others are drawn so. Other gaps stay as drawn.
    notes : list of str
        What was filled, and what gaps are left, with their volume; no identity.
    """
    planes = [plane for plane in planes if plane.inside.voxels.size]
    inside: Slices = {}
    for plane in planes:
        _unite(inside, nearest(plane.slice_index), plane.inside, shape)
    slice_mm = abs(float(np.linalg.det(affine[:3, :3]))) / float(
        np.linalg.norm(np.cross(affine[:3, 0], affine[:3, 1]))
    )
    lesions = _lesions(planes, slice_mm)
    spacing_of = _spacings(lesions, slice_mm)
    n_drawn = _n_voxels(inside)
    filled: set[int] = set()
    for lesion, spacing in zip(lesions, spacing_of, strict=True):
        if spacing:
            filled |= _fill_between(inside, lesion, spacing, shape)
    notes = []
    if filled:
        wide_mm = sorted({f"{s * slice_mm:.3g}" for s in spacing_of if s})
        ml = (_n_voxels(inside) - n_drawn) * voxel_ml(affine)
        notes.append(
            f"contours lie regularly {' and '.join(wide_mm)} mm apart, the slices {slice_mm:.3g} "
            f"mm: {len(filled)} slice(s) between took the nearest contour, {ml:.3g} ml"
        )
    gaps = [
        gap
        for lesion, spacing in zip(lesions, spacing_of, strict=True)
        for gap in _gaps(lesion, spacing)
    ]
    if gaps:
        missing = {k for slices, _ in gaps for k in slices}
        gap_ml = sum(len(slices) * area for slices, area in gaps) * voxel_ml(affine)
        notes.append(
            f"{len(missing)} slice(s) between contours have none, irregularly, a gap of "
            f"{gap_ml:.3g} ml: left as drawn"
        )
    return inside, notes


def _fill_between(
    inside: Slices, lesion: Lesion, spacing: float, shape: tuple[int, ...]
) -> set[int]:
    """Give slices the nearest contour; return those that have more now."""
    return {
        k
        for part in lesion
        for k in _slices_of(part, spacing)
        if 0 <= k < shape[2] and _unite(inside, k, part.patch, shape)
    }


def _unite(inside: Slices, k: int, patch: Patch, shape: tuple[int, ...]) -> bool:
    """Unite a slice with a patch; tell whether it has more now."""
    if k not in inside:
        inside[k] = np.zeros(shape[:2], dtype=bool, order="F")
    drawn = patch.of(inside[k])
    has_more = bool((patch.voxels & ~drawn).any())
    drawn |= patch.voxels
    return has_more


def _n_voxels(inside: Slices) -> int:
    return sum(map(np.count_nonzero, inside.values()))


# --- lesions ---------------------------------------------------------------------------------


def _lesions(planes: Sequence[FilledPlane], slice_mm: float) -> list[Lesion]:
    """Link the parts of planes to lesions, each to the nearest above that it is nearest below."""
    labelled = [_labelled(number, plane) for number, plane in enumerate(planes)]
    furthest = max(LONGEST_GAP_MM / slice_mm, 2.0) + EVEN
    for n_apart in range(1, len(planes)):
        pairs = [
            (labelled[lower], labelled[lower + n_apart])
            for lower in range(len(planes) - n_apart)
            if planes[lower + n_apart].slice_index - planes[lower].slice_index <= furthest
        ]
        if not pairs:
            break
        met = [pair for lower, upper in pairs for pair in _overlapping(lower, upper)]
        for part, other in met:
            if not part.is_met["above"] and not other.is_met["below"]:
                part.above.append(other)
                other.below.append(part)
        for part, other in met:
            part.is_met["above"] = other.is_met["below"] = True
    return _linked([part for plane in labelled for part in plane.parts])


def _linked(parts: Sequence[_Part]) -> list[Lesion]:
    lesions: list[Lesion] = []
    taken: set[int] = set()
    for first in parts:
        if id(first) in taken:
            continue
        taken.add(id(first))
        lesion, ahead = [], [first]
        while ahead:
            part = ahead.pop()
            lesion.append(part)
            new = [each for each in (*part.above, *part.below) if id(each) not in taken]
            new = list({id(each): each for each in new}.values())
            taken.update(map(id, new))
            ahead += new
        lesions.append(sorted(lesion, key=lambda part: part.slice_index))
    return lesions


class _Labelled(NamedTuple):
    """A plane whose parts are numbered: label n is that of ``parts[n - 1]``."""

    labels: Patch
    parts: list[_Part]


def _labelled(number: int, plane: FilledPlane) -> _Labelled:
    x0, y0, inside = plane.inside
    found = components(np.ascontiguousarray(inside).reshape(1, *inside.shape))
    labels = np.zeros(inside.shape, np.int32)
    labels[tuple(found.voxels[1:])] = found.numbers
    parts = []
    for label, (first, n_voxels) in enumerate(zip(found.starts, found.sizes, strict=True), start=1):
        _, x, y = found.voxels[:, first : first + n_voxels]
        box = np.s_[x.min() : x.max() + 1, y.min() : y.max() + 1]
        patch = Patch(x0 + box[0].start, y0 + box[1].start, labels[box] == label)
        parts.append(_Part(number, plane.slice_index, patch))
    return _Labelled(Patch(x0, y0, labels), parts)


def _overlapping(lower: _Labelled, upper: _Labelled) -> Iterator[tuple[_Part, _Part]]:
    """Yield the parts of two planes that overlap, where any is not met yet."""
    if all(part.is_met["above"] for part in lower.parts) and all(
        part.is_met["below"] for part in upper.parts
    ):
        return
    a, b = lower.labels.cut(upper.labels).voxels, upper.labels.cut(lower.labels).voxels
    if not a.size:
        return
    n = len(upper.parts) + 1
    meeting = np.bincount((a * n + b).ravel(order="K"), minlength=n * (len(lower.parts) + 1))
    for one, other in np.argwhere(meeting.reshape(-1, n)[1:, 1:]).tolist():
        yield lower.parts[one], upper.parts[other]


# --- spacing and gaps ------------------------------------------------------------------------


def _spacings(lesions: Sequence[Lesion], slice_mm: float) -> list[float | None]:
    """Return how far apart [slices] the contours of each lesion are drawn; None: as they lie."""
    gaps_of = [sorted(_distances(lesion).values()) for lesion in lesions]
    own = [_regular(gaps, slice_mm) for gaps in gaps_of]
    regular = [spacing for spacing in own if spacing]
    if not regular or max(regular) > min(regular) * (1 + EVEN):
        return own
    usual = sum(regular) / len(regular)
    if any(gap < usual * (1 - EVEN) for gaps in gaps_of for gap in gaps):
        return own
    return [
        spacing or (usual if not gaps or gaps[0] <= usual * (1 + EVEN) else None)
        for spacing, gaps in zip(own, gaps_of, strict=True)
    ]


def _distances(lesion: Lesion) -> dict[tuple[int, int], float]:
    """Return the distance [slices] of each two planes between which parts are linked."""
    return {
        (part.plane, other.plane): other.slice_index - part.slice_index
        for part in lesion
        for other in part.above
    }


def _regular(gaps: Sequence[float], slice_mm: float) -> float | None:
    """Return the mean of the shortest distances, if several and wider than the slices."""
    short = [gap for gap in gaps if gap <= gaps[0] * (1 + EVEN)]
    spacing = sum(short) / max(len(short), 1)
    is_wide = len(short) > 1 and spacing > 1 + _ROUNDED
    return spacing if is_wide and spacing * slice_mm <= WIDEST_SPACING_MM * (1 + _ROUNDED) else None


def _slices_of(part: _Part, spacing: float | None) -> range:
    """Return the slices that take a part: the halves of the spacing below and above it.

    In the middle between two contours, the upper half ends and the next lower one begins.
    """
    if spacing is None:
        k = nearest(part.slice_index)
        return range(k, k + 1)
    up, down = (
        [abs(each.slice_index - part.slice_index) for each in others]
        for others in (part.above, part.below)
    )
    reach_up, reach_down = (
        max((gap for gap in gaps if gap <= spacing * (1 + EVEN)), default=spacing) / 2
        for gaps in (up, down)
    )
    first = math.floor(part.slice_index - reach_down + _EXACT) + 1
    last = math.floor(part.slice_index + reach_up + _EXACT)
    return range(first, last + 1)


def _gaps(lesion: Lesion, spacing: float | None) -> Iterator[tuple[range, float]]:
    """Yield the slices without a contour between linked planes, and the mean area [voxels]."""
    parts_of: dict[tuple[int, int], tuple[dict[int, _Part], dict[int, _Part]]] = {}
    for part in lesion:
        for other in part.above:
            lower, upper = parts_of.setdefault((part.plane, other.plane), ({}, {}))
            lower[id(part)], upper[id(other)] = part, other
    for lower, upper in parts_of.values():
        below, above = next(iter(lower.values())), next(iter(upper.values()))
        slices = range(_slices_of(below, spacing).stop, _slices_of(above, spacing).start)
        area = sum(
            np.count_nonzero(part.patch.voxels) for part in (*lower.values(), *upper.values())
        )
        if slices:
            yield slices, area / 2
