"""Whether the values of CT, PET and mask can be what they should be: doubts in words. Pure."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.components import Components, components
from common.errors import Kind, Warning
from common.geometry import Grid, Image
from common.resampling import resample_nearest

Array = NDArray[Any]

TISSUE_FROM_HU = -500
"""Above it lies the body but for lung and gas, below it air."""

COARSE_MM = 4.0
"""Distance of the voxels by which the body in view is measured."""


def coarse(image: Image) -> Image:
    """Return an image of every n-th voxel, about `COARSE_MM` apart: a view."""
    every_nth = tuple(slice(None, None, step) for step in _steps(image.grid))
    return Image(image.data[every_nth], _coarse_grid(image.grid).affine)


def _coarse_grid(grid: Grid) -> Grid:
    """Return the grid of a coarse image."""
    steps = _steps(grid)
    nx, ny, nz = (-(-n // step) for n, step in zip(grid.shape, steps, strict=True))
    affine = grid.affine.copy()
    affine[:3, :3] *= steps
    return Grid((nx, ny, nz), affine)


def _steps(grid: Grid) -> list[int]:
    return [max(1, round(COARSE_MM / mm)) for mm in grid.spacing_mm]


# --- CT --------------------------------------------------------------------------------------

LEAST_TISSUE = 0.01
"""Part of a CT that the body fills at least; a thin arm in the widest field fills more."""


@dataclass(frozen=True, eq=False)
class CtSummary:
    """What is kept of a CT, when it is no longer in memory, to hold PET and mask against.

    Attributes
    ----------
    least_hu, greatest_hu : float
    tissue : Image
        Which of its coarse voxels are above `TISSUE_FROM_HU`, uint8.
    """

    least_hu: float
    greatest_hu: float
    tissue: Image


def summary_of(ct: Image) -> CtSummary:
    """Summarise a CT [HU]."""
    few = coarse(ct)
    tissue = Image((few.data > TISSUE_FROM_HU).astype(np.uint8), few.affine)
    return CtSummary(*ct.extremes, tissue)


@functools.lru_cache(maxsize=1)
def _tissue_on(pet: Grid, ct: CtSummary) -> NDArray[np.bool_]:
    """Return which voxels of a PET's grid are tissue by the CT."""
    return resample_nearest(ct.tissue.data, ct.tissue.grid, pet) > 0


def implausible_pet(
    ct: CtSummary, pet: Image, fraction: float | None, weight_kg: float | None
) -> list[Warning]:
    """Say what of a study's CT and PET can't be right: the same as it is taken in and trained on.

    Parameters
    ----------
    ct : CtSummary
    pet : Image
        [SUV]
    fraction, weight_kg : float or None
        As `dose_out_of_range` takes them.
    """
    return [*implausible_images(ct, pet), *dose_out_of_range(fraction, weight_kg, ct, pet)]


def implausible_mask(mask: Image, ct: CtSummary, pet: Grid) -> list[Warning]:
    """Say what of a study's mask can't be right: the same as it is taken in and trained on."""
    return [*implausible_volume(mask, ct, pet), *fallen_into_slices(mask)]


def implausible_images(ct: CtSummary, pet: Image) -> list[Warning]:
    """Say where a CT can't be in HU, or a PET in SUV."""
    few = coarse(pet)
    return [
        *_other_unit(pet.extremes[1]),
        *_no_hu(ct, few.data),
        *(_negative_uptake(few.data, _tissue_on(few.grid, ct)) if pet.extremes[0] < 0 else ()),
    ]


def _no_hu(ct: CtSummary, suv: Array) -> Iterator[Warning]:
    span = f"its values are {ct.least_hu:g} to {ct.greatest_hu:g}"
    if ct.least_hu >= TISSUE_FROM_HU:
        if suv.min() < TISSUE_FROM_HU:
            yield Warning(
                Kind.IMPLAUSIBLE,
                f"CT and PET may be swapped: the PET has values down to {suv.min():g}, the CT none "
                f"below {TISSUE_FROM_HU:g} HU: choose them with --ct and --pet",
            )
        else:
            yield Warning(
                Kind.IMPLAUSIBLE,
                f"the CT may be no HU: no voxel is below {TISSUE_FROM_HU:g} HU, as air is "
                f"({span}): check that it is neither shifted nor windowed",
            )
    elif ct.tissue.data.mean() < LEAST_TISSUE:
        yield Warning(
            Kind.IMPLAUSIBLE,
            f"the CT may be no HU: hardly a voxel is above {TISSUE_FROM_HU:g} HU, as the body is "
            f"({span}): check that it is not shifted",
        )


