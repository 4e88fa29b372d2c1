"""NIfTI in and out: any NIfTI-1 or -2 is read and checked, clean NIfTI-1 is written.

The only module that knows the format. Headers are nibabel's, which takes long to load: it is
loaded by those who read or write a file. Gzip is done by libdeflate, several times faster than
zlib, with the same bytes on every processor; it takes whole buffers.
"""

from __future__ import annotations

import gzip
import importlib
import io
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import deflate
import numpy as np
from numpy.typing import NDArray

from common.errors import StudyError, UnreachableStudy, system_error
from common.geometry import Grid, Image, corners, edges_mm, inverse, moved, voxel_ml
from common.packages import without

LARGEST_VOLUME = 2**31
"""Voxels beyond which a header is taken as damaged: five times a total-body CT."""

LONGEST_AXIS = 2**15 - 1
"""Voxels along one axis, the most that NIfTI-1 can hold."""

PLAUSIBLE_VOXEL_MM, PLAUSIBLE_EXTENT_MM = 0.01, 5000.0
"""Least edge of a voxel and greatest of a volume; the longest scanners reach 2 m."""

LARGEST_DISAGREEMENT_MM = 1.0
"""Distance by which sform and qform may place one voxel differently."""

PIXDIM_TOLERANCE = 0.01
"""Part by which pixdim may differ from the affine's voxel sizes: it is often rounded."""

_LEAST_VOLUME = 0.1
"""Least volume of a voxel over that of a box with its edges; 0.87 at a gantry tilt of 30°."""

_LARGEST_EXTENSIONS = 1 << 24
_METRES, _MICROMETRES = 1, 3
_MAGIC = {348: b"n+1", 540: b"n+2"}
"""By the header's size [bytes]: NIfTI-1 and -2."""

_MAGIC_OF_HALVES = (b"ni1", b"ni2")

_PLAIN_NUMBERS = (2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280)
"""Codes of integers and floats of up to 64 bits."""

_OTHER_TYPES = (32, 128, 1536, 1792, 2048, 2304)
"""Complex numbers, colours, and numbers of 128 bits."""


