"""The raw project: ``RAW_PROJECT/<patient>/<study>/`` and the role that each file plays there.

Roles are CT, PET, mask and header. DICOM files have theirs by Modality, NIfTI files by the words
in their path below the study. Where several fit, a pattern of the user decides; none is picked
silently.
"""

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.dicom import DicomFile, Series, group_series, read_dicom_file, text
from common.errors import IncompleteStudy, StageError, StudyError
from common.nifti import is_nifti_name

ROLE_WORDS = {
    "mask": {"mask", "seg", "label", "roi", "gtv"},
    "pet": {"pet", "pt", "suv"},
    "ct": {"ct", "gk"},
}
"""Words in a NIfTI file's path that tell its role; in one name a mask's words go first, since
a mask is named after the image it was drawn on."""

_MASK_MODALITIES = ("SEG", "RTSTRUCT")
_NAMES = {"ct": "CT", "pet": "PET", "mask": "mask", "header": "DICOM header"}


@dataclass(frozen=True)
class StudyFolder:
    """One study's folder: names of patient and study (private) and its path."""

    patient: str
    study: str
    path: str


@dataclass(frozen=True)
class RawFile:
    """A regular file below a study: path there, size [bytes] and time of change [ns]."""

    name: str
    size: int
    changed_ns: int


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file: its path and its path below the study (private)."""

    path: str
    name: str


@dataclass(frozen=True)
class Roles:
    """The files of a complete study.

    Attributes
    ----------
    ct, pet : NiftiFile or Series
    mask : NiftiFile or DicomFile
        A DicomFile is a SEG or an RTSTRUCT.
    header : Series or None
        PET DICOM files that give the SUV; None where PET is DICOM itself or needs no header.
    """

    ct: NiftiFile | Series
    pet: NiftiFile | Series
    mask: NiftiFile | DicomFile
    header: Series | None


@dataclass(frozen=True)
class Patterns:
    """The user's globs by role: on the path below the study, or on the SeriesDescription."""

    by_role: Mapping[str, str] = field(default_factory=dict)

    def match(self, role: str, candidate: "Candidate") -> bool:
        """Tell whether a candidate fits the role's pattern; without one all do."""
        pattern = self.by_role.get(role)
        return pattern is None or any(fnmatch.fnmatchcase(n, pattern) for n in _labels(candidate))


Candidate = NiftiFile | Series | DicomFile


# --- finding studies -------------------------------------------------------------------------


def list_studies(project: Path) -> list[StudyFolder]:
    """Return the study folders of a raw project, ordered by patient and study.

    Raises
    ------
    StageError
        Not a readable folder, or without any ``<patient>/<study>/`` in it.
    """
    try:
        studies = [
            StudyFolder(patient.name, study.name, study.path)
            for patient in _subfolders(project)
            for study in _subfolders(patient.path)
        ]
    except OSError as error:
        raise StageError(
            f"the raw project cannot be read ({error.strerror}): check the folder and its "
            "permissions"
        ) from error
    if not studies:
        raise StageError(f"{project}: no study in it; it must hold <patient>/<study>/ folders")
    return studies


def _subfolders(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        folders = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return sorted(folders, key=lambda entry: entry.name)


def list_files(folder: str) -> list[RawFile]:
    """Return the regular files below a study's folder, in order of name.

    Links are followed, loops of links are not; hidden files, pipes and devices are left out.

    Raises
    ------
    StudyError
        A folder that may not be read.
    """
    return sorted(_walk(folder, "", frozenset()), key=lambda file: file.name)


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[RawFile]:
    try:
        here = os.stat(folder)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise StudyError(
            f"a folder cannot be read ({error.strerror}): check its permissions", prefix
        ) from error
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    for entry in visible:
        try:
            status = entry.stat()
        except OSError:  # a dangling link, or links in a circle
            continue
        name = prefix + entry.name
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, name + "/", above | {identity})
        elif stat.S_ISREG(status.st_mode):
            yield RawFile(name, status.st_size, status.st_mtime_ns)


# --- finding roles ---------------------------------------------------------------------------


