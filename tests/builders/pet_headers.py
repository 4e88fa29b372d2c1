"""PET headers and small series with a known SUV, for tests.

`pet_headers` and `enhanced_pet_header` build headers in memory: a default FDG scan in which every
attribute can be replaced or left out by its keyword. `write_pet_series` and `write_enhanced_pet`
add pixels and write files. `phantom_suv` is a volume to store in them; how much activity stands
for an SUV of 1 follows from `activity_per_suv` and its siblings, which know the physics and
nothing of the program.

    headers = pet_headers(4, PatientWeight=80, AcquisitionTime=PerSlice("110000", "110500", ...))
    write_pet_series(folder, headers, np.rint(phantom_suv(4) * 1000))
"""

from collections.abc import Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    EnhancedPETImageStorage,
    ExplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat

Array = NDArray[np.float64]
PrivateValue = tuple[str, str, Any]
"""Private creator ("" for none), VR and value."""

WEIGHT_KG = 70.0
DOSE_BQ = 368_080_000.0
HALF_LIFE_S = 6586.2
INJECTION = datetime(2025, 1, 1, 10)
REFERENCE_S = 3600.0
"""Start of the default scan, seconds after injection."""
DURATION_S = 300.0

BACKGROUND, HOT, COLD = 1.0, 4.0, 0.2

TRACER_KEYWORDS = {
    "Radiopharmaceutical",
    "RadiopharmaceuticalStartTime",
    "RadiopharmaceuticalStartDateTime",
    "RadionuclideTotalDose",
    "RadionuclideHalfLife",
}


class PerSlice(tuple):
    """Values of one attribute, one for each slice."""

    def __new__(cls, *values: Any) -> "PerSlice":
        return super().__new__(cls, values)


# --- physics ---------------------------------------------------------------------------------


def activity_per_suv(
    after_injection_s: float | Array,
    *,
    weight_kg: float = WEIGHT_KG,
    dose_bq: float = DOSE_BQ,
    half_life_s: float = HALF_LIFE_S,
) -> Array:
    """Activity concentration [Bq/ml] that is an SUV of 1 at a moment after injection."""
    return dose_bq / (weight_kg * 1000) * 0.5 ** (np.asarray(after_injection_s) / half_life_s)


def mean_activity_per_suv(start_s: float | Array, duration_s: float, **body: float) -> Array:
    """Mean of `activity_per_suv` over a frame: its integral in closed form."""
    decay_rate = np.log(2) / body.get("half_life_s", HALF_LIFE_S)
    start, end = np.asarray(start_s), np.asarray(start_s) + duration_s
    lost = activity_per_suv(start, **body) - activity_per_suv(end, **body)
    return lost / (decay_rate * duration_s)


def frame_reference_time_s(
    start_s: float | Array, duration_s: float, reference_s: float, **body: float
) -> Array:
    """When, after the decay reference, the activity equals its mean over a frame [s]."""
    mean = mean_activity_per_suv(start_s, duration_s, **body)
    fraction = mean / activity_per_suv(reference_s, **body)
    return -body.get("half_life_s", HALF_LIFE_S) * np.log2(fraction)


def phantom_suv(n_slices: int = 4) -> Array:
    """SUV of a block with a hot and a cold rod, (8, 8, n_slices); zero outside."""
    suv = np.zeros((8, 8, n_slices))
    suv[1:7, 1:7] = BACKGROUND
    suv[2, 2:4, :] = HOT
    suv[5, 3:5, :] = COLD
    return suv


# --- times -----------------------------------------------------------------------------------


def moment(after_injection_s: float, injection: datetime = INJECTION) -> datetime:
    """A moment some seconds after injection."""
    return injection + timedelta(seconds=after_injection_s)


def da(when: datetime) -> str:
    """Date as DICOM DA."""
    return f"{when:%Y%m%d}"


def tm(when: datetime) -> str:
    """Time of day as DICOM TM."""
    return f"{when:%H%M%S.%f}"


def dt(when: datetime) -> str:
    """Moment as DICOM DT."""
    return f"{when:%Y%m%d%H%M%S.%f}"


def ds(value: float) -> DSfloat:
    """A number as DICOM DS, of 16 characters at most."""
    return DSfloat(float(value), auto_format=True)


# --- headers ---------------------------------------------------------------------------------


