"""The demo project holds what it claims: geometry, SUV and lesions, by hand and by dcm2niix."""

import ast
import math
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from scipy import integrate, ndimage

from examples import phantom

FOLLOW_UP, SEG, NIFTI, GML, INCOMPLETE = phantom.DEMO_STUDIES[1:]
RTSTRUCT = phantom.DEMO_STUDIES[0]
COMPLETE = [study for study in phantom.DEMO_STUDIES if study.mask]
DICOM = [study for study in phantom.DEMO_STUDIES if study.images == "DICOM"]
BQML_DICOM = [study for study in DICOM if study.units == "BQML"]


def name(study):
    return f"{study.patient}-{study.study}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "raw"
    assert phantom.main([str(out)]) == 0
    return out


def folder(demo, study):
    return demo / study.patient / study.study


def read_series(path):
    """Slices sorted upwards, (x, y, z) real values and the affine to RAS [mm], from tags alone."""
    slices = [pydicom.dcmread(file) for file in path.iterdir()]
    slices.sort(key=lambda image: float(image.ImagePositionPatient[2]))
    first, last = slices[0], slices[-1]
    values = np.stack(
        [s.pixel_array.T * float(s.RescaleSlope) + float(s.RescaleIntercept) for s in slices], -1
    )
    x, y, z = map(float, first.ImagePositionPatient)
    step = (float(last.ImagePositionPatient[2]) - z) / (len(slices) - 1)
    row_mm, column_mm = map(float, first.PixelSpacing)
    affine = np.array(
        [[-column_mm, 0, 0, -x], [0, -row_mm, 0, -y], [0, 0, step, z], [0, 0, 0, 1]], float
    )
    return slices, values, affine


def lesion_voxels(shape, affine, lesion):
    """Voxels whose centre lies in the lesion, from its equation."""
    indices = np.indices(shape).reshape(3, -1)
    points_mm = affine[:3, :3] @ indices + affine[:3, 3:]
    offsets = (points_mm.T - lesion.center_mm) / lesion.semi_axes_mm
    return ((offsets**2).sum(axis=1) <= 1).reshape(shape)


def all_lesions(shape, affine, study):
    return np.any([lesion_voxels(shape, affine, lesion) for lesion in study.lesions], axis=0)


def at_point(values, affine, point_mm):
    i, j, k = np.rint(np.linalg.solve(affine, [*point_mm, 1])[:3]).astype(int)
    return values[i, j, k]


def suv_by_hand(header, values):
    """SUVbw from a header's own numbers: what is left of the dose, spread over the body."""
    tracer = header.RadiopharmaceuticalInformationSequence[0]
    injected = datetime.strptime(tracer.RadiopharmaceuticalStartDateTime, "%Y%m%d%H%M%S")
    scanned = datetime.strptime(header.SeriesDate + header.SeriesTime, "%Y%m%d%H%M%S")
    waited_s = {"START": (scanned - injected).total_seconds(), "ADMIN": 0}[header.DecayCorrection]
    half_lives = waited_s / float(tracer.RadionuclideHalfLife)
    dose_bq = float(tracer.RadionuclideTotalDose) * 0.5**half_lives
    return values * float(header.PatientWeight) * 1000 / dose_bq


def seg_mask(path, shape, affine):
    """A binary SEG put on the PET grid frame by frame, by its own plane positions."""
    seg = pydicom.dcmread(path)
    mask = np.zeros(shape, bool)
    for frame, pixels in zip(
        seg.PerFrameFunctionalGroupsSequence, np.atleast_3d(seg.pixel_array), strict=True
    ):
        x, y, z = map(float, frame.PlanePositionSequence[0].ImagePositionPatient)
        voxel = np.linalg.solve(affine, [-x, -y, z, 1])[:3]
        k = round(voxel[2])
        assert voxel == pytest.approx(np.array([0, 0, k]), abs=1e-6)
        mask[..., k] = pixels.T
    return mask


def contours_mm(rtstruct):
    """Per region a list of (points, 3) polygons [mm, RAS]."""
    return [
        [
            np.reshape(np.array(c.ContourData, float), (-1, 3)) * (-1, -1, 1)
            for c in roi.ContourSequence
        ]
        for roi in rtstruct.ROIContourSequence
    ]


