"""The raw project, ``RAW_PROJECT/<patient>/<study>/``: its studies, their files and their size."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import IncompleteStudy, StageError, StudyError, Unreachable, UnreachableStudy
from common.hashing import fingerprint
from common.nifti import is_nifti_name, stored_bytes

# --- raw project -----------------------------------------------------------------------------

_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")

_UNFINISHED_OUTPUTS = (".zip.parts", ".h5.parts")
"""Names of the folders of interrupted runs, whose output is in the raw project, end so."""


@dataclass(frozen=True)
class Member:
    """A file of a study whose layout is not a folder of its own.

    Attributes
    ----------
    name : str
        Its path below the project (private).
    role : str
        "ct", "pet" or "mask" where the layout tells, else "".
    """

    name: str
    role: str


@dataclass(frozen=True)
class StudyFolder:
    """One study: names of patient and study (private) and where its files are.

    Without a name of a study it is a patient's folder that holds none, or can't be read.

    Attributes
    ----------
    patient, study : str
    path : str
        Its folder, or, with `members`, that of the project.
    members : tuple of Member, optional
        Its files, where they are not all that lies below `path`; see `common.raw.layouts`.
    refusal : str
        Why a patient's folder can't be looked at; empty where it can.
    """

    patient: str
    study: str
    path: str
    members: tuple[Member, ...] | None = None
    refusal: str = ""


@dataclass(frozen=True)
class RawFile:
    """A file below a study: path there, size [bytes], time of change [ns].

    A link that leads nowhere has no size.
    """

    name: str
    size: int | None
    changed_ns: int = 0


# --- finding studies -------------------------------------------------------------------------


def list_studies(project: Path) -> list[StudyFolder]:
    """Return the study folders of a raw project, ordered by patient and study.

    A patient without a study's folder is listed by a nameless one, for `list_files` to refuse.

    Raises
    ------
    StageError
        Not a readable folder, or without any ``<patient>/<study>/`` in it.
    """
    try:
        patients = _subfolders(project)
    except OSError as error:
        raise StageError(
            f"the raw project cannot be read ({error.strerror}): check the folder and its "
            "permissions"
        ) from error
    studies = [study for name, path in patients for study in _studies_of(text_of(name), path)]
    if not any(study.study for study in studies):
        raise StageError(
            f"{project}: no study in it: {_found_instead(project, studies)}; it must hold "
            "<patient>/<study>/ folders (or be of nnU-Net's or BIDS's layout), and you need "
            "permission to read them"
        )
    return studies


def _found_instead(project: Path, patients: Sequence[StudyFolder]) -> str:
    """Say what lies where studies should be; no names."""
    directly = _kinds_of_files(project)
    if directly and project.resolve().name in ("imagesTr", "labelsTr"):
        return "it is a part of nnU-Net's layout: give the folder above it"
    if directly:
        return f"{directly} directly in it: move each examination to <patient>/<study>/"
    in_patients = [kinds for each in patients if (kinds := _kinds_of_files(Path(each.path)))]
    if in_patients:
        return (
            f"{len(in_patients)} of its {len(patients)} folders hold files directly (the first "
            f"{in_patients[0]}): put a study's folder in between, or give the folder above, if it "
            "holds nothing else, with --patient REGEX"
        )
    return "it is empty" if not patients else f"its {len(patients)} folders hold no folder of files"


def _kinds_of_files(folder: Path) -> str:
    """Return how many files of which kind lie directly in a folder, "" where none do."""
    counts: Counter[str] = Counter()
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError:
        return ""
    for name in filter(_is_visible, names):
        if is_nifti_name(name):
            counts["NIfTI"] += 1
        elif name.lower().endswith((".dcm", ".ima")) or "." not in name:
            counts["DICOM-like"] += 1
        elif name.lower().endswith((".zip", ".tar", ".gz", ".7z")):
            counts["packed"] += 1
    return ", ".join(f"{n} {kind} files" for kind, n in sorted(counts.items()))


def _studies_of(patient: str, path: str) -> list[StudyFolder]:
    try:
        studies = [StudyFolder(patient, text_of(name), below) for name, below in _subfolders(path)]
    except OSError as error:
        return [StudyFolder(patient, "", path, refusal=error.strerror or "no reason given")]
    return studies or [StudyFolder(patient, "", path)]


def text_of(name: str) -> str:
    """Return a name as UTF-8 tells it, whatever the locale: pseudonyms are made of it."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def name_of(text: str) -> str:
    """Return the name that `text_of` tells."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _subfolders(folder: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return names and paths of subfolders in order.

    Links that lead nowhere are among them, and what can't be looked at: it may be one.
    """
    above = _folders_above(folder)
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name, entry.path)
            for entry in entries
            if _is_visible(entry.name) and _may_be_folder(entry.path, above)
        )


def _may_be_folder(path: str, above: frozenset[tuple[int, int]]) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return True
    return stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) not in above


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _folders_above(folder: str | os.PathLike[str]) -> frozenset[tuple[int, int]]:
    """Return a folder and those above it, by the path it has and by the path without links.

    A link to one of them leads round in a circle, and to the files of other patients.
    """
    paths = [Path(os.path.abspath(folder)), Path(os.path.realpath(folder))]
    return frozenset(_identity(each) for path in paths for each in (path, *path.parents))


def _is_visible(name: str) -> bool:
    is_system = name.startswith(".") or name in _SYSTEM_FOLDERS
    return not is_system and not name.endswith(_UNFINISHED_OUTPUTS)


