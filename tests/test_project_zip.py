"""The project zip: what goes in comes out, the same bytes every time; hostile zips are refused."""

import gzip
import io
import json
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from common import project_zip
from common.errors import DamagedSource, StageError, StudyError
from common.geometry import Image
from common.nifti import encode_nifti
from common.run.pool import in_own_process

pytestmark = pytest.mark.timeout(120)

RNG = np.random.default_rng(5)
AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
IMAGES = {
    "ct": Image(RNG.integers(-1000, 1000, (6, 5, 4), np.int16), AFFINE),
    "petsuv": Image(RNG.random((4, 4, 4), np.float32), AFFINE),
    "mask": Image(RNG.integers(0, 3, (4, 4, 4), np.uint8), AFFINE),
}
RECORD = {"suv": {"suv_type": "bw", "weight_kg": 72}, "warnings": ["bed joint"]}
HASHES = ("0a1b2c3d4e", "ffffffffff", "1234567890")


def encoded(image):
    return b"".join(encode_nifti(image))


def write_part(path, project, study_hash, images, record):
    with project_zip.part_of_study(path, project, study_hash) as part:
        for role, image in images.items():
            part.add_image(role, image)
        part.add_record(record)


@pytest.fixture
def parts(tmp_path) -> dict[str, Path]:
    """A zip of one study for each hash."""
    sources = {}
    for number, study_hash in enumerate(HASHES):
        sources[study_hash] = tmp_path / f"{study_hash}.zip"
        record = {**RECORD, "number": number}
        write_part(sources[study_hash], "lymphoma", study_hash, IMAGES, record)
    return sources


@pytest.fixture
def project(parts, tmp_path) -> Path:
    """A zip of three studies."""
    project_zip.assemble(tmp_path / "project.zip", parts, "lymphoma")
    return tmp_path / "project.zip"


