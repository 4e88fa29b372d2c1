"""Pictures of maximum-intensity projections: PET in inverse grey, lesions outlined."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

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
