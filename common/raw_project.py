"""The raw project: ``RAW_PROJECT/<patient>/<study>/`` and the role that each file plays there.

Roles are CT, PET, mask and header. DICOM files have theirs by Modality, NIfTI files by the words
in their path below the study. Where several fit, a pattern of the user decides; none is picked
silently.
"""

import fnmatch
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from common.dicom import DicomFile, Series, group_series, read_dicom_file
from common.dicom_values import joined_text, tag_of
from common.errors import IncompleteStudy, StageError, StudyError
from common.nifti import is_nifti_name

ROLE_NAMES = {"ct": "CT", "pet": "PET", "mask": "mask", "header": "DICOM header"}

MASK_WORDS = frozenset({"mask", "seg", "label", "roi", "gtv"})
PET_WORDS = frozenset({"pet", "pt", "suv"})
CT_WORDS = frozenset({"ct", "gk"})
"""Words in a NIfTI file's path that tell its role."""

_MASK_MODALITIES = ("SEG", "RTSTRUCT")
_DICOM_SUFFIXES = (".dcm", ".ima")
_OTHER_FORMATS = (
    ".nrrd",
    ".mha",
    ".mhd",
    ".hdr",
    ".img",
    ".mat",
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".gz",
)
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


@dataclass(frozen=True)
class StudyFolder:
    """One study's folder: names of patient and study (private) and its path.

    Without a name of a study it is a patient's folder that holds none, or can't be read.
    """

    patient: str
    study: str
    path: str


@dataclass(frozen=True)
class RawFile:
    """A file below a study: path there, size [bytes], time of change [ns].

    A link that leads nowhere has no size.
    """

    name: str
    size: int | None
    changed_ns: int = 0


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file: its path and its path below the study (private)."""

    path: str
    name: str


Candidate = NiftiFile | Series | DicomFile


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
        Given beside a DICOM PET, it must be of that very series.
    warnings : tuple of str
        What was left out or decided; no identity.
    """

    ct: NiftiFile | Series
    pet: NiftiFile | Series
    mask: NiftiFile | DicomFile
    header: Series | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Patterns:
    """The user's globs by role: on the path below the study, or on the SeriesDescription."""

    by_role: Mapping[str, str] = field(default_factory=dict)

    def match(self, role: str, candidate: Candidate) -> bool:
        """Tell whether a candidate fits the role's pattern; without one all do."""
        return role not in self.by_role or self.name(role, candidate)

    def name(self, role: str, candidate: Candidate) -> bool:
        """Tell whether the role has a pattern, and it fits the candidate."""
        pattern = self.by_role.get(role)
        return pattern is not None and any(_fits(label, pattern) for label in _labels(candidate))

    def name_any(self, candidate: Candidate) -> bool:
        """Tell whether a pattern of any role fits the candidate."""
        return any(self.name(role, candidate) for role in self.by_role)


def _fits(label: str, pattern: str) -> bool:
    """Match a glob, one that names a folder with all that lies below it."""
    label, pattern = (unicodedata.normalize("NFC", each) for each in (label, pattern))
    return any(fnmatch.fnmatchcase(label, p) for p in (pattern, pattern.rstrip("/") + "/*"))


def _labels(candidate: Candidate) -> list[str]:
    """Return what a pattern may match: a description, and paths below the study."""
    if isinstance(candidate, NiftiFile):
        return [candidate.name]
    files = candidate.files if isinstance(candidate, Series) else (candidate,)
    return [joined_text(files[0].header, "SeriesDescription"), *(file.name for file in files)]


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
    studies = [study for name, path in patients for study in _studies_of(name, path)]
    if not any(study.study for study in studies):
        raise StageError(
            f"{project}: no study in it; it must hold <patient>/<study>/ folders, and you need "
            "permission to read them"
        )
    return studies


def _studies_of(patient: str, path: str) -> list[StudyFolder]:
    try:
        studies = [StudyFolder(patient, name, below) for name, below in _subfolders(path)]
    except OSError:
        studies = []
    return studies or [StudyFolder(patient, "", path)]


