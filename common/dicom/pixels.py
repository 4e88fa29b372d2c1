"""The voxels of a stack of DICOM slices, stored in any of the usual transfer syntaxes.

Knows pydicom and its decoders. One plane at a time is in memory besides the volume.
"""

import functools
import importlib
import math
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from common.dicom.attributes import joined_text, number, tag_of, whole_number
from common.dicom.files import DicomFile
from common.dicom.series import Slice, Stack
from common.errors import StudyError, UnreachableStudy, system_error
from common.geometry import Image

_UNCOMPRESSED = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
_PIXEL_DATA = (0x7FE0, 0x0010)
_PIXEL_VRS = (b"OW", b"OB", b"UN")
_WIDEST = np.dtype(np.float32)
_IMPLAUSIBLE_SCALE = 1e20  # times 32 bits still far within float32

Plane = NDArray[Any]
Block = NDArray[np.uint8]
PlaneReader = Callable[[int], Plane]


@dataclass(frozen=True)
class _Layout:
    """How the pixels of a file are stored: the Image Pixel module of its header."""

    columns: int
    rows: int
    n_frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: int
    photometric: str
    little_endian: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one pixel with the unused bits around it."""
        order, kind = "<" if self.little_endian else ">", "i" if self.signed else "u"
        return np.dtype(f"{order}{kind}{self.bits_allocated // 8}")


def read_ct(stack: Stack, block: Block | None = None) -> Image:
    """Return a CT in HU: int16 where every value is a whole number in range, else float32.

    Parameters
    ----------
    block : array of uint8, optional
        Memory for the volume, of `block_for`.

    Raises
    ------
    StudyError
        Pixels that cannot be read.
    """
    block = block_for(stack) if block is None else block
    data: NDArray[Any] = _volume(stack, np.dtype(np.int16), block)
    values = np.empty(data.shape[:2], order="F")
    extremes = []
    for k, stored, slope, intercept in _scaled_planes(stack, np.ones(len(stack.slices))):
        if data.dtype == np.int16 and _stays_int16(stored, slope, intercept):
            np.add(stored.astype(np.int16, copy=False), np.int16(intercept), out=data[:, :, k])
        else:
            hu = _rescale(stored, slope, intercept, values)
            with np.errstate(invalid="ignore"):
                data[:, :, k] = hu
            if data.dtype == np.int16 and not np.array_equal(data[:, :, k], hu):
                data = _widened(data, _volume(stack, np.dtype(np.float32), block))
                data[:, :, k] = hu
        extremes.append(_extremes(data[:, :, k]))
    if stack.places is not None:
        data = _between_slices(data, stack.places)
        with np.errstate(invalid="ignore"):
            whole = data.astype(np.int16)
        return Image(whole if np.array_equal(whole, data) else data, stack.affine)
    return _image(data, stack, extremes)


def read_pet(stack: Stack, factors: NDArray[np.float64], block: Block | None = None) -> Image:
    """Return a PET as float32: stored value * RescaleSlope * the slice's factor.

    Parameters
    ----------
    factors : (n_slices,) array
        From rescaled value to SUV, in slice order.
    block : array of uint8, optional
        Memory for the volume, of `block_for`.

    Raises
    ------
    StudyError
        Pixels that cannot be read.
    """
    block = block_for(stack) if block is None else block
    data = _volume(stack, np.dtype(np.float32), block)
    extremes = []
    for k, stored, slope, intercept in _scaled_planes(stack, factors):
        extremes.append(_extremes(_rescale(stored, slope, intercept, data[:, :, k])))
    if stack.places is not None:
        return Image(_between_slices(data, stack.places), stack.affine)
    return _image(data, stack, extremes)


def block_for(*stacks: Stack) -> Block:
    """Return memory that suffices for each of some stacks, one after the other."""
    most = max((math.prod(_shape_of_slices(stack)) for stack in stacks), default=0)
    return np.empty(most * _WIDEST.itemsize, np.uint8)


def _volume(stack: Stack, dtype: np.dtype[Any], block: Block) -> NDArray[Any]:
    """Return a volume to be filled with slices, in Fortran order."""
    shape = _shape_of_slices(stack)
    n_bytes = math.prod(shape) * dtype.itemsize
    return block[:n_bytes].view(dtype).reshape(shape, order="F")


def _widened(narrow: NDArray[Any], wide: NDArray[Any]) -> NDArray[Any]:
    """Bring a volume into a wider type that begins where it does itself."""
    # From the last plane on: none is written over before it is read.
    for k in reversed(range(narrow.shape[2])):
        wide[:, :, k] = narrow[:, :, k]
    return wide


def _extremes(plane: Plane) -> tuple[float, float]:
    """Return the least and greatest value of a plane, while it is in the processor's cache."""
    return plane.min(), plane.max()


