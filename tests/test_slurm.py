"""The Slurm example: its array jobs and the job that joins them make the whole file."""

import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import slurm_cluster
from project_zips import study_images, write_zip
from tiny_studies import ANGLES, GRID, write_chain

import createproject
import mergeh5
import preprocessing
import project_2d

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "slurm.sbatch"
STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))
JOBS = 3
DAMAGED = "0000000003"
BESIDE = ["--measures", "lesions.csv", "--report=page.html"]

pytestmark = pytest.mark.timeout(600)


def run(folder: Path, words: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script elsewhere, as Slurm does."""
    copy = folder / "slurm_script"
    shutil.copy(SCRIPT, copy)
    return subprocess.run(
        ["bash", str(copy), *words],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def array_job(folder: Path, number: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Run an array job as Slurm does where no environment travels."""
    words = ["array_job", str(ROOT), sys.executable, "p.zip", "p_3d.h5", str(JOBS), *GRID, *options]
    return run(folder, words, SLURM_ARRAY_TASK_ID=str(number), SLURM_CPUS_PER_TASK="1")


def merge_job(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = ["merge_job", str(ROOT), sys.executable, "p.zip", "p_3d.h5", str(JOBS), *GRID, *options]
    return run(folder, words)


def write_project(folder: Path, n_studies: int = 5) -> Path:
    """Write p.zip, one of whose studies is damaged."""
    studies = {f"{seed:010x}": study_images(seed) for seed in range(n_studies)}
    studies[DAMAGED]["petsuv"].dataobj[...] = float("nan")
    write_zip(folder / "p.zip", studies)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "p_3d.shards").mkdir()
    return write_project(tmp_path)


def whole(folder: Path, *options: str) -> Path:
    """Return the folder of what one run makes of the project."""
    made = folder / "whole"
    made.mkdir()
    words = [str(folder / "p.zip"), "-o", str(made / "p_3d.h5"), *GRID, *options, "-j", "1"]
    assert preprocessing.main(words) == 3
    return made


def failed(path: Path) -> list[str]:
    return [row[0] for row in csv.reader(path.read_text().splitlines()[1:])]


def test_all_array_jobs_and_their_merge_make_the_whole_file_byte_for_byte(folder):
    for number in range(1, JOBS + 1):
        done = array_job(folder, number, *BESIDE)
        assert done.returncode == 0, done.stderr
    merged = merge_job(folder, *BESIDE)
    assert merged.returncode == 3, merged.stderr
    assert merged.stdout == "5 studies: 4 written, 0 unchanged, 0 skipped, 1 failed -> p_3d.h5\n"
    tables = [f"--measures={folder}/whole/lesions.csv", f"--report={folder}/whole/page.html"]
    made = whole(folder, *tables)
    for name in ("p_3d.h5", "p_3d_failed.csv", "lesions.csv", "page.html"):
        assert (folder / name).read_bytes() == (made / name).read_bytes(), name
    the_merge_runs_without_a_job_that_was_ended(folder, (made / "p_3d.h5").read_bytes())


def the_merge_runs_without_a_job_that_was_ended(folder: Path, expected: bytes) -> None:
    for name in ("p_3d.h5", "p_3d.shards/00002.h5", "p_3d.shards/00002.status"):
        (folder / name).unlink()
    # Of an earlier array of more jobs.
    shutil.copy(folder / "p_3d.shards/00001.h5", folder / "p_3d.shards/00004.h5")
    (folder / "p_3d.shards/00003.status").write_text("1\n")
    merged = merge_job(folder)
    assert merged.returncode == 3
    assert merged.stderr.splitlines()[:2] == [
        "error: array job 2 was ended before its time (memory, time limit, scancel): its studies "
        "are missing",
        "error: array job 3 ended with status 1: its studies may be those of an earlier run",
    ]
    assert merged.stderr.endswith("run the same command again: it computes what is missing\n")
    assert (folder / "p_3d.h5").read_bytes() != expected
    assert array_job(folder, 2).returncode == array_job(folder, 3).returncode == 0
    assert merge_job(folder).returncode == 3
    assert failed(folder / "p_3d_failed.csv") == [DAMAGED]
    assert (folder / "p_3d.h5").read_bytes() == expected


def test_a_merge_that_fails_or_has_nothing_to_merge_leaves_the_old_output(folder):
    (folder / "p_3d.h5").write_text("old")
    done = merge_job(folder)
    assert done.returncode == 1
    assert "no array job has written its file: see their logs; p_3d.h5 is as it was" in done.stderr
    (folder / "p_3d.shards/00001.h5").write_text("no HDF5")
    done = merge_job(folder)
    assert done.returncode == 1
    assert "error: the merge ended with status 1: p_3d.h5 is as it was" in done.stderr
    assert (folder / "p_3d.h5").read_text() == "old"


def test_a_fatal_end_of_an_array_job_is_one_for_slurm(folder):
    (folder / "p.zip").write_bytes(b"no zip")
    assert array_job(folder, 1).returncode == 1
    assert (folder / "p_3d.shards/00001.status").read_text() == "1\n"


def test_shards_of_all_stages_make_the_whole_files_byte_for_byte(tmp_path):
    """Each shard of the raw project is a zip of its own, as on a cluster."""
    write_chain(tmp_path)
    for number in (1, 2):
        for main, source, output, *options in (
            (createproject.main, "raw", f"{number}.zip", "--shard", f"{number}/2"),
            (preprocessing.main, f"{number}.zip", f"{number}_3d.h5", *GRID),
            (project_2d.main, "3d.h5", f"{number}_2d.h5", *ANGLES, "--shard", f"{number}/2"),
        ):
            words = [str(tmp_path / source), "-o", str(tmp_path / output), *options, "-j", "1"]
            assert main(words) == 0
    rows = []
    for kind in ("3d", "2d"):
        shards = [str(tmp_path / f"{number}_{kind}.h5") for number in (2, 1)]
        assert mergeh5.main([*shards, "-o", str(tmp_path / f"all_{kind}.h5")]) == 0
        whole = (tmp_path / f"{kind}.h5").read_bytes()
        assert (tmp_path / f"all_{kind}.h5").read_bytes() == whole
    for number in (1, 2):
        rows += (tmp_path / f"{number}_mapping.csv").read_text().splitlines()[1:]
    assert sorted(rows) == sorted((tmp_path / "project_mapping.csv").read_text().splitlines()[1:])


def test_an_array_of_more_jobs_gives_studies_to_the_others_unasked(tmp_path):
    write_chain(tmp_path)
    for main, source, output, *options in (
        (project_2d.main, "3d.h5", "2d.h5", *ANGLES),
        (preprocessing.main, "project.zip", "3d.h5", *GRID),
        (createproject.main, "raw", "project.zip"),
    ):
        words = [str(tmp_path / source), "-o", str(tmp_path / output), *options, "-j", "1"]
        assert main([*words, "--shard", "2/3"]) == 0


# --- what is run, of which stage -------------------------------------------------------------

STAGES = {
    "raw p.zip 3 --roi x --mapping=m.csv": (
        "createproject.py raw -o p.shards/00002.zip --shard 2/3 --jobs 4 --roi x "
        "--mapping=m.00002.csv",
        None,
    ),
    "p.zip p_3d.h5 3 --measures m.csv --store s --allow-shrink": (
        "preprocessing.py p.zip -o p_3d.shards/00002.h5 --shard 2/3 --jobs 4 --store=s/00002 "
        "--allow-shrink",
        "mergeh5.py p_3d.shards/00002.h5 -o p_3d.h5 --measures=m.csv --link --allow-shrink",
    ),
    "p.shards p_3d.h5 3": (
        "preprocessing.py p.shards/00002.zip -o p_3d.shards/00002.h5 --allow-shrink --jobs 4",
        "mergeh5.py p_3d.shards/00002.h5 -o p_3d.h5",
    ),
    "p_3d.h5 p_2d.h5 3 --gif g --jobs 1": (
        "project_2d.py p_3d.h5 -o p_2d.shards/00002.h5 --shard 2/3 --jobs 4 --gif g --jobs 1",
        "mergeh5.py p_2d.shards/00002.h5 -o p_2d.h5",
    ),
}


@pytest.mark.parametrize("words", STAGES)
def test_the_names_tell_the_stage_and_what_is_one_file_for_all_is_parted(words, tmp_path):
    (tmp_path / "p.shards").mkdir()
    (tmp_path / "p_3d.shards").mkdir()
    (tmp_path / "p_2d.shards").mkdir()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> calls\ntouch "$4"\n')
    python.chmod(0o755)
    given = ["", str(python), *words.split()]
    done = run(tmp_path, ["array_job", *given], SLURM_ARRAY_TASK_ID="2", SLURM_CPUS_PER_TASK="4")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(tmp_path, ["merge_job", *given])
    assert done.returncode == 3
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"/{call}" for call in STAGES[words] if call is not None]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["p.zip", "p_3d.h5"], "usage: bash slurm.sbatch INPUT OUTPUT JOBS [OPTIONS]"),
        (["p.zip", "p_3d.h5", "4%"], "error: 4% is no number of jobs: 20, or 20%5 for five"),
        (["p.zip", "p_3d.hdf", "4"], "error: which stage? OUTPUT ends in .zip, or in _3d.h5"),
        (["p.zip", "p_3d.h5", "4", "--report"], "error: --report needs a name after it"),
        (["p.zip", "p_3d.h5", "4", "--shard=1/4"], "error: --shard is set by this script"),
        (["p.zip", "p_3d.h5", "4", "-o", "x.h5"], "error: -o is set by this script"),
        (["p.shards", "p_3d.h5", "9"], "error: p.shards/00010.zip would be left out"),
    ],
)
def test_wrong_words_are_told_before_anything_is_submitted(words, told, folder):
    (folder / "p.shards").mkdir()
    for number in (9, 10):
        (folder / f"p.shards/{number:05d}.zip").touch()
    done = run(folder, words, SOFTWARE=str(ROOT), PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stderr.startswith(told)


def test_a_copy_that_does_not_find_the_scripts_says_so_before_it_submits(folder):
    for variables in ({"SOFTWARE": str(folder)}, {"PYTHON": str(folder / "python")}):
        settings = {"SOFTWARE": str(ROOT), "PYTHON": sys.executable, **variables}
        done = run(folder, ["p.zip", "new_3d.h5", "4"], **settings)
        assert done.returncode == 2
        assert "set SOFTWARE to the folder of the scripts, and PYTHON" in done.stderr
    assert not (folder / "new_3d.shards").exists()


def test_the_script_is_sound_by_bash_and_shellcheck():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    beside_python = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, str(SCRIPT)], check=True)


