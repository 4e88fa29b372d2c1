"""Write a demo raw project: invented patients whose every lesion is known in closed form.

OUT/<patient>/<study>/ holds six FDG-PET/CT studies as hospitals export them: DICOM series with
an RTSTRUCT, a DICOM SEG or a NIfTI mask, one study in NIfTI with a PET DICOM header, one patient
with a follow-up, and one study without a mask, which the chain has to skip.

Torso, organs and lesions are ellipsoids in patient coordinates. A voxel takes the value found at
its centre, so edges are sharp and SUVs exact, but for the rounding of stored values to 16 bits.
The same options give the same bytes. The truth stands in DEMO_STUDIES; tests read it from there.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import highdicom
import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import DSfloat

EPILOG = """examples:
  python examples/phantom.py demo_raw
  python examples/phantom.py big_raw --matrix-ct 512 --matrix-pet 400 --slices 326 --noise
"""

F18_HALF_LIFE_S = 6586.2
DECAY_PER_S = math.log(2) / F18_HALF_LIFE_S
SLICE_SPACING_MM = 3.27
TOP_MM = 100.0  # z of the uppermost slice centre; more slices reach further down
FEWEST_SLICES = 60  # what the organs and lesions below take
CT_FIELD_MM, CT_CENTER_MM = 500.0, (-4.0, -12.0)
PET_FIELD_MM, PET_CENTER_MM = 448.0, (2.5, -9.0)
BED_SLICES, BED_STEP_S, FRAME_DURATION_S = 20, 135.0, 120.0
CONTOUR_POINTS = 360
NOISE_HU, NOISE_SUV_FRACTION, NOISE_SEED = 15.0, 0.1, 20240301


@dataclass(frozen=True)
class Tissue:
    """An ellipsoid of healthy tissue: centre and semi-axes [mm, RAS], CT [HU], SUVbw [g/ml]."""

    center_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    hu: float
    suv: float


@dataclass(frozen=True)
class Lesion:
    """An ellipsoid of tumour: centre and semi-axes [mm, RAS], SUVbw [g/ml], mask label, CT [HU]."""

    center_mm: tuple[float, float, float]
    semi_axes_mm: tuple[float, float, float]
    suv: float
    label: int = 1
    hu: float = 60.0

    @property
    def volume_ml(self) -> float:
        return 4 / 3 * math.pi * math.prod(self.semi_axes_mm) / 1000


@dataclass(frozen=True)
class Study:
    """One PET/CT study: who, how it was acquired, how it was exported, and the truth in it."""

    patient: str
    study: str
    patient_name: str
    sex: str
    weight_kg: float
    height_m: float
    dose_bq: float
    injected: datetime
    scanned: datetime
    lesions: tuple[Lesion, ...]
    units: str = "BQML"  # or GML
    decay_correction: str = "START"  # or ADMIN
    images: str = "DICOM"  # or NIfTI
    mask: str | None = "RTSTRUCT"  # or SEG, NIfTI, None
    mask_drawn_on: str = "PET"  # or CT, for an RTSTRUCT


@dataclass(frozen=True)
class Grid:
    """Axial slices as DICOM stores them: arrays run to Left, Posterior and Superior."""

    matrix: int
    slices: int
    pixel_mm: float
    center_mm: tuple[float, float]

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel to RAS+ [mm], (4, 4)."""
        affine = np.diag([-self.pixel_mm, -self.pixel_mm, SLICE_SPACING_MM, 1.0])
        affine[:2, 3] = np.add(self.center_mm, (self.matrix - 1) / 2 * self.pixel_mm)
        affine[2, 3] = TOP_MM - (self.slices - 1) * SLICE_SPACING_MM
        return affine

    @property
    def voxel_centers_mm(self) -> list[NDArray[np.float64]]:
        """The x, y and z of columns, rows and slices [mm, RAS]."""
        counts = (self.matrix, self.matrix, self.slices)
        return [
            self.affine[axis, 3] + self.affine[axis, axis] * np.arange(count)
            for axis, count in enumerate(counts)
        ]


