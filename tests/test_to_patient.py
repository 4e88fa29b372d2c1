"""examples/to_patient.py: masks back onto the PET's own grid, and the SEG as others read it."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from dicom_builders import ORIENTATIONS, affine_of, build_enhanced, build_slices, write_slices
from project_zips import image, rotation, study_images, write_zip
from scipy import ndimage

import preprocessing
from common.geometry import Grid, Image
from common.raw import mapping
from examples import to_patient

A, B = "aaaaaaa001", "bbbbbbb002"


def run(*arguments):
    return to_patient.main([str(argument) for argument in arguments])


def read(path):
    volume = nibabel.load(path)
    return np.asanyarray(volume.dataobj), volume.affine


def save(path, labels, affine):
    nibabel.Nifti1Image(labels, affine).to_filename(path)
    return path


def training_mask(archive, study_hash, *options):
    """The mask of a study as preprocessing.py brings it onto the training grid."""
    folder = archive.with_suffix("")
    command = [archive, "-o", archive.with_suffix(".h5"), "-q", "-j", 1, "--labels", "keep"]
    command += ["--save-nifti", folder, *options]
    assert preprocessing.main([str(argument) for argument in command]) == 0
    mask = folder / f"{study_hash}_mask.nii.gz"
    return Path(shutil.move(mask, archive.parent / f"{study_hash}.nii.gz"))


# --- the way back ----------------------------------------------------------------------------

CT = ((54, 50, 40), (3.0, 3.0, 3.0))
LESIONS = {1: [((-40, 0, 10), 7.0), ((30, -30, -30), 10.0)], 7: [((10, 40, 0), 14.0)]}
"""Centre and radius [mm] of spheres by label, of 1.4 to 11.5 ml."""


def spheres(pet_spacing_mm, turn=None):
    """CT, PET and mask of one study; the mask, on the grid of the PET, holds LESIONS."""
    shape = tuple(int(150 / mm) for mm in pet_spacing_mm)
    mask = image(np.zeros(shape, np.uint16), pet_spacing_mm, turn)
    voxels = np.indices(shape).reshape(3, -1)
    points_mm = (mask.affine[:3, :3] @ voxels + mask.affine[:3, 3:]).T
    labels = np.zeros(shape, np.uint16)
    for label, balls in LESIONS.items():
        for centre_mm, radius_mm in balls:
            inside = np.linalg.norm(points_mm - centre_mm, axis=1) <= radius_mm
            labels[inside.reshape(shape)] = label
    random = np.random.default_rng(0)
    ct_shape, ct_spacing_mm = CT
    return {
        "ct": image(random.integers(-1000, 1000, ct_shape, np.int16), ct_spacing_mm),
        "petsuv": image(random.random(shape, np.float32), pet_spacing_mm, turn),
        "mask": image(labels, pet_spacing_mm, turn),
    }


@pytest.mark.parametrize("options", [(), ("--orientation", "RPI", "--align", "corner")], ids=str)
@pytest.mark.parametrize("spacing", [(4.07, 4.07, 3.0), (2.04, 2.04, 3.27), (5.3, 5.3, 5)], ids=str)
def test_the_true_mask_comes_back_as_it_was(spacing, options, tmp_path, capsys):
    """Training voxels are no larger than the PET's: nothing is lost on the way."""
    images = spheres(spacing)
    archive = write_zip(tmp_path / "p.zip", {A: images})
    mask = training_mask(archive, A, "--shape", 80, 75, *options)
    assert run(mask, archive, "-o", tmp_path / "back.nii.gz") == 0
    assert f"{A}: 3 lesions" in capsys.readouterr().out
    back, affine = read(tmp_path / "back.nii.gz")
    np.testing.assert_array_equal(back, images["mask"].dataobj)
    np.testing.assert_allclose(affine, images["petsuv"].affine, atol=1e-4)