@dataclass(frozen=True, eq=False)
class NiftiHeader:
    """What a header says of the volume behind it.

    Attributes
    ----------
    shape : (int, int, int)
    affine : (4, 4) float64 array
        Voxel -> RAS+ mm.
    stored : dtype
        Of a voxel in the file.
    slope, intercept : float
        From stored value to value.
    voxels_at : int
        Where voxels begin [bytes].
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    stored: np.dtype[Any]
    slope: float
    intercept: float
    voxels_at: int


def _header_size(beginning: bytes, role: str) -> int:
    """Return the size of a header [bytes], which its first four bytes tell."""
    for size in _MAGIC:
        if beginning.ljust(4, bytes(1)) in (size.to_bytes(4, "little"), size.to_bytes(4, "big")):
            return size
    raise StudyError(f"the {role} is not NIfTI (no NIfTI header): check the file")


def _parse_header(block: bytes, role: str) -> NiftiHeader:
    """Return what a header says.

    Parameters
    ----------
    block : bytes
        The header, as long as `_header_size` says.
    role : str
        What the image is in the study, for messages.

    Raises
    ------
    StudyError
        It is damaged, or says what can't be of one volume of plain numbers.
    """
    from nibabel import Nifti1Header, Nifti2Header

    header_class = {348: Nifti1Header, 540: Nifti2Header}[len(block)]
    fields = header_class(block, endianness="<" if block[0] else ">", check=False)
    _check_magic(fields["magic"].tobytes()[:3], _MAGIC[len(block)], role)
    shape = _volume_shape(fields, role)
    affine = _checked_affine(fields, shape, role)
    stored = _voxel_type(fields, role)
    slope, intercept = _scaling(fields, role)
    voxels_at = _voxels_at(fields, len(block), role)
    return NiftiHeader(shape, affine, stored, slope, intercept, voxels_at)


def _check_magic(magic: bytes, expected: bytes, role: str) -> None:
    if magic in _MAGIC_OF_HALVES:
        raise StudyError(
            f"the {role} is one half of a pair of .hdr and .img (magic): convert it to .nii.gz"
        )
    if magic != expected:
        raise StudyError(f"the {role} is not NIfTI (wrong magic): check the file")


def _volume_shape(fields: Any, role: str) -> tuple[int, int, int]:
    n_axes = int(fields["dim"][0])
    dims = [int(n) for n in fields["dim"][1 : n_axes + 1]]
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


def _checked_affine(fields: Any, shape: tuple[int, int, int], role: str) -> NDArray[np.float64]:
    if int(fields["xyzt_units"]) & 7 in (_METRES, _MICROMETRES):
        raise StudyError(
            f"the {role} is measured in metres or micrometres (xyzt_units): convert it to mm"
        )
    sform = fields.get_sform() if fields["sform_code"] else None
    qform = _qform(fields, role) if fields["qform_code"] else None
    stated = [affine for affine in (sform, qform) if affine is not None]
    if not stated:
        raise StudyError(
            f"the {role} does not say where it lies (qform_code and sform_code are 0): "
            "convert it again with an orientation"
        )
    if not np.isfinite(stated).all():
        raise StudyError(f"the {role} has a non-finite affine (sform, qform): convert it again")
    affine = stated[0]
    spacing_mm = edges_mm(affine)
    if not 1000 * voxel_ml(affine) > _LEAST_VOLUME * spacing_mm.prod():
        raise StudyError(
            f"the {role} has a zero or degenerate affine (sform, qform): convert it again"
        )
    extent_mm = float((spacing_mm * shape).max())
    if spacing_mm.min() < PLAUSIBLE_VOXEL_MM or extent_mm > PLAUSIBLE_EXTENT_MM:
        raise StudyError(
            f"the {role} has voxels of {spacing_mm.min():.3g} to {spacing_mm.max():.3g} mm and is "
            f"{extent_mm:.3g} mm long (sform, qform), which cannot be: convert it again"
        )
    apart_mm = float(np.linalg.norm(moved(stated[0] - stated[-1], corners(shape)), axis=0).max())
    if apart_mm > LARGEST_DISAGREEMENT_MM:
        raise StudyError(
            f"the {role}'s sform and qform place voxels {apart_mm:.1f} mm apart: "
            "convert it again, or make them equal"
        )
    _check_pixdim(fields, affine, role)
    return affine


def _check_pixdim(fields: Any, affine: NDArray[np.float64], role: str) -> None:
    """Refuse voxel sizes that contradict the affine; 0 says nothing.

    Of a sheared volume (gantry tilt) pixdim may be the step, or the distance of the planes.
    """
    n_axes = min(3, int(fields["dim"][0]))
    said_mm = np.abs(np.asarray(fields["pixdim"][1 : n_axes + 1], dtype=np.float64))
    steps_mm = edges_mm(affine)
    apart_mm = 1 / edges_mm(inverse(affine).T)
    least, most = 1 - PIXDIM_TOLERANCE, 1 + PIXDIM_TOLERANCE
    fits = (said_mm >= least * apart_mm[:n_axes]) & (said_mm <= most * steps_mm[:n_axes])
    if not (fits | (said_mm == 0)).all():
        sizes = (" x ".join(f"{mm:.4g}" for mm in each) for each in (said_mm, steps_mm[:n_axes]))
        raise StudyError(
            f"the {role}'s voxel sizes contradict each other (pixdim {next(sizes)} mm, sform "
            f"{next(sizes)} mm): convert it again, or correct the wrong one"
        )


def _qform(fields: Any, role: str) -> NDArray[np.float64]:
    from nibabel.spatialimages import HeaderDataError

    # As the reference implementation reads it: many writers leave it 0.
    fields["pixdim"][0] = -1 if fields["pixdim"][0] < 0 else 1
    try:
        if not np.isfinite(fields.get_qform_quaternion()).all():
            raise ValueError("not finite")
        affine: NDArray[np.float64] = fields.get_qform()
    except (ValueError, HeaderDataError) as error:
        raise StudyError(
            f"the {role} has a damaged orientation (qform): export it again"
        ) from error
    return affine


def _voxel_type(fields: Any, role: str) -> np.dtype[Any]:
    code = int(fields["datatype"])
    if code in _OTHER_TYPES:
        raise StudyError(
            f"the {role} holds no plain numbers (datatype): give one integer or float a voxel"
        )
    if code not in _PLAIN_NUMBERS:
        raise StudyError(f"the {role} has a damaged NIfTI header (datatype): export it again")
    stored: np.dtype[Any] = fields.get_data_dtype()
    return stored


def _scaling(fields: Any, role: str) -> tuple[float, float]:
    """Return slope and intercept; a slope of 0 or NaN means none."""
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise StudyError(
            f"the {role} has a damaged scaling (scl_slope, scl_inter): export it again"
        )
    return slope, intercept


def _voxels_at(fields: Any, size: int, role: str) -> int:
    offset = float(fields["vox_offset"])
    extensions = offset - size
    if not (0 <= extensions <= _LARGEST_EXTENSIONS and offset.is_integer()):
        raise StudyError(f"the {role} has a damaged NIfTI header (vox_offset): export it again")
    return int(offset)


_SHEAR_MM = 0.1
"""Deviation from perpendicular axes along a volume beyond which no qform is written."""

_DEFLATE_LIMIT = 1032
"""No deflate stream inflates by more than this factor."""

_COMPRESSION_LEVEL = 1
"""libdeflate's fastest, about the size of zlib's 6."""

_LABELS_LEVEL = 2
"""Twice as fast on long stretches of zeros."""

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_HEADER = _GZIP_MAGIC + bytes((8, 0, 0, 0, 0, 0, 0, 255))
"""Deflated, no name, no time, an unknown system (RFC 1952)."""

_GZIP_FLAGS = 3
"""Where the header says what follows it: a name, say."""

_GZIP_FORMAT = 31
"""zlib's number for a gzip stream of the widest window."""

