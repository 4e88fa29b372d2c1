"""Writer of small CT and PET series of any geometry, pixel format and transfer syntax.

Volumes are stored values [column, row, slice]; affines are voxel -> RAS+ mm, and may be sheared.
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from common.dicom.files import DicomFile, Series, group_series, read_dicom_file

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SOP_CLASSES = {"CT": uid.CTImageStorage, "PT": uid.PositronEmissionTomographyImageStorage}
ENHANCED_CLASSES = {"CT": uid.EnhancedCTImageStorage, "PT": uid.EnhancedPETImageStorage}

# Direction cosines [LPS] from column to column and from row to row, as scanners write them.
ORIENTATIONS = {
    "axial, head first, supine": [1, 0, 0, 0, 1, 0],
    "axial, head first, prone": [-1, 0, 0, 0, -1, 0],
    "axial, feet first, supine": [-1, 0, 0, 0, 1, 0],
    "axial, feet first, prone": [1, 0, 0, 0, -1, 0],
    "sagittal": [0, 1, 0, 0, 0, -1],
    "coronal": [1, 0, 0, 0, 0, -1],
    "oblique": [0.96, 0.28, 0, -0.168, 0.576, 0.8],
}
ENCODERS = {
    uid.RLELossless: ("pydicom", ()),
    uid.JPEGLSLossless: ("pyjpegls", ("jpeg_ls",)),
    uid.JPEG2000Lossless: ("pylibjpeg", ("pylibjpeg", "openjpeg")),
}
"""By transfer syntax: pydicom's name of the encoder, and the modules that it needs."""
GDCM_ENCODERS = {
    uid.JPEGLossless: "JPEGLosslessProcess14",
    uid.JPEGLosslessSV1: "JPEGLosslessProcess14_1",
}
AXIAL = ORIENTATIONS["axial, head first, supine"]


def affine_of(
    orientation: Sequence[float] = AXIAL,
    spacing_mm: Sequence[float] = (1.25, 1.5, 3.27),
    first_mm: Sequence[float] = (-40.0, -30.5, -75.25),
    tilt_degrees: float = 0.0,
) -> np.ndarray:
    """Return voxel -> RAS+ mm; a tilted gantry moves each slice along its rows' direction."""
    row, column = np.reshape(orientation, (2, 3))
    normal = np.cross(row, column)
    step = normal + np.tan(np.radians(tilt_degrees)) * column
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([row, column, step]) * spacing_mm
    affine[:3, 3] = first_mm
    return LPS_TO_RAS @ affine


def noise(
    shape: Sequence[int],
    bits: int = 12,
    *,
    signed: bool = False,
    allocated: int = 16,
    seed: int = 0,
) -> np.ndarray:
    """Return stored values over the whole range of their bits, its two ends in every slice."""
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    stored = np.random.default_rng(seed).integers(least, most, shape, endpoint=True)
    stored[0, 0], stored[-1, -1] = least, most
    return stored.astype(f"{'i' if signed else 'u'}{allocated // 8}")


# --- datasets


def build_slices(
    stored: np.ndarray,
    affine: np.ndarray,
    modality: str = "CT",
    *,
    slopes: float | Sequence[float] = 1.0,
    intercept: float = 0.0,
    bits_stored: int | None = None,
    **attributes: object,
) -> list[Dataset]:
    """Build one dataset a slice, the first slice first."""
    datasets = []
    for k, slope in enumerate(np.broadcast_to(slopes, stored.shape[2])):
        dataset = _image(stored[:, :, k : k + 1], SOP_CLASSES[modality], modality, bits_stored)
        dataset.SOPInstanceUID = f"{dataset.SeriesInstanceUID}.{k + 1}"
        dataset.InstanceNumber = k + 1
        dataset.ImagePositionPatient = _position(affine, k)
        dataset.ImageOrientationPatient = _orientation(affine)
        dataset.PixelSpacing = _pixel_spacing(affine)
        dataset.SliceThickness = _thickness(affine)
        dataset.RescaleSlope, dataset.RescaleIntercept = _decimals([slope, intercept])
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        datasets.append(dataset)
    return datasets