def list_files(folder: StudyFolder) -> list[RawFile]:
    """Return the files below a study's folder, in order of name.

    Links are followed, loops of links are not; hidden files, pipes and devices are left out.

    Raises
    ------
    IncompleteStudy
        A patient's folder without a study's folder.
    UnreachableStudy
        A folder or file can't be looked at.
    """
    if folder.refusal:
        raise _unreadable(folder.refusal, "")
    files = files_of(folder)
    if not folder.study:
        raise IncompleteStudy(
            "no study folder: move the patient's files to RAW_PROJECT/<patient>/<study>/"
        )
    return files


def is_without_studies(folder: StudyFolder) -> bool:
    """Tell whether a patient's folder can't be looked at, or is empty: a disk may be missing."""
    if folder.study:
        return False
    try:
        with os.scandir(folder.path) as entries:
            return bool(folder.refusal) or not any(_is_visible(entry.name) for entry in entries)
    except OSError:
        return True


def listing(files: Sequence[RawFile]) -> str:
    """Return a digest of names and sizes, which machines that share a disk agree about."""
    return fingerprint([[file.name, file.size] for file in files])


def check_project(project: Path) -> None:
    """See whether the raw project is there: where it is not, no study is to blame.

    Raises
    ------
    Unreachable
        It is not, or it is empty, as where a disk is not mounted.
    """
    try:
        with os.scandir(project) as entries:
            reason = "" if any(entries) else "it is empty"
    except OSError as error:
        reason = error.strerror or "no reason given"
    if reason:
        raise Unreachable(
            f"the raw project cannot be read any more ({reason}): check that its disk is mounted, "
            "and run again; finished studies are kept"
        )


def files_of(folder: StudyFolder) -> list[RawFile]:
    """Return the files of a study, whatever its layout, in order of name.

    Raises
    ------
    UnreachableStudy
        A folder or file can't be looked at.
    """
    if folder.members is None:
        return files_below(folder.path)
    return sorted(
        (_stated(folder.path, each.name) for each in folder.members), key=lambda file: file.name
    )


def _stated(folder: str, name: str) -> RawFile:
    try:
        status = os.stat(os.path.join(folder, name))
    except OSError as error:
        return _dangling(error, name)
    return RawFile(name, status.st_size, status.st_mtime_ns)


_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def _dangling(error: OSError, name: str) -> RawFile:
    """Return a link that leads nowhere; what can't be looked at otherwise may be any file."""
    if error.errno in _LEADS_NOWHERE:
        return RawFile(name, None)
    raise UnreachableStudy(
        f"a file cannot be looked at ({error.strerror}): check it and its permissions", name
    ) from error


def listed_files(project: Path, below: str) -> list[str]:
    """Return the paths, from the project on, of the files below one of its folders; [] without.

    Raises
    ------
    StageError
        It can't be read.
    """
    if not is_folder(project / below):
        return []
    try:
        return [f"{below}/{file.name}" for file in files_below(str(project / below))]
    except StudyError as error:
        raise StageError(f"{project}: {below}: {error}") from error


def is_folder(path: Path) -> bool:
    """Tell whether a path leads to a folder; that it can't be looked at is an OSError."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    """Tell whether a path leads to a file; that it can't be looked at is an OSError."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return 0
        raise


def files_below(folder: str) -> list[RawFile]:
    """Return the files below a folder; see `list_files`."""
    try:
        above = _folders_above(folder) - {_identity(folder)}
    except OSError as error:
        raise _unreadable(error.strerror, "") from error
    return sorted(_walk(folder, "", above), key=lambda file: file.name)


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[RawFile]:
    try:
        here = _identity(folder)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if _is_visible(entry.name)]
    except OSError as error:
        raise _unreadable(error.strerror, prefix) from error
    if here in above:
        return
    for entry in visible:
        name = prefix + entry.name
        try:
            status = entry.stat()
        except OSError as error:
            yield _dangling(error, name)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, name + "/", above | {here})
        elif stat.S_ISREG(status.st_mode):
            yield RawFile(name, status.st_size, status.st_mtime_ns)


def _unreadable(reason: str | None, name: str) -> UnreachableStudy:
    return UnreachableStudy(
        f"a folder cannot be read ({reason}): check its permissions, or the link that leads there",
        name,
    )


# --- image sizes -----------------------------------------------------------------------------


def image_bytes(folder: str, files: Sequence[RawFile]) -> int:
    """Return what the images in a study's files take, uncompressed, roughly [bytes].

    NIfTI headers tell. Of DICOM files the largest stands for all: by as much as its pixels
    exceed it, compressed, the others do. What can't be read counts by its size.
    """
    paths = {file: os.path.join(folder, file.name) for file in files if file.size}
    nifti = [file for file in paths if is_nifti_name(file.name)]
    others = [file for file in paths if not is_nifti_name(file.name)]
    total = sum(_nifti_bytes(paths[file]) or file.size or 0 for file in nifti)
    if others:
        largest = max(others, key=lambda file: (file.size or 0, file.name))
        size = largest.size or 1
        expansion = max(1.0, _pixel_bytes(paths[largest], largest.name) / size)
        total += round(expansion * sum(file.size or 0 for file in others))
    return total


def _nifti_bytes(path: str) -> int:
    try:
        return stored_bytes(path)
    except StudyError:
        return 0


def _pixel_bytes(path: str, name: str) -> int:
    """Return what a DICOM file's pixels take [bytes]; 0 where it has none."""
    # Slow to load, and not needed to see that an option is wrong.
    from common.dicom.attributes import whole_number
    from common.dicom.files import read_dicom_file

    try:
        file = read_dicom_file(path, name)
        if file is None or "Rows" not in file.header:
            return 0
        rows, columns, bits = (
            whole_number(file.header, keyword) for keyword in ("Rows", "Columns", "BitsAllocated")
        )
        return file.n_frames * rows * columns * bits // 8
    except StudyError:
        return 0