_GZIP_FIRST = 1 << 16
"""Bytes of a gzip stream in which a header is found, unless names or comments come first."""

_READ = 1 << 22
"""Bytes of a gzip stream that are read at a time."""

_MOST_AT_ONCE = (1 << 32) - 1
"""Bytes that libdeflate's module inflates at most."""

_QFORM_FIELDS = (
    "qform_code",
    *(f"quatern_{axis}" for axis in "bcd"),
    *(f"qoffset_{a}" for a in "xyz"),
)
_BLOCK_VOXELS = 1 << 17
"""Read at a time: they stay in the processor's cache for what is done next."""


def load_library() -> None:
    """Load nibabel now, so that workers that are forked afterwards need not."""
    # For readers of DICOM, of which nothing here calls nibabel's.
    with without("pydicom"):
        importlib.import_module("nibabel")


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
        raise _unreadable(error, role) from error


def _unreadable(error: OSError, role: str) -> StudyError:
    what = f"cannot read the {role} ({error.strerror}): check the file"
    return UnreachableStudy(what) if system_error(error) is not None else StudyError(what)


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
    with _refusing_damage(role):
        image = _read_at_once(stream, stored_size, role)
        if image is not None:
            return image
        stream.seek(0)
        with _inflated(stream) as (plain, most):
            return _read_plain(plain, stored_size * most, role)


