"""Pictures of maximum-intensity projections: PET in inverse grey, lesions outlined.

Pictures of the quality-control page: projections and a slice, lesions outlined, as data URIs.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from common.geometry import Grid, reorient
from common.lesions import label_lesions

# --- pictures --------------------------------------------------------------------------------

BRIGHTEST_SUV = 10.0
"""SUV shown black; what is above is black too."""

FRAME_MS = 80
OUTLINE_RGB = (214, 40, 40)

_GREYS = 64
"""Shades in a picture: more are not seen, and noise makes films of more twice as large."""

_OUTLINE = _GREYS


def mip_frames(
    pet: NDArray[np.floating],
    masks: NDArray[np.uint8],
    suv_range: Sequence[float],
    spacing_mm: Sequence[float],
    orientation: str,
) -> list[Image.Image]:
    """Return one palette picture a projection, head up and the patient's left on the right.

    Parameters
    ----------
    pet : (N, X, Z) array
        Projections of PET normalised from `suv_range` to [0, 1].
    masks : (N, X, Z) array
    suv_range : (float, float)
    spacing_mm : (float, float)
        Pixel size along x and z [mm]; pictures have square pixels of the smaller.
    orientation : str
        Where the axes of the volume pointed to, such as LAS.
    """
    return [
        _frame(p, m, suv_range, spacing_mm, orientation) for p, m in zip(pet, masks, strict=True)
    ]


def _frame(
    pet: NDArray[np.floating],
    mask: NDArray[np.uint8],
    suv_range: Sequence[float],
    spacing_mm: Sequence[float],
    orientation: str,
) -> Image.Image:
    least, greatest = suv_range
    suv = pet.astype(np.float32) * (greatest - least) + least
    shade = ((1 - np.clip(suv / BRIGHTEST_SUV, 0, 1)) * 255).astype(np.uint8)
    size = tuple(
        max(1, round(n * mm / min(spacing_mm))) for n, mm in zip(pet.shape, spacing_mm, strict=True)
    )
    picture = _upright(shade, orientation).resize(size, Image.Resampling.BILINEAR)
    lesion = _upright(mask * np.uint8(255), orientation).resize(size, Image.Resampling.NEAREST)
    inside = np.asarray(lesion) > 0
    pixels = np.asarray(picture) // np.uint8(256 // _GREYS)
    pixels = np.where(ndimage.binary_dilation(inside) & ~inside, np.uint8(_OUTLINE), pixels)
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


def write_png(path: Path, frame: Image.Image) -> None:
    """Write one picture."""
    frame.save(path, optimize=True)


def write_gif(path: Path, frames: Sequence[Image.Image], angles: Sequence[float]) -> None:
    """Write a film that plays on; half a turn is completed by its mirror images."""
    film = list(frames)
    step = angles[1] - angles[0] if len(angles) > 1 else 0.0
    if len(angles) > 1 and abs(angles[-1] + step - angles[0] - 180) < 1e-6:
        film += [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames]
    film[0].save(
        path, save_all=True, append_images=film[1:], duration=FRAME_MS, loop=0, optimize=False
    )


# --- report pictures -------------------------------------------------------------------------

MASK_RGB = (0, 150, 0)
CONTOUR_RGB = (208, 28, 139)
"""Colours of the outlines of mask and isocontour: told apart by the colour-blind, too."""

BLACK_AT_SUV = 10.0
PICTURE_SCALE, OUTLINE_PIXELS = 2, 3
"""Pixels of a picture to one of the volume, and across an outline: WebP blurs narrow colours."""

CT_WINDOW_HU = (-160.0, 240.0)
OVERLAY_FROM_SUV = 1.0

_SIDES = {
    "coronal": ("R", "L", "patient's left on the right"),
    "sagittal": ("A", "P", "front on the left"),
    "axial": ("R", "L", "patient's left on the right, front up"),
}
"""What is on the left and on the right of a picture."""

Array = NDArray[Any]


def views_of(
    image: Array, mask: Array, mask_iso: Array, attributes: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Return the pictures of a card as data URIs with their alternative texts."""
    affine = np.asarray(attributes["affine"])
    # In this orientation every picture is turned the same way, whatever the file's.
    pet, ct, mask, mask_iso = (
        reorient(array, affine, "LAS")[0] for array in (image[0], image[1], mask, mask_iso)
    )
    nx, ny, nz = pet.shape
    spacing = Grid((nx, ny, nz), reorient(pet, affine, "LAS")[1]).spacing_mm
    suv = _in_units(pet, attributes["suv_range"])
    views = []
    for name, axis, across in (("coronal", 1, 0), ("sagittal", 0, 1)):
        grey = 255 * (1 - np.clip(suv.max(axis=axis) / BLACK_AT_SUV, 0, 1))
        rgb = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        outlined = _Plane(
            rgb, mask.max(axis=axis), mask_iso.max(axis=axis), (spacing[across], spacing[2])
        )
        if name == "sagittal":  # seen from the patient's left: the back is on the right
            outlined = outlined.mirrored
        text = f"PET maximum-intensity projection, {name}, lesions outlined"
        views.append(_view(outlined, f"PET {name}", name, text))
    if mask.any():
        hu = _in_units(ct, attributes["ct_range"])
        views.append(_slice_view(hu, suv, mask, mask_iso, spacing))
    return views