def zip_of(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def member(study_hash: str = "abc", role: str = "ct", folder: str = "p/") -> str:
    return f"{folder}{study_hash}/{study_hash}_{role}.nii.gz"


def images_of(path: Path) -> dict[str, dict[str, np.ndarray]]:
    return {
        study_hash: {role: project_zip.read_image(path, study, role).data for role in study.members}
        for study_hash, study in project_zip.read_directory(path).items()
    }


# --- what goes in comes out -------------------------------------------------------------------


def test_studies_are_read_as_they_were_written(project):
    studies = project_zip.read_directory(project)
    assert list(studies) == sorted(HASHES)
    for number, study_hash in enumerate(HASHES):
        study = studies[study_hash]
        assert (study.project, study.missing) == ("lymphoma", ())
        assert study.record == {**RECORD, "number": number, "schema_version": 1}
        for role, image in IMAGES.items():
            read = project_zip.read_image(project, study, role)
            np.testing.assert_array_equal(read.data, image.data)
            np.testing.assert_array_equal(read.affine, image.affine)
            assert read.data.dtype == image.data.dtype


def test_the_layout_is_the_one_promised(project):
    with zipfile.ZipFile(project) as made:
        entries = made.infolist()
    names = [f"lymphoma/{h}/{h}_{role}.nii.gz" for h in HASHES for role in IMAGES]
    assert [entry.filename for entry in entries] == [*sorted(names), "lymphoma/studies.json"]
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert {(entry.extra, entry.comment) for entry in entries} == {(b"", b"")}
    assert subprocess.run(["unzip", "-tq", project], capture_output=True).returncode in (0, 127)


def test_the_bytes_do_not_depend_on_which_files_the_studies_come_from(parts, project, tmp_path):
    pair = tmp_path / "pair.zip"
    project_zip.assemble(pair, {h: parts[h] for h in HASHES[:2]}, "lymphoma")
    mixed = {HASHES[2]: parts[HASHES[2]], HASHES[1]: pair, HASHES[0]: pair}
    for name, sources in (("a", mixed), ("b", dict.fromkeys(HASHES, project))):
        project_zip.assemble(tmp_path / name, sources, "lymphoma")
        assert (tmp_path / name).read_bytes() == project.read_bytes()


def test_the_content_digest_changes_with_images_record_and_project(parts, tmp_path):
    def digest(images=IMAGES, record=RECORD, project="lymphoma"):
        path = tmp_path / "one.zip"
        write_part(path, project, "abc", images, record)
        return project_zip.read_directory(path)["abc"].content

    changed = Image(IMAGES["ct"].data + np.int16(1), AFFINE)
    digests = {
        digest(),
        digest({**IMAGES, "ct": changed}),
        digest({"ct": IMAGES["ct"]}),
        digest(record={"warnings": []}),
        digest(project="melanoma"),
    }
    assert len(digests) == 5
    assert digest() == digest()


def test_an_incomplete_study_says_what_it_lacks(tmp_path):
    path = zip_of(tmp_path / "a.zip", {member(role="ct"): b"x"})
    assert project_zip.read_directory(path)["abc"].missing == ("PET", "mask")


def test_a_study_is_read_from_the_zip_that_was_planned_with(project, parts):
    """Not from one that was put in its place since."""
    study = project_zip.read_directory(project)[HASHES[0]]
    project_zip.read_image(project, study, "ct")
    changed = {**IMAGES, "ct": Image(IMAGES["ct"].data + np.int16(1), AFFINE)}
    write_part(parts[HASHES[0]], "lymphoma", HASHES[0], changed, RECORD)
    project_zip.assemble(project.with_suffix(".new"), parts, "lymphoma")
    project.with_suffix(".new").replace(project)
    with pytest.raises(StageError, match="made anew since this run began: run again"):
        project_zip.read_image(project, study, "ct")
    again = project_zip.read_directory(project)[HASHES[0]]
    np.testing.assert_array_equal(
        project_zip.read_image(project, again, "ct").data, changed["ct"].data
    )


# --- foreign zips -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "p/", "a/b/c/", "Projekt Ü/"])
@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_foreign_zip_is_read_whatever_its_folders_and_compression(folder, method, tmp_path):
    members = {member("abc", r, folder): encoded(IMAGES[r]) for r in IMAGES}
    members |= {"README.txt": b"x", "p/abc/other.nii.gz": b"x", "p/abc/xyz_ct.nii.gz": b"x"}
    path = zip_of(tmp_path / "foreign.zip", members, method)
    study = project_zip.read_directory(path)["abc"]
    assert study.project == (folder.rstrip("/") or "foreign")
    assert study.record == {}
    for role, image in IMAGES.items():
        np.testing.assert_array_equal(project_zip.read_image(path, study, role).data, image.data)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe garbage",
        b"[1, 2]",
        b'{"abc": 5}',
        b'{"abc": {"suv": "75 kg"}}',
        b'{"abc": {"warnings": "one"}}',
        b'{"other": {"suv": {}}}',
        b"[" * 100_000,
        b'{"abc":' * 20_000,
    ],
)
def test_a_studies_json_of_another_form_is_as_none(text, tmp_path):
    path = zip_of(tmp_path / "a.zip", {member(): b"x", "p/studies.json": text})
    assert project_zip.read_directory(path)["abc"].record == {}


def test_a_zip_without_studies_is_empty(tmp_path):
    assert project_zip.read_directory(zip_of(tmp_path / "a.zip", {"README": b"x"})) == {}


# --- refused zips -----------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(StageError) as refused:
        project_zip.read_directory(path)
    assert str(refused.value).startswith(f"{path}: ")
    return str(refused.value).partition(": ")[2]