def sphere(x: float, y: float, z: float, radius_mm: float, suv: float, label: int = 1) -> Lesion:
    return Lesion((x, y, z), (radius_mm,) * 3, suv, label)


# Later tissues lie on top of earlier ones, and lesions on top of all.
ANATOMY = (
    Tissue((0, -128, 0), (190, 6, math.inf), -300, 0.0),  # table
    Tissue((0, 0, -50), (170, 115, 1000), 40, 1.0),  # torso
    Tissue((75, 10, 45), (50, 75, 48), -800, 0.4),  # right lung
    Tissue((-75, 10, 45), (50, 75, 48), -800, 0.4),  # left lung
    Tissue((0, -80, 0), (18, 18, 400), 400, 1.0),  # spine
    Tissue((75, 5, -45), (70, 75, 38), 55, 2.0),  # liver
    Tissue((-75, -35, -55), (22, 24, 26), 35, 14.0),  # left kidney: hot, and no tumour
)

DEMO_STUDIES = (
    Study(
        *("patient_01", "2024-03-01_PETCT", "DEMO^ANNA", "F", 68.5, 1.66, 251.3e6),
        injected=datetime(2024, 3, 1, 9, 12),
        scanned=datetime(2024, 3, 1, 10, 14, 31),
        lesions=(
            sphere(-72.3, 18.4, 48.2, 18.0, 9.0),
            sphere(67.7, 12.1, -42.3, 21.0, 7.0),
            Lesion((4.3, 21.6, 61.8), (16.0, 19.0, 26.0), 12.0),
        ),
    ),
    Study(  # the follow-up: two lesions smaller and paler, one gone
        *("patient_01", "2024-06-14_PETCT", "DEMO^ANNA", "F", 66.0, 1.66, 243.9e6),
        injected=datetime(2024, 6, 14, 8, 40),
        scanned=datetime(2024, 6, 14, 9, 41, 5),
        lesions=(sphere(-69.6, 19.2, 45.8, 15.0, 4.0), sphere(66.9, 11.2, -43.4, 17.0, 5.0)),
        decay_correction="ADMIN",
        mask_drawn_on="CT",
    ),
    Study(  # two lesions 8 mm apart, one just below the uppermost slice
        *("patient_02", "2024-03-04_PETCT", "DEMO^BERT", "M", 91.0, 1.84, 318.0e6),
        injected=datetime(2024, 3, 4, 13, 5),
        scanned=datetime(2024, 3, 4, 14, 8, 50),
        lesions=(
            sphere(-58.4, 35.2, -10.3, 16.0, 10.0),
            sphere(-19.4, 35.2, -10.3, 15.0, 15.0),
            sphere(33.1, 14.3, 83.9, 15.5, 6.0),
        ),
        mask="SEG",
    ),
    Study(
        *("patient_03", "2024-03-11_PETCT", "DEMO^CLARA", "F", 74.2, 1.71, 266.0e6),
        injected=datetime(2024, 3, 11, 10, 30),
        scanned=datetime(2024, 3, 11, 11, 29, 12),
        lesions=(
            Lesion((70.4, -10.7, -49.6), (24.0, 18.0, 20.0), 8.0),
            sphere(-80.2, 0.6, 58.3, 17.0, 11.0),
            sphere(1.7, 60.2, -61.1, 16.0, 5.0),
        ),
        images="NIfTI",
        mask="NIfTI",
    ),
    Study(  # two labels, say two readers' classes
        *("patient_04", "2024-04-22_PETCT", "DEMO^DAVID", "M", 83.0, 1.78, 291.5e6),
        injected=datetime(2024, 4, 22, 7, 55),
        scanned=datetime(2024, 4, 22, 8, 57, 40),
        lesions=(
            sphere(80.6, 20.2, 40.4, 20.0, 13.0, label=1),
            sphere(-110.3, 20.8, -30.2, 16.0, 6.0, label=2),
            sphere(6.6, 33.9, 70.7, 17.0, 4.5, label=2),
        ),
        units="GML",
        mask="NIfTI",
    ),
    Study(  # incomplete: nobody has drawn a mask yet
        *("patient_05", "2024-05-02_PETCT", "DEMO^EMIL", "M", 79.5, 1.80, 280.0e6),
        injected=datetime(2024, 5, 2, 11, 20),
        scanned=datetime(2024, 5, 2, 12, 21, 33),
        lesions=(sphere(60.3, 30.2, -40.7, 18.0, 9.0),),
        mask=None,
    ),
)


