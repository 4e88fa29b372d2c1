"""The quality-control page: one self-contained HTML file, a card a study, no network, no identity.

`study_card` renders one study; cards are made by the workers, each into a file of its own, and
`write_page` puts them behind the page's head. The markup is in ``report.html.j2``.
"""

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from common.grid import Grid, reorient
from common.lesions import label_lesions

TEMPLATE = "report.html.j2"

MASK_RGB = (0, 150, 0)
CONTOUR_RGB = (208, 28, 139)
"""Colours of the outlines of mask and isocontour: told apart by the colour-blind, too."""

BLACK_AT_SUV = 10.0
PICTURE_SCALE, OUTLINE_PIXELS = 2, 3
"""Pixels of a picture to one of the volume, and across an outline: WebP blurs narrow colours."""

CT_WINDOW_HU = (-160.0, 240.0)
OVERLAY_FROM_SUV = 1.0

_ALTERNATIVE_NAMES = {
    "autopet": "first file's AcquisitionTime (autoPET script)",
    "qiba": "QIBA",
    "frame_based": "frame times",
}
_REFERENCE_OF_RULE = {
    "11": "the dose as injected",
    "12a": "the vendor's decay-reference time",
    "12b": "the start of the series",
    "12c": "the frame times, as the series was rewritten",
    "13": "each slice's own mid-scan time",
    "15": "the enhanced object's reference time",
}

_KIND_OF_PHRASE = {
    "outside the target grid": "tumour outside the grid",
    "vanish by resampling": "vanished lesions",
    "becomes empty": "vanished lesions",
    "merge into": "merged lesions",
    "brighter than the SUV range": "clipped uptake",
    "not covered by the CT": "PET not covered by CT",
    "dose fraction out of range": "dose fraction",
    "mask far from uptake": "mask far from uptake",
    "decay reference disagrees": "decay reference disagrees",
}

_SIDES = {
    "coronal": ("R", "L", "patient's left on the right"),
    "sagittal": ("A", "P", "front on the left"),
    "axial": ("R", "L", "patient's left on the right, front up"),
}
"""What is on the left and on the right of a picture."""

Array = NDArray[Any]


def study_card(
    key: str,
    image: Array,
    mask: Array,
    mask_iso: Array,
    attributes: Mapping[str, Any],
    measures: Mapping[str, Any],
    provenance: Mapping[str, Any],
    warnings: Sequence[str],
) -> str:
    """Return the HTML of one study.

    Parameters
    ----------
    key : str
        The study's hash.
    image : (2, X, Y, Z) array
        PET and CT in [0, 1].
    mask, mask_iso : (1, X, Y, Z) arrays
    attributes : dict
        Of the image dataset: affine, ranges, project; of the isocontour's: its threshold.
    measures : dict
        ``lesions`` and ``study``.
    provenance : dict
        Of the SUV.
    warnings : sequence of str
    """
    views = _views(image, mask[0], mask_iso[0], attributes)
    return _template("card").render(
        key=key,
        project=attributes["project"],
        views=views,
        lesions=measures["lesions"],
        study=measures["study"],
        sentence=suv_sentence(provenance),
        alternatives=alternatives_sentence(provenance),
        warnings=warnings,
        kinds="|".join(kinds_of(warnings)),
        contour=_contour(attributes),
        suv_max=max((lesion["suv_max"] for lesion in measures["lesions"]), default=0.0),
    )


def kinds_of(warnings: Sequence[Any]) -> list[str]:
    """Return what a page can be filtered by to find a study with these warnings."""
    if not warnings:
        return ["without warnings"]
    found = {
        next((k for phrase, k in _KIND_OF_PHRASE.items() if phrase in str(text)), "other warnings")
        for text in warnings
    }
    return ["with warnings", *sorted(found)]


def _contour(attributes: Mapping[str, Any]) -> str:
    """Say where the isocontour is."""
    if "iso_suv" in attributes:
        return f"SUV {attributes['iso_suv']:g}"
    return f"{attributes['iso_threshold']:g}\u00a0%" if "iso_threshold" in attributes else ""


def failed_card(key: str, status: str, reason: str) -> str:
    """Return the HTML of a study that is not in the file."""
    return _template("failed").render(key=key, status=status, reason=reason)


def mark_of(path: Path) -> str | None:
    """Return the mark of a page, None where there is none."""
    try:
        with open(path, "rb") as stream:
            found = re.search(rb'<meta name="made-from" content="(\w+)">', stream.read(1000))
    except OSError:
        return None
    return found[1].decode() if found else None


def write_page(stream: BinaryIO, title: str, mark: str, cards: Iterable[bytes]) -> None:
    """Write the page around the cards, which are not held in memory.

    `mark` is a digest of what the page is made from, see `mark_of`.
    """
    page = _template("page").render(
        title=title, mark=mark, mask_rgb=MASK_RGB, contour_rgb=CONTOUR_RGB
    )
    head, tail = page.split("<!-- cards -->")
    stream.write(head.encode())
    for card in cards:
        stream.write(card)
    stream.write(tail.encode())


def _template(part: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    source = environment.loader.get_source(environment, TEMPLATE)[0]  # type: ignore[union-attr]
    marks = dict(zip(("page", "card", "failed"), source.split("{# ---- #}"), strict=True))
    return environment.from_string(marks[part])


# --- sentences -------------------------------------------------------------------------------


def suv_sentence(provenance: Mapping[str, Any]) -> str:
    """Say in one sentence how the SUV came about."""
    if not provenance:
        return "How the SUV came about is not known: the zip has no studies.json."
    units = provenance.get("units")
    parts = [f"SUV ({provenance['suv_type']}, {provenance['suv_units']})"]
    rules = provenance["rule"].split("+")
    if units is None:
        parts.append("as given")
    elif "7" in rules or "8" in rules:
        parts.append(f"as the scanner stored it (Units {units})")
    else:
        reference = next((_REFERENCE_OF_RULE[r] for r in rules if r in _REFERENCE_OF_RULE), None)
        parts.append(f"from Units {units}, DecayCorrection {provenance['decay_correction']}")
        if reference:
            parts.append(f"decay referred to {reference}")
        minutes = provenance.get("minutes_to_reference")
        if minutes and "11" not in rules:
            parts.append(f"{_span(minutes, '.0f')} min after injection")
        parts.append(f"factor {_span(provenance['factor_range'], '.6g')}")
    if provenance.get("weight_kg"):
        parts.append(f"body weight {provenance['weight_kg']:g} kg")
    sentence = ", ".join(parts) + f" (rule {provenance['rule'] or '6'})."
    if provenance.get("reinterpretations"):
        sentence += " Reinterpreted: " + "; ".join(provenance["reinterpretations"]) + "."
    return sentence


def alternatives_sentence(provenance: Mapping[str, Any]) -> str:
    """Say how other rules in use would have scaled the same images; empty where none applies."""
    middle = float(np.mean(provenance.get("factor_range", [0.0])))
    found = {
        name: factor
        for name in _ALTERNATIVE_NAMES
        if (factor := (provenance.get("alternatives") or {}).get(name)) and middle > 0
    }
    if not found or provenance.get("units") not in ("BQML", "CNTS"):
        return ""
    return "Other rules would give: " + ", ".join(
        f"{_ALTERNATIVE_NAMES[name]} {100 * (factor / middle - 1):+.1f} %"
        for name, factor in found.items()
    )


def _span(values: Sequence[float], form: str) -> str:
    first, last = (format(value, form) for value in (values[0], values[-1]))
    return first if first == last else f"{first} to {last}"


# --- pictures --------------------------------------------------------------------------------


def _views(
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
