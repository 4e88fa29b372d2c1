"""The first stage from its command line: layouts, what leaves the house, reruns, real data."""

import csv
import gzip
import hashlib
import hmac
import html
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path

import layouts
import nibabel
import numpy as np
import pytest
from layouts import BQ_PER_ML, CT_AFFINE, HU, LABELS, PET_AFFINE, SUV

import createproject
import preprocessing
from common.errors import StudyError

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared real studies are not here")


@pytest.fixture
def run(tmp_path, capfd):
    """Run the script on tmp_path/raw; return status, closing line and log."""

    def run_on(*options, raw=None, output=None):
        raw, output = raw or tmp_path / "raw", output or tmp_path / "project.zip"
        try:
            status = createproject.main([str(raw), "-o", str(output), "-j1", *map(str, options)])
        except SystemExit as end:
            status = end.code
        printed, log = capfd.readouterr()
        assert "Traceback" not in log
        return status, printed, log

    return run_on


def counts(printed):
    """Written, unchanged, skipped, failed, as the closing line has them."""
    words = printed.splitlines()[-1].replace(",", "").split()
    return [
        int(words[words.index(each) - 1]) for each in ("written", "unchanged", "skipped", "failed")
    ]


def mapping_of(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
        return {(row["patient"], row["study"]): row for row in csv.DictReader(stream)}


def read_zip(path):
    """Images by hash and role, and studies.json."""
    images = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".nii.gz"):
                _, study_hash, member = name.split("/")
                role = member.removeprefix(f"{study_hash}_").removesuffix(".nii.gz")
                content = gzip.decompress(archive.read(name))
                images.setdefault(study_hash, {})[role] = nibabel.Nifti1Image.from_bytes(content)
            else:
                records = json.loads(archive.read(name))
    return images, records


def voxels(image):
    return np.asarray(image.dataobj)


def hash_of(patient, study, digest=lambda name: hashlib.sha256(name).hexdigest()):
    """The pseudonym as SPEC.md defines it."""
    patient, study = (unicodedata.normalize("NFC", name).encode() for name in (patient, study))
    return digest(patient)[:7] + digest(study)[-3:]


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A study in NIfTI with a header, which is quickly copied."""
    return layouts.nifti_with_header(tmp_path_factory.mktemp("scan"))


@pytest.fixture
def small_project(scan):
    """Fill a project with the study of some patients; return the studies' folders by patient."""

    def fill(raw, n_patients=3):
        patients = [f"p{number}" for number in range(n_patients)]
        return {p: Path(shutil.copytree(scan, raw / p / "scan")) for p in patients}

    return fill


# --- layouts ---------------------------------------------------------------------------------


def test_every_layout_in_one_project(run, tmp_path):
    raw = tmp_path / "raw"
    studies = [
        layouts.subfolders(raw, "one"),
        layouts.tcia(raw),
        layouts.flat(raw),
        layouts.nifti_with_header(raw),
    ]
    mixed = layouts.nifti_mask_beside_dicom(raw)
    status, printed, log = run()
    assert (status, counts(printed), log) == (0, [5, 0, 0, 0], "")
    images, records = read_zip(tmp_path / "project.zip")
    hashes = {hash_of(study.parent.name, study.name) for study in [*studies, mixed]}
    assert images.keys() == records.keys() == hashes
    for by_role in images.values():
        assert np.array_equal(voxels(by_role["ct"]), HU)
        assert by_role["ct"].get_data_dtype() == np.int16
        assert np.abs(voxels(by_role["petsuv"]) - SUV).max() < 1e-5
        assert by_role["petsuv"].get_data_dtype() == np.float32
        assert np.array_equal(voxels(by_role["mask"]), LABELS)
        assert by_role["mask"].get_data_dtype() == np.uint8
        assert np.allclose(by_role["ct"].affine, CT_AFFINE)
        assert np.allclose(by_role["petsuv"].affine, PET_AFFINE)
        assert np.allclose(by_role["mask"].affine, PET_AFFINE)


def test_autopet_by_the_options_of_the_readme(run, tmp_path):
    study = layouts.autopet(tmp_path / "raw")
    status, printed, _ = run(*layouts.AUTOPET_OPTIONS)
    assert (status, counts(printed)) == (0, [1, 0, 0, 0])
    images, records = read_zip(tmp_path / "project.zip")
    found = images[hash_of(study.parent.name, study.name)]
    assert np.array_equal(voxels(found["petsuv"]), SUV.astype(np.float32))
    assert np.array_equal(voxels(found["ct"]), HU[::2, ::2])
    assert records[hash_of(study.parent.name, study.name)]["suv"]["rule"] == "given as SUV"


def test_autopet_without_options_is_not_guessed(run, tmp_path):
    layouts.autopet(tmp_path / "raw")
    status, printed, log = run()
    assert (status, counts(printed)) == (0, [0, 0, 1, 0])
    assert "no DICOM header; 2 candidates for PET (NIfTI file; NIfTI file)" in log