def area_mm2(polygon):
    x, y, _ = polygon.T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_layout_of_the_demo(demo):
    assert sorted(path.name for path in folder(demo, NIFTI).iterdir()) == [
        *("CT.nii.gz", "MASK.nii.gz", "PET.nii.gz", "PET_header.dcm")
    ]
    for study in DICOM:
        roles = {"CT", "PET", "MASK"} if study.mask else {"CT", "PET"}
        assert {path.name for path in folder(demo, study).iterdir()} == roles
        for role in ("CT", "PET"):
            assert len(list((folder(demo, study) / role).glob("*.dcm"))) == 60
    assert len(COMPLETE) == 5
    assert len({study.patient for study in COMPLETE}) == 4
    assert sum(path.stat().st_size for path in demo.rglob("*") if path.is_file()) < 60e6


def test_incomplete_study_has_no_mask(demo):
    files = [path for path in folder(demo, INCOMPLETE).rglob("*") if path.is_file()]
    assert {pydicom.dcmread(path, stop_before_pixels=True).Modality for path in files} == {
        "CT",
        "PT",
    }


@pytest.mark.parametrize("study", BQML_DICOM, ids=name)
def test_suv_by_hand_is_the_truth_at_every_lesion_and_organ(demo, study):
    slices, values, affine = read_series(folder(demo, study) / "PET")
    assert {image.Units for image in slices} == {"BQML"}
    assert {image.DecayCorrection for image in slices} == {study.decay_correction}
    suv = suv_by_hand(slices[0], values)
    for lesion in study.lesions:
        inside = suv[lesion_voxels(suv.shape, affine, lesion)]
        assert inside == pytest.approx(lesion.suv, abs=3e-4)
    assert at_point(suv, affine, (100, 5, -45)) == pytest.approx(2, abs=3e-4)  # liver
    assert at_point(suv, affine, (-75, -35, -55)) == pytest.approx(14, abs=3e-4)  # kidney
    assert at_point(suv, affine, (0, 0, 0)) == pytest.approx(1, abs=3e-4)
    assert at_point(suv, affine, (0, 150, 0)) == 0


def test_gml_values_are_suv_as_stored(demo):
    slices, suv, affine = read_series(folder(demo, GML) / "PET")
    assert {(image.Units, image.SUVType) for image in slices} == {("GML", "BW")}
    for lesion in GML.lesions:
        inside = suv[lesion_voxels(suv.shape, affine, lesion)]
        assert inside == pytest.approx(lesion.suv, abs=3e-4)


def test_nifti_study_agrees_with_its_header(demo):
    images = {role: nibabel.load(folder(demo, NIFTI) / f"{role}.nii.gz") for role in ("CT", "PET")}
    header = pydicom.dcmread(folder(demo, NIFTI) / "PET_header.dcm")
    pet = images["PET"]
    suv = suv_by_hand(header, pet.get_fdata())
    for lesion in NIFTI.lesions:
        inside = suv[lesion_voxels(suv.shape, pet.affine, lesion)]
        assert inside == pytest.approx(lesion.suv, rel=1e-6)

    k = round((float(header.ImagePositionPatient[2]) - pet.affine[2, 3]) / pet.affine[2, 2])
    stored = header.pixel_array.T * float(header.RescaleSlope)
    assert stored == pytest.approx(pet.get_fdata()[..., k], abs=float(header.RescaleSlope) / 1.99)
    assert images["CT"].get_data_dtype() == np.int16
    assert pet.header.get_xyzt_units()[0] == "mm"


def test_nifti_and_dicom_studies_have_the_same_geometry(demo):
    for role in ("CT", "PET"):
        image = nibabel.load(folder(demo, NIFTI) / f"{role}.nii.gz")
        _, values, affine = read_series(folder(demo, RTSTRUCT) / role)
        assert image.shape == values.shape
        assert image.affine == pytest.approx(affine, abs=1e-5)
    mask = nibabel.load(folder(demo, NIFTI) / "MASK.nii.gz")
    assert np.array_equal(mask.affine, image.affine)


