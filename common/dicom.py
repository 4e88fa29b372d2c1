"""DICOM files: what they are, which make up a series, and a series as a volume.

Knows pydicom; the SUV inputs in PET headers are read by `pet_header`, SEG and RTSTRUCT by
`dicom_masks`. DICOM's LPS coordinates end here: affines are RAS+.
"""

import logging
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pydicom
import pydicom.config
import pydicom.pixels
from numpy.typing import NDArray
from pydicom.datadict import keyword_dict
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from common.errors import StudyError
from common.image import Image

# pydicom's remarks on odd values quote them, and values may be names: they go nowhere.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

LARGEST_SLICE_OFFSET = 0.1
"""Distance of a slice from the evenly spaced grid beyond which a series is refused [spacings]."""

IMAGE_CLASSES = {
    "CT": {
        "1.2.840.10008.5.1.4.1.1.2",  # CT Image
        "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
        "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
    },
    "PT": {
        "1.2.840.10008.5.1.4.1.1.128",  # PET Image
        "1.2.840.10008.5.1.4.1.1.130",  # Enhanced PET
        "1.2.840.10008.5.1.4.1.1.128.1",  # Legacy Converted Enhanced PET
    },
}
"""SOP classes of volume images by Modality; secondary captures and the like are not among them."""

_NO_SLICE = {"LOCALIZER", "MIP", "MPR", "REFORMATTED", "PROJECTION IMAGE", "RENDERED", "VRT", "CPR"}
_NATIVE = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian}
_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
_PIXEL_DATA = (0x7FE0, 0x0010)
_SAME_DIRECTION = 1e-3
_Value = TypeVar("_Value")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class DicomFile:
    """A DICOM file's header and where its pixel data element begins.

    Attributes
    ----------
    path : str
    name : str
        Path below the study's folder, for patterns and the private mapping.
    header : pydicom.Dataset
        All but the pixel data.
    pixel_offset : int
        Position of the pixel data element in the file [bytes].
    """

    path: str
    name: str
    header: pydicom.Dataset
    pixel_offset: int


@dataclass(frozen=True, eq=False)
class Series:
    """The files of one SeriesInstanceUID and Modality that are candidate slices."""

    modality: str
    files: tuple[DicomFile, ...]

    @property
    def n_images(self) -> int:
        """Number of slices, frames counted."""
        return sum(_n_frames(file.header) for file in self.files)

    @property
    def description(self) -> str:
        """SeriesDescription: free text that may identify, for the private mapping alone."""
        return str(self.files[0].header.get("SeriesDescription", ""))


@dataclass(frozen=True, eq=False)
class Slice:
    """One image plane: its file, its frame there, its place [LPS mm] and its rescaling."""

    file: DicomFile
    frame: int
    position_mm: NDArray[np.float64]
    orientation: NDArray[np.float64]
    pixel_spacing_mm: NDArray[np.float64]
    slope: float
    intercept: float


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of a series in order along their normal, and the grid they make up.

    Attributes
    ----------
    slices : tuple of Slice
    shape : (int, int, int)
        Columns, rows, slices.
    affine : (4, 4) float64 array
        Voxel index to RAS+ [mm]; sheared where the gantry was tilted.
    """

    slices: tuple[Slice, ...]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def headers(self) -> tuple[pydicom.Dataset, ...]:
        """Headers in slice order, each file's once."""
        return tuple(file.header for file in dict.fromkeys(item.file for item in self.slices))


# --- files and series ------------------------------------------------------------------------


def read_dicom_file(path: str, name: str) -> DicomFile | None:
    """Read the header of a file; None where it is not DICOM or is a DICOMDIR.

    Raises
    ------
    StudyError
        DICOM by its first bytes, but damaged.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(132)
            stream.seek(0)
            if start[128:] != b"DICM" and not _looks_like_bare_dataset(start):
                return None
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
            offset = stream.tell()
    except OSError as error:
        raise StudyError(
            f"a file cannot be read ({error.strerror}): check it and its permissions", name
        ) from error
    except Exception as error:  # pydicom raises nearly every type on damaged files
        raise StudyError(
            "a DICOM file is damaged (its header cannot be read): export the study again", name
        ) from error
    if getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID") == _MEDIA_DIRECTORY:
        return None
    if "Modality" not in header:
        return None
    return DicomFile(path, name, header, offset)


def _looks_like_bare_dataset(start: bytes) -> bool:
    """Tell whether a file without preamble begins with an element of group 0002 or 0008."""
    if len(start) < 16 or start[:2] not in (b"\x02\x00", b"\x08\x00") or start[3] != 0:
        return False
    length = int.from_bytes(start[4:8], "little")
    return start[4:6] in (b"UL", b"OB", b"CS", b"UI", b"SH", b"DA") or length <= 64


def group_series(files: Iterable[DicomFile], modality: str) -> list[Series]:
    """Return the candidate series of a modality, in order of their first file's name."""
    groups: dict[str, list[DicomFile]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.name):
        if text(file.header, "Modality") == modality and _is_candidate(file.header, modality):
            groups[text(file.header, "SeriesInstanceUID")].append(file)
    return [Series(modality, tuple(group)) for group in groups.values()]


