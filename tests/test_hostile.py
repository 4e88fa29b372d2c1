"""Broken and hostile input ends in success or in one clear line, never in a surprise.

Every case of the contract's section on bad input, by the scripts as users call them.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import mutations
import nibabel
import numpy as np
import pydicom
import pytest
from confined import Ending, confined, is_clear
from tiny_studies import ANGLES, GRID, STUDIES, write_chain

import createproject
import mergeh5
import preprocessing
import project_2d
from common.hashing import pseudonym

ROOT = Path(__file__).parents[1]
MAIN = {m.__name__: m.main for m in (createproject, preprocessing, mergeh5, project_2d)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """raw/{rtstruct,seg,nifti}/1, project.zip, 3d.h5 and 2d.h5."""
    folder = tmp_path_factory.mktemp("sound")
    write_chain(folder)
    return folder


def end(capfd, script: str, *arguments: object) -> Ending:
    """Run a script in this process."""
    capfd.readouterr()
    try:
        status = MAIN[script](list(map(str, arguments)))
    except SystemExit as exit_:
        status = exit_.code
    return Ending(status, capfd.readouterr().err)


def refuses(capfd, script, *arguments, status=1, naming="", old=b"the old output") -> str:
    """Check that a command is refused in one clear line and leaves the old output as it was."""
    output = Path(arguments[list(arguments).index("-o") + 1])
    if old and output.parent.is_dir() and not output.exists():
        output.write_bytes(old)
    before = output.read_bytes() if output.is_file() else None
    ending = end(capfd, script, *arguments)
    assert ending.status == status, ending.said
    assert len(ending.errors) == 1, ending.said
    assert status == 2 or is_clear(ending.errors[0]), ending.said
    assert re.search(naming, ending.errors[0]), ending.said
    assert (output.read_bytes() if output.is_file() else None) == before
    assert not list(output.parent.glob(f"{output.name}.*")), "litter"
    return ending.errors[0]


# --- options and paths -----------------------------------------------------------------------

OUT_OF_RANGE = {
    "createproject": [
        ["--hash-length", 0, 3],
        ["--hash-length", 7, 65],
        ["--hash-length", 7],
        ["--hash-length", 64, 37],
        ["--roi", "("],
        ["--tracer", 0],
        ["--pet-units", "counts"],
        ["--suv-type", "lbm"],
        ["--name", "a/b"],
        ["--name", ".."],
        ["--name", "a\0b"],
        ["--key-file", "absent"],
        ["--key-file", "/dev/zero"],
        ["--mapping", "absent/m.csv"],
        ["--mapping", "out"],
        ["--mapping", "out.lock"],
    ],
    "preprocessing": [
        ["--spacing", 0, 2, 2],
        ["--spacing", 2, -2, 2],
        ["--spacing", 2, 2, "nan"],
        ["--spacing", 2, 2, "inf"],
        ["--spacing", 2, 2],
        ["--spacing", 1e-300, 2, 2],
        ["--spacing", 2, 2, 1e300],
        ["--shape", 0, 200],
        ["--shape", 200],
        ["--shape", 2, 2, 2, 2],
        ["--shape", 1.5, 2],
        ["--shape", 2, 32768],
        ["--shape", 2, 2, 10**20],
        ["--ct-range", 100, 100],
        ["--ct-range", 200, 100],
        ["--suv-range", 40, 0],
        ["--suv-range", 0, "nan"],
        ["--iso-threshold", -1],
        ["--iso-threshold", 101],
        ["--iso-suv", 0],
        ["--orientation", "LAL"],
        ["--orientation", "XYZ"],
        ["--align", "middle"],
        ["--dtype", "int8"],
        ["--compression", "zip"],
        ["--measures", "out"],
        ["--measures", "absent/m.csv"],
        ["--measures", "out_failed.csv"],
        ["--report", "out.lock"],
        ["--save-nifti", "file"],
        ["--save-nifti", "file/below"],
    ],
    "mergeh5": [
        ["--splits", 1],
        ["--splits", 0],
        ["--splits-dir", "d"],
        ["--splits-dir", "file", "--splits", 2],
        ["--log-file", "out.lock"],
        ["--on-duplicate", "keep"],
        ["--patient-characters", 0],
    ],
    "project_2d": [
        ["--angles", 0, 0, 5],
        ["--angles", 90, 0, 5],
        ["--angles", 0, 180, 0],
        ["--angles", 0, 180, -5],
        ["--angles", 0, 180, "nan"],
        ["--angles", 0, "inf", 5],
        ["--angles", 0, 180],
        ["--compression", "zip"],
        ["--gif", "file"],
        ["--png", "file"],
        ["--log-file", "out_failed.csv"],
    ],
}
FOR_ALL = [
    ["--jobs", 0],
    ["--jobs", "many"],
    ["--shard", "0/2"],
    ["--shard", "3/2"],
    ["--shard", 1],
]
INPUT = {
    "createproject": "raw",
    "preprocessing": "project.zip",
    "mergeh5": "3d.h5",
    "project_2d": "3d.h5",
}


def named(options: list[object]) -> list[object]:
    return [str(word) for word in options]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (script, options)
        for script, own in OUT_OF_RANGE.items()
        for options in own + (FOR_ALL if script != "mergeh5" else [])
    ],
    ids=lambda value: (
        value if isinstance(value, str) else " ".join(named(value)).replace("\0", "0")
    ),
)
def test_options_out_of_range_end_before_any_work(
    sound, tmp_path, capfd, monkeypatch, script, options
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    said = refuses(capfd, script, sound / INPUT[script], "-o", "out", *options, status=2)
    words = [str(word).split("/")[0] for word in options]
    assert any(word in said for word in words), "which option is wrong?"


@pytest.mark.parametrize("script", MAIN)
def test_input_that_does_not_exist(tmp_path, capfd, script):
    refuses(capfd, script, tmp_path / "absent", "-o", tmp_path / "out", status=2, naming="absent")


LONG = "n" * 300
CLOSED = [
    *((script, [f"closed/{INPUT[script]}", "-o", "out"]) for script in MAIN),
    *((script, [INPUT[script], "-o", "closed/out"]) for script in MAIN),
    *((script, [INPUT[script], "-o", "out", "--log-file", "closed/log"]) for script in MAIN),
    *((script, [LONG, "-o", "out"]) for script in MAIN),
    *((script, [INPUT[script], "-o", LONG]) for script in MAIN),
    *((script, [INPUT[script], "-o", "out", "--log-file", LONG]) for script in MAIN),
    ("createproject", ["raw", "-o", "out", "--key-file", "closed/key"]),
    ("createproject", ["raw", "-o", "out", "--mapping", "closed/m.csv"]),
    ("createproject", ["raw", "-o", "out", "--mapping", LONG]),
    ("createproject", ["--new-key", "closed/key"]),
    ("createproject", ["--new-key", LONG]),
    ("preprocessing", ["project.zip", "-o", "out", "--measures", "closed/m.csv"]),
    ("preprocessing", ["project.zip", "-o", "out", "--report", LONG]),
    ("preprocessing", ["project.zip", "-o", "out", "--save-nifti", "closed/new"]),
    ("preprocessing", ["project.zip", "-o", "out", "--save-nifti", LONG]),
    ("mergeh5", ["--verify", "closed/3d.h5"]),
    ("mergeh5", ["3d.h5", "-o", "out", "--splits", "2", "--splits-dir", "closed/new"]),
    ("project_2d", ["3d.h5", "-o", "out", "--gif", "closed/new"]),
]


def check_in_a_closed_folder(folder: Path) -> None:
    """Run every command there and print how it ended, in this process of a mortal."""
    os.chdir(folder)
    for script, arguments in CLOSED:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                status = MAIN[script](arguments)
        except SystemExit as exit_:
            status = exit_.code
        except OSError as error:
            status = f"raised {type(error).__name__}"
        errors = [line for line in said.getvalue().splitlines() if "error: " in line]
        clear = len(errors) == 1 and re.search("(closed|n{300}).*: |too long", errors[0])
        if status != 2 or not clear or Path("out").exists():
            print(script, arguments, status, errors)


def test_paths_that_may_not_be_looked_at_are_wrong_arguments(sound, tmp_path):
    """A folder without permission, and names that are too long, were tracebacks."""
    shutil.copytree(sound, tmp_path / "in")
    (tmp_path / "in" / "closed").mkdir()
    (tmp_path / "in" / "closed").chmod(0)
    code = "import sys, test_hostile; test_hostile.check_in_a_closed_folder(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "in")]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("the superuser can't give up its rights here: setpriv is missing")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    tests = ROOT / "tests"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tests}:{tests / 'builders'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("script", ["preprocessing", "mergeh5", "project_2d", "mergeh5 --verify"])
def test_input_that_is_a_pipe_or_a_device_is_not_opened(tmp_path, script):
    """To open it could last for ever."""
    os.mkfifo(tmp_path / "pipe")
    script, *option = script.split()
    for path in ("/dev/zero", tmp_path / "pipe"):
        output = [] if option else ["-o", str(tmp_path / "out")]
        ending = confined(lambda path=path, o=output: MAIN[script]([str(path), *option, *o]))
        assert ending.status == 2, ending.said
        assert f"input {path} is a device or pipe" in ending.said


def test_key_may_come_through_a_pipe(sound, tmp_path):
    """From a program that keeps secrets: --key-file <(pass tumorvolume)."""
    command = (
        f"{sys.executable} {ROOT}/createproject.py {sound}/raw -o p.zip --dry-run "
        "--key-file <(printf %032d 1)"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_link_in_place_of_the_lock_is_not_followed(sound, tmp_path, capfd):
    """The file it leads to was emptied."""
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "out.lock").symlink_to(other)
    ending = end(capfd, "mergeh5", sound / "3d.h5", "-o", tmp_path / "out")
    assert ending.status == 1
    assert is_clear(ending.errors[0]), ending.said
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    "shape", [[[1], 1 << 40], ["a", 1 << 33], [1e999], [float("nan")], [-5, 1], [1 << 70], 7, None]
)
def test_shapes_of_a_foreign_index_are_no_reason_to_stop(sound, tmp_path, capfd, shape):
    members = members_of(sound / "project.zip")
    index = next(name for name in members if name.endswith("studies.json"))
    records = json.loads(members[index])
    for record in records.values():
        record["shapes"] = {"ct": shape}
    path = zipped(tmp_path / "in.zip", members | {index: json.dumps(records).encode()})
    ending = end(capfd, "preprocessing", path, "-o", tmp_path / "o.h5", *GRID)
    assert ending.status == 0, ending.said


@pytest.mark.parametrize("script", MAIN)
def test_output_in_a_missing_folder(sound, tmp_path, capfd, script):
    output = tmp_path / "absent" / "out"
    refuses(capfd, script, sound / INPUT[script], "-o", output, status=2, naming="absent")


@pytest.mark.parametrize("script", MAIN)
def test_output_that_is_a_folder(sound, tmp_path, capfd, script):
    refuses(capfd, script, sound / INPUT[script], "-o", tmp_path, status=2, naming="is a folder")


@pytest.mark.parametrize("alias", ["itself", "link", "hard link", "spelling"])
@pytest.mark.parametrize("script", ["preprocessing", "mergeh5", "project_2d"])
def test_output_equal_to_an_input(sound, tmp_path, capfd, script, alias):
    source = tmp_path / "in"
    shutil.copy(sound / INPUT[script], source)
    output = tmp_path / "out"
    match alias:
        case "itself":
            output = source
        case "link":
            output.symlink_to(source)
        case "hard link":
            output.hardlink_to(source)
        case "spelling":
            output = tmp_path / "." / ".." / tmp_path.name / "in"
    refuses(capfd, script, source, "-o", output, status=2, naming="is an input")


@pytest.mark.parametrize("script", MAIN)
def test_output_that_is_a_device(sound, capfd, script):
    ending = end(capfd, script, sound / INPUT[script], "-o", "/dev/full")
    assert ending.status == 2
    assert "/dev/full is a device" in ending.said


@pytest.mark.parametrize(
    ("script", "option"),
    [
        ("preprocessing", "--measures"),
        ("preprocessing", "--report"),
        *((script, "--log-file") for script in ("preprocessing", "mergeh5", "project_2d")),
    ],
)
def test_files_beside_the_output_never_replace_an_input(sound, tmp_path, capfd, script, option):
    source = shutil.copy(sound / INPUT[script], tmp_path / "in")
    before = source.read_bytes()
    ending = end(capfd, script, source, "-o", tmp_path / "out", option, source)
    assert ending.status == 2
    assert "another file of this run" in ending.said
    assert source.read_bytes() == before


def test_measures_in_a_read_only_folder_end_before_any_work(sound, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    table = tmp_path / "closed" / "m.csv"
    ending = mortal(
        tmp_path, "preprocessing", sound / "project.zip", "-o", "3d.h5", "--measures", table
    )
    assert ending.status == 2, ending.said
    assert "can't be written to" in ending.said
    assert not (tmp_path / "3d.h5").exists()


def test_output_in_the_raw_project_does_not_become_a_study(sound, tmp_path, capfd):
    shutil.copytree(sound / "raw", tmp_path / "raw")
    for _ in range(2):
        ending = end(
            capfd, "createproject", tmp_path / "raw", "-o", tmp_path / "raw" / "p.zip", "-j", 1
        )
        assert ending.status == 0
    with zipfile.ZipFile(tmp_path / "raw" / "p.zip") as archive:
        assert len(archive.namelist()) == 3 * 3 + 1


def mortal(folder: Path, script: str, *arguments: object) -> Ending:
    """Run a script without the superuser's right to pass over permissions."""
    command = [sys.executable, ROOT / f"{script}.py", *arguments]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("the superuser can't give up its rights here: setpriv is missing")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=60
    )
    return Ending(done.returncode, done.stderr)


