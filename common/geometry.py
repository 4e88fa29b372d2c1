"""Grids and images: where voxels lie, how their axes run, and the grid to resample to. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

ORIENTATIONS = frozenset(
    "".join(code)
    for axes in itertools.permutations(("LR", "AP", "IS"))
    for code in itertools.product(*axes)
)
"""The 48 codes of where array axes point to, such as LAS."""

SAME_VOXEL = 0.1
"""Distance [voxels] within which voxels of two grids are the same: that of uneven slices."""


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
        dx, dy, dz = edges_mm(self.affine).tolist()
        return dx, dy, dz

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel [ml]."""
        return voxel_ml(self.affine)


@dataclass(frozen=True, eq=False)
class Image:
    """A volume and where it lies.

    Attributes
    ----------
    data : (X, Y, Z) array
        HU, SUV or labels.
    affine : (4, 4) float64 array
        Voxel index to RAS+ [mm].
    """

    data: Array
    affine: FloatArray

    @property
    def grid(self) -> Grid:
        """The voxel grid."""
        nx, ny, nz = self.data.shape
        return Grid((nx, ny, nz), self.affine)

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """Least and greatest value, looked for once; both NaN where one is."""
        return extremes(self.data)

    @classmethod
    def with_extremes(cls, data: Array, affine: FloatArray, known: tuple[float, float]) -> Image:
        """Return an image whose least and greatest value are known, and not looked for."""
        image = cls(data, affine)
        vars(image)["extremes"] = known
        return image


def edges_mm(affine: FloatArray) -> FloatArray:
    """Lengths of a voxel's edges along x, y, z [mm]."""
    lengths_mm: FloatArray = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return lengths_mm


def voxel_ml(affine: FloatArray) -> float:
    """Volume of one voxel [ml], of sheared grids too."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def inverse(affine: FloatArray) -> FloatArray:
    """RAS+ mm -> voxel index, (4, 4), in the very floats of scipy, whose inverse nilearn takes.

    Its arithmetic in a few lines for images whose axes are the world's, which spares most runs
    the loading of scipy, and scipy itself for all others.
    """
    spacing = np.diag(affine)
    aligned = np.diag(spacing)
    aligned[:3, 3] = affine[:3, 3]
    if not np.array_equal(affine, aligned):
        from scipy import linalg

        general: FloatArray = linalg.inv(affine)
        return general
    # What LAPACK computes of a matrix that is zero elsewhere.
    inverted = np.diag(1 / spacing)
    inverted[:3, 3] = -(affine[:3, 3] * (1 / spacing[:3]))
    return inverted


def voxel_map(source: Grid, target: Grid) -> FloatArray:
    """Target index -> source index, (4, 4), in the very floats that nilearn computes."""
    if np.array_equal(target.affine, source.affine):
        return np.eye(4)
    to_source: FloatArray = np.dot(inverse(source.affine), target.affine)
    return to_source


def moved(affine: FloatArray, points: Array) -> FloatArray:
    """Points (3, N) after an affine map (4, 4)."""
    there: FloatArray = affine[:3, :3] @ points + affine[:3, 3:]
    return there


def corners(shape: Sequence[int], margin: float = 0.0) -> Array:
    """Indices (3, 8) of the corner voxels of a grid; with a margin of 0.5 those of its box."""
    ends = [(-margin, n - 1 + margin) if margin else (0, n - 1) for n in shape]
    return np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)


def within(indices: Array, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Which places (n_axes, N), in voxels, lie inside the box of a grid's voxels, (n_axes, N)."""
    upper = np.array(shape)[:, np.newaxis] - 0.5
    inside: NDArray[np.bool_] = (indices >= -0.5) & (indices <= upper)
    return inside


def slow_to_fast(array: Array) -> list[int]:
    """Axes of a volume in an order in which its memory is read from end to end."""
    return sorted(range(3), key=lambda axis: -abs(array.strides[axis]))


def extremes(volume: Array) -> tuple[float, float]:
    """Least and greatest value of a (X, Y, Z) array, both NaN where one is."""
    # Plane by plane, as they lie in memory: the second look finds each in the processor's cache.
    planes = volume.transpose(slow_to_fast(volume))
    least, greatest = np.transpose([(plane.min(), plane.max()) for plane in planes])
    return float(least.min()), float(greatest.max())


def orientation_of(affine: FloatArray) -> str:
    """Where the array axes of an image point to, such as ``LAS``.

    Parameters
    ----------
    affine : (4, 4) array
        Voxel -> RAS+ mm. An oblique axis counts as the anatomical axis it is closest to.

    Raises
    ------
    ValueError
        If the affine has an axis without direction.
    """
    # Slow to load, as in `reorient`.
    from nibabel import orientations

    return "".join(orientations.ornt2axcodes(_axes_and_directions(affine)))


def reorient(array: Array, affine: FloatArray, orientation: str) -> tuple[Array, FloatArray]:
    """Permute and flip the axes of an image so that they point the way asked for.

    Parameters
    ----------
    array : (X, Y, Z) array
    affine : (4, 4) array
        Voxel -> RAS+ mm.
    orientation : str
        Where the array axes shall point to, such as ``LAS``: one each of L/R, A/P and S/I.

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

    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation {orientation!r} is not one each of L/R, A/P and S/I")
    wanted = orientations.axcodes2ornt(tuple(orientation))
    change = orientations.ornt_transform(_axes_and_directions(affine), wanted)
    turned = orientations.apply_orientation(array, change)
    return turned, affine @ orientations.inv_ornt_aff(change, array.shape)


def _axes_and_directions(affine: FloatArray) -> FloatArray:
    """World axis, and 1 or -1 along it, of each array axis (3, 2), as nibabel has them."""
    from nibabel import orientations

    found: FloatArray = orientations.io_orientation(affine)
    if np.isnan(found).any():
        raise ValueError("affine has an axis without direction")
    return found


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
