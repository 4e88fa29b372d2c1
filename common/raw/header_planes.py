"""Where the slices of PET headers lie in a NIfTI PET, and so which factor to SUV is whose."""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.dicom.attributes import joined_text, required_number, required_numbers, tag_of, to_ras
from common.dicom.files import Series
from common.dicom.series import Stack
from common.errors import Kind, StudyError, Warning
from common.geometry import Grid, inverse
from common.suv.factors import SuvConversion, spread_factors

FloatArray = NDArray[np.float64]

ON_GRID_VOXELS = 0.1
"""Distance of a header's slice from a slice of the NIfTI PET that still counts as the same."""

SAME_FACTOR = 1e-9
"""Relative difference up to which two factors to SUV are one."""


class Planes(NamedTuple):
    """Where the slices of n headers lie [LPS], as DICOM has it."""

    position_mm: FloatArray  # (n, 3)
    orientation: FloatArray  # (n, 6)
    spacing_mm: FloatArray  # (n, 2), from row to row, from column to column
    matrix: FloatArray  # (n, 2), columns and rows

    def first_and_last_pixel_in(self, grid: Grid) -> FloatArray:
        """Voxel indices of both in an image, (2, n, 3)."""
        columns_mm, rows_mm = ((self.matrix - 1) * self.spacing_mm[:, ::-1]).T[..., np.newaxis]
        diagonal_mm = columns_mm * self.orientation[:, :3] + rows_mm * self.orientation[:, 3:]
        ends_mm = to_ras(np.stack([self.position_mm, self.position_mm + diagonal_mm]))
        to_voxel = inverse(grid.affine)
        return np.asarray(ends_mm @ to_voxel[:3, :3].T + to_voxel[:3, 3])


def planes_of_headers(header: Series | Stack) -> Planes | None:
    """Return where slices lie, if all headers tell."""
    if isinstance(header, Stack):
        planes = [
            (each.position_mm, each.orientation, each.pixel_spacing_mm, each.matrix)
            for each in header.slices
        ]
        return Planes(*map(np.array, zip(*planes, strict=True)))
    headers = [file.header for file in header.files]
    counts = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    if not all(joined_text(each, keyword) for each in headers for keyword in counts):
        return None
    position_mm, orientation, spacing_mm = (
        np.array([required_numbers(each, keyword, count) for each in headers])
        for keyword, count in counts.items()
    )
    matrix = [[required_number(each, k) for k in ("Columns", "Rows")] for each in headers]
    return Planes(position_mm, orientation, spacing_mm, np.array(matrix))


def check_planes_of(pet: Grid, planes: Planes, *, trusted: bool) -> tuple[Warning, ...]:
    """Refuse headers whose slices are none of a NIfTI PET: they belong to another series.

    Where the user trusts them, that is returned as a warning.
    """
    ends = planes.first_and_last_pixel_in(pet)
    voxels = first, last = np.rint(ends)
    on_voxels = np.abs(ends[0] - first).max() <= ON_GRID_VOXELS
    end = np.array(pet.shape) - 1
    inside = np.array_equal(voxels, np.clip(voxels, 0, end))
    extents = np.sort(np.abs(last - first))
    of_matrix = np.sort(np.insert(planes.matrix - 1, 0, 0, axis=1))
    of_slice = [np.sort(np.where(np.arange(3) == axis, 0, end)) for axis in range(3)]
    whole_slices = (extents == of_matrix).all() and any((extents == s).all() for s in of_slice)
    if on_voxels and inside and whole_slices:
        return ()
    trouble = (
        f"the header belongs to another series than the PET ({tag_of('Rows')}, "
        f"{tag_of('Columns')}, {tag_of('PixelSpacing')}, {tag_of('ImagePositionPatient')} or "
        f"{tag_of('ImageOrientationPatient')} does not fit)"
    )
    if trusted:
        return (Warning(Kind.TRUSTED, f"{trouble}: trusted"),)
    raise StudyError(
        f"{trouble}: give a header of this PET, or --trust-geometry if the PET was cropped or "
        "resampled"
    )


def factors_on(pet: Grid, suv: SuvConversion, planes: Planes | None) -> FloatArray:
    """Return factors that broadcast over a NIfTI PET, each on the slice of its header."""
    factors = suv.factors
    if planes is not None:
        first, _ = planes.first_and_last_pixel_in(pet)
        axis = int(np.ptp(first, axis=0).argmax())
        n_slices = pet.shape[axis]
        indices = np.rint(first[:, axis]).astype(int)
        if sorted(indices) == list(range(n_slices)):
            shape = np.where(np.arange(3) == axis, n_slices, 1)
            return factors[np.argsort(indices)].reshape(shape)
    if np.ptp(factors) <= SAME_FACTOR * factors.max():
        one = dataclasses.replace(suv, factors=factors[:1])
        return spread_factors(one, pet.shape[2])[:1].reshape(1, 1, 1)
    raise StudyError(
        "the factor to SUV differs by slice, but the headers do not cover the slices of the PET: "
        "give the header of every slice, or the DICOM series itself"
    )