@pytest.mark.parametrize("script", MAIN)
def test_output_in_a_read_only_folder(sound, tmp_path, script):
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "out").write_bytes(b"old")
    folder.chmod(0o555)
    ending = mortal(tmp_path, script, sound / INPUT[script], "-o", folder / "out")
    folder.chmod(0o755)
    assert ending.status in (1, 2), ending.said
    assert len(ending.errors) == 1, ending.said
    assert is_clear(ending.errors[0]), ending.said
    assert re.search("out|closed", ending.errors[0])
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert (folder / "out").read_bytes() == b"old"


# --- the raw project -------------------------------------------------------------------------


@pytest.fixture
def raw(sound, tmp_path) -> Path:
    """A copy of the raw project, to be broken."""
    shutil.copytree(sound / "raw", tmp_path / "raw")
    return tmp_path / "raw"


def convert(capfd, raw: Path) -> tuple[Ending, dict[str, tuple[str, str]]]:
    """Run createproject; return how it ended and status and reason by patient."""
    output = raw.parent / "out.zip"
    ending = end(capfd, "createproject", raw, "-o", output, "-j", 1)
    with open(
        raw.parent / "out_mapping.csv", encoding="utf-8", errors="surrogateescape", newline=""
    ) as stream:
        rows = list(csv.DictReader(stream))
    return ending, {row["patient"]: (row["status"], row["reason"]) for row in rows}


