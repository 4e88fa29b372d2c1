"""What HDF5 files of others, damaged ones and newer ones may not do: hang, mix, or pass unseen."""

import json
import os
import shutil

import h5py
import project_zips
import pytest

import mergeh5
import preprocessing
import project_2d
from common.hdf5.studies import SCHEMA_VERSION

pytestmark = pytest.mark.timeout(300)
KEY = "aaaaaaa001"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    archive = project_zips.write_zip(folder / "p.zip", {KEY: project_zips.study_images()})
    small = ["--spacing", "4", "4", "4", "--shape", "16", "16"]
    assert preprocessing.main([str(archive), "-o", str(folder / "a.h5"), *small, "-j", "1"]) == 0
    return folder / "a.h5"


@pytest.fixture
def file(sound, tmp_path):
    return shutil.copy(sound, tmp_path / "a.h5")


def run_both(path, tmp_path, capfd):
    """Return the statuses of merging and projecting a file, and what is said."""
    capfd.readouterr()
    statuses = [
        mergeh5.main([str(path), "-o", str(tmp_path / "m.h5")]),
        project_2d.main([str(path), "-o", str(tmp_path / "p.h5"), "--angles", "0", "90", "45"]),
    ]
    assert not (tmp_path / "m.h5").exists()
    assert not (tmp_path / "p.h5").exists()
    return statuses, capfd.readouterr().err


@pytest.mark.parametrize("group", ["image", "mask", "mask_iso"])
def test_a_group_that_is_a_link_to_a_pipe_is_refused_not_waited_for(file, group, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(file, "r+") as opened:
        del opened[group]
        opened[group] = h5py.ExternalLink(str(tmp_path / "pipe"), f"/{group}")
    statuses, said = run_both(file, tmp_path, capfd)
    assert statuses == [1, 1]
    assert "links in place of groups" in said


def test_an_index_of_an_index_takes_no_file_of_the_working_directory(
    file, tmp_path, capfd, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    first, second = tmp_path / "here" / "one.h5", tmp_path / "here" / "two.h5"
    moved = shutil.move(file, tmp_path / "here" / "a.h5")
    assert mergeh5.main([str(moved), "-o", str(first), "--link"]) == 0
    assert mergeh5.main([str(first), "-o", str(second), "--link"]) == 0
    shutil.move(moved, tmp_path / "elsewhere" / "a.h5")
    monkeypatch.chdir(tmp_path / "elsewhere")
    statuses, said = run_both(second, tmp_path, capfd)
    assert statuses == [1, 1]
    assert "not there" in said


def test_a_flipped_bit_in_the_parameters_is_not_signed_anew(file, tmp_path, capfd):
    with h5py.File(file, "r+") as opened:
        parameters = json.loads(opened.attrs["parameters"])
        parameters["align"] = "cenuer"
        opened.attrs["parameters"] = json.dumps(parameters, sort_keys=True)
    statuses, said = run_both(file, tmp_path, capfd)
    assert statuses == [1, 1]
    assert "differ from their checksum" in said


def test_a_key_that_would_command_a_terminal_is_refused(file, tmp_path, capfd):
    with h5py.File(file, "r+") as opened:
        for group in ("image", "mask", "mask_iso"):
            opened.move(f"{group}/{KEY}", f"{group}/a\x1b[2Ja\nb")
    statuses, said = run_both(file, tmp_path, capfd)
    assert statuses == [1, 1]
    assert "\x1b" not in said
    assert said.count("\n") == 2


def test_a_file_of_a_newer_schema_is_refused_and_says_so(sound, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("common.hdf5.studies.SCHEMA_VERSION", SCHEMA_VERSION - 1)
    statuses, said = run_both(sound, tmp_path, capfd)
    assert statuses == [1, 1]
    assert f"schema_version {SCHEMA_VERSION}" in said
    assert "newer version" in said


def test_a_file_replaced_while_it_is_projected_gives_no_mixture(file, tmp_path, capfd, monkeypatch):
    archive = project_zips.write_zip(tmp_path / "p.zip", {KEY: project_zips.study_images()})
    other = tmp_path / "other.h5"
    darker = ["--spacing", "4", "4", "4", "--shape", "16", "16", "--suv-range", "0", "80"]
    assert preprocessing.main([str(archive), "-o", str(other), *darker]) == 0
    plan = project_2d.plan

    def plan_and_replace(*arguments):
        planned = plan(*arguments)
        os.replace(other, file)
        return planned

    monkeypatch.setattr(project_2d, "plan", plan_and_replace)
    output = tmp_path / "p.h5"
    assert project_2d.main([str(file), "-o", str(output), "--angles", "0", "90", "45"]) == 1
    assert "made anew since this run began" in capfd.readouterr().err
    assert not output.exists()


def test_a_stack_has_one_spacing(sound, tmp_path, capfd):
    archive = project_zips.write_zip(
        tmp_path / "p.zip", {"bbbbbbb002": project_zips.study_images()}
    )
    coarse = ["--spacing", "5", "5", "5", "--shape", "16", "16"]
    assert preprocessing.main([str(archive), "-o", str(tmp_path / "b.h5"), *coarse]) == 0
    both = tmp_path / "both.h5"
    assert mergeh5.main([str(sound), str(tmp_path / "b.h5"), "-o", str(both), "--allow-mixed"]) == 0
    assert project_2d.main([str(both), "-o", str(tmp_path / "p.h5"), "--stack"]) == 1
    assert "several spacings ([4.0, 4.0, 4.0], [5.0, 5.0, 5.0] mm)" in capfd.readouterr().err


def test_projections_about_another_axis_than_the_bodys_are_told(tmp_path, capfd):
    archive = project_zips.write_zip(tmp_path / "p.zip", {KEY: project_zips.study_images()})
    turned = ["--orientation", "PIR", "--spacing", "4", "4", "4", "--shape", "16", "16"]
    assert preprocessing.main([str(archive), "-o", str(tmp_path / "a.h5"), *turned]) == 0
    assert project_2d.main([str(tmp_path / "a.h5"), "-o", str(tmp_path / "p.h5")]) == 0
    assert f"{KEY}: the third axis of its orientation PIR" in capfd.readouterr().err
