"""mergeh5.py --export-nnunet: the values, the grid, the folds, and nnU-Net's own check of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from project_zips import study_images, write_zip

import mergeh5
import preprocessing
import project_2d

A, B, C, D = "aaaaaaa001", "aaaaaaa002", "ccccccc003", "ddddddd004"
HALF_STEP = 2.0**-12
"""By which a value from 0.5 to 1 may be off in float16."""


def run(*arguments):
    return mergeh5.main([str(argument) for argument in (*arguments, "-j", 1)])


def make(path, studies, *options):
    """A 3D file of images by hash, and the same images as NIfTI in a folder beside it."""
    archive = write_zip(path.with_suffix(".zip"), studies)
    command = [archive, "-o", path, "-q", "-j", 1, "--shape", 20, 18, *options]
    command += ["--save-nifti", path.with_suffix("")]
    assert preprocessing.main([str(argument) for argument in command]) == 0
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A 3D file of three patients; never written to."""
    studies = {key: study_images(seed) for seed, key in enumerate((A, B, C, D))}
    return make(tmp_path_factory.mktemp("made") / "four.h5", studies)


@pytest.fixture
def exported(made, tmp_path):
    """The file merged and exported as dataset 7, and the dataset's folder."""
    source = Path(shutil.copy(made, tmp_path / "four.h5"))
    arguments = [source, "-o", tmp_path / "all.h5", "--export-nnunet", tmp_path / "raw"]
    assert run(*arguments, "--dataset-id", 7) == 0
    return source, [*arguments, "--dataset-id", 7], tmp_path / "raw" / "Dataset007_all"


def read(path):
    image = nibabel.load(path)
    return np.asanyarray(image.dataobj), image.affine


def described(folder):
    return json.loads((folder / "dataset.json").read_text())


def cases_in(folder):
    labels = {path.name.removesuffix(".nii.gz") for path in (folder / "labelsTr").iterdir()}
    images = {path.name for path in (folder / "imagesTr").iterdir()}
    assert images == {f"{key}_000{channel}.nii.gz" for key in labels for channel in (0, 1)}
    assert described(folder)["numTraining"] == len(labels)
    return labels


def test_images_are_hu_and_suv_on_the_training_grid(exported, made):
    _, _, folder = exported
    assert cases_in(folder) == {A, B, C, D}
    for key in (A, C):
        for name, wanted, tolerance in (
            (f"imagesTr/{key}_0000", "ct", 2000 * HALF_STEP),
            (f"imagesTr/{key}_0001", "petsuv", 40 * HALF_STEP),
            (f"labelsTr/{key}", "mask", 0),
        ):
            values, affine = read(folder / f"{name}.nii.gz")
            expected, grid = read(made.with_suffix("") / f"{key}_{wanted}.nii.gz")
            least, greatest = {"ct": (-1000, 1000), "petsuv": (0, 40)}.get(wanted, (0, 1))
            np.testing.assert_allclose(values, expected.clip(least, greatest), atol=tolerance)
            np.testing.assert_allclose(affine, grid, atol=1e-4)


def test_dataset_json_says_what_nnunet_asks_for(exported):
    _, _, folder = exported
    said = described(folder)
    assert said["channel_names"] == {"0": "CT", "1": "CT"}
    assert said["labels"] == {"background": 0, "tumour": 1}
    assert (said["file_ending"], said["name"]) == (".nii.gz", "Dataset007_all")
    assert set(said["cases"]) == {A, B, C, D}


def test_folds_hold_whole_patients(exported):
    _, arguments, folder = exported
    folds = json.loads((folder / "splits_final.json").read_text())
    assert len(folds) == 3
    assert sorted(key for fold in folds for key in fold["val"]) == [A, B, C, D]
    for fold in folds:
        assert not {key[:7] for key in fold["train"]} & {key[:7] for key in fold["val"]}
    assert run(*arguments, "--splits", 2) == 0
    lists = arguments[2].with_name("splits_final.json")
    assert (folder / "splits_final.json").read_bytes() == lists.read_bytes()
    assert len(json.loads(lists.read_text())) == 2