def _image(data: NDArray[Any], stack: Stack, of_planes: Sequence[tuple[float, float]]) -> Image:
    least, greatest = np.transpose(of_planes)
    return Image.with_extremes(data, stack.affine, (float(least.min()), float(greatest.max())))


def _shape_of_slices(stack: Stack) -> tuple[int, int, int]:
    return (*stack.shape[:2], len(stack.slices))


def _between_slices(data: NDArray[Any], places: NDArray[np.float64]) -> NDArray[np.float32]:
    """Interpolate linearly between slices: a plane at each of `places`, as `Stack` has them."""
    planes = np.empty((*data.shape[:2], len(places)), np.float32, order="F")
    for k, place in enumerate(places):
        below = int(place)
        above = min(below + 1, data.shape[2] - 1)
        planes[:, :, k] = (1 - place % 1) * data[:, :, below] + place % 1 * data[:, :, above]
    return planes


def _scaled_planes(
    stack: Stack, factors: NDArray[np.float64]
) -> Iterator[tuple[int, Plane, float, float]]:
    """Yield the index of each slice, its stored values (columns, rows), slope and intercept."""
    for k, item, stored in _stored_planes(stack):
        slope, intercept = item.rescale.slope * factors[k], item.rescale.intercept * factors[k]
        # Some scanners give a slope of 0 to empty slices, which does no harm.
        is_lost = slope == 0 and stored.any()
        if is_lost or max(slope, abs(intercept)) > _IMPLAUSIBLE_SCALE:
            raise StudyError(
                f"{tag_of('RescaleSlope')} or {tag_of('RescaleIntercept')} is implausible: "
                "export the series again",
                item.file.name,
            )
        yield k, stored, slope, intercept


def _stays_int16(stored: Plane, slope: float, intercept: float) -> bool:
    """Tell whether values are 16 bits shifted by a whole number, and so are the results."""
    limits = np.iinfo(np.int16)
    if slope != 1 or stored.dtype.itemsize > 2 or not limits.min <= intercept <= limits.max:
        return False
    least, most = int(stored.min()) + intercept, int(stored.max()) + intercept
    return float(intercept).is_integer() and limits.min <= least and most <= limits.max


