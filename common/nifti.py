"""NIfTI in and out: any NIfTI-1 or -2 is read and checked, clean NIfTI-1 is written.

The only module that knows the format. Gzip is done by isal, several times faster than zlib.
"""

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from isal import igzip, igzip_lib, isal_zlib
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from common.errors import StudyError
from common.image import Image

LARGEST_VOLUME = 2**31
"""Voxels beyond which a header is taken as damaged: five times a total-body CT."""

LONGEST_AXIS = 2**15 - 1
"""Voxels along one axis, the most that NIfTI-1 can hold."""

PLAUSIBLE_VOXEL_MM, PLAUSIBLE_EXTENT_MM = 0.01, 5000.0
"""Least edge of a voxel and greatest of a volume; the longest scanners reach 2 m."""

LARGEST_DISAGREEMENT_MM = 1.0
"""Distance by which sform and qform may place one voxel differently."""

_SHEAR_MM = 0.1
"""Deviation from perpendicular axes along a volume beyond which no qform is written."""

_LEAST_VOLUME = 0.1
"""Least volume of a voxel over that of a box with its edges; 0.87 at a gantry tilt of 30°."""

_DEFLATE_LIMIT = 1032
"""No deflate stream inflates by more than this factor."""

_COMPRESSION_LEVEL = 3
"""isal's strongest, about the size of zlib's 6."""

_GZIP_FORMAT = 31
"""zlib's number for a gzip stream of the widest window."""

_MAGIC = {348: b"n+1", 540: b"n+2"}
_MAGIC_OF_HALVES = (b"ni1", b"ni2")
_METRES, _MICROMETRES = 1, 3
_QFORM_FIELDS = (
    "qform_code",
    *(f"quatern_{axis}" for axis in "bcd"),
    *(f"qoffset_{a}" for a in "xyz"),
)
_LARGEST_EXTENSIONS = 1 << 24
_BLOCK_VOXELS = 1 << 20


def is_nifti_name(name: str) -> bool:
    """Tell whether a file name ends as NIfTI files do."""
    return name.lower().endswith((".nii", ".nii.gz"))


# --- reading ---------------------------------------------------------------------------------


