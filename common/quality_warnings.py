"""What resampling to the training grid, and to the PET's, loses: measured in ml, said. Pure."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from common.components import components, voxels_above_zero
from common.errors import Kind, Warning
from common.geometry import Grid, corners, moved, voxel_map, within
from common.resampling import separable

AIR_BELOW_SUV = 0.5
"""PET voxels below this count as air: their lying outside the CT is no loss."""


def lesion_losses(
    lesion_ids: NDArray[np.integer],
    source: Grid,
    resampled_ids: NDArray[np.integer],
    target: Grid,
) -> list[Warning]:
    """Say which labelled voxels and lesions do not survive resampling.

    Parameters
    ----------
    lesion_ids : (X, Y, Z) array
        Number of each voxel's lesion on the mask's own grid, 0 outside.
    source, target : Grid
    resampled_ids : array
        The same on the target grid, by nearest neighbour.
    """
    voxels, ids = _labelled(lesion_ids)
    inside = _within(voxels, source, target)
    _, kept_ids = _labelled(resampled_ids)
    return [
        *_outside(ids[~inside], source),
        *_vanished(ids, ids[inside], kept_ids, source),
        *_merged_and_split(resampled_ids, target),
    ]


def _labelled(ids: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Voxels of lesions (N, 3), and the number of each one's lesion (N,)."""
    voxels = voxels_above_zero(ids)
    return voxels.T, ids[tuple(voxels)]


def _within(voxels: NDArray[np.integer], grid: Grid, other: Grid) -> NDArray[np.bool_]:
    """Which voxels (N, 3) of a grid have their centre in a voxel of the other."""
    there = moved(voxel_map(other, grid), voxels.T)
    return np.asarray(within(there, other.shape).all(axis=0))


def _outside(lost_ids: NDArray[np.integer], source: Grid) -> Iterator[Warning]:
    if lost_ids.size:
        yield Warning(
            Kind.OUTSIDE_GRID,
            f"{lost_ids.size * source.voxel_ml:.2f} ml of {len(np.unique(lost_ids))} lesion(s) "
            "lie outside the training grid: give a larger --shape",
        )


def _vanished(
    ids: NDArray[np.integer],
    inside_ids: NDArray[np.integer],
    kept_ids: NDArray[np.integer],
    source: Grid,
) -> Iterator[Warning]:
    n_ids = int(ids.max(initial=0)) + 1
    inside, kept = (np.bincount(each, minlength=n_ids) > 0 for each in (inside_ids, kept_ids))
    vanished = ids[(inside & ~kept)[ids]]
    if vanished.size:
        yield Warning(
            Kind.VANISHED,
            f"{len(np.unique(vanished))} lesion(s) of {vanished.size * source.voxel_ml:.2f} ml "
            "vanish by resampling to the training grid: use a finer --spacing",
        )
    if ids.size and not kept_ids.size:
        yield Warning(
            Kind.VANISHED,
            f"the mask of {ids.size * source.voxel_ml:.2f} ml becomes empty on the training grid",
        )


def _merged_and_split(resampled_ids: NDArray[np.integer], target: Grid) -> Iterator[Warning]:
    found = components(resampled_ids)
    ids = resampled_ids[tuple(found.voxels)].astype(np.int64)
    # Each pair of a lesion and a part of the resampled mask, once.
    pairs = np.sort(ids * (found.count + 1) + found.numbers)
    lesions, parts = np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], found.count + 1)
    lesions_in, parts_of = np.bincount(parts), np.bincount(lesions)
    merged, split = (np.flatnonzero(counts > 1) for counts in (lesions_in, parts_of))
    if merged.size:
        volume_ml = np.isin(found.numbers, merged).sum() * target.voxel_ml
        yield Warning(
            Kind.MERGED,
            f"{lesions_in[merged].sum()} lesions of {volume_ml:.2f} ml merge into {merged.size} by "
            "resampling to the training grid: use a finer --spacing",
        )
    if split.size:
        volume_ml = np.isin(ids, split).sum() * target.voxel_ml
        yield Warning(
            Kind.SPLIT,
            f"{split.size} lesion(s) of {volume_ml:.2f} ml fall into {parts_of[split].sum()} parts "
            "by resampling to the training grid: use a finer --spacing",
        )