def pet_headers(
    n_slices: int = 4,
    *,
    private: dict[int, PrivateValue | PerSlice] | None = None,
    **overrides: Any,
) -> list[Dataset]:
    """Headers of a static FDG series of single-frame PET images, in slice order.

    By default: 70 kg, 368.08 MBq at 10:00, series and acquisition at 11:00 of the same day, frames
    of 300 s, Units BQML corrected for decay to START, slices 4 mm apart, pixels of 4 mm.

    Parameters
    ----------
    n_slices : int
        Number of slices.
    private : dict, optional
        Private attributes, tag -> (creator, VR, value), or `PerSlice` of such triples.
    **overrides
        DICOM keyword = value; None leaves the attribute out, `PerSlice` has one value a slice.
        Keywords of the tracer go to the item of RadiopharmaceuticalInformationSequence.

    """
    start = moment(REFERENCE_S)
    frame_offset_s = frame_reference_time_s(REFERENCE_S, DURATION_S, REFERENCE_S)
    values = {
        **_patient_and_tracer(),
        "SOPClassUID": PositronEmissionTomographyImageStorage,
        "SOPInstanceUID": PerSlice(*(_uid("image", index) for index in range(n_slices))),
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "SeriesType": ["WHOLE BODY", "IMAGE"],
        "AcquisitionDate": da(start),
        "AcquisitionTime": tm(start),
        "FrameReferenceTime": ds(frame_offset_s * 1000),
        "ActualFrameDuration": int(DURATION_S * 1000),
        "CorrectedImage": ["NORM", "DTIM", "ATTN", "SCAT", "DECY", "RAN"],
        "DecayCorrection": "START",
        "Units": "BQML",
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "InstanceNumber": PerSlice(*range(1, n_slices + 1)),
        "NumberOfSlices": n_slices,
        "PixelSpacing": [4, 4],
        "SliceThickness": 4,
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": PerSlice(*([0, 0, 4 * index] for index in range(n_slices))),
        **overrides,
    }
    return [_header(values, private or {}, index) for index in range(n_slices)]