# --- what leaves the house -------------------------------------------------------------------


def with_identity_everywhere(raw):
    """DICOM and NIfTI studies whose headers, names and gzip headers tell who it is."""
    layouts.subfolders(raw)
    study = layouts.nifti_with_header(raw)
    for role in ("CT", "PET", "MASK"):
        image = nibabel.load(study / f"{role}.nii.gz")
        image.header["descrip"] = b"Doe^Jane"
        image.header["aux_file"] = b"Doe.txt"
        image.header["intent_name"] = b"Doe"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Jane Doe 4711"))
        content = image.to_bytes()
        with gzip.GzipFile(study / f"{role}.nii.gz", "wb", mtime=1e9) as stream:
            stream.write(content)
    return raw


def test_no_identity_in_the_bytes_of_the_zip_or_the_log(run, tmp_path):
    raw = with_identity_everywhere(tmp_path / "raw")
    layouts.write_ct(raw / "Doe^Jane" / "incomplete Doe" / "CT")
    two = layouts.subfolders(raw, "ambiguous Doe")
    layouts.write_pet(two / "Doe", SeriesInstanceUID="1.9")
    status, printed, log = run("-v", "--name", "study")
    assert (status, counts(printed)) == (3, [2, 0, 1, 1])
    content = (tmp_path / "project.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "project.zip") as archive:
        members = [archive.read(name) for name in archive.namelist()]
    inflated = [gzip.decompress(each) if each[:2] == b"\x1f\x8b" else each for each in members]
    for part in (*layouts.IDENTITY, "nifti", str(tmp_path)):
        assert not any(part.encode() in each for each in (content, *members, *inflated))
        assert part not in log
    by_study = mapping_of(tmp_path / "project_mapping.csv")
    ambiguous = by_study["Doe^Jane", "ambiguous Doe"]
    assert "Doe/pet_000.dcm" in ambiguous["found"]
    assert "Doe" not in ambiguous["reason"]


def test_the_layout_of_the_zip(run, small_project, tmp_path):
    small_project(tmp_path / "raw")
    run("--name", "FDG")
    with zipfile.ZipFile(tmp_path / "project.zip") as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    hashes = [hash_of(f"p{number}", "scan") for number in range(3)]
    assert names == sorted(names)
    assert set(names) == {"FDG/studies.json"} | {
        f"FDG/{h}/{h}_{role}.nii.gz" for h in hashes for role in ("ct", "petsuv", "mask")
    }
    for entry in entries:
        assert entry.compress_type == zipfile.ZIP_STORED
        assert entry.date_time == (1980, 1, 1, 0, 0, 0)
        assert (entry.comment, entry.extra) == (b"", b"")


def test_nifti_headers_are_blank_but_for_the_grid(run, tmp_path):
    with_identity_everywhere(tmp_path / "raw")
    run()
    blank = nibabel.Nifti1Header()
    told = {"dim", "datatype", "bitpix", "pixdim", "xyzt_units", "qform_code", "sform_code"}
    told |= {"quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"}
    told |= {"srow_x", "srow_y", "srow_z", "scl_slope", "scl_inter", "magic", "vox_offset"}
    with zipfile.ZipFile(tmp_path / "project.zip") as archive:
        members = {n: archive.read(n) for n in archive.namelist() if n.endswith(".nii.gz")}
    assert len(members) == 6
    for content in members.values():
        flags, mtime = content[3], content[4:8]
        assert (flags, mtime) == (0, bytes(4))
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
        assert np.allclose(image.get_sform(), image.get_qform(), atol=1e-5)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert not image.header.extensions
        for field in set(blank.keys()) - told:
            assert image.header[field].tobytes() == blank[field].tobytes()


def test_studies_json_tells_provenance_by_hash(run, small_project, tmp_path):
    small_project(tmp_path / "raw", 1)
    run("--suv-type", "lbm-janma")
    _, records = read_zip(tmp_path / "project.zip")
    record = records[hash_of("p0", "scan")]
    assert record["shapes"] == {"ct": [16, 16, 6], "petsuv": [8, 8, 6], "mask": [8, 8, 6]}
    assert record["spacings"]["ct"] == [2, 2, 4]
    assert record["warnings"] == []
    assert record["hash_lengths"] == [7, 3]
    suv = record["suv"]
    assert (suv["suv_type"], suv["units"], suv["rule"]) == ("lbm-janma", "BQML", "12b")
    assert suv["minutes_to_reference"] == [60, 60]
    assert {"reinterpretations", "warnings", "alternatives", "factor_range"} <= suv.keys()


def test_minimal_provenance_tells_rule_units_and_type_alone(run, small_project, tmp_path):
    small_project(tmp_path / "raw", 1)
    run()
    whole, _ = read_zip(tmp_path / "project.zip")
    assert run("--minimal-provenance")[0] == 0
    images, records = read_zip(tmp_path / "project.zip")
    record = records[hash_of("p0", "scan")]
    assert record["suv"] == {"rule": "12b", "units": "BQML", "suv_type": "bw"}
    assert images.keys() == whole.keys()
    for role, image in images[hash_of("p0", "scan")].items():
        assert (voxels(image) == voxels(whole[hash_of("p0", "scan")][role])).all()
    command = [tmp_path / "project.zip", "-o", tmp_path / "3d.h5", "-j1", "--shape", 8, 8]
    command += ["--measures", tmp_path / "m.csv", "--report", tmp_path / "r.html"]
    assert preprocessing.main([str(each) for each in command]) == 0
    with open(tmp_path / "m.csv", newline="") as stream:
        assert {row["dose_fraction"] for row in csv.DictReader(stream)} == {""}
    page = html.unescape((tmp_path / "r.html").read_text())
    assert "SUV (bw, g/ml), from Units BQML, decay referred to" in page


@pytest.mark.parametrize("jobs", ["-j2", "-j3"])
def test_the_same_input_gives_the_same_bytes(run, small_project, tmp_path, jobs):
    small_project(tmp_path / "raw")
    run(output=tmp_path / "first.zip")
    shutil.copytree(tmp_path / "raw", tmp_path / "again" / "raw", copy_function=shutil.copyfile)
    run(jobs, raw=tmp_path / "again" / "raw", output=tmp_path / "second.zip")
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()


# --- the mapping -----------------------------------------------------------------------------


def test_the_mapping_links_hashes_to_names_for_its_owner_alone(run, small_project, tmp_path):
    raw = tmp_path / "raw"
    small_project(raw, 2)
    (raw / "p1" / "scan" / "MASK.nii.gz").unlink()
    (raw / "p2" / "scan").mkdir(parents=True)
    before = os.umask(0)
    try:
        run("--name", "FDG")
    finally:
        os.umask(before)
    path = tmp_path / "project_mapping.csv"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    rows = mapping_of(path)
    told = {key: (row["status"], row["reason"]) for key, row in rows.items()}
    assert told == {
        ("p0", "scan"): ("written", ""),
        ("p1", "scan"): ("skipped", "no mask"),
        ("p2", "scan"): ("skipped", "no CT, no PET, no mask"),
    }
    for (patient, study), row in rows.items():
        assert (row["project"], row["hash"]) == ("FDG", hash_of(patient, study))


def test_the_name_is_that_of_the_folder_by_default(run, small_project, tmp_path):
    small_project(tmp_path / "raw", 1)
    run()
    assert mapping_of(tmp_path / "project_mapping.csv")["p0", "scan"]["project"] == "raw"
    run("--mapping", tmp_path / "private.csv", output=tmp_path / "other.zip")
    assert "p0" in (tmp_path / "private.csv").read_text()
    assert not (tmp_path / "other_mapping.csv").exists()


def test_one_mapping_serves_several_projects(run, small_project, tmp_path):
    small_project(tmp_path / "A", 1)
    layouts.nifti_with_header(tmp_path / "B")
    for name in ("A", "B", "A"):
        run("--mapping", tmp_path / "m.csv", raw=tmp_path / name, output=tmp_path / f"{name}.zip")
    projects = {key: row["project"] for key, row in mapping_of(tmp_path / "m.csv").items()}
    assert projects == {("p0", "scan"): "A", ("Doe", "nifti"): "B"}


def test_the_mapping_tells_what_was_taken(run, tmp_path):
    """It named the files of failed studies only."""
    layouts.nifti_with_header(tmp_path / "raw")
    layouts.subfolders(tmp_path / "raw", "dicom")
    run()
    rows = mapping_of(tmp_path / "project_mapping.csv").values()
    taken = {row["ct"]: [row["pet"], row["mask"], row["regions"]] for row in rows}
    assert taken.pop("CT.nii.gz") == ["PET.nii.gz", "MASK.nii.gz", ""]
    ((ct, (pet, mask, regions)),) = taken.items()
    assert ct.endswith("(6 slices)")
    assert pet.endswith("(6 slices)")
    assert mask.startswith("MASK/")
    assert regions
    content = (tmp_path / "project_mapping.csv").read_bytes()
    run()
    assert (tmp_path / "project_mapping.csv").read_bytes() == content


def test_shards_that_end_at_once_share_a_mapping(made, tmp_path):
    """Each read it before the other had written, and one's rows were lost."""
    for number in range(4):
        shutil.copytree(made["p1"], tmp_path / "raw" / f"q{number}" / "scan")
    script, options = str(Path(createproject.__file__)), ("--mapping", "m.csv", "-j", "1")
    shards = [
        subprocess.Popen(
            [sys.executable, script, "raw", "-o", f"{n}.zip", "--shard", f"{n}/3", *options],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )
        for n in (1, 2, 3)
    ]
    assert {shard.wait() for shard in shards} <= {0, 1}
    assert len(mapping_of(tmp_path / "m.csv")) == 7
    assert not list(tmp_path.glob("*.lock"))


def test_a_file_that_is_no_mapping_stops_the_run_before_any_work(run, small_project, tmp_path):
    small_project(tmp_path / "raw", 1)
    (tmp_path / "project_mapping.csv").write_text("name;age\n")
    status, printed, log = run()
    assert (status, printed) == (1, "")
    assert "is no mapping" in log
    assert "--mapping" in log
    assert (tmp_path / "project_mapping.csv").read_text() == "name;age\n"
    assert not (tmp_path / "project.zip").exists()


# --- pseudonyms ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_are_hashed_alike_however_they_are_spelled(run, tmp_path, form):
    patient, study = (unicodedata.normalize(form, name) for name in ("Müller^Zoë", "élan"))
    (tmp_path / "raw" / patient / study).mkdir(parents=True)
    run()
    row = mapping_of(tmp_path / "project_mapping.csv")[patient, study]
    assert row["hash"] == hash_of("Müller^Zoë", "élan")


def test_a_key_makes_pseudonyms_that_cannot_be_guessed(run, small_project, tmp_path):
    small_project(tmp_path / "raw", 1)
    key = tmp_path / "key"
    assert run("--new-key", key)[0] == 0
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = key.read_bytes()
    assert len(secret) == 32
    run("--key-file", key)
    expected = hash_of(
        "p0", "scan", lambda name: hmac.new(secret, name, hashlib.sha256).hexdigest()
    )
    assert mapping_of(tmp_path / "project_mapping.csv")["p0", "scan"]["hash"] == expected
    assert run("--new-key", key)[0] == 2
    assert key.read_bytes() == secret


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (
            b"0123456789abcde",
            0o600,
            "has 15 bytes, at least 16 are needed: make one with --new-key",
        ),
        (b"0123456789abcdef", 0o640, "can be read by others: chmod 600"),
        (b"0123456789abcdef", 0o604, "can be read by others: chmod 600"),
        (None, 0, "does not exist"),
    ],
)
def test_a_poor_key_is_refused(run, small_project, tmp_path, content, mode, reason):
    small_project(tmp_path / "raw", 1)
    if content is not None:
        (tmp_path / "key").write_bytes(content)
        (tmp_path / "key").chmod(mode)
    status, _, log = run("--key-file", tmp_path / "key")
    assert status == 2
    assert reason in log


