"""A volume and where it lies. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.grid import Grid

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