def _is_candidate(header: pydicom.Dataset, modality: str) -> bool:
    sop_class = text(header, "SOPClassUID")
    if sop_class and sop_class not in IMAGE_CLASSES[modality]:
        return False
    image_type = {part.strip().upper() for part in texts(header, "ImageType")}
    if any(mark in part for part in image_type for mark in ("SCREEN", *_NO_SLICE)):
        return False
    return not ("DERIVED" in image_type and _is_not_axial(header))


def _is_not_axial(header: pydicom.Dataset) -> bool:
    try:
        orientation = numbers(header, "ImageOrientationPatient", 6)
    except StudyError:
        return False
    normal = np.cross(orientation[:3], orientation[3:])
    return bool(np.argmax(np.abs(normal)) != 2)


# --- header values ---------------------------------------------------------------------------


def tag_of(keyword: str) -> str:
    """Return ``Keyword (gggg,eeee)``."""
    number = keyword_dict[keyword]
    return f"{keyword} ({number >> 16:04X},{number & 0xFFFF:04X})"


def text(header: pydicom.Dataset, keyword: str) -> str:
    """Return a value as text; empty where it is absent."""
    return _value(header, keyword, lambda value: "" if value is None else str(value).strip())


def texts(header: pydicom.Dataset, keyword: str) -> list[str]:
    """Return a value of any multiplicity as a list of texts."""
    return _value(
        header,
        keyword,
        lambda value: (
            []
            if value is None
            else [str(part) for part in ([value] if isinstance(value, str) else value)]
        ),
    )