@pytest.mark.parametrize("study", DICOM, ids=name)
def test_ct_holds_tissue_in_hounsfield_units(demo, study):
    _, hu, affine = read_series(folder(demo, study) / "CT")
    assert at_point(hu, affine, (0, 180, 0)) == -1000
    assert at_point(hu, affine, (75, 60, 20)) == -800
    assert at_point(hu, affine, (0, 0, 0)) == 40
    assert at_point(hu, affine, (0, -80, 0)) == 400
    assert at_point(hu, affine, (0, -128, 0)) == -300
    for lesion in study.lesions:
        assert set(hu[lesion_voxels(hu.shape, affine, lesion)]) == {60}


def test_seg_voxels_are_the_spheres_on_the_pet_grid(demo):
    slices, values, affine = read_series(folder(demo, SEG) / "PET")
    (path,) = (folder(demo, SEG) / "MASK").iterdir()
    mask = seg_mask(path, values.shape, affine)
    assert np.array_equal(mask, all_lesions(values.shape, affine, SEG))
    seg = pydicom.dcmread(path)
    referenced = seg.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == slices[0].SeriesInstanceUID
    assert seg.PatientID == slices[0].PatientID


def test_nifti_labels_are_the_lesions(demo):
    mask = nibabel.load(folder(demo, GML) / "MASK" / "lesions.nii.gz")
    expected = np.zeros(mask.shape)
    for lesion in GML.lesions:
        expected[lesion_voxels(mask.shape, mask.affine, lesion)] = lesion.label
    assert np.array_equal(mask.get_fdata(), expected)
    assert set(np.unique(expected)) == {0, 1, 2}


@pytest.mark.parametrize("study", [RTSTRUCT, FOLLOW_UP], ids=name)
def test_rtstruct_outlines_are_the_lesions_on_the_series_it_names(demo, study):
    images, _, affine = read_series(folder(demo, study) / study.mask_drawn_on)
    (path,) = (folder(demo, study) / "MASK").iterdir()
    dataset = pydicom.dcmread(path)
    (frame,) = dataset.ReferencedFrameOfReferenceSequence
    (series,) = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert series.SeriesInstanceUID == images[0].SeriesInstanceUID
    position = {image.SOPInstanceUID: float(image.ImagePositionPatient[2]) for image in images}

    for lesion, polygons in zip(study.lesions, contours_mm(dataset), strict=True):
        offsets = (np.concatenate(polygons) - lesion.center_mm) / lesion.semi_axes_mm
        assert (offsets**2).sum(axis=1) == pytest.approx(1, abs=2e-5)
        volume_ml = sum(map(area_mm2, polygons)) * affine[2, 2] / 1000
        assert volume_ml == pytest.approx(lesion.volume_ml, rel=0.02)
        met = [
            z for z in position.values() if abs(z - lesion.center_mm[2]) < lesion.semi_axes_mm[2]
        ]
        assert sorted(polygon[0, 2] for polygon in polygons) == sorted(met)
    for roi in dataset.ROIContourSequence:
        for contour in roi.ContourSequence:
            (image,) = contour.ContourImageSequence
            assert float(contour.ContourData[2]) == position[image.ReferencedSOPInstanceUID]


@pytest.mark.parametrize("study", [RTSTRUCT, FOLLOW_UP], ids=name)
def test_outlined_voxels_are_the_lesions(demo, study):
    """Even-odd counting of edges to the right of each voxel centre, written out here."""
    _, values, affine = read_series(folder(demo, study) / study.mask_drawn_on)
    (path,) = (folder(demo, study) / "MASK").iterdir()
    mask = np.zeros(values.shape, bool)
    x = (affine[0, 3] + affine[0, 0] * np.arange(values.shape[0]))[:, None, None]
    y = (affine[1, 3] + affine[1, 1] * np.arange(values.shape[1]))[None, :, None]
    for polygons in contours_mm(pydicom.dcmread(path)):
        for polygon in polygons:
            (x0, y0, z0), (x1, y1, _) = polygon.T, np.roll(polygon, -1, axis=0).T
            with np.errstate(divide="ignore", invalid="ignore"):
                right = x < x0 + (y - y0) * (x1 - x0) / (y1 - y0)
            crossings = (((y0 > y) != (y1 > y)) & right).sum(axis=-1)
            mask[..., round((z0[0] - affine[2, 3]) / affine[2, 2])] |= crossings % 2 == 1
    assert np.array_equal(mask, all_lesions(values.shape, affine, study))


