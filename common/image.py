"""A volume and where it lies. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.grid import Grid


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