def _read_at_once(stream: Any, stored_size: int, role: str) -> Image | None:
    """Return the volume of a gzip stream that is as it should be, in one member; else None."""
    first = stream.read(_GZIP_FIRST)
    if not first.startswith(_GZIP_MAGIC):
        return None
    beginning = zlib.decompressobj(_GZIP_FORMAT).decompress(first, max(_MAGIC))
    if len(beginning) < max(_MAGIC):
        return None
    header, _ = _read_header(io.BytesIO(beginning), role)
    size = header.voxels_at + math.prod(header.shape) * header.stored.itemsize
    if size > min(stored_size * _DEFLATE_LIMIT, _MOST_AT_ONCE):
        return None
    # What can't be compressed becomes a little longer; a longer stream holds something else.
    if stored_size > size + size // 1024 + _GZIP_FIRST:
        return None
    compressed = bytearray(max(stored_size, len(first)))
    compressed[: len(first)] = first
    for start in range(len(first), stored_size, _READ):
        # Zip members are copied: a part at a time, so that the stream is in memory once.
        stop = min(start + _READ, stored_size)
        if _read_into(memoryview(compressed)[start:stop], stream) < stop - start:
            return None
    if stream.read(1):
        return None
    try:
        if compressed[_GZIP_FLAGS]:
            inflated = deflate.gzip_decompress(compressed, size)
        else:
            # Without a look at what follows: the trailer at the end is checked below.
            with memoryview(compressed) as view:
                inflated = deflate.deflate_decompress(view[len(_GZIP_HEADER) :], size)
    except deflate.DeflateError:
        return None
    # libdeflate ends with the first member and does not say where: where its trailer first is.
    trailer = _gzip_trailer(deflate.crc32(inflated), size)
    if len(inflated) != size or not compressed.endswith(trailer):
        return None
    if compressed.rfind(trailer, 0, -1) >= 0:
        return None
    del compressed
    return _finite(Image(_inflated_voxels(inflated, header), header.affine), role)


def _gzip_trailer(checksum: int, size: int) -> bytes:
    return checksum.to_bytes(4, "little") + (size % (1 << 32)).to_bytes(4, "little")


@contextmanager
def _inflated(stream: Any) -> Iterator[tuple[Any, int]]:
    """Yield a stream without its compression, and by how many times that may have shrunk it."""
    # Files and zip members can be peeked at.
    if stream.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC):
        with gzip.GzipFile(fileobj=stream, mode="rb") as inflated:
            yield inflated, _DEFLATE_LIMIT
    else:
        yield stream, 1