def ct_grid(matrix: int, slices: int) -> Grid:
    return Grid(matrix, slices, CT_FIELD_MM / matrix, CT_CENTER_MM)


def pet_grid(matrix: int, slices: int) -> Grid:
    return Grid(matrix, slices, PET_FIELD_MM / matrix, PET_CENTER_MM)


def sample(
    grid: Grid, regions: Sequence[Tissue | Lesion], quantity: str, outside: float = 0.0
) -> NDArray[np.float32]:
    """Value of ``quantity`` (hu, suv or label) at every voxel centre, (matrix, matrix, slices)."""
    volume = np.full((grid.matrix, grid.matrix, grid.slices), outside, np.float32, order="F")
    x_mm, y_mm, z_mm = grid.voxel_centers_mm
    for region in regions:
        (x0, y0, z0), (a, b, c) = region.center_mm, region.semi_axes_mm
        in_plane = ((x_mm - x0) / a)[:, None] ** 2 + ((y_mm - y0) / b) ** 2
        for k in np.flatnonzero(abs(z_mm - z0) <= c):
            volume[in_plane <= 1 - ((z_mm[k] - z0) / c) ** 2, k] = getattr(region, quantity)
    return volume


def decay_reference(study: Study) -> datetime:
    """The moment whose activity the PET values tell."""
    return study.injected if study.decay_correction == "ADMIN" else study.scanned


def bq_per_ml_per_suv(study: Study) -> float:
    """Activity concentration of SUV 1: dose left at the reference time over body weight."""
    elapsed_s = (decay_reference(study) - study.injected).total_seconds()
    return study.dose_bq * math.exp(-DECAY_PER_S * elapsed_s) / (study.weight_kg * 1000)


def make_uid(study: Study, *names: object) -> str:
    return str(uid.generate_uid(entropy_srcs=[study.patient, study.study, *map(str, names)]))


def decimal(number: float) -> DSfloat:
    """A decimal string of at most 16 characters, as DICOM allows."""
    return DSfloat(float(number), auto_format=True)


def item(**attributes: object) -> Dataset:
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def stamp(dataset: Dataset, kind: str, moment: datetime) -> None:
    """Set <kind>Date and <kind>Time."""
    setattr(dataset, f"{kind}Date", f"{moment:%Y%m%d}")
    setattr(dataset, f"{kind}Time", f"{moment:%H%M%S}")


def dicom_file(
    study: Study, sop_class: str, modality: str, series_number: int, instance_number: int = 1
) -> Dataset:
    """What every DICOM file of a study has: patient, study, series, equipment, all invented."""
    dataset = item(
        SpecificCharacterSet="ISO_IR 192",
        SOPClassUID=sop_class,
        SOPInstanceUID=make_uid(study, modality, instance_number),
        AccessionNumber=f"A{study.scanned:%y%m%d%H%M}",
        Modality=modality,
        Manufacturer="Demo Scanners",
        ManufacturerModelName="Phantom 1",
        InstitutionName="Demo General Hospital",
        ReferringPhysicianName="DEMO^DOCTOR",
        StudyDescription="FDG PET/CT trunk",
        SeriesDescription=f"{modality} demo",
        PatientName=study.patient_name,
        PatientID=study.patient.replace("patient_", "DEMO-00"),
        PatientBirthDate="19600229",
        PatientSex=study.sex,
        PatientSize=study.height_m,
        PatientWeight=study.weight_kg,
        StudyInstanceUID=make_uid(study),
        SeriesInstanceUID=make_uid(study, modality),
        StudyID="1",
        SeriesNumber=series_number,
        InstanceNumber=instance_number,
        FrameOfReferenceUID=make_uid(study, "frame of reference"),
        PositionReferenceIndicator="",
    )
    for kind in ("Study", "Series", "Content"):
        stamp(dataset, kind, study.scanned)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return dataset


