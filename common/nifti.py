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

import numpy as np
from isal import igzip, igzip_lib, isal_zlib
from numpy.typing import NDArray

from common.errors import StudyError
from common.image import Image
from common.nifti_header import NiftiHeader, header_size, parse_header

_SHEAR_MM = 0.1
"""Deviation from perpendicular axes along a volume beyond which no qform is written."""

_DEFLATE_LIMIT = 1032
"""No deflate stream inflates by more than this factor."""

_COMPRESSION_LEVEL = 3
"""isal's strongest, about the size of zlib's 6."""

_GZIP_FORMAT = 31
"""zlib's number for a gzip stream of the widest window."""

_QFORM_FIELDS = (
    "qform_code",
    *(f"quatern_{axis}" for axis in "bcd"),
    *(f"qoffset_{a}" for a in "xyz"),
)
_SLAB_VOXELS = 1 << 20
_BLOCK_VOXELS = 1 << 17
"""Read at a time: they stay in the processor's cache for what is done next."""


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


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Return what the voxels of a NIfTI file take, as its header tells [bytes].

    Raises
    ------
    StudyError
        It can't be read.
    """
    try:
        with open(path, "rb") as stream:
            if stream.peek(2)[:2] == b"\x1f\x8b":
                with igzip.IGzipFile(fileobj=stream, mode="rb") as inflated:
                    header, _ = _read_header(inflated, "image")
            else:
                header, _ = _read_header(stream, "image")
    except (OSError, EOFError, zlib.error, igzip_lib.IsalError) as error:  # type: ignore[misc]
        raise StudyError("the image cannot be read: check the file") from error
    return math.prod(header.shape) * header.stored.itemsize


def _read_header(stream: Any, role: str) -> tuple[NiftiHeader, int]:
    """Return the header and its size [bytes]."""
    beginning = _up_to(4, stream)
    block = bytearray(beginning + bytes(header_size(beginning, role) - len(beginning)))
    _fill(memoryview(block)[len(beginning) :], stream, role)
    return parse_header(bytes(block), role), len(block)


def _read_plain(stream: Any, available: int, role: str) -> Image:
    header, size = _read_header(stream, role)
    n_bytes = math.prod(header.shape) * header.stored.itemsize
    if n_bytes > available:
        raise StudyError(
            f"the {role} is truncated (its header promises {n_bytes} bytes of voxels): "
            "copy or export it again"
        )
    # What lies before the voxels may identify and goes nowhere.
    _fill(memoryview(bytearray(header.voxels_at - size)), stream, role)
    data = _read_voxels(stream, header, role)
    if _up_to(1, stream):
        raise StudyError(
            f"the {role} holds more data than its header promises: it is damaged, export it again"
        )
    return Image(data, header.affine)


# --- voxels ----------------------------------------------------------------------------------


def _read_voxels(stream: Any, header: NiftiHeader, role: str) -> NDArray[Any]:
    """Read and convert block by block, so that the volume is in memory once."""
    stored, scaled = header.stored, (header.slope, header.intercept) != (1, 0)
    dtype = np.float32 if scaled or stored.kind == "f" else stored.newbyteorder("=")
    data = np.empty(header.shape, dtype, order="F")
    flat = data.reshape(-1, order="F")
    block = np.empty(min(flat.size, _BLOCK_VOXELS), stored)
    for start in range(0, flat.size, block.size):
        values = flat[start : start + block.size]
        raw = values if values.dtype == stored and not scaled else block[: values.size]
        _fill(raw.view(np.uint8).data, stream, role)
        with np.errstate(over="ignore", invalid="ignore"):
            if scaled:
                values[...] = np.multiply(raw, header.slope, dtype=np.float64) + header.intercept
            elif raw is not values:
                values[...] = raw
            # NaN is both minimum and maximum.
            finite = data.dtype.kind != "f" or np.isfinite([values.min(), values.max()]).all()
        if not finite:
            raise StudyError(
                f"the {role} holds values that are not finite (NaN or inf): export it again"
            )
    return data


def _fill(target: memoryview, stream: Any, role: str) -> None:
    if _read_into(target, stream) < len(target):
        raise StudyError(f"the {role} is truncated (data end early): copy or export it again")


def _up_to(size: int, stream: Any) -> bytes:
    """Bytes of a stream, fewer at its end."""
    block = bytearray(size)
    return bytes(block[: _read_into(memoryview(block), stream)])


def _read_into(target: memoryview, stream: Any) -> int:
    filled = 0
    while filled < len(target) and (n_read := stream.readinto(target[filled:])):
        filled += n_read
    return filled


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
    n_slices = max(1, _SLAB_VOXELS // (nx * ny))
    for start in range(0, nz, n_slices):
        slab = image.data[:, :, start : start + n_slices]
        values = slab.astype(little_endian, order="F", copy=False).reshape(-1, order="F")
        yield squeezer.compress(values.view(np.uint8).data)
    yield squeezer.flush()


def _clean_header(image: Image) -> Any:
    # Slow to load, and needed by those who write only.
    import nibabel

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
