"""Pictures people look at: rotating projections as GIF and PNG, and those of the page's cards.

Every picture says which side is which and what its shades and colours stand for. PET is in inverse
grey, black from `BLACK_AT_SUV` on; PET over CT is in colours of rising lightness, the inferno map
without its ends, so that no uptake looks like bone.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from common.geometry import Grid, reorient
from common.lesions import label_lesions
from common.run.output import writing_beside

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


def _write(
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


def _write_sides(
    picture: Image.Image,
    box: tuple[int, int, int, int],
    sides: str,
    pixels: int = _FONT_PIXELS,
) -> None:
    """Write what is on the left and on the right of a part (left, top, right, bottom)."""
    left, top, right, bottom = box
    middle = (top + bottom) / 2
    _write(picture, (left + 3, middle), sides[0], "lm", pixels)
    _write(picture, (right - 3, middle), sides[1], "rm", pixels)


def _draw_bar(
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
        _write(picture, (beside, top + share * height), suv_here, "lm", pixels)
    _write(picture, (left - 2, top - pixels), "SUV", "lm", pixels)


def _outlined(pixels: Array, mask: Array, contour: Array, width: int) -> None:
    """Draw, in place, the mask's outline around it and the isocontour's within."""
    pixels[ndimage.binary_dilation(mask, iterations=width) & ~mask] = MASK_RGB
    pixels[contour & ~ndimage.binary_erosion(contour, iterations=width)] = CONTOUR_RGB


def _in_units(values: Array, limits: Sequence[float]) -> NDArray[np.float32]:
    low, high = limits
    result: NDArray[np.float32] = values.astype(np.float32) * (high - low) + low
    return result


# --- films and stills ------------------------------------------------------------------------

FRAME_MS = 80
LEAST_HEIGHT = 400
"""Pixels of a film's or still's projection from head to foot, at least."""

OUTLINE_RGB = (214, 40, 40)

_GREYS = 64
"""Shades in a picture: more are not seen, and noise makes films of more twice as large."""

_OUTLINE = _GREYS
_MARGIN = 44
"""Pixels on the right of a frame for the bar of SUVs."""


def mip_frames(
    pet: NDArray[np.floating],
    masks: NDArray[np.unsignedinteger],
    angles: Sequence[float],
    suv_range: Sequence[float],
    spacing_mm: Sequence[float],
    orientation: str,
) -> list[Image.Image]:
    """Return one palette picture a projection, head up, seen from the front at angle 0.

    Parameters
    ----------
    pet : (N, X, Z) array
        Projections of PET normalised from `suv_range` to [0, 1].
    masks : (N, X, Z) array
    angles : sequence of N floats
        Of the rotation about the body's axis [degrees].
    suv_range : (float, float)
    spacing_mm : (float, float)
        Pixel size along x and z [mm]; pictures have square pixels, none larger than the smaller.
    orientation : str
        Where the axes of the volume pointed to, such as LAS.
    """
    frame = _framing(pet.shape[1:], spacing_mm)
    return [
        _frame(p, m, angle, suv_range, frame, orientation)
        for p, m, angle in zip(pet, masks, angles, strict=True)
    ]


def _framing(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, int]:
    """Return width and height [pixels] of a projection with square pixels."""
    extent_mm = [n * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    per_mm = max(1 / min(spacing_mm), LEAST_HEIGHT / extent_mm[1])
    width, height = (max(1, round(mm * per_mm)) for mm in extent_mm)
    return width, height


def _frame(
    pet: NDArray[np.floating],
    mask: NDArray[np.unsignedinteger],
    angle: float,
    suv_range: Sequence[float],
    size: tuple[int, int],
    orientation: str,
) -> Image.Image:
    shade = grey_of_suv(_in_units(pet, suv_range)).astype(np.uint8)
    picture = _upright(shade, orientation).resize(size, Image.Resampling.BILINEAR)
    shown = np.where(mask > 0, np.uint8(255), np.uint8(0))
    lesion = _upright(shown, orientation).resize(size, Image.Resampling.NEAREST)
    inside = np.asarray(lesion) > 0
    canvas = Image.new("RGB", (size[0] + _MARGIN, size[1]), (255, 255, 255))
    canvas.paste(picture.convert("RGB"), (0, 0))
    # Half a turn on, right and left have changed places; at a quarter one looks from the side.
    turned = np.cos(np.deg2rad(angle))
    if abs(turned) > 0.5:
        _write_sides(canvas, (0, 0, size[0], size[1]), "RL" if turned > 0 else "LR")
    _write(canvas, (4, size[1] - 4), f"{angle:g}\u00b0", "lb")
    _draw_bar(canvas, size[0] + 6, 24, min(160, size[1] - 40), overlay=False)
    pixels = np.array(canvas.convert("L")) // np.uint8(256 // _GREYS)
    outline = ndimage.binary_dilation(inside) & ~inside
    pixels[:, : size[0]][outline] = _OUTLINE
    frame = Image.fromarray(pixels, mode="L").convert("P")
    greys = [level * 255 // (_GREYS - 1) for level in range(_GREYS) for _ in range(3)]
    frame.putpalette([*greys, *OUTLINE_RGB])
    return frame


def _upright(plane: NDArray[np.uint8], orientation: str) -> Image.Image:
    """Turn a projection (X, Z) into a picture: rows go down the body, columns to its left."""
    rows = plane.T
    if orientation[2] == "S":
        rows = rows[::-1]
    if orientation[0] == "R":
        rows = rows[:, ::-1]
    return Image.fromarray(np.ascontiguousarray(rows))


def write_films(
    paths: Sequence[Path],
    mips: Mapping[str, Array],
    angles: Sequence[float],
    of_volume: Mapping[str, Any],
) -> None:
    """Write the rotating projection of one study as .gif, and its first frame as .png.

    Parameters
    ----------
    paths : sequence of Path
        One or both; each is replaced at once.
    mips : dict of group to (N, C, X, Z) array
        In [0, 1] and labels, from N angles.
    angles : sequence of N floats
        [degrees]
    of_volume : dict
        Attributes of the image that was projected.
    """
    pet, masks, angles = full_turn(mips["image"][:, 0], mips["mask"][:, 0], angles)
    frames = mip_frames(
        pet,
        masks,
        angles,
        suv_range=of_volume["suv_range"],
        spacing_mm=(of_volume["spacing"][0], of_volume["spacing"][2]),
        orientation=of_volume["orientation"],
    )
    for path in paths:
        with writing_beside(path) as temporary:
            if path.suffix == ".gif":
                write_gif(temporary, frames)
            else:
                write_png(temporary, frames[0])


def write_png(path: Path, frame: Image.Image) -> None:
    """Write one picture."""
    frame.save(path, optimize=True)


def write_gif(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write a film that plays on."""
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, optimize=False
    )