def put_image(dataset: Dataset, grid: Grid, k: int, stored: NDArray[np.float32]) -> Dataset:
    """Add slice ``k`` (upwards): its place and the (x, y) pixels, rounded to 16 bits."""
    first_voxel_mm = np.round(grid.affine @ (0, 0, k, 1), 6)
    dataset.ImagePositionPatient = [decimal(v) for v in first_voxel_mm[:3] * (-1, -1, 1)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PatientPosition = "HFS"
    dataset.SliceThickness = SLICE_SPACING_MM
    dataset.PixelSpacing = [decimal(grid.pixel_mm)] * 2
    dataset.Rows = dataset.Columns = grid.matrix
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.clip(np.rint(stored), 0, 32767).astype("<u2").T.tobytes()
    return dataset


def ct_slice(study: Study, grid: Grid, k: int, hu: NDArray[np.float32]) -> Dataset:
    dataset = dicom_file(study, uid.CTImageStorage, "CT", 2, grid.slices - k)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.AcquisitionNumber = 1
    stamp(dataset, "Acquisition", study.scanned)
    dataset.KVP = 120
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    return put_image(dataset, grid, k, hu + 1024)


def pet_slice(study: Study, grid: Grid, k: int, values: NDArray[np.float32]) -> Dataset:
    """One PET slice; ``values`` in the study's units, corrected for decay to its reference."""
    instance = grid.slices - k
    dataset = dicom_file(study, uid.PositronEmissionTomographyImageStorage, "PT", 3, instance)
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.SeriesType = ["WHOLE BODY", "IMAGE"]
    dataset.NumberOfSlices, dataset.ImageIndex = grid.slices, instance
    dataset.CountsSource, dataset.CollimatorType = "EMISSION", "NONE"
    dataset.CorrectedImage = ["NORM", "DTIM", "ATTN", "SCAT", "RAN", "DECY"]
    dataset.PatientOrientationCodeSequence = dataset.PatientGantryRelationshipCodeSequence = []

    # A frame's values hold for the moment of its average count rate, a little before its middle.
    acquired = study.scanned + timedelta(seconds=k // BED_SLICES * BED_STEP_S)
    decays = DECAY_PER_S * FRAME_DURATION_S
    mean_rate_s = math.log(decays / (1 - math.exp(-decays))) / DECAY_PER_S
    reference_s = (acquired - decay_reference(study)).total_seconds() + mean_rate_s
    stamp(dataset, "Acquisition", acquired)
    dataset.ActualFrameDuration = round(FRAME_DURATION_S * 1000)
    dataset.FrameReferenceTime = decimal(reference_s * 1000)
    dataset.DecayCorrection = study.decay_correction
    dataset.DecayFactor = decimal(math.exp(DECAY_PER_S * reference_s))
    fluorine = item(CodeValue="77004003", CodingSchemeDesignator="SCT", CodeMeaning="^18^Fluorine")
    tracer = item(
        Radiopharmaceutical="FDG",
        RadiopharmaceuticalStartTime=f"{study.injected:%H%M%S}",
        RadiopharmaceuticalStartDateTime=f"{study.injected:%Y%m%d%H%M%S}",
        RadionuclideTotalDose=study.dose_bq,
        RadionuclideHalfLife=F18_HALF_LIFE_S,
        RadionuclideCodeSequence=[fluorine],
    )
    dataset.RadiopharmaceuticalInformationSequence = [tracer]

    dataset.Units = study.units
    if study.units == "GML":
        dataset.SUVType = "BW"
    # Every slice fills the 16 bits in its own way, so no two slices share a slope.
    slope = decimal(max(values.max(), 1e-6) / (32767 - k))
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, 0
    return put_image(dataset, grid, k, values / slope)


def outline(lesion: Lesion, z_mm: float) -> NDArray[np.float64]:
    """The ellipse in which a lesion meets a slice, (points, 3) [mm, RAS]; empty if it does not."""
    (x0, y0, z0), (a, b, c) = lesion.center_mm, lesion.semi_axes_mm
    if abs(z_mm - z0) >= c:
        return np.empty((0, 3))
    scale = math.sqrt(1 - ((z_mm - z0) / c) ** 2)
    angles = np.linspace(0, 2 * math.pi, CONTOUR_POINTS, endpoint=False)
    ellipse = x0 + a * scale * np.cos(angles), y0 + b * scale * np.sin(angles)
    return np.column_stack([*ellipse, np.full(CONTOUR_POINTS, z_mm)])


def rtstruct(study: Study, images: Sequence[Dataset]) -> Dataset:
    """Lesions as regions of an RTSTRUCT, drawn on each slice of ``images`` they meet."""
    dataset = dicom_file(study, uid.RTStructureSetStorage, "RTSTRUCT", 4)
    dataset.StructureSetLabel = "Lesions"
    dataset.ApprovalStatus = "UNAPPROVED"
    stamp(dataset, "StructureSet", study.scanned)
    frame, image_series = dataset.FrameOfReferenceUID, images[0].SeriesInstanceUID
    references = [
        item(ReferencedSOPClassUID=i.SOPClassUID, ReferencedSOPInstanceUID=i.SOPInstanceUID)
        for i in images
    ]
    drawn_on = item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # Detached Study Management
        ReferencedSOPInstanceUID=dataset.StudyInstanceUID,
        RTReferencedSeriesSequence=[
            item(SeriesInstanceUID=image_series, ContourImageSequence=references)
        ],
    )
    dataset.ReferencedFrameOfReferenceSequence = [
        item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[drawn_on])
    ]
    regions, contours, observations = [], [], []
    for number, lesion in enumerate(study.lesions, start=1):
        region = item(ROINumber=number, ROIName=f"Lesion {number}", ROIGenerationAlgorithm="MANUAL")
        region.ReferencedFrameOfReferenceUID = frame
        polygons = [
            item(
                ContourImageSequence=[reference],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=CONTOUR_POINTS,
                ContourData=[f"{value:.4f}" for value in (points_mm * (-1, -1, 1)).ravel()],
            )
            for image, reference in zip(images, references, strict=True)
            if len(points_mm := outline(lesion, float(image.ImagePositionPatient[2])))
        ]
        observation = item(ObservationNumber=number, RTROIInterpretedType="GTV", ROIInterpreter="")
        observation.ReferencedROINumber = number
        regions.append(region)
        contours.append(item(ReferencedROINumber=number, ContourSequence=polygons))
        observations.append(observation)
    dataset.StructureSetROISequence = regions
    dataset.ROIContourSequence = contours
    dataset.RTROIObservationsSequence = observations
    return dataset


