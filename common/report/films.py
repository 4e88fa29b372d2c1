"""A study's rotating projection as a film (GIF) or a still (PNG), lesions outlined.

Drawn as the pictures of the page are: see `common.report.pictures`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from common.report.pictures import Array, draw_bar, grey_of_suv, in_units, write_sides, write_text
from common.run.output import writing_beside

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
    shade = grey_of_suv(in_units(pet, suv_range)).astype(np.uint8)
    picture = _upright(shade, orientation).resize(size, Image.Resampling.BILINEAR)
    shown = np.where(mask > 0, np.uint8(255), np.uint8(0))
    lesion = _upright(shown, orientation).resize(size, Image.Resampling.NEAREST)
    inside = np.asarray(lesion) > 0
    canvas = Image.new("RGB", (size[0] + _MARGIN, size[1]), (255, 255, 255))
    canvas.paste(picture.convert("RGB"), (0, 0))
    # Half a turn on, right and left have changed places; at a quarter one looks from the side.
    turned = np.cos(np.deg2rad(angle))
    if abs(turned) > 0.5:
        write_sides(canvas, (0, 0, size[0], size[1]), "RL" if turned > 0 else "LR")
    write_text(canvas, (4, size[1] - 4), f"{angle:g}\u00b0", "lb")
    draw_bar(canvas, size[0] + 6, 24, min(160, size[1] - 40), overlay=False)
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
    film: Path | None,
    still: Path | None,
    mips: Mapping[str, Array],
    angles: Sequence[float],
    of_volume: Mapping[str, Any],
) -> None:
    """Write the rotating projection of one study as a GIF, and its first frame as a PNG.

    Parameters
    ----------
    film, still : Path, optional
        Each is replaced at once; None: not asked for.
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
    if film is not None:
        with writing_beside(film) as temporary:
            write_gif(temporary, frames)
    if still is not None:
        with writing_beside(still) as temporary:
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
