"""README and docs/ are true: options, links and columns exist, commands do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

import createproject
import mergeh5
import preprocessing
import project_2d
from common.hashing import pseudonym
from common.report.lesion_table import COLUMNS
from common.suv.factors import already_suv
from common.version import VERSION
from examples import phantom

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()
SIZING = (ROOT / "docs" / "sizing.md").read_text()
SCRIPTS = (createproject, preprocessing, mergeh5, project_2d)


def options_of(script):
    actions = script.build_parser()._actions
    return {name for action in actions for name in action.option_strings if name.startswith("--")}


def run_pipeline(raw_project, folder, **environment):
    """Run the chain into results/ below a folder, on a small grid and a few angles."""
    if not (ROOT / ".venv/bin/python").exists():
        pytest.skip("the pipeline would set up .venv: run the tests by tests/run.sh")
    small = {"PREPROCESS": "--shape 100 100 --spacing 5 5 5", "PROJECT": "--angles 0 180 90"}
    return subprocess.run(
        ["bash", str(ROOT / "examples/pipeline.sh"), str(raw_project), "results"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **small, **environment},
    )


@pytest.fixture(scope="module")
def raw_project(tmp_path_factory):
    """Two of the demo's studies: one complete, one without a mask."""
    folder = tmp_path_factory.mktemp("readme") / "raw"
    ct, pet = phantom.ct_grid(64, 100), phantom.pet_grid(64, 100)
    for study in (phantom.DEMO_STUDIES[3], phantom.DEMO_STUDIES[5]):
        phantom.write_study(folder, study, ct, pet)
    return folder


@pytest.mark.parametrize("text", [README, OPTIONS, SIZING], ids=["README", "options", "sizing"])
def test_every_option_that_is_told_of_exists(text):
    known = set().union(*map(options_of, SCRIPTS))
    for example in (ROOT / "examples").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)",', example.read_text()))
    code = "\n".join(re.findall(r"`[^`]*`|```.*?```", text, flags=re.DOTALL))
    code = re.sub(r"^dask .*$", "", code, flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)) <= known


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_option_has_a_row_in_the_table_of_its_script(script):
    shared, own = (
        OPTIONS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        for heading in ("All four scripts", f"{script.__name__}.py")
    )
    told = set(re.findall(r"--[a-z0-9][a-z0-9-]*", shared + own))
    assert options_of(script) - {"--help", "--version"} <= told


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_examples_in_the_help_are_accepted_by_the_parser(script):
    parser = script.build_parser()
    examples = re.findall(r"^  python \w+\.py (.+)$", script.EXAMPLES, flags=re.MULTILINE)
    assert len(examples) >= 3
    for line in examples:
        words = [word.strip("'") for word in line.split()]
        parser.parse_args(words)


def test_the_pipeline_runs_from_any_folder_and_reruns_with_nothing_to_do(raw_project, tmp_path):
    for written, unchanged in ((1, 0), (0, 1)):
        run = run_pipeline(raw_project, tmp_path)
        assert run.returncode == 0, run.stderr
        assert f"2 studies: {written} written, {unchanged} unchanged, 1 skipped" in run.stdout
    assert (tmp_path / "results/all_2d.csv").exists()
    assert len(list((tmp_path / "results/gif").glob("*.gif"))) == 1


def test_the_pipeline_of_a_large_project_keeps_files_of_studies(raw_project, tmp_path):
    # Once it has begun so it goes on so.
    for more, written in ({"STORE_FROM_GB": "0"}, 1), ({}, 0):
        run = run_pipeline(raw_project, tmp_path, **more)
        assert run.returncode == 0, run.stderr
        assert re.findall(r": (\d+) written", run.stdout) == [str(written)] * 4
    results = tmp_path / "results"
    [of_3d], [of_2d] = (results.glob(f"{name}.studies/*/*.h5") for name in ("raw_3d", "all_2d"))
    for index, file in (("raw_3d", of_3d), ("all_3d", of_3d), ("all_2d", of_2d)):
        with h5py.File(results / f"{index}.h5") as opened:
            [link] = {opened["image"].get(k, getlink=True).filename for k in opened["image"]}
            assert results / link == file


def test_the_pipeline_passes_status_3_on(raw_project, tmp_path):
    broken = tmp_path / "raw"
    shutil.copytree(raw_project, broken)
    study = next(broken.glob("*/2024-03-11_PETCT"))
    shutil.copytree(study, study.with_name("truncated"))
    ct = study.with_name("truncated") / "CT.nii.gz"
    ct.write_bytes(ct.read_bytes()[:1000])
    run = run_pipeline(broken, tmp_path)
    assert run.returncode == 3, run.stderr
    assert "3 studies: 1 written, 0 unchanged, 1 skipped, 1 failed" in run.stdout


def test_shell_scripts_have_no_syntax_error():
    for script in (ROOT / ".ci/run", *ROOT.glob("*/*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("page", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=str)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
            assert anchor in slugs, target


def test_every_column_of_the_measures_is_explained():
    section = (ROOT / "docs/formats.md").read_text().split("## Measures")[1].split("\n## ")[0]
    columns = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(columns)) == [*sorted_as(COLUMNS, columns)]


def test_every_key_of_the_provenance_is_explained():
    text = (ROOT / "docs/formats.md").read_text()
    section = text.split("| key of `suv` |")[1].split("\n\n")[0]
    told = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)))
    assert sorted(told) == sorted(already_suv([1.0]).provenance.record)


def sorted_as(columns, cells):
    """The table's columns in the order that the page explains them."""
    text = "".join(cells)
    return sorted(columns, key=lambda name: text.index(f"`{name}`"))


def test_every_rule_that_a_report_may_name_is_explained():
    told = (ROOT / "docs/suv.md").read_text()
    rows = set(re.findall(r"^\| (\d+) \|", told, flags=re.MULTILINE))
    assert rows == {str(number) for number in range(1, 18)}
    for letter in "abc":
        assert f"(12{letter})" in told


def test_what_goes_back_to_the_patient_is_of_the_demo():
    """The prediction is one that the training above it makes: of the demo, by its hash."""
    study = phantom.DEMO_STUDIES[0]
    key = pseudonym(study.patient, study.study)
    for text in (README, (ROOT / "docs" / "training.md").read_text()):
        trained, back = text.split("examples/to_patient.py", 1)
        assert "--predictions predictions" in trained
        assert back.startswith(f" predictions/{key}.nii.gz demo/out/raw.zip\n")


def test_what_is_private_is_kept_out_of_git():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git repository")
    private = ["secret.key", "project_mapping.csv", "project.zip", "project_3d.h5"]
    command = ["git", "-C", str(ROOT), "check-ignore", *private]
    ignored = subprocess.run(command, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip(f"git does not read the repository: {ignored.stderr}")
    assert ignored.stdout.split() == private


def test_the_gate_runs_the_test_command_of_the_readme():
    [command] = re.findall(r"^(bash tests/\S+) +# runs the tests$", README, flags=re.MULTILINE)
    assert command in (ROOT / ".ci/run").read_text().splitlines()


def test_the_citation_is_of_this_version():
    assert f"version: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


def test_python_is_new_enough():
    assert sys.version_info >= (3, 11)