@pytest.mark.parametrize("study", COMPLETE, ids=name)
def test_sampled_volume_and_centre_are_near_the_closed_form(study):
    grid = phantom.pet_grid(64, 60)
    labels = phantom.sample(grid, study.lesions, "label")
    voxel_ml = abs(np.linalg.det(grid.affine)) / 1000
    for lesion in study.lesions:
        inside = lesion_voxels(labels.shape, grid.affine, lesion)
        assert inside.sum() * voxel_ml == pytest.approx(lesion.volume_ml, rel=0.04)
        center_mm = grid.affine[:3, :3] @ ndimage.center_of_mass(inside) + grid.affine[:3, 3]
        assert center_mm == pytest.approx(np.array(lesion.center_mm), abs=0.7)
        assert set(labels[inside]) == {lesion.label}
    assert lesion.volume_ml == pytest.approx(4.18879e-3 * math.prod(lesion.semi_axes_mm), rel=1e-6)


@pytest.mark.parametrize("matrix", [64, 128, 400])
def test_lesions_never_touch(matrix):
    grid = phantom.pet_grid(matrix, 60)
    for study in phantom.DEMO_STUDIES:
        labels = phantom.sample(grid, study.lesions, "label")
        assert ndimage.label(labels, np.ones((3, 3, 3)))[1] == len(study.lesions)


def test_one_lesion_ends_just_below_the_uppermost_slice():
    grid = phantom.pet_grid(64, 60)
    top = max(lesion.center_mm[2] + lesion.semi_axes_mm[2] for lesion in SEG.lesions)
    assert 0 < phantom.TOP_MM - top < phantom.SLICE_SPACING_MM
    assert phantom.sample(grid, SEG.lesions, "label").any(axis=(0, 1))[-2:].tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(("matrix_ct", "matrix_pet", "slices"), [(128, 64, 60), (512, 400, 326)])
def test_field_of_view_stays_for_any_matrix(matrix_ct, matrix_pet, slices):
    for grid, field_mm in (
        (phantom.ct_grid(matrix_ct, slices), 500),
        (phantom.pet_grid(matrix_pet, slices), 448),
    ):
        assert -grid.affine[0, 0] * grid.matrix == pytest.approx(field_mm)
        top = grid.affine @ ((grid.matrix - 1) / 2, (grid.matrix - 1) / 2, slices - 1, 1)
        assert top[:3] == pytest.approx([*grid.center_mm, phantom.TOP_MM])


@pytest.mark.parametrize("study", DICOM, ids=name)
def test_pet_slices_differ_in_slope_and_beds_in_time(demo, study):
    slices, _, _ = read_series(folder(demo, study) / "PET")
    assert len({float(image.RescaleSlope) for image in slices}) == len(slices)
    assert len({image.AcquisitionTime for image in slices}) == 3
    assert min(image.AcquisitionTime for image in slices) == slices[0].SeriesTime


def test_frame_reference_time_leads_back_to_the_decay_reference(demo):
    """The mean activity of a frame, integrated numerically, is that at FrameReferenceTime."""
    for study, zero in ((RTSTRUCT, RTSTRUCT.scanned), (FOLLOW_UP, FOLLOW_UP.injected)):
        image = pydicom.dcmread(folder(demo, study) / "PET" / "IM0001.dcm")
        acquired = datetime.strptime(image.AcquisitionDate + image.AcquisitionTime, "%Y%m%d%H%M%S")
        half_life_s = float(image.RadiopharmaceuticalInformationSequence[0].RadionuclideHalfLife)
        duration_s = image.ActualFrameDuration / 1000
        begin_s = (acquired - zero).total_seconds()
        counts, _ = integrate.quad(
            lambda t, h=half_life_s: 0.5 ** (t / h), begin_s, begin_s + duration_s
        )
        reference_s = -math.log2(counts / duration_s) * half_life_s
        assert float(image.FrameReferenceTime) / 1000 == pytest.approx(reference_s, abs=1e-4)
        assert float(image.DecayFactor) == pytest.approx(duration_s / counts, rel=1e-9)