@pytest.mark.parametrize("turn", [None, rotation(7, 0) @ rotation(4, 2)], ids=["axial", "oblique"])
def test_lesions_stay_where_they_are_on_a_grid_finer_or_turned(turn, tmp_path):
    images = spheres((2.9, 2.9, 2.5), turn)
    archive = write_zip(tmp_path / "p.zip", {A: images})
    mask = training_mask(archive, A, "--shape", 80, 75)
    assert run(mask, archive, "-o", tmp_path / "back.nii.gz") == 0
    back, _ = read(tmp_path / "back.nii.gz")
    truth = np.asanyarray(images["mask"].dataobj)
    assert set(np.unique(back)) == {0, 1, 7}
    for label, balls in LESIONS.items():
        lesions, count = ndimage.label(truth == label, np.ones((3, 3, 3)))
        found, same_count = ndimage.label(back == label, np.ones((3, 3, 3)))
        assert count == same_count == len(balls)
        for number in range(1, count + 1):
            lesion = lesions == number
            there = np.isin(found, np.unique(found[lesion])[1:])
            dice = 2 * (lesion & there).sum() / (lesion.sum() + there.sum())
            assert dice >= (0.95 if turn is None else 0.9)
            off = np.subtract(ndimage.center_of_mass(lesion), ndimage.center_of_mass(there))
            assert np.abs(off).max() < 0.5


def test_each_voxel_has_the_label_predicted_at_its_centre():
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, (12, 11, 10)).astype(np.uint8)
    source = np.diag([2.0, 2.0, 3.0, 1.0])
    target = Grid((7, 9, 8), affine_of(ORIENTATIONS["oblique"], (3.1, 2.7, 3.3), (-4, -5, -3)))
    found = to_patient.onto_grid(Image(labels, source), target).labels
    for index in np.ndindex(target.shape):
        point_mm = target.affine @ (*index, 1)
        voxel = np.linalg.solve(source, point_mm)[:3]
        if np.abs(voxel - np.floor(voxel) - 0.5).min() < 1e-6:
            continue
        nearest = np.rint(voxel).astype(int)
        inside = ((nearest >= 0) & (nearest < labels.shape)).all()
        assert found[index] == (labels[tuple(nearest)] if inside else 0)


def test_no_small_lesion_is_lost_between_the_centres():
    labels = np.zeros((40, 40, 20), np.uint16)
    # Some between centres of the coarse grid, two of other labels side by side, one at the border.
    places = {(3, 3, 3): 300, (11, 11, 5): 2, (12, 12, 5): 9, (20, 31, 9): 300, (39, 39, 19): 4}
    for place, label in places.items():
        labels[place] = label
    source = np.diag([1.0, 1.0, 2.0, 1.0])
    target = Grid((5, 5, 5), affine_of(spacing_mm=(-8, -8, 8), first_mm=(-3.5, -3.5, 3.5)))
    found = to_patient.onto_grid(Image(labels, source), target)
    assert (found.n_lesions, found.n_outside) == (5, 0)
    assert found.n_nearest > 0
    where = {tuple(at): found.labels[tuple(at)] for at in np.argwhere(found.labels)}
    assert sorted(where.values()) == sorted(places.values())
    for place, label in places.items():
        mm = source @ (*place, 1)
        at = np.array([voxel for voxel, value in where.items() if value == label])
        off_mm = np.abs(at @ target.affine[:3, :3].T + target.affine[:3, 3] - mm[:3]).max(axis=1)
        assert off_mm.min() <= 8 + 1e-9
    assert "5 lesions" in str(found)
    assert f"{found.n_nearest} between voxel centres" in str(found)


def test_what_lies_outside_the_pet_is_counted():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:4, 2:4, 2:4] = labels[17, 17, 17] = 1
    target = Grid((5, 5, 5), np.diag([2.0, 2.0, 2.0, 1.0]))
    found = to_patient.onto_grid(Image(labels, np.eye(4)), target)
    assert found.n_outside == 1
    assert "LOST, as they lie outside the PET: 1" in str(found)
    assert found.labels[1, 1, 1] == 1


def test_a_prediction_without_lesions_is_an_empty_mask(tmp_path, capsys):
    archive = write_zip(tmp_path / "p.zip", {A: study_images()})
    mask = training_mask(archive, A, "--shape", 20, 18)
    save(mask, read(mask)[0] * 0, read(mask)[1])
    assert run(mask, archive) == 0
    assert "0 lesions, 0.00 ml on the training grid" in capsys.readouterr().out
    assert not read(tmp_path / f"{A}_on_pet.nii.gz")[0].any()


# --- the SEG ---------------------------------------------------------------------------------

