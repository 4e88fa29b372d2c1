"""Seeded damage to every kind of file ends in a plausible result or in a named refusal.

No surprise, no hang of 30 s, no memory beyond 2 GB, no damaged volume accepted where a checksum
could have told. TUMORVOLUME_STRESS multiplies the number of damaged files of each kind.
"""

import gzip
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from confined import Ending, endings, is_clear
from mutations import damaged
from tiny_studies import ANGLES, GRID, write_chain

import createproject
import mergeh5
import preprocessing
import project_2d
from common.errors import StageError, StudyError
from common.hdf5 import studies
from common.run.worker import attempt

CASES = 12 * int(os.environ.get("TUMORVOLUME_STRESS", "1"))

Volumes = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_chain(folder)
    return folder


# --- what is damaged -------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A file to be damaged, and the script that reads it."""

    kind: str
    pattern: str
    script: str


SUBJECTS = {
    "CT": Subject("dicom", "raw/rtstruct/1/CT/*", "createproject"),
    "PET": Subject("dicom", "raw/rtstruct/1/PET/*", "createproject"),
    "SEG": Subject("dicom", "raw/seg/1/MASK/*", "createproject"),
    "RTSTRUCT": Subject("dicom", "raw/rtstruct/1/MASK/*", "createproject"),
    "PET header": Subject("dicom", "raw/nifti/1/PET_header.dcm", "createproject"),
    "NIfTI CT": Subject("nifti", "raw/nifti/1/CT.nii.gz", "createproject"),
    "NIfTI PET": Subject("nifti", "raw/nifti/1/PET.nii.gz", "createproject"),
    "NIfTI mask": Subject("nifti", "raw/nifti/1/MASK.nii.gz", "createproject"),
    "zip": Subject("zip", "project.zip", "preprocessing"),
    "3D file merged": Subject("hdf5", "3d.h5", "mergeh5"),
    "3D file projected": Subject("hdf5", "3d.h5", "project_2d"),
}