def test_one_patient_makes_no_folds(made, tmp_path, capsys):
    alone = make(tmp_path / "alone.h5", {A: study_images(0), B: study_images(1)})
    assert run(alone, "-o", tmp_path / "all.h5", "--export-nnunet", tmp_path / "raw") == 0
    assert "warning: one patient alone makes no folds" in capsys.readouterr().err
    assert not (tmp_path / "raw/Dataset001_all/splits_final.json").exists()


def test_label_values_become_consecutive_classes(tmp_path):
    studies = {}
    for seed, (key, values) in enumerate({A: (3, 7), C: (7, 300)}.items()):
        images = study_images(seed)
        mask = np.asanyarray(images["mask"].dataobj)
        raised = np.array([0, *values], np.uint16)[mask]
        studies[key] = {**images, "mask": nibabel.Nifti1Image(raised, images["mask"].affine)}
    source = make(tmp_path / "labels.h5", studies, "--labels", "keep")
    assert run(source, "-o", tmp_path / "all.h5", "--export-nnunet", tmp_path / "raw") == 0
    folder = tmp_path / "raw/Dataset001_all"
    assert described(folder)["labels"] == {
        "background": 0, "label 3": 1, "label 7": 2, "label 300": 3,
    }  # fmt: skip
    class_of = {0: 0, 3: 1, 7: 2, 300: 3}
    for key in (A, C):
        classes, _ = read(folder / f"labelsTr/{key}.nii.gz")
        with h5py.File(source) as file:
            expected = np.vectorize(class_of.get)(file["mask"][key][0])
        assert len(np.unique(classes)) == 3
        np.testing.assert_array_equal(classes, expected)


def test_a_second_export_writes_what_has_changed_alone(exported, tmp_path):
    source, arguments, folder = exported

    def times():
        return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}

    before = times()
    (folder / "imagesTr" / f".{D}_0000.nii.tmp.gz").touch()
    (folder / "labelsTr" / f"{C}.nii.gz").unlink()
    assert run(*arguments) == 0
    again = times()
    assert {name for name in again if again[name] != before.get(name)} == {
        f"{C}.nii.gz", f"{C}_0000.nii.gz", f"{C}_0001.nii.gz",
    }  # fmt: skip
    make(source, {A: study_images(0), D: study_images(9)}, "--allow-shrink")
    assert run(*arguments, "--allow-shrink") == 0
    assert cases_in(folder) == {A, D}
    assert times()[f"{A}_0001.nii.gz"] == before[f"{A}_0001.nii.gz"]
    assert times()[f"{D}_0001.nii.gz"] != before[f"{D}_0001.nii.gz"]


def test_a_damaged_study_is_left_out(made, tmp_path, capsys):
    source = Path(shutil.copy(made, tmp_path / "four.h5"))
    with h5py.File(source, "r+") as file:
        file["image"][C][0, 3, 3, 3] = 1 - file["image"][C][0, 3, 3, 3]
    assert run(source, "-o", tmp_path / "all.h5", "--export-nnunet", tmp_path / "raw") == 3
    out, err = capsys.readouterr()
    assert "4 studies: 3 written, 0 unchanged, 0 skipped, 1 failed" in out
    assert f"error: {C}: image is damaged in the HDF5 file" in err
    folder = tmp_path / "raw/Dataset001_all"
    assert cases_in(folder) == {A, B, D}
    assert C not in (folder / "splits_final.json").read_text()


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ("Dataset001_other/dataset.json", "has the number 1 already"),
        ("Dataset001_all/dataset.json", "is a dataset of another make"),
        ("Dataset001_all/imagesTr/liver_0000.nii.gz", "is a dataset of another make"),
    ],
)
def test_a_dataset_of_another_make_is_left_alone(there, reason, made, tmp_path, capsys):
    path = tmp_path / "raw" / there
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    output = tmp_path / "all.h5"
    output.write_bytes(b"old")
    assert run(made, "-o", output, "--export-nnunet", tmp_path / "raw") == 1
    error = capsys.readouterr().err
    assert reason in error
    assert "--dataset-id N" in error
    assert output.read_bytes() == b"old"
    assert [each for each in (tmp_path / "raw").rglob("*") if each.is_file()] == [path]


