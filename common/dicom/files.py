"""DICOM files: what each is, and which of them are the slices of a CT or PET series.

Knows pydicom. Headers are read once; pixels stay in the files until `pixels` fetches them.
"""

import functools
import io
import operator
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from common.dicom.attributes import (
    functional_group,
    functional_groups,
    items,
    joined_text,
    required_numbers,
    tag_of,
    texts,
)
from common.dicom.plain_headers import scan_header
from common.errors import StudyError, UnreachableStudy, system_error

# --- dicom -----------------------------------------------------------------------------------

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

_NO_SLICE = re.compile(
    r"(?<![A-Z])(LOCALIZER|SCOUT|TOPOGRAM|SCREEN(SAVE|SHOT)?|(RE)?PROJECTION|REFORMATTED|[CM]PR"
    r"|MIP|MINIP|M(AX|IN)_IP|RENDERED|VRT|SSD)(?![A-Z])"
)
"""Words in ImageType or SeriesType of what is no slice of a volume, or was cut out of one."""

_NO_HU = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")
"""Values of RescaleType of maps that were computed from a CT."""

_HU = "HU"
"""RescaleType of an Enhanced CT, which has to say what it holds; modified HU are a map's."""

_HU_UNITS = ("[hnsf'U]", "hnsf'U", "HU")
"""Codes of the Hounsfield unit in MeasurementUnitsCodeSequence (UCUM, with its older form)."""

GREYSCALE = ("MONOCHROME2", "MONOCHROME1", "")
"""Values of PhotometricInterpretation, which a header without pixels may lack."""

DICOM_SUFFIXES = (".dcm", ".ima")

LARGEST_INFLATED, MOST_INFLATION = 2**28, 100
"""Bytes of a deflated file that need no reason; inflation by which it may be larger."""

_OBJECT_OF_SERIES = "1.2.840.10008.5.1.4.1.1."
"""How the SOP class of every object of a series begins."""

_OF_DICOM = "1.2.840.10008."
"""How the SOP classes of the standard begin; others are of vendors."""

_MOST_FLIPPED = 2
"""Characters by which the name of a class may differ from one that it was before damage."""

_MASK_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.66.4",  # Segmentation
    "1.2.840.10008.5.1.4.1.1.66.7",  # Label Map Segmentation
    "1.2.840.10008.5.1.4.1.1.481.3",  # RT Structure Set
}
_ROLE_OF_CLASS = {
    sop_class: f" of the {role}"
    for role, classes in (
        ("CT", IMAGE_CLASSES["CT"]),
        ("PET", IMAGE_CLASSES["PT"]),
        ("mask", _MASK_CLASSES),
    )
    for sop_class in classes
}

_CLASS_IN_META = re.compile(rb"\x02\x00\x02\x00UI(..)", re.DOTALL)
"""MediaStorageSOPClassUID up to its value."""