# --- PET -------------------------------------------------------------------------------------

LARGEST_SUV = (0.1, 1000.0)
"""What the largest SUV of a PET lies between, unless its values have another unit than believed."""


def _other_unit(largest: float) -> Iterator[Warning]:
    least, most = LARGEST_SUV
    if not least <= largest <= most:
        yield Warning(
            Kind.IMPLAUSIBLE,
            f"the largest SUV of the PET is {largest:.3g}: check the unit of its values "
            "(--pet-units)",
        )


NOISE_SUV = 0.05
"""Values that far below 0 are noise of air, which some reconstructions keep."""

MOST_NEGATIVE = 0.1
"""Part of the voxels, or of the uptake, that may lie below 0."""


def _negative_uptake(suv: Array, tissue: NDArray[np.bool_]) -> Iterator[Warning]:
    n_below = n_negative = n_in_tissue = 0
    lost = uptake = 0.0
    # A slice at a time: whole masks and copies take much memory, and time.
    for k in range(suv.shape[2]):
        values = suv[:, :, k].copy(order="K")
        negative = values < 0
        n_below += int(np.count_nonzero(values < -NOISE_SUV))
        n_negative += int(np.count_nonzero(negative))
        n_in_tissue += int(np.count_nonzero(negative & tissue[:, :, k]))
        lost -= float(np.minimum(values, 0).sum(dtype=np.float64))
        uptake += float(np.maximum(values, 0).sum(dtype=np.float64))
    below = n_below / suv.size
    n_tissue = np.count_nonzero(tissue)
    in_tissue = n_in_tissue / n_tissue if n_tissue else 0.0
    if max(below, in_tissue) > MOST_NEGATIVE or lost > MOST_NEGATIVE * uptake:
        yield Warning(
            Kind.IMPLAUSIBLE,
            f"the PET has negative values ({n_negative / suv.size:.0%} of its voxels, "
            f"{in_tissue:.0%} of those in the body, down to SUV {suv.min():.3g}): check the sign "
            "and the padding of "
            "its values (PixelRepresentation (0028,0103), RescaleIntercept (0028,1052))",
        )


MOST_OF_DOSE = 1.1
"""Dose fraction that no right SUV exceeds: the body holds the injected dose at most, and EANM's
guideline allows a PET to be off by 10 % (Boellaard et al., EJNMMI 2015;42:328-354)."""

TISSUE_SUV = (0.1, 20.0)
"""What the mean SUV of the tissue in view lies between: fat, the palest, has 0.2 to 0.3; the brain
alone, skull left out, some 8."""


def weight_of(provenance: Mapping[str, Any]) -> float | None:
    """Return the body weight that an SUVbw was made with [kg]; None for other SUV, or unknown."""
    weight = provenance.get("weight_kg") if provenance.get("suv_type", "bw") == "bw" else None
    return weight if isinstance(weight, int | float) and weight > 0 else None


def dose_out_of_range(
    fraction: float | None, weight_kg: float | None, ct: CtSummary, pet: Image
) -> list[Warning]:
    """Say where an image holds more of the injected dose, or less, than it can.

    Parameters
    ----------
    fraction : float or None
        As of :func:`common.lesions.dose_fraction`; None where it is unknown.
    weight_kg : float or None
    ct : CtSummary
    pet : Image
        How much tissue both have in view bounds the fraction below, and above. Where the image
        is a crop, the fraction itself is small and tells nothing.
    """
    if fraction is None or not weight_kg:
        return []
    remedy = (
        "check PatientWeight (0010,1030) and RadionuclideTotalDose (0018,1074) of its header, "
        "and --pet-units"
    )
    if fraction > MOST_OF_DOSE:
        text = f"the PET holds {fraction:.3g} times the injected dose: {remedy}"
        return [Warning(Kind.DOSE_FRACTION, f"dose fraction out of range: {text}")]
    few = coarse(pet)
    # A millilitre of tissue weighs about a gram.
    tissue_g = few.grid.voxel_ml * np.count_nonzero(_tissue_on(few.grid, ct) & (few.data > 0))
    uptake_g = 1000 * weight_kg * fraction
    least, most = TISSUE_SUV
    if least * tissue_g <= uptake_g <= most * tissue_g or not tissue_g:
        return []
    text = (
        f"{fraction:.3g}, for the {tissue_g / 1000:.3g} kg of tissue in view have a mean SUV of "
        f"{uptake_g / tissue_g:.2g}: {remedy}"
    )
    return [Warning(Kind.DOSE_FRACTION, f"dose fraction out of range: {text}")]


# --- mask ------------------------------------------------------------------------------------

