"""NIfTI in and out: any NIfTI-1 or -2 is read and checked, clean NIfTI-1 is written.

The only module that knows the format. Gzip is done by isal, several times faster than zlib.
"""

import gzip
import os
import zlib
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

LARGEST_DISAGREEMENT_MM = 1.0
"""Distance by which sform and qform may place one voxel differently."""

_DEFLATE_LIMIT = 1032
"""No deflate stream inflates by more than this factor."""

_COMPRESSION_LEVEL = 3
"""isal's strongest, about the size of zlib's 6."""

_CHUNK = 1 << 24


def is_nifti_name(name: str) -> bool:
    """Tell whether a file name ends as NIfTI files do."""
    return name.lower().endswith((".nii", ".nii.gz"))


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
        Integers where the header asks for no scaling, else float32.

    Raises
    ------
    StudyError
        Damaged or truncated data, more data than the header promises, several volumes, no or
        contradictory orientation, values that are not numbers.
    """
    try:
        # Files and zip members can be peeked at; the type of open streams does not say so.
        if stream.peek(2)[:2] == b"\x1f\x8b":  # type: ignore[attr-defined]
            with igzip.IGzipFile(fileobj=stream, mode="rb") as inflated:
                return _read_plain(inflated, stored_size * _DEFLATE_LIMIT, role)
        return _read_plain(stream, stored_size, role)
    except (EOFError, gzip.BadGzipFile, zlib.error, igzip_lib.IsalError) as error:
        raise StudyError(
            f"the {role} is truncated or damaged (its gzip data end early or fail their "
            "checksum): copy or export it again"
        ) from error


def _read_plain(stream: Any, available: int, role: str) -> Image:
    header = _read_header(stream, role)
    shape = _volume_shape(header, role)
    affine = _checked_affine(header, shape, role)
    dtype = _voxel_type(header, role)
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if n_bytes > available:
        raise StudyError(
            f"the {role} is truncated (its header promises {n_bytes} bytes of voxels): "
            "copy or export it again"
        )
    _skip(stream, int(header["vox_offset"]) - header.template_dtype.itemsize, role)
    data = np.empty(shape, dtype, order="F")
    _read_into(stream, data.reshape(-1, order="F").data.cast("B"), role)
    if stream.read(1):
        raise StudyError(
            f"the {role} holds more data than its header promises: it is damaged, export it again"
        )
    return Image(_rescaled(data, header, role), affine)


def _read_header(stream: Any, role: str) -> Any:
    size = stream.read(4)
    order = "<" if int.from_bytes(size, "little") in (348, 540) else ">"
    length = int.from_bytes(size, "little" if order == "<" else "big")
    if length not in (348, 540):
        raise StudyError(f"the {role} is not NIfTI (no NIfTI header): check the file")
    kind = nibabel.Nifti1Header if length == 348 else nibabel.Nifti2Header
    block = size + _read_exactly(stream, length - 4, role)
    try:
        header = kind(block, endianness=order, check=False)
        if header["magic"].tobytes().rstrip(b"\0")[:3] not in (b"n+1", b"n+2"):
            raise StudyError(f"the {role} is not a single-file NIfTI (wrong magic): check the file")
        header.get_data_dtype()
    except (HeaderDataError, ValueError) as error:
        raise StudyError(f"the {role} has a damaged NIfTI header: export it again") from error
    return header


def _volume_shape(header: Any, role: str) -> tuple[int, int, int]:
    n_axes = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1 : n_axes + 1]]
    if not 1 <= n_axes <= 7 or min(dims) < 1:
        raise StudyError(f"the {role} has a damaged NIfTI header (dim): export it again")
    dims += [1] * (3 - len(dims))
    if any(n != 1 for n in dims[3:]):
        raise StudyError(
            f"the {role} holds {int(np.prod(dims[3:]))} volumes (4D NIfTI): give one static volume"
        )
    if dims[0] * dims[1] * dims[2] > LARGEST_VOLUME:
        raise StudyError(f"the {role} has an implausible size (dim {dims[:3]}): export it again")
    return dims[0], dims[1], dims[2]


def _checked_affine(header: Any, shape: tuple[int, int, int], role: str) -> NDArray[np.float64]:
    try:
        sform, s_code = header.get_sform(coded=True)
        qform, q_code = header.get_qform(coded=True)
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        raise StudyError(
            f"the {role} has a damaged orientation (qform): export it again"
        ) from error
    if not s_code and not q_code:
        raise StudyError(
            f"the {role} does not say where it lies (qform_code and sform_code are 0): "
            "convert it again with an orientation"
        )
    affine = np.asarray(sform if s_code else qform, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise StudyError(
            f"the {role} has a zero or non-finite affine (sform, qform): convert it again"
        )
    if s_code and q_code:
        apart = _largest_distance_mm(affine, np.asarray(qform, np.float64), shape)
        if not apart <= LARGEST_DISAGREEMENT_MM:
            raise StudyError(
                f"the {role}'s sform and qform place voxels {apart:.1f} mm apart: "
                "convert it again, or make them equal"
            )
    return affine


def _largest_distance_mm(
    first: NDArray[np.float64], second: NDArray[np.float64], shape: tuple[int, int, int]
) -> float:
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij"), float)
    shift = (first - second) @ corners.reshape(4, -1)
    return float(np.sqrt((shift[:3] ** 2).sum(axis=0)).max())


def _voxel_type(header: Any, role: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise StudyError(f"the {role} holds no plain numbers ({dtype}): convert it again")
    return dtype


def _rescaled(data: NDArray[Any], header: Any, role: str) -> NDArray[Any]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        slope, intercept = 1.0, 0.0
    if not np.isfinite([slope, intercept]).all():
        raise StudyError(
            f"the {role} has a damaged scaling (scl_slope, scl_inter): export it again"
        )
    data = data.astype(data.dtype.newbyteorder("="), copy=False)
    if slope != 1 or intercept != 0:
        data = data * np.float32(slope) + np.float32(intercept)
    elif data.dtype.kind == "f":
        data = data.astype(np.float32, copy=False)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise StudyError(
            f"the {role} holds values that are not finite (NaN or inf): export it again"
        )
    return data


def _read_exactly(stream: Any, size: int, role: str) -> bytes:
    block = bytearray(size)
    _read_into(stream, memoryview(block), role)
    return bytes(block)


def _skip(stream: Any, size: int, role: str) -> None:
    if not 0 <= size < _CHUNK:
        raise StudyError(f"the {role} has a damaged NIfTI header (vox_offset): export it again")
    _read_exactly(stream, size, role)


def _read_into(stream: Any, target: memoryview, role: str) -> None:
    filled = 0
    while filled < len(target):
        block = stream.read(min(_CHUNK, len(target) - filled))
        if not block:
            raise StudyError(f"the {role} is truncated (data end early): copy or export it again")
        target[filled : filled + len(block)] = block
        filled += len(block)


def encode_nifti(image: Image) -> bytes:
    """Return the bytes of a ``.nii.gz`` file that holds the volume, its affine, and nothing else.

    sform and qform are equal with code 1; a sheared affine (gantry tilt), which a qform can't
    express, is in the sform alone. The gzip header has neither name nor time.
    """
    header = nibabel.Nifti1Header()
    header.set_data_shape(image.data.shape)
    header.set_data_dtype(image.data.dtype)
    header.set_xyzt_units("mm")
    header.set_sform(image.affine, code=1)
    header.set_qform(image.affine, code=1, strip_shears=True)
    shape = (image.data.shape[0], image.data.shape[1], image.data.shape[2])
    if _largest_distance_mm(image.affine, header.get_qform(), shape) > 0.01:
        header.set_qform(None, code=0)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    squeezer = isal_zlib.compressobj(_COMPRESSION_LEVEL, isal_zlib.DEFLATED, 31)
    parts = [squeezer.compress(header.binaryblock + b"\0\0\0\0")]
    flat = image.data.reshape(-1, order="F").astype(image.data.dtype.newbyteorder("<"), copy=False)
    raw = flat.data.cast("B")
    parts += [squeezer.compress(raw[at : at + _CHUNK]) for at in range(0, len(raw), _CHUNK)]
    parts.append(squeezer.flush())
    return b"".join(parts)


def write_nifti_file(path: Path, image: Image) -> None:
    """Write a ``.nii.gz`` file; see `encode_nifti`."""
    path.write_bytes(encode_nifti(image))