def read_nifti_file(path: str | os.PathLike[str], role: str) -> Image:
    """Read the NIfTI file at `path`; see `read_nifti`."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            return read_nifti(stream, size, role)
    except OSError as error:
        raise StudyError(f"cannot read the {role} ({error.strerror}): check the file") from error


def read_nifti(stream: BinaryIO, stored_size: int, role: str) -> Image:
    """Read one volume from a stream of a NIfTI file, gzipped or not.

    Parameters
    ----------
    stream : buffered binary file
        At its beginning; read to its end, so that checksums are verified.
    stored_size : int
        Size of the stream [bytes]; a header that promises more than it can hold is refused.
    role : str
        What the image is in the study, for messages: "CT", "PET", "mask".

    Returns
    -------
    Image
        Integers where the header asks for no scaling, else float32; in Fortran order.

    Raises
    ------
    StudyError
        Damaged or truncated data, more data than the header promises, several volumes, no or
        contradictory orientation, units other than mm, values that are not finite numbers.
    """
    try:
        # Files and zip members can be peeked at; the type of open streams does not say so.
        if stream.peek(2)[:2] == b"\x1f\x8b":  # type: ignore[attr-defined]
            with igzip.IGzipFile(fileobj=stream, mode="rb") as inflated:
                return _read_plain(inflated, stored_size * _DEFLATE_LIMIT, role)
        return _read_plain(stream, stored_size, role)
    except (EOFError, gzip.BadGzipFile, zlib.error, igzip_lib.IsalError) as error:  # type: ignore[misc]
        raise StudyError(
            f"the {role} is truncated or damaged (its gzip data end early or fail their "
            "checksum): copy or export it again"
        ) from error


def _read_plain(stream: Any, available: int, role: str) -> Image:
    header = _read_header(stream, role)
    shape = _volume_shape(header, role)
    affine = _checked_affine(header, shape, role)
    stored = _voxel_type(header, role)
    scaling = _scaling(header, role)
    n_bytes = math.prod(shape) * stored.itemsize
    if n_bytes > available:
        raise StudyError(
            f"the {role} is truncated (its header promises {n_bytes} bytes of voxels): "
            "copy or export it again"
        )
    _skip_extensions(stream, header, role)
    data = _read_voxels(stream, shape, stored, scaling, role)
    if stream.read(1):
        raise StudyError(
            f"the {role} holds more data than its header promises: it is damaged, export it again"
        )
    return Image(data, affine)


# --- the header ------------------------------------------------------------------------------


def _read_header(stream: Any, role: str) -> Any:
    size = stream.read(4)
    order = "<" if int.from_bytes(size, "little") in _MAGIC else ">"
    length = int.from_bytes(size, "little" if order == "<" else "big")
    if length not in _MAGIC:
        raise StudyError(f"the {role} is not NIfTI (no NIfTI header): check the file")
    block = bytearray(size + bytes(length - len(size)))
    _fill(memoryview(block)[len(size) :], stream, role)
    kind = nibabel.Nifti1Header if length == 348 else nibabel.Nifti2Header
    header = kind(bytes(block), endianness=order, check=False)
    magic = header["magic"].tobytes()[:3]
    if magic in _MAGIC_OF_HALVES:
        raise StudyError(
            f"the {role} is one half of a pair of .hdr and .img (magic): convert it to .nii.gz"
        )
    if magic != _MAGIC[length]:
        raise StudyError(f"the {role} is not NIfTI (wrong magic): check the file")
    return header


def _volume_shape(header: Any, role: str) -> tuple[int, int, int]:
    n_axes = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1 : n_axes + 1]]
    if not 1 <= n_axes <= 7 or min(dims) < 1:
        raise StudyError(f"the {role} has a damaged NIfTI header (dim): export it again")
    nx, ny, nz, *others = dims + [1] * (3 - len(dims))
    if math.prod(others) > 1:
        raise StudyError(
            f"the {role} holds {math.prod(others)} volumes (4D NIfTI): give one static volume"
        )
    if nx * ny * nz > LARGEST_VOLUME or max(nx, ny, nz) > LONGEST_AXIS:
        raise StudyError(f"the {role} has an implausible size (dim {dims[:3]}): export it again")
    return nx, ny, nz


def _checked_affine(header: Any, shape: tuple[int, int, int], role: str) -> NDArray[np.float64]:
    sform, qform = _stated_affines(header, role)
    affine = qform if sform is None else sform
    if affine is None:
        raise StudyError(
            f"the {role} does not say where it lies (qform_code and sform_code are 0): "
            "convert it again with an orientation"
        )
    spacing_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not abs(np.linalg.det(affine[:3, :3])) > _LEAST_VOLUME * spacing_mm.prod():
        raise StudyError(
            f"the {role} has a zero or degenerate affine (sform, qform): convert it again"
        )
    extent_mm = float((spacing_mm * shape).max())
    if spacing_mm.min() < PLAUSIBLE_VOXEL_MM or extent_mm > PLAUSIBLE_EXTENT_MM:
        raise StudyError(
            f"the {role} has voxels of {spacing_mm.min():.3g} to {spacing_mm.max():.3g} mm and is "
            f"{extent_mm:.3g} mm long (sform, qform), which cannot be: convert it again"
        )
    if sform is not None and qform is not None:
        apart_mm = _largest_distance_mm(sform, qform, shape)
        if apart_mm > LARGEST_DISAGREEMENT_MM:
            raise StudyError(
                f"the {role}'s sform and qform place voxels {apart_mm:.1f} mm apart: "
                "convert it again, or make them equal"
            )
    return affine


def _stated_affines(
    header: Any, role: str
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Return sform and qform [mm], None where the header has none."""
    if int(header["xyzt_units"]) & 7 in (_METRES, _MICROMETRES):
        raise StudyError(
            f"the {role} is measured in metres or micrometres (xyzt_units): convert it to mm"
        )
    # As the reference implementation reads it: many writers leave it 0.
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    try:
        with np.errstate(all="ignore"):
            stated = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise StudyError(
            f"the {role} has a damaged orientation (qform): export it again"
        ) from error
    if not all(affine is None or np.isfinite(affine).all() for affine in stated):
        raise StudyError(f"the {role} has a non-finite affine (sform, qform): convert it again")
    sform, qform = (None if a is None else np.asarray(a, np.float64) for a in stated)
    return sform, qform


def _largest_distance_mm(
    first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, int, int]
) -> float:
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij"), float)
    shift = (first - second) @ corners.reshape(4, -1)
    return float(np.sqrt((shift[:3] ** 2).sum(axis=0)).max())


