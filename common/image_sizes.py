"""What the images of a raw study take in memory, by the headers of a few of its files."""

import os
from collections.abc import Sequence

from common.dicom import DicomFile, read_dicom_file
from common.dicom_values import whole_number
from common.errors import StudyError
from common.nifti import is_nifti_name, stored_bytes
from common.raw_project import RawFile


def image_bytes(folder: str, files: Sequence[RawFile]) -> int:
    """Return what the images in a study's files take, uncompressed, roughly [bytes].

    NIfTI headers tell. Of DICOM files the largest stands for all: by as much as its pixels
    exceed it, compressed, the others do. What can't be read counts by its size.
    """
    paths = {file: os.path.join(folder, file.name) for file in files if file.size}
    nifti = [file for file in paths if is_nifti_name(file.name)]
    others = [file for file in paths if not is_nifti_name(file.name)]
    total = sum(_nifti_bytes(paths[file]) or file.size or 0 for file in nifti)
    if others:
        largest = max(others, key=lambda file: (file.size or 0, file.name))
        size = largest.size or 1
        expansion = max(1.0, _pixel_bytes(paths[largest], largest.name) / size)
        total += round(expansion * sum(file.size or 0 for file in others))
    return total


def _nifti_bytes(path: str) -> int:
    try:
        return stored_bytes(path)
    except StudyError:
        return 0


def _pixel_bytes(path: str, name: str) -> int:
    """Return what a DICOM file's pixels take [bytes]; 0 where it has none."""
    try:
        file = read_dicom_file(path, name)
        return _of_matrix(file) if file is not None and "Rows" in file.header else 0
    except StudyError:
        return 0


def _of_matrix(file: DicomFile) -> int:
    rows, columns, bits = (
        whole_number(file.header, keyword) for keyword in ("Rows", "Columns", "BitsAllocated")
    )
    return file.n_frames * rows * columns * bits // 8
