"""The project zip: ``NAME/<hash>/<hash>_{ct,petsuv,mask}.nii.gz`` and ``NAME/studies.json``.

The only module that knows the layout. A part of one study is a project zip too, so assembling
the parts of a run and keeping studies of an earlier output are one copy of stored members.
"""

import functools
import json
import lzma
import re
import shutil
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from common.errors import (
    StageError,
    StudyError,
    Unreachable,
    Warning,
    blaming,
    system_error,
    warnings_from,
)
from common.geometry import Image
from common.hashing import LONGEST_NAME, can_name_study, fingerprint
from common.nifti import encode_nifti, read_nifti
from common.suv.provenance import coarse

ROLES = ("ct", "petsuv", "mask")
_IMAGE_NAMES = {"ct": "CT", "petsuv": "PET", "mask": "mask"}
"""What messages call the image of each role."""

_MEMBER = re.compile(
    r"(?:(?P<project>.+)/)?(?P<hash>[^/]+)/(?P=hash)_(?P<role>ct|petsuv|mask)\.nii\.gz"
)
_INDEX = "studies.json"
_LONGEST_REASON = 1000
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1 << 22

SCHEMA_VERSION = 1
"""Of the layout and of the records in ``studies.json``, each of which says so."""

_LOCAL_HEADER = struct.Struct("<4s2xH18xHH")
_LOCAL_SIGNATURE = b"PK\3\4"
_END_RECORD = struct.Struct("<4s6xH10x")
_LONGEST_DESCRIPTOR = 24
"""What may follow a member's data: its size and checksum once more [bytes]."""

_LARGEST_RECORD = 1 << 16
"""What ``studies.json`` may hold a study [bytes]."""

_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError,
    ValueError, OverflowError, struct.error,
)  # fmt: skip
"""What zipfile raises on bytes that are no zip."""


@dataclass(frozen=True)
class Member:
    """One image in the zip: its name, size [bytes] and CRC-32."""

    name: str
    size: int
    crc: int


@dataclass(frozen=True)
class ArchivedStudy:
    """One study of a project zip.

    Attributes
    ----------
    hash, project : str
    members : dict of role to Member
        Of "ct", "petsuv" and "mask" those that are there.
    record : dict
        Its entry in ``studies.json``; empty where the zip has none.
    """

    hash: str
    project: str
    members: Mapping[str, Member]
    record: Mapping[str, Any]

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the roles that the zip lacks."""
        return tuple(_IMAGE_NAMES[role] for role in ROLES if role not in self.members)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """How its SUV were made; empty where that is not known."""
        found: Mapping[str, Any] = self.record.get("suv", {})
        return found

    @property
    def warnings(self) -> list[Warning]:
        """What was warned of when it was put into the zip."""
        return warnings_from(self.record.get("warnings", []), self.record.get("warning_kinds", []))

    @property
    def content(self) -> str:
        """Digest of all that the zip holds of this study, from its directory alone."""
        members = {role: [member.size, member.crc] for role, member in self.members.items()}
        return fingerprint([self.hash, self.project, members, dict(self.record)])


def read_directory(path: Path) -> dict[str, ArchivedStudy]:
    """Return the studies of a project zip by hash, in order of hash.

    Raises
    ------
    Unreachable
        It can't be looked at.
    StageError
        Not a zip, truncated, encrypted, with members that a zip of ours can't have, with a
        directory that differs from what the file holds, or made by a newer version.
    """
    try:
        with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            for entry in entries:
                _check_member(path, entry)
            _check_directory(path, stream, archive)
            records = _read_records(archive)
    except (*_DAMAGED, OSError) as error:
        # zipfile takes a disk that fails for a damaged zip.
        if (refusal := system_error(error)) is not None:
            raise _unreachable(path, refusal) from error
        raise StageError(
            f"{path}: not a zip file, or truncated or damaged: make it again with createproject.py"
        ) from error
    studies = _studies(path, entries, records)
    _check_records(path, studies, records)
    return studies


def read_absent(path: Path) -> dict[str, tuple[str, str]]:
    """Return status and reason, by hash, of the studies that a zip tells of and does not hold.

    Raises
    ------
    StageError
        As `read_directory`.
    """
    held = read_directory(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = _read_records(archive)
    except (*_DAMAGED, OSError) as error:
        if (refusal := system_error(error)) is not None:
            raise _unreachable(path, refusal) from error
        raise StageError(f"{path}: cannot be read: check it") from error
    return {
        study_hash: (record["status"], str(record.get("reason", "")))
        for study_hash, record in sorted(records.items())
        if record.get("status") in ("skipped", "failed")
        and study_hash not in held
        and can_name_study(study_hash)
    }


def _studies(
    path: Path, entries: list[zipfile.ZipInfo], records: Mapping[str, Any]
) -> dict[str, ArchivedStudy]:
    members: dict[str, dict[str, Member]] = {}
    projects: dict[str, str] = {}
    for entry in entries:
        match = _MEMBER.fullmatch(entry.filename)
        if match is None:
            continue
        study_hash, role = match["hash"], match["role"]
        roles = members.setdefault(study_hash, {})
        project = match["project"] or path.stem
        _check_name(path, study_hash)
        if role in roles or projects.setdefault(study_hash, project) != project:
            raise StageError(
                f"{path}: holds study {study_hash} twice: make it again with createproject.py"
            )
        roles[role] = Member(entry.filename, entry.file_size, entry.CRC)
    return {
        study_hash: ArchivedStudy(
            study_hash,
            projects[study_hash],
            {role: roles[role] for role in ROLES if role in roles},
            _as_told_now(records.get(study_hash, {})),
        )
        for study_hash, roles in sorted(members.items())
    }


def _as_told_now(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record without the exact weights that earlier versions put into a zip."""
    return {**record, "suv": coarse(record["suv"])} if "suv" in record else record