LARGEST_TUMOUR_ML = 1500.0

MOST_OF_BODY, THE_BODY = 0.1, 0.5
"""Parts of the tissue in view from which on a mask is more than tumour, and the body itself."""

LEAST_VIEW_ML = 100.0
"""Tissue below which the view is a crop to the tumour, whose parts tell nothing."""


def implausible_volume(mask: Image, ct: CtSummary, pet: Grid) -> list[Warning]:
    """Say where more is labelled than can be tumour, of the body that the PET has in view."""
    labelled_ml = int(np.count_nonzero(mask.data)) * mask.grid.voxel_ml
    few = _coarse_grid(pet)
    body_ml = int(np.count_nonzero(_tissue_on(few, ct))) * few.voxel_ml
    part = labelled_ml / body_ml if body_ml >= LEAST_VIEW_ML else 0.0
    if labelled_ml <= LARGEST_TUMOUR_ML and part <= MOST_OF_BODY:
        return []
    text = f"implausible volume: {labelled_ml:.0f} ml are labelled"
    if part:
        text += f", {part:.0%} of the body in view ({body_ml:.0f} ml)"
    if part > THE_BODY:
        text += ", as if the body itself were"
    remedy = "neither organs nor background (--roi, --mask)"
    return [Warning(Kind.IMPLAUSIBLE, f"{text}: check that the mask holds tumours alone, {remedy}")]


FURTHEST_SECTIONS, LEAST_SECTION = 3, 4
"""Slices from one section of a lesion to the next, at most, and voxels of each, at least."""


def fallen_into_slices(mask: Image) -> list[Warning]:
    """Say where lesions of one slice each lie one above another, as on every second slice.

    A reader who draws on every second slice means one lesion. Three make sure that it is not by
    chance.
    """
    lesions = components(mask.data)
    sections: set[int] = set()
    distances = set()
    for axis in range(3) if lesions.count > 2 else ():
        heights = lesions.voxels[axis]
        extents = (ends.reduceat(heights, lesions.starts) for ends in (np.maximum, np.minimum))
        is_thin = (next(extents) == next(extents)) & (lesions.sizes >= LEAST_SECTION)
        of_thin = np.repeat(is_thin, lesions.sizes)
        voxels, numbers = lesions.voxels[:, of_thin], lesions.numbers[of_thin]
        for distance in range(2, FURTHEST_SECTIONS + 1):
            lower, upper = _above_each_other(voxels, numbers, axis, distance, mask.data.shape)
            below, above = set(lower.tolist()), set(upper.tolist())
            if below & above:
                sections |= below | above
                distances.add(distance)
    if not sections:
        return []
    return [
        Warning(
            Kind.MASK,
            f"{len(sections)} lesions of one slice each lie {' or '.join(map(str, distances))} "
            "slices apart, one above another: if they are one lesion that was drawn so, draw the "
            "slices between",
        )
    ]


