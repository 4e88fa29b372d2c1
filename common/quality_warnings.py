"""What resampling to a training grid loses: found, measured in ml, and said in words. Pure.

Whether the scale of the SUV, and the place of the mask, can be right: doubts in words. Pure.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.components import Components, components, voxels_above_zero
from common.errors import Kind, Warning
from common.geometry import Grid
from common.resampling import separable

# --- losses ----------------------------------------------------------------------------------

LEAST_UPTAKE_SUV = 0.5
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
        *_merged(resampled_ids, target),
    ]


def _labelled(ids: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Voxels of lesions (N, 3), and the number of each one's lesion (N,)."""
    voxels = voxels_above_zero(ids)
    return voxels.T, ids[tuple(voxels)]


def _within(voxels: NDArray[np.integer], grid: Grid, other: Grid) -> NDArray[np.bool_]:
    """Which voxels (N, 3) of a grid have their centre in a voxel of the other."""
    to_other = np.linalg.inv(other.affine) @ grid.affine
    there = voxels @ to_other[:3, :3].T + to_other[:3, 3]
    inside = (there >= -0.5) & (there <= np.array(other.shape) - 0.5)
    return np.asarray(inside.all(axis=1))


def _outside(lost_ids: NDArray[np.integer], source: Grid) -> Iterator[Warning]:
    if lost_ids.size:
        yield Warning(
            Kind.OUTSIDE_GRID,
            f"{lost_ids.size * source.voxel_ml:.2f} ml of {len(np.unique(lost_ids))} lesion(s) "
            "lie outside the target grid: give a larger --shape",
        )


def _vanished(
    ids: NDArray[np.integer],
    inside_ids: NDArray[np.integer],
    kept_ids: NDArray[np.integer],
    source: Grid,
) -> Iterator[Warning]:
    vanished = ids[np.isin(ids, np.setdiff1d(inside_ids, kept_ids))]
    if vanished.size:
        yield Warning(
            Kind.VANISHED,
            f"{len(np.unique(vanished))} lesion(s) of {vanished.size * source.voxel_ml:.2f} ml "
            "vanish by resampling: use a finer --spacing",
        )
    if ids.size and not kept_ids.size:
        yield Warning(
            Kind.VANISHED, f"the mask of {ids.size * source.voxel_ml:.2f} ml becomes empty"
        )


def _merged(resampled_ids: NDArray[np.integer], target: Grid) -> Iterator[Warning]:
    found = components(resampled_ids)
    ids = resampled_ids[tuple(found.voxels)]
    pairs = np.unique(np.int64(found.count + 1) * ids + found.numbers)
    lesions_in = np.bincount(pairs % (found.count + 1))
    merged = np.flatnonzero(lesions_in > 1)
    if merged.size:
        n_lesions = lesions_in[merged].sum()
        volume_ml = np.isin(found.numbers, merged).sum() * target.voxel_ml
        yield Warning(
            Kind.MERGED,
            f"{n_lesions} lesions of {volume_ml:.2f} ml merge into {len(merged)} by resampling: "
            "use a finer --spacing",
        )


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
            f"(SUVmax {values.max():.1f} > {brightest:g}) and are clipped: give a larger "
            "--suv-range",
        )
    ]


