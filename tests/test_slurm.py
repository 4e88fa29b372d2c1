"""The Slurm example: its array jobs, run here one by one, and its merge make the whole file."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from project_zips import study_images, write_zip
from tiny_studies import ANGLES, GRID, write_chain

import createproject
import mergeh5
import preprocessing
import project_2d

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "slurm.sbatch"
JOBS = 4


def run(folder: Path, words: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as Slurm does: a copy elsewhere, with what was exported at submission."""
    copy = folder / "slurm_script"
    shutil.copy(SCRIPT, copy)
    settings = {"SOFTWARE": str(ROOT), "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(copy), *words],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )


def array_job(folder: Path, number: int) -> subprocess.CompletedProcess[str]:
    words = ["array_job", "p.zip", "p_3d.h5", str(JOBS), *GRID]
    variables = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_CPUS_PER_TASK": "1"}
    return run(folder, words, **variables)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five studies, one of them damaged, for four jobs: at least one has none or several."""
    studies = {f"{seed:010x}": study_images(seed) for seed in range(5)}
    studies["0000000003"]["petsuv"].dataobj[...] = float("nan")
    write_zip(tmp_path / "p.zip", studies)
    (tmp_path / "p_3d.shards").mkdir()
    return tmp_path


def test_all_array_jobs_and_their_merge_make_the_whole_file_byte_for_byte(folder):
    for number in range(1, JOBS + 1):
        done = array_job(folder, number)
        assert done.returncode == 0, done.stderr
    merged = run(folder, ["merge_job", "p_3d.h5", str(JOBS)])
    assert merged.returncode == 0, merged.stderr
    whole = folder / "whole.h5"
    assert preprocessing.main([str(folder / "p.zip"), "-o", str(whole), *GRID, "-j", "1"]) == 3
    assert (folder / "p_3d.h5").read_bytes() == whole.read_bytes()
    paths = folder.glob("p_3d.shards/*_failed.csv")
    lists = [list(csv.reader(path.read_text().splitlines())) for path in paths]
    assert [rows[1][0] for rows in lists] == ["0000000003"]


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


def test_a_fatal_end_of_an_array_job_is_one_for_slurm(folder):
    (folder / "p.zip").write_bytes(b"no zip")
    assert array_job(folder, 1).returncode == 1
    assert run(folder, ["merge_job", "p_3d.h5", str(JOBS)]).returncode == 2


def test_too_few_words_are_told(folder):
    done = run(folder, ["p.zip", "p_3d.h5"])
    assert done.returncode == 2
    assert done.stderr.startswith("usage: bash slurm.sbatch PROJECT.zip PROJECT_3d.h5 JOBS")


def test_a_copy_that_does_not_find_the_scripts_says_so_before_it_submits(folder):
    for variables in ({"SOFTWARE": str(folder)}, {"PYTHON": str(folder / "python")}):
        done = run(folder, ["p.zip", "new_3d.h5", "4"], **variables)
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