def _slice_view(
    hu: Array, suv: Array, mask: Array, mask_iso: Array, spacing: Sequence[float]
) -> dict[str, str]:
    """Return the axial CT slice through the largest lesion, PET over it."""
    labels, _ = label_lesions(mask)
    largest = int(np.bincount(labels.ravel())[1:].argmax()) + 1
    z = int(np.bincount(np.nonzero(labels == largest)[2]).argmax())
    low, high = CT_WINDOW_HU
    grey = np.clip((hu[:, :, z] - low) / (high - low), 0, 1)
    glow = np.clip((suv[:, :, z] - OVERLAY_FROM_SUV) / (BLACK_AT_SUV - OVERLAY_FROM_SUV), 0, 1)
    colours = np.stack([np.minimum(1, 3 * glow), np.clip(3 * glow - 1, 0, 1), glow**4], axis=-1)
    opacity = 0.6 * np.minimum(1, 4 * glow)[..., None]
    rgb = 255 * ((1 - opacity) * grey[..., None] + opacity * colours)
    outlined = _Plane(
        rgb.astype(np.uint8), mask[:, :, z], mask_iso[:, :, z], (spacing[0], spacing[1])
    )
    text = "axial CT slice through the largest lesion, PET over it, lesion outlined"
    return _view(outlined, "CT and PET", "axial", text)


@dataclass(frozen=True, eq=False)
class _Plane:
    """An RGB plane [right, up, 3] with its masks [right, up] and pixel size [mm]."""

    rgb: Array
    mask: Array
    mask_iso: Array
    spacing_mm: tuple[float, float]

    @property
    def mirrored(self) -> "_Plane":
        """The plane seen from behind."""
        return _Plane(self.rgb[::-1], self.mask[::-1], self.mask_iso[::-1], self.spacing_mm)


def _view(plane: _Plane, caption: str, direction: str, alt: str) -> dict[str, str]:
    """Return a picture with square pixels: the mask outlined around it, the isocontour within."""
    width, height = (
        max(1, round(PICTURE_SCALE * n * mm / min(plane.spacing_mm)))
        for n, mm in zip(plane.mask.shape, plane.spacing_mm, strict=True)
    )

    def picture(array: Array, resampling: Image.Resampling) -> Array:
        rows = np.ascontiguousarray(np.swapaxes(array, 0, 1)[::-1])
        return np.array(Image.fromarray(rows).resize((width, height), resampling))

    pixels = picture(plane.rgb, Image.Resampling.BILINEAR)
    mask, contour = (
        picture(m * np.uint8(255), Image.Resampling.NEAREST) > 0
        for m in (plane.mask, plane.mask_iso)
    )
    pixels[ndimage.binary_dilation(mask, iterations=OUTLINE_PIXELS) & ~mask] = MASK_RGB
    inner = ndimage.binary_erosion(contour, iterations=OUTLINE_PIXELS)
    pixels[contour & ~inner] = CONTOUR_RGB
    left, right, sides = _SIDES[direction]
    buffer = io.BytesIO()
    # A quarter of a PNG's size: a thousand studies of three pictures stay below 150 MB.
    Image.fromarray(pixels).save(buffer, "WEBP", quality=80, method=4)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "src": f"data:image/webp;base64,{data}",
        "width": str(width),
        "height": str(height),
        "caption": caption,
        "left": left,
        "right": right,
        "alt": f"{alt}; {sides}",
    }


def _in_units(values: Array, limits: Sequence[float]) -> NDArray[np.float32]:
    low, high = limits
    result: NDArray[np.float32] = values.astype(np.float32) * (high - low) + low
    return result
