"""The demo project holds what it claims: geometry, SUV and lesions, by hand and by dcm2niix."""

import ast
import itertools
import math
import shutil
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from scipy import integrate, ndimage, special, stats

from examples import phantom

FOLLOW_UP, SEG, NIFTI, GML, INCOMPLETE = phantom.DEMO_STUDIES[1:]
RTSTRUCT = phantom.DEMO_STUDIES[0]
COMPLETE = [study for study in phantom.DEMO_STUDIES if study.mask]
DICOM = [study for study in phantom.DEMO_STUDIES if study.images == "DICOM"]
QUICK = ["--matrix-pet", "96", "--slices", "125", "--noise", "none"]
SLICES, PET_MATRIX = 125, 96
MORE = phantom.studies(14)[6:]
BQML_DICOM = [study for study in DICOM if study.units == "BQML"]


def name(study):
    return f"{study.patient}-{study.study}"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "raw"
    assert phantom.main([str(out), *QUICK]) == 0
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


def lesion_voxels(shape, affine, lesion, within_mm=0.0):
    """Voxels whose centre lies in the lesion, so deep below its edge, from its equation."""
    assert np.array_equal(affine[:3, :3], np.diag(np.diag(affine)[:3]))
    x, y, z = (
        (affine[axis, axis] * np.arange(n) + affine[axis, 3] - lesion.center_mm[axis])
        / (lesion.semi_axes_mm[axis] - within_mm)
        for axis, n in enumerate(shape)
    )
    return x[:, None, None] ** 2 + y[:, None] ** 2 + z**2 <= 1


def core_voxels(shape, affine, lesion):
    """Voxels three standard deviations of the PET's blur away from the edge."""
    found = lesion_voxels(shape, affine, lesion, within_mm=3 * phantom.RESOLUTION_MM / 2.3548)
    assert found.sum() >= 3
    return found


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
            assert len(list((folder(demo, study) / role).glob("*.dcm"))) == SLICES
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
        assert suv[core_voxels(suv.shape, affine, lesion)] == pytest.approx(lesion.suv, rel=0.01)
    frame = study.height_m / 1.75
    for place_mm, expected in (
        ((0, 70, -60), 9),  # brain
        ((95 * frame, 30 * frame, -600 * frame), 2.3),  # liver
        ((58 * frame, -48 * frame, -632 * frame), 16),  # renal pelvis
        ((0, 18 * frame, -872 * frame), study.bladder_suv),
    ):
        assert at_point(suv, affine, place_mm) == pytest.approx(expected, rel=0.02)
    assert at_point(suv, affine, (0, 190, -500)) == 0


def test_gml_values_are_suv_as_stored(demo):
    slices, suv, affine = read_series(folder(demo, GML) / "PET")
    assert {(image.Units, image.SUVType) for image in slices} == {("GML", "BW")}
    for lesion in GML.lesions:
        assert suv[core_voxels(suv.shape, affine, lesion)] == pytest.approx(lesion.suv, rel=0.01)


def test_nifti_study_agrees_with_its_header(demo):
    images = {role: nibabel.load(folder(demo, NIFTI) / f"{role}.nii.gz") for role in ("CT", "PET")}
    header = pydicom.dcmread(folder(demo, NIFTI) / "PET_header.dcm")
    pet = images["PET"]
    suv = suv_by_hand(header, pet.get_fdata())
    for lesion in NIFTI.lesions:
        inside = suv[core_voxels(suv.shape, pet.affine, lesion)]
        assert inside == pytest.approx(lesion.suv, rel=0.01)

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
    frame = study.height_m / 1.75
    for place_mm, expected in (
        ((0, 190, -500), -1000),  # air
        ((90 * frame, 25 * frame, -490 * frame), -820),  # lung
        ((95 * frame, 30 * frame, -600 * frame), 58),  # liver
        ((0, -88, -88), 900),  # skull
        ((0, -70 * frame, -815 * frame), 350),  # sacrum
        ((0, -127 * study.girth - 12, -500), -300),  # table
    ):
        assert at_point(hu, affine, place_mm) == expected
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
        assert volume_ml == pytest.approx(lesion.volume_ml, rel=0.04)
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


@pytest.mark.parametrize("study", [*COMPLETE, *MORE], ids=name)
def test_sampled_volume_and_centre_are_near_the_closed_form(study):
    grid = phantom.pet_grid(128, 200)
    labels = phantom.sample(grid, study.lesions, "label")
    voxel_ml = abs(np.linalg.det(grid.affine)) / 1000
    for lesion in study.lesions:
        inside = lesion_voxels(labels.shape, grid.affine, lesion)
        assert inside.sum() * voxel_ml == pytest.approx(lesion.volume_ml, rel=0.08)
        center_mm = grid.affine[:3, :3] @ ndimage.center_of_mass(inside) + grid.affine[:3, 3]
        assert center_mm == pytest.approx(np.array(lesion.center_mm), abs=0.7)
        assert set(labels[inside]) == {lesion.label}
    assert lesion.volume_ml == pytest.approx(4.18879e-3 * math.prod(lesion.semi_axes_mm), rel=1e-6)