@pytest.mark.parametrize("content", ["nothing", "a patient without study", "files only"])
def test_empty_project(tmp_path, capfd, content):
    folder = tmp_path / "raw"
    folder.mkdir()
    if content == "a patient without study":
        (folder / "patient").mkdir()
    elif content == "files only":
        (folder / "notes.txt").touch()
    refuses(capfd, "createproject", folder, "-o", tmp_path / "p.zip", naming="no study")


def test_raw_project_that_is_a_file(tmp_path, capfd):
    (tmp_path / "raw").touch()
    output = tmp_path / "p.zip"
    refuses(capfd, "createproject", tmp_path / "raw", "-o", output, status=2, naming="not a folder")


def test_empty_study_folder_is_skipped(raw, capfd):
    (raw / "empty" / "1").mkdir(parents=True)
    ending, by_patient = convert(capfd, raw)
    assert ending.status == 0
    assert by_patient["empty"][0] == "skipped"


def test_links_in_circles_and_into_nothing_pipes_sockets_and_devices_are_passed_over(raw, capfd):
    """To open any of these could last for ever."""
    study = raw / "seg" / "1"
    (study / "CT" / "circle").symlink_to(study)
    (study / "self.dcm").symlink_to(study / "self.dcm")
    (study / "dangling.nii.gz").symlink_to(raw / "absent.nii.gz")
    os.mkfifo(study / "PET" / "pipe.dcm")
    os.mkfifo(study / "ct.nii.gz")
    with contextlib.suppress(PermissionError):
        os.mknod(study / "zero.dcm", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    with contextlib.suppress(PermissionError):
        os.mknod(study / "pet.nii", 0o600 | stat.S_IFCHR, os.makedev(1, 9))
    there = os.getcwd()
    os.chdir(study)  # socket paths are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("mask.nii")
    os.chdir(there)
    (raw / "loop").symlink_to(raw)
    ending, by_patient = convert(capfd, raw)
    assert by_patient["seg"][0] == "written", by_patient
    assert ending.status == 0, ending.said


def test_unreadable_folders_and_files_fail_their_study_alone(raw):
    (raw / "seg" / "1" / "CT").chmod(0)
    next((raw / "rtstruct" / "1" / "PET").iterdir()).chmod(0)
    ending = mortal(raw.parent, "createproject", "raw", "-o", "out.zip", "-j", "1")
    (raw / "seg" / "1" / "CT").chmod(0o755)
    assert ending.status == 3, ending.said
    assert len(ending.errors) == 2, ending.said
    assert all("permission" in line and is_clear(line) for line in ending.errors), ending.said
    with zipfile.ZipFile(raw.parent / "out.zip") as archive:
        assert len(archive.namelist()) == 3 + 1


def test_non_ascii_and_odd_names_are_taken(raw, sound, capfd):
    names = ["Müller Jürgen", "山田太郎", "Ξένια", "a\nb", "‮gnp", "-o", "x" * 200, "é"]
    for name in names:
        shutil.copytree(raw / "nifti", raw / name)
    os.rename(raw / "nifti", os.fsencode(raw) + b"/\xff\xfe")
    ending, _ = convert(capfd, raw)
    assert ending.status == 0, ending.said
    with zipfile.ZipFile(raw.parent / "out.zip") as archive:
        assert len(archive.namelist()) == 3 * (2 + len(names) + 1) + 1


def nifti_fault(**fields: object) -> Callable[[bytes], bytes]:
    """Replace fields of a gzipped NIfTI header."""

    def break_(content: bytes) -> bytes:
        raw = gzip.decompress(content)
        header = nibabel.Nifti1Header(raw[:348], check=False)
        for name, value in fields.items():
            header[name] = value
        return gzip.compress(header.binaryblock + raw[348:])

    return break_


NO_AFFINE = {"srow_x": 0, "srow_y": 0, "srow_z": 0, "qform_code": 0, "sform_code": 1}
NIFTI_FAULTS = {
    "zero affine": (nifti_fault(**NO_AFFINE), "zero or degenerate affine"),
    "non-finite affine": (nifti_fault(srow_x=np.nan), "non-finite affine"),
    "wrong magic": (nifti_fault(magic=b"nii"), "wrong magic"),
    "pair": (nifti_fault(magic=b"ni1"), ".hdr and .img"),
    "truncated gzip": (lambda content: content[:-20], "truncated or damaged"),
    "truncated within": (lambda c: gzip.compress(gzip.decompress(c)[:-1]), "truncated"),
    "empty": (lambda content: b"", "not NIfTI"),
    "text": (lambda content: b"Dear colleague,", "not NIfTI"),
    "4D": (nifti_fault(dim=[4, 12, 24, 14, 2, 1, 1, 1]), "4D"),
    "no orientation": (nifti_fault(sform_code=0, qform_code=0), "does not say where it lies"),
}


@pytest.mark.parametrize("role", ["CT", "PET", "MASK"])
def test_broken_nifti_fails_its_study_alone(raw, capfd, role):
    for name, (break_, _) in NIFTI_FAULTS.items():
        shutil.copytree(raw / "nifti", raw / name)
        path = raw / name / "1" / f"{role}.nii.gz"
        path.write_bytes(break_(path.read_bytes()))
    ending, by_patient = convert(capfd, raw)
    assert ending.status == 3
    assert len(ending.errors) == len(NIFTI_FAULTS)
    for name, (_, reason) in NIFTI_FAULTS.items():
        status, found = by_patient[name]
        assert status == "failed"
        assert reason in found, name
        assert role.lower() in found.lower()
    assert all(map(is_clear, ending.errors)), ending.said
    assert all(by_patient[name][0] == "written" for name in STUDIES)


def deep(content: bytes) -> bytes:
    at = content.find(b"PN", 132) - 4
    return content[:at] + mutations.nested(mutations.DEEP) + content[at:]


def wrong_representation(keyword: str, vr: bytes) -> Callable[[bytes], bytes]:
    def break_(content: bytes) -> bytes:
        tag = pydicom.tag.Tag(keyword)
        at = content.index(struct.pack("<HH", tag.group, tag.element), 132) + 4
        return content[:at] + vr + content[at + 2 :]

    return break_


DICOM_FAULTS = {
    "cut in the preamble": lambda content: content[:140],
    "cut in the file meta": lambda content: content[:200],
    "cut before Modality": lambda content: content[: content.index(b"\x08\x00\x60\x00", 132)],
    "cut in the header": lambda content: content[:900],
    "cut in the pixels": lambda content: content[:-10],
    "sequences 2000 deep": deep,
    "text for a position": wrong_representation("ImagePositionPatient", b"PN"),
    "numbers for rows": wrong_representation("Rows", b"DS"),
    "sequence for an id": wrong_representation("PatientID", b"SQ"),
    "no such representation": wrong_representation("SeriesInstanceUID", b"ZZ"),
}


@pytest.mark.parametrize("series", ["CT", "PET", "MASK"])
@pytest.mark.parametrize("end_slice", [False, True], ids=["inner slice", "end slice"])
def test_broken_dicom_fails_its_study_or_changes_nothing(raw, sound, capfd, series, end_slice):
    """Above all, no slice is dropped silently, at the ends of a series neither."""
    template = "seg" if series == "MASK" else "rtstruct"
    for name, break_ in DICOM_FAULTS.items():
        shutil.copytree(raw / template, raw / name)
        files = sorted((raw / name / "1" / series).iterdir())
        path = files[0] if end_slice else files[len(files) // 2]
        path.write_bytes(break_(path.read_bytes()))
    ending, by_patient = convert(capfd, raw)
    assert all(map(is_clear, ending.errors)), ending.said
    volumes = volumes_in_zip(raw.parent / "out.zip")
    expected = next(v for h, v in volumes.items() if h == hash_of(raw, template))
    for name in DICOM_FAULTS:
        if by_patient[name][0] == "written":
            assert_same(volumes[hash_of(raw, name)], expected, name)
        else:
            status, reason = by_patient[name]
            assert status == "failed" or "left out" in reason, (name, reason)


def hash_of(raw: Path, patient: str) -> str:
    return pseudonym(patient, "1")


def assert_same(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], case: object
) -> None:
    assert found.keys() == expected.keys(), case
    for name, array in expected.items():
        assert np.array_equal(found[name], array), (case, name)


# --- zips ------------------------------------------------------------------------------------


def volumes_in_zip(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return values and affines by hash, read by nibabel alone."""
    volumes: dict[str, dict[str, np.ndarray]] = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".nii.gz"):
                image = nibabel.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))
                key, role = Path(name).name.removesuffix(".nii.gz").rsplit("_", 1)
                study = volumes.setdefault(key, {})
                study[role], study[f"{role} affine"] = np.asanyarray(image.dataobj), image.affine
    return volumes


def zipped(path: Path, members: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("break_", "naming"),
    [
        (lambda content: b"", "in.zip.*: not a zip"),
        (lambda content: b"not a zip at all" * 100, "in.zip.*: not a zip"),
        (lambda content: content[: len(content) // 2], "in.zip.*(truncated|not a zip)"),
        (lambda content: content[:-30], "in.zip.*(truncated|not a zip)"),
        (lambda content: zipped_bytes({}), "no study in it"),
        (lambda content: zipped_bytes({"readme.txt": b""}), "no study in it"),
        (lambda content: zipped_bytes({"/a/b/b_ct.nii.gz": b""}), "absolute or '..' path"),
        (lambda content: zipped_bytes({"../b/b_ct.nii.gz": b""}), "absolute or '..' path"),
        (lambda content: zipped_bytes({"a/../../b/b_ct.nii.gz": b""}), "absolute or '..' path"),
        (lambda content: zipped_bytes({"C:\\b\\b_ct.nii.gz": b""}), "absolute or '..' path"),
        (lambda content: zipped_bytes({"..\\b_ct.nii.gz": b""}), "absolute or '..' path"),
        (lambda content: content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00",
                                         b"PK\x01\x02\x14\x03\x14\x00\x01\x00"), "encrypted"),
    ],
)  # fmt: skip
def test_files_that_are_no_project_zip(sound, tmp_path, capfd, break_, naming):
    path = tmp_path / "in.zip"
    path.write_bytes(break_((sound / "project.zip").read_bytes()))
    refuses(capfd, "preprocessing", path, "-o", tmp_path / "out.h5", naming=naming)


def zipped_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def test_study_twice_in_a_zip(sound, tmp_path, capfd):
    members = members_of(sound / "project.zip")
    twice = members | {f"other/{name.partition('/')[2]}": body for name, body in members.items()}
    path = zipped(tmp_path / "in.zip", twice)
    refuses(capfd, "preprocessing", path, "-o", tmp_path / "out.h5", naming="twice")


def test_names_that_can_name_no_file_are_refused(tmp_path, capfd):
    """A hash of 300 characters, or one that moves the cursor, was taken for a study's."""
    for key in ("h" * 300, "a\x1b[31mb", "a\nb", "..", "."):
        path = zipped(tmp_path / "in.zip", {f"p/{key}/{key}_ct.nii.gz": b""})
        refuses(capfd, "preprocessing", path, "-o", tmp_path / "out.h5", naming="in.zip")


def bomb_in_gzip(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content) + bytes(200 << 20), 1)


def promise(content: bytes) -> bytes:
    """A header that promises 16 GB."""
    spread = {"pixdim": [1, 1, 1, 1, 1, 1, 1, 1], "dim": [3, 1290, 1290, 1290, 1, 1, 1, 1]}
    rows = {"srow_x": [1, 0, 0, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 1, 0]}
    return nifti_fault(**spread, **rows, qform_code=0, datatype=64, bitpix=64)(content)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("break_", [bomb_in_gzip, promise])
def test_bombs_fail_their_study_alone_and_take_no_memory(sound, tmp_path, method, break_):
    members = members_of(sound / "project.zip")
    victim = next(name for name in members if name.endswith("_ct.nii.gz"))
    members[victim] = break_(members[victim])
    path = zipped(tmp_path / "in.zip", members, compression=method)
    arguments = [str(path), "-o", str(tmp_path / "o.h5"), *GRID, "-j", "1"]
    ending = confined(lambda: preprocessing.main(arguments))
    assert ending.status == 3, ending.said
    assert len(ending.errors) == 1
    assert is_clear(ending.errors[0]), ending.said
    with h5py.File(tmp_path / "o.h5") as file:
        assert len(file["image"]) == len(STUDIES) - 1


def test_member_that_inflates_beyond_its_size_fails_its_study(sound, tmp_path, capfd):
    """The directory understates a member of 100 MB of zeros."""
    members = members_of(sound / "project.zip")
    victim = next(name for name in members if name.endswith("_ct.nii.gz"))
    size = len(members[victim])
    inflated = zipped_bytes(members | {victim: members[victim] + bytes(100 << 20)})
    path = tmp_path / "in.zip"
    honest = struct.pack("<I", size + (100 << 20))
    path.write_bytes(inflated.replace(honest, struct.pack("<I", size)))
    ending = end(capfd, "preprocessing", path, "-o", tmp_path / "o.h5", *GRID, "-j", 1)
    assert ending.status in (1, 3), ending.said
    assert all(map(is_clear, ending.errors)), ending.said


# --- HDF5 files ------------------------------------------------------------------------------


def foreign(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "w") as file:
        change(file)


HDF5_FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "not an HDF5"),
    "text": (lambda path: path.write_bytes(b"not HDF5" * 1000), "not an HDF5"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "truncated"),
    "header only": (lambda path: os.truncate(path, 600), "truncated"),
    "foreign": (lambda path: foreign(path, lambda f: f.create_dataset("x", data=1)), ""),
    "other groups": (lambda path: foreign(path, lambda f: f.create_group("image")), ""),
    "another group": (lambda path: changed(path, lambda f: f.create_group("extra")), "groups"),
    "a group less": (lambda path: changed(path, lambda f: delete(f, "mask_iso")), "groups"),
    "no parameters": (
        lambda path: changed(path, lambda f: delete(f.attrs, "parameters")),
        "checksum",
    ),
    "parameters of no use": (
        lambda path: changed(path, lambda f: f.attrs.update(parameters="[]")),
        "checksum",
    ),
    "a mask less": (
        lambda path: changed(path, lambda f: delete(f["mask"], next(iter(f["mask"])))),
        "different studies",
    ),
    "link to a pipe": (lambda path: linked_to_a_pipe(path), "links to a device, pipe or folder"),
    "link to a device": (
        lambda path: replaced(path, "image", lambda *old: h5py.ExternalLink("/dev/zero", "/")),
        "links to something else",
    ),
    "virtual": (lambda path: replaced(path, "image", virtual), "no dataset with its values"),
    "values elsewhere": (
        lambda path: replaced(path, "mask", elsewhere), "no dataset with its values",
    ),
    "complex": (
        lambda path: replaced(path, "image", lambda g, k, old: old.astype(np.complex64)), "types",
    ),
    "masks of floats": (
        lambda path: replaced(path, "mask", lambda g, k, old: old.astype(np.float32)), "types",
    ),
}  # fmt: skip


