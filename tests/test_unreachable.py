"""What can't be looked at is no study that vanished: its earlier result stays, or the run ends."""

import os
import random
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import layouts
import pytest
from failing_reads import failing
from tiny_studies import write_raw

import createproject
from common import project_zip
from common.errors import Unreachable, UnreachableStudy
from common.run.worker import Job

EVERY = os.environ.get("TUMORVOLUME_FAULTS") == "all"
SAMPLE = 16
"""Calls that fail, each in a run of its own, where not all are tried."""

pytestmark = pytest.mark.timeout(3600 if EVERY else 240)


def convert(folder: Path, *options: str) -> int:
    """Convert folder/raw to folder/project.zip."""
    output = folder / "project.zip"
    try:
        return createproject.main([str(folder / "raw"), "-o", str(output), "-j1", *options])
    except SystemExit as end:
        return end.code


def members(path: Path) -> dict[str, bytes]:
    """Images in a zip by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.endswith(".gz")}


@pytest.fixture
def nightly(tmp_path) -> Path:
    """A folder with a raw project and the zip of it, but for a change: two studies were made.

    One of these has been touched since then, and a third study is new.
    """
    write_raw(tmp_path / "raw")
    shutil.move(tmp_path / "raw" / "seg", tmp_path / "new")
    assert convert(tmp_path) == 0
    shutil.move(tmp_path / "new", tmp_path / "raw" / "seg")
    os.utime(next((tmp_path / "raw" / "rtstruct").rglob("*.dcm")))
    return tmp_path


def test_whichever_look_fails_once_no_study_is_lost_and_none_is_made_of_less(nightly, capfd):
    """In 36 of 646 runs a study, or a slice of its PET, was missing, and the status was 0."""
    before = {
        name: (nightly / name).read_bytes() for name in ("project.zip", "project_mapping.csv")
    }
    with failing(nightly / "raw", 0) as calls:
        assert convert(nightly) == 0
        n_calls = calls.value
    whole = members(nightly / "project.zip")
    for name, content in before.items():
        (nightly / name).write_bytes(content)
    held = members(nightly / "project.zip")
    assert (len(whole), len(held)) == (9, 6)
    every = range(1, n_calls + 1)
    for call in every if EVERY else sorted(random.Random(0).sample(every, SAMPLE)):
        for name, content in before.items():
            (nightly / name).write_bytes(content)
        capfd.readouterr()
        with failing(nightly / "raw", call):
            status = convert(nightly)
        log = capfd.readouterr().err
        made = members(nightly / "project.zip")
        # 2: before any work.
        assert status in (0, 1, 2, 3), call
        assert ("error: " in log) == (status != 0), call
        if status == 0:
            assert made == whole, call
        elif status < 3:
            assert (nightly / "project.zip").read_bytes() == before["project.zip"], call
        else:
            assert held.items() <= made.items() <= whole.items(), call
            assert "is no longer in" not in log, call


# --- mounts that are gone --------------------------------------------------------------------


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder with a raw project of three studies and the zip of it."""
    write_raw(tmp_path / "raw")
    assert convert(tmp_path) == 0
    return tmp_path


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def leave_a_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("/nonexistent/mount")


