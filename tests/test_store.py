"""--store: an output that is an index of links to a file a study, and grows by what is new.

It holds what one file would; only what is new is written; killed at any moment it is the old one
or the new one, whole.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import project_zips
import pytest
from stages import (
    PATIENCE_S,
    SMALL,
    Files,
    Stage,
    contents,
    finished,
    members,
    n_to_compute,
    prepared,
    start,
    wait_for_orphans,
    with_other_options,
    write_inputs,
)

import mergeh5
import preprocessing
import project_2d
from common.hashing import array_digest

GROUPS = ("image", "mask", "mask_iso")
KILLS = 6 * int(os.environ.get("TUMORVOLUME_STRESS", "1"))
STORE = ("--store", "out/studies")

STORED = {
    stage.name: stage
    for stage in (
        Stage(
            preprocessing.main,
            ("p.zip",),
            "out/p.h5",
            (*SMALL, *STORE, "--measures", "out/m.csv", "--save-nifti", "out/nii"),
            (*SMALL, *STORE, "--iso-threshold", "50"),
        ),
        Stage(
            project_2d.main,
            ("a.h5",),
            "out/mips.h5",
            ("--angles", "0", "180", "60", *STORE, "--png", "out/png"),
            ("--angles", "0", "180", "90", *STORE),
        ),
    )
}


@pytest.fixture(scope="module")
def images():
    small = {"ct_shape": (14, 14, 12), "pet_shape": (12, 12, 12)}
    return [project_zips.study_images(seed, **small) for seed in range(6)]


@pytest.fixture
def archive(tmp_path, images) -> Path:
    return zip_of(tmp_path / "p.zip", dict(enumerate(images[:4])))


def zip_of(path: Path, images) -> Path:
    return project_zips.write_zip(path, {f"{n:010x}": found for n, found in images.items()})


def preprocess(archive: Path, output: Path, *more: object) -> int:
    grid = ["--spacing", "4", "4", "4", "--shape", "8", "8", "-j", "1"]
    return preprocessing.main([str(archive), "-o", str(output), *grid, *map(str, more)])


def datasets(path: Path) -> dict[str, tuple]:
    """Each dataset's values, attributes, chunks and filters, as plain h5py gives them."""
    found = {}
    with h5py.File(path) as file:
        for group in GROUPS:
            for key, dataset in file[group].items():
                attributes = {
                    name: np.array(value).tolist() for name, value in dataset.attrs.items()
                }
                layout = dataset.chunks, dataset.compression, dataset.shuffle, dataset.dtype
                found[f"{group}/{key}"] = dataset[()].tobytes(), attributes, layout
                assert array_digest(dataset[()]) == dataset.attrs["sha256"]
        found["file"] = dict(file.attrs)
    return found


def linked(index: Path) -> dict[str, Path]:
    """Which file each key of an index is linked to."""
    with h5py.File(index) as file:
        links = {key: file["image"].get(key, getlink=True) for key in file["image"]}
    return {key: (index.parent / link.filename).resolve() for key, link in links.items()}