@pytest.mark.parametrize("study", [RTSTRUCT, SEG, NIFTI], ids=name)
def test_organs_have_the_volumes_of_their_closed_form(study):
    grid = phantom.ct_grid(256, 500)
    voxel_ml = abs(np.linalg.det(grid.affine)) / 1000
    organs = [tissue for tissue in phantom.anatomy(study) if tissue.suv == study.bladder_suv]
    organs += [tissue for tissue in phantom.anatomy(study) if tissue.hu == -820]  # two lungs
    organs += [tissue for tissue in phantom.anatomy(study) if tissue.cylinder and tissue.suv == 1.7]
    assert len(organs) == 4
    for organ in organs:
        sampled = phantom.sample(grid, [organ], "hu", outside=0) != 0
        volume_ml = np.prod(organ.semi_axes_mm) * np.pi / 1000 * (2 if organ.cylinder else 4 / 3)
        assert organ.volume_ml == pytest.approx(volume_ml)
        assert sampled.sum() * voxel_ml == pytest.approx(volume_ml, rel=0.05)


def test_bodies_differ_in_size_as_their_weights_do():
    """The scan sees most of a body, whose litres weigh 1 kg, less in the lungs."""
    grid = phantom.ct_grid(64, 100)
    sizes = {}
    for study in phantom.studies(12):
        hu = phantom.sample(grid, phantom.anatomy(study)[1:], "hu", outside=-1000.0)
        kg = (1 + np.clip(hu, -1000, 100) / 1000).sum() * abs(np.linalg.det(grid.affine)) / 1e6
        assert 0.55 * study.weight_kg < kg < 0.9 * study.weight_kg
        sizes[study.patient] = round(kg)
    assert len(set(sizes.values())) > 4


def test_uptake_is_that_of_the_dose():
    """SUV times volume, over the body weight, is the share of the dose that the scan sees."""
    grid = phantom.pet_grid(64, 100)
    for study in phantom.studies(12):
        suv = phantom.sample(grid, [*phantom.anatomy(study), *study.lesions], "suv")
        share = suv.sum() * abs(np.linalg.det(grid.affine)) / 1e6 / study.weight_kg
        assert 0.5 < share < 0.9


@pytest.mark.parametrize("study", [*phantom.DEMO_STUDIES, *MORE], ids=name)
def test_lesions_never_touch(study):
    """On any grid as fine as the demo's: their enclosing spheres are a voxel's diagonal apart."""
    for one, other in itertools.combinations(study.lesions, 2):
        apart_mm = math.dist(one.center_mm, other.center_mm)
        assert apart_mm - max(one.semi_axes_mm) - max(other.semi_axes_mm) > 7.1
    labels = phantom.sample(phantom.pet_grid(128, 200), study.lesions, "label")
    assert ndimage.label(labels, np.ones((3, 3, 3)))[1] == len(study.lesions)


def test_one_lesion_ends_just_above_the_lowermost_slice():
    grid = phantom.pet_grid(128, 200)
    bottom = min(lesion.center_mm[2] - lesion.semi_axes_mm[2] for lesion in SEG.lesions)
    assert 0 < bottom - grid.affine[2, 3] < grid.slice_mm
    assert phantom.sample(grid, SEG.lesions, "label").any(axis=(0, 1))[:2].tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize(("matrix_ct", "matrix_pet", "slices"), [(128, 64, 100), (512, 400, 326)])
def test_field_of_view_stays_for_any_matrix(matrix_ct, matrix_pet, slices):
    for grid, field_mm in (
        (phantom.ct_grid(matrix_ct, slices), 500),
        (phantom.pet_grid(matrix_pet, slices), 448),
    ):
        assert -grid.affine[0, 0] * grid.matrix == pytest.approx(field_mm)
        assert grid.affine[2, 2] * slices == pytest.approx(1000)
        top = grid.affine @ ((grid.matrix - 1) / 2, (grid.matrix - 1) / 2, slices - 1, 1)
        assert top[:3] == pytest.approx([*grid.center_mm, phantom.TOP_MM])


def test_blur_is_the_closed_form_of_a_sphere_seen_by_a_gaussian():
    grid = phantom.Grid(80, 80, 0.5, 0.5, (0.0, 0.0))
    ball = phantom.sphere(0.25, 0.25, phantom.TOP_MM - 20, 12.0, 10.0)
    along_x = phantom.blurred(grid, phantom.sample(grid, [ball], "suv"))[:, 39, 39]
    r = np.abs(grid.voxel_centers_mm[0] - 0.25)
    r[r < 1e-9] = 1e-9
    sigma = 6 / math.sqrt(8 * math.log(2))
    near, far = (12 - r) / sigma, (12 + r) / sigma
    expected = special.ndtr(near) - special.ndtr(-far)
    expected -= (stats.norm.pdf(near) - stats.norm.pdf(far)) * sigma / r
    assert along_x == pytest.approx(10 * expected, abs=0.06)