def unmeasured_lesions(
    lesion_ids: NDArray[np.integer], source: Grid, pet_ids: NDArray[np.integer], pet: Grid
) -> list[Warning]:
    """Say which lesions have no voxel of the PET's own grid, on which they are measured.

    Parameters
    ----------
    lesion_ids : (X, Y, Z) array
        Number of each voxel's lesion on the mask's own grid, 0 outside.
    source, pet : Grid
    pet_ids : array
        The same on the PET's grid, by nearest neighbour.
    """
    voxels, ids = _labelled(lesion_ids)
    missing = ~np.isin(ids, _labelled(pet_ids)[1])
    if not missing.any():
        return []
    inside = _within(voxels[missing], source, pet)
    beside = np.setdiff1d(ids[missing], ids[missing][inside])
    warnings = []
    for lost, where in (
        (np.setdiff1d(ids[missing], beside), "fall between the voxels of the PET's own grid"),
        (beside, "lie outside the PET"),
    ):
        if lost.size:
            volume_ml = np.isin(ids, lost).sum() * source.voxel_ml
            text = f"{lost.size} lesion(s) of {volume_ml:.2f} ml {where}"
            warnings.append(Warning(Kind.NOT_MEASURED, f"{text}: they are missing in the measures"))
    return warnings


def turned_axis(orientation: str) -> list[Warning]:
    """Say that projections of volumes of this orientation turn the body about another axis."""
    if orientation[2] in "SI":
        return []
    return [
        Warning(
            Kind.OTHER,
            f"the third axis of its orientation {orientation} is not the body's: the projections "
            "turn about another axis: make the 3D file with an orientation that ends in S or I",
        )
    ]


def clipped_uptake(
    suv: NDArray[np.floating], mask: NDArray[np.integer], brightest: float, grid: Grid
) -> list[Warning]:
    """Say how much of the labelled tumour is brighter than `brightest` and will be clipped."""
    voxels, _ = _labelled(mask)
    values = suv[tuple(voxels.T)]
    clipped = values > brightest
    if not clipped.any():
        return []
    return [
        Warning(
            Kind.CLIPPED,
            f"{clipped.sum() * grid.voxel_ml:.2f} ml of lesions are brighter than the SUV range "
            f"(SUVmax {values.max():.1f} > {brightest:g} on the training grid) and are clipped: "
            "give a larger --suv-range",
        )
    ]


def uncovered_uptake(suv: NDArray[np.floating], pet: Grid, ct: Grid) -> list[Warning]:
    """Say how much uptake lies where the CT does not reach."""
    if _within(corners(pet.shape).T, pet, ct).all():
        return []
    uncovered = _uncovered_voxels(suv, pet, ct)
    if not uncovered:
        return []
    return [
        Warning(
            Kind.NOT_COVERED,
            f"{uncovered * pet.voxel_ml:.1f} ml of PET with uptake (SUV >= {AIR_BELOW_SUV:g}) "
            "are not covered by the CT: there the CT is filled with air",
        )
    ]


def _uncovered_voxels(suv: NDArray[np.floating], pet: Grid, ct: Grid) -> int:
    box = _covered_box(pet, ct) if separable(pet, ct) else None
    uncovered = 0
    for z in range(pet.shape[2]):
        bright = suv[..., z] >= AIR_BELOW_SUV
        if box is None:
            x, y = np.nonzero(bright)
            covered = _within(np.stack([x, y, np.full_like(x, z)], axis=1), pet, ct)
        else:
            covered = bright[box[:2]] if box[2].start <= z < box[2].stop else bright[:0]
        uncovered += int(np.count_nonzero(bright) - np.count_nonzero(covered))
    return uncovered


def _covered_box(pet: Grid, ct: Grid) -> tuple[slice, ...]:
    """Voxels of a PET whose centres lie in a CT of parallel axes."""
    to_ct = voxel_map(ct, pet)
    box = []
    for axis, n in enumerate(pet.shape):
        ct_axis = np.abs(to_ct[:3, axis]).argmax()
        there = to_ct[ct_axis, axis] * np.arange(n) + to_ct[ct_axis, 3]
        covered = np.flatnonzero(within(there[np.newaxis], ct.shape[ct_axis : ct_axis + 1]))
        box.append(slice(covered[0], covered[-1] + 1) if covered.size else slice(0, 0))
    return tuple(box)