def test_hash_length_counts_digits_of_patient_and_study(run, small_project, tmp_path):
    small_project(tmp_path / "raw", 1)
    run("--hash-length", 12, 5)
    digests = [hashlib.sha256(name).hexdigest() for name in (b"p0", b"scan")]
    row = mapping_of(tmp_path / "project_mapping.csv")["p0", "scan"]
    assert row["hash"] == digests[0][:12] + digests[1][-5:]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([f"p{n}/s" for n in range(17)], "two patients share a pseudonym: lengthen it with "
         "--hash-length 6 1"),
        ([f"p/s{n}" for n in range(17)], "two studies share a pseudonym: lengthen it with "
         "--hash-length 1 6"),
        (["Zoe\u0308/s", "Zo\u00eb/s"], "two patients have folders of the same name"),
        (["p/e\u0301", "p/\u00e9"], "two studies have folders of the same name"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--shard", "2/3")])
def test_one_pseudonym_for_two_stops_the_run_before_any_work(run, tmp_path, folders, message, more):
    # With one digit of each, 17 are one too many.
    for folder in folders:
        (tmp_path / "raw" / folder).mkdir(parents=True)
    (tmp_path / "project.zip").write_bytes(b"old")
    status, printed, log = run("--hash-length", 1, 1, *more)
    assert (status, printed) == (1, "")
    assert message in log
    assert (tmp_path / "project.zip").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "project.zip"}