def _rescale(
    stored: Plane, slope: float, intercept: float, out: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """Return stored values in their unit, computed in double precision, in `out`."""
    if intercept:
        values = np.multiply(stored, slope, dtype=np.float64)
        np.add(values, intercept, out=out, casting="same_kind")
    else:
        np.multiply(stored, slope, out=out, dtype=np.float64, casting="same_kind")
    return out


# --- stored values ---------------------------------------------------------------------------


def _stored_planes(stack: Stack) -> Iterator[tuple[int, Slice, Plane]]:
    """Yield index, slice and stored values (columns, rows); each file is opened once."""
    slices_of: dict[DicomFile, list[tuple[int, Slice]]] = defaultdict(list)
    for k, item in enumerate(stack.slices):
        slices_of[item.file].append((k, item))
    for file, slices in slices_of.items():
        with _refusing_unreadable(file), _plane_reader(file) as read_plane:
            for k, item in slices:
                yield k, item, read_plane(item.frame).T


@contextmanager
def _refusing_unreadable(file: DicomFile) -> Iterator[None]:
    """Turn whatever decoders raise on damaged data, which may be anything, into a refusal."""
    try:
        yield
    except (StudyError, MemoryError):
        raise
    except Exception as error:
        if (refusal := system_error(error)) is not None:
            raise UnreachableStudy(
                f"a slice cannot be read ({refusal.strerror}): check the file", file.name
            ) from error
        raise StudyError(
            "the pixels of a slice cannot be read (truncated, damaged, or compressed in a way "
            "that no installed decoder reads): export the series again, uncompressed",
            file.name,
        ) from error


@contextmanager
def _plane_reader(file: DicomFile) -> Iterator[PlaneReader]:
    """Open a file; yield the function from a frame to its stored values (rows, columns)."""
    layout = _layout(file)
    syntax = joined_text(file.header.file_meta, "TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        pixels = pydicom.dcmread(file.path, force=True).PixelData
        yield functools.partial(_uncompressed_plane, BytesIO(pixels), 0, len(pixels), layout)
        return
    with open(file.path, "rb") as stream:
        if stream.seek(file.pixel_offset) >= os.fstat(stream.fileno()).st_size:
            raise StudyError(
                f"a slice has no pixels ({tag_of('PixelData')} is missing): export the series "
                "again",
                file.name,
            )
        length = _element_length(stream, is_little_endian=layout.little_endian)
        # A file without preamble names no syntax, and is not compressed.
        if not syntax or syntax in _UNCOMPRESSED:
            yield functools.partial(_uncompressed_plane, stream, stream.tell(), length, layout)
        else:
            yield functools.partial(_decoded_plane, stream, syntax, layout)


def _layout(file: DicomFile) -> _Layout:
    header = file.header
    keywords = ("Columns", "Rows", "BitsAllocated", "BitsStored", "PixelRepresentation")
    columns, rows, allocated, stored, signed = (whole_number(header, k) for k in keywords)
    high_bit = number(header, "HighBit")
    layout = _Layout(
        columns=columns,
        rows=rows,
        n_frames=file.n_frames,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high_bit is None else int(high_bit),
        signed=signed,
        photometric=joined_text(header, "PhotometricInterpretation"),
        little_endian=header.original_encoding[1],
    )
    if (
        number(header, "SamplesPerPixel") not in (1, None)
        or allocated not in (8, 16, 32)
        or not 1 <= stored <= layout.high_bit + 1 <= allocated
    ):
        raise StudyError(
            f"a slice has no plain grey values ({tag_of('SamplesPerPixel')}, "
            f"{tag_of('BitsAllocated')}, {tag_of('BitsStored')}, {tag_of('HighBit')}): "
            "give a greyscale series",
            file.name,
        )
    return layout


def _element_length(stream: BinaryIO, *, is_little_endian: bool) -> int:
    """Read past tag, VR and length of the pixel data element; return the length [bytes].

    Whether there is a VR is seen in the file: some declare the other kind of transfer syntax.
    """
    order = "<" if is_little_endian else ">"
    group, element, vr = struct.unpack(f"{order}HH2s", stream.read(6))
    if (group, element) != _PIXEL_DATA:
        raise ValueError("no pixel data")
    if vr not in _PIXEL_VRS:
        stream.seek(-len(vr), os.SEEK_CUR)
        (length,) = struct.unpack(f"{order}I", stream.read(4))
    else:
        (length,) = struct.unpack(f"{order}2xI", stream.read(6))
    return int(length)


def _uncompressed_plane(
    stream: BinaryIO, start: int, length: int, layout: _Layout, frame: int
) -> Plane:
    size = layout.rows * layout.columns * layout.dtype.itemsize
    # Twice as many are pixels of more bits than the header says, or compressed ones.
    if not 1 <= length / (size * layout.n_frames) < 2:
        raise ValueError("not as many pixels as rows times columns")
    stream.seek(start + size * frame)
    plane = np.frombuffer(stream.read(size), layout.dtype).reshape(layout.rows, layout.columns)
    above = layout.bits_allocated - 1 - layout.high_bit
    below = layout.high_bit + 1 - layout.bits_stored
    return plane << above >> above + below if above or below else plane


def decoding_plugin(syntax: str) -> str:
    """Name pydicom's decoder of a transfer syntax: values must not depend on what is installed."""
    if syntax == RLELossless:
        return "pydicom"
    _load_gdcm()
    return "gdcm"


@functools.cache
def _load_gdcm() -> None:
    """Give pydicom the decoders that it was loaded without: most series are not compressed."""
    from pydicom.pixels import get_decoder
    from pydicom.pixels.decoders import gdcm

    if gdcm.HAVE_GDCM:
        return
    importlib.reload(gdcm)
    for syntax in gdcm.DECODER_DEPENDENCIES:
        decoder = get_decoder(syntax)
        decoder.remove_plugin("gdcm")
        decoder.add_plugin("gdcm", (gdcm.__name__, "_decode_frame"))


def _decoded_plane(stream: BinaryIO, syntax: str, layout: _Layout, frame: int) -> Plane:
    # Slow to load, and needed for compressed pixels only.
    from pydicom.pixels import get_decoder

    plane: Plane
    plane, _ = get_decoder(syntax).as_array(
        stream,
        index=frame,
        raw=True,
        decoding_plugin=decoding_plugin(syntax),
        columns=layout.columns,
        rows=layout.rows,
        number_of_frames=layout.n_frames,
        bits_allocated=layout.bits_allocated,
        bits_stored=layout.bits_stored,
        pixel_representation=layout.signed,
        samples_per_pixel=1,
        photometric_interpretation=layout.photometric or "MONOCHROME2",
        pixel_keyword="PixelData",
    )
    return _sign_extended(plane, layout)


def _sign_extended(plane: Plane, layout: _Layout) -> Plane:
    """Return signed values of fewer bits than allocated, where the bits above were left empty.

    A compressed stream may say that it holds unsigned values, whatever the header says; decoders
    take its word. Values are then beyond what the stored bits can say, and none is negative.
    """
    sign = 1 << layout.bits_stored - 1
    if not layout.signed or plane.min() < 0 or not sign <= plane.max() < 2 * sign:
        return plane
    signed = plane.astype(layout.dtype.newbyteorder("="))
    return (signed ^ sign) - sign