def changed(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def replaced(path: Path, group: str, by: Callable[[h5py.Group, str, np.ndarray], object]) -> None:
    """Replace the first dataset of a group by what a function makes, or puts there, of it."""
    with h5py.File(path, "r+") as file:
        key = sorted(file[group])[0]
        old = file[group][key][()]
        del file[group][key]
        new = by(file[group], key, old)
        if new is not None:
            file[group][key] = new


def linked_to_a_pipe(path: Path) -> None:
    """libhdf5 waited for ever for someone to write to it."""
    os.mkfifo(path.with_name("pipe"))
    replaced(path, "image", lambda group, key, old: h5py.ExternalLink("pipe", f"/image/{key}"))


def virtual(group: h5py.Group, key: str, old: np.ndarray) -> None:
    """Values from another dataset; of one from itself libhdf5 crashes."""
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[...] = h5py.VirtualSource(".", f"{group.name}/{key}", shape=old.shape)
    group.create_virtual_dataset(key, layout)


def elsewhere(group: h5py.Group, key: str, old: np.ndarray) -> None:
    """Values from any file of this machine; merging took the reference over."""
    group.create_dataset(key, old.shape, old.dtype, external=[("/etc/hostname", 0, old.nbytes)])


@pytest.mark.parametrize("fault", ["link to a pipe", "virtual", "values elsewhere"])
def test_verifying_a_file_with_values_elsewhere_names_the_study(sound, tmp_path, capfd, fault):
    path = tmp_path / "in.h5"
    shutil.copy(sound / "3d.h5", path)
    HDF5_FAULTS[fault][0](path)
    ending = end(capfd, "mergeh5", "--verify", path)
    assert ending.status == 3, ending.said
    assert f"{min(set_of_keys(sound / '3d.h5'))}: " in ending.errors[0]
    assert "cannot be read" in ending.errors[0]


def delete(holder, name: str) -> None:
    del holder[name]


@pytest.mark.parametrize("fault", HDF5_FAULTS)
@pytest.mark.parametrize("script", ["mergeh5", "project_2d"])
def test_files_that_are_no_hdf5_of_ours(sound, tmp_path, capfd, script, fault):
    break_, naming = HDF5_FAULTS[fault]
    path = tmp_path / "in.h5"
    shutil.copy(sound / "3d.h5", path)
    break_(path)
    refuses(capfd, script, path, "-o", tmp_path / "out.h5", naming=f"in.h5: .*{naming}")


@pytest.mark.parametrize("script", ["mergeh5", "project_2d"])
def test_folder_for_an_hdf5_file(tmp_path, capfd, script):
    folder = tmp_path / "in.h5"
    folder.mkdir()
    ending = end(capfd, script, folder, "-o", tmp_path / "out.h5")
    assert ending.status in (1, 2)
    assert is_clear(ending.errors[0]), ending.said


def test_projections_are_not_projected_again(sound, tmp_path, capfd):
    refuses(capfd, "project_2d", sound / "2d.h5", "-o", tmp_path / "out.h5", naming="2d.h5: ")


@pytest.mark.parametrize("attribute", ["spacing", "project", "suv_range", "orientation", "affine"])
@pytest.mark.parametrize("value", [None, "x", -1.0, float("nan"), [1.0, 2.0]], ids=str)
def test_attributes_that_cannot_be_fail_their_study_alone(sound, tmp_path, capfd, attribute, value):
    path = tmp_path / "in.h5"
    shutil.copy(sound / "3d.h5", path)
    with h5py.File(path, "r+") as file:
        key = next(iter(file["image"]))
        del file["image"][key].attrs[attribute]
        if value is not None:
            file["image"][key].attrs[attribute] = value
    pictures = ["--gif", tmp_path / "gif", "--png", tmp_path / "png"]
    ending = end(capfd, "project_2d", path, "-o", tmp_path / "out.h5", *ANGLES, *pictures, "-j", 1)
    assert ending.status in (0, 1, 3), ending.said
    assert all(map(is_clear, ending.errors)), ending.said
    if ending.status == 3:
        with h5py.File(tmp_path / "out.h5") as file:
            assert {name.rpartition("_")[0] for name in file["image"]} == set_of_keys(path) - {key}


def set_of_keys(path: Path) -> set[str]:
    with h5py.File(path) as file:
        return set(file["image"])


def with_an_endless_heap(content: bytes) -> bytes:
    """Return an HDF5 file with a heap of strings that libhdf5 reads for ever: of length 0."""
    start = content.index(b"GCOL") + 16
    return content[:start] + bytes(2000) + content[start + 2000 :]


@pytest.mark.parametrize("command", ["mergeh5 -o", "mergeh5 --verify", "project_2d -o"])
def test_endless_heap_of_strings_in_an_input_is_named(sound, tmp_path, command):
    path = tmp_path / "in.h5"
    path.write_bytes(with_an_endless_heap((sound / "3d.h5").read_bytes()))
    script, option = command.split()
    output = [str(tmp_path / "out.h5")] if option == "-o" else []
    ending = confined(lambda: MAIN[script]([str(path), option, *output]))
    assert ending.status == 1, ending.said
    assert all(map(is_clear, ending.errors)), ending.said
    assert f"{path}: reading it never ends" in ending.said


@pytest.mark.parametrize(
    ("script", "given", "made", "how"),
    [("preprocessing", "project.zip", "3d.h5", GRID), ("project_2d", "3d.h5", "2d.h5", ANGLES)],
)
def test_endless_heap_of_strings_in_the_old_output_is_made_anew(
    sound, tmp_path, script, given, made, how
):
    output = tmp_path / made
    output.write_bytes(with_an_endless_heap((sound / made).read_bytes()))
    ending = confined(lambda: MAIN[script]([str(sound / given), "-o", str(output), *how]))
    assert ending.status == 0, ending.said
    assert "made anew" in ending.said
    assert output.read_bytes() == (sound / made).read_bytes()
