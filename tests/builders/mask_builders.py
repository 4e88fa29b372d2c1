"""Builders of DICOM RTSTRUCT and SEG objects, as a file read back would be."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pack_bits
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
FRAME_UID = "1.2.3.4.1"
SERIES_UID = "1.2.3.4.2"
IMAGE_UID = "1.2.3.4.3"


def oblique_affine(spacing_mm, origin_mm=(12.5, -30.25, 7.75), seed=3):
    """Return a right-handed (LPS) voxel -> RAS+ mm affine with axes off every anatomical one."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.sign(np.linalg.det(rotation)) * np.asarray(spacing_mm)
    affine[:3, 3] = origin_mm
    return affine


def axial_affine(spacing_mm, origin_mm=(90.0, 80.0, -50.0)):
    """Return the voxel -> RAS+ mm affine of a supine axial series."""
    affine = LPS_TO_RAS @ np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = origin_mm
    return affine


def written(dataset: Dataset) -> Dataset:
    """Return the dataset as it comes back from a file: every element still in raw form."""
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    file.seek(0)
    return pydicom.dcmread(file)


# --- RTSTRUCT


def build_rtstruct(
    regions: Mapping[str, Sequence[np.ndarray]],
    *,
    geometric_type: str = "CLOSED_PLANAR",
    interpreted_type: str = "GTV",
    series_uid: str | None = SERIES_UID,
    decimals: int = 3,
) -> Dataset:
    """Build a structure set; contours are (n, 3) RAS+ mm, regions are numbered from 1."""
    dataset = _new(RTStructureSetStorage, "RTSTRUCT")
    image = Dataset()
    image.ReferencedSOPClassUID = CTImageStorage
    image.ReferencedSOPInstanceUID = IMAGE_UID
    series, study, frame = Dataset(), Dataset(), Dataset()
    if series_uid:
        series.SeriesInstanceUID = series_uid
    series.ContourImageSequence = [image]
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = FRAME_UID
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    dataset.RTROIObservationsSequence = []
    for number, (name, contours) in enumerate(regions.items(), start=1):
        region, drawing, observation = Dataset(), Dataset(), Dataset()
        region.ROINumber = number
        region.ROIName = name
        region.ReferencedFrameOfReferenceUID = FRAME_UID
        drawing.ReferencedROINumber = number
        drawing.ContourSequence = [
            _contour(points, geometric_type, decimals) for points in contours
        ]
        observation.ReferencedROINumber = number
        observation.RTROIInterpretedType = interpreted_type
        dataset.StructureSetROISequence.append(region)
        dataset.ROIContourSequence.append(drawing)
        dataset.RTROIObservationsSequence.append(observation)
    return written(dataset)


def _contour(points, geometric_type, decimals):
    contour = Dataset()
    contour.ContourGeometricType = geometric_type
    contour.NumberOfContourPoints = len(points)
    lps = np.asarray(points, dtype=float).reshape(-1, 3) * [-1, -1, 1]
    contour.ContourData = [f"{value:.{decimals}f}" for value in lps.ravel()]
    return contour


# --- SEG


def build_seg(
    array: np.ndarray, affine: np.ndarray, names: Sequence[str], kind: str = "BINARY", **options
) -> Dataset:
    """Build a SEG by highdicom from [x, y, z] labels or [x, y, z, segment] on its own grid."""
    import highdicom
    from highdicom.sr.coding import CodedConcept

    code = CodedConcept("4147007", "SCT", "Mass")
    algorithm = highdicom.AlgorithmIdentificationSequence(name="phantom", family=code, version="1")
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=code,
            segmented_property_type=code,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]
    lps = LPS_TO_RAS @ affine
    volume = highdicom.Volume(
        array=np.ascontiguousarray(np.swapaxes(array, 0, 2)),
        affine=lps[:, [2, 1, 0, 3]],
        coordinate_system="PATIENT",
        frame_of_reference_uid=FRAME_UID,
        channels={"SegmentNumber": range(1, len(names) + 1)} if array.ndim == 4 else None,
    )
    dataset = highdicom.seg.Segmentation(
        source_images=[_source_image()],
        pixel_array=volume,
        segmentation_type=kind,
        segment_descriptions=segments,
        series_instance_uid="1.2.3.4.5",
        series_number=2,
        sop_instance_uid="1.2.3.4.6",
        instance_number=1,
        manufacturer="phantom",
        manufacturer_model_name="phantom",
        software_versions="1",
        device_serial_number="1",
        **options,
    )
    return written(dataset)


def reorder_frames(seg: Dataset, order: Sequence[int]) -> Dataset:
    """Keep the frames ``order`` of an uncompressed SEG, in that order."""
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)[order]
    seg.PixelData = pack_bits(pixels) if seg.BitsAllocated == 1 else pixels.tobytes()
    groups = seg.PerFrameFunctionalGroupsSequence
    seg.PerFrameFunctionalGroupsSequence = [groups[i] for i in order]
    seg.NumberOfFrames = len(order)
    return written(seg)


def _source_image() -> Dataset:
    dataset = _new(CTImageStorage, "CT")
    dataset.Rows = dataset.Columns = 4
    dataset.ImagePositionPatient = [0, 0, 0]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [1, 1]
    dataset.SliceThickness = 1
    dataset.FrameOfReferenceUID = FRAME_UID
    dataset.PositionReferenceIndicator = ""
    for keyword in ("PatientBirthDate", "PatientSex", "StudyTime", "AccessionNumber", "StudyID"):
        setattr(dataset, keyword, "")
    dataset.StudyDate, dataset.ReferringPhysicianName = "", ""
    return dataset


def _new(sop_class: str, modality: str) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = IMAGE_UID
    dataset.SeriesInstanceUID = SERIES_UID
    dataset.StudyInstanceUID = "1.2.3.4.7"
    dataset.PatientID, dataset.PatientName = "phantom", "Phantom^One"
    dataset.Modality = modality
    return dataset


def spheres(shape, *centres_and_radii):
    """Return [x, y, z, segment] of balls in voxels."""
    grid = np.moveaxis(np.indices(shape), 0, -1)
    balls = [
        ((grid - centre) ** 2).sum(axis=-1) < radius**2 for centre, radius in centres_and_radii
    ]
    return np.stack(balls, axis=-1).astype(np.uint8)


def assert_mask_is(mask, labels, affine):
    """Compare where both are: the mask may leave out empty slices at the ends."""
    filled = np.flatnonzero(labels.any(axis=(0, 1)))
    offset = np.linalg.solve(affine, mask.affine[:, 3])[:3]
    np.testing.assert_allclose(offset[:2], 0, atol=1e-4)
    k = round(offset[2])
    np.testing.assert_allclose(offset[2], k, atol=1e-4)
    assert k <= filled[0]
    assert k + mask.labels.shape[2] > filled[-1]
    np.testing.assert_array_equal(mask.labels, labels[:, :, k : k + mask.labels.shape[2]])
    np.testing.assert_allclose(mask.affine[:3, :3], affine[:3, :3], atol=1e-4)