def leave_links(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
            path.symlink_to("/nonexistent/mount")


@pytest.mark.parametrize("options", [(), ("--shard", "1/1"), ("--patient", "^[^/]*")])
@pytest.mark.parametrize(
    ("take_away", "what"),
    [
        (empty, "seg"),
        (empty, "seg/1"),
        (leave_a_link, "seg"),
        (leave_a_link, "seg/1"),
        (leave_links, "seg"),
    ],
)
def test_a_study_behind_a_mount_that_is_gone_stays(made, capfd, take_away, what, options):
    """One patient's folder on a dead mount took a finished study out of the zip, with status 0."""
    assert convert(made, *options, "--allow-shrink") == 0
    before, mapped = members(made / "project.zip"), rows_of_written(made)
    shutil.copytree(made / "raw" / "seg", made / "back")
    take_away(made / "raw" / what)
    capfd.readouterr()
    assert convert(made, *options) == 3
    assert members(made / "project.zip") == before
    assert "its earlier result stays in the output" in capfd.readouterr().err
    remove(made / "raw" / "seg")
    shutil.move(made / "back", made / "raw" / "seg")
    assert convert(made, *options) == 0
    assert members(made / "project.zip") == before
    assert rows_of_written(made) == mapped


def rows_of_written(folder: Path) -> list[str]:
    rows = (folder / "project_mapping.csv").read_text().splitlines()
    return [row for row in rows if ",written," in row]


def remove(path: Path) -> None:
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def test_a_study_whose_patient_is_removed_is_gone(made):
    shutil.rmtree(made / "raw" / "seg")
    assert convert(made) == 0
    assert len(members(made / "project.zip")) == 6


def test_an_empty_mount_of_the_whole_project_ends_the_run(made):
    before = (made / "project.zip").read_bytes()
    empty(made / "raw")
    assert convert(made) == 1
    assert (made / "project.zip").read_bytes() == before


def test_another_suv_type_is_not_mixed_with_what_stays(made, capfd):
    before = (made / "project.zip").read_bytes()
    empty(made / "raw" / "seg")
    assert convert(made, "--suv-type", "lbm-janma") == 1
    assert "holds them as other options make them" in capfd.readouterr().err
    assert (made / "project.zip").read_bytes() == before


def job_of(folder: Path) -> Job:
    """The first study's, as it is planned."""
    command = [str(folder / "raw"), "-o", str(folder / "p.zip"), "--name", "raw"]
    parser = createproject.build_parser()
    options = parser.parse_args(command)
    createproject.check_options(parser, options)
    [job, *_], _ = createproject.plan(createproject.pseudonymised(options, ()), options)
    return replace(job, part=folder / "part.zip")


@pytest.mark.parametrize("take_away", [shutil.rmtree, empty])
def test_a_worker_tells_the_project_that_is_gone_from_a_study_that_is(tmp_path, take_away):
    """Workers that did not see the input failed studies in an instant, and drained the queue."""
    write_raw(tmp_path / "raw")
    job = job_of(tmp_path)
    take_away(Path(job.work.folder.path))
    with pytest.raises(UnreachableStudy):
        createproject.convert_study(job)
    take_away(tmp_path / "raw")
    with pytest.raises(Unreachable, match="the raw project cannot be read any more"):
        createproject.convert_study(job)


@pytest.mark.parametrize("write_study", [layouts.write_case, layouts.write_bids])
def test_files_of_other_layouts_are_not_taken_for_absent(write_study, tmp_path, capfd):
    for name in ("sub-01", "sub-02"):
        write_study(tmp_path / "raw", name)
    options = ["--pet-units", "suv"] if write_study is layouts.write_case else []
    with failing(tmp_path / "raw", 0) as calls:
        assert convert(tmp_path, *options) == 0
        every = range(1, calls.value + 1)
    whole = (tmp_path / "project.zip").read_bytes()
    os.utime(next((tmp_path / "raw").rglob("sub-02*.nii.gz")))
    for call in every if EVERY else sorted(random.Random(1).sample(every, 8)):
        with failing(tmp_path / "raw", call):
            status = convert(tmp_path, *options)
        assert (tmp_path / "project.zip").read_bytes() == whole
        assert ("error: " in capfd.readouterr().err) == (status != 0)


# --- the zip ---------------------------------------------------------------------------------


def test_a_zip_on_a_disk_that_fails_is_not_called_damaged(made):
    """zipfile says "not a zip file", and the old output was made anew without what had failed."""
    path = made / "project.zip"
    with failing(path, 0) as calls:
        [study, *_] = project_zip.read_directory(path).values()
        every = range(1, calls.value + 1)
    for call in every:
        with failing(path, call), pytest.raises(Unreachable, match="Input/output error"):
            project_zip.read_directory(path)
    path.unlink()
    with pytest.raises(Unreachable, match="No such file"):
        project_zip.read_image(path, study, "ct")
