"""Pictures people look at: how they are drawn, and those of the page's cards.

Every picture says which side is which and what its shades and colours stand for. PET is in inverse
grey, black from `BLACK_AT_SUV` on; PET over CT is in colours of rising lightness, the inferno map
without its ends, so that no uptake looks like bone.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from common.geometry import Grid, reorient
from common.lesions import label_lesions

Array = NDArray[Any]

BLACK_AT_SUV = 10.0
"""SUV shown black; what is above is black too."""

CT_WINDOW_HU = (-160.0, 240.0)
OVERLAY_FROM_SUV = 1.0

MASK_RGB = (0, 150, 0)
CONTOUR_RGB = (208, 28, 139)
"""Colours of the outlines of mask and isocontour: told apart by the colour-blind, too."""

_INFERNO = np.array(
    [
        (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84),
        (227, 89, 51), (249, 142, 9), (249, 203, 53),
    ],
    np.float64,
)  # fmt: skip
"""Anchors of matplotlib's inferno (CC0) from 1/8 to 7/8: black and near white are left out."""

_FONT_PIXELS = 12
_BAR_PIXELS = 10


# --- drawing ---------------------------------------------------------------------------------


def overlay_rgb(suv: Array) -> NDArray[np.float64]:
    """Return the colours (..., 3) in 0 to 255 that stand for SUV over CT."""
    reach = (suv - OVERLAY_FROM_SUV) / (BLACK_AT_SUV - OVERLAY_FROM_SUV)
    at = np.clip(reach, 0, 1) * (len(_INFERNO) - 1)
    places = np.arange(len(_INFERNO))
    return np.stack([np.interp(at, places, channel) for channel in _INFERNO.T], axis=-1)


def grey_of_suv(suv: Array) -> Array:
    """Return inverse grey in 0 to 255."""
    grey: Array = 255 * (1 - np.clip(suv / BLACK_AT_SUV, 0, 1))
    return grey


def _grey_of_hu(hu: Array) -> Array:
    low, high = CT_WINDOW_HU
    grey: Array = 255 * np.clip((hu - low) / (high - low), 0, 1)
    return grey


def _fused(hu: Array, suv: Array) -> Array:
    """Return PET in colours over CT in grey (..., 3)."""
    opacity = 0.65 * np.clip(2 * (suv - OVERLAY_FROM_SUV), 0, 1)[..., None]
    rgb: Array = (1 - opacity) * _grey_of_hu(hu)[..., None] + opacity * overlay_rgb(suv)
    return rgb


def _as_rgb(grey: Array) -> Array:
    return np.repeat(grey[..., None], 3, axis=-1)


def write_text(
    picture: Image.Image,
    at: tuple[float, float],
    text: str,
    anchor: str,
    pixels: int = _FONT_PIXELS,
) -> None:
    """Write black text with a white edge: to be read on any ground."""
    ImageDraw.Draw(picture).text(
        at,
        text,
        fill=(0, 0, 0),
        font=ImageFont.load_default(size=pixels),
        anchor=anchor,
        stroke_width=2,
        stroke_fill=(255, 255, 255),
    )


def write_sides(
    picture: Image.Image,
    box: tuple[int, int, int, int],
    sides: str,
    pixels: int = _FONT_PIXELS,
) -> None:
    """Write what is on the left and on the right of a part (left, top, right, bottom)."""
    left, top, right, bottom = box
    middle = (top + bottom) / 2
    write_text(picture, (left + 3, middle), sides[0], "lm", pixels)
    write_text(picture, (right - 3, middle), sides[1], "rm", pixels)


def draw_bar(
    picture: Image.Image,
    left: int,
    top: int,
    height: int,
    *,
    overlay: bool,
    pixels: int = _FONT_PIXELS,
) -> None:
    """Draw an upright bar of colours with its SUVs, letters of so many pixels, on its right."""
    suv = np.linspace(BLACK_AT_SUV, 0, height)[:, None].repeat(_BAR_PIXELS, axis=1)
    if overlay:
        air = np.full(suv.shape, CT_WINDOW_HU[0])
        bar = _fused(air, suv)
    else:
        bar = _as_rgb(grey_of_suv(suv))
    picture.paste(Image.fromarray(bar.astype(np.uint8)), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left - 1, top - 1, left + _BAR_PIXELS, top + height), outline=(120, 120, 120))
    beside = left + _BAR_PIXELS + 4
    marks = (0.0, 0.5, 1.0) if height > 3 * pixels else (0.0, 1.0)
    for share in marks:
        suv_here = f"{BLACK_AT_SUV * (1 - share):g}"
        write_text(picture, (beside, top + share * height), suv_here, "lm", pixels)
    write_text(picture, (left - 2, top - pixels), "SUV", "lm", pixels)