def uncovered_uptake(suv: NDArray[np.floating], pet: Grid, ct: Grid) -> list[Warning]:
    """Say how much uptake lies where the CT does not reach."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in pet.shape], indexing="ij"))
    if _within(corners.reshape(3, -1).T, pet, ct).all():
        return []
    uncovered = _uncovered_voxels(suv, pet, ct)
    if not uncovered:
        return []
    return [
        Warning(
            Kind.NOT_COVERED,
            f"{uncovered * pet.voxel_ml:.1f} ml of PET with uptake (SUV >= {LEAST_UPTAKE_SUV:g}) "
            "are not covered by the CT: there the CT is filled with air",
        )
    ]


def _uncovered_voxels(suv: NDArray[np.floating], pet: Grid, ct: Grid) -> int:
    box = _covered_box(pet, ct) if separable(pet, ct) else None
    uncovered = 0
    for z in range(pet.shape[2]):
        bright = suv[..., z] >= LEAST_UPTAKE_SUV
        if box is None:
            x, y = np.nonzero(bright)
            covered = _within(np.stack([x, y, np.full_like(x, z)], axis=1), pet, ct)
        else:
            covered = bright[box[:2]] if box[2].start <= z < box[2].stop else bright[:0]
        uncovered += int(np.count_nonzero(bright) - np.count_nonzero(covered))
    return uncovered


def _covered_box(pet: Grid, ct: Grid) -> tuple[slice, ...]:
    """Voxels of a PET whose centres lie in a CT of parallel axes."""
    to_ct = np.linalg.inv(ct.affine) @ pet.affine
    box = []
    for axis, n in enumerate(pet.shape):
        ct_axis = np.abs(to_ct[:3, axis]).argmax()
        there = to_ct[ct_axis, axis] * np.arange(n) + to_ct[ct_axis, 3]
        covered = np.flatnonzero((there >= -0.5) & (there <= ct.shape[ct_axis] - 0.5))
        box.append(slice(covered[0], covered[-1] + 1) if covered.size else slice(0, 0))
    return tuple(box)


# --- plausibility ----------------------------------------------------------------------------

MOST_OF_DOSE = 1.1
"""Dose fraction that no right SUV exceeds: the body holds the injected dose at most, and EANM's
guideline allows a PET to be off by 10 % (Boellaard et al., EJNMMI 2015;42:328-354)."""

LEAST_TISSUE_SUV = 0.1
"""Mean SUV that the tissue in view has at least: fat, the palest, has 0.2 to 0.3."""

TISSUE_FROM_HU = -500.0

BESIDE_MM = 10.0
"""How far from a lesion its surroundings are looked at."""

LEAST_CONTRAST = 1.1
"""SUVmean of lesions over that beside them: of tumours 2 and more, of a mask that slipped 1."""

Array = NDArray[Any]


def dose_out_of_range(
    fraction: float | None, weight_kg: float | None, suv: Array, hu: Array, grid: Grid
) -> list[Warning]:
    """Say where an image holds more of the injected dose, or less, than it can.

    Parameters
    ----------
    fraction : float or None
        As of :func:`common.lesions.dose_fraction`; None where it is unknown.
    weight_kg : float or None
    suv, hu : (X, Y, Z) arrays
        PET and CT on one grid: how much tissue is in view bounds the fraction below. Where the
        image is a crop, the fraction itself is small and tells nothing.
    grid : Grid
    """
    if fraction is None or not weight_kg:
        return []
    remedy = (
        "check PatientWeight (0010,1030) and RadionuclideTotalDose (0018,1074) of its header, "
        "and --pet-units"
    )
    if fraction > MOST_OF_DOSE:
        return [
            Warning(
                Kind.DOSE_FRACTION,
                f"dose fraction out of range: the PET holds {fraction:.3g} times the "
                f"injected dose: " + remedy,
            )
        ]
    # Tissue of the whole body's weight would need no more than this.
    if fraction >= LEAST_TISSUE_SUV:
        return []
    # A millilitre of tissue weighs about a gram.
    tissue_g = grid.voxel_ml * np.count_nonzero((hu > TISSUE_FROM_HU) & (suv > 0))
    if 1000 * weight_kg * fraction >= LEAST_TISSUE_SUV * tissue_g:
        return []
    mean_suv = 1000 * weight_kg * fraction / tissue_g
    return [
        Warning(
            Kind.DOSE_FRACTION,
            f"dose fraction out of range: {fraction:.3g}, for the {tissue_g / 1000:.3g} kg of "
            f"tissue in view have a mean SUV of {mean_suv:.2g}: {remedy}",
        )
    ]


def mask_far_from_uptake(suv: Array, mask: Array, grid: Grid) -> list[Warning]:
    """Say which lesions have no uptake in or near them, or that a mask seems to have slipped.

    Parameters
    ----------
    suv, mask : (X, Y, Z) arrays
        On one grid, the PET's own.
    grid : Grid
    """
    lesions = components(mask)
    if not lesions.count:
        return []
    reach = np.maximum(1, np.rint(BESIDE_MM / np.array(grid.spacing_mm))).astype(int)
    values = suv[tuple(lesions.voxels)]
    suv_max = np.maximum.reduceat(values, lesions.starts)
    pale = np.flatnonzero(suv_max < LEAST_UPTAKE_SUV).tolist()
    far = [i for i in pale if _around(suv, lesions, i, reach).max() < LEAST_UPTAKE_SUV]
    doubts: list[Warning] = []
    remedy = "check that mask and PET belong together"
    if far:
        volume_ml = lesions.sizes[far].sum() * grid.voxel_ml
        doubts.append(
            Warning(
                Kind.FAR_FROM_UPTAKE,
                f"mask far from uptake: {len(far)} lesion(s) of {volume_ml:.2f} ml have none "
                f"(SUV >= {LEAST_UPTAKE_SUV:g}) within {BESIDE_MM:g} mm: " + remedy,
            )
        )
    beside = _beside(suv, mask, lesions, reach)
    if len(far) < lesions.count and beside.size:
        within, around = values.mean(dtype=np.float64), beside.mean(dtype=np.float64)
        if within < LEAST_CONTRAST * around:
            doubts.append(
                Warning(
                    Kind.FAR_FROM_UPTAKE,
                    f"mask far from uptake: SUVmean is {within:.2f} in it and {around:.2f} at "
                    f"{BESIDE_MM:g} mm beside it: " + remedy,
                )
            )
    return doubts


def _around(suv: Array, lesions: Components, index: int, reach: NDArray[np.integer]) -> Array:
    """The box of SUVs that holds a lesion and what is within reach of it."""
    start = lesions.starts[index]
    voxels = lesions.voxels[:, start : start + lesions.sizes[index]]
    firsts = np.maximum(0, voxels.min(axis=1) - reach)
    lasts = voxels.max(axis=1) + reach
    box: Array = suv[tuple(slice(a, b + 1) for a, b in zip(firsts, lasts, strict=True))]
    return box


def _beside(suv: Array, mask: Array, lesions: Components, reach: NDArray[np.integer]) -> Array:
    """SUVs of voxels outside the mask, a reach along an axis from one of its voxels."""
    found = []
    for axis, step in enumerate(reach):
        for shift in (-step, step):
            near = lesions.voxels.copy()
            near[axis] += shift
            near = near[:, (near[axis] >= 0) & (near[axis] < suv.shape[axis])]
            found.append(suv[tuple(near[:, mask[tuple(near)] == 0])])
    return np.concatenate(found)