def dicom_seg(study: Study, images: Sequence[Dataset], labels: NDArray[np.float32]) -> Dataset:
    """All lesions as one binary segment on the grid of ``images`` (top slice first)."""
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Lesions",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.Neoplasm,
        algorithm_type="MANUAL",
    )
    dataset = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=labels.T[::-1] > 0,
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=make_uid(study, "SEG"),
        series_number=4,
        sop_instance_uid=make_uid(study, "SEG", 1),
        instance_number=1,
        manufacturer="Demo Scanners",
        manufacturer_model_name="Phantom 1",
        software_versions="1",
        device_serial_number="1",
    )
    # highdicom notes the time and makes up UIDs: the demo has to be the same on every day.
    stamp(dataset, "InstanceCreation", study.scanned)
    stamp(dataset, "Content", study.scanned)
    dataset.pop("ContributingEquipmentSequence", None)
    for element in dataset.iterall():
        if element.keyword == "DimensionOrganizationUID":
            element.value = make_uid(study, "SEG dimensions")
    return dataset


def write_dicom(folder: Path, datasets: Sequence[Dataset]) -> None:
    folder.mkdir(parents=True)
    for dataset in datasets:
        name = f"IM{dataset.InstanceNumber:04d}.dcm"
        dataset.save_as(folder / name, enforce_file_format=True)