def _above_each_other(
    voxels: Array, numbers: Array, axis: int, distance: int, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Pairs of numbers of which one has a voxel straight above that of the other, as two arrays."""
    above = voxels.copy()
    above[axis] += distance
    inside = above[axis] < shape[axis]
    here = np.ravel_multi_index(tuple(voxels), shape)
    there = np.ravel_multi_index(tuple(above[:, inside]), shape)
    _, lower, upper = np.intersect1d(there, here, assume_unique=True, return_indices=True)
    return numbers[inside][lower], numbers[upper]


NO_UPTAKE_BELOW_SUV = 0.5
"""Lesions whose voxels are all below this have no uptake."""

BESIDE_MM = 10.0
"""How far from a lesion its surroundings are looked at."""

LEAST_CONTRAST = 1.1
"""SUVmean of lesions over that beside them: of most tumours 2 and more, of pale or necrotic ones,
and of a mask that slipped, 1."""

CLEAR_CONTRAST = 1.8
"""What tells a mask that slipped from a pale tumour: the contrast it has where it belongs, which
is twice as bright."""

SLIP_MM, SLIP_STEP_MM = 60.0, 6.0
"""How far, and by what steps, a pale mask is moved to look for the uptake it was drawn on."""

_MOST_PLACES = 1000
"""Voxels of a mask, and beside it, that stand for all of them when it is moved."""


def mask_far_from_uptake(suv: Array, mask: Array, grid: Grid) -> list[Warning]:
    """Say which lesions have no uptake in or near them, or that a mask seems to have slipped.

    A mask no brighter than what is beside it may be of a pale or necrotic tumour: it is doubted
    where uptake of its shape lies elsewhere, mirrored in the image or within `SLIP_MM`.

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
    suv_max = np.maximum.reduceat(suv[tuple(lesions.voxels)], lesions.starts)
    pale = np.flatnonzero(suv_max < NO_UPTAKE_BELOW_SUV).tolist()
    far = [i for i in pale if _around(suv, lesions, i, reach).max() < NO_UPTAKE_BELOW_SUV]
    texts = []
    if far:
        volume_ml = lesions.sizes[far].sum() * grid.voxel_ml
        texts.append(
            f"{len(far)} lesion(s) of {volume_ml:.2f} ml have none (SUV >= "
            f"{NO_UPTAKE_BELOW_SUV:g}) within {BESIDE_MM:g} mm"
        )
    if len(far) < lesions.count:
        texts += _slipped(suv, lesions.voxels, _beside(mask, lesions, reach), grid)
    return [
        Warning(
            Kind.FAR_FROM_UPTAKE,
            f"mask far from uptake: {text}: check that mask and PET belong together",
        )
        for text in texts
    ]


def _around(suv: Array, lesions: Components, index: int, reach: NDArray[np.integer]) -> Array:
    """The box of SUVs that holds a lesion and what is within reach of it."""
    start = lesions.starts[index]
    voxels = lesions.voxels[:, start : start + lesions.sizes[index]]
    firsts = np.maximum(0, voxels.min(axis=1) - reach)
    lasts = voxels.max(axis=1) + reach
    box: Array = suv[tuple(slice(a, b + 1) for a, b in zip(firsts, lasts, strict=True))]
    return box


def _beside(mask: Array, lesions: Components, reach: NDArray[np.integer]) -> Array:
    """Voxels (3, N) outside the mask, of the image or not, a reach along an axis from one in it."""
    found = []
    for axis, step in enumerate(reach):
        for shift in (-step, step):
            near = lesions.voxels.copy()
            near[axis] += shift
            in_image = (near[axis] >= 0) & (near[axis] < mask.shape[axis])
            in_mask = np.zeros(near.shape[1], bool)
            in_mask[in_image] = mask[tuple(near[:, in_image])] > 0
            found.append(near[:, ~in_mask])
    return np.concatenate(found, axis=1)


def _slipped(suv: Array, voxels: Array, beside: Array, grid: Grid) -> Iterator[str]:
    """Say that a mask is as pale as what is beside it, and where uptake of its shape lies."""
    here, around = _mean(suv, voxels), _mean(suv, beside)
    if not here < LEAST_CONTRAST * around:
        return
    few, few_beside = (each[:, :: 1 + each.shape[1] // _MOST_PLACES] for each in (voxels, beside))
    best, found = CLEAR_CONTRAST, ""
    for place, turn, shift in _placements(grid):
        there, beside_there = (
            _mean(suv, turn * each + shift[:, None]) for each in (few, few_beside)
        )
        if there >= 2 * here and there >= best * beside_there > 0:
            best = there / beside_there
            found = f"{there:.2f} and {beside_there:.2f} {place}"
    if found:
        beside_it = f"{around:.2f} at {BESIDE_MM:g} mm beside it"
        yield f"SUVmean is {here:.2f} in it and {beside_it}, but {found}"


def _mean(suv: Array, voxels: Array) -> float:
    """Mean SUV of those of some voxels that lie in the image; NaN where most lie beside it."""
    inside = ((voxels >= 0) & (voxels < np.array(suv.shape)[:, None])).all(axis=0)
    if not inside.any() or inside.mean() < 0.5:
        return float("nan")
    return float(suv[tuple(voxels[:, inside])].mean(dtype=np.float64))


def _placements(grid: Grid) -> Iterator[tuple[str, Array, Array]]:
    """Other places of a mask in its image: in words, and as v -> turn * v + shift [voxels]."""
    last = np.array(grid.shape) - 1
    for mirrored in itertools.product((0, 1), repeat=3):
        if any(mirrored):
            axes = ", ".join(name for name, is_so in zip("xyz", mirrored, strict=True) if is_so)
            turn = 1 - 2 * np.array(mirrored)[:, None]
            yield f"mirrored along {axes}", turn, last * mirrored
    steps = [
        np.unique(np.rint(np.arange(-SLIP_MM, SLIP_MM + 1, SLIP_STEP_MM) / mm).astype(int))
        for mm in grid.spacing_mm
    ]
    for shift in itertools.product(*steps):
        if any(shift):
            x, y, z = (n * mm for n, mm in zip(shift, grid.spacing_mm, strict=True))
            place = f"moved by {x:.0f}, {y:.0f}, {z:.0f} mm along its axes"
            yield place, np.ones((3, 1), int), np.array(shift)