def numbers(header: pydicom.Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    """Return `count` finite numbers.

    Raises
    ------
    StudyError
        Absent, of another multiplicity, or not numbers.
    """

    def convert(value: Any) -> NDArray[np.float64]:
        array: NDArray[np.float64] = np.atleast_1d(np.array(value, dtype=np.float64))
        if array.shape != (count,) or not np.isfinite(array).all():
            raise ValueError
        return array

    return _value(header, keyword, convert)


def _value(header: pydicom.Dataset, keyword: str, convert: Callable[[Any], _Value]) -> _Value:
    try:
        return convert(header.get(keyword))
    except Exception as error:  # pydicom converts values on access, with errors of many types
        raise StudyError(
            f"{tag_of(keyword)} is missing or malformed: correct the header or export again"
        ) from error


def _n_frames(header: pydicom.Dataset) -> int:
    frames = text(header, "NumberOfFrames")
    return int(frames) if frames.isdigit() and int(frames) > 0 else 1


# --- a series as a stack of slices -----------------------------------------------------------


def stack_slices(series: Series) -> Stack:
    """Order the slices of a series and find the grid they make up.

    Raises
    ------
    StudyError
        Dynamic or gated series, mixed orientations, matrices or pixel spacings, missing,
        duplicate or unevenly spaced slices.
    """
    role = {"PT": "PET", "CT": "CT"}[series.modality]
    _refuse_dynamic(series, role)
    slices = [item for file in series.files for item in _slices_of(file)]
    _refuse_mixed(slices, role)
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    slices.sort(key=lambda item: float(item.position_mm @ normal))
    step = _even_step(slices, normal, role)
    header = slices[0].file.header
    shape = (int(number(header, "Columns")), int(number(header, "Rows")), len(slices))
    if min(shape) < 1:
        raise StudyError(f"the {role} has no pixels (Rows, Columns): export it again")
    return Stack(tuple(slices), shape, _affine(slices[0], step))


def number(header: pydicom.Dataset, keyword: str) -> float:
    """Return one finite number; see `numbers`."""
    return float(numbers(header, keyword, 1)[0])


def _refuse_dynamic(series: Series, role: str) -> None:
    for file in series.files:
        kind = texts(file.header, "SeriesType")
        if kind and kind[0].strip().upper() in ("DYNAMIC", "GATED"):
            raise StudyError(
                f"the {role} is {kind[0].strip().lower()} ({tag_of('SeriesType')}): "
                "give a static or whole-body series"
            )


def _slices_of(file: DicomFile) -> list[Slice]:
    header = file.header
    if "PerFrameFunctionalGroupsSequence" in header:
        return _frames_of(file)
    if _n_frames(header) > 1:
        raise StudyError(
            f"several frames without a place for each ({tag_of('NumberOfFrames')}): "
            "export the series as single images or as an enhanced object"
        )
    return [
        Slice(
            file,
            0,
            numbers(header, "ImagePositionPatient", 3),
            numbers(header, "ImageOrientationPatient", 6),
            numbers(header, "PixelSpacing", 2),
            number(header, "RescaleSlope") if "RescaleSlope" in header else 1.0,
            number(header, "RescaleIntercept") if "RescaleIntercept" in header else 0.0,
        )
    ]


def _frames_of(file: DicomFile) -> list[Slice]:
    frames = file.header.PerFrameFunctionalGroupsSequence
    if len(frames) != _n_frames(file.header):
        raise StudyError(
            f"{tag_of('PerFrameFunctionalGroupsSequence')} does not describe every frame: "
            "export the series again"
        )
    shared = next(iter(file.header.get("SharedFunctionalGroupsSequence") or []), None)

    def group(frame: pydicom.Dataset, keyword: str) -> pydicom.Dataset:
        for functional_groups in (frame, shared):
            if functional_groups is not None and (found := functional_groups.get(keyword)):
                return found[0]
        return pydicom.Dataset()

    slices = []
    for index, frame in enumerate(frames):
        rescaling = group(frame, "PixelValueTransformationSequence")
        slices.append(
            Slice(
                file,
                index,
                numbers(group(frame, "PlanePositionSequence"), "ImagePositionPatient", 3),
                numbers(group(frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6),
                numbers(group(frame, "PixelMeasuresSequence"), "PixelSpacing", 2),
                number(rescaling, "RescaleSlope") if "RescaleSlope" in rescaling else 1.0,
                number(rescaling, "RescaleIntercept") if "RescaleIntercept" in rescaling else 0.0,
            )
        )
    return slices


def _refuse_mixed(slices: Sequence[Slice], role: str) -> None:
    first = slices[0]
    if (first.pixel_spacing_mm <= 0).any():
        raise StudyError(f"{tag_of('PixelSpacing')} of the {role} is not positive: export again")
    axes = first.orientation.reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 0.01:
        raise StudyError(
            f"{tag_of('ImageOrientationPatient')} of the {role} is not a pair of perpendicular "
            "unit vectors: export again"
        )
    for item in slices:
        header, reference = item.file.header, first.file.header
        if np.abs(item.orientation - first.orientation).max() > _SAME_DIRECTION:
            raise StudyError(
                f"the {role} series mixes orientations ({tag_of('ImageOrientationPatient')}): "
                "give one stack of parallel slices"
            )
        if not np.allclose(item.pixel_spacing_mm, first.pixel_spacing_mm, rtol=1e-3):
            raise StudyError(
                f"the {role} series mixes pixel spacings ({tag_of('PixelSpacing')}): "
                "give one reconstruction"
            )
        if any(text(header, k) != text(reference, k) for k in ("Rows", "Columns")):
            raise StudyError(
                f"the {role} series mixes matrices ({tag_of('Rows')}, {tag_of('Columns')}): "
                "give one reconstruction"
            )


def _even_step(
    slices: Sequence[Slice], normal: NDArray[np.float64], role: str
) -> NDArray[np.float64]:
    """Return the vector from slice to slice [LPS mm]."""
    if len(slices) == 1:
        header = slices[0].file.header
        keyword = "SpacingBetweenSlices" if "SpacingBetweenSlices" in header else "SliceThickness"
        return normal * number(header, keyword)
    positions = np.array([item.position_mm for item in slices])
    steps = np.arange(len(slices))[:, None]
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(slices) - 1)
    spacing = float(step @ normal)
    gaps = np.diff(positions @ normal)
    if gaps.min() < LARGEST_SLICE_OFFSET * np.median(gaps) or spacing <= 0:
        raise StudyError(
            f"the {role} has several slices in one place ({tag_of('ImagePositionPatient')}): "
            "duplicate, dynamic or gated images; give each slice once"
        )
    offsets = np.linalg.norm(positions - positions[0] - steps * step, axis=1)
    if offsets.max() > LARGEST_SLICE_OFFSET * spacing:
        raise StudyError(
            f"the {role} has missing or unevenly spaced slices ({tag_of('ImagePositionPatient')}: "
            f"gaps from {gaps.min():.2f} to {gaps.max():.2f} mm, {len(slices)} slices): "
            "export the complete series"
        )
    return step


def _affine(first: Slice, step: NDArray[np.float64]) -> NDArray[np.float64]:
    row_spacing, column_spacing = first.pixel_spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[:3] * column_spacing
    affine[:3, 1] = first.orientation[3:] * row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = first.position_mm
    return _LPS_TO_RAS @ affine


# --- voxels ----------------------------------------------------------------------------------


def read_ct(stack: Stack) -> Image:
    """Return a CT in HU: int16 where every value is a whole number in range, else float32."""
    data = np.empty(stack.shape, np.int16, order="F")
    for k, item in enumerate(stack.slices):
        values = _rescaled(item, stack.shape)
        whole = values.astype(np.int16)
        if not np.array_equal(whole, values):
            return Image(_read_float(stack, np.ones(stack.shape[2])), stack.affine)
        data[:, :, k] = whole
    return Image(data, stack.affine)


def read_pet(stack: Stack, factors: NDArray[np.float64]) -> Image:
    """Return a PET as float32: stored value * RescaleSlope * the slice's factor.

    Parameters
    ----------
    factors : (n_slices,) array
        From rescaled value to SUV, in slice order.

    Raises
    ------
    StudyError
        A RescaleIntercept other than 0, or pixels that cannot be read.
    """
    if any(item.intercept != 0 for item in stack.slices):
        raise StudyError(
            f"{tag_of('RescaleIntercept')} of the PET is not 0: DICOM demands 0 for PET; "
            "export the original series"
        )
    return Image(_read_float(stack, factors), stack.affine)


def _read_float(stack: Stack, factors: NDArray[np.float64]) -> NDArray[np.float32]:
    data = np.empty(stack.shape, np.float32, order="F")
    for k, (item, factor) in enumerate(zip(stack.slices, factors, strict=True)):
        data[:, :, k] = _rescaled(item, stack.shape) * factor
    if not np.isfinite(data).all():
        raise StudyError("the image holds values that are not finite: export the series again")
    return data


def _rescaled(item: Slice, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    return _read_plane(item, shape[0], shape[1]) * item.slope + item.intercept


def _read_plane(item: Slice, columns: int, rows: int) -> NDArray[Any]:
    """Return the stored values of one frame, (columns, rows)."""
    try:
        plane = _read_native_plane(item, columns, rows)
        if plane is None:
            plane = pydicom.pixels.pixel_array(item.file.path, index=item.frame, raw=True)
    except Exception as error:  # decoders raise nearly every type on damaged data
        raise StudyError(
            "the pixels of a slice cannot be read (truncated, damaged, or compressed in a way "
            "that no installed decoder reads): export the series again, uncompressed",
            item.file.name,
        ) from error
    if plane.shape != (rows, columns):
        raise StudyError(
            f"a slice has other pixels than {tag_of('Rows')} and {tag_of('Columns')} say: "
            "give a greyscale series",
            item.file.name,
        )
    return plane.T


def _read_native_plane(item: Slice, columns: int, rows: int) -> NDArray[Any] | None:
    """Read an uncompressed frame straight from the file; None where it is not stored so."""
    header = item.file.header
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID", ImplicitVRLittleEndian)
    allocated, used = int(number(header, "BitsAllocated")), int(number(header, "BitsStored"))
    if syntax not in _NATIVE or allocated not in (8, 16, 32):
        return None
    kind = "i" if int(number(header, "PixelRepresentation")) else "u"
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dtype = np.dtype(f"{order}{kind}{allocated // 8}")
    size = columns * rows * dtype.itemsize
    with open(item.file.path, "rb") as stream:
        stream.seek(item.file.pixel_offset)
        length = _pixel_data_length(stream, syntax)
        if length < size * (item.frame + 1):
            raise ValueError("fewer pixels than rows times columns")
        stream.seek(item.frame * size, 1)
        raw = stream.read(size)
    plane = np.frombuffer(raw, dtype).reshape(rows, columns).astype(dtype.newbyteorder("="))
    unused = allocated - used
    return (plane << unused) >> unused if unused else plane


def _pixel_data_length(stream: BinaryIO, syntax: str) -> int:
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    explicit = syntax != ImplicitVRLittleEndian
    group, element, *_, length = struct.unpack(
        f"{order}HH2sHI" if explicit else f"{order}HHI", stream.read(12 if explicit else 8)
    )
    if (group, element) != _PIXEL_DATA or length == 0xFFFFFFFF:
        raise ValueError("no plain pixel data")
    return int(length)