def test_the_option_that_is_named_helps(run, tmp_path):
    for number in range(17):
        (tmp_path / "raw" / f"p{number}" / "s").mkdir(parents=True)
    assert run("--hash-length", 1, 1)[0] == 1
    assert run("--hash-length", 6, 1)[0] == 0


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--roi", "("], "is not a regular expression"),
        (["--hash-length", "0", "3"], "at least 1"),
        (["--hash-length", "65", "3"], "64"),
        (["--hash-length", "7"], "2 arguments"),
        (["--tracer", "0"], "at least 1"),
        (["--suv-type", "lbm"], "invalid choice"),
        (["--pet-units", "kbq"], "invalid choice"),
        (["--name", "a/b"], "can't be a folder's name"),
        (["--name", ".."], "can't be a folder's name"),
        (["--name", "C:"], "can't be a folder's name"),
        (["--name", "a\nb"], "can't be a folder's name"),
        (["--mapping", "nowhere/m.csv"], "nowhere"),
        (["--mapping", "."], "folder"),
        (["--mapping", "project.zip"], "another file of this run"),
        (["--shard", "3/2"], "I/N"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_end_with_status_2(
    run, small_project, tmp_path, monkeypatch, options, reason
):
    small_project(tmp_path / "raw", 1)
    monkeypatch.chdir(tmp_path)
    status, printed, log = run(*options)
    assert (status, printed) == (2, "")
    assert reason in log
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    ("raw", "output", "reason"),
    [
        ("nowhere", "o.zip", "does not exist"),
        ("file", "o.zip", "is not a folder"),
        ("raw", "nowhere/o.zip", "does not exist"),
        ("raw", "raw", "raw"),
        ("raw", "folder", "is a folder"),
    ],
)
def test_impossible_paths_end_with_status_2(run, small_project, tmp_path, raw, output, reason):
    small_project(tmp_path / "raw", 1)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    status, _, log = run(raw=tmp_path / raw, output=tmp_path / output)
    assert status == 2
    assert reason in log


@pytest.mark.parametrize("option", ["-o", "--mapping"])
def test_the_key_is_never_written_over(run, small_project, tmp_path, option):
    small_project(tmp_path / "raw", 1)
    key = tmp_path / "key"
    run("--new-key", key)
    secret = key.read_bytes()
    assert run("--key-file", key, option, key)[0] == 2
    assert key.read_bytes() == secret


@pytest.mark.parametrize("folders", [[], ["patient"]])
def test_an_empty_project_ends_with_status_1(run, tmp_path, folders):
    for folder in ["", *folders]:
        (tmp_path / "raw" / folder).mkdir(exist_ok=True)
    status, printed, log = run()
    assert (status, printed) == (1, "")
    assert "it must hold <patient>/<study>/ folders" in log
    assert not (tmp_path / "project.zip").exists()


# --- outcomes --------------------------------------------------------------------------------


def test_one_bad_study_never_stops_the_others(run, small_project, tmp_path):
    raw = tmp_path / "raw"
    folders = small_project(raw, 5)
    (folders["p0"] / "PET.nii.gz").write_bytes(b"\x1f\x8b junk")
    layouts.write_nifti(folders["p1"] / "MASK.nii.gz", LABELS * 0)
    layouts.write_pet(tmp_path, PatientWeight=None)[0].rename(folders["p2"] / "PET_header.dcm")
    (folders["p3"] / "CT.nii.gz").unlink()
    (raw / "p5").mkdir()
    status, printed, log = run()
    assert (status, counts(printed)) == (3, [1, 0, 2, 3])
    rows = mapping_of(tmp_path / "project_mapping.csv")
    reasons = {patient: (row["status"], row["reason"]) for (patient, _), row in rows.items()}
    assert reasons["p4"] == ("written", "")
    assert reasons["p3"] == ("skipped", "no CT")
    assert reasons["p5"][0] == "skipped"
    assert reasons["p5"][1].startswith("no study folder: move the patient's files")
    assert reasons["p0"][0] == reasons["p1"][0] == reasons["p2"][0] == "failed"
    assert "the PET is truncated or damaged" in reasons["p0"][1]
    assert "--allow-empty-mask" in reasons["p1"][1]
    assert "PatientWeight (0010,1030)" in reasons["p2"][1]
    for patient in ("p0", "p1", "p2"):
        study_hash = rows[patient, "scan"]["hash"]
        assert f"error: {study_hash}: {reasons[patient][1]}" in log
    assert set(read_zip(tmp_path / "project.zip")[0]) == {hash_of("p4", "scan")}


def test_a_study_refused_after_its_ct_was_written_leaves_nothing(small_project, tmp_path):
    pet = small_project(tmp_path / "raw", 1)["p0"] / "PET.nii.gz"
    pet.write_bytes(pet.read_bytes()[:-100])
    parser = createproject.build_parser()
    options = parser.parse_args([str(tmp_path / "raw"), "-o", str(tmp_path / "project.zip")])
    createproject.check_options(parser, options)
    (job,), _ = createproject.plan(createproject.pseudonymised(options, ()), options)
    part = tmp_path / "parts" / "study.zip"
    part.parent.mkdir()
    with pytest.raises(StudyError, match="the PET is truncated"):
        createproject.convert_study(replace(job, part=part))
    assert [*part.parent.iterdir()] == []


def test_incomplete_studies_are_no_error(run, tmp_path):
    layouts.write_ct(tmp_path / "raw" / "p" / "scan")
    status, printed, log = run()
    assert (status, counts(printed)) == (0, [0, 0, 1, 0])
    assert f"{hash_of('p', 'scan')}: skipped, no PET, no mask" in log
    images, records = read_zip(tmp_path / "project.zip")
    assert images == {}
    told = {"status": "skipped", "reason": "no PET, no mask"}
    assert {key: record for key, record in records.items() if key == hash_of("p", "scan")} == {
        hash_of("p", "scan"): told
    }


def test_what_is_said_goes_by_hash_not_by_name(run, small_project, tmp_path):
    # Whoever has the sorted list of patients would read a keyed pseudonym off the order.
    folders = small_project(tmp_path / "raw", 8)
    for patient in ("p1", "p4", "p6"):
        (folders[patient] / "MASK.nii.gz").unlink()
    for patient in ("p2", "p5", "p7"):
        (folders[patient] / "CT.nii.gz").write_bytes(b"damaged")
    key = tmp_path / "key"
    key.write_bytes(b"a secret key of 24 bytes")
    key.chmod(0o600)
    _, table, _ = run("--key-file", key, "--dry-run")
    _, _, log = run("--key-file", key, "-v")
    rows = mapping_of(tmp_path / "project_mapping.csv")
    by_name = [row["hash"] for _, row in sorted(rows.items())]
    assert by_name != sorted(by_name)
    for said in (table, log):
        found = [line for line in said.splitlines() if any(each in line for each in by_name)]
        in_order = [each for line in found for each in by_name if each in line]
        assert list(dict.fromkeys(in_order)) == sorted(by_name)


def test_the_closing_line(run, small_project, tmp_path):
    small_project(tmp_path / "raw", 2)
    _, printed, _ = run()
    assert printed == (
        f"2 studies: 2 written, 0 unchanged, 0 skipped, 0 failed -> {tmp_path / 'project.zip'}\n"
    )


def test_every_option_of_the_conversion_reaches_it(run, small_project, tmp_path):
    folders = small_project(tmp_path / "raw", 1)
    layouts.write_nifti(folders["p0"] / "MASK.nii.gz", LABELS * 0)
    layouts.write_pet(tmp_path, PatientWeight=70_000)[0].rename(folders["p0"] / "PET_header.dcm")
    layouts.write_nifti(folders["p0"] / "PET.nii.gz", BQ_PER_ML[1:].astype(np.float32))
    refusals = [
        ([], "--trust-geometry"),
        (["--trust-geometry"], "--allow-empty-mask"),
        (["--trust-geometry", "--allow-empty-mask", "--strict"], "--strict"),
        (["--trust-geometry", "--allow-empty-mask", "--tracer", "2"], "--tracer"),
        (["--trust-geometry", "--allow-empty-mask", "--mask", "CT*", "--ct", "x"], "--ct"),
    ]
    for options, reason in refusals:
        _, printed, log = run(*options)
        assert counts(printed)[:2] == [0, 0]
        assert reason in log
    assert counts(run("--trust-geometry", "--allow-empty-mask")[1]) == [1, 0, 0, 0]


# --- reruns ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(scan, tmp_path_factory):
    """A project of three studies, made once."""
    folder = tmp_path_factory.mktemp("finished")
    for number in range(3):
        shutil.copytree(scan, folder / "raw" / f"p{number}" / "scan")
    assert createproject.main([str(folder / "raw"), "-o", str(folder / "project.zip")]) == 0
    return folder


@pytest.fixture
def made(finished, tmp_path):
    """The finished project and its outputs, for a test to change; the studies' folders."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return {f"p{number}": tmp_path / "raw" / f"p{number}" / "scan" for number in range(3)}


def identity_of(path):
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def later(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_where_nothing_is_new_nothing_is_written(run, made, tmp_path):
    before = {path.name: identity_of(path) for path in tmp_path.iterdir() if path.is_file()}
    status, printed, log = run()
    assert (status, counts(printed), log) == (0, [0, 3, 0, 0], "")
    after = {path.name: identity_of(path) for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    assert before.keys() == {"project.zip", "project_mapping.csv"}


@pytest.mark.parametrize(
    "change",
    [
        lambda study: later(study / "PET_header.dcm"),
        lambda study: (study / "notes.txt").write_text(""),
        lambda study: (study / "CT.nii.gz").rename(study / "the CT.nii.gz"),
    ],
    ids=["touched", "file added", "file renamed"],
)
def test_only_the_changed_study_is_made_again(run, made, tmp_path, change):
    change(made["p1"])
    content = (tmp_path / "project.zip").read_bytes()
    assert counts(run()[1]) == [1, 2, 0, 0]
    assert (tmp_path / "project.zip").read_bytes() == content
    assert counts(run()[1]) == [0, 3, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        ["--suv-type", "bsa"],
        ["--name", "other"],
        ["--allow-empty-mask"],
        ["--mask", "MASK*"],
        ["--pet-units", "bqml"],
        ["--force"],
    ],
)
def test_another_option_makes_all_again(run, made, options):
    assert counts(run(*options)[1]) == [3, 0, 0, 0]


def test_a_new_study_is_added(run, made, tmp_path):
    shutil.copytree(made["p1"], tmp_path / "raw" / "p3" / "scan")
    assert counts(run()[1]) == [1, 3, 0, 0]
    assert len(read_zip(tmp_path / "project.zip")[0]) == 4


def test_a_study_that_vanished_is_dropped_and_told(run, made, tmp_path):
    shutil.rmtree(tmp_path / "raw" / "p1")
    status, printed, log = run()
    assert (status, counts(printed)) == (0, [0, 2, 0, 0])
    assert hash_of("p1", "scan") in log
    assert "no longer in the input and stays out" in log
    images, records = read_zip(tmp_path / "project.zip")
    assert images.keys() == records.keys() == {hash_of(p, "scan") for p in ("p0", "p2")}
    assert mapping_of(tmp_path / "project_mapping.csv")["p1", "scan"]["status"] == "gone"


def test_a_study_that_fails_now_is_dropped(run, made, tmp_path):
    (made["p1"] / "CT.nii.gz").write_bytes(b"")
    status, printed, _ = run()
    assert (status, counts(printed)) == (3, [0, 2, 0, 1])
    assert hash_of("p1", "scan") not in read_zip(tmp_path / "project.zip")[0]
    row = mapping_of(tmp_path / "project_mapping.csv")["p1", "scan"]
    assert (row["status"], row["input"], row["output"]) == ("failed", "", "")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"no zip"),
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
    ],
    ids=["junk", "truncated", "empty"],
)
def test_a_damaged_old_output_is_made_anew(run, made, tmp_path, spoil):
    path = tmp_path / "project.zip"
    content = path.read_bytes()
    spoil(path)
    status, printed, log = run()
    assert (status, counts(printed)) == (0, [3, 0, 0, 0])
    assert "made anew" in log
    assert path.read_bytes() == content


def test_an_output_replaced_by_hand_is_not_believed(run, made, tmp_path):
    content = (tmp_path / "project.zip").read_bytes()
    other = layouts.nifti_with_header(tmp_path / "other")
    layouts.write_nifti(other / "PET.nii.gz", (BQ_PER_ML * 2).astype(np.float32))
    other.rename(other.with_name("scan"))
    (tmp_path / "other" / "Doe").rename(tmp_path / "other" / "p0")
    run("--name", "raw", raw=tmp_path / "other", output=tmp_path / "other.zip")
    (tmp_path / "other.zip").replace(tmp_path / "project.zip")
    status, printed, log = run()
    assert (status, counts(printed)) == (0, [3, 0, 0, 0])
    assert "not as the mapping says" in log
    assert (tmp_path / "project.zip").read_bytes() == content


def test_a_lost_mapping_is_made_again_with_its_studies(run, made, tmp_path):
    path = tmp_path / "project_mapping.csv"
    content = path.read_bytes()
    path.unlink()
    status, printed, log = run()
    assert (status, counts(printed)) == (0, [3, 0, 0, 0])
    assert "not as the mapping says" in log
    assert path.read_bytes() == content


def test_skipped_studies_are_told_once(run, made, tmp_path):
    (made["p1"] / "MASK.nii.gz").unlink()
    assert "skipped, no mask" in run()[2]
    status, printed, log = run()
    assert (status, counts(printed), log) == (0, [0, 2, 1, 0], "")
    (made["p1"] / "CT.nii.gz").unlink()
    assert "skipped, no CT, no mask" in run()[2]


def test_shards_are_disjoint_and_make_up_the_whole(run, made, tmp_path):
    whole, _ = read_zip(tmp_path / "project.zip")
    parts = []
    for number in (1, 2):
        output = tmp_path / f"{number}.zip"
        run("--shard", f"{number}/2", "--mapping", tmp_path / "m.csv", output=output)
        parts += read_zip(output)[0]
    assert sorted(parts) == sorted(whole)
    assert {row["hash"] for row in mapping_of(tmp_path / "m.csv").values()} == set(whole)


# --- the dry run -----------------------------------------------------------------------------


def test_a_dry_run_is_a_table_and_writes_nothing(run, tmp_path):
    raw = tmp_path / "raw"
    two = layouts.subfolders(raw, "two")
    layouts.write_ct(two / "CT2", SeriesInstanceUID="1.9")
    layouts.subfolders(raw, "whole")
    shutil.rmtree(layouts.subfolders(raw, "no mask") / "MASK")
    layouts.nifti_with_header(raw)
    status, printed, log = run("--dry-run")
    assert status == 3
    *table, closing = printed.splitlines()
    assert closing == (
        "dry run of 4 studies: 2 would be written, 1 skipped, 1 failed; nothing is written"
    )
    headings = ["study", "would be", "CT", "PET", "mask", "DICOM header", "SUV", "remarks"]
    starts = [table[0].index(heading) for heading in headings]
    cells = [[line[a:b].strip() for a, b in itertools.pairwise([*starts, None])] for line in table]
    assert cells[0] == headings
    series = "DICOM series of 6"
    rule = "BQML, rule 12b"
    ambiguous = f"2 candidates for CT ({series}; {series}): choose with --ct PATTERN"
    ct, ct2 = (f"CT: {series}: GK p.v. 3 Doe | {name}/pet_000.dcm" for name in ("CT", "CT2"))
    pet = f"PET: {series}, ATTN yes: PET corr. Doe | PET/pet_000.dcm"
    assert sorted((row[1:] for row in cells[1:]), reverse=True) == [
        ["written", "NIfTI file", "NIfTI file", "NIfTI file", "DICOM series of 1", rule, ""],
        ["written", series, series, "DICOM RTSTRUCT", "-", rule, ""],
        ["skipped", series, series, "missing", "-", "", f"no mask; {ct}; {pet}"],
        ["failed", "2 candidates", series, "DICOM RTSTRUCT", "-", "", f"{ambiguous}; {ct}; {ct2}"],
    ]  # fmt: skip
    assert [row[0] for row in cells[1:]] == sorted(row[0] for row in cells[1:])
    assert cells[1][0] == hash_of("Doe", "nifti")
    assert log == ""
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_dry_run_foresees_what_only_geometry_tells(run, tmp_path):
    """No overlap and 4D were found by the run itself alone."""
    raw = tmp_path / "raw"
    far = layouts.subfolders(raw, "far")
    layouts.write_ct(
        far / "CT", ImagePositionPatient=layouts.PerSlice(*([999, 0, 4 * k] for k in range(6)))
    )
    for name, volume in (("PET", layouts.SUV), ("MASK", layouts.LABELS)):
        study = layouts.nifti_with_header(raw).rename(raw / "Doe" / name)
        layouts.write_nifti(study / f"{name}.nii.gz", np.stack([volume] * 3, axis=-1))
    aside = layouts.nifti_with_header(raw).rename(raw / "Doe" / "aside")
    affine = layouts.PET_AFFINE.copy()
    affine[0, 3] += 500
    layouts.write_nifti(aside / "MASK.nii.gz", layouts.LABELS, affine)
    status, printed, _ = run("--dry-run")
    assert status == 3
    assert "dry run of 4 studies: 0 would be written, 0 skipped, 4 failed" in printed
    assert "the mask's labelled voxels and the PET do not overlap in space" in printed
    assert "the PET and the CT do not overlap in space" in printed
    assert "the PET holds 3 volumes (4D NIfTI)" in printed
    assert "the mask holds 3 volumes (4D NIfTI)" in printed


def test_a_dry_run_lists_what_cannot_even_be_looked_at(run, tmp_path):
    raw = tmp_path / "raw"
    (raw / "p" / "scan").mkdir(parents=True)
    (raw / "p" / "gone").symlink_to(tmp_path / "nowhere")
    (raw / "q").mkdir()
    status, printed, _ = run("--dry-run")
    assert status == 3
    assert "1 failed" in printed
    assert "a folder cannot be read" in printed
    assert "no study folder" in printed


# --- real data -------------------------------------------------------------------------------


@needs_data
def test_real_patients_are_the_same_from_dicom_and_nifti(run, tmp_path):
    for kind in ("dicom", "nifti"):
        status, printed, _ = run(raw=DATA / f"sts_{kind}", output=tmp_path / f"{kind}.zip")
        assert (status, counts(printed)) == (0, [3, 0, 0, 0])
    from_dicom, _ = read_zip(tmp_path / "dicom.zip")
    from_nifti, _ = read_zip(tmp_path / "nifti.zip")
    studies = sorted((DATA / "sts_nifti").glob("*/*"))
    assert len(from_dicom) == len(studies) == 3
    for study in studies:
        study_hash = hash_of(study.parent.name, study.name)
        one, other = from_dicom[study_hash], from_nifti[study_hash]
        ours, theirs = (
            nib_canonical(x) for x in (one["mask"], nibabel.load(study / "MASK.nii.gz"))
        )
        assert np.array_equal(voxels(ours), voxels(theirs))
        assert voxels(ours).any()
        for role in ("ct", "petsuv", "mask"):
            a, b = nib_canonical(one[role]), nib_canonical(other[role])
            assert a.shape == b.shape
            assert np.allclose(a.affine, b.affine, atol=1e-4)
            assert np.abs(voxels(a).astype(float) - voxels(b)).max() <= 1e-4


def nib_canonical(image):
    return nibabel.as_closest_canonical(image)


DROS = {path.name: path for path in sorted((DATA / "suv_dro").glob("DRO_*"))}


@needs_data
def test_reference_objects_have_their_suv(run, tmp_path):
    for name, dro in DROS.items():
        study = tmp_path / "raw" / name / "scan"
        study.mkdir(parents=True)
        (study / "PT").symlink_to(dro / "PT")
        mask = nibabel.load(dro / "mask" / "DRO_mask.nii.gz")
        layouts.write_nifti(study / "CT.nii.gz", np.zeros(mask.shape, np.int16), mask.affine)
        (study / "mask.nii.gz").symlink_to(dro / "mask" / "DRO_mask.nii.gz")
    status, printed, _ = run()
    assert (status, counts(printed)) == (0, [9, 0, 0, 0])
    images, records = read_zip(tmp_path / "project.zip")
    for name in DROS:
        found = images[hash_of(name, "scan")]
        assert np.allclose(found["petsuv"].affine, found["mask"].affine, atol=1e-4)
        suv = voxels(found["petsuv"])[voxels(found["mask"]) > 0]
        values = [round(float(v), 2) for v in (suv.min(), np.median(suv), suv.max())]
        assert values == [0.2, 1.0, 4.0], name
        assert records[hash_of(name, "scan")]["suv"]["suv_type"] == "bw"
