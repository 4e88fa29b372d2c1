"""Every command of README and docs/ is run, page by page, in the order that it stands there.

docs/datasets.md has a test of its own, on projects of these layouts.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
from pet_headers import REFERENCE_S, activity_per_suv, ds

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/studies.md", "docs/scale.md", "docs/training.md", "docs/suv.md")
ELSEWHERE = {
    "dask": "run/test_dask.py",
    "slurm.sbatch": "test_slurm.py",
    "on_slurm.py": "test_slurm.py",
    "examples/to_patient.py": "test_to_patient.py",
    "examples/train.py": "test_training.py",
    "nnUNetv2_plan_and_preprocess": "test_export_nnunet.py",
    "nnUNetv2_train": "test_export_nnunet.py",
}
"""Where commands are run that need a program of their own, or minutes."""


def commands_of(page):
    """The commands of a page's shell blocks, those of several lines joined, comments dropped."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    whole = (re.sub(r" *\\\n *", " ", block) for block in blocks)
    lines = (line.partition("  #")[0].strip() for block in whole for line in block.splitlines())
    return [line for line in lines if line]


def test_every_page_with_commands_is_known():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {str(page.relative_to(ROOT)) for page in pages if "```sh" in page.read_text()}
    assert named - {"docs/datasets.md"} <= set(PAGES)


@pytest.fixture
def folder(tmp_path):
    """The scripts, and the raw projects and files that the pages' commands name."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name in {"common", "examples", "tests", ".ci", ".venv"} or path.suffix in {
            ".py",
            ".txt",
            ".toml",
        }:
            (folder / path.name).symlink_to(path)
    for name in ("raw_project", "FDG-PET-CT-Lesions", "other", "lung", "breast"):
        for number in range(3):
            study = folder / name / f"{name}-{number}" / "2001-01-01"
            layouts.write_ct(study / "2.000000-CT")
            # Equal images would be kept in one fold.
            brightness = 1 + number / 10 + len(name) / 100
            slope = ds(float(activity_per_suv(REFERENCE_S)) * brightness / 1000)
            layouts.write_pet(study / "3.000000-PET", RescaleSlope=slope)
            layouts.write_seg(study / "4.000000-SEG" / "1-1.dcm")
    layouts.autopet(folder / "autoPET")
    (folder / "nnUNet_preprocessed/Dataset221_both_3d").mkdir(parents=True)  # as nnU-Net makes it
    study = folder / "export" / "a" / "b"
    layouts.write_ct(study / "1", SeriesDescription="STANDARD axial")
    layouts.write_pet(study / "2")
    layouts.write_seg(study / "3.dcm")
    for name in ("other", "lung", "breast"):
        run(folder, f"python createproject.py {name} -o {name}.zip")
        run(folder, f"python preprocessing.py {name}.zip -o {name}_3d.h5")
    return folder


def run(folder, command):
    """Run a line in the folder as a shell does whose `python` is this one."""
    program = shlex.quote(sys.executable)
    line = re.sub(r"(?<!\S)(python)(?=\s)", program, command)
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PROJECT": "--angles 0 180 60"},  # a twelfth of the chain's films
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_other_than_ours(folder, line):
    """Whether a line is one that is not run as it stands; what it claims is looked at."""
    words = shlex.split(line)
    if words[0] == "pip":
        told = (ROOT / "docs/development.md").read_text() + "requirements.txt"
        names = [word for word in words[2:] if not word.startswith("-")]
        assert all(re.match(r"[\w-]+", name)[0] in told for name in names), line
    elif words[:2] == ["git", "clone"]:
        run(folder, line.replace("REPOSITORY", shlex.quote(str(ROOT))) + " && ls createproject.py")
        shutil.rmtree(folder / "tumorvolume")
    elif words[0] == "xdg-open":
        assert (folder / words[1]).read_text().startswith("<!doctype html>"), line
    elif words[:2] == ["bash", "tests/run.sh"]:
        assert "bash tests/run.sh" in (ROOT / ".ci/run").read_text()
    else:
        return False
    return True


@pytest.mark.timeout(600)
def test_the_commands_of_the_pages_run_one_after_another(folder):
    for line in (line for page in PAGES for line in commands_of(page)):
        elsewhere = [test for name, test in ELSEWHERE.items() if name in line.split()]
        if elsewhere:
            assert (ROOT / "tests" / elsewhere[0]).exists()
            continue
        if "pipeline.sh" in line and not (ROOT / ".venv/bin/python").exists():
            pytest.skip("the pipeline would set up .venv: run the tests by tests/run.sh")
        if not check_other_than_ours(folder, line):
            run(folder, line)