def test_uids_are_valid_unique_and_share_one_frame_of_reference(demo):
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in demo.rglob("*.dcm")}
    instances = [header.SOPInstanceUID for header in headers.values()]
    assert len(set(instances)) == len(instances)
    assert all(uid.is_valid for uid in instances)
    assert len({h.StudyInstanceUID for h in headers.values()}) == len(phantom.DEMO_STUDIES)
    for study in phantom.DEMO_STUDIES:
        of_study = [h for p, h in headers.items() if p.is_relative_to(folder(demo, study))]
        assert len({h.StudyInstanceUID for h in of_study}) == 1
        assert len({h.FrameOfReferenceUID for h in of_study}) == 1
        assert {str(h.PatientName) for h in of_study} == {study.patient_name}
        modalities = {h.Modality for h in of_study}
        assert len({h.SeriesInstanceUID for h in of_study}) == len(modalities)


def test_two_runs_write_the_same_bytes(demo, tmp_path):
    phantom.write_demo(tmp_path)
    first, second = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (demo, tmp_path)
    )
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []


def test_noise_is_seeded_and_spares_the_mask(demo, tmp_path):
    grids = phantom.ct_grid(128, 60), phantom.pet_grid(64, 60)
    for run in ("a", "b"):
        random = np.random.default_rng(phantom.NOISE_SEED)
        phantom.write_study(tmp_path / run, NIFTI, *grids, random)
    for role in ("CT", "PET", "MASK"):
        a, b, clean = (
            (folder(out, NIFTI) / f"{role}.nii.gz").read_bytes()
            for out in (tmp_path / "a", tmp_path / "b", demo)
        )
        assert a == b
        assert (a == clean) == (role == "MASK")
    noisy, clean = (
        nibabel.load(folder(out, NIFTI) / "CT.nii.gz").get_fdata() for out in (tmp_path / "a", demo)
    )
    assert (noisy - clean).std() == pytest.approx(15, rel=0.01)


def test_arguments_are_checked_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "raw"
    for arguments in (["--slices", "59"], ["--matrix-ct", "0"], ["--matrix-pet", "-4"]):
        with pytest.raises(SystemExit, match="2"):
            phantom.main([str(out), *arguments])
    assert not out.exists()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        phantom.main([str(tmp_path)])
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_phantom_is_an_independent_oracle():
    tree = ast.parse(Path(phantom.__file__).read_text())
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    packages = {module.split(".")[0] for module in imported} - set(sys.stdlib_module_names)
    assert packages == {"numpy", "pydicom", "highdicom", "nibabel"}


@pytest.mark.parametrize("study", DICOM, ids=name)
def test_dcm2niix_reads_the_same_volumes(demo, study, tmp_path):
    program = shutil.which("dcm2niix", path=str(Path(sys.executable).parent)) or shutil.which(
        "dcm2niix"
    )
    if program is None:
        pytest.skip("dcm2niix is not installed")
    for role in ("CT", "PET"):
        source = folder(demo, study) / role
        run = subprocess.run(
            [program, "-f", role, "-o", tmp_path, source],
            capture_output=True,
            text=True,
            check=True,
        )
        complaints = [
            line
            for line in (run.stdout + run.stderr).splitlines()
            if any(word in line.lower() for word in ("warning", "error", "unable", "missing"))
            and "determine manufacturer" not in line  # an invented scanner has no vendor
        ]
        assert complaints == []
        (path,) = tmp_path.glob(f"{role}*.nii")
        converted = nibabel.as_closest_canonical(nibabel.load(path))
        _, values, affine = read_series(source)
        ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(values, affine))
        assert converted.shape == ours.shape
        assert converted.affine == pytest.approx(ours.affine, abs=1e-3)  # its geometry is float32
        assert np.allclose(converted.get_fdata(), ours.get_fdata(), rtol=1e-6, atol=0)
