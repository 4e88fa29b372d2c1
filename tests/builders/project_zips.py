"""Project zips of small PET/CT studies, for tests of preprocessing.py and what follows it."""

import gzip
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

Images = dict[str, nibabel.Nifti1Image]


def study_images(
    seed: int = 0,
    ct_shape: tuple[int, int, int] = (56, 50, 34),
    ct_spacing_mm: tuple[float, float, float] = (1.5, 1.5, 2.0),
    pet_shape: tuple[int, int, int] = (20, 18, 16),
    pet_spacing_mm: tuple[float, float, float] = (4.0, 4.0, 4.0),
    turn: NDArray[np.float64] | None = None,
) -> Images:
    """CT [HU], PET [SUV] and mask of one study around the origin, noisy everywhere.

    The mask, on the grid of the PET, has three lesions, two of which touch by a corner. `turn`
    is a rotation of both grids in space, in front of their LPS axes.
    """
    random = np.random.default_rng(seed)
    ct = random.integers(-1024, 1500, ct_shape).astype(np.int16)
    pet = random.gamma(2, 1.0, pet_shape).astype(np.float32)
    mask = np.zeros(pet_shape, np.uint8)
    nx, ny, nz = pet_shape
    mask[nx // 4 : nx // 4 + 3, ny // 3 : ny // 3 + 4, nz // 3 : nz // 3 + 3] = 1
    mask[nx // 4 + 3, ny // 3 + 4, nz // 3 + 3] = 1
    mask[nx // 2 + 2 : nx // 2 + 5, ny // 2 : ny // 2 + 3, nz // 2 : nz // 2 + 4] = 2
    mask[nx // 4, ny - 5, nz - 4] = 1
    pet[mask > 0] *= 5
    return {
        "ct": image(ct, ct_spacing_mm, turn),
        "petsuv": image(pet, pet_spacing_mm, turn),
        "mask": image(mask, pet_spacing_mm, turn),
    }


def image(
    data: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    turn: NDArray[np.float64] | None = None,
) -> nibabel.Nifti1Image:
    """The volume with its middle 3 mm off the origin, its axes to Left, Posterior, Superior."""
    directions = np.diag([-1.0, -1.0, 1.0]) if turn is None else turn @ np.diag([-1.0, -1.0, 1.0])
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing_mm
    affine[:3, 3] = 3 - affine[:3, :3] @ ((np.array(data.shape) - 1) / 2)
    # NIfTI stores single precision: rounded here, what is stored is what is meant.
    return nibabel.Nifti1Image(data, affine.astype(np.float32))


def rotation(degrees: float, axis: int) -> NDArray[np.float64]:
    """Rotation about one axis of space, (3, 3)."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    one, other = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[one, one] = matrix[other, other] = cos
    matrix[one, other], matrix[other, one] = -sin, sin
    return matrix


def write_zip(
    path: Path,
    studies: Mapping[str, Images],
    folder: str = "proj/",
    records: Mapping[str, Any] | None = None,
) -> Path:
    """Write a zip as other tools may: deflated, in any order, studies.json if given."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for study_hash, images in studies.items():
            for role, volume in images.items():
                name = f"{folder}{study_hash}/{study_hash}_{role}.nii.gz"
                archive.writestr(name, gzip.compress(nifti_bytes(volume), 1, mtime=0))
        if records is not None:
            archive.writestr(f"{folder}studies.json", json.dumps(records))
    return path


def nifti_bytes(volume: nibabel.Nifti1Image) -> bytes:
    """The plain .nii file of an image."""
    stream = io.BytesIO()
    volume.to_stream(stream)
    return stream.getvalue()