def case(sound: Path, work: Path, subject: Subject, seed: int) -> tuple[int, str]:
    """Damage one file, run the script, and tell what is wrong with the result, if anything."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = sorted(sound.glob(subject.pattern))[0]
    content, blind = damaged(subject.kind, path.read_bytes(), seed)
    match subject.script:
        case "createproject":
            study = path.relative_to(sound).parents[-3]
            shutil.copytree(sound / study, work / study, copy_function=os.link)
            (work / path.relative_to(sound)).unlink()
            (work / path.relative_to(sound)).write_bytes(content)
            status = createproject.main([str(work / "raw"), "-o", str(work / "out"), "-j", "1"])
            found, expected = zip_volumes, zip_volumes(sound / "project.zip")
        case "preprocessing":
            (work / "in").write_bytes(content)
            status = preprocessing.main(
                [str(work / "in"), "-o", str(work / "out"), *GRID, "-j", "1"]
            )
            found, expected = hdf5_volumes, hdf5_volumes(sound / "3d.h5")
        case "mergeh5":
            (work / "in").write_bytes(content)
            status = mergeh5.main([str(work / "in"), "-o", str(work / "out")])
            found, expected = verified_volumes, hdf5_volumes(sound / "3d.h5")
        case "project_2d":
            (work / "in").write_bytes(content)
            pictures = ["--gif", str(work / "gif"), "--png", str(work / "png")]
            arguments = [str(work / "in"), "-o", str(work / "out"), *ANGLES, "-j", "1", *pictures]
            status = project_2d.main(arguments)
            found, expected = hdf5_volumes, hdf5_volumes(sound / "2d.h5")
    if status not in (0, 3):
        return status, "output written" if (work / "out").exists() else ""
    checksummed = blind and subject.kind != "dicom"
    return status, fault(found, work / "out", expected if checksummed else None)


# --- what is wrong with the result -----------------------------------------------------------


def fault(read: Callable[[Path], Volumes], path: Path, expected: Volumes | None) -> str:
    """Return what is wrong with an output: not plausible, or not as from the sound file."""
    for key, study in read(path).items():
        for name, array in study.items():
            if not np.isfinite(array).all():
                return f"{name} is not finite"
            if name.endswith("affine"):
                if not 1e-6 < abs(np.linalg.det(array)) < 1e12:
                    return f"{name} is implausible"
            elif name.startswith("image") and not (array.min() >= 0 and array.max() <= 1):
                return f"{name} leaves [0, 1]"
            elif "mask" in name and array.dtype.kind not in "iu":
                return f"{name} holds no labels"
            if expected is not None and key not in expected:
                return f"a study named {key!r} has come up"
            if expected is not None and not np.array_equal(array, expected[key][name]):
                return f"{name} differs: damage was accepted silently"
    return ""


def zip_volumes(path: Path) -> Volumes:
    """Values and affines by hash and role, read by nibabel."""
    volumes: Volumes = {}
    with zipfile.ZipFile(path) as archive:
        for name in (name for name in archive.namelist() if name.endswith(".nii.gz")):
            image = nibabel.Nifti1Image.from_bytes(gzip.decompress(archive.read(name)))
            key, role = Path(name).name.removesuffix(".nii.gz").rsplit("_", 1)
            study = volumes.setdefault(key, {})
            study[role], study[f"{role} affine"] = np.asanyarray(image.dataobj), image.affine
    return volumes


def hdf5_volumes(path: Path) -> Volumes:
    """Arrays by key and group, read by h5py."""
    with h5py.File(path) as file:
        return {key: {group: file[group][key][()] for group in file} for key in file["image"]}


def verified_volumes(path: Path) -> Volumes:
    """As `hdf5_volumes`, but without what `read_dataset` refuses: chunks are merged unread."""
    volumes: Volumes = {}
    for key in studies.read_keys(path):
        try:
            arrays = {group: studies.read_dataset(path, group, key)[0] for group in studies.GROUPS}
        except (StudyError, StageError):
            continue
        volumes[key] = arrays
    return volumes


# --- the laws --------------------------------------------------------------------------------


def complaint(ending: Ending) -> str:
    """Return what is wrong with how a case ended; empty where all is well."""
    if ending.status not in (0, 1, 3):
        return f"status {ending.status}"
    if "Traceback" in ending.said or "Warning" in ending.said:
        return "a traceback or a library's warning"
    if not all(map(is_clear, ending.errors)):
        return "an error line that is not clear"
    if (ending.status != 0) != bool(ending.errors):
        return "status and error lines disagree"
    return ending.verdict or ""


def run_here(worker, tasks, jobs, on_outcome, *cluster):
    """Run studies without workers: every batch of cases has a process of its own."""
    outcomes = [attempt(worker, task) for task in tasks]
    for outcome in outcomes:
        on_outcome(outcome)
    return outcomes


@pytest.mark.parametrize("name", SUBJECTS)
def test_damage_ends_in_a_plausible_result_or_in_a_named_refusal(
    sound, tmp_path, name, monkeypatch
):
    subject = SUBJECTS[name]
    monkeypatch.setattr("common.run.stage.run_studies", run_here)
    if subject.kind != "hdf5":  # libhdf5 crashes, or never ends: its work is always done apart
        monkeypatch.setattr(
            "common.run.output.in_own_process", lambda call, *arguments: call(*arguments)
        )
    cases = [
        lambda seed=seed: case(sound, tmp_path / f"{seed}", subject, seed) for seed in range(CASES)
    ]
    found = list(endings(cases))
    assert len(found) == CASES
    how = Counter({0: "success", 1: "refused", 3: "study failed"}.get(e.status, "?") for e in found)
    print(f"{name}: {CASES} damaged, {dict(how)}")
    complaints = [
        f"seed {seed}: {what}: {ending.said[-600:]}"
        for seed, ending in enumerate(found)
        if (what := complaint(ending))
    ]
    if complaints:
        pytest.fail("\n".join(complaints))


# --- verifying -------------------------------------------------------------------------------


def everything(path: Path) -> dict[str, object]:
    """Every value and attribute of an HDF5 file, read by h5py alone."""
    found: dict[str, object] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        found[name] = {key: repr(value) for key, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            found[f"{name}()"] = repr(item[()].tolist())

    with h5py.File(path) as file:
        visit("/", file)
        file.visititems(visit)
    return found


def verify_case(path: Path, sound: Path, seed: int) -> tuple[int, str]:
    """Flip one bit, verify, and tell whether what passes for sound is."""
    content = bytearray(sound.read_bytes())
    random = np.random.default_rng(seed)
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    status = mergeh5.main(["--verify", str(path)])
    try:
        accepted = status == 0 and everything(path) != everything(sound)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        return status, f"sound, but {type(error).__name__}" if status == 0 else ""
    return status, "damage was accepted silently" if accepted else ""


@pytest.mark.parametrize("kind", ["3D", "2D", "stack", "stack without compression"])
def test_verifying_overlooks_no_flipped_bit(sound, tmp_path, kind):
    """Of stacks, masks could change, and the list of keys, unnoticed."""
    path = sound / {"3D": "3d.h5", "2D": "2d.h5"}.get(kind, "stack.h5")
    if kind.startswith("stack"):
        path = tmp_path / "stack.h5"
        more = ["--stack", "--compression", "none" if "without" in kind else "gzip"]
        assert project_2d.main([str(sound / "3d.h5"), "-o", str(path), *ANGLES, *more]) == 0
    cases = [
        lambda seed=seed: verify_case(tmp_path / f"{seed}.h5", path, seed) for seed in range(CASES)
    ]
    found = list(endings(cases))
    assert {ending.status for ending in found} <= {0, 1, 3}
    assert any(ending.status for ending in found)
    assert [(seed, e.verdict) for seed, e in enumerate(found) if e.verdict] == []


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_same_seed_does_the_same_damage(sound, name):
    content = sorted(sound.glob(SUBJECTS[name].pattern))[0].read_bytes()
    kind = SUBJECTS[name].kind
    once = [damaged(kind, content, seed) for seed in range(10)]
    assert [damaged(kind, content, seed) for seed in range(10)] == once
    assert sum(found != content for found, _ in once) >= 8