@pytest.mark.parametrize("content", [b"", b"x", b"PK\3\4", b"PK\5\6" + bytes(18), bytes(5000)])
def test_what_is_no_zip_is_refused_or_empty(content, tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    if content.startswith(b"PK\5\6"):
        assert project_zip.read_directory(path) == {}
    else:
        assert refusal(path).startswith("not a zip file, or truncated or damaged")


def test_every_truncation_is_refused(project):
    whole = project.read_bytes()
    for n_bytes in range(0, len(whole), 37):
        project.write_bytes(whole[:n_bytes])
        assert refusal(project).startswith("not a zip file, or truncated or damaged")


def test_a_missing_zip_and_a_folder_are_named(tmp_path):
    assert refusal(tmp_path / "none.zip").startswith("cannot be read (No such file")
    assert refusal(tmp_path).startswith("cannot be read (Is a directory")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/abc/abc_ct.nii.gz",
        "../abc/abc_ct.nii.gz",
        "p/../../abc/abc_ct.nii.gz",
        "..\\abc\\abc_ct.nii.gz",
        "C:/abc/abc_ct.nii.gz",
        "C:\\abc.txt",
        "\\\\server\\abc.txt",
        "../README",
    ],
)
def test_absolute_and_climbing_paths_are_refused(name, tmp_path):
    path = zip_of(tmp_path / "a.zip", {member(): b"x", name: b"x"})
    assert refusal(path).startswith("holds a member with an absolute or '..' path")


@pytest.mark.parametrize(
    "name", [".", ".hidden", "=1+1", "@a", "a\nb", "\x1b[31m", "x" * 101, "a\u202eb"]
)
def test_studies_that_cannot_be_named_are_refused(name, tmp_path):
    path = zip_of(tmp_path / "a.zip", {member(name): b"x"})
    assert "whose name is hidden, a formula, not printable or longer than" in refusal(path)


def test_one_study_twice_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for other in (member("abc"), member("abc", folder="q/"), member("abc", "mask", "q/")):
            with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
                made.writestr(member("abc"), b"x")
                made.writestr(other, b"x")
            assert refusal(tmp_path / "a.zip").startswith("holds study abc twice")


def test_an_encrypted_zip_is_refused(project):
    content = bytearray(project.read_bytes())
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.index(signature) + offset] |= 1
    project.write_bytes(content)
    assert refusal(project) == "is encrypted: give a plain zip"