_PREAMBLE, _MOST_OF_META = 132, 1024
_MODALITY = 0x00080060
_BLOCK, _FIRST_READ = 2**20, 2**15
_META_VRS = (b"UL", b"OB", b"UI")
_FIRST_VRS = (b"UL", b"OB", b"CS", b"UI", b"SH", b"DA", b"LO")


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
        Position of the pixel data element in the file [bytes]; the file's end where there is
        none, or the file is deflated.
    """

    path: str
    name: str
    header: pydicom.Dataset
    pixel_offset: int

    @functools.cached_property
    def modality(self) -> str:
        """The Modality."""
        return joined_text(self.header, "Modality")

    @functools.cached_property
    def is_slice(self) -> bool:
        """Whether it is an image of a volume, by its header."""
        return self.modality in IMAGE_CLASSES and _is_slice(self.header, self.modality)

    @functools.cached_property
    def n_frames(self) -> int:
        """NumberOfFrames, 1 where it is absent or no number."""
        frames = joined_text(self.header, "NumberOfFrames")
        return int(frames) if frames.isdecimal() and int(frames) > 0 else 1


@dataclass(frozen=True, eq=False)
class Series:
    """The files of one SeriesInstanceUID and Modality that are candidate slices."""

    modality: str
    files: tuple[DicomFile, ...]

    @property
    def n_images(self) -> int:
        """Number of slices, frames counted."""
        return sum(file.n_frames for file in self.files)


# --- files -----------------------------------------------------------------------------------


def read_dicom_file(path: str, name: str) -> DicomFile | None:
    """Read the header of a file; None where it is not DICOM or holds no object of a series.

    None also where it is damaged, but of a kind that plays no role: a dose report, a screen save.

    Raises
    ------
    StudyError
        DICOM by its first bytes but damaged, or by its name but empty.
    """
    start, is_marked = b"", False
    try:
        # Where file servers name a block of a megabyte, Python's own buffer would take the pixels.
        with io.BufferedReader(io.FileIO(path), _FIRST_READ) as stream:
            start = stream.read(_MOST_OF_META)
            is_marked = start[128:_PREAMBLE] == b"DICM" or _begins_with_meta(start)
            if _is_empty(start) and name.lower().endswith(DICOM_SUFFIXES):
                raise _damaged(start, name)
            if not is_marked and not _begins_with_dataset(start):
                return None
            if DeflatedExplicitVRLittleEndian.encode() in start:
                stream.seek(_end_of_meta(start))
                _refuse_bomb(stream, name)
            stream.seek(0)
            scanned = scan_header(path, stream.peek())
            if scanned is not None and "Modality" in scanned[0]:
                return DicomFile(path, name, *scanned)
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
            offset = stream.tell()
            is_cut_off = _is_cut_off(header, stream)
        is_object = "Modality" in header
        is_damaged = is_cut_off or (not is_object and _is_of_series(header))
    except StudyError:
        raise
    except Exception as error:  # pydicom raises nearly every type on damaged files
        if (refusal := system_error(error)) is not None:
            raise UnreachableStudy(
                f"a file cannot be read ({refusal.strerror}): check it and its permissions", name
            ) from error
        if is_marked and not _plays_no_role(start):
            raise _damaged(start, name) from error
        return None
    if is_damaged and _plays_no_role(start):
        return None
    if is_damaged and (is_marked or is_object):
        # Elements are in order: what follows the Modality shows that the file did not end before.
        is_whole = not is_cut_off and max(header.keys(), default=0) > _MODALITY
        raise _damaged(start, name, lacks_modality=is_whole)
    return DicomFile(path, name, header, offset) if is_object else None


def _is_empty(start: bytes) -> bool:
    """Tell whether a file is too short for a header, or was never filled."""
    return len(start) < _PREAMBLE or not start.strip(b"\0")


def _begins_with_meta(start: bytes) -> bool:
    """Tell whether a file without preamble begins as an element of group 0002 does."""
    return start[:2] == b"\x02\x00" and start[2:4] <= b"\x18\x00" and start[4:6] in _META_VRS


def _begins_with_dataset(start: bytes) -> bool:
    """Tell whether a file without preamble begins as an element of group 0008 does."""
    implicit_length = int.from_bytes(start[4:8], "little")
    return (
        start[:2] == b"\x08\x00"
        and start[2:4] <= b"\x18\x00"
        and (start[4:6] in _FIRST_VRS or implicit_length <= 64)
    )


def _end_of_meta(start: bytes) -> int:
    """Return where the file meta information ends."""
    place = _PREAMBLE if start[128:_PREAMBLE] == b"DICM" else 0
    while start[place : place + 2] == b"\x02\x00":
        is_long = start[place + 4 : place + 6] in (b"OB", b"UN")
        length = start[place + 8 : place + 12] if is_long else start[place + 6 : place + 8]
        place += (12 if is_long else 8) + int.from_bytes(length, "little")
    return place


def _refuse_bomb(stream: BinaryIO, name: str) -> None:
    """Refuse deflated data that would fill the memory, before pydicom inflates all of it."""
    most = max(LARGEST_INFLATED, MOST_INFLATION * os.fstat(stream.fileno()).st_size)
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while block := inflater.unconsumed_tail or stream.read(_BLOCK):
        size += len(inflater.decompress(block, _BLOCK))
        if size > most:
            raise StudyError(
                f"a deflated DICOM file inflates beyond {most} bytes "
                f"({tag_of('TransferSyntaxUID')}): export it again, uncompressed",
                name,
            )


def _is_cut_off(header: pydicom.FileDataset, stream: BinaryIO) -> bool:
    """Tell whether a file ends within an element, at which pydicom takes no offence.

    `stream` is where reading ended: before the pixel data, or at the end of the file.
    """
    if header.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return False
    end_of_reading = stream.tell()
    elements = [*header.file_meta.values(), *header.values()]
    ends = [e.value_tell + e.length for e in elements if isinstance(e, RawDataElement)]
    if any(end > end_of_reading for end in ends):
        return True
    if not ends or not isinstance(elements[-1], RawDataElement) or stream.read(1):
        return False
    stream.seek(max(ends))
    beginning_of_another = stream.read()
    return bool(beginning_of_another.strip(b"\0"))


def _is_of_series(header: pydicom.FileDataset) -> bool:
    """Tell whether an object has to have a Modality, by its SOP class if that is known."""
    sop_class = joined_text(header.file_meta, "MediaStorageSOPClassUID") or joined_text(
        header, "SOPClassUID"
    )
    return not sop_class or sop_class.startswith(_OBJECT_OF_SERIES)


def _plays_no_role(start: bytes) -> bool:
    """Tell whether the first bytes name, in full, a kind of object that is no image or mask."""
    found = _CLASS_IN_META.search(start)
    if found is None:
        return False
    length = int.from_bytes(found[1], "little")
    value = start[found.end() : found.end() + length]
    sop_class = UID(value.rstrip(b"\0 ").decode("latin-1"))
    is_whole = len(value) == length and len(start) > found.end() + length
    return is_whole and sop_class not in _ROLE_OF_CLASS and _is_sound(sop_class)


def _is_sound(sop_class: UID) -> bool:
    """Tell whether a SOP class is one of DICOM's, or of a vendor's own and no damaged one."""
    if sop_class.startswith(_OF_DICOM):
        return bool(sop_class.name != sop_class)
    return bool(sop_class.is_valid) and not any(
        len(each) == len(sop_class) and sum(map(operator.ne, each, sop_class)) <= _MOST_FLIPPED
        for each in _ROLE_OF_CLASS
    )


def _damaged(start: bytes, name: str, *, lacks_modality: bool = False) -> StudyError:
    """Return the error that names the role which the file's first bytes tell."""
    sop_class = re.search(re.escape(_OBJECT_OF_SERIES).encode() + rb"[\d.]+", start)
    role = _ROLE_OF_CLASS.get(sop_class[0].decode() if sop_class else "", "")
    trouble = (
        f"has no {tag_of('Modality')}"
        if lacks_modality
        else "is damaged (its header cannot be read)"
    )
    return StudyError(f"a DICOM file{role} {trouble}: export the study again", name)


