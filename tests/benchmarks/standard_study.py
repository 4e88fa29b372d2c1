"""An invented PET/CT study of real size and texture, for the benchmarks to work on.

Noise, air and the table look as in real scans to what matters here: gzip, the filters of HDF5 and
the lesion code. The same size gives the same bytes. As a script, it writes a project zip::

    python tests/benchmarks/standard_study.py OUT.zip standard|quiet-air|total-body N_STUDIES
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[2]))

from common import project_zip
from common.geometry import Image

NOISE_SLICES = 16


@dataclass(frozen=True)
class Size:
    """Matrix and slices of CT and PET, their voxel sizes [mm], and whether air has one value."""

    ct_shape: tuple[int, int, int]
    ct_spacing_mm: tuple[float, float, float]
    pet_shape: tuple[int, int, int]
    pet_spacing_mm: tuple[float, float, float]
    quiet_air: bool = False


STANDARD = Size((512, 512, 326), (0.98, 0.98, 3.0), (400, 400, 326), (2.04, 2.04, 3.0))
TOTAL_BODY = Size((512, 512, 1500), (0.98, 0.98, 1.3), (400, 400, 673), (1.65, 1.65, 2.9))
SIZES = {
    "standard": STANDARD,
    "quiet-air": replace(STANDARD, quiet_air=True),
    "total-body": TOTAL_BODY,
}


def write_project(path: Path, size: Size, n_studies: int = 1) -> None:
    """Write a project zip as createproject.py makes them, all its studies alike but for a name."""
    images = {"ct": ct_image(size), "petsuv": pet_image(size), "mask": mask_image(size)}
    record = {"suv": {"suv_type": "bw", "weight_kg": 75.0}}
    parts = {}
    for number in range(n_studies):
        study_hash = f"{number:07x}abc"
        parts[study_hash] = path.with_suffix(f".{number}.part")
        with project_zip.part_of_study(parts[study_hash], "bench", study_hash) as part:
            for role, image in images.items():
                part.add_image(role, image)
            part.add_record(record)
    project_zip.assemble(path, parts, "bench")
    for part in parts.values():
        part.unlink()


def ct_image(size: Size) -> Image:
    """CT [HU], int16: body, lungs, spine and table; correlated noise of 15 HU; field of view."""
    x, y = _plane_mm(size.ct_shape, size.ct_spacing_mm)
    hu = np.full(size.ct_shape[:2], -1000.0)
    hu[(x / 170) ** 2 + (y / 115) ** 2 < 1] = 40
    for side in (-75, 75):
        hu[((x - side) / 50) ** 2 + ((y - 10) / 75) ** 2 < 1] = -800
    hu[(x / 18) ** 2 + ((y + 80) / 18) ** 2 < 1] = 400
    hu[(abs(x) < 190) & (abs(y + 128) < 6)] = -300
    random = np.random.default_rng(1)
    noise = random.standard_normal((*size.ct_shape[:2], NOISE_SLICES), np.float32)
    noise = ndimage.gaussian_filter(noise, (0.7, 0.7, 0))
    noise *= 15 / noise.std()
    volume = _noise(np.rint(noise).astype(np.int16), size.ct_shape)
    volume += hu[..., None].astype(np.int16)
    if size.quiet_air:
        volume[hu == -1000] = -1000
    volume[np.hypot(x, y) > 250] = -1024
    return _image(volume, size.ct_spacing_mm)


def pet_image(size: Size) -> Image:
    """PET [SUV], float32: body and lesions; multiplicative noise; 16 bits stored a slice."""
    x, y = _plane_mm(size.pet_shape, size.pet_spacing_mm)
    body = (x / 170) ** 2 + (y / 115) ** 2 < 1
    random = np.random.default_rng(2)
    noise = random.gamma(4, 0.25, (*size.pet_shape[:2], NOISE_SLICES)).astype(np.float32)
    noise = ndimage.gaussian_filter(noise, 1)
    suv = _noise(noise, size.pet_shape)
    suv *= np.where(body, 1.2, 0 if size.quiet_air else 0.0005).astype(np.float32)[..., None]
    suv += mask_image(size).data * np.float32(8)
    slope = suv.max(axis=(0, 1)) / np.float32(32767)
    return _image(np.rint(suv / slope) * slope, size.pet_spacing_mm)


def mask_image(size: Size) -> Image:
    """25 spheres of 6 to 24 mm on the grid of the PET, uint8."""
    shape, spacing = np.array(size.pet_shape), np.array(size.pet_spacing_mm)
    random = np.random.default_rng(3)
    mask = np.zeros(shape, np.uint8, order="F")
    half_mm = np.array([120, 70, shape[2] * spacing[2] / 2 - 40])
    for middle_mm in random.uniform(-half_mm, half_mm, (25, 3)):
        radius_mm = random.uniform(6, 24)
        middle = middle_mm / spacing + (shape - 1) / 2
        first = np.floor(middle - radius_mm / spacing).astype(int)
        stop = np.ceil(middle + radius_mm / spacing).astype(int) + 1
        box = tuple(slice(a, b) for a, b in zip(first, stop, strict=True))
        squares = [
            ((np.arange(a, b) - m) * s) ** 2
            for a, b, m, s in zip(first, stop, middle, spacing, strict=True)
        ]
        mask[box] |= np.add.outer(np.add.outer(squares[0], squares[1]), squares[2]) < radius_mm**2
    return _image(mask, size.pet_spacing_mm)


def _plane_mm(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> list[np.ndarray]:
    axes = [
        (np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape[:2], spacing_mm[:2], strict=True)
    ]
    return np.meshgrid(*axes, indexing="ij")


def _noise(slices: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """As many slices as asked for, each shifted, so that no pattern recurs for gzip to find."""
    random = np.random.default_rng(0)
    volume = np.empty(shape, slices.dtype, order="F")
    for k in range(shape[2]):
        shift = random.integers(0, shape[:2])
        volume[..., k] = np.roll(slices[..., k % slices.shape[2]], shift, axis=(0, 1))
    return volume


def _image(data: np.ndarray, spacing_mm: tuple[float, float, float]) -> Image:
    """The volume with its middle at the origin, its axes to Left, Posterior and Superior."""
    step = np.array(spacing_mm) * (-1, -1, 1)
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = -step * (np.array(data.shape) - 1) / 2
    return Image(data, affine)


if __name__ == "__main__":
    write_project(Path(sys.argv[1]), SIZES[sys.argv[2]], int(sys.argv[3]))
