"""Connected components of sparse masks, as lists of voxels. Pure.

Tumours fill a hundredth of an image at most. Where voxels are in memory side by side, labelled
ones form runs; runs are found on the few lines that hold any, and those that touch are joined.
The cost follows the tumour volume: labelling the whole image takes ten times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.geometry import slow_to_fast

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.intp]
Voxels = npt.NDArray[np.int32]

_EARLIER_LINES = ((0, -1), (-1, -1), (-1, 0), (-1, 1))
"""Neighbours of a line of voxels that come before it: slow and middle axis."""


@dataclass(frozen=True, eq=False)
class Components:
    """The 26-connected components of a mask, numbered from 1 by their first voxels in C order.

    Attributes
    ----------
    voxels : (3, N) array
        x, y, z of all voxels, those of one component after those of another.
    starts : (count,) array
        Where the voxels of each begin.
    sizes : (count,) array
        Voxels of each.
    """

    voxels: Voxels
    starts: Indices
    sizes: Indices

    @property
    def count(self) -> int:
        """Number of components."""
        return len(self.sizes)

    @property
    def numbers(self) -> Voxels:
        """Number of each voxel's component, (N,)."""
        return np.repeat(np.arange(1, self.count + 1, dtype=np.int32), self.sizes)


def components(mask: Array) -> Components:
    """Find the 26-connected components of the voxels above 0 of a (X, Y, Z) array."""
    runs = _runs(mask)
    first_run = _first_of_component(runs)
    lowest = np.full(runs.count, np.iinfo(np.intp).max)
    np.minimum.at(lowest, first_run, np.ravel_multi_index(tuple(runs.firsts()), mask.shape))
    order = np.lexsort((np.arange(runs.count), lowest[first_run]))
    members = first_run[order]
    firsts = np.flatnonzero(np.diff(members, prepend=-1))
    runs = runs.take(order)
    sizes = np.add.reduceat(runs.lengths, firsts) if runs.count else runs.lengths
    return Components(runs.voxels(), np.cumsum(sizes) - sizes, sizes)


def voxels_by_number(ids: Array) -> tuple[Components, Array]:
    """Group the voxels above 0 of a (X, Y, Z) array of whole numbers by their number.

    Returns
    -------
    groups : Components
        Whether connected or not.
    numbers : (count,) array
        Of each group, ascending.
    """
    voxels = voxels_above_zero(ids)
    found = ids[tuple(voxels)]
    numbers, sizes = np.unique(found, return_counts=True)
    order = np.argsort(found, kind="stable")
    return Components(voxels[:, order], np.cumsum(sizes) - sizes, sizes), numbers


def voxels_above_zero(mask: Array) -> Voxels:
    """Return x, y, z of the voxels above 0 of a (X, Y, Z) array, (3, N), in the memory's order."""
    return _runs(mask).voxels()


def labelled_lines(volume: Array) -> npt.NDArray[np.bool_]:
    """Tell which lines along the last axis of a (X, Y, Z) array hold more than zeros, (X, Y)."""
    # As they lie in memory, of images that have been turned too.
    forwards = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in volume.strides)
    lines = volume[forwards]
    n_bytes = lines.shape[2] * lines.itemsize
    if lines.flags.c_contiguous and lines.dtype.kind in "bui" and n_bytes % 8 == 0:
        # Eight bytes at a time: most masks are large, and mostly 0.
        found = np.bitwise_or.reduce(lines.view(np.uint64), axis=2) != 0
    else:
        found = lines.any(axis=2)
    return np.asarray(found[forwards[:2]])


@dataclass(frozen=True, eq=False)
class _Runs:
    """Stretches of voxels along the axis that is closest in memory.

    `lines` is (2, n): slow and middle index of each run's line; `axes` says which axis of the
    image is slow, middle and fast; `shape` is in that order.
    """

    lines: Voxels
    begin: Indices
    lengths: Indices
    axes: list[int]
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.begin)

    def take(self, order: Indices) -> _Runs:
        lines, begin, lengths = self.lines[:, order], self.begin[order], self.lengths[order]
        return _Runs(lines, begin, lengths, self.axes, self.shape)

    def firsts(self) -> Voxels:
        """x, y, z of the first voxel of each run, (3, n)."""
        return self._in_image(*self.lines, self.begin)

    def voxels(self) -> Voxels:
        """x, y, z of every voxel, (3, N)."""
        ends = np.cumsum(self.lengths)
        n_voxels = int(ends[-1]) if self.count else 0
        along = np.arange(n_voxels, dtype=np.int32)
        along += np.repeat((self.begin - (ends - self.lengths)).astype(np.int32), self.lengths)
        return self._in_image(*np.repeat(self.lines, self.lengths, axis=1), along)

    def _in_image(self, *indices: Array) -> Voxels:
        by_axis = dict(zip(self.axes, indices, strict=True))
        return np.stack([by_axis[axis] for axis in range(3)], dtype=np.int32, casting="same_kind")


def _runs(mask: Array) -> _Runs:
    axes = slow_to_fast(mask)
    volume = mask.transpose(axes)
    lines = np.stack(np.nonzero(labelled_lines(volume)))
    labelled = np.zeros((lines.shape[1], volume.shape[2] + 2), dtype=bool)
    np.greater(volume[tuple(lines)], 0, out=labelled[:, 1:-1])
    line, edge = np.nonzero(labelled[:, 1:] != labelled[:, :-1])
    begin, end = edge[::2], edge[1::2]
    return _Runs(lines[:, line[::2]].astype(np.int32), begin, end - begin, axes, volume.shape)


def _first_of_component(runs: _Runs) -> Indices:
    """Number of the first run of each run's component."""
    # Lines in a row, with room between them: what touches only here does not touch in space.
    pitch = runs.shape[2] + 2
    slow, middle = runs.lines.astype(np.intp)
    begin = (slow * (runs.shape[1] + 2) + middle) * pitch + runs.begin
    end = begin + runs.lengths
    touching = []
    for d_slow, d_middle in _EARLIER_LINES:
        shift = (d_slow * (runs.shape[1] + 2) + d_middle) * pitch
        first = np.searchsorted(end, begin + shift)
        n_touching = np.searchsorted(begin, end + shift, side="right") - first
        ends = np.cumsum(n_touching)
        n_pairs = int(ends[-1]) if runs.count else 0
        earlier = np.arange(n_pairs) + np.repeat(first - (ends - n_touching), n_touching)
        touching.append(np.stack([earlier, np.repeat(np.arange(runs.count), n_touching)]))
    return _joined(runs.count, np.concatenate(touching, axis=1))


def _joined(count: int, pairs: Indices) -> Indices:
    """Least number among those that pairs (2, n) connect with each of `count` numbers."""
    least = np.arange(count)
    while True:
        ends = least[pairs]
        apart = ends[0] != ends[1]
        if not apart.any():
            return least
        pairs = pairs[:, apart]
        low, high = np.sort(ends[:, apart], axis=0)
        np.minimum.at(least, high, low)
        while not np.array_equal(least, shorter := least[least]):
            least = shorter