def versions(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells a file from one that is written anew, of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def written_since(before, folder: Path) -> set[Path]:
    return {path for path, version in versions(folder).items() if before.get(path) != version}


# --- what it holds ---------------------------------------------------------------------------


def test_an_index_holds_what_one_file_holds_and_becomes_one(archive, tmp_path):
    one, index, merged = (tmp_path / name for name in ("one.h5", "index.h5", "merged.h5"))
    assert preprocess(archive, one) == 0
    assert preprocess(archive, index, "--store", tmp_path / "studies") == 0
    assert datasets(index) == datasets(one)
    assert index.stat().st_size < one.stat().st_size / 2
    assert mergeh5.main([str(index), "-o", str(merged)]) == 0
    assert merged.read_bytes() == one.read_bytes()
    assert mergeh5.main(["--verify", str(index)]) == 0


def test_measures_and_report_are_those_of_one_file(archive, tmp_path):
    found = []
    for name, more in (("one", ()), ("index", ("--store", tmp_path / "studies"))):
        (tmp_path / name).mkdir()
        beside = [tmp_path / name / f for f in ("m.csv", "r.html")]
        options = [*more, "--measures", beside[0], "--report", beside[1]]
        assert preprocess(archive, tmp_path / name / "p.h5", *options) == 0
        found.append([path.read_bytes() for path in beside])
    assert found[0] == found[1]


def test_bytes_do_not_depend_on_jobs_interruption_or_history(archive, images, tmp_path):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    for folder, several in ((whole, [4]), (grown, [1, 3, 4])):
        folder.mkdir()
        for n in several:
            zip_of(archive, dict(enumerate(images[:n])))
            jobs = "2" if folder == grown else "1"
            options = "--store", folder / "studies", "-j", jobs
            assert preprocess(archive, folder / "p.h5", *options) == 0
    assert contents(whole) == contents(grown)


def test_index_and_store_move_together_and_open_from_anywhere(archive, tmp_path, monkeypatch):
    made, moved = tmp_path / "made", tmp_path / "moved"
    made.mkdir()
    assert preprocess(archive, made / "p.h5", "--store", made / "studies") == 0
    before = datasets(made / "p.h5")
    made.rename(moved)
    monkeypatch.chdir("/")
    assert datasets(moved / "p.h5") == before
    (tmp_path / "link.h5").symlink_to(moved / "p.h5")
    assert datasets(tmp_path / "link.h5") == before
    as_they_were = versions(moved)
    assert preprocess(archive, tmp_path / "link.h5", "--store", moved / "studies") == 0
    assert versions(moved) == as_they_were


def test_links_to_an_index_lead_to_the_files_of_its_studies(archive, tmp_path):
    index, again = tmp_path / "index.h5", tmp_path / "elsewhere" / "all.h5"
    again.parent.mkdir()
    assert preprocess(archive, index, "--store", tmp_path / "studies") == 0
    assert mergeh5.main([str(index), "-o", str(again), "--link"]) == 0
    assert linked(again) == linked(index)
    index.unlink()
    assert len(datasets(again)) == 4 * 3 + 1


def project(source: Path, output: Path, *more: object) -> int:
    arguments = [source, "-o", output, "--angles", 0, 180, 60, "-j", 1, *more]
    return project_2d.main([*map(str, arguments)])


def test_projections_of_an_index_are_those_of_one_file_and_so_is_their_index(archive, tmp_path):
    one, volumes = tmp_path / "one_3d.h5", tmp_path / "volumes.h5"
    assert preprocess(archive, one) == 0
    assert preprocess(archive, volumes, "--store", tmp_path / "volumes") == 0
    whole, mips, merged = (tmp_path / name for name in ("one.h5", "mips.h5", "merged.h5"))
    assert project(one, whole) == 0
    assert project(volumes, mips, "--store", tmp_path / "mips") == 0
    assert mips.with_suffix(".csv").read_bytes() == whole.with_suffix(".csv").read_bytes()
    assert datasets(mips) == datasets(whole)
    assert mergeh5.main([str(mips), "-o", str(merged)]) == 0
    assert merged.read_bytes() == whole.read_bytes()
    assert mergeh5.main(["--verify", str(mips)]) == 0


def test_one_more_of_an_index_of_projections_writes_one_file(archive, images, tmp_path, capsys):
    source, out = tmp_path / "3d.h5", tmp_path / "out"
    out.mkdir()
    store = "--store", out / "mips"
    assert preprocess(archive, source) == 0
    assert project(source, out / "mips.h5", *store) == 0
    before = versions(out)
    assert project(source, out / "mips.h5", *store) == 0
    assert versions(out) == before
    zip_of(archive, dict(enumerate(images[:5])))
    assert preprocess(archive, source) == 0
    capsys.readouterr()
    assert project(source, out / "mips.h5", *store) == 0
    assert "5 studies: 1 written, 4 unchanged" in capsys.readouterr().out
    [new] = {*linked(out / "mips.h5").values()} - before.keys()
    assert written_since(before, out) == {out / "mips.h5", out / "mips.csv", new}


def test_a_stack_has_no_store(archive, tmp_path, capsys):
    assert preprocess(archive, tmp_path / "3d.h5") == 0
    with pytest.raises(SystemExit) as end:
        project(tmp_path / "3d.h5", tmp_path / "2d.h5", "--stack", "--store", tmp_path / "mips")
    assert "leave out one" in refused(end.value.code, capsys)


# --- what is written -------------------------------------------------------------------------


@pytest.fixture
def stored(archive, tmp_path):
    """A folder with an index of four studies, and the function that runs that again."""
    folder = tmp_path / "out"
    folder.mkdir()
    run = functools.partial(preprocess, archive, folder / "p.h5", "--store", folder / "studies")
    assert run() == 0
    return folder, run


def test_nothing_new_writes_nothing(stored):
    folder, run = stored
    before = versions(folder)
    assert run() == 0
    assert versions(folder) == before


def test_one_more_writes_one_file_and_the_index(stored, archive, images, capsys):
    folder, run = stored
    before = versions(folder)
    zip_of(archive, dict(enumerate(images[:5])))
    assert run() == 0
    assert "5 studies: 1 written, 4 unchanged" in capsys.readouterr().out
    [new] = {*linked(folder / "p.h5").values()} - before.keys()
    assert written_since(before, folder) == {folder / "p.h5", new}
    assert before.keys() <= versions(folder).keys()


def test_one_changed_writes_one_file_and_the_index_and_removes_its_old_file(
    stored, archive, images
):
    folder, run = stored
    before, old = versions(folder), linked(folder / "p.h5")
    zip_of(archive, {**dict(enumerate(images[:4])), 2: images[5]})
    assert run() == 0
    new = linked(folder / "p.h5")
    assert {key for key in old if old[key] != new[key]} == {f"{2:010x}"}
    assert written_since(before, folder) == {folder / "p.h5", new[f"{2:010x}"]}
    assert before.keys() - versions(folder).keys() == {old[f"{2:010x}"]}


def test_one_gone_writes_the_index_and_removes_its_file(stored, archive, images):
    folder, run = stored
    before, old = versions(folder), linked(folder / "p.h5")
    zip_of(archive, dict(enumerate(images[:3])))
    assert run() == 0
    assert written_since(before, folder) == {folder / "p.h5"}
    assert before.keys() - versions(folder).keys() == {old[f"{3:010x}"]}


def test_a_file_that_is_gone_is_made_anew(stored, capsys):
    folder, run = stored
    before = contents(folder)
    linked(folder / "p.h5")[f"{1:010x}"].unlink()
    assert run() == 0
    assert "1 written, 3 unchanged" in capsys.readouterr().out
    assert contents(folder) == before


def test_what_a_run_left_that_was_killed_before_it_removed_old_files_is_removed(stored):
    folder, run = stored
    before = contents(folder)
    one = linked(folder / "p.h5")[f"{1:010x}"]
    shutil.copy(one, one.with_name(f"{1:010x}.{'0' * 16}.h5"))
    (one.parent / f"{one.name}.host.12.tmp").write_text("half")
    (folder / ".p.h5.host.12.tmp").write_text("half")
    (folder / "studies" / "notes.txt").write_text("mine")
    assert run() == 0
    assert contents(folder) == {**before, "studies/notes.txt": b"mine"}


def test_a_damaged_file_that_no_index_has_linked_yet_is_made_anew(stored, capsys):
    folder, run = stored
    before = contents(folder)
    (folder / "p.h5").unlink()
    [damaged, *_] = sorted(set(folder.glob("studies/*/*.h5")))
    os.truncate(damaged, 1000)
    assert run() == 0
    assert "its finished part is damaged and is made anew" in capsys.readouterr().err
    assert contents(folder) == before


def test_force_makes_all_anew(stored):
    folder, run = stored
    before, old = contents(folder), versions(folder)
    assert run("--force") == 0
    assert contents(folder) == before
    assert len(written_since(old, folder)) == 4 + 1


def test_an_index_becomes_one_file_and_back(stored, archive, capsys):
    folder, run = stored
    assert preprocess(archive, folder / "p.h5") == 0
    assert "4 unchanged" in capsys.readouterr().out
    with h5py.File(folder / "p.h5") as file:
        assert isinstance(file["image"].get(f"{1:010x}", getlink=True), h5py.HardLink)
    assert run() == 0
    assert len(linked(folder / "p.h5")) == 4


# --- whose store it is -----------------------------------------------------------------------


def refused(status: int, capsys) -> str:
    assert status == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_store_of_another_output_is_refused(stored, archive, tmp_path, capsys):
    folder, _ = stored
    before = contents(folder)
    with pytest.raises(SystemExit) as end:
        preprocess(archive, tmp_path / "other.h5", "--store", folder / "studies")
    assert f"is the store of {folder / 'p.h5'}" in refused(end.value.code, capsys)
    assert contents(folder) == before
    (folder / "p.h5").rename(folder / "q.h5")
    assert preprocess(archive, folder / "q.h5", "--store", folder / "studies") == 0
    assert json.loads((folder / "studies" / "store.json").read_text()) == {"output": "../q.h5"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("full", "holds something else"),
        ("p.zip", "is not a folder"),
        ("p.h5.parts", "is the output"),
    ],
)
def test_what_can_be_no_store_is_refused(name, reason, archive, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(SystemExit) as end:
        preprocess(archive, tmp_path / "p.h5", "--store", tmp_path / name)
    assert reason in refused(end.value.code, capsys)


# --- kill -9 ---------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="kills by /proc")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", params=STORED)
def uninterrupted(request, inputs) -> tuple[Stage, Files, Files, float]:
    """What a stage leaves if nothing happens, with old options and new ones, and its time [s]."""
    stage = STORED[request.param]
    folder = prepared(inputs, inputs.parent / f"{inputs.name}_{stage.name}")
    assert finished(start(stage.main, with_other_options(stage), folder)).status == 0
    old = contents(folder / "out")
    began = time.monotonic()
    assert finished(start(stage.main, stage.command(), folder)).status == 0
    return stage, old, contents(folder / "out"), time.monotonic() - began


def states(found: Files, old: Files, new: Files, output: str) -> str:
    """Which index there is, and that all its files are there and whole."""
    if output not in found:
        return "none"
    state = "old" if found[output] == old[output] else "new"
    whole = {"old": old, "new": new}[state]
    held = {name for name in whole if name.startswith("studies/") or name == output}
    assert {name: found.get(name) for name in held} == {name: whole[name] for name in held}
    return state


@linux_only
@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.timeout(PATIENCE_S * 4)
def test_killed_at_a_random_moment(number, uninterrupted, inputs, tmp_path):
    stage, old, new, duration_s = uninterrupted
    output = Path(stage.output).name
    rng = random.Random(f"{stage.name} {number}")
    before = rng.choice([{}, old, old, new])
    force = ["--force"] if before is new else []
    folder = prepared(inputs, tmp_path / "run", before)
    run = start(stage.main, stage.command(*force), folder)
    time.sleep(rng.uniform(0, duration_s))
    victims = [lambda: os.kill(run.pid, signal.SIGKILL), lambda: os.killpg(run.pid, signal.SIGKILL)]
    workers = members(run.pid)[1:]
    if workers:
        victims.append(lambda: os.kill(rng.choice(workers), signal.SIGKILL))
    with suppress(ProcessLookupError):
        rng.choice(victims)()
    finished(run)
    wait_for_orphans(run.pid)
    found = contents(folder / "out")
    if run.status == 3:
        # The study whose worker was killed is not in it.
        assert len(datasets(folder / stage.output)) > 1
    else:
        was = states(before, old, new, output)
        assert states(found, old, new, output) in ({was} if run.status == 1 else {was, "new"})
    again = finished(start(stage.main, stage.command("-v"), folder))
    assert again.status == 0, again.stderr
    assert contents(folder / "out") == new


@linux_only
def test_a_rerun_computes_only_what_an_interrupted_one_had_not_finished(inputs, tmp_path):
    stage = STORED["preprocessing"]
    folder = prepared(inputs, tmp_path / "run")
    run = start(stage.main, stage.command("-j", "1"), folder)
    deadline = time.monotonic() + PATIENCE_S
    while len(set(folder.glob("out/studies/*/*.h5"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(run.pid, signal.SIGKILL)
    finished(run)
    n_done = len(set(folder.glob("out/studies/*/*.h5")))
    assert 2 <= n_done < 4
    again = finished(start(stage.main, stage.command("-v"), folder))
    assert n_to_compute(again.stderr) == 4 - n_done
