"""preprocessing.py, from zip to HDF5, against plain nilearn and nibabel."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from nibabel import orientations
from nilearn.image import resample_img, resample_to_img
from project_zips import image, rotation, study_images, write_zip
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from skimage import measure

import preprocessing
from common import project_zip

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "sts_nifti"

A, B, C = "aaaaaaa001", "bbbbbbb002", "ccccccc003"
SMALL = ["--shape", "30", "28"]
GROUPS = ["image", "mask", "mask_iso"]


def run(zip_path, output, *options):
    arguments = [zip_path, "-o", output, "--jobs=1", *options]
    return preprocessing.main([str(argument) for argument in arguments])


def content(path):
    """Arrays of a file by group and hash."""
    with h5py.File(path) as file:
        return {(group, key): file[group][key][()] for group in file for key in file[group]}


@pytest.fixture
def one_zip(tmp_path):
    return write_zip(tmp_path / "p.zip", {A: study_images()})


@pytest.fixture(scope="module")
def default_file(tmp_path_factory):
    """Two studies by default options but for a small shape."""
    folder = tmp_path_factory.mktemp("default")
    record = {"suv": {"suv_type": "bw", "weight_kg": 70.0, "rule": "11"}, "warnings": ["told"]}
    studies = {B: study_images(1), A: study_images(0)}
    write_zip(folder / "p.zip", studies, records={A: record})
    assert run(folder / "p.zip", folder / "p.h5", *SMALL) == 0
    return folder / "p.h5"


# --- the plain way ---------------------------------------------------------------------------


def plainly(
    images,
    orientation="LAS",
    spacing=(2, 2, 3),
    shape=(200, 200),
    align="center",
    ct_range=(-1000, 1000),
    suv_range=(0, 40),
    threshold=25,
    written_affine=None,
):
    """Image, mask and mask_iso as nibabel and nilearn give them.

    What lies on the border of the CT hangs on the last bit of the affine: `written_affine` has
    to agree with the one made here, and is used.
    """
    turned = {}
    for role, volume in images.items():
        turn = orientations.ornt_transform(
            nibabel.io_orientation(volume.affine), orientations.axcodes2ornt(orientation)
        )
        turned[role] = volume.as_reoriented(turn)
    ct = turned["ct"]
    ct_spacing = nibabel.affines.voxel_sizes(ct.affine)
    axes = ct.affine[:3, :3] / ct_spacing
    if len(shape) == 2:
        shape = (*shape, max(1, int(np.floor(ct.shape[2] * ct_spacing[2] / spacing[2] + 1e-6))))
        centred = (True, True, False)
    else:
        centred = (True, True, True)
    offset_mm = np.zeros(3)
    for axis in range(3):
        if align == "center" and centred[axis]:
            ct_middle = (ct.shape[axis] - 1) / 2 * ct_spacing[axis]
            offset_mm[axis] = ct_middle - (shape[axis] - 1) / 2 * spacing[axis]
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = ct.affine[:3, 3] + axes @ offset_mm
    np.testing.assert_allclose(written_affine, affine, rtol=0, atol=1e-9)
    affine = written_affine

    options = {"force_resample": True, "copy_header": True}
    ct = nibabel.Nifti1Image(ct.get_fdata(dtype=np.float32), ct.affine)
    grid = resample_img(ct, affine, shape, "continuous", fill_value=-1024, **options)
    suv = resample_to_img(turned["petsuv"], grid, "continuous", fill_value=0, **options)
    mask = resample_to_img(turned["mask"], grid, "nearest", fill_value=0, **options)
    mask = mask.get_fdata() > 0
    return (
        np.clip(
            [
                (suv.get_fdata() - suv_range[0]) / (suv_range[1] - suv_range[0]),
                (grid.get_fdata() - ct_range[0]) / (ct_range[1] - ct_range[0]),
            ],
            0,
            1,
        ),
        mask[None],
        isocontour_by_loop(suv.get_fdata(), mask, threshold)[None],
    )


def isocontour_by_loop(suv, mask, percent):
    lesions = measure.label(mask, connectivity=3)
    contour = np.zeros(mask.shape, bool)
    for lesion in range(1, lesions.max() + 1):
        brightest = max(suv[lesions == lesion])
        for voxel in np.argwhere(lesions == lesion):
            contour[tuple(voxel)] = suv[tuple(voxel)] >= percent / 100 * brightest
    return contour


def assert_equals_plain(path, key, images, tolerance=1e-5, **options):
    with h5py.File(path) as file:
        (affine,) = {file[group][key].attrs["affine"].tobytes() for group in GROUPS}
        options["written_affine"] = np.frombuffer(affine).reshape(4, 4)
        image_, mask, mask_iso = plainly(images, **options)
        np.testing.assert_allclose(file["image"][key][()], image_, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(file["mask"][key][()], mask)
        np.testing.assert_array_equal(file["mask_iso"][key][()], mask_iso)


CASES = {
    "default grid": {},
    "axes swapped": {"orientation": "PIR", "spacing": (2, 3, 1.7), "shape": (20, 24)},
    "toward the feet": {"orientation": "RAI", "shape": (30, 28)},
    "coarser than PET": {"spacing": (7, 6, 5), "shape": (9, 8)},
    "finer than CT": {"spacing": (1.1, 0.9, 1.3), "shape": (36, 40)},
    "beyond the CT": {"shape": (60, 50, 40)},
    "cropped": {"shape": (11, 12, 13), "align": "center"},
    "corner": {"shape": (31, 22, 15), "align": "corner"},
    "a single slice": {"shape": (20, 20), "spacing": (3, 3, 59)},
    "other values": {"ct_range": (-150, 250), "suv_range": (1, 5), "threshold": 41},
}
OPTION_OF = {"threshold": "iso_threshold"}


def as_arguments(options):
    for name, value in options.items():
        yield f"--{OPTION_OF.get(name, name).replace('_', '-')}"
        yield from value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("name", CASES)
def test_file_equals_plain_nilearn(name, one_zip, tmp_path):
    options = {"shape": (30, 28)} | CASES[name] if name != "default grid" else {}
    arguments = ["--dtype", "float32", *as_arguments(options)]
    assert run(one_zip, tmp_path / "o.h5", *arguments) == 0
    assert_equals_plain(tmp_path / "o.h5", A, study_images(), **options)


@pytest.mark.parametrize("degrees", [90.0, 12.0])
def test_grids_turned_together_equal_plain_nilearn(degrees, tmp_path, capsys):
    images = study_images(turn=rotation(degrees, 0))
    write_zip(tmp_path / "p.zip", {A: images})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL, "--dtype=float32", "-v") == 0
    assert_equals_plain(tmp_path / "o.h5", A, images, shape=(30, 28), tolerance=1e-4)
    assert "CT axis by axis, PET axis by axis" in capsys.readouterr().err


def test_oblique_ct_takes_the_way_of_nilearn(tmp_path, capsys):
    straight, oblique = study_images(), study_images(turn=rotation(12, 2))
    images = {**straight, "ct": oblique["ct"]}
    write_zip(tmp_path / "p.zip", {A: images})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL, "--dtype=float32", "-v") == 0
    assert_equals_plain(tmp_path / "o.h5", A, images, shape=(30, 28))
    assert "CT axis by axis, PET by nilearn, mask by nilearn" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("patient", ["STS_002", "STS_042"])
def test_real_study_equals_plain_nilearn(patient, tmp_path):
    (folder,) = (REAL / patient).iterdir()
    names = {"ct": "CT", "petsuv": "PET", "mask": "MASK"}
    images = {role: nibabel.load(folder / f"{name}.nii.gz") for role, name in names.items()}
    write_zip(tmp_path / "p.zip", {A: images})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", "--shape", 100, 90) == 0
    # float16 has steps of 2**-11 below 1.
    assert_equals_plain(tmp_path / "o.h5", A, images, tolerance=2.5e-4, shape=(100, 90))


# --- layout ----------------------------------------------------------------------------------


def test_exactly_three_groups_of_one_dataset_a_study(default_file):
    with h5py.File(default_file) as file:
        assert sorted(file) == GROUPS
        for group in GROUPS:
            assert sorted(file[group]) == [A, B]
        assert file["image"][A].shape == (2, 30, 28, 22)
        assert file["image"][A].dtype == np.float16
        assert file["mask"][A].shape == file["mask_iso"][A].shape == (1, 30, 28, 22)
        assert file["mask"][A].dtype == file["mask_iso"][A].dtype == np.uint8


def test_attributes_suffice_to_invert_everything(default_file):
    with h5py.File(default_file) as file:
        assert file.attrs["schema_version"] == 1
        assert file.attrs["software"].startswith("tumorvolume ")
        parameters = json.loads(file.attrs["parameters"])
        assert parameters["spacing"] == [2, 2, 3]
        assert parameters["shape"] == [30, 28, None]
        for group in GROUPS:
            attributes = file[group][A].attrs
            assert attributes["project"] == "proj"
            assert list(attributes["spacing"]) == [2, 2, 3]
            assert attributes["orientation"] == "LAS"
            affine = attributes["affine"]
            assert affine.dtype == np.float64
            assert nibabel.aff2axcodes(affine) == ("L", "A", "S")
            np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), [2, 2, 3])
        of_image = file["image"][A].attrs
        assert list(of_image["channels"]) == ["PET", "CT"]
        assert list(of_image["ct_range"]) == [-1000, 1000]
        assert list(of_image["suv_range"]) == [0, 40]
        assert of_image["suv_type"] == "bw"
        assert json.loads(of_image["suv"])["rule"] == "11"
        assert "told" in json.loads(of_image["warnings"])
        assert file["mask_iso"][A].attrs["iso_threshold"] == 25
        assert file["mask_iso"][A].attrs["connectivity"] == 26


def test_zip_without_records_says_that_the_suv_type_is_unknown(default_file):
    with h5py.File(default_file) as file:
        assert file["image"][B].attrs["suv_type"] == "unknown"
        assert json.loads(file["image"][B].attrs["suv"]) == {}


def test_plain_h5py_without_plugins_reads_the_default_compression(default_file):
    code = (
        "import sys; sys.modules['hdf5plugin'] = None; import h5py;"
        f"print(h5py.File({str(default_file)!r})['image/{A}'][()].sum() > 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout == b"True\n"


def test_affine_attribute_leads_from_the_brightest_voxel_to_its_place(tmp_path):
    images = study_images()
    hot = images["petsuv"].get_fdata()
    hot[11, 7, 9] = 300
    images["petsuv"] = nibabel.Nifti1Image(hot.astype(np.float32), images["petsuv"].affine)
    write_zip(tmp_path / "p.zip", {A: images})
    place_mm = (images["petsuv"].affine @ (11, 7, 9, 1))[:3]
    for code in ("LAS", "RPI", "SLA"):
        output = tmp_path / f"{code}.h5"
        fine = ["--shape", 90, 90, "--spacing", 1, 1, 1, "--suv-range", 0, 400]
        run(tmp_path / "p.zip", output, *fine)
        with h5py.File(output) as file:
            pet = file["image"][A][0].astype(float)
            affine = file["image"][A].attrs["affine"]
        found_mm = affine @ (*np.unravel_index(pet.argmax(), pet.shape), 1)
        assert np.abs(found_mm[:3] - place_mm).max() <= 0.75


def test_fixed_suv_threshold_replaces_the_percentage(one_zip, tmp_path):
    assert run(one_zip, tmp_path / "o.h5", *SMALL, "--iso-suv", 4, "--dtype=float32") == 0
    with h5py.File(tmp_path / "o.h5") as file:
        suv = file["image"][A][0] * 40
        mask, contour = file["mask"][A][0] > 0, file["mask_iso"][A][0] > 0
        assert file["mask_iso"][A].attrs["iso_suv"] == 4
    sure = np.abs(suv - 4) > 1e-4
    np.testing.assert_array_equal(contour[sure], (mask & (suv >= 4))[sure])
    assert contour.any()
    assert (mask & ~contour).any()


@pytest.mark.parametrize("compression", ["gzip", "lzf", "none"])
def test_compressions_hold_the_same_values(compression, one_zip, tmp_path, default_file):
    assert run(one_zip, tmp_path / "o.h5", *SMALL, "--compression", compression) == 0
    expected = content(default_file)
    for name, array in content(tmp_path / "o.h5").items():
        np.testing.assert_array_equal(array, expected[name])


# --- NIfTI and measures ----------------------------------------------------------------------


def test_saved_nifti_lies_on_the_originals_in_hu_and_suv(tmp_path):
    images = study_images()
    write_zip(tmp_path / "p.zip", {A: images})
    folder = tmp_path / "nifti"
    fine = ["--spacing", 1, 1, 1, "--shape", 80, 72, 70, "--suv-range", 0, 5]
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *fine, "--save-nifti", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{A}_{name}.nii.gz" for name in ("ct", "mask", "mask_iso", "petsuv")
    ]
    saved = {role: nibabel.load(folder / f"{A}_{role}.nii.gz") for role in images}
    for role, spread in (("ct", 600), ("petsuv", 2)):
        original = images[role].get_fdata()
        inner = tuple(slice(3, -3) for _ in range(3))
        back = resample_to_img(saved[role], images[role], "continuous").get_fdata()
        error = np.abs(back[inner] - original[inner])
        assert np.median(error) < spread / 10
        shifted = images[role].affine.copy()
        shifted[0, 3] += 0.3
        moved = nibabel.Nifti1Image(original, shifted)
        off = resample_to_img(saved[role], moved, "continuous").get_fdata()
        assert np.median(error) < np.median(np.abs(off[inner] - original[inner]))
    assert saved["petsuv"].get_fdata().max() > 5
    back = resample_to_img(saved["mask"], images["mask"], "nearest").get_fdata()
    assert np.count_nonzero((back > 0) != (images["mask"].get_fdata() > 0)) <= 2


@pytest.mark.parametrize("orientation", ["LAS", "RPI", "SLA"])
@pytest.mark.parametrize("degrees", [0, 12])
def test_saved_nifti_resampled_back_is_nowhere_off_by_a_tenth_of_a_millimetre(
    orientation, degrees, tmp_path
):
    images = study_images(turn=Rotation.from_euler("zx", [degrees, degrees / 3], True).as_matrix())
    for role, low, high in (("ct", -1000, 1000), ("petsuv", 0, 10)):
        smooth = gaussian_filter(images[role].get_fdata(), 2.0 if role == "ct" else 1.5)
        smooth = (smooth - smooth.min()) / np.ptp(smooth) * (high - low) + low
        images[role] = nibabel.Nifti1Image(smooth.astype(np.float32), images[role].affine)
    write_zip(tmp_path / "p.zip", {A: images})
    options = ["--shape", 50, 45, 30, "--orientation", orientation, "--save-nifti", tmp_path / "n"]
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", "--spacing", 2, 2, 3, *options) == 0
    for role in ("ct", "petsuv"):
        saved = nibabel.load(tmp_path / "n" / f"{A}_{role}.nii.gz")
        assert nibabel.aff2axcodes(saved.affine) == tuple(orientation) or degrees
        off_mm = displacement_mm(images[role], saved)
        assert np.abs(off_mm).max() < 0.1
        # What is off by 0.3 mm is seen to be.
        moved = saved.affine.copy()
        moved[:3, 3] += 0.3
        moved_mm = displacement_mm(images[role], nibabel.Nifti1Image(saved.get_fdata(), moved))
        np.testing.assert_allclose(moved_mm - off_mm, 0.3, atol=0.1)


def displacement_mm(original, saved):
    """How far a saved image, resampled back, lies from the original: least squares, (x, y, z)."""
    back = resample_to_img(saved, original, "continuous").get_fdata()
    before = original.get_fdata()
    inner = tuple(slice(n // 4, -n // 4) for n in before.shape)
    slopes = np.stack([slope[inner].ravel() for slope in np.gradient(before)], axis=1)
    voxels = np.linalg.lstsq(slopes, (before - back)[inner].ravel(), rcond=None)[0]
    return original.affine[:3, :3] @ voxels


def read_table(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_measures_have_a_row_a_lesion_and_a_total_on_the_pets_own_grid(tmp_path):
    images = study_images()
    record = {"suv": {"weight_kg": 0.05}}
    write_zip(tmp_path / "p.zip", {A: images}, records={A: record})
    coarse = ["--spacing", 9, 9, 9, "--shape", 20, 20]
    run(tmp_path / "p.zip", tmp_path / "o.h5", *coarse, "--measures", tmp_path / "m.csv")
    rows = read_table(tmp_path / "m.csv")
    assert [row["lesion"] for row in rows] == ["1", "2", "3", "total"]
    assert {row["hash"] for row in rows} == {A}

    suv, mask = images["petsuv"].get_fdata(), images["mask"].get_fdata() > 0
    lesions = measure.label(mask, connectivity=3)
    voxel_ml = 0.064
    for row in rows[:-1]:
        centroid = [float(row[name]) for name in ("x_mm", "y_mm", "z_mm")]
        middle = np.linalg.inv(images["mask"].affine) @ (*centroid, 1)
        candidates = {
            number: np.argwhere(lesions == number).mean(axis=0)
            for number in range(1, lesions.max() + 1)
        }
        number = min(candidates, key=lambda n: np.abs(candidates[n] - middle[:3]).max())
        inside = suv[lesions == number]
        contour = inside[inside >= 0.25 * inside.max()]
        expected = {
            "mtv_ml": inside.size * voxel_ml,
            "iso_mtv_ml": contour.size * voxel_ml,
            "suv_max": inside.max(),
            "suv_mean": inside.mean(),
            "tlg_g": inside.sum() * voxel_ml,
        }
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-5), name
        assert 0 < float(row["suv_peak"]) < inside.max()
    total = rows[-1]
    assert total["lesion_count"] == "3"
    assert float(total["tmtv_ml"]) == pytest.approx(mask.sum() * voxel_ml, rel=1e-5)
    assert float(total["suv_max"]) == pytest.approx(suv[mask].max(), rel=1e-5)
    assert float(total["suv_mean"]) == pytest.approx(suv[mask].mean(), rel=1e-5)
    assert float(total["dose_fraction"]) == pytest.approx(suv.sum() * voxel_ml / 50, rel=1e-5)
    assert float(total["dmax_mm"]) > 10


@pytest.mark.parametrize(("suv_type", "is_known"), [("bw", True), ("lbm-janma", False)])
def test_the_dose_fraction_is_of_suv_by_body_weight_alone(tmp_path, suv_type, is_known):
    record = {"suv": {"weight_kg": 0.05, "suv_type": suv_type}}
    write_zip(tmp_path / "p.zip", {A: study_images()}, records={A: record})
    run(tmp_path / "p.zip", tmp_path / "o.h5", "--measures", tmp_path / "m.csv")
    assert bool(read_table(tmp_path / "m.csv")[-1]["dose_fraction"]) == is_known


def test_measures_are_not_asked_of_a_foreign_output_that_is_left_as_it_was(tmp_path, capsys):
    images = {role: image for role, image in study_images().items() if role != "mask"}
    write_zip(tmp_path / "p.zip", {A: images})
    output = tmp_path / "o.h5"
    output.write_bytes(b"foreign")
    assert run(tmp_path / "p.zip", output, "--measures", tmp_path / "m.csv") == 1
    assert "left as it was, for no study could be written" in capsys.readouterr().err
    assert output.read_bytes() == b"foreign"


# --- nothing is lost silently ----------------------------------------------------------------


def told(path, key=A):
    with h5py.File(path) as file:
        return json.loads(file["image"][key].attrs["warnings"])


LOSSES = {
    "outside": (["--shape", "12", "28"], "ml of 3 lesion(s) lie outside the training grid"),
    "vanished": (["--spacing", "9", "9", "9"], "1 lesion(s) of 0.06 ml vanish by resampling"),
    "emptied": (["--spacing", "15", "15", "15"], "the mask of 4.74 ml becomes empty"),
    "clipped": (["--suv-range", "0", "3"], "brighter than the SUV range (SUVmax"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_told_in_log_and_file_and_measures(name, one_zip, tmp_path, capsys):
    options, words = LOSSES[name]
    table = tmp_path / "m.csv"
    arguments = [*SMALL, *options, "--measures", table]
    assert run(one_zip, tmp_path / "o.h5", *arguments) == 0
    assert f"warning: {A}: " in capsys.readouterr().err
    assert any(words in warning for warning in told(tmp_path / "o.h5"))
    assert words in read_table(table)[-1]["warnings"]


@pytest.mark.parametrize(
    ("suv_scale", "shift", "words"),
    [
        (200, 0, "dose fraction out of range: the PET holds "),
        (0.01, 0, "dose fraction out of range: "),
        (1, 5, "mask far from uptake: SUVmean is "),
    ],
)
def test_doubts_are_told_in_log_and_file_and_measures_and_report(
    suv_scale, shift, words, tmp_path, capsys
):
    images = study_images()
    mask = np.roll(images["mask"].get_fdata().astype(np.uint8), shift, axis=0)
    images["mask"] = nibabel.Nifti1Image(mask, images["mask"].affine)
    suv = images["petsuv"].get_fdata().astype(np.float32) * np.float32(suv_scale)
    images["petsuv"] = nibabel.Nifti1Image(suv, images["petsuv"].affine)
    provenance = {"suv_type": "bw", "suv_units": "g/ml", "units": "GML", "rule": "7"}
    record = {"suv": {**provenance, "weight_kg": 50.0}}
    write_zip(tmp_path / "p.zip", {A: images}, records={A: record})
    table, page = tmp_path / "m.csv", tmp_path / "r.html"
    beside = ["--measures", table, "--report", page]
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL, *beside) == 0
    assert f"warning: {A}: {words}" in capsys.readouterr().err
    assert any(warning.startswith(words) for warning in told(tmp_path / "o.h5"))
    assert words in read_table(table)[-1]["warnings"]
    assert f"<li>{words}" in page.read_text()


def test_lesions_that_merge_are_told(tmp_path):
    images = study_images()
    mask = np.zeros(images["mask"].shape, np.uint8)
    mask[8:10, 8:10, 8:10] = mask[11:13, 8:10, 8:10] = 1
    images["mask"] = nibabel.Nifti1Image(mask, images["mask"].affine)
    write_zip(tmp_path / "p.zip", {A: images})
    run(tmp_path / "p.zip", tmp_path / "o.h5", "--spacing", 8, 8, 8, "--shape", 20, 20)
    assert any(
        w.startswith("2 lesions of ") and "merge into 1" in w for w in told(tmp_path / "o.h5")
    )


def test_pet_beyond_the_ct_is_told(tmp_path):
    images = study_images(ct_shape=(44, 40, 20))
    write_zip(tmp_path / "p.zip", {A: images})
    run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL)
    assert any("are not covered by the CT" in warning for warning in told(tmp_path / "o.h5"))


def test_negative_study_is_written_without_a_warning(tmp_path):
    images = study_images()
    images["mask"] = nibabel.Nifti1Image(
        np.zeros(images["mask"].shape, np.uint8), images["mask"].affine
    )
    write_zip(tmp_path / "p.zip", {A: images})
    table = tmp_path / "m.csv"
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL, "--measures", table) == 0
    assert not content(tmp_path / "o.h5")["mask", A].any()
    assert told(tmp_path / "o.h5") == []
    (total,) = read_table(table)
    assert total["lesion_count"] == "0"


# --- labels and masks ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_labels(tmp_path_factory):
    """Two studies of two and three labels, those of one beyond 255, and what is made of them."""
    folder = tmp_path_factory.mktemp("labels")
    one, other = study_images(0), study_images(1)
    large = other["mask"].get_fdata().astype(np.uint16)
    large[large == 2] = 300
    large[2:4, 2:4, 2:4] = 3
    other["mask"] = nibabel.Nifti1Image(large, other["mask"].affine)
    write_zip(folder / "p.zip", {A: one, B: other})
    options = ["--labels", "keep", "--measures", folder / "m.csv", "--save-nifti", folder / "n"]
    options += ["--report", folder / "r.html"]
    assert run(folder / "p.zip", folder / "keep.h5", *SMALL, *options) == 0
    binary = ["--measures", folder / "b.csv"]
    assert run(folder / "p.zip", folder / "binary.h5", *SMALL, *binary) == 0
    return folder


def test_labels_are_kept_where_asked_for_and_nothing_else_changes(with_labels):
    kept, binary = content(with_labels / "keep.h5"), content(with_labels / "binary.h5")
    for key, labels, dtype in ((A, {1, 2}, np.uint8), (B, {1, 3, 300}, np.uint16)):
        np.testing.assert_array_equal(kept["image", key], binary["image", key])
        for group in ("mask", "mask_iso"):
            assert kept[group, key].dtype == dtype
            assert set(np.unique(kept[group, key])) == {0, *labels}
            np.testing.assert_array_equal(kept[group, key] > 0, binary[group, key] > 0)
        inside = kept["mask_iso", key] > 0
        np.testing.assert_array_equal(kept["mask_iso", key][inside], kept["mask", key][inside])
        for name in ("mask", "mask_iso"):
            saved = nibabel.load(with_labels / "n" / f"{key}_{name}.nii.gz")
            np.testing.assert_array_equal(np.asanyarray(saved.dataobj), kept[name, key][0])


def test_labels_lie_where_nilearn_puts_them(with_labels):
    images = study_images(0)
    with h5py.File(with_labels / "keep.h5") as file:
        mask = file["mask"][A]
        grid = nibabel.Nifti1Image(mask[0], mask.attrs["affine"])
    expected = resample_to_img(
        images["mask"], grid, "nearest", fill_value=0, force_resample=True, copy_header=True
    )
    np.testing.assert_array_equal(grid.get_fdata(), expected.get_fdata())


def test_measures_of_labels_have_a_row_a_label_and_the_same_totals(with_labels):
    kept, binary = read_table(with_labels / "m.csv"), read_table(with_labels / "b.csv")
    assert [(row["hash"], row["lesion"]) for row in kept] == [
        *((A, name) for name in ("1", "2", "total")),
        *((B, name) for name in ("1", "3", "300", "total")),
    ]
    totals = [[row for row in table if row["lesion"] == "total"] for table in (kept, binary)]
    assert totals[0] == totals[1]
    of_label = sum(float(row["mtv_ml"]) for row in kept if row["hash"] == A)
    assert of_label == pytest.approx(2 * float(totals[0][0]["mtv_ml"]), rel=1e-5)
    voxels = (study_images(0)["mask"].get_fdata() == 2).sum()
    assert float(kept[1]["mtv_ml"]) == pytest.approx(voxels * 0.064)


def test_masks_of_0_and_1_go_without_saying(with_labels):
    with (
        h5py.File(with_labels / "keep.h5") as kept,
        h5py.File(with_labels / "binary.h5") as binary,
    ):
        assert json.loads(kept.attrs["parameters"])["labels"] == "keep"
        assert "labels" not in json.loads(binary.attrs["parameters"])


def test_other_labels_are_computed_anew(with_labels, tmp_path, capsys):
    assert run(with_labels / "p.zip", tmp_path / "o.h5", *SMALL) == 0
    assert run(with_labels / "p.zip", tmp_path / "o.h5", *SMALL, "--labels", "keep") == 0
    assert "2 studies: 2 written, 0 unchanged" in capsys.readouterr().out
    assert set(np.unique(content(tmp_path / "o.h5")["mask", B])) == {0, 1, 3, 300}


def of_zip(mask, folder, *options):
    """Arrays and total measures of a study with another mask."""
    images = study_images()
    images["mask"] = mask
    write_zip(folder / "p.zip", {A: images})
    assert run(folder / "p.zip", folder / "o.h5", *SMALL, "--measures", folder / "m.csv") == 0
    return content(folder / "o.h5"), read_table(folder / "m.csv")[-1]


@pytest.mark.parametrize("drawn_on", ["petsuv", "ct"])
@pytest.mark.parametrize("turned", [False, True])
def test_cropped_masks_give_what_the_whole_gives(drawn_on, turned, tmp_path):
    grid = study_images()[drawn_on]
    data = np.zeros(grid.shape, np.uint8)
    data[5:11, 6:9, 4:10] = data[12:15, 9:11, 11:14] = 1
    whole, total = of_zip(nibabel.Nifti1Image(data, grid.affine), tmp_path)
    crop = nibabel.Nifti1Image(data, grid.affine).slicer[5:15, 6:11, 4:14]
    if turned:
        crop = crop.as_reoriented([[1, -1], [0, 1], [2, -1]])
    part, total_of_crop = of_zip(crop, tmp_path)
    for name, expected in whole.items():
        np.testing.assert_array_equal(part[name], expected)
    assert total_of_crop == total


def test_oblique_mask_cropped_on_its_own_lattice_gives_what_the_whole_gives(tmp_path):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", (9, -14, 25), degrees=True).as_matrix() * 1.7
    affine[:3, 3] = -12.3, -9.7, -11.1
    data = np.zeros((15, 13, 14), np.uint8)
    data[3:9, 4:8, 5:9] = data[10:12, 8:11, 10:12] = 1
    whole, total = of_zip(nibabel.Nifti1Image(data, affine), tmp_path)
    crop = nibabel.Nifti1Image(data, affine).slicer[3:12, 4:11, 5:12]
    part, total_of_crop = of_zip(crop, tmp_path)
    np.testing.assert_array_equal(part["mask", A], whole["mask", A])
    assert total_of_crop == total


def test_lesions_that_touch_on_the_pet_are_measured_apart(tmp_path):
    ct = study_images()["ct"]
    data = np.zeros(ct.shape, np.uint8)
    data[20:25, 20:30, 10:20] = data[26:31, 20:30, 10:20] = 1
    _, total = of_zip(nibabel.Nifti1Image(data, ct.affine), tmp_path)
    assert total["lesion_count"] == "2"
    assert float(total["dmax_mm"]) > 6


def test_lesion_between_the_voxels_of_the_pet_is_told(tmp_path, capsys):
    ct = study_images()["ct"]
    data = np.zeros(ct.shape, np.uint8)
    pet = study_images()["petsuv"].affine
    place_mm = pet @ (8.5, 8.5, 8.5, 1)
    data[tuple(np.rint(np.linalg.inv(ct.affine) @ place_mm)[:3].astype(int))] = 1
    _, total = of_zip(nibabel.Nifti1Image(data, ct.affine), tmp_path)
    assert total["lesion_count"] == "0"
    assert "fall between the voxels of the PET's own grid" in total["warnings"]
    assert "missing in the measures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mask: -(mask == 1).astype(np.int8), "the mask has labels from -1 to 0"),
        (lambda mask: np.where(mask, -2, 0).astype(np.int16), "the mask has labels from -2 to 0"),
        (lambda mask: mask * np.float32(0.5), "the mask has values that are not whole numbers"),
        (lambda mask: mask + np.float32(1e-6), "the mask has values that are not whole numbers"),
        (lambda mask: gaussian_filter(mask * 1.0, 0.7), "the mask has values that are not whole"),
    ],
)
def test_foreign_masks_that_hold_no_labels_are_refused(change, words, tmp_path, capsys):
    images = study_images()
    mask = np.asanyarray(images["mask"].dataobj)
    images["mask"] = nibabel.Nifti1Image(change(mask), images["mask"].affine)
    write_zip(tmp_path / "p.zip", {A: images, B: study_images(1)})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL) == 3
    assert f"error: {A}: {words}" in capsys.readouterr().err
    assert {key for _, key in content(tmp_path / "o.h5")} == {B}


def test_foreign_mask_with_an_offset_is_refused(tmp_path, capsys):
    images = study_images()
    mask = nibabel.Nifti1Image(images["mask"].get_fdata(), images["mask"].affine, dtype=np.uint8)
    mask.header.set_slope_inter(1, 0.5)
    images["mask"] = mask
    write_zip(tmp_path / "p.zip", {A: images})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL) == 3
    assert "values that are not whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        (("petsuv", "mask"), "the PET and the CT do not overlap in space"),
        (("mask",), "the mask's labelled voxels and the PET do not overlap in space"),
    ],
)
def test_foreign_images_that_lie_apart_are_refused(moved, words, tmp_path, capsys):
    images = study_images()
    for role in moved:
        affine = images[role].affine.copy()
        affine[2, 3] += 400
        images[role] = nibabel.Nifti1Image(np.asanyarray(images[role].dataobj), affine)
    write_zip(tmp_path / "p.zip", {A: images})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL) == 3
    assert words in capsys.readouterr().err


def test_what_the_zip_tells_already_is_told_once(tmp_path, capsys):
    images = study_images()
    everything = np.ones(images["mask"].shape, np.uint8)
    images["mask"] = nibabel.Nifti1Image(everything, images["mask"].affine)
    write_zip(tmp_path / "p.zip", {A: images})
    run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL)
    (implausible,) = (text for text in told(tmp_path / "o.h5") if "implausible volume" in text)
    capsys.readouterr()
    write_zip(tmp_path / "p.zip", {A: images}, records={A: {"warnings": [implausible]}})
    run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL)
    assert told(tmp_path / "o.h5").count(implausible) == 1
    assert "implausible" not in capsys.readouterr().err


# --- runs ------------------------------------------------------------------------------------


def test_any_zip_with_members_so_named_is_taken(tmp_path, capsys):
    incomplete = study_images(2)
    del incomplete["mask"]
    write_zip(tmp_path / "p.zip", {A: study_images(), C: incomplete}, folder="")
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL) == 0
    out, err = capsys.readouterr()
    expected = "2 studies: 1 written, 0 unchanged, 1 skipped, 0 failed"
    assert out == f"{expected} -> {tmp_path / 'o.h5'}\n"
    assert f"{C}: skipped, no mask" in err
    assert {key for _, key in content(tmp_path / "o.h5")} == {A}


def test_one_bad_study_does_not_stop_the_others(tmp_path, capsys):
    bad = study_images(2)
    flat = bad["petsuv"].get_fdata().astype(np.float32)
    flat[0, 0, 0] = np.nan
    bad["petsuv"] = nibabel.Nifti1Image(flat, bad["petsuv"].affine)
    write_zip(tmp_path / "p.zip", {A: study_images(), B: bad})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL) == 3
    out, err = capsys.readouterr()
    assert "2 studies: 1 written, 0 unchanged, 0 skipped, 1 failed" in out
    assert f"error: {B}: the PET holds values that are not finite" in err
    assert {key for _, key in content(tmp_path / "o.h5")} == {A}


def test_rerun_computes_what_is_new_or_changed_and_drops_what_is_gone(tmp_path, capsys):
    zip_path, output = tmp_path / "p.zip", tmp_path / "o.h5"

    def summary(studies, *options):
        write_zip(zip_path, studies)
        assert run(zip_path, output, *SMALL, *options) == 0
        out, err = capsys.readouterr()
        return out.partition(": ")[2].partition(" ->")[0], err

    first, second, third = (study_images(seed) for seed in range(3))
    assert summary({A: first})[0] == "1 written, 0 unchanged, 0 skipped, 0 failed"
    before = output.stat()
    assert summary({A: first})[0] == "0 written, 1 unchanged, 0 skipped, 0 failed"
    assert (output.stat().st_ino, output.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert summary({A: first, B: second})[0] == "1 written, 1 unchanged, 0 skipped, 0 failed"
    assert summary({A: third, B: second})[0] == "1 written, 1 unchanged, 0 skipped, 0 failed"
    text, err = summary({B: second})
    assert text == "0 written, 1 unchanged, 0 skipped, 0 failed"
    assert A in err
    assert {key for _, key in content(output)} == {B}
    other = summary({B: second}, "--iso-threshold", 41)[0]
    assert other == "1 written, 0 unchanged, 0 skipped, 0 failed"
    forced = summary({B: second}, "--iso-threshold", 41, "--force")[0]
    assert forced == "1 written, 0 unchanged, 0 skipped, 0 failed"


def test_nifti_of_a_study_that_is_gone_or_fails_leaves_its_folder(tmp_path, capsys):
    zip_path, folder = tmp_path / "p.zip", tmp_path / "nifti"
    options = (tmp_path / "o.h5", *SMALL, "--save-nifti", folder)
    write_zip(zip_path, {A: study_images(0), B: study_images(1), "c" * 10: study_images(2)})
    assert run(zip_path, *options) == 0
    (folder / f"{A}_notes.nii.gz").touch()
    broken = {**study_images(1), "petsuv": image(np.full((4, 4, 4), np.nan), (4, 4, 4))}
    write_zip(zip_path, {B: broken, "c" * 10: study_images(2)})
    assert run(zip_path, *options) == 3
    left = [f"{'c' * 10}_{name}.nii.gz" for name in ("ct", "mask", "mask_iso", "petsuv")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{A}_notes.nii.gz", *left])
    said = capsys.readouterr().err
    assert f"{A}_ct.nii.gz" in said


def test_missing_nifti_is_written_again(one_zip, tmp_path, capsys):
    arguments = [one_zip, tmp_path / "o.h5", *SMALL, "--save-nifti", tmp_path / "n"]
    run(*arguments)
    (tmp_path / "n" / f"{A}_ct.nii.gz").unlink()
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "1 written, 0 unchanged" in capsys.readouterr().out
    assert (tmp_path / "n" / f"{A}_ct.nii.gz").exists()


def test_jobs_and_order_of_members_do_not_change_a_byte(tmp_path):
    studies = {key: study_images(seed) for seed, key in enumerate((A, B, C))}
    write_zip(tmp_path / "p.zip", studies)
    write_zip(tmp_path / "q.zip", dict(reversed(studies.items())))
    run(tmp_path / "p.zip", tmp_path / "one.h5", *SMALL)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, ROOT / "preprocessing.py", tmp_path / "q.zip", *SMALL, "-j", "3"]
    subprocess.run([*command, "-o", tmp_path / "three.h5"], env=environment, check=True)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "three.h5").read_bytes()


def test_profile_tells_the_seconds_of_each_step(one_zip, tmp_path, capsys):
    run(one_zip, tmp_path / "o.h5", *SMALL, "--profile")
    err = capsys.readouterr().err
    for step in ("reading", "resampling", "isocontour", "measures", "writing"):
        assert f"{step} 0." in err


WRONG = {
    "spacing": ["--spacing", "2", "0", "3"],
    "spacing of letters": ["--spacing", "2", "x", "3"],
    "spacing not finite": ["--spacing", "2", "nan", "3"],
    "shape": ["--shape", "200", "0"],
    "shape of one": ["--shape", "200"],
    "shape of four": ["--shape", "2", "2", "2", "2"],
    "orientation": ["--orientation", "LAA"],
    "align": ["--align", "middle"],
    "range upside down": ["--ct-range", "1000", "-1000"],
    "range of nothing": ["--suv-range", "1", "1"],
    "threshold": ["--iso-threshold", "101"],
    "threshold below zero": ["--iso-threshold", "-1"],
    "fixed threshold": ["--iso-suv", "-1"],
    "dtype": ["--dtype", "float64"],
    "compression": ["--compression", "zip"],
    "jobs": ["--jobs", "0"],
    "shard": ["--shard", "3/2"],
    "measures in no folder": ["--measures", "nowhere/m.csv"],
    "mistyped": ["--spacng", "2", "2", "3"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_end_with_status_2_before_any_work(name, one_zip, tmp_path, capsys):
    with pytest.raises(SystemExit) as ending:
        run(one_zip, tmp_path / "o.h5", *WRONG[name])
    assert ending.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.zip"]


def test_what_is_no_zip_leaves_the_old_output(one_zip, tmp_path, capsys):
    output = tmp_path / "o.h5"
    run(one_zip, output, *SMALL)
    before = output.read_bytes()
    one_zip.write_bytes(one_zip.read_bytes()[:2000])
    capsys.readouterr()
    assert run(one_zip, output, *SMALL) == 1
    assert "not a zip file, or truncated" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_zip_without_a_study_is_refused(tmp_path, capsys):
    write_zip(tmp_path / "p.zip", {}, records={})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5") == 1
    assert "no study in it" in capsys.readouterr().err


def test_a_zip_whose_studies_all_failed_says_which_and_why(tmp_path, capsys):
    reasons = [f"no body weight {n} (PatientWeight (0010,1030)): add it" for n in range(4)]
    absent = {f"aaaaaaa00{n}": ("failed", reason) for n, reason in enumerate(reasons)}
    project_zip.assemble(tmp_path / "p.zip", {}, "p", absent=absent)
    assert run(tmp_path / "p.zip", tmp_path / "o.h5") == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'p.zip'}: no study in it, for createproject.py wrote none of "
        "4 studies: " + "; ".join(f"aaaaaaa00{n} failed, {reasons[n]}" for n in range(3)) + " ...\n"
    )
    assert not (tmp_path / "o.h5").exists()


def test_foreign_records_do_no_harm(tmp_path):
    record = {"shapes": "large", "suv": {"weight_kg": "heavy"}, "warnings": [{"a": 1}, 2]}
    write_zip(tmp_path / "p.zip", {A: study_images()}, records={A: record})
    table = tmp_path / "m.csv"
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL, "--measures", table) == 0


def test_floating_point_ct_and_labels_of_any_type_are_taken(tmp_path):
    images = study_images()
    labels = images["mask"].get_fdata()
    images["ct"] = image(images["ct"].get_fdata().astype(np.float32) + 0.25, (1.5, 1.5, 2.0))
    images["mask"] = nibabel.Nifti1Image((labels * 300).astype(np.uint16), images["mask"].affine)
    write_zip(tmp_path / "p.zip", {A: images})
    assert run(tmp_path / "p.zip", tmp_path / "o.h5", *SMALL, "--dtype=float32") == 0
    assert_equals_plain(tmp_path / "o.h5", A, images, shape=(30, 28))