def _outlined(pixels: Array, mask: Array, contour: Array, width: int) -> None:
    """Draw, in place, the mask's outline around it and the isocontour's within."""
    pixels[ndimage.binary_dilation(mask, iterations=width) & ~mask] = MASK_RGB
    pixels[contour & ~ndimage.binary_erosion(contour, iterations=width)] = CONTOUR_RGB


def in_units(values: Array, limits: Sequence[float]) -> NDArray[np.float32]:
    """Return HU or SUV of values in [0, 1], by the limits that became 0 and 1."""
    low, high = limits
    result: NDArray[np.float32] = values.astype(np.float32) * (high - low) + low
    return result


# --- the projections of a card ---------------------------------------------------------------

PICTURE_SCALE, OUTLINE_PIXELS = 2, 3
"""Pixels of a picture to one of the volume, and across an outline: WebP blurs narrow colours."""

_LETTER_PIXELS, _BAR_MARGIN, _LEAST_CANVAS = 20, 60, 150
"""Height of letters, as pages show projections smaller than they are; room for the bar, beside
and from top to bottom."""

_SIDES = {
    "coronal": ("RL", "patient's left on the right"),
    "sagittal": ("AP", "front on the left"),
    "axial": ("RL", "patient's left on the right, front up"),
}
"""What is on the left and on the right of a picture."""


@dataclass(frozen=True, eq=False)
class Volumes:
    """One study's volumes for pictures, axes to the Left, Anterior and Superior.

    Attributes
    ----------
    suv, hu, labels, mask_iso : (X, Y, Z) arrays
        `labels` are 1 in lesions, or the labels that they have.
    grid : Grid
    """

    suv: Array
    hu: Array
    labels: Array
    mask_iso: Array
    grid: Grid

    @property
    def mask(self) -> Array:
        """Where lesions are."""
        inside: Array = self.labels > 0
        return inside


def volumes_of(
    image: Array, mask: Array, mask_iso: Array, attributes: Mapping[str, Any]
) -> Volumes:
    """Return volumes turned so that every picture is the same way round, whatever the file's."""
    affine = np.asarray(attributes["affine"])
    pet, ct, mask, mask_iso = (
        reorient(array, affine, "LAS")[0] for array in (image[0], image[1], mask, mask_iso)
    )
    nx, ny, nz = pet.shape
    grid = Grid((nx, ny, nz), reorient(pet, affine, "LAS")[1])
    suv = in_units(pet, attributes["suv_range"])
    return Volumes(suv, in_units(ct, attributes["ct_range"]), mask, mask_iso > 0, grid)