# --- a Slurm of one node ---------------------------------------------------------------------

Environment = dict[str, str]


@pytest.fixture
def slurm(tmp_path_factory) -> Iterator[Environment]:
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    with slurm_cluster.slurm(tmp_path_factory.mktemp("slurm")) as environment:
        sites = {"SBATCH_EXPORT": "NONE", "SOFTWARE": str(ROOT), "PYTHON": sys.executable}
        yield environment | sites


def submit(folder: Path, slurm: Environment, jobs: str, *options: str) -> tuple[str, str]:
    """Return the numbers of the array job and of the job that joins."""
    done = run(folder, ["p.zip", "p_3d.h5", jobs, *GRID, *options], **slurm)
    assert done.returncode == 0, done.stderr
    words = done.stdout.replace(";", "").split()
    return words[2], words[4]


def test_a_slurm_of_one_node_makes_the_whole_file_where_no_environment_travels(slurm, tmp_path):
    write_project(tmp_path)
    array, merge = submit(tmp_path, slurm, "2%2", *BESIDE[:2])
    note = (tmp_path / "p_3d.shards/NOT_JOINED").read_text()
    assert note.startswith(f"what array job {array} made has not been joined")
    ended = slurm_cluster.await_end(merge, slurm)
    logs = {path.name: path.read_text() for path in tmp_path.glob("tumorvolume_*.log")}
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "3:0"), logs
    made = whole(tmp_path, f"--measures={tmp_path}/whole/lesions.csv")
    for name in ("p_3d.h5", "p_3d_failed.csv", "lesions.csv"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name
    assert not (tmp_path / "p_3d.shards/NOT_JOINED").exists()


def test_dask_workers_that_are_jobs_of_slurm_make_the_whole_file(slurm, tmp_path):
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    write_project(tmp_path)
    page = (ROOT / "docs" / "scale.md").read_text()
    (tmp_path / "on_slurm.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    words = [str(ROOT / "preprocessing.py"), "p.zip", "-o", "p_3d.h5", *GRID]
    command = [sys.executable, "on_slurm.py", "2", *words]
    environment = {name: value for name, value in slurm.items() if name != "SBATCH_EXPORT"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "p_3d.h5").read_bytes() == (whole(tmp_path) / "p_3d.h5").read_bytes()
    assert list(tmp_path.glob("slurm-*.out"))


def preempt(job: str, slurm: Environment) -> None:
    """Run a job that takes all CPUs from those of a partition of less priority."""
    words = ["sbatch", "--partition=first", "--exclusive", "--output=/dev/null", "--wrap=true"]
    subprocess.run(words, env=slurm, check=True, capture_output=True)


FATES = {
    "requeued": lambda job, slurm: subprocess.run(
        ["scontrol", "requeue", job], env=slurm, check=True
    ),
    "preempted": preempt,
    "cancelled": lambda job, slurm: subprocess.run(["scancel", job], env=slurm, check=True),
    "killed": lambda job, slurm: subprocess.run(
        ["scancel", "--signal=KILL", "--full", job], env=slurm, check=True
    ),
    "submitted twice": None,
}


@pytest.mark.skipif(STRESS < 2, reason="fates of jobs: set TUMORVOLUME_STRESS=2")
@pytest.mark.parametrize("fate", FATES)
def test_whatever_becomes_of_a_job_the_same_command_ends_with_the_whole_file(fate, slurm, tmp_path):
    write_project(tmp_path, 60)
    array, merge = submit(tmp_path, slurm, "2")
    parts = tmp_path / "p_3d.shards/00001.h5.parts"
    while len(list(parts.glob("*.h5"))) < 3:
        time.sleep(0.1)
    if FATES[fate] is not None:
        FATES[fate](f"{array}_1", slurm)
    else:
        merge = submit(tmp_path, slurm, "2")[1]
    ended = slurm_cluster.await_end(merge, slurm)
    log = (tmp_path / f"tumorvolume_{merge}_merge.log").read_text()
    assert ended["ExitCode"] == "3:0", log
    expected = (whole(tmp_path) / "p_3d.h5").read_bytes()
    resumed = [path.read_text().count("resuming") for path in tmp_path.glob("tumorvolume_*_1.log")]
    if fate in ("cancelled", "killed"):
        assert "array job 1 was ended before its time" in log
        assert "run the same command again" in log
        assert (tmp_path / "p_3d.h5").read_bytes() != expected
    elif fate != "submitted twice":
        assert resumed == [1]
    if (tmp_path / "p_3d.h5").read_bytes() != expected:
        merge = submit(tmp_path, slurm, "2")[1]
        assert slurm_cluster.await_end(merge, slurm)["ExitCode"] == "3:0"
    assert (tmp_path / "p_3d.h5").read_bytes() == expected
