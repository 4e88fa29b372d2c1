"""A volume and where it lies. Pure.

Voxel grids in space: where they lie, how their axes point, and the grid to resample to. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

# --- image -----------------------------------------------------------------------------------

SAME_VOXEL = 0.1
"""Distance [voxels] within which voxels of two grids are the same: that of uneven slices."""


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

    data: NDArray[Any]
    affine: NDArray[np.float64]

    @property
    def grid(self) -> Grid:
        """The voxel grid."""
        nx, ny, nz = self.data.shape
        return Grid((nx, ny, nz), self.affine)


def embedded(image: Image, other: Image) -> Image:
    """Return an image on the grid of another of which its voxels are a part, 0 around it.

    The image itself where its voxels are not those of the other.
    """
    to_other = np.linalg.inv(other.affine) @ image.affine
    last = np.array(image.data.shape) - 1
    corners = np.array(np.meshgrid(*((0, n) for n in last), indexing="ij")).reshape(3, -1)
    start = np.rint(to_other[:3, 3]).astype(int)
    there = to_other[:3, :3] @ corners + to_other[:3, 3:]
    is_shift = np.abs(there - corners - start[:, np.newaxis]).max() <= SAME_VOXEL
    if not is_shift or (start < 0).any() or (start + last >= other.data.shape).any():
        return image
    data = np.zeros(other.data.shape, image.data.dtype, order="F")
    data[tuple(slice(a, a + n + 1) for a, n in zip(start, last, strict=True))] = image.data
    return Image(data, other.affine)


# --- grid ------------------------------------------------------------------------------------

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

# Ends of the world's axes x, y, z: against them and along them.
_ENDS = ("LR", "PA", "IS")


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


def orientation_of(affine: FloatArray) -> str:
    """Where the array axes of an image point to, such as ``LAS``.

    Parameters
    ----------
    affine : (4, 4) array
        Voxel -> RAS+ mm. An oblique axis counts as the anatomical axis it is closest to: of the
        nearest rotation (polar decomposition), the axes are named in order of certainty, as by
        ``io_orientation`` of nibabel.

    Raises
    ------
    ValueError
        If the affine has an axis without direction.
    """
    lengths_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not lengths_mm.all():
        raise ValueError("affine has an axis without direction")
    left, sizes, right = np.linalg.svd(affine[:3, :3] / lengths_mm)
    kept = sizes > sizes.max() * 3 * np.finfo(np.float64).eps
    rotation = left[:, kept] @ right[kept]
    codes = ["", "", ""]
    for axis in np.argsort(-(rotation**2).max(axis=0), kind="stable"):
        world = np.abs(rotation[:, axis]).argmax()
        if np.allclose(rotation[:, axis], 0):
            raise ValueError("affine has an axis without direction")
        codes[axis] = _ENDS[world][int(rotation[world, axis] > 0)]
        rotation[world] = 0
    return "".join(codes)


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
    wanted = _world_axes(orientation)
    if sorted(wanted) != [0, 1, 2]:
        raise ValueError(f"orientation {orientation!r} is not one each of L/R, A/P and S/I")
    current = orientation_of(affine)
    order = [_world_axes(current).index(axis) for axis in wanted]
    change = np.zeros((4, 4))
    change[3, 3] = 1
    turns = []
    for new, old in enumerate(order):
        turns.append(1 if current[old] == orientation[new] else -1)
        change[old, new] = turns[new]
        change[old, 3] = array.shape[old] - 1 if turns[new] < 0 else 0
    turned = array.transpose(order)[tuple(slice(None, None, turn) for turn in turns)]
    return turned, affine @ change


def _world_axes(orientation: str) -> list[int]:
    """World axis of each array axis; 3 for what is no end of any."""
    axis_of = {end: axis for axis, ends in enumerate(_ENDS) for end in ends}
    return [axis_of.get(end, 3) for end in orientation]


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