def test_a_studies_json_that_inflates_without_end_is_refused(tmp_path):
    path = zip_of(
        tmp_path / "a.zip",
        {member(): b"x", "p/studies.json": b" " * (50 << 20)},
        zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 100_000
    assert refusal(path).startswith("not a zip file, or truncated or damaged")


# --- damaged members --------------------------------------------------------------------------


def test_a_bomb_is_stopped_by_what_its_header_promises(tmp_path):
    """One member inflates to 300 MB behind a header of a few voxels."""
    header = gzip.decompress(encoded(IMAGES["ct"]))
    squeezer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = squeezer.compress(header)
    bomb += b"".join(squeezer.compress(bytes(1 << 24)) for _ in range(20)) + squeezer.flush()
    assert len(bomb) < 1 << 20
    path = zip_of(tmp_path / "a.zip", {member(): bomb})
    study = project_zip.read_directory(path)["abc"]
    code = (
        "import resource, sys; from pathlib import Path\nfrom common import project_zip\n"
        "path = Path(sys.argv[1]); study = project_zip.read_directory(path)['abc']\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: project_zip.read_image(path, study, 'ct')\n"
        "except project_zip.StudyError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    said, grown_kb = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said.startswith("the CT holds more data than its header promises")
    assert int(grown_kb) < 100_000
    assert study.members["ct"].size == len(bomb)


def test_every_damaged_byte_is_found_by_a_checksum(project):
    """Whichever bit of an image's bytes is flipped, it is refused, never read as another."""
    study = project_zip.read_directory(project)[HASHES[0]]
    whole = project.read_bytes()
    with zipfile.ZipFile(project) as made:
        entry = made.getinfo(study.members["ct"].name)
    begin = entry.header_offset + 30 + len(entry.filename)
    rng = random.Random(3)
    for at in range(begin, begin + entry.file_size, 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        project.write_bytes(damaged)
        with pytest.raises(StudyError, match="the CT"):
            project_zip.read_image(project, study, "ct")
    project.write_bytes(whole)
    assert project_zip.read_image(project, study, "ct").data.shape == (6, 5, 4)


def test_a_damaged_directory_ends_in_a_refusal_or_the_same_studies(project):
    """Bits flipped in the directory, sizes, offsets and names among them: nothing is lost."""
    whole = project.read_bytes()
    records = {h: study.record for h, study in project_zip.read_directory(project).items()}
    images = images_of(project)
    begin = whole.index(b"PK\1\2")
    rng = random.Random(4)
    n_refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(begin, len(whole))] ^= 1 << rng.randrange(8)
        project.write_bytes(damaged)
        try:
            found = project_zip.read_directory(project)
            found_images = images_of(project)
        except (StageError, StudyError):
            n_refused += 1
            continue
        assert {h: s.record for h, s in found.items()} == records
        for study_hash, by_role in images.items():
            for role, voxels in by_role.items():
                np.testing.assert_array_equal(found_images[study_hash][role], voxels)
    assert n_refused > 100


def directory_entries(content):
    """Offset and name of each entry of the directory."""
    at = content.index(b"PK\1\2")
    while content[at : at + 4] == b"PK\1\2":
        n_name, n_extra, n_comment = struct.unpack_from("<HHH", content, at + 28)
        yield at, content[at + 46 : at + 46 + n_name].decode()
        at += 46 + n_name + n_extra + n_comment


def spoilt(path, ending, change):
    """Change the entry of the second study's file whose name ends so."""
    content = bytearray(path.read_bytes())
    at = [at for at, name in directory_entries(content) if name.endswith(ending)][
        1 if ending.startswith("_") else 0
    ]
    change(content, at)
    path.write_bytes(content)
    return refusal(path)


def test_entries_that_a_directory_lost_are_named(project):
    """One bit made them the comment of another: their studies were gone, without a word."""

    def lengthen(content, at):
        content[at + 33] ^= 0x20  # the length of the comment: all that follows is one

    said = spoilt(project, "_petsuv.nii.gz", lengthen)
    assert said.startswith("its directory is damaged, it lacks ")
    assert "studies.json" in said
    assert f"study {sorted(HASHES)[2]}" in said


@pytest.mark.parametrize(
    ("ending", "says"),
    [("_ct.nii.gz", f"than study {sorted(HASHES)[1]} itself"), ("studies.json", "studies.json")],
)
def test_a_directory_that_calls_a_file_otherwise_is_refused(project, ending, says):
    """An incomplete study, or no provenance of any."""

    def rename(content, at):
        content[content.index(ending.encode(), at) + 1] ^= 1

    assert says in spoilt(project, ending, rename)


def test_a_number_of_members_that_is_not_held_is_refused(project):
    content = bytearray(project.read_bytes())
    content[-22 + 10] ^= 1
    project.write_bytes(content)
    assert "lists 10 members and promises another number" in refusal(project)


def test_an_image_that_studies_json_tells_of_must_be_there(tmp_path):
    record = {"shapes": {"ct": [6, 5, 4], "petsuv": [4, 4, 4], "mask": [4, 4, 4]}}
    path = tmp_path / "a.zip"
    images = {role: image for role, image in IMAGES.items() if role != "petsuv"}
    write_part(path, "p", "abc", images, record)
    assert refusal(path).startswith("lacks the PET of study 'abc', which its studies.json tells of")


@pytest.mark.parametrize("version", [2, 99, "2.0", None])
def test_a_zip_of_a_newer_version_is_refused(tmp_path, version):
    records = json.dumps({"abc": {"schema_version": version}})
    path = zip_of(tmp_path / "a.zip", {member(): b"x", "p/studies.json": records.encode()})
    assert refusal(path).startswith("was made by a newer version (schema_version ")


def test_zips_of_other_makes_are_not_taken_for_damaged(tmp_path):
    """Members with descriptors after their data, extra fields, in any order, behind a stub."""
    path = tmp_path / "a.zip"
    with open(path, "wb") as stream, zipfile.ZipFile(_Unseekable(stream), "w") as made:
        for role in ("mask", "ct", "petsuv"):
            made.writestr(member(role=role), encoded(IMAGES[role]))
    content = path.read_bytes()
    assert b"PK\x07\x08" in content
    assert images_of(path)["abc"].keys() == set(project_zip.ROLES)
    path.write_bytes(b"#!/bin/sh\nexit\n" + content)
    assert images_of(path)["abc"].keys() == set(project_zip.ROLES)


class _Unseekable(io.RawIOBase):
    """A stream like a pipe: zipfile writes descriptors."""

    def __init__(self, stream):
        self._stream = stream

    def writable(self):
        return True

    def write(self, block):
        return self._stream.write(block)


def test_a_kept_study_that_is_damaged_stops_the_assembly_with_a_remedy(project, tmp_path):
    content = bytearray(project.read_bytes())
    content[content.index(b"_ct.nii.gz") + 100] ^= 1
    project.write_bytes(content)
    with pytest.raises(StageError, match=r"is damaged \(checksum\): run again with --force"):
        project_zip.assemble(tmp_path / "new.zip", dict.fromkeys(HASHES, project), "lymphoma")


@pytest.mark.parametrize("n_left", [0, 100, -30])
def test_a_part_that_was_cut_short_is_named_by_a_worker_too(n_left, parts, tmp_path):
    """It ended in "unexpected BadZipFile"."""
    part = parts[HASHES[1]]
    part.write_bytes(part.read_bytes()[:n_left])
    with pytest.raises(DamagedSource, match="truncated or damaged") as raised:
        in_own_process(project_zip.assemble, tmp_path / "new.zip", parts, "lymphoma")
    assert raised.value.source == part


# --- large zips -------------------------------------------------------------------------------


def test_a_zip_beyond_the_limits_of_the_old_format_is_read_back(parts, tmp_path, monkeypatch):
    """zip64, with the limits lowered to what a test can write."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 300)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 4)
    path = tmp_path / "large.zip"
    project_zip.assemble(path, parts, "lymphoma")
    assert struct.pack("<I", 0x06064B50) in path.read_bytes()
    monkeypatch.undo()
    for images in images_of(path).values():
        for role, image in IMAGES.items():
            np.testing.assert_array_equal(images[role], image.data)


def test_ten_thousand_studies_are_listed_in_seconds_and_opened_once(tmp_path, monkeypatch):
    content = encoded(IMAGES["mask"])
    path = tmp_path / "many.zip"
    hashes = [f"{number:010x}" for number in range(10_000)]
    with zipfile.ZipFile(path, "w") as made:
        for study_hash in hashes:
            for role in IMAGES:
                made.writestr(member(study_hash, role), content)
        made.writestr("p/studies.json", json.dumps(dict.fromkeys(hashes, RECORD)))
    studies = project_zip.read_directory(path)
    assert len(studies) == 10_000
    assert studies[hashes[-1]].record == RECORD
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: opened.append(a) or real(*a, **k))
    for study_hash in hashes[::100]:
        for role in IMAGES:
            project_zip.read_image(path, studies[study_hash], role)
    assert len(opened) == 1


def test_the_gzip_headers_hold_neither_name_nor_time(project):
    study = project_zip.read_directory(project)[HASHES[0]]
    with zipfile.ZipFile(project) as made:
        for each in study.members.values():
            flags, mtime = struct.unpack("<BI", made.read(each.name)[3:8])
            assert (flags, mtime) == (0, 0)
            assert gzip.GzipFile(fileobj=io.BytesIO(made.read(each.name))).read()


# --- studies that are not in it --------------------------------------------------------------


def test_a_zip_tells_of_studies_that_it_does_not_hold_and_why(tmp_path):
    absent = {"ccccccc003": ("failed", "no weight: give one"), "ddddddd004": ("skipped", "no CT")}
    path = tmp_path / "p.zip"
    project_zip.assemble(path, {}, "p", absent)
    assert project_zip.read_directory(path) == {}
    assert project_zip.read_absent(path) == absent
