"""The files of a study by kind: NIfTI, DICOM, and what is left out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from common.candidates import NiftiFile
from common.dicom import DICOM_SUFFIXES, DicomFile, read_dicom_file
from common.dicom_values import tag_of
from common.nifti import is_nifti_name
from common.raw_project import files_below

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
    """The files of a study by kind, suffixes of other image formats, and remarks on the rest."""

    nifti: Sequence[NiftiFile]
    dicom: Sequence[DicomFile]
    other_formats: Sequence[str]
    remarks: tuple[str, ...]


def read_files(folder: str) -> StudyFiles:
    """Read the headers of all DICOM files below a study's folder, and list the NIfTI files.

    Raises
    ------
    StudyError
        A folder or file cannot be read, or a DICOM file is damaged.
    """
    nifti: list[NiftiFile] = []
    dicom: list[DicomFile] = []
    other_formats: set[str] = set()
    n_dangling = n_no_dicom = 0
    for file in files_below(folder):
        path = os.path.join(folder, file.name)
        if file.size is None:
            n_dangling += 1
        elif is_nifti_name(file.name):
            nifti.append(NiftiFile(path, file.name))
        elif (found := read_dicom_file(path, file.name)) is not None:
            dicom.append(found)
        else:
            n_no_dicom += file.name.lower().endswith(DICOM_SUFFIXES)
            other_formats.update(s for s in _OTHER_FORMATS if file.name.lower().endswith(s))
    remarks = []
    if n_dangling:
        remarks.append(f"links that lead nowhere ({n_dangling}) are left out: restore their target")
    if n_no_dicom:
        remarks.append(
            f"files named as DICOM ({n_no_dicom}) are left out, damaged or without "
            f"{tag_of('Modality')}: check that no slice is lost"
        )
    return StudyFiles(nifti, dicom, sorted(other_formats), tuple(remarks))
