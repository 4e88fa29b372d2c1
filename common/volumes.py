"""Training volumes of one study: CT, PET and mask on one grid, isocontour, warnings, measures.

Pure. The steps of `preprocessing.py` in their order; arrays in, arrays out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.components import components, voxels_above_zero
from common.errors import Warning
from common.geometry import Grid, Image, reorient, target_grid
from common.image_checks import check_labels, check_mask, check_overlap
from common.lesions import (
    dose_fraction,
    isocontour,
    measure_lesions,
    tumour_burden,
)
from common.masks import completed
from common.plausibility import (
    implausible_mask,
    implausible_pet,
    mask_far_from_uptake,
    summary_of,
)
from common.quality_warnings import (
    clipped_uptake,
    lesion_losses,
    uncovered_uptake,
    unmeasured_lesions,
)
from common.resampling import resample_cubic, resample_nearest, separable

AIR_HU = -1024
"""Fills the target grid where the CT does not reach [HU]."""

_SLAB = 32
"""Slices turned at a time from the memory's order to the file's."""

_MANTISSA_BITS = 23
_EXPONENT = 0xFF << _MANTISSA_BITS
_EXPONENT_OF_2_TO_MINUS_6 = (127 - 6) << _MANTISSA_BITS
"""Of float32."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """The options that decide the values of a training volume.

    Attributes
    ----------
    spacing : (float, float, float)
        [mm]
    shape : (int, int, int or None)
        Voxels; None where the CT's length decides.
    orientation : str
        Where the array axes point to.
    align : "center" or "corner"
    ct_range, suv_range : (float, float)
        What becomes 0 and 1 [HU, SUV].
    iso_threshold : float
        [percent of a lesion's SUVmax]
    iso_suv : float or None
        Fixed threshold [SUV] instead.
    dtype : "float16" or "float32"
    labels : "binary" or "keep"
        Masks of 0 and 1, or of the label values.
    """

    spacing: tuple[float, float, float] = (2.0, 2.0, 3.0)
    shape: tuple[int, int, int | None] = (200, 200, None)
    orientation: str = "LAS"
    align: Literal["center", "corner"] = "center"
    ct_range: tuple[float, float] = (-1000.0, 1000.0)
    suv_range: tuple[float, float] = (0.0, 40.0)
    iso_threshold: float = 25.0
    iso_suv: float | None = None
    dtype: str = "float16"
    labels: Literal["binary", "keep"] = "binary"

    @property
    def parameters(self) -> dict[str, Any]:
        """The options as files hold them; masks of 0 and 1 go without saying."""
        options = asdict(self)
        if self.labels == "binary":
            del options["labels"]
        return options


@dataclass(frozen=True, eq=False)
class Volume:
    """An array on the target grid, and the grid that it was resampled from."""

    data: Array
    grid: Grid
    source: Grid

    @property
    def axis_by_axis(self) -> bool:
        """Whether the grids were parallel, so that the fast path was taken."""
        return separable(self.source, self.grid)


@dataclass(frozen=True, eq=False)
class PlacedStudy:
    """One study on the target grid, in HU and SUV.

    Attributes
    ----------
    ct, suv, lesions : Volume
        HU, SUV, and the number of each voxel's lesion.
    mask, mask_iso : (X, Y, Z) uint8 arrays
        uint8 or uint16 where label values are kept.
    measures : dict
        Of its lesions and of the study, on the PET's own grid; plain JSON.
    warnings : sequence of Warning
        What the target grid loses, and what can't be right, but for what was known already.
    """

    ct: Volume
    suv: Volume
    lesions: Volume
    mask: NDArray[np.uint8 | np.uint16]
    mask_iso: NDArray[np.uint8 | np.uint16]
    measures: Mapping[str, Any]
    warnings: Sequence[Warning]

    @property
    def images(self) -> dict[str, Image]:
        """The images by the names that they have in files."""
        arrays = {
            "ct": self.ct.data,
            "petsuv": self.suv.data,
            "mask": self.mask,
            "mask_iso": self.mask_iso,
        }
        return {name: Image(array, self.ct.grid.affine) for name, array in arrays.items()}

    @property
    def how_resampled(self) -> str:
        """How each image was resampled, in words."""
        volumes = {"CT": self.ct, "PET": self.suv, "mask": self.lesions}
        return ", ".join(
            f"{name} {'axis by axis' if volume.axis_by_axis else 'by nilearn'}"
            for name, volume in volumes.items()
        )


def place_study(
    read: Callable[[str], Image],
    recipe: Recipe,
    weight_kg: float | None,
    known: Sequence[Warning] = (),
    end_step: Callable[[str], None] = lambda step: None,
) -> PlacedStudy:
    """Read the images of a study, at no time CT and PET both, and bring them onto the target grid.

    Parameters
    ----------
    read : function
        Returns the image "ct" [HU], "petsuv" [SUV] or "mask" (labels).
    recipe : Recipe
    weight_kg : float or None
        Body weight; None where it is unknown.
    known : sequence of Warning
        Not repeated.
    end_step : function, optional
        Called with the name of each step as it ends.

    Raises
    ------
    StudyError
        The images do not belong together; the mask holds no labels.
    """
    original_ct = read("ct")
    end_step("reading")
    ct_grid, ct_summary = original_ct.grid, summary_of(original_ct)
    ct = _place_ct(original_ct, recipe)
    del original_ct
    # Into the memory that has become free, so that the PET finds room there in one piece.
    ct = replace(ct, data=ct.data.copy(order="K"))
    end_step("resampling")
    pet = read("petsuv")
    check_overlap(ct_grid, pet.grid)
    labels = check_labels(read("mask"))
    warnings = [*check_mask(labels, pet.grid, allow_empty=True)]
    labels = completed(labels, pet.grid, ct_grid)
    lesions = number_lesions(labels)
    end_step("reading")
    suv = _place_pet(pet, ct, recipe)
    placed = _place_labels(lesions, ct, recipe)
    kept = recipe.labels == "keep"
    end_step("resampling")
    outlined = _place_labels(labels, ct, recipe) if kept else placed
    mask, mask_iso = outline(suv, outlined, recipe)
    end_step("isocontour")
    warnings += _resampling_warnings(pet, lesions, ct, suv, placed, recipe)
    pet_lesions = _on_pet(lesions, pet)
    pet_labels = _on_pet(labels, pet) if kept else None
    found = measures(pet, pet_lesions, pet_labels, weight_kg, recipe)
    fraction = found["study"]["dose_fraction"]
    warnings += [
        *unmeasured_lesions(lesions.data, lesions.grid, pet_lesions, pet.grid),
        *implausible_pet(ct_summary, pet, fraction, weight_kg),
        *implausible_mask(labels, ct_summary, pet.grid),
        *mask_far_from_uptake(pet.data, pet_lesions, pet.grid),
    ]
    end_step("measures")
    told = {warning.text for warning in known}
    new = [warning for warning in warnings if warning.text not in told]
    return PlacedStudy(ct, suv, placed, mask, mask_iso, found, new)


def _place_ct(ct: Image, recipe: Recipe) -> Volume:
    """Return the CT [HU] on the target grid, which it spans."""
    ct, extremes = _oriented(ct, recipe), ct.extremes
    shape = [n for n in recipe.shape if n is not None]
    target = target_grid(ct.grid, recipe.spacing, shape, recipe.align)
    hu = resample_cubic(ct.data, ct.grid, target, AIR_HU, known_extremes=extremes)
    return Volume(hu, target, ct.grid)


def _place_pet(pet: Image, ct: Volume, recipe: Recipe) -> Volume:
    """Return the PET [SUV] on the grid of the CT."""
    pet, extremes = _oriented(pet, recipe), pet.extremes
    suv = resample_cubic(pet.data, pet.grid, ct.grid, 0, clip=False, known_extremes=extremes)
    return Volume(suv, ct.grid, pet.grid)


def _place_labels(labels: Image, ct: Volume, recipe: Recipe) -> Volume:
    """Return labels, or numbers of lesions, on the grid of the CT; 0 outside."""
    labels = _oriented(labels, recipe)
    return Volume(resample_nearest(labels.data, labels.grid, ct.grid), ct.grid, labels.grid)


def _oriented(image: Image, recipe: Recipe) -> Image:
    return Image(*reorient(image.data, image.affine, recipe.orientation))


def number_lesions(mask: Image) -> Image:
    """Return the mask with each 26-connected lesion numbered from 1, in the smallest type."""
    lesions = components(mask.data)
    ids = np.zeros(mask.data.shape, np.min_scalar_type(lesions.count), order="F")
    ids[tuple(lesions.voxels)] = lesions.numbers
    return Image(ids, mask.affine)


def outline(suv: Volume, labels: Volume, recipe: Recipe) -> tuple[Array, Array]:
    """Return mask and isocontour on the target grid, in C order.

    uint8 of 0 and 1; label values, as uint8 or uint16, where the recipe keeps them.
    """
    voxels = tuple(voxels_above_zero(labels.data))
    kept = recipe.labels == "keep"
    mask = np.zeros(labels.data.shape, labels.data.dtype if kept else np.uint8)
    mask[voxels] = labels.data[voxels] if kept else 1
    contour = isocontour(suv.data, mask, recipe.iso_threshold, recipe.iso_suv)
    return mask, mask * contour if kept else contour.view(np.uint8)


def training_image(suv: Volume, ct: Volume, recipe: Recipe) -> Array:
    """Return (2, X, Y, Z): PET and CT, each from its range to [0, 1], clipped."""
    image = np.empty((2, *ct.grid.shape), recipe.dtype)
    ranges = (recipe.suv_range, recipe.ct_range)
    for channel, volume, value_range in zip(image, (suv, ct), ranges, strict=True):
        for first in range(0, volume.data.shape[2], _SLAB):
            slices = volume.data[..., first : first + _SLAB]
            slab = np.empty(slices.shape, recipe.dtype, order="F")
            for k in range(slices.shape[2]):
                slab[..., k] = _normalised(slices[..., k], value_range, recipe.dtype)
            channel[..., first : first + _SLAB] = slab
    return image


def _normalised(slice_: Array, value_range: tuple[float, float], dtype: str) -> Array:
    least, greatest = value_range
    scaled = slice_ - np.float32(least)
    scaled /= np.float32(greatest - least)
    np.clip(scaled, 0, 1, out=scaled)
    return half_precision(scaled) if dtype == "float16" else scaled


def half_precision(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return float32 values from 0 to 1 as float16, those below 2**-6 as multiples of 2**-16.

    Rounded to nearest, ties to even. From 2**-6 on it is what ``astype`` returns; below, float16
    has finer steps, 0.0006 of 40 SUV and less, which would hold noise of air: a quarter of a file.
    """
    # A power of 2 whose own float32 steps are those of the result: adding it rounds.
    power = values.view(np.int32) & _EXPONENT
    np.clip(power, _EXPONENT_OF_2_TO_MINUS_6, _EXPONENT, out=power)
    power += 13 << _MANTISSA_BITS
    rounded = values + power.view(np.float32)
    rounded -= power.view(np.float32)
    # Below 2**-14 float16 has no exponent, it counts multiples of 2**-24: as float32 has at 0.5.
    half = np.float32(0.5)
    tiny = (rounded + half).view(np.int32)
    tiny -= half.view(np.int32)
    bits = rounded.view(np.int32)
    bits >>= _MANTISSA_BITS - 10
    bits -= (127 - 15) << 10
    # 2**-14 is 1024 in either form. Below it `bits` is too small, above it `tiny` too large.
    np.clip(bits, 1024, tiny, out=bits)
    return bits.astype(np.uint16).view(np.float16)


def _resampling_warnings(
    pet: Image, lesions: Image, ct: Volume, suv: Volume, placed: Volume, recipe: Recipe
) -> list[Warning]:
    """Return warnings of what the target grid, the SUV range or the CT's reach loses."""
    return [
        *lesion_losses(lesions.data, lesions.grid, placed.data, placed.grid),
        *clipped_uptake(suv.data, placed.data, recipe.suv_range[1], suv.grid),
        *uncovered_uptake(pet.data, pet.grid, ct.source),
    ]


def _on_pet(labels: Image, pet: Image) -> Array:
    """Return labels, or numbers of lesions, on the PET's own grid, where they are measured."""
    if labels.grid == pet.grid:
        return labels.data
    return resample_nearest(labels.data, labels.grid, pet.grid)


def measures(
    pet: Image, lesions: Array, labels: Array | None, weight_kg: float | None, recipe: Recipe
) -> dict[str, Any]:
    """Return the measures of each lesion and of the study, on the PET's own grid, as plain JSON.

    Parameters
    ----------
    pet : Image
        [SUV]
    lesions : (X, Y, Z) array
        Number of each voxel's lesion.
    labels : (X, Y, Z) array or None
        Label values, of which each is measured instead of each lesion; the study stays as it is.
    weight_kg : float or None
        ``dose_fraction`` is null where it is unknown.
    recipe : Recipe
    """
    thresholds = recipe.iso_threshold, recipe.iso_suv
    rows = found = measure_lesions(pet.data, lesions, pet.affine, *thresholds)
    if labels is not None:
        rows = measure_lesions(pet.data, lesions, pet.affine, *thresholds, labels)
    fraction = None if weight_kg is None else dose_fraction(pet.data, pet.affine, weight_kg)
    return {
        "lesions": [asdict(row) for row in rows],
        "study": {**asdict(tumour_burden(found)), "dose_fraction": fraction},
    }
