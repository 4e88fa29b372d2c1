"""The files of a study by kind: NIfTI, DICOM with its header read, and what is neither."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from common.dicom.attributes import tag_of
from common.dicom.files import DICOM_SUFFIXES, DicomFile, read_dicom_file
from common.errors import Kind, Warning
from common.nifti import is_nifti_name
from common.raw.candidates import NiftiFile
from common.raw.project import StudyFolder, files_of

_OTHER_FORMATS = (
    ".nrrd",
    ".mha",
    ".mhd",
    ".hdr",
    ".img",
    ".mat",
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".gz",
)


@dataclass(frozen=True)
class StudyFiles:
    """The files of a study by kind, suffixes of other image formats, and warnings of the rest.

    `lacks_files` as in `IncompleteStudy`.
    """

    nifti: Sequence[NiftiFile]
    dicom: Sequence[DicomFile]
    other_formats: Sequence[str]
    warnings: tuple[Warning, ...]
    lacks_files: bool = False


def read_files(folder: StudyFolder) -> StudyFiles:
    """Read the headers of all DICOM files below a study's folder, and list the NIfTI files.

    Raises
    ------
    UnreachableStudy
        A folder or file cannot be read.
    StudyError
        A DICOM file is damaged.
    """
    nifti: list[NiftiFile] = []
    dicom: list[DicomFile] = []
    other_formats: set[str] = set()
    n_dangling = n_no_dicom = 0
    role_of = {each.name: each.role for each in folder.members or ()}
    files = files_of(folder)
    for file in files:
        path = os.path.join(folder.path, file.name)
        if file.size is None:
            n_dangling += 1
        elif is_nifti_name(file.name):
            nifti.append(NiftiFile(path, file.name, role_of.get(file.name, "")))
        elif (found := read_dicom_file(path, file.name)) is not None:
            dicom.append(found)
        else:
            n_no_dicom += file.name.lower().endswith(DICOM_SUFFIXES)
            other_formats.update(s for s in _OTHER_FORMATS if file.name.lower().endswith(s))
    texts = []
    if n_dangling:
        texts.append(f"links that lead nowhere ({n_dangling}) are left out: restore their target")
    if n_no_dicom:
        texts.append(
            f"files named as DICOM ({n_no_dicom}) are left out, damaged or without "
            f"{tag_of('Modality')}: check that no slice is lost"
        )
    warnings = tuple(Warning(Kind.LEFT_OUT, text) for text in texts)
    lacks_files = not files or n_dangling > 0
    return StudyFiles(nifti, dicom, sorted(other_formats), warnings, lacks_files)