def write_nifti(path: Path, volume: NDArray[np.generic], grid: Grid) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, grid.affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def write_study(
    out: Path, study: Study, ct: Grid, pet: Grid, random: np.random.Generator | None = None
) -> None:
    """Write one study below ``out``; ``random`` adds noise to CT and PET, never to the mask."""
    hu = sample(ct, [*ANATOMY, *study.lesions], "hu", outside=-1000.0)
    values = sample(pet, [*ANATOMY, *study.lesions], "suv")
    if random is not None:
        hu += NOISE_HU * random.standard_normal(hu.shape, np.float32)
        values *= 1 + NOISE_SUV_FRACTION * random.standard_normal(values.shape, np.float32)
    if study.units == "BQML":
        values *= bq_per_ml_per_suv(study)
    labels = sample(pet, study.lesions, "label")
    downwards = range(ct.slices - 1, -1, -1)
    pet_slices = [pet_slice(study, pet, k, values[..., k]) for k in downwards]
    folder = out / study.patient / study.study

    if study.images == "NIfTI":
        write_nifti(folder / "CT.nii.gz", np.rint(hu).astype(np.int16), ct)
        write_nifti(folder / "PET.nii.gz", values, pet)
        pet_slices[0].save_as(folder / "PET_header.dcm", enforce_file_format=True)
    else:
        ct_slices = [ct_slice(study, ct, k, hu[..., k]) for k in downwards]
        write_dicom(folder / "CT", ct_slices)
        write_dicom(folder / "PET", pet_slices)
    if study.mask == "RTSTRUCT":
        drawn_on = ct_slices if study.mask_drawn_on == "CT" else pet_slices
        write_dicom(folder / "MASK", [rtstruct(study, drawn_on)])
    elif study.mask == "SEG":
        write_dicom(folder / "MASK", [dicom_seg(study, pet_slices, labels)])
    elif study.mask == "NIfTI":
        name = "MASK.nii.gz" if study.images == "NIfTI" else "MASK/lesions.nii.gz"
        write_nifti(folder / name, labels.astype(np.uint8), pet)


def write_demo(
    out: Path, *, matrix_ct: int = 128, matrix_pet: int = 64, slices: int = 60, noise: bool = False
) -> None:
    """Write every study of ``DEMO_STUDIES`` into the project folder ``out``."""
    random = np.random.default_rng(NOISE_SEED) if noise else None
    for study in DEMO_STUDIES:
        write_study(out, study, ct_grid(matrix_ct, slices), pet_grid(matrix_pet, slices), random)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new or empty project folder")
    parser.add_argument("--matrix-ct", type=int, default=128, metavar="N", help="128; real: 512")
    parser.add_argument("--matrix-pet", type=int, default=64, metavar="N", help="64; real: 400")
    parser.add_argument("--slices", type=int, default=60, metavar="N", help="60; real: 326")
    parser.add_argument("--noise", action="store_true", help="CT 15 HU, PET 10 %% (fixed seed)")
    options = parser.parse_args(argv)
    if min(options.matrix_ct, options.matrix_pet) < 64 or options.slices < FEWEST_SLICES:
        parser.error(f"matrices need at least 64 pixels and scans {FEWEST_SLICES} slices")
    if options.out.is_file() or (options.out.is_dir() and any(options.out.iterdir())):
        parser.error(f"{options.out} exists and is not an empty folder: name another")
    try:
        write_demo(**vars(options))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    complete = [study for study in DEMO_STUDIES if study.mask]
    print(f"{len(DEMO_STUDIES)} studies, {len(complete)} with a mask -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
