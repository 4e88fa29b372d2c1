"""Whether three images can be one study, and a mask is one of labels: what is refused. Pure."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import Kind, StudyError, Warning
from common.geometry import SAME_VOXEL, Grid, Image, corners, moved, voxel_map, within

Array = NDArray[Any]

WHOLE_LABEL = 1e-3
"""Distance from a whole number that a label may have, for the rounding of a NIfTI's scaling."""

_HALF_ULP = float(np.finfo(np.float32).eps / 2)
"""Background over the greatest label that the rounding of slope and intercept can leave."""


def check_overlap(ct: Grid, pet: Grid) -> None:
    """Refuse a CT and a PET whose boxes do not overlap in space.

    Raises
    ------
    StudyError
    """
    if _are_apart(ct, pet):
        raise StudyError(
            "the PET and the CT do not overlap in space: check that they are of one examination"
        )


def check_mask_overlaps(masks: Sequence[Grid], pet: Grid) -> None:
    """Refuse masks of which none overlaps the PET in space, whatever they hold.

    Raises
    ------
    StudyError
    """
    if masks and all(_are_apart(mask, pet) for mask in masks):
        raise _mask_apart()


def _mask_apart() -> StudyError:
    return StudyError(
        "the mask's labelled voxels and the PET do not overlap in space: check that they are of "
        "one examination"
    )


def _are_apart(one: Grid, other: Grid) -> bool:
    """Tell whether the boxes of two grids have no point in common, but for odd corners."""
    return _lies_beside(one, other) or _lies_beside(other, one)


def _lies_beside(one: Grid, other: Grid) -> bool:
    """Tell whether one grid's box lies beside that of another along an axis of the first."""
    there = moved(voxel_map(one, other), corners(other.shape, margin=0.5))
    upper = np.array(one.shape) - 0.5
    return bool((there.max(axis=1) <= -0.5).any() or (there.min(axis=1) >= upper).any())


def check_labels(mask: Image) -> Image:
    """Return a mask as uint8 or uint16 labels.

    Raises
    ------
    StudyError
        Values that are no whole numbers from 0 to 65535. Of floats those pass that only the
        rounding of a NIfTI's scaling keeps from it.
    """
    labels = mask.data
    if labels.dtype.kind == "f":
        labels = _whole_numbers(labels)
    least, greatest, most = labels.min(), labels.max(), np.iinfo(np.uint16).max
    if least < 0 or greatest > most:
        raise StudyError(
            f"the mask has labels from {least:g} to {greatest:g}: give labels from 0 to {most}"
        )
    dtype = np.uint8 if greatest <= np.iinfo(np.uint8).max else np.uint16
    return Image(labels.astype(dtype, copy=False), mask.affine)


def _whole_numbers(values: Array) -> Array:
    whole = np.rint(values)
    rounding = _HALF_ULP * np.abs(whole).max()
    # Slice by slice: masks are large, and mostly 0.
    if any(_not_whole(v, w, rounding) for v, w in _slices(values, whole)):
        raise StudyError(
            "the mask has values that are not whole numbers, as weights, probabilities, smoothed "
            "edges or a wrong scaling (scl_slope, scl_inter) are: give labels 0, 1, 2, ..."
        )
    return whole


def _slices(values: Array, whole: Array) -> Iterator[tuple[Array, Array]]:
    for k in range(values.shape[2]):
        yield values[..., k], whole[..., k]


def _not_whole(values: Array, whole: Array, rounding: float) -> bool:
    off = np.abs(values - whole)
    return bool((off > np.where(whole == 0, rounding, WHOLE_LABEL)).any())


def check_mask(
    mask: Image, pet: Grid, *, allow_empty: bool, warnings: Sequence[Warning] = ()
) -> tuple[Warning, ...]:
    """Refuse a mask without a label on the PET; warn of labels beside it.

    `warnings` of how it was read may say why it is empty.

    Raises
    ------
    StudyError
        No voxel is labelled, unless `allow_empty`; or none of those that are lies in the PET.
    """
    n_labelled, n_on_pet = _count_labelled(mask, pet)
    if not n_labelled:
        if allow_empty:
            return ()
        why = f" ({'; '.join(map(str, warnings))})" if warnings else ""
        raise StudyError(
            f"the mask is empty{why}: give a mask with labelled voxels, or --allow-empty-mask if "
            "the study is negative"
        )
    if not n_on_pet:
        raise _mask_apart()
    if n_on_pet == n_labelled:
        return ()
    beside_ml = (n_labelled - n_on_pet) * mask.grid.voxel_ml
    return (Warning(Kind.MASK, f"{beside_ml:.3g} ml of the mask lie outside the PET"),)


def _count_labelled(mask: Image, pet: Grid) -> tuple[int, int]:
    """Return the number of labelled voxels, and of those whose centre lies in the PET's box."""
    to_pet = voxel_map(pet, mask.grid)
    ends = corners(mask.data.shape, margin=SAME_VOXEL)
    if within(moved(to_pet, ends), pet.shape).all():
        n_labelled = int(np.count_nonzero(mask.data))
        return n_labelled, n_labelled
    n_labelled = n_on_pet = 0
    for k in np.flatnonzero(mask.data.any(axis=(0, 1))):
        # As the voxels lie in memory.
        j, i = np.nonzero(mask.data[:, :, k].T)
        there = moved(to_pet, np.stack([i, j, np.full_like(i, k)]))
        n_labelled += len(i)
        n_on_pet += int(within(there, pet.shape).all(axis=0).sum())
    return n_labelled, n_on_pet
