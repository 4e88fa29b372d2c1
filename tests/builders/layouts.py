"""Raw projects in the layouts that they come in: small, with every voxel known.

One examination in all of them: the phantom of `pet_headers` (SUV 1, a hot rod of SUV 4, a cold
one) on a PET of 8 x 8 x 6 voxels of 4 mm, a CT of 16 x 16 x 6 voxels of 2 x 2 x 4 mm over the
same field, and the hot rod as the mask. A layout is a function of the project's folder that
returns the study's; the writers put one part of a study anywhere, any attribute replaced.
"""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from mask_builders import FRAME_UID, LPS_TO_RAS, build_rtstruct, build_seg
from numpy.typing import NDArray
from pet_headers import (
    HOT,
    REFERENCE_S,
    PerSlice,
    activity_per_suv,
    ds,
    pet_headers,
    phantom_suv,
    write_pet_series,
)
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MediaStorageDirectoryStorage

N_SLICES = 6
SUV = phantom_suv(N_SLICES)
LABELS = (SUV == HOT).astype(np.uint8)
HU = np.kron(np.where(SUV > 0, 40, -1000), np.ones((2, 2, 1))).astype(np.int16)
PET_AFFINE = LPS_TO_RAS @ np.diag([4.0, 4.0, 4.0, 1.0])
CT_AFFINE = LPS_TO_RAS @ np.array([[2.0, 0, 0, -1], [0, 2, 0, -1], [0, 0, 4, 0], [0, 0, 0, 1]])
BQ_PER_ML = SUV * float(activity_per_suv(REFERENCE_S))

PATIENT = {"PatientID": "ID-4711", "PatientName": "Doe^Jane", "PatientBirthDate": "19600229"}
STUDY_UID, CT_UID, PET_UID = "1.2.826.1", "1.2.826.2", "1.2.826.3"
CT_DESCRIPTION, PET_DESCRIPTION = "GK p.v. 3 Doe", "PET corr. Doe"
IDENTITY = ("Doe", "Jane", "4711", "19600229", "1.2.826", "GK p")
"""What must not be in any public text."""


# --- parts of a study ------------------------------------------------------------------------


def pet_datasets(n_slices: int = N_SLICES, **overrides: Any) -> list[Dataset]:
    """Headers of the PET series [Bq/ml], whose stored values are SUV times 1000."""
    slope = ds(float(activity_per_suv(REFERENCE_S)) / 1000)
    values = {
        **PATIENT,
        "StudyInstanceUID": STUDY_UID,
        "SeriesInstanceUID": PET_UID,
        "FrameOfReferenceUID": FRAME_UID,
        "SeriesDescription": PET_DESCRIPTION,
        "RescaleSlope": slope,
    }
    return pet_headers(n_slices, **(values | overrides))


def write_pet(folder: Path, **overrides: Any) -> list[Path]:
    """Write the PET series."""
    return write_pet_series(folder, pet_datasets(**overrides), np.rint(SUV * 1000))


def write_ct(folder: Path, **overrides: Any) -> list[Path]:
    """Write the CT series."""
    values = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": PerSlice(*(f"{CT_UID}.{k}" for k in range(N_SLICES))),
        "Modality": "CT",
        "SeriesInstanceUID": CT_UID,
        "SeriesDescription": CT_DESCRIPTION,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelSpacing": [2, 2],
        "ImagePositionPatient": PerSlice(*([-1, -1, 4 * k] for k in range(N_SLICES))),
        "SeriesType": None,
        "Units": None,
    }
    return write_pet_series(folder, pet_datasets(**(values | overrides)), HU + 1024)


def write_seg(path: Path, labels: NDArray[Any] = LABELS, **overrides: Any) -> Path:
    """Write a DICOM SEG on the grid of the PET."""
    names = [f"Lesion {number}" for number in range(1, int(labels.max()) + 1)] or ["Lesion"]
    return _write_mask(path, build_seg(labels, PET_AFFINE, names), overrides)


def write_rtstruct(
    path: Path, drawn_on: str = PET_UID, name: str = "Lesion", **overrides: Any
) -> Path:
    """Write the outline of the hot rod on every slice, as an RTSTRUCT of a series."""
    outline = np.array([[6.0, 6, 0], [10, 6, 0], [10, 14, 0], [6, 14, 0]])
    contours = [np.add(outline, (0, 0, 4 * k)) * (-1, -1, 1) for k in range(N_SLICES)]
    rtstruct = build_rtstruct({name: contours}, series_uid=drawn_on)
    return _write_mask(path, rtstruct, overrides)