@pytest.mark.parametrize("spacing_mm", [(1.12, 1.12, 3.07), (3.5, 3.5, 5.0), (7.0, 7.0, 10.0)])
def test_blur_is_that_of_scipy(spacing_mm):
    volume = np.random.default_rng(0).random((24, 24, 12), np.float32)
    grid = phantom.Grid(24, 12, spacing_mm[0], spacing_mm[2], (0.0, 0.0))
    sigma = 6 / math.sqrt(8 * math.log(2)) / np.array(spacing_mm)
    expected = ndimage.gaussian_filter(
        volume, sigma, mode="nearest", radius=tuple(np.ceil(3 * sigma).astype(int))
    )
    assert phantom.blurred(grid, volume) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("study", DICOM, ids=name)
def test_pet_slices_differ_in_slope_and_beds_in_time(demo, study):
    slices, _, _ = read_series(folder(demo, study) / "PET")
    assert len({float(image.RescaleSlope) for image in slices}) == len(slices)
    assert len({image.AcquisitionTime for image in slices}) == 5
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
    assert phantom.main([str(tmp_path / "raw"), *QUICK, "--studies", "4"]) == 0
    first, second = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (demo, tmp_path / "raw")
    )
    assert {path for path in first if path.parts[0] < "patient_04"} == second.keys()
    assert [path for path in second if first[path] != second[path]] == []


def test_noise_is_seeded_and_spares_the_mask(demo, tmp_path):
    grids = phantom.ct_grid(128, SLICES), phantom.pet_grid(PET_MATRIX, SLICES)
    for noise in ("pet", "all"):
        phantom.write_study(tmp_path / noise, NIFTI, *grids, noise)
    phantom.write_study(tmp_path / "again", NIFTI, *grids, "all")
    read = {
        (role, out): nibabel.load(folder(out, NIFTI) / f"{role}.nii.gz").get_fdata()
        for role in ("CT", "PET", "MASK")
        for out in (demo, tmp_path / "pet", tmp_path / "all", tmp_path / "again")
    }
    for role, noisy_in in (("CT", ["all"]), ("PET", ["pet", "all"]), ("MASK", [])):
        clean = read[role, demo]
        for noise in ("pet", "all"):
            assert np.array_equal(clean, read[role, tmp_path / noise]) == (noise not in noisy_in)
        assert np.array_equal(read[role, tmp_path / "all"], read[role, tmp_path / "again"])
    assert (read["CT", tmp_path / "all"] - read["CT", demo]).std() == pytest.approx(15, rel=0.01)
    clean, noisy = read["PET", demo], read["PET", tmp_path / "pet"]
    body = clean > 0.2
    assert (noisy[body] / clean[body]).std() == pytest.approx(0.1, rel=0.02)
    assert (noisy[clean == 0] == 0).all()


def test_noise_of_the_pet_is_as_coarse_as_its_blur():
    """White noise seen by a Gaussian has at one voxel's distance d the correlation exp(-d2/4s2)."""
    grid = phantom.Grid(60, 60, 3.5, 5.0, (0.0, 0.0))
    grain = phantom.blurred(grid, np.random.default_rng(1).standard_normal((60, 60, 60)))
    expected = math.exp(-((3.5 * 2.3548 / 6) ** 2) / 4)
    for axis in (0, 1):
        neighbour = np.roll(grain, 1, axis)
        found = np.corrcoef(grain.ravel(), neighbour.ravel())[0, 1]
        assert found == pytest.approx(expected, abs=0.05)


def test_more_studies_are_made_up_and_begin_with_the_fewer():
    twelve = phantom.studies(12)
    assert len({(study.patient, study.study) for study in twelve}) == 12
    assert twelve[:6] == list(phantom.DEMO_STUDIES)
    assert phantom.studies(8) == twelve[:8]
    visits = Counter(study.patient for study in twelve)
    assert sorted(visits.values()) == [1, 1, 1, 1, 1, 1, 2, 2, 2]
    assert all(6 <= lesion.suv <= 15 for study in twelve[6:] for lesion in study.lesions)
    assert len({study.mask for study in phantom.studies(20)[6:]}) == 3


def test_lesions_lie_in_the_body_and_not_in_organs_as_bright():
    """Where they lie all else is paler, so that each can be told from what is around it."""
    grid = phantom.pet_grid(64, 125)
    for study in [*phantom.DEMO_STUDIES, *MORE]:
        suv = phantom.sample(grid, phantom.anatomy(study), "suv")
        for lesion in study.lesions:
            around = suv[lesion_voxels(suv.shape, grid.affine, lesion)]
            assert around.min() > 0
            assert around.max() < 0.75 * lesion.suv


def test_arguments_are_checked_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "raw"
    for arguments in (
        ["--slices", "99"],
        ["--studies", "0"],
        ["--noise", "loud"],
        ["--matrix-ct", "0"],
        ["--matrix-pet", "-4"],
    ):
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
