"""Masks drawn on unevenly spaced slices, brought onto the even grid of `series.stack_slices`.

Knows pydicom. A mask is read as if the slices it was drawn on were evenly spaced: what is drawn on
a slice stays on it, and gaps are gaps between slices. Each plane of the even grid then takes the
nearest slice.
"""

import dataclasses
import functools
import re

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom.attributes import items, required_numbers, to_ras
from common.dicom.files import DicomFile
from common.dicom.masks import Mask
from common.dicom.rtstruct import read_rtstruct
from common.dicom.seg import read_seg
from common.dicom.series import LARGEST_SLICE_OFFSET, Stack
from common.geometry import Grid, Image, inverse
from common.masks import completed
from common.resampling import resample_nearest

Points = NDArray[np.float64]

_FAR = 1e6
"""Slices beyond an end, up to which the spacing is taken to go on."""


def read_mask_of_uneven(file: DicomFile, stack: Stack, roi: re.Pattern[str] | None = None) -> Mask:
    """Read an RTSTRUCT or SEG that was drawn on the slices of a stack, on the stack's even grid.

    Raises
    ------
    StudyError
        As `read_rtstruct` and `read_seg`.
    """
    slices = _slices_as_if_even(stack)
    if file.modality == "RTSTRUCT":
        move = functools.partial(_moved, stack=stack)
        mask = read_rtstruct(file.header, slices.shape, slices.affine, roi, move)
    else:
        seg = pydicom.dcmread(file.path, force=True)
        _move_frames(seg, stack)
        mask = read_seg(seg, roi, [slices], is_of_images=True)
    whole = completed(Image(mask.labels, mask.affine), slices)
    labels = resample_nearest(whole.data, whole.grid, slices)
    assert stack.places is not None
    # Of two slices as near, within what rounding leaves, the lower one.
    nearest = np.ceil(stack.places.round(3) - 0.5).astype(int)
    on_planes = np.asfortranarray(labels[:, :, nearest])
    return dataclasses.replace(mask, labels=on_planes, affine=stack.affine)


def lies_on_slices(file: DicomFile, stack: Stack) -> bool:
    """Tell whether all frames of a SEG lie on slices of a stack; RTSTRUCTs may lie between.

    A program may have written it on an even grid of its own.
    """
    positions = [
        required_numbers(position, "ImagePositionPatient", 3)
        for groups in items(file.header, "PerFrameFunctionalGroupsSequence")
        for position in items(groups, "PlanePositionSequence")
    ]
    if file.modality == "RTSTRUCT" or not positions:
        return True
    moved = _moved(to_ras(np.array(positions)), stack)
    to_slice = inverse(_slices_as_if_even(stack).affine)
    numbers = moved @ to_slice[2, :3] + to_slice[2, 3]
    return bool(np.abs(numbers - np.rint(numbers)).max() <= LARGEST_SLICE_OFFSET)


def _slices_as_if_even(stack: Stack) -> Grid:
    """Return the grid of the slices if they were evenly spaced from the first to the last."""
    affine = stack.affine.copy()
    affine[:3, 2] *= (stack.shape[2] - 1) / (len(stack.slices) - 1)
    return Grid((*stack.shape[:2], len(stack.slices)), affine)


def _moved(points_mm: Points, stack: Stack) -> Points:
    """Return where points (n, 3) [RAS+ mm] would be if the slices were evenly spaced."""
    slices_at = _voxels(to_ras(np.array([each.position_mm for each in stack.slices])), stack)[:, 2]
    n = len(slices_at)
    voxels = _voxels(points_mm, stack)
    voxels[:, 2] = np.interp(
        voxels[:, 2],
        [slices_at[0] - _FAR, *slices_at, slices_at[-1] + _FAR],
        [-_FAR, *range(n), n - 1 + _FAR],
    )
    affine = _slices_as_if_even(stack).affine
    moved: Points = voxels @ affine[:3, :3].T + affine[:3, 3]
    return moved


def _voxels(points_mm: Points, stack: Stack) -> Points:
    to_voxel = inverse(stack.affine)
    voxels: Points = points_mm @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    return voxels


def _move_frames(seg: Dataset, stack: Stack) -> None:
    """Move the frames of a segmentation likewise, and take away the spacing that it states.

    By pydicom, for `items` returns one object for all headers and frames that say the same.
    """
    shared, frames = (
        seg.get(f"{each}FunctionalGroupsSequence", ()) for each in ("Shared", "PerFrame")
    )
    for groups in (*shared, *frames):
        for position in groups.get("PlanePositionSequence", ()):
            lps_mm = required_numbers(position, "ImagePositionPatient", 3)[np.newaxis]
            position.ImagePositionPatient = to_ras(_moved(to_ras(lps_mm), stack))[0].tolist()
        for measures in groups.get("PixelMeasuresSequence", ()):
            for keyword in ("SpacingBetweenSlices", "SliceThickness"):
                measures.pop(keyword, None)