def enhanced_pet_header(
    n_frames: int = 4,
    *,
    unit: str | None = "Bq/ml",
    unit_in: str = "mapping",
    slopes: Sequence[float] | None = None,
    frame_references: Sequence[str] | None = None,
    **overrides: Any,
) -> Dataset:
    """Header of one Enhanced PET object; the scan is that of `pet_headers`.

    Parameters
    ----------
    n_frames : int
        Number of frames, one a slice.
    unit : str, optional
        UCUM code of the rescaled values.
    unit_in : {"mapping", "frame", "shared"}
        Where the unit stands: in the RealWorldValueMappingSequence of each frame, or directly in
        the functional groups of each frame or of all.
    slopes : sequence of float, optional
        RescaleSlope of each frame; 1 by default.
    frame_references : sequence of str, optional
        FrameReferenceDateTime of each frame.
    **overrides
        As for `pet_headers`, of the object as a whole.

    """
    values = {
        **_patient_and_tracer(),
        "RadiopharmaceuticalStartTime": None,
        "SOPClassUID": EnhancedPETImageStorage,
        "SOPInstanceUID": _uid("enhanced"),
        "NumberOfFrames": n_frames,
        "AttenuationCorrected": "YES",
        "DecayCorrected": "YES",
        "DecayCorrectionDateTime": dt(moment(REFERENCE_S)),
        **overrides,
    }
    header = _header(values, {}, 0)
    shared = _item(
        PixelMeasuresSequence=[_item(PixelSpacing=[4, 4], SliceThickness=4)],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    units = [_item(CodeValue=unit, CodingSchemeDesignator="UCUM", CodeMeaning="unit")]
    if unit and unit_in == "shared":
        shared.MeasurementUnitsCodeSequence = units
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = [
        _frame(
            index,
            ds(1 if slopes is None else slopes[index]),
            None if frame_references is None else frame_references[index],
            units if unit else None,
            unit_in,
        )
        for index in range(n_frames)
    ]
    return header


def put_raw(dataset: Dataset, keyword: str, value: bytes, vr: str | None = None) -> None:
    """Put a value as it comes from a file, not yet converted: it may be malformed."""
    tag = Tag(keyword)
    vr = vr or dictionary_VR(tag)
    dataset[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)


def _patient_and_tracer() -> dict[str, Any]:
    start = moment(REFERENCE_S)
    return {
        "Modality": "PT",
        "Manufacturer": "Synthetic",
        "PatientName": "Doe^Jane",
        "PatientID": "ID-4711",
        "PatientSex": "F",
        "PatientSize": 1.75,
        "PatientWeight": WEIGHT_KG,
        "StudyInstanceUID": _uid("study"),
        "SeriesInstanceUID": _uid("series"),
        "FrameOfReferenceUID": _uid("frame of reference"),
        "StudyDate": da(start),
        "StudyTime": tm(start),
        "SeriesDate": da(start),
        "SeriesTime": tm(start),
        "SeriesDescription": "PET Doe",
        "SeriesNumber": 3,
        "Radiopharmaceutical": "FDG",
        "RadiopharmaceuticalStartTime": tm(INJECTION),
        "RadiopharmaceuticalStartDateTime": dt(INJECTION),
        "RadionuclideTotalDose": DOSE_BQ,
        "RadionuclideHalfLife": HALF_LIFE_S,
    }


def _header(
    values: dict[str, Any], private: dict[int, PrivateValue | PerSlice], index: int
) -> Dataset:
    chosen = {
        keyword: value[index] if isinstance(value, PerSlice) else value
        for keyword, value in values.items()
    }
    tracer = {keyword: chosen.pop(keyword) for keyword in TRACER_KEYWORDS & chosen.keys()}
    chosen = {"RadiopharmaceuticalInformationSequence": [_item(**tracer)]} | chosen
    header = _item(**chosen)
    for tag, value in private.items():
        creator, vr, content = value[index] if isinstance(value, PerSlice) else value
        if creator:
            header.add_new(tag >> 16 << 16 | tag >> 8 & 0xFF, "LO", creator)
        header.add_new(tag, vr, content)
    return header


def _frame(index: int, slope: DSfloat, reference: str | None, units: Any, unit_in: str) -> Dataset:
    mapping = _item(
        RealWorldValueSlope=float(slope),
        RealWorldValueIntercept=0.0,
        MeasurementUnitsCodeSequence=units,
    )
    return _item(
        FrameContentSequence=[
            _item(FrameAcquisitionDuration=DURATION_S * 1000, FrameReferenceDateTime=reference)
        ],
        PlanePositionSequence=[_item(ImagePositionPatient=[0, 0, 4 * index])],
        PixelValueTransformationSequence=[
            _item(RescaleSlope=slope, RescaleIntercept=0, RescaleType="US")
        ],
        RealWorldValueMappingSequence=[mapping] if units and unit_in == "mapping" else None,
        MeasurementUnitsCodeSequence=units if unit_in == "frame" else None,
    )


def _item(**values: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def _uid(*names: object) -> str:
    return generate_uid(entropy_srcs=[str(name) for name in names])


# --- files -----------------------------------------------------------------------------------


def write_pet_series(
    folder: Path, headers: Sequence[Dataset], volume: NDArray[Any], **options: Any
) -> list[Path]:
    """Write one file a slice.

    Parameters
    ----------
    folder : Path
        Created where missing.
    headers : sequence of Dataset
        As from `pet_headers`; unchanged.
    volume : (X, Y, n_slices) array
        Stored values, of the range of int16: [x, y] becomes column x, row y.
    **options
        `transfer_syntax`: UID of a native transfer syntax.

    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"pet_{index:03d}.dcm" for index in range(len(headers))]
    for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
        _write(path, header, volume[:, :, index : index + 1], **options)
    return paths


def write_enhanced_pet(path: Path, header: Dataset, volume: NDArray[Any]) -> Path:
    """Write one Enhanced PET file; `volume` as for `write_pet_series`, a frame a slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, header, volume)
    return path


def _write(
    path: Path,
    header: Dataset,
    volume: NDArray[Any],
    transfer_syntax: UID = ExplicitVRLittleEndian,
) -> None:
    image = deepcopy(header)
    image.Columns, image.Rows = volume.shape[:2]
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit = 15
    image.PixelRepresentation = 1
    image.PixelData = np.ascontiguousarray(volume.T).astype("<i2").tobytes()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = transfer_syntax
    image.save_as(path, enforce_file_format=True)
