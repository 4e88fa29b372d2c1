"""Whether the scale of the SUV, and the place of the mask, can be right: doubts in words. Pure."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.components import Components, components
from common.grid import Grid
from common.losses import LEAST_UPTAKE_SUV

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
) -> list[str]:
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
            f"dose fraction out of range: the PET holds {fraction:.3g} times the injected dose: "
            + remedy
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
        f"dose fraction out of range: {fraction:.3g}, for the {tissue_g / 1000:.3g} kg of tissue "
        f"in view have a mean SUV of {mean_suv:.2g}: {remedy}"
    ]


def mask_far_from_uptake(suv: Array, mask: Array, grid: Grid) -> list[str]:
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
    doubts, remedy = [], "check that mask and PET belong together"
    if far:
        volume_ml = lesions.sizes[far].sum() * grid.voxel_ml
        doubts.append(
            f"mask far from uptake: {len(far)} lesion(s) of {volume_ml:.2f} ml have none "
            f"(SUV >= {LEAST_UPTAKE_SUV:g}) within {BESIDE_MM:g} mm: " + remedy
        )
    beside = _beside(suv, mask, lesions, reach)
    if len(far) < lesions.count and beside.size:
        within, around = values.mean(dtype=np.float64), beside.mean(dtype=np.float64)
        if within < LEAST_CONTRAST * around:
            doubts.append(
                f"mask far from uptake: SUVmean is {within:.2f} in it and {around:.2f} at "
                f"{BESIDE_MM:g} mm beside it: " + remedy
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