def projections(volumes: Volumes, marks: Mapping[int, Sequence[float]]) -> list[dict[str, str]]:
    """Return the coronal and sagittal projection as data URIs with their alternative texts.

    Parameters
    ----------
    volumes : Volumes
    marks : dict of number to (x, y, z)
        Where lesions lie, in voxels; their numbers are written beside them.
    """
    spacing, whole_mask = volumes.grid.spacing_mm, volumes.mask
    views = []
    for name, axis, across in (("coronal", 1, 0), ("sagittal", 0, 1)):
        mm_per_pixel = min(spacing[across], spacing[2]) / PICTURE_SCALE
        width, height = (
            max(1, round(volumes.grid.shape[a] * spacing[a] / mm_per_pixel)) for a in (across, 2)
        )
        size = (width, height)
        planes = [each.max(axis=axis) for each in (volumes.suv, whole_mask, volumes.mask_iso)]
        # The sagittal one is seen from the patient's left: the back is on the right.
        mirrored = name == "sagittal"
        grey, mask, contour = (_turned(plane, size, mirrored) for plane in planes)
        pixels = _as_rgb(grey_of_suv(grey)).astype(np.uint8)
        _outlined(pixels, mask, contour, OUTLINE_PIXELS)
        canvas = (width + _BAR_MARGIN, max(height, _LEAST_CANVAS))
        picture = Image.new("RGB", canvas, (255, 255, 255))
        picture.paste(Image.fromarray(pixels), (0, 0))
        for number, voxel in marks.items():
            across_px = (voxel[across] + 0.5) * spacing[across] / mm_per_pixel
            down_px = size[1] - (voxel[2] + 0.5) * spacing[2] / mm_per_pixel
            at = size[0] - across_px if mirrored else across_px
            beside = at + 8, max(down_px - 8, _LETTER_PIXELS + 4)
            write_text(picture, beside, str(number), "lb", _LETTER_PIXELS)
        sides, words = _SIDES[name]
        write_sides(picture, (0, 0, *size), sides, _LETTER_PIXELS)
        top = 2 * _LETTER_PIXELS
        length = min(240, canvas[1] - top - _LETTER_PIXELS)
        draw_bar(picture, width + 14, top, length, overlay=False, pixels=_LETTER_PIXELS)
        text = f"PET maximum-intensity projection, {name}, lesions outlined and numbered; {words}"
        views.append(_embedded(picture, f"PET {name}", text))
    return views


def _turned(plane: Array, size: tuple[int, int], mirrored: bool) -> Array:
    """Return a plane [right, up] as rows of a picture of a size; masks by nearest neighbour."""
    rows = np.ascontiguousarray(np.swapaxes(plane[::-1] if mirrored else plane, 0, 1)[::-1])
    if rows.dtype == bool:
        grown = Image.fromarray(rows.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        return np.asarray(grown) > 0
    floats = Image.fromarray(rows.astype(np.float32))
    return np.array(floats.resize(size, Image.Resampling.BILINEAR))


def _embedded(picture: Image.Image, caption: str, alt: str) -> dict[str, str]:
    buffer = io.BytesIO()
    # A quarter of a PNG's size: a thousand studies with three lesions each stay below 150 MB.
    picture.save(buffer, "WEBP", quality=70, method=6)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "src": f"data:image/webp;base64,{data}",
        "width": str(picture.width),
        "height": str(picture.height),
        "caption": caption,
        "alt": alt,
    }


# --- a lesion from three sides ---------------------------------------------------------------

PANEL_MM, PANEL_PIXELS = 170.0, 150
"""Length of the side of a panel, in the body and in the picture."""

_HEADING, _GAP = 18, 4

_PLANES: tuple[tuple[Literal["axial", "coronal", "sagittal"], int, str, tuple[int, int]], ...] = (
    ("axial", 2, "z", (0, 1)),
    ("coronal", 1, "y", (0, 2)),
    ("sagittal", 0, "x", (1, 2)),
)
"""Name, the axis across it, that axis in RAS+, and the axes to the right and up."""


def hottest_voxels(
    volumes: Volumes, lesions: Sequence[Mapping[str, Any]], *, by_label: bool
) -> dict[int, tuple[int, int, int]]:
    """Return the hottest voxel of each lesion, by its number, where the grid still holds it.

    Parameters
    ----------
    volumes : Volumes
    lesions : sequence of dict
        ``label``, ``mtv_ml`` and ``centroid_mm`` (RAS+ mm), as measured on the PET's own grid.
    by_label : bool
        Each is all that has its label, not one connected lesion.
    """
    mask = volumes.mask
    voxels = np.argwhere(mask)
    if not len(voxels):
        return {}
    values = volumes.suv[mask]
    labels = (volumes.labels if by_label else label_lesions(mask)[0])[mask]
    affine = volumes.grid.affine
    places_mm = voxels @ affine[:3, :3].T + affine[:3, 3]
    found = {}
    for lesion in lesions:
        own = labels == lesion["label"]
        if not by_label:
            apart_mm = np.linalg.norm(places_mm - lesion["centroid_mm"], axis=1)
            radius_mm = (750 * lesion["mtv_ml"] / np.pi) ** (1 / 3)
            # What is farther away is another lesion: this one vanished by resampling.
            is_here = apart_mm.min() < 2 * (radius_mm + np.linalg.norm(volumes.grid.spacing_mm))
            own = is_here & (labels == labels[apart_mm.argmin()])
        if own.any():
            found[lesion["label"]] = _hottest(voxels[own], values[own])
    return found