def full_turn(
    pet: Array, masks: Array, angles: Sequence[float]
) -> tuple[Array, Array, Sequence[float]]:
    """Complete half a turn of projections (N, X, Z) by its mirror images."""
    step = angles[1] - angles[0] if len(angles) > 1 else 0.0
    if len(angles) < 2 or abs(angles[-1] + step - angles[0] - 180) > 1e-6:
        return pet, masks, angles
    mirrored = [angle + 180 for angle in angles]
    return (
        np.concatenate([pet, pet[:, ::-1]]),
        np.concatenate([masks, masks[:, ::-1]]),
        [*angles, *mirrored],
    )


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
    suv = _in_units(pet, attributes["suv_range"])
    return Volumes(suv, _in_units(ct, attributes["ct_range"]), mask, mask_iso > 0, grid)


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
            _write(picture, beside, str(number), "lb", _LETTER_PIXELS)
        sides, words = _SIDES[name]
        _write_sides(picture, (0, 0, *size), sides, _LETTER_PIXELS)
        top = 2 * _LETTER_PIXELS
        length = min(240, canvas[1] - top - _LETTER_PIXELS)
        _draw_bar(picture, width + 14, top, length, overlay=False, pixels=_LETTER_PIXELS)
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
            _write(picture, (left + 2, top - _HEADING / 2), heading, "lm")
            _write_sides(picture, (left, top, left + side, top + side), _SIDES[name][0])
            _write(picture, (left + 3, top + side - 3), place, "lb")
        _draw_bar(picture, lefts[1] - bar, top + 20, side - 40, overlay=False)
        _draw_bar(picture, lefts[2] + side + 6, top + 20, side - 40, overlay=True)
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