# --- series ----------------------------------------------------------------------------------


def group_series(files: Iterable[DicomFile], modality: str) -> list[Series]:
    """Return the candidate series of a modality, in order of their first file's name.

    Localizers, screens, projections, reformats, derived series that are not axial and maps whose
    values are no HU are none, even among the slices of a series.
    """
    groups: dict[str, list[DicomFile]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.name):
        if file.modality == modality and file.is_slice:
            groups[joined_text(file.header, "SeriesInstanceUID")].append(file)
    return [Series(modality, tuple(group)) for group in groups.values()]


def _is_slice(header: pydicom.Dataset, modality: str) -> bool:
    sop_class = joined_text(header, "SOPClassUID")
    if sop_class and sop_class not in IMAGE_CLASSES[modality]:
        return False
    if joined_text(header, "PhotometricInterpretation") not in GREYSCALE:
        return False
    if modality == "CT" and not _is_in_hu(header):
        return False
    kinds = [each.upper() for k in ("ImageType", "SeriesType") for each in texts(header, k)]
    if any(map(_NO_SLICE.search, kinds)):
        return False
    return not ("DERIVED" in kinds and _is_not_axial(header))


def _is_in_hu(header: pydicom.Dataset) -> bool:
    """Tell whether nothing says that a CT, or a frame of it, holds other values than HU."""
    frames = items(header, "PerFrameFunctionalGroupsSequence")
    if joined_text(header, "RescaleType").upper() in _NO_HU or not _is_unit_hu(
        items(header, "RealWorldValueMappingSequence")
    ):
        return False
    return all(_is_frame_in_hu(header, frame) for frame in frames)


def _is_frame_in_hu(header: pydicom.Dataset, frame: pydicom.Dataset) -> bool:
    rescaling = functional_group(header, frame, "PixelValueTransformationSequence")
    rescale_type = joined_text(rescaling, "RescaleType").upper() if rescaling is not None else ""
    mappings = functional_groups(header, frame, "RealWorldValueMappingSequence")
    return rescale_type in ("", _HU) and _is_unit_hu(mappings)


def _is_unit_hu(mappings: Iterable[pydicom.Dataset]) -> bool:
    """Tell whether mappings to real values name no unit, or HU among others."""
    units = [
        joined_text(unit, "CodeValue")
        for mapping in mappings
        for unit in items(mapping, "MeasurementUnitsCodeSequence")
    ]
    return not units or any(unit in _HU_UNITS for unit in units)


def _is_not_axial(header: pydicom.Dataset) -> bool:
    keyword = "ImageOrientationPatient"
    frames = items(header, "PerFrameFunctionalGroupsSequence")
    place = functional_group(header, frames[0], "PlaneOrientationSequence") if frames else header
    if place is None or keyword not in place:
        return False
    orientation = required_numbers(place, keyword, 6)
    normal = np.cross(orientation[:3], orientation[3:])
    return bool(np.argmax(np.abs(normal)) != 2)