def _subfolders(folder: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return names and paths of subfolders in order; links that lead nowhere are among them."""
    above = _folders_above(folder)
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name, entry.path)
            for entry in entries
            if _is_visible(entry.name)
            and (
                not os.path.exists(entry.path)
                or (os.path.isdir(entry.path) and _identity(entry.path) not in above)
            )
        )


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
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def list_files(folder: StudyFolder) -> list[RawFile]:
    """Return the files below a study's folder, in order of name.

    Links are followed, loops of links are not; hidden files, pipes and devices are left out.

    Raises
    ------
    IncompleteStudy
        A patient's folder without a study's folder.
    StudyError
        A folder that may not be read.
    """
    files = _files_below(folder.path)
    if not folder.study:
        raise IncompleteStudy(
            "no study folder: move the patient's files to RAW_PROJECT/<patient>/<study>/"
        )
    return files


def _files_below(folder: str) -> list[RawFile]:
    try:
        above = _folders_above(folder) - {_identity(folder)}
    except OSError as error:
        raise _unreadable(error, "") from error
    return sorted(_walk(folder, "", above), key=lambda file: file.name)


def _walk(folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[RawFile]:
    try:
        here = _identity(folder)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if _is_visible(entry.name)]
    except OSError as error:
        raise _unreadable(error, prefix) from error
    if here in above:
        return
    for entry in visible:
        name = prefix + entry.name
        try:
            status = entry.stat()
        except OSError:
            yield RawFile(name, None)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(entry.path, name + "/", above | {here})
        elif stat.S_ISREG(status.st_mode):
            yield RawFile(name, status.st_size, status.st_mtime_ns)


def _unreadable(error: OSError, name: str) -> StudyError:
    return StudyError(
        f"a folder cannot be read ({error.strerror}): check its permissions, or the link that "
        "leads there",
        name,
    )


# --- what fits each role ---------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """What was found in a study.

    Attributes
    ----------
    fitting : dict of role to list of candidates
        Without "header" where none is needed.
    remarks : tuple of str
        What was left out or decided; no identity.
    hints : tuple of str
        Why roles may be missing; no identity.
    names : tuple of str
        All candidates, whether patterns fit them or not, and NIfTI files of no role (private).
    """

    fitting: Mapping[str, Sequence[Candidate]]
    remarks: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def summary(self, role: str) -> str:
        """Return in a few words what fits a role; no identity."""
        found = self.fitting.get(role)
        if found is None:  # a header, where the PET has its own or needs none
            return "-"
        if len(found) > 1:
            return f"{len(found)} candidates"
        return kind(found[0]) if found else "missing"


def survey(folder: str, patterns: Patterns, *, header_needed: bool = True) -> Survey:
    """Find what fits each role of one study.

    Parameters
    ----------
    folder : str
        The study's folder.
    patterns : Patterns
    header_needed : bool
        False where a NIfTI PET is in SUV already.

    Raises
    ------
    StudyError
        A folder or file cannot be read.
    """
    files = _read_files(folder)
    nifti_pet = _nifti_in_role("pet", files.nifti, patterns)
    headers = [] if nifti_pet else _files_for_header_alone(files.dicom, patterns)
    slices = [file for file in files.dicom if file not in headers]
    candidates: dict[str, list[Candidate]] = {
        "ct": [*_nifti_in_role("ct", files.nifti, patterns), *group_series(slices, "CT")],
        "pet": [*nifti_pet, *group_series(slices, "PT")],
        "mask": [
            *_nifti_in_role("mask", files.nifti, patterns),
            *(file for file in files.dicom if modality_of(file) in _MASK_MODALITIES),
        ],
    }
    if headers or (nifti_pet and header_needed):
        candidates["header"] = [*group_series(headers or files.dicom, "PT")]
    fitting = {
        role: [each for each in found if patterns.match(role, each)]
        for role, found in candidates.items()
    }
    remarks = files.remarks
    if nifti_pet and "pet" not in patterns.by_role:
        # DICOM beside a NIfTI PET is its header, be it one file or the whole series.
        remarks += _passed_over(fitting["pet"])
        fitting["pet"] = [*nifti_pet]
    nameless = [
        file.name
        for file in files.nifti
        if not roles_by_words(file.name) and not patterns.name_any(file)
    ]
    names = [_private(role, each) for role, found in candidates.items() for each in found]
    hints = (*_hints(fitting, files, patterns, len(nameless)), *_hints_of_folder(folder, files))
    return Survey(fitting, remarks, hints, (*names, *nameless))


def choose(found: Survey) -> Roles:
    """Return the one candidate of each role.

    Raises
    ------
    IncompleteStudy
        Roles are missing; the message lists them.
    StudyError
        Several candidates fit a role; the message lists their kinds, its private part their names.
    """
    fitting = found.fitting
    missing = [role for role, each in fitting.items() if not each]
    several = [role for role, each in fitting.items() if len(each) > 1]
    reasons = [", ".join(f"no {ROLE_NAMES[role]}" for role in missing)] if missing else []
    reasons += [_several(role, fitting[role]) for role in several]
    if several:
        reasons += ["the mapping file names them", *_several_examinations(fitting)]
    if missing:
        reasons += [*found.hints, *found.remarks]
        raise IncompleteStudy("; ".join(reasons), "; ".join(found.names))
    if several:
        names = [_private(role, each) for role in several for each in fitting[role]]
        raise StudyError("; ".join(reasons), "; ".join(names))
    ct, pet, mask = (fitting[role][0] for role in ("ct", "pet", "mask"))
    header = fitting["header"][0] if "header" in fitting else None
    return Roles(ct, pet, mask, header, found.remarks)  # type: ignore[arg-type]


def find_roles(folder: str, patterns: Patterns, *, header_needed: bool = True) -> Roles:
    """Find the CT, PET, mask and header of one study; see `survey` and `choose`."""
    return choose(survey(folder, patterns, header_needed=header_needed))


def modality_of(file: DicomFile) -> str:
    """Return the Modality."""
    return joined_text(file.header, "Modality")


def kind(candidate: Candidate) -> str:
    """Return what a candidate is, and of how many slices; no identity."""
    if isinstance(candidate, NiftiFile):
        return "NIfTI file"
    if isinstance(candidate, Series):
        return f"DICOM series of {candidate.n_images}"
    return f"DICOM {modality_of(candidate)}"


# --- files by kind and name ------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """The files of a study by kind, suffixes of other image formats, and remarks on the rest."""

    nifti: Sequence[NiftiFile]
    dicom: Sequence[DicomFile]
    other_formats: Sequence[str]
    remarks: tuple[str, ...]


def _read_files(folder: str) -> _Files:
    nifti: list[NiftiFile] = []
    dicom: list[DicomFile] = []
    other_formats: set[str] = set()
    n_dangling = n_no_dicom = 0
    for file in _files_below(folder):
        path = os.path.join(folder, file.name)
        if file.size is None:
            n_dangling += 1
        elif is_nifti_name(file.name):
            nifti.append(NiftiFile(path, file.name))
        elif (found := read_dicom_file(path, file.name)) is not None:
            dicom.append(found)
        else:
            n_no_dicom += file.name.lower().endswith(_DICOM_SUFFIXES)
            other_formats.update(s for s in _OTHER_FORMATS if file.name.lower().endswith(s))
    remarks = []
    if n_dangling:
        remarks.append(f"links that lead nowhere ({n_dangling}) are left out: restore their target")
    if n_no_dicom:
        remarks.append(
            f"files named as DICOM ({n_no_dicom}) are left out, empty, damaged or without "
            f"{tag_of('Modality')}: check that no slice is lost"
        )
    return _Files(nifti, dicom, sorted(other_formats), tuple(remarks))


def _files_for_header_alone(dicom: Sequence[DicomFile], patterns: Patterns) -> list[DicomFile]:
    """Return the files that --header or the word "header" sets apart from the slices of a PET.

    Files that --pet names are not; and where no other PET is left, none is.
    """
    pet = [file for file in dicom if modality_of(file) == "PT"]
    named = [
        file
        for file in pet
        if (patterns.name("header", file) if "header" in patterns.by_role else _is_header(file))
        and not patterns.name("pet", file)
    ]
    return named if len(named) < len(pet) else []


def _is_header(file: DicomFile) -> bool:
    return "header" in _words(file.name)


def _nifti_in_role(role: str, files: Sequence[NiftiFile], patterns: Patterns) -> list[NiftiFile]:
    """Return the files that the role's pattern names; without one, those whose words tell it.

    A file that the pattern of another role names is that role's alone.
    """
    if role in patterns.by_role:
        return [file for file in files if patterns.name(role, file)]
    return [
        file for file in files if role in roles_by_words(file.name) and not patterns.name_any(file)
    ]


def roles_by_words(name: str) -> frozenset[str]:
    """Return the roles that the words in a NIfTI file's path tell, those of its last part first.

    A mask is named after the image it was drawn on, so in one part a mask's words go first.
    "PET/CT" names the examination; a part with words of PET and of CT besides may be either.
    """
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    for part in reversed(PurePath(stem).parts):
        words = set(re.sub(r"\bpe?t ct\b", "", " ".join(_words(part))).split())
        if words & MASK_WORDS:
            return frozenset({"mask"})
        images = (("pet", PET_WORDS), ("ct", CT_WORDS))
        if roles := frozenset(role for role, of_role in images if words & of_role):
            return roles
    return frozenset()


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W_]+", name.lower())


# --- what to say -----------------------------------------------------------------------------


def _passed_over(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Say that a whole DICOM PET series serves as the header of a NIfTI PET."""
    return tuple(
        f"the NIfTI file is taken as the PET and the {kind(each)} as its header: if the series is "
        "meant, choose it with --pet PATTERN"
        for each in candidates
        if isinstance(each, Series) and each.n_images > 1 and not all(map(_is_header, each.files))
    )


def _private(role: str, candidate: Candidate) -> str:
    """Return a candidate's description and path, for the private mapping alone."""
    return f"{ROLE_NAMES[role]}: {kind(candidate)}: {' | '.join(_labels(candidate)[:2])}"


def _several(role: str, candidates: Sequence[Candidate]) -> str:
    kinds = "; ".join(kind(each) for each in candidates)
    return (
        f"{len(candidates)} candidates for {ROLE_NAMES[role]} ({kinds}): choose with "
        f"--{role} PATTERN"
    )


def _several_examinations(fitting: Mapping[str, Sequence[Candidate]]) -> Iterator[str]:
    examinations = {
        joined_text(
            (each.files[0] if isinstance(each, Series) else each).header, "StudyInstanceUID"
        )
        for candidates in fitting.values()
        for each in candidates
        if not isinstance(each, NiftiFile)
    }
    if len(examinations) > 1:
        yield (
            f"the files are of {len(examinations)} examinations ({tag_of('StudyInstanceUID')}): "
            "give each its own study folder"
        )


def _hints(
    fitting: Mapping[str, Sequence[Candidate]],
    files: _Files,
    patterns: Patterns,
    n_nameless: int,
) -> Iterator[str]:
    """Yield why roles are missing, and what to do."""
    missing = [role for role, found in fitting.items() if not found]
    yield from (f"--{role} fits no candidate" for role in missing if role in patterns.by_role)
    for role, modality in (("ct", "CT"), ("pet", "PT")):
        n_files = sum(modality_of(file) == modality for file in files.dicom)
        if role in missing and n_files and not group_series(files.dicom, modality):
            yield (
                f"DICOM files ({n_files}) of {tag_of('Modality')} {modality} are localizers, "
                "screen saves or reformats: export the original series"
            )
    if "header" in missing:
        yield "give one DICOM file of the PET, or --pet-units suv if its values are SUV"
    if n_nameless and missing and missing != ["header"]:
        yield (
            f"NIfTI files ({n_nameless}) have no word for a role in their path: choose with "
            f"--{missing[0]} PATTERN"
        )


def _hints_of_folder(folder: str, files: _Files) -> Iterator[str]:
    if files.other_formats:
        yield f"{', '.join(files.other_formats)} files are not read: convert or unpack them"
    words = frozenset(_words(os.path.basename(folder)))
    if words and any(words <= of_role for of_role in (MASK_WORDS, PET_WORDS, CT_WORDS)):
        yield (
            "the study's folder is named like a role: move CT, PET and mask into one "
            "RAW_PROJECT/<patient>/<study>/"
        )