def _write_mask(path: Path, mask: Dataset, overrides: dict[str, Any]) -> Path:
    values = {**PATIENT, "StudyInstanceUID": STUDY_UID, "SeriesDescription": "Doe"} | overrides
    for keyword, value in values.items():
        setattr(mask, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save_as(path, enforce_file_format=True)
    return path


def write_nifti(path: Path, volume: NDArray[Any], affine: NDArray[Any] = PET_AFFINE) -> Path:
    """Write a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


def write_nifti_images(study: Path) -> Path:
    """Write ``CT.nii.gz``, ``PET.nii.gz`` [Bq/ml] and ``MASK.nii.gz``."""
    write_nifti(study / "CT.nii.gz", HU, CT_AFFINE)
    write_nifti(study / "PET.nii.gz", BQ_PER_ML.astype(np.float32))
    write_nifti(study / "MASK.nii.gz", LABELS)
    return study


# --- layouts ---------------------------------------------------------------------------------


def subfolders(project: Path, study: str = "2001-01-01 Doe") -> Path:
    """``CT/``, ``PET/`` and ``MASK/`` as DICOM, the mask an RTSTRUCT drawn on the PET."""
    folder = project / "Doe^Jane" / study
    write_ct(folder / "CT")
    write_pet(folder / "PET")
    write_rtstruct(folder / "MASK" / "RS.dcm")
    return folder


def tcia(project: Path) -> Path:
    """FDG-PET-CT-Lesions as TCIA's retriever writes it: ``patient/study/series/*.dcm``."""
    study = project / "PETCT_0011f3deaf" / "03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445"
    write_ct(study / "2.000000-GK p.v. 3-98321")
    write_pet(study / "12.000000-PET corr.-54321")
    write_seg(study / "300.000000-Segmentation-67890" / "1-1.dcm")
    return study


def autopet(project: Path) -> Path:
    """The NIfTI files of the autoPET challenge, without any header."""
    study = project / "PETCT_0011f3deaf" / "03-23-2003-NA-PET-CT Ganzkoerper  primaer mit KM-10445"
    write_nifti(study / "CT.nii.gz", HU, CT_AFFINE)
    write_nifti(study / "CTres.nii.gz", HU[::2, ::2])
    write_nifti(study / "PET.nii.gz", BQ_PER_ML.astype(np.float32))
    write_nifti(study / "SUV.nii.gz", SUV.astype(np.float32))
    write_nifti(study / "SEG.nii.gz", LABELS)
    return study


AUTOPET_OPTIONS = ("--pet", "*SUV*", "--pet-units", "suv", "--ct", "*CTres*")


def flat(project: Path) -> Path:
    """One folder of mixed DICOM without suffixes, a localizer, a screen save and junk in it."""
    study = project / "Doe" / "export"
    write_rtstruct(study / "IM_RS")
    parts = {
        "A": write_ct(study / "ct"),
        "B": write_pet(study / "pet"),
        "C": write_ct(
            study / "scout", SeriesInstanceUID=f"{CT_UID}1", ImageType=["ORIGINAL", "LOCALIZER"]
        ),
        "D": write_ct(
            study / "saved",
            SeriesInstanceUID=f"{CT_UID}2",
            SOPClassUID="1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture
        ),
    }
    for letter, files in parts.items():
        for file in files:
            # Slices in no order of name.
            file.rename(study / f"IM{out_of_order(file)}{letter}")
        files[0].parent.rmdir()
    write_dicomdir(study / "DICOMDIR")
    (study / "readme.txt").write_text("made by a workstation")
    return study


def out_of_order(file: Path) -> str:
    """Two digits that put the slices of a series out of order."""
    return f"{int(file.stem[-3:]) * 7 % 11:02d}"


def write_dicomdir(path: Path) -> None:
    """Write the directory of a medium, which is DICOM and no object of a series."""
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.826.9"
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.FileSetID = "DOE"
    directory.save_as(path, enforce_file_format=True)


def nifti_with_header(project: Path) -> Path:
    """NIfTI images and one DICOM file of the PET."""
    study = write_nifti_images(project / "Doe" / "nifti")
    files = write_pet(study / "dcm")
    files[2].rename(study / "PET_header.dcm")
    for file in {*files} - {files[2]}:
        file.unlink()
    (study / "dcm").rmdir()
    return study


def nifti_with_header_series(project: Path) -> Path:
    """NIfTI images and the whole DICOM series of the PET."""
    study = write_nifti_images(project / "Doe" / "nifti")
    write_pet(study / "header")
    return study


def nifti_mask_beside_dicom(project: Path) -> Path:
    """CT and PET as DICOM, the mask as NIfTI on the grid of the PET."""
    study = subfolders(project)
    (study / "MASK" / "RS.dcm").unlink()
    write_nifti(study / "MASK" / "lesions.nii.gz", LABELS)
    return study


# --- nnU-Net and BIDS ------------------------------------------------------------------------

SIDECAR = {
    "Units": "Bq/mL",
    "TracerRadionuclide": "F18",
    "InjectedRadioactivity": 300.0,
    "InjectedRadioactivityUnits": "MBq",
    "InjectionStart": 0,
    "TimeZero": "09:00:00",
    "ScanStart": 3600,
    "FrameTimesStart": [3600],
    "FrameDuration": [120],
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 3600,
    "AttenuationCorrection": "CT-based",
    "PatientWeight": 70.0,
}


def write_images(ct, pet, mask):
    write_nifti(ct, HU, CT_AFFINE)
    write_nifti(pet, SUV.astype(np.float32))
    write_nifti(mask, LABELS)


def write_case(root, case, ct="_0000", pet="_0001"):
    images = root / "imagesTr"
    write_images(
        images / f"{case}{ct}.nii.gz",
        images / f"{case}{pet}.nii.gz",
        root / "labelsTr" / f"{case}.nii.gz",
    )


def write_bids(root, subject="sub-01", session="ses-a", sidecar=SIDECAR):
    own = root / subject / session
    stem = f"{subject}_{session}"
    write_images(
        own / "ct" / f"{stem}_ct.nii.gz",
        own / "pet" / f"{stem}_pet.nii.gz",
        root / "derivatives" / "reader" / subject / session / f"{stem}_label-tumor_mask.nii.gz",
    )
    if sidecar is not None:
        (own / "pet" / f"{stem}_pet.json").write_text(json.dumps(sidecar))