def _voxel_type(header: Any, role: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise StudyError(
            f"the {role} has a damaged NIfTI header (datatype): export it again"
        ) from error
    if dtype.kind not in "iuf":
        raise StudyError(
            f"the {role} holds no plain numbers (datatype): give one integer or float a voxel"
        )
    return dtype


def _scaling(header: Any, role: str) -> tuple[float, float]:
    """Return slope and intercept from stored value to value; a slope of 0 or NaN means none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise StudyError(
            f"the {role} has a damaged scaling (scl_slope, scl_inter): export it again"
        )
    return slope, intercept


def _skip_extensions(stream: Any, header: Any, role: str) -> None:
    """Read on to where voxels begin; what lies before may identify and goes nowhere."""
    offset = float(header["vox_offset"])
    size = offset - header.template_dtype.itemsize
    if not (0 <= size <= _LARGEST_EXTENSIONS and offset.is_integer()):
        raise StudyError(f"the {role} has a damaged NIfTI header (vox_offset): export it again")
    _fill(memoryview(bytearray(int(size))), stream, role)


# --- voxels ----------------------------------------------------------------------------------


def _read_voxels(
    stream: Any,
    shape: tuple[int, int, int],
    stored: np.dtype[Any],
    scaling: tuple[float, float],
    role: str,
) -> NDArray[Any]:
    """Read and convert block by block, so that the volume is in memory once."""
    slope, intercept = scaling
    scaled = scaling != (1.0, 0.0)
    dtype = np.float32 if scaled or stored.kind == "f" else stored.newbyteorder("=")
    data = np.empty(shape, dtype, order="F")
    flat = data.reshape(-1, order="F")
    block = np.empty(min(flat.size, _BLOCK_VOXELS), stored)
    for start in range(0, flat.size, block.size):
        values = flat[start : start + block.size]
        raw = values if values.dtype == stored and not scaled else block[: values.size]
        _fill(raw.view(np.uint8).data, stream, role)
        if raw is not values:
            with np.errstate(over="ignore", invalid="ignore"):
                values[...] = (
                    np.multiply(raw, slope, dtype=np.float64) + intercept if scaled else raw
                )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise StudyError(
                f"the {role} holds values that are not finite (NaN or inf): export it again"
            )
    return data


def _fill(target: memoryview, stream: Any, role: str) -> None:
    filled = 0
    while filled < len(target):
        n_read = stream.readinto(target[filled:])
        if not n_read:
            raise StudyError(f"the {role} is truncated (data end early): copy or export it again")
        filled += n_read


# --- writing ---------------------------------------------------------------------------------


def encode_nifti(image: Image) -> Iterator[bytes]:
    """Yield the bytes of a ``.nii.gz`` file that holds the volume, its affine, and nothing else.

    sform and qform are equal with code 1; a sheared affine (gantry tilt), which a qform can't
    express, is in the sform alone. The gzip header has neither name nor time.
    """
    squeezer = isal_zlib.compressobj(_COMPRESSION_LEVEL, isal_zlib.DEFLATED, _GZIP_FORMAT)
    no_extensions = bytes(4)
    yield squeezer.compress(_clean_header(image).binaryblock + no_extensions)
    little_endian = image.data.dtype.newbyteorder("<")
    nx, ny, nz = image.data.shape
    n_slices = max(1, _BLOCK_VOXELS // (nx * ny))
    for start in range(0, nz, n_slices):
        slab = image.data[:, :, start : start + n_slices]
        values = slab.astype(little_endian, order="F", copy=False).reshape(-1, order="F")
        yield squeezer.compress(values.view(np.uint8).data)
    yield squeezer.flush()


def _clean_header(image: Image) -> Any:
    header = nibabel.Nifti1Header()
    header.set_data_shape(image.data.shape)
    header.set_data_dtype(image.data.dtype)
    header.set_xyzt_units("mm")
    header.set_sform(image.affine, code=1)
    header.set_qform(image.affine, code=1, strip_shears=True)
    if _shear_mm(image) > _SHEAR_MM:
        for field in _QFORM_FIELDS:
            header[field] = 0
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return header


def _shear_mm(image: Image) -> float:
    spacing_mm = np.array(image.grid.spacing_mm)
    axes = image.affine[:3, :3] / spacing_mm
    cosines = axes.T @ axes - np.eye(3)
    return float(abs(cosines).max() * (spacing_mm * image.data.shape).max())


def write_nifti_file(path: Path, image: Image) -> None:
    """Write a ``.nii.gz`` file; see `encode_nifti`."""
    with open(path, "wb") as stream:
        stream.writelines(encode_nifti(image))
