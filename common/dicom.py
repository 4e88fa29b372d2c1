"""DICOM files: what each is, and which of them are the slices of a CT or PET series.

Knows pydicom. Headers are read once; pixels stay in the files until `dicom_pixels` fetches them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.uid import DeflatedExplicitVRLittleEndian

from common.dicom_values import functional_group, items, joined_text, required_numbers, texts
from common.errors import StudyError

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

GREYSCALE = ("MONOCHROME2", "MONOCHROME1", "")
"""Values of PhotometricInterpretation, which a header without pixels may lack."""

_CLASSES_WITH_MODALITY = frozenset({""}.union(*IMAGE_CLASSES.values()))
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

    @property
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

    Raises
    ------
    StudyError
        DICOM by its first bytes, but damaged.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(132)
            is_marked = start[128:] == b"DICM"
            if not is_marked and not _looks_like_bare_dataset(start):
                return None
            stream.seek(0)
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True)
            offset = stream.tell()
        is_object = "Modality" in header
        is_damaged = _is_cut_off(header, offset) or (
            not is_object and _sop_class(header) in _CLASSES_WITH_MODALITY
        )
    except OSError as error:
        raise StudyError(
            f"a file cannot be read ({error.strerror}): check it and its permissions", name
        ) from error
    except Exception as error:  # pydicom raises nearly every type on damaged files
        if is_marked:
            raise _damaged(name) from error
        return None
    if is_damaged and (is_marked or is_object):
        raise _damaged(name)
    return DicomFile(path, name, header, offset) if is_object else None


def _looks_like_bare_dataset(start: bytes) -> bool:
    """Tell whether a file without preamble begins as group 0002, or an element of 0008, does."""
    group_0002 = start[:8] == b"\x02\x00\x00\x00UL\x04\x00"
    group_0008 = start[:2] == b"\x08\x00" and start[2:4] <= b"\x18\x00"
    implicit_length = int.from_bytes(start[4:8], "little")
    return group_0002 or (group_0008 and (start[4:6] in _FIRST_VRS or implicit_length <= 64))


def _is_cut_off(header: pydicom.FileDataset, offset: int) -> bool:
    """Tell whether an element reaches beyond `offset`, where reading ended; pydicom does not."""
    if header.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        return False
    return any(
        isinstance(element, RawDataElement) and element.value_tell + element.length > offset
        for element in (*header.file_meta.values(), *header.values())
    )


def _sop_class(header: pydicom.FileDataset) -> str:
    return joined_text(header.file_meta, "MediaStorageSOPClassUID") or joined_text(
        header, "SOPClassUID"
    )


def _damaged(name: str) -> StudyError:
    return StudyError(
        "a DICOM file is damaged (its header cannot be read): export the study again", name
    )


# --- series ----------------------------------------------------------------------------------


def group_series(files: Iterable[DicomFile], modality: str) -> list[Series]:
    """Return the candidate series of a modality, in order of their first file's name.

    Localizers, screens, projections, reformats and derived series that are not axial are none,
    even among the slices of a series.
    """
    groups: dict[str, list[DicomFile]] = defaultdict(list)
    for file in sorted(files, key=lambda file: file.name):
        if joined_text(file.header, "Modality") == modality and _is_slice(file.header, modality):
            groups[joined_text(file.header, "SeriesInstanceUID")].append(file)
    return [Series(modality, tuple(group)) for group in groups.values()]


def _is_slice(header: pydicom.Dataset, modality: str) -> bool:
    sop_class = joined_text(header, "SOPClassUID")
    if sop_class and sop_class not in IMAGE_CLASSES[modality]:
        return False
    if joined_text(header, "PhotometricInterpretation") not in GREYSCALE:
        return False
    kinds = [each.upper() for k in ("ImageType", "SeriesType") for each in texts(header, k)]
    if any(map(_NO_SLICE.search, kinds)):
        return False
    return not ("DERIVED" in kinds and _is_not_axial(header))


def _is_not_axial(header: pydicom.Dataset) -> bool:
    keyword = "ImageOrientationPatient"
    frames = items(header, "PerFrameFunctionalGroupsSequence")
    place = functional_group(header, frames[0], "PlaneOrientationSequence") if frames else header
    if place is None or keyword not in place:
        return False
    orientation = required_numbers(place, keyword, 6)
    normal = np.cross(orientation[:3], orientation[3:])
    return bool(np.argmax(np.abs(normal)) != 2)