def build_enhanced(
    stored: np.ndarray,
    affine: np.ndarray,
    modality: str = "CT",
    *,
    slopes: float | Sequence[float] = 1.0,
    intercept: float = 0.0,
    order: Sequence[int] | None = None,
    bits_stored: int | None = None,
    **attributes: object,
) -> Dataset:
    """Build one multi-frame dataset that holds the slices ``order``, by default all."""
    order = range(stored.shape[2]) if order is None else order
    slopes = np.broadcast_to(slopes, stored.shape[2])
    dataset = _image(stored[:, :, order], ENHANCED_CLASSES[modality], modality, bits_stored)
    dataset.SOPInstanceUID = f"{dataset.SeriesInstanceUID}.{order[0] + 1}"
    dataset.NumberOfFrames = len(order)
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = _pixel_spacing(affine), _thickness(affine)
    orientation.ImageOrientationPatient = _orientation(affine)
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = []
    for k in order:
        position, rescaling, frame = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = _position(affine, k)
        rescaling.RescaleSlope, rescaling.RescaleIntercept = _decimals([slopes[k], intercept])
        rescaling.RescaleType = "HU" if modality == "CT" else "US"
        frame.PlanePositionSequence = [position]
        frame.PixelValueTransformationSequence = [rescaling]
        dataset.PerFrameFunctionalGroupsSequence.append(frame)
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def _image(stored: np.ndarray, sop_class: str, modality: str, bits_stored: int | None) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.Modality = sop_class, modality
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"] if modality == "CT" else ["ORIGINAL"] * 2
    dataset.PatientName, dataset.PatientID = "Phantom^One", "phantom"
    dataset.SeriesDescription = f"{modality} of one phantom"
    dataset.SeriesNumber = {"CT": 1, "PT": 2}[modality]
    dataset.StudyInstanceUID = "1.2.3.4.1"
    dataset.SeriesInstanceUID = f"1.2.3.4.1.{dataset.SeriesNumber}"
    dataset.FrameOfReferenceUID = "1.2.3.4.2"
    dataset.StudyDate, dataset.StudyTime = "20240301", "101500"
    dataset.PatientPosition = "HFS"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Columns, dataset.Rows, _ = stored.shape
    dataset.BitsAllocated = stored.itemsize * 8
    dataset.BitsStored = bits_stored or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.T.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    return dataset


def _position(affine: np.ndarray, k: int) -> list[str]:
    return _decimals((LPS_TO_RAS @ affine @ (0, 0, k, 1))[:3])


def _orientation(affine: np.ndarray) -> list[str]:
    axes = (LPS_TO_RAS @ affine)[:3, :2]
    return _decimals((axes / np.linalg.norm(axes, axis=0)).T.ravel())


def _pixel_spacing(affine: np.ndarray) -> list[str]:
    return _decimals(np.linalg.norm(affine[:3, [1, 0]], axis=0))


def _thickness(affine: np.ndarray) -> str:
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    return _decimals([abs(normal @ affine[:3, 2]) / np.linalg.norm(normal)])[0]


def _decimals(numbers: Iterable[float]) -> list[str]:
    """Return decimal strings of at most 16 characters, as DICOM allows."""
    return [pydicom.valuerep.format_number_as_ds(float(number)) for number in numbers]


# --- files


def write_slices(
    folder: Path,
    datasets: Sequence[Dataset],
    syntax: str = uid.ExplicitVRLittleEndian,
    names: Sequence[str] | None = None,
) -> list[Path]:
    """Write one file a dataset, by default IM0001.dcm and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"IM{number:04}.dcm" for number in range(1, len(datasets) + 1)]
    paths = [folder / name for name in names]
    for path, dataset in zip(paths, datasets, strict=True):
        write_file(path, dataset, syntax)
    return paths


def write_file(path: Path, dataset: Dataset, syntax: str = uid.ExplicitVRLittleEndian) -> None:
    """Write a dataset in a transfer syntax."""
    dataset = copy.deepcopy(dataset)
    if syntax in ENCODERS:
        compress(dataset, syntax)
    elif syntax in GDCM_ENCODERS:
        dataset.save_as(path, enforce_file_format=True)
        dataset.PixelData = _compressed_by_gdcm(path, GDCM_ENCODERS[syntax])
        dataset["PixelData"].VR = "OB"
    elif syntax == uid.ExplicitVRBigEndian:
        swapped = np.frombuffer(dataset.PixelData, f"u{dataset.BitsAllocated // 8}").byteswap()
        dataset.PixelData = swapped.tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, enforce_file_format=True)


def compress(dataset: Dataset, syntax: str) -> None:
    """Compress the pixels; the test is skipped where the encoder is not installed."""
    encoder, modules = ENCODERS[syntax]
    for module in modules:
        pytest.importorskip(module, reason=f"{encoder} is not installed, or not its {module}")
    dataset.compress(syntax, encoding_plugin=encoder, generate_instance_uid=False)


def write_bare_file(path: Path, dataset: Dataset, *, implicit: bool = True) -> None:
    """Write a dataset without preamble and file meta information."""
    dataset = copy.deepcopy(dataset)
    del dataset.file_meta
    pydicom.dcmwrite(path, dataset, implicit_vr=implicit, little_endian=True)


def _compressed_by_gdcm(path: Path, syntax: str) -> bytes:
    """Return the encapsulated pixels alone: gdcm writes places of frames of its own."""
    import gdcm  # not before zlib, whose functions it replaces by its own, and all breaks down

    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return pydicom.dcmread(path).PixelData


def read_series(folder: Path, modality: str = "CT") -> list[Series]:
    """Return the candidate series among all files below a folder."""
    return group_series(read_files(folder), modality)


def read_files(folder: Path) -> list[DicomFile]:
    """Read all files below a folder that are DICOM objects."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = (read_dicom_file(str(path), str(path.relative_to(folder))) for path in paths)
    return [file for file in files if file is not None]