@contextmanager
def _refusing_damage(role: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise StudyError(
            f"the {role} is truncated or damaged (its gzip data end early or fail their "
            "checksum): copy or export it again"
        ) from error


def read_nifti_header(path: str | os.PathLike[str], role: str) -> NiftiHeader:
    """Read the header alone of the NIfTI file at `path`; `role` as in `read_nifti`.

    Raises
    ------
    StudyError
        It can't be read, or is none of one volume with a place in space.
    """
    try:
        with open(path, "rb") as stream, _refusing_damage(role), _inflated(stream) as (plain, _):
            return _read_header(plain, role)[0]
    except OSError as error:
        raise _unreadable(error, role) from error


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Return what the voxels of a NIfTI file take, as its header tells [bytes]."""
    header = read_nifti_header(path, "image")
    return math.prod(header.shape) * header.stored.itemsize


def _read_header(stream: Any, role: str) -> tuple[NiftiHeader, int]:
    """Return the header and its size [bytes]."""
    beginning = _up_to(4, stream)
    block = bytearray(beginning + bytes(_header_size(beginning, role) - len(beginning)))
    _fill(memoryview(block)[len(beginning) :], stream, role)
    return _parse_header(bytes(block), role), len(block)


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
    return _finite(Image(data, header.affine), role)


# --- voxels ----------------------------------------------------------------------------------


def _read_voxels(stream: Any, header: NiftiHeader, role: str) -> NDArray[Any]:
    """Read and convert block by block, so that the volume is in memory once."""
    data = np.empty(header.shape, _dtype(header), order="F")
    flat = data.reshape(-1, order="F")
    if _is_as_stored(header):
        _fill(flat.view(np.uint8).data, stream, role)
        return data
    block = np.empty(min(flat.size, _BLOCK_VOXELS), header.stored)
    for start in range(0, flat.size, block.size):
        values = flat[start : start + block.size]
        raw = block[: values.size]
        _fill(raw.view(np.uint8).data, stream, role)
        _convert(raw, values, header)
    return data


def _inflated_voxels(inflated: bytearray, header: NiftiHeader) -> NDArray[Any]:
    """Return the voxels of an inflated file, in its own memory where they fit there."""
    raw = np.frombuffer(inflated, header.stored, offset=header.voxels_at)
    dtype = _dtype(header)
    fits = dtype.itemsize == raw.itemsize and header.voxels_at % dtype.itemsize == 0
    flat = raw.view(dtype) if fits else np.empty(raw.size, dtype)
    if not (fits and _is_as_stored(header)):
        for start in range(0, flat.size, _BLOCK_VOXELS):
            block = slice(start, start + _BLOCK_VOXELS)
            _convert(raw[block], flat[block], header)
    return flat.reshape(header.shape, order="F")


def _dtype(header: NiftiHeader) -> np.dtype[Any]:
    """Return what voxels become: integers stay where there is no scaling, all else is float32."""
    is_float = header.stored.kind == "f" or _is_scaled(header)
    return np.dtype(np.float32) if is_float else header.stored.newbyteorder("=")


def _is_scaled(header: NiftiHeader) -> bool:
    return (header.slope, header.intercept) != (1, 0)


def _is_as_stored(header: NiftiHeader) -> bool:
    return _dtype(header) == header.stored and not _is_scaled(header)


def _convert(raw: NDArray[Any], values: NDArray[Any], header: NiftiHeader) -> None:
    """Convert voxels as they are stored; the two arrays may be one."""
    with np.errstate(over="ignore", invalid="ignore"):
        if _is_scaled(header):
            values[...] = np.multiply(raw, header.slope, dtype=np.float64) + header.intercept
        else:
            values[...] = raw


def _finite(image: Image, role: str) -> Image:
    if image.data.dtype.kind == "f" and not np.isfinite(image.extremes).all():
        raise StudyError(
            f"the {role} holds values that are not finite (NaN or inf): export it again"
        )
    return image


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


def encode_nifti(image: Image) -> Iterator[bytes | bytearray]:
    """Yield the bytes of a ``.nii.gz`` file that holds the volume, its affine, and nothing else.

    sform and qform are equal with code 1; a sheared affine (gantry tilt), which a qform can't
    express, is in the sform alone. The gzip header has neither name nor time.
    """
    no_extensions = bytes(4)
    header = _clean_header(image).binaryblock + no_extensions
    little_endian = image.data.dtype.newbyteorder("<")
    values = image.data.astype(little_endian, order="F", copy=False).reshape(-1, order="F")
    voxels = values.view(np.uint8).data
    yield _GZIP_HEADER
    # One stream of two pieces: a block of bytes as they are (RFC 1951), then libdeflate's blocks.
    n_bytes = len(header)
    yield b"\0" + n_bytes.to_bytes(2, "little") + (n_bytes ^ 0xFFFF).to_bytes(2, "little") + header
    is_labels = values.dtype.kind == "u"
    yield deflate.deflate_compress(voxels, _LABELS_LEVEL if is_labels else _COMPRESSION_LEVEL)
    yield _gzip_trailer(deflate.crc32(voxels, deflate.crc32(header)), n_bytes + len(voxels))


def _clean_header(image: Image) -> Any:
    # Slow to load, and needed by those who write only.
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape(image.data.shape)
    header.set_data_dtype(image.data.dtype)
    header.set_xyzt_units("mm")
    header.set_sform(image.affine, code=1)
    header.set_qform(image.affine, code=1, strip_shears=True)
    if is_sheared(image.grid):
        for field in _QFORM_FIELDS:
            header[field] = 0
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    return header


def is_sheared(grid: Grid) -> bool:
    """Whether axes are so far from right angles (gantry tilt) that a qform can't express them."""
    spacing_mm = np.array(grid.spacing_mm)
    axes = grid.affine[:3, :3] / spacing_mm
    cosines = axes.T @ axes - np.eye(3)
    return bool(abs(cosines).max() * (spacing_mm * grid.shape).max() > _SHEAR_MM)


def write_nifti_file(path: Path, image: Image) -> None:
    """Write a ``.nii.gz`` file; see `encode_nifti`."""
    with open(path, "wb") as stream:
        stream.writelines(encode_nifti(image))
