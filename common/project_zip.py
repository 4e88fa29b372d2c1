"""The project zip: ``NAME/<hash>/<hash>_{ct,petsuv,mask}.nii.gz`` and ``NAME/studies.json``.

The only module that knows the layout. A part of one study is a project zip too, so assembling
the parts of a run and keeping studies of an earlier output are one copy of stored members.
"""

import errno
import functools
import json
import lzma
import re
import shutil
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import StageError, StudyError
from common.geometry import Image
from common.hashing import fingerprint
from common.nifti import encode_nifti, read_nifti

ROLES = ("ct", "petsuv", "mask")
ROLE_NAMES = {"ct": "CT", "petsuv": "PET", "mask": "mask"}

_MEMBER = re.compile(
    r"(?:(?P<project>.+)/)?(?P<hash>[^/]+)/(?P=hash)_(?P<role>ct|petsuv|mask)\.nii\.gz"
)
_INDEX = "studies.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CHUNK = 1 << 22

_LARGEST_RECORD = 1 << 16
"""What ``studies.json`` may hold a study [bytes]."""

LONGEST_NAME = 100
"""Characters of a study's name."""

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
        return tuple(ROLE_NAMES[role] for role in ROLES if role not in self.members)

    @property
    def content(self) -> str:
        """Digest of all that the zip holds of this study, from its directory alone."""
        members = {role: [member.size, member.crc] for role, member in self.members.items()}
        return fingerprint([self.hash, self.project, members, dict(self.record)])


def read_directory(path: Path) -> dict[str, ArchivedStudy]:
    """Return the studies of a project zip by hash, in order of hash.

    Raises
    ------
    StageError
        Not a zip, truncated, encrypted, or with members that a zip of ours can't have.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                _check_member(path, entry)
            records = _read_records(archive)
    except (*_DAMAGED, OSError) as error:
        # A seek to a damaged offset is an OSError too.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise StageError(f"{path}: cannot be read ({error.strerror}): check it") from error
        raise StageError(
            f"{path}: not a zip file, or truncated or damaged: make it again with createproject.py"
        ) from error
    return _studies(path, entries, records)


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
            records.get(study_hash, {}),
        )
        for study_hash, roles in sorted(members.items())
    }


def _check_member(path: Path, entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or re.match(r"[A-Za-z]:", entry.filename):
        raise StageError(
            f"{path}: holds a member with an absolute or '..' path: not a zip of createproject.py"
        )
    if entry.flag_bits & 1:
        raise StageError(f"{path}: is encrypted: give a plain zip")


def _check_name(path: Path, study_hash: str) -> None:
    """Refuse what can't name files, datasets and lines of a log."""
    if study_hash.startswith(".") or not study_hash.isprintable() or len(study_hash) > LONGEST_NAME:
        raise StageError(
            f"{path}: holds a study whose name is hidden, not printable or longer than "
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
    """
    member, name = study.members[role], ROLE_NAMES[role]
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
        raise StudyError("the zip has been made anew since this run began: run again") from error
    except OSError as error:
        if error.errno is None:
            raise _damaged(name) from error
        raise StudyError(
            f"the {name} cannot be read from the zip ({error.strerror}): check the disk"
        ) from error
    except _DAMAGED as error:
        raise _damaged(name) from error


def _damaged(name: str) -> StudyError:
    return StudyError(f"the {name} is damaged in the zip (checksum): make the zip again")


def write_part(
    path: Path,
    project: str,
    study_hash: str,
    images: Mapping[str, Image],
    record: Mapping[str, Any],
) -> None:
    """Write a project zip that holds one study: its images by role and its record."""
    with zipfile.ZipFile(path, "w") as archive:
        for role in sorted(images):
            name = f"{project}/{study_hash}/{study_hash}_{role}.nii.gz"
            # Its size is not known before it is written; the assembled zip has plain entries.
            with archive.open(_entry(name), "w", force_zip64=True) as member:
                member.writelines(encode_nifti(images[role]))
        archive.writestr(_entry(f"{project}/{_INDEX}"), _records_text({study_hash: record}))


def assemble(path: Path, sources: Mapping[str, Path], project: str) -> None:
    """Write the project zip of the studies in `sources` (hash to a zip that holds it).

    Members are copied as they are, in order of name; the result depends on the studies alone.

    Raises
    ------
    StageError
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
            if source in shared:
                archive, studies = shared[source]
                records[study_hash] = _copy_study(archive, studies[study_hash], target)
            else:
                with zipfile.ZipFile(source) as archive:
                    study = read_directory(source)[study_hash]
                    records[study_hash] = _copy_study(archive, study, target)
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