def _check_member(path: Path, entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or re.match(r"[A-Za-z]:", entry.filename):
        raise StageError(
            f"{path}: holds a member with an absolute or '..' path: not a zip of createproject.py"
        )
    if entry.flag_bits & 1:
        raise StageError(f"{path}: is encrypted: give a plain zip")
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise zipfile.BadZipFile("a stored member has two sizes")


# --- directory against content ---------------------------------------------------------------


def _check_directory(path: Path, stream: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Refuse a directory that lacks members, or calls them otherwise than they do themselves.

    One flipped bit in it takes away the entries that follow, or an image from its study.
    """
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    borders = [*(entry.header_offset for entry in entries), archive.start_dir]
    missing = [*_members_between(stream, 0, borders[0])]
    for entry, end in zip(entries, borders[1:], strict=True):
        plain_end = entry.header_offset + _LOCAL_HEADER.size + len(entry.orig_filename.encode())
        is_image = _MEMBER.fullmatch(entry.filename)
        if is_image and plain_end + entry.compress_size == end:
            # As in a zip of ours; what reads an image holds its name against the directory's.
            continue
        name, begin = _local_header(stream, entry.header_offset)
        if name != entry.orig_filename:
            raise StageError(
                f"{path}: its directory is damaged, it has another name than {_shown(name)} "
                "itself: make it again with createproject.py"
            )
        missing += _members_between(stream, begin + entry.compress_size, end)
    if missing:
        listed = ", ".join(sorted(set(map(_shown, missing))))
        raise StageError(
            f"{path}: its directory is damaged, it lacks {listed}: make it again with "
            "createproject.py"
        )
    if _number_promised(stream, archive) not in (None, len(entries) % (1 << 16)):
        raise StageError(
            f"{path}: its directory is damaged, it lists {len(entries)} members and promises "
            "another number: make it again with createproject.py"
        )


def _local_header(stream: BinaryIO, offset: int) -> tuple[str, int]:
    """Return the name that stands before a member's data, and where those begin."""
    stream.seek(offset)
    header = stream.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_SIGNATURE):
        raise zipfile.BadZipFile("no member where the directory says")
    _, flags, n_name, n_extra = _LOCAL_HEADER.unpack(header)
    name = stream.read(n_name).decode("utf-8" if flags & 0x800 else "cp437")
    return name, offset + _LOCAL_HEADER.size + n_name + n_extra


def _members_between(stream: BinaryIO, begin: int, end: int) -> Iterator[str]:
    """Yield the name of a member where the directory says there is none.

    That of the first tells: those that follow it have lost their entries with it.
    """
    while end - begin >= _LOCAL_HEADER.size:
        stream.seek(begin)
        at = stream.read(_LONGEST_DESCRIPTOR + len(_LOCAL_SIGNATURE)).find(_LOCAL_SIGNATURE)
        if at < 0:
            return
        name, data = _local_header(stream, begin + at)
        yield name
        stream.seek(begin + at + 18)
        begin = data + int.from_bytes(stream.read(4), "little")


def _number_promised(stream: BinaryIO, archive: zipfile.ZipFile) -> int | None:
    """Return how many members the last record promises; None where another one does."""
    n_after = _END_RECORD.size + len(archive.comment)
    stream.seek(max(stream.seek(0, 2) - n_after, 0))
    signature, number = _END_RECORD.unpack(stream.read(_END_RECORD.size))
    return number if signature == b"PK\5\6" and number != (1 << 16) - 1 else None


def _shown(member: str) -> str:
    """Return the study that a member is of; other names are not ours to say."""
    match = _MEMBER.fullmatch(member)
    if match is not None and can_name_study(match["hash"]):
        return f"study {match['hash']}"
    return _INDEX if PurePosixPath(member).name == _INDEX else "a file of another name"


def _check_records(
    path: Path, studies: Mapping[str, ArchivedStudy], records: Mapping[str, Any]
) -> None:
    """Refuse a zip that lacks images which ``studies.json`` tells of, or is of a newer version."""
    for study_hash, record in sorted(records.items()):
        version = record.get("schema_version", SCHEMA_VERSION)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise StageError(
                f"{path}: was made by a newer version (schema_version {version!r:.20}, this one "
                f"reads up to {SCHEMA_VERSION}): use that version, or make it again with this one"
            )
        shapes = record.get("shapes", {})
        held = studies[study_hash].members if study_hash in studies else {}
        lacking = [role for role in ROLES if role in shapes and role not in held]
        if lacking:
            raise StageError(
                f"{path}: lacks the {_IMAGE_NAMES[lacking[0]]} of study "
                f"{study_hash[:LONGEST_NAME]!r}, which its {_INDEX} tells of: make it again with "
                "createproject.py"
            )


def _check_name(path: Path, study_hash: str) -> None:
    """Refuse what can't name files, datasets and lines of a log."""
    if not can_name_study(study_hash):
        raise StageError(
            f"{path}: holds a study whose name is hidden, a formula, not printable or longer than "
            f"{LONGEST_NAME} characters: rename its folder and files"
        )


def _read_records(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return the entries of ``studies.json`` by hash; those of another form are foreign."""
    entries = archive.infolist()
    records: dict[str, Any] = {}
    for entry in entries:
        if PurePosixPath(entry.filename).name != _INDEX:
            continue
        if entry.file_size > (len(entries) + 1) * _LARGEST_RECORD:
            raise zipfile.BadZipFile(f"{_INDEX} is implausibly large")
        try:
            found = json.loads(archive.read(entry))
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            records.update({k: v for k, v in found.items() if _is_record(v)})
    return records


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("suv", {}), dict)
        and isinstance(value.get("shapes", {}), dict)
        and isinstance(value.get("warnings", []), list)
        and isinstance(value.get("warning_kinds", []), list)
    )


def _opened(path: Path) -> zipfile.ZipFile:
    """Return the zip, opened once a process however many studies it serves."""
    status = path.stat()
    return _opened_version(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _opened_version(path: Path, *version: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def read_image(path: Path, study: ArchivedStudy, role: str) -> Image:
    """Read one image of a study; checksums of zip and gzip are verified.

    Raises
    ------
    StudyError
        Damaged, truncated, or larger than its header promises.
    Unreachable
        The zip can't be read any more.
    StageError
        The zip is another one than was planned with.
    """
    member, name = study.members[role], _IMAGE_NAMES[role]
    try:
        archive = _opened(path)
        entry = archive.getinfo(member.name)
        if (entry.file_size, entry.CRC) != (member.size, member.crc):
            raise KeyError(member.name)
        with archive.open(entry) as stream:
            image = read_nifti(stream, member.size, name)  # type: ignore[arg-type]
            # The NIfTI may end before the member does: read on, so that zip checks its CRC.
            while stream.read(_CHUNK):
                pass
            return image
    except KeyError as error:
        raise StageError(f"{path}: has been made anew since this run began: run again") from error
    except (*_DAMAGED, OSError) as error:
        if (refusal := system_error(error)) is not None:
            raise _unreachable(path, refusal) from error
        raise _damaged(name) from error


def _unreachable(path: Path, error: OSError) -> Unreachable:
    return Unreachable(
        f"{path}: cannot be read ({error.strerror}): check that its disk is mounted, and its "
        "permissions"
    )


def _damaged(name: str) -> StudyError:
    return StudyError(f"the {name} is damaged in the zip (checksum): make the zip again")


@dataclass(frozen=True)
class Part:
    """A project zip of one study that is being written; what it is given it does not keep."""

    archive: zipfile.ZipFile
    project: str
    hash: str

    def add_image(self, role: str, image: Image) -> None:
        """Write the image of a role."""
        name = f"{self.project}/{self.hash}/{self.hash}_{role}.nii.gz"
        # Its size is not known before it is written; the assembled zip has plain entries.
        with self.archive.open(_entry(name), "w", force_zip64=True) as member:
            member.writelines(encode_nifti(image))

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Write what is told of the study."""
        told = {**record, "schema_version": SCHEMA_VERSION}
        name = f"{self.project}/{_INDEX}"
        self.archive.writestr(_entry(name), _records_text({self.hash: told}))


@contextmanager
def part_of_study(path: Path, project: str, study_hash: str) -> Iterator[Part]:
    """Yield a project zip of one study, to be given its images and its record."""
    with zipfile.ZipFile(path, "w") as archive:
        yield Part(archive, project, study_hash)


def assemble(
    path: Path,
    sources: Mapping[str, Path],
    project: str,
    absent: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Write the project zip of the studies in `sources` (hash to a zip that holds it).

    Of `absent` studies, by hash, the status and the reason are told; no identity is in them.

    Members are copied as they are, in order of name; the result depends on the studies alone.

    Raises
    ------
    DamagedSource
        A source is damaged.
    """
    records: dict[str, Any] = {}
    uses = Counter(sources.values())
    with zipfile.ZipFile(path, "w") as target, ExitStack() as kept_open:
        shared = {
            source: (kept_open.enter_context(zipfile.ZipFile(source)), read_directory(source))
            for source, n_studies in uses.items()
            if n_studies > 1
        }
        for study_hash, source in sorted(sources.items()):
            with blaming(source):
                if source in shared:
                    archive, studies = shared[source]
                    records[study_hash] = _copy_study(archive, studies[study_hash], target)
                else:
                    study = read_directory(source).get(study_hash)
                    if study is None:
                        raise StageError(f"{source}: lacks study {study_hash}: make it again")
                    with zipfile.ZipFile(source) as archive:
                        records[study_hash] = _copy_study(archive, study, target)
        for study_hash, (status, reason) in (absent or {}).items():
            records[study_hash] = {"status": status, "reason": reason[:_LONGEST_REASON]}
        target.writestr(_entry(f"{project}/{_INDEX}"), _records_text(records))


def _copy_study(
    source: zipfile.ZipFile, study: ArchivedStudy, target: zipfile.ZipFile
) -> Mapping[str, Any]:
    for member in sorted(study.members.values(), key=lambda member: member.name):
        entry = _entry(member.name)
        entry.file_size = member.size
        try:
            with source.open(member.name) as reader, target.open(entry, "w") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)
        except _DAMAGED as error:
            raise StageError(
                f"{source.filename}: study {study.hash} is damaged (checksum): "
                "run again with --force"
            ) from error
    return study.record


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_STORED
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry


def _records_text(records: Mapping[str, Any]) -> str:
    return json.dumps(records, indent=1, sort_keys=True, ensure_ascii=True) + "\n"