PATIENT = {
    "PatientName": "Doe^Jane",
    "PatientID": "4711",
    "StudyDate": "20240301",
    "AccessionNumber": "A1",
}


def raw_pet(seed, orientation="axial, head first, supine"):
    """Stored values, slope and factor to SUV a slice, and the affine, of a small PET."""
    random = np.random.default_rng(seed)
    stored = random.integers(0, 30000, (30, 28, 12)).astype(np.uint16)
    slopes = random.uniform(0.5, 1.5, 12)
    affine = affine_of(ORIENTATIONS[orientation], (4.0, 4.5, 5.0), (-55, -50, -20))
    suv = (stored * slopes * random.uniform(1e-4, 2e-4, 12)).astype(np.float32)
    return stored, slopes, suv, affine


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_patient(tmp_path_factory.mktemp("made"))


@pytest.fixture
def patient(made, tmp_path):
    """A raw project of one DICOM PET, its mapping, the zip, and a mask of labels 2 and 5."""
    mask, archive, _, labels = made
    shutil.copytree(mask.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / mask.name, tmp_path / archive.name, options_in(tmp_path), labels


def options_in(folder):
    return "--raw", folder / "raw", "--mapping", folder / "mapping.csv"


def made_patient(tmp_path, orientation="axial, head first, supine", enhanced=False):
    stored, slopes, suv, affine = raw_pet(0, orientation)
    folder = tmp_path / "raw" / "Doe" / "2024"
    if enhanced:
        order = [*range(6, 12), *range(6)]
        frames = build_enhanced(stored, affine, "PT", slopes=slopes, order=order, **PATIENT)
        frames.NumberOfFrames = len(order)
        write_slices(folder / "PET", [frames])
    else:
        write_slices(folder / "PET", build_slices(stored, affine, "PT", slopes=slopes, **PATIENT))
        other = build_slices(raw_pet(1)[0], affine, "PT", SeriesInstanceUID="1.2.3.4.9", **PATIENT)
        write_slices(folder / "NAC", other)
    labels = np.zeros(stored.shape, np.uint8)
    labels[8:14, 9:12, 3:6], labels[20, 20, 8], labels[3:5, 20:24, 4] = 2, 5, 5
    ct_affine = affine @ np.diag([0.5, 0.5, 1, 1])
    images = {
        "ct": nibabel.Nifti1Image(np.zeros((60, 56, 12), np.int16), ct_affine),
        "petsuv": nibabel.Nifti1Image(suv, affine),
        "mask": nibabel.Nifti1Image(labels, affine),
    }
    archive = write_zip(tmp_path / "p.zip", {A: images}, "lung/")
    mapping.write(tmp_path / "mapping.csv", [mapping.Row("lung", "Doe", "2024", A, "written", "")])
    mask = training_mask(archive, A, "--shape", 70, 70)
    return mask, archive, options_in(tmp_path), labels


def on_grid_of(affine, shape, labels, places_mm):
    """Put labels at places [RAS, mm] onto a grid, whose voxels they must be."""
    volume = np.zeros(shape, np.uint8)
    voxels = (places_mm - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    assert np.abs(voxels - np.rint(voxels)).max() < 1e-2
    volume[tuple(np.rint(voxels).astype(int).T)] = labels
    return volume


@pytest.fixture
def seg(patient, tmp_path):
    mask, archive, options, labels = patient
    assert run(mask, archive, *options) == 0
    return tmp_path / f"{A}_on_pet.dcm", labels, raw_pet(0)[3]


def segments(labels):
    """Labels 2 and 5 as the segments 1 and 2."""
    return np.searchsorted([0, 2, 5], labels)


def test_pydicom_reads_the_mask_from_the_seg_alone(seg):
    """Frame by frame, each put where its position says."""
    path, labels, affine = seg
    dataset = pydicom.dcmread(path)
    named = {s.SegmentNumber: s.SegmentLabel for s in dataset.SegmentSequence}
    assert named == {1: "label 2", 2: "label 5"}
    found = np.zeros_like(labels)
    groups = dataset.PerFrameFunctionalGroupsSequence
    for frame, group in zip(dataset.pixel_array, groups, strict=True):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        k = (position[2] - affine[2, 3]) / affine[2, 2]
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[:, :, round(k)][frame.T > 0] = number
    np.testing.assert_array_equal(found, segments(labels))


def test_highdicom_reads_the_same_mask(seg):
    path, labels, affine = seg
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True)
    voxels = np.argwhere(volume.array)
    places_mm = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    values = volume.array[tuple(voxels.T)]
    found = on_grid_of(affine, labels.shape, values, places_mm * (-1, -1, 1))
    np.testing.assert_array_equal(found, segments(labels))


def test_dcmqi_reads_the_same_mask(seg, tmp_path):
    path, labels, affine = seg
    here = Path(sys.executable).with_name("segimage2itkimage")
    reader = here if here.exists() else shutil.which("segimage2itkimage")
    if reader is None:
        pytest.skip("dcmqi is not installed: pip install dcmqi")
    command = [reader, "--inputDICOM", path, "--outputDirectory", tmp_path, "--outputType", "nii"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert "Error" not in done.stdout + done.stderr
    found = np.zeros_like(labels)
    for number in (1, 2):
        values, grid = read(tmp_path / f"{number}.nii.gz")
        places_mm = np.argwhere(values) @ grid[:3, :3].T + grid[:3, 3]
        found += on_grid_of(affine, labels.shape, number, places_mm)
    np.testing.assert_array_equal(found, segments(labels))


def test_the_seg_refers_to_the_patients_own_pet(seg):
    """Of two PET series of one geometry the one whose values are in the zip."""
    path, _, _ = seg
    dataset = pydicom.dcmread(path)
    pet = [pydicom.dcmread(file) for file in sorted(path.parent.glob("raw/Doe/2024/PET/*"))]
    for keyword, value in PATIENT.items():
        assert dataset[keyword].value == value
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert dataset[keyword].value == pet[0][keyword].value
    [series] = dataset.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == pet[0].SeriesInstanceUID != "1.2.3.4.9"
    by_uid = {image.SOPInstanceUID: image.ImagePositionPatient for image in pet}
    for group in dataset.PerFrameFunctionalGroupsSequence:
        [source] = group.DerivationImageSequence[0].SourceImageSequence
        position = group.PlanePositionSequence[0].ImagePositionPatient
        assert by_uid[source.ReferencedSOPInstanceUID] == position
    assert dataset.Modality == "SEG"
    assert dataset.SeriesInstanceUID not in {image.SeriesInstanceUID for image in pet}


@pytest.mark.parametrize("kind", ["oblique", "sagittal", "enhanced"])
def test_turned_slices_and_multi_frame_series_get_their_mask(kind, tmp_path):
    enhanced = kind == "enhanced"
    orientation = "axial, head first, prone" if enhanced else kind
    mask, archive, options, labels = made_patient(tmp_path, orientation, enhanced)
    assert run(mask, archive, *options, "-o", tmp_path / "seg.dcm") == 0
    volume = highdicom.seg.segread(tmp_path / "seg.dcm").get_volume(combine_segments=True)
    voxels = np.argwhere(volume.array)
    places_mm = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    values = volume.array[tuple(voxels.T)]
    affine = raw_pet(0, orientation)[3]
    found = on_grid_of(affine, labels.shape, values, places_mm * (-1, -1, 1))
    np.testing.assert_array_equal(found, segments(labels))


def test_the_seg_is_private_and_the_same_every_time(seg, patient, capsys):
    path, _, _ = seg
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_bytes()
    mask, archive, options, _ = patient
    assert run(mask, archive, *options) == 0
    assert path.read_bytes() == first
    said = capsys.readouterr()
    assert "Doe" not in said.out + said.err
    assert run(mask, archive, *options, "--algorithm", "nnU-Net") == 0
    other = pydicom.dcmread(path)
    assert other.SOPInstanceUID.encode() not in first


def test_the_help_says_that_the_seg_holds_the_patients_identity(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "IT HOLDS THE PATIENT'S NAME, ID" in capsys.readouterr().out


# --- refusals --------------------------------------------------------------------------------


def test_of_a_nifti_pet_with_one_header_beside_it_the_seg_is_refused_with_the_remedy(
    patient, tmp_path, capsys
):
    mask, archive, options, _ = patient
    for path in sorted((tmp_path / "raw/Doe/2024").glob("*/*"))[1:]:
        path.unlink()
    assert run(mask, archive, *options) == 1
    assert "with a DICOM header beside it, write NIfTI" in capsys.readouterr().err
    assert run(mask, archive) == 0


def test_another_patients_folder_makes_no_seg(patient, tmp_path, capsys):
    """The same scanner, the same geometry, other values."""
    mask, archive, options, _ = patient
    folder = tmp_path / "raw/Doe/2024/PET"
    shutil.rmtree(folder)
    stored, slopes, _, affine = raw_pet(5)
    write_slices(folder, build_slices(stored, affine, "PT", slopes=slopes, **PATIENT))
    assert run(mask, archive, *options) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {A}: no PET series in the study's folder has the slices")
    assert said.count("\n") == 1
    assert "Doe" not in said
    assert not list(tmp_path.glob("*.dcm"))


def test_a_prediction_named_after_one_study_goes_to_no_other(tmp_path, capsys):
    """Their grids may be equal, so that the name alone tells them apart."""
    images = spheres((5.3, 5.3, 5))
    archive = write_zip(tmp_path / "p.zip", {A: images, B: images})
    mask = training_mask(archive, A, "--shape", 80, 75)
    assert run(mask, archive, "--hash", B) == 1
    assert f"{A}.nii.gz: begins with the hash of another study" in capsys.readouterr().err
    assert run(mask, archive, "--hash", A) == 0


def spoil(kind, mask, archive, tmp_path):
    """Spoil a prediction or the arguments, and return these."""
    labels, affine = read(mask)
    table = tmp_path / "mapping.csv"
    match kind:
        case "probabilities":
            save(mask, labels * np.float32(0.4), affine)
        case "another grid":
            affine[0, 3] += 3
            save(mask, labels, affine)
        case "a cropped grid":
            save(mask, labels[:-2], affine)
        case "two volumes":
            save(mask, np.stack([labels, labels], axis=-1), affine)
        case "a truncated file":
            mask.write_bytes(mask.read_bytes()[:-20])
        case "no such file":
            mask.unlink()
        case "no hash in the name":
            mask = mask.rename(tmp_path / "case_7.nii.gz")
        case "an unknown hash":
            return [mask, archive, "--hash", B]
        case "no zip":
            archive.write_bytes(b"PK")
        case "another project's mapping":
            mapping.write(table, [mapping.Row("breast", "Doe", "2024", A, "written", "")])
        case "no mapping":
            table.write_text("patient,study\n")
        case "another raw project":
            (tmp_path / "raw/Doe").rename(tmp_path / "raw/Roe")
        case "an empty prediction":
            save(mask, labels * 0, affine)
        case "no PET series":
            shutil.rmtree(tmp_path / "raw/Doe/2024")
            (tmp_path / "raw/Doe/2024").mkdir()
    return [mask, archive]


@pytest.mark.parametrize(
    ("kind", "said"),
    {
        "probabilities": "values that are not whole numbers",
        "another grid": "not on a training grid of this study's CT",
        "a cropped grid": "not on a training grid of this study's CT",
        "two volumes": "holds 2 volumes",
        "a truncated file": "truncated or damaged",
        "no such file": "cannot read the prediction",
        "no hash in the name": "begins with no hash",
        "an unknown hash": f"has no study {B}",
        "no zip": "not a zip file",
        "another project's mapping": "no row of it in project 'lung'",
        "no mapping": "is no mapping",
        "another raw project": "does not hold the folder",
        "an empty prediction": "holds no lesion",
        "no PET series": "has no DICOM PET series",
    }.items(),
)
def test_what_can_not_be_done_is_one_line_and_leaves_nothing(kind, said, patient, tmp_path, capsys):
    mask, archive, options, _ = patient
    arguments = spoil(kind, mask, archive, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments, *options) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        ("--raw", "raw"),
        ("--mapping", "m.csv"),
        ("-o", "x.dcm"),
        ("-o", "x.nii"),
        ("-o", "none/x.nii.gz"),
        ("-o", "./a.nii.gz"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_end_with_status_2(options, capsys):
    with pytest.raises(SystemExit) as ended:
        run("a.nii.gz", "p.zip", *options)
    assert ended.value.code == 2