def _hottest(voxels: Array, values: Array) -> tuple[int, int, int]:
    """Return the voxel of the highest value; of several, as where it was clipped, a central one."""
    hottest = voxels[values == values.max()]
    i, j, k = hottest[((hottest - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()].tolist()
    return i, j, k


def lesion_picture(volumes: Volumes, number: int, voxel: Sequence[int]) -> dict[str, str]:
    """Return PET, CT and both in three planes through a voxel, as a data URI.

    Rows are axial, coronal and sagittal; each panel is `PANEL_MM` wide, the voxel in its middle.
    """
    affine = volumes.grid.affine
    place_mm = affine[:3, :3] @ np.asarray(voxel) + affine[:3, 3]
    bar, side = 40, PANEL_PIXELS
    lefts = [0, side + bar + _GAP, 2 * side + bar + 2 * _GAP]
    size = (3 * side + 2 * bar + 2 * _GAP, 3 * (side + _HEADING + _GAP))
    picture = Image.new("RGB", size, (255, 255, 255))
    low, high = CT_WINDOW_HU
    headings = (
        "PET",
        f"CT  W {high - low:g} L {(high + low) / 2:g} HU",
        f"PET from SUV {OVERLAY_FROM_SUV:g} on CT",
    )
    positions = []
    for row, (name, axis, letter, axes) in enumerate(_PLANES):
        top = row * (side + _HEADING + _GAP) + _HEADING
        panels = _panels(volumes, voxel, axis, axes, mirrored=name == "sagittal")
        place = f"{name}, {letter} = {place_mm['xyz'.index(letter)]:.0f} mm"
        positions.append(place)
        for panel, left, heading in zip(panels, lefts, headings, strict=True):
            picture.paste(Image.fromarray(panel), (left, top))
            write_text(picture, (left + 2, top - _HEADING / 2), heading, "lm")
            write_sides(picture, (left, top, left + side, top + side), _SIDES[name][0])
            write_text(picture, (left + 3, top + side - 3), place, "lb")
        draw_bar(picture, lefts[1] - bar, top + 20, side - 40, overlay=False)
        draw_bar(picture, lefts[2] + side + 6, top + 20, side - 40, overlay=True)
    caption = f"Lesion {number}: " + "; ".join(positions)
    alt = (
        f"lesion {number} through its SUVmax: {'; '.join(positions)}; each as PET, CT and PET over "
        "CT, patient's left on the right, front on the left in the sagittal row"
    )
    return _embedded(picture, caption, alt)


def _panels(
    volumes: Volumes, voxel: Sequence[int], axis: int, axes: tuple[int, int], *, mirrored: bool
) -> list[Array]:
    """Return PET, CT and both in one plane as pictures (side, side, 3)."""
    index: list[Any] = [slice(None)] * 3
    index[axis] = voxel[axis]
    steps = [
        (np.arange(PANEL_PIXELS) - (PANEL_PIXELS - 1) / 2)
        * (PANEL_MM / PANEL_PIXELS / volumes.grid.spacing_mm[a])
        + voxel[a]
        for a in axes
    ]
    # Rows go down, the sagittal plane is seen from the patient's left.
    right, up = np.meshgrid(steps[0][::-1] if mirrored else steps[0], steps[1][::-1])

    def cut(volume: Array, beyond: float, order: int) -> Array:
        plane = volume[tuple(index)]
        source = plane.astype(np.uint8) if plane.dtype == bool else plane
        return np.asarray(ndimage.map_coordinates(source, [right, up], order=order, cval=beyond))

    suv, hu = cut(volumes.suv, 0.0, 1), cut(volumes.hu, CT_WINDOW_HU[0], 1)
    mask, contour = cut(volumes.labels, 0, 0) > 0, cut(volumes.mask_iso, 0, 0) > 0
    panels = []
    for rgb in (_as_rgb(grey_of_suv(suv)), _as_rgb(_grey_of_hu(hu)), _fused(hu, suv)):
        pixels = rgb.astype(np.uint8)
        _outlined(pixels, mask, contour, 2)
        panels.append(pixels)
    return panels