def test_projections_are_no_volumes(made, tmp_path, capsys):
    flat = tmp_path / "flat.h5"
    command = [made, "-o", flat, "-q", "-j", 1, "--angles", 0, 180, 90]
    assert project_2d.main([str(argument) for argument in command]) == 0
    assert run(flat, "-o", tmp_path / "all.h5", "--export-nnunet", tmp_path / "raw") == 1
    assert "need 3D files, not 2D ones: give files of preprocessing.py" in capsys.readouterr().err


def tilted(image):
    """The same voxels under a gantry tilt of 20 degrees."""
    affine = image.affine.astype(float)
    affine[1, 2] += np.tan(np.radians(20)) * affine[2, 2]
    return nibabel.Nifti1Image(np.asanyarray(image.dataobj), affine)


@pytest.fixture
def sheared(tmp_path):
    """An exported file, whose second CT has a gantry tilt."""
    studies = {A: study_images(0), C: {role: tilted(i) for role, i in study_images(1).items()}}
    source = make(tmp_path / "tilted.h5", studies)
    assert run(source, "-o", tmp_path / "all.h5", "--export-nnunet", tmp_path / "raw") == 0
    return source


def test_sheared_grids_are_read_by_nibabel(sheared, tmp_path):
    """nnU-Net would read them by ITK, which refuses them, or not, as the first case is."""
    folder = tmp_path / "raw/Dataset001_all"
    assert described(folder)["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    _, affine = read(folder / f"labelsTr/{C}.nii.gz")
    with h5py.File(sheared) as file:
        np.testing.assert_allclose(affine, file["mask"][C].attrs["affine"], atol=1e-4)


def test_nnunet_reads_sheared_grids(sheared, tmp_path):
    check_by_nnunet(tmp_path, 1)


def test_nnunet_finds_the_dataset_sound(exported, tmp_path):
    """Its planner reads every file, and chooses how each channel is scaled."""
    plans = check_by_nnunet(tmp_path, 7)
    full = plans["configurations"]["3d_fullres"]
    assert full["normalization_schemes"] == ["CTNormalization", "CTNormalization"]
    assert full["spacing"] == [3.0, 2.0, 2.0]
    [folds] = (tmp_path / "preprocessed").glob("*/splits_final.json")
    assert folds.read_bytes() == (tmp_path / "raw/Dataset007_all/splits_final.json").read_bytes()


def test_the_commands_on_the_page_export_what_nnunet_plans(made, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/training.md").read_text()
    export, plan, *_ = page.split("## nnU-Net\n")[1].split("```sh\n")[1].splitlines()
    other = make(tmp_path / "breast_3d.h5", {"eeeeeee005": study_images(5)})
    shutil.copy(made, tmp_path / "lung_3d.h5")
    assert other.exists()
    monkeypatch.chdir(tmp_path)
    assert mergeh5.main([word.replace("nnUNet_raw", "raw") for word in export.split()[2:]]) == 0
    name, _, number, *options = plan.split()
    assert (name, options) == ("nnUNetv2_plan_and_preprocess", ["--verify_dataset_integrity"])
    check_by_nnunet(tmp_path, int(number))


def check_by_nnunet(folder, number):
    """Have nnU-Net check a dataset in folder/raw, and return its plans."""
    here = Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")
    planner = here if here.exists() else shutil.which("nnUNetv2_plan_and_preprocess")
    if planner is None:
        pytest.skip("nnU-Net is not installed: pip install nnunetv2")
    folders = {f"nnUNet_{name}": str(folder / name) for name in ("preprocessed", "results")}
    done = subprocess.run(
        [planner, "-d", str(number), "--verify_dataset_integrity", "--no_pp", "-npfp", "1"],
        env={**os.environ, **folders, "nnUNet_raw": str(folder / "raw")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "verify_dataset_integrity Done." in done.stdout
    for word in ("WARNING", "Warning", "Error", "mismatch"):
        assert word not in done.stdout
    [plans] = (folder / "preprocessed").glob("*/nnUNetPlans.json")
    return json.loads(plans.read_text())