def find_roles(folder: str, patterns: Patterns, *, header_needed: bool = True) -> Roles:
    """Find the CT, PET, mask and header of one study.

    Parameters
    ----------
    folder : str
        The study's folder.
    patterns : Patterns
    header_needed : bool
        False where a NIfTI PET is in SUV already.

    Raises
    ------
    IncompleteStudy
        Roles are missing; the message lists them.
    StudyError
        Several candidates fit a role, or a file cannot be read.
    """
    nifti, dicom = _read_files(folder)
    pet_series = group_series(dicom, "PT")
    candidates: dict[str, list[Candidate]] = {
        "ct": [*_nifti_in_role("ct", nifti, patterns), *group_series(dicom, "CT")],
        "pet": [*_nifti_in_role("pet", nifti, patterns), *pet_series],
        "mask": [
            *_nifti_in_role("mask", nifti, patterns),
            *(file for file in dicom if text(file.header, "Modality") in _MASK_MODALITIES),
        ],
    }
    fitting = {
        role: [c for c in found if patterns.match(role, c)] for role, found in candidates.items()
    }
    if any(isinstance(c, NiftiFile) for c in fitting["pet"]) and "pet" not in patterns.by_role:
        # DICOM beside a NIfTI PET is its header, be it one file or the whole series.
        fitting["pet"] = [c for c in fitting["pet"] if isinstance(c, NiftiFile)]
    needs_header = header_needed and any(isinstance(c, NiftiFile) for c in fitting["pet"])
    if needs_header:
        fitting["header"] = [c for c in pet_series if patterns.match("header", c)]
    _refuse_incomplete(fitting)
    _refuse_ambiguous(fitting)
    ct, pet, mask = (fitting[role][0] for role in ("ct", "pet", "mask"))
    header = fitting["header"][0] if needs_header else None
    return Roles(ct, pet, mask, header)  # type: ignore[arg-type]


def _read_files(folder: str) -> tuple[list[NiftiFile], list[DicomFile]]:
    nifti: list[NiftiFile] = []
    dicom: list[DicomFile] = []
    for file in list_files(folder):
        path = os.path.join(folder, file.name)
        if is_nifti_name(file.name):
            nifti.append(NiftiFile(path, file.name))
        elif (found := read_dicom_file(path, file.name)) is not None:
            dicom.append(found)
    return nifti, dicom


def _nifti_in_role(role: str, files: Sequence[NiftiFile], patterns: Patterns) -> list[NiftiFile]:
    """Return the files whose words tell the role, or that its pattern names.

    A file that the pattern of another role names is that role's alone.
    """
    mine = patterns.by_role.get(role)
    others = [p for r, p in patterns.by_role.items() if r != role]
    if mine is not None:
        return [file for file in files if fnmatch.fnmatchcase(file.name, mine)]
    return [
        file
        for file in files
        if role_by_words(file.name) == role
        and not any(fnmatch.fnmatchcase(file.name, other) for other in others)
    ]


def role_by_words(name: str) -> str | None:
    """Return the role that the words in a path tell, those of its last part first."""
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    for part in reversed(stem.split("/")):
        words = set(re.split(r"[^a-z0-9]+", part.lower()))
        for role, role_words in ROLE_WORDS.items():
            if words & role_words:
                return role
    return None


def _refuse_incomplete(fitting: Mapping[str, Sequence[Candidate]]) -> None:
    missing = [_NAMES[role] for role, found in fitting.items() if not found]
    if missing:
        raise IncompleteStudy("no " + ", no ".join(missing))


def _refuse_ambiguous(fitting: Mapping[str, Sequence[Candidate]]) -> None:
    for role, found in fitting.items():
        if len(found) > 1:
            kinds = "; ".join(_kind(candidate) for candidate in found)
            raise StudyError(
                f"{len(found)} candidates for {_NAMES[role]} ({kinds}): choose with "
                f"--{role} PATTERN; the mapping file names them",
                "; ".join(f"{_kind(c)}: {' | '.join(_labels(c)[:2])}" for c in found),
            )


def _kind(candidate: Candidate) -> str:
    if isinstance(candidate, NiftiFile):
        return "NIfTI file"
    if isinstance(candidate, Series):
        return f"DICOM series of {candidate.n_images}"
    return f"DICOM {text(candidate.header, 'Modality')}"


def _labels(candidate: Candidate) -> list[str]:
    """Return what a pattern may match: a description, and paths below the study."""
    if isinstance(candidate, NiftiFile):
        return [candidate.name]
    files = candidate.files if isinstance(candidate, Series) else (candidate,)
    description = text(files[0].header, "SeriesDescription")
    return [description, *(file.name for file in files)]
