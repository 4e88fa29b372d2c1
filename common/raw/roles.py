"""The role that each file of a study plays: CT, PET, mask, or header of the PET.

Of DICOM files the Modality tells the role, of NIfTI files the words in their path below the study.
Where several files fit, a pattern of the user decides; none is picked silently, and messages say
what fits and what is missing.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from common.dicom.attributes import joined_text, tag_of
from common.dicom.files import DicomFile, Series, group_series
from common.errors import IncompleteStudy, Kind, StudyError, Warning
from common.raw.candidates import (
    Candidate,
    NiftiFile,
    NiftiFiles,
    Patterns,
    describe,
    describe_beside_others,
    is_corrected,
    private_name,
)
from common.raw.project import StudyFolder
from common.raw.sidecar import sidecar_of
from common.raw.study_files import StudyFiles, read_files
from common.raw.words import CT_WORDS, MASK_WORDS, PET_WORDS, ROLE_NAMES, words

# --- role hints ------------------------------------------------------------------------------

MOST_LISTED = 4
"""Candidates for one role that are listed one by one; of more, how many are of each kind."""


def _is_header(file: DicomFile) -> bool:
    """Tell whether a file is called a header."""
    return "header" in words(file.name)


def _passed_over(candidates: Sequence[Candidate]) -> tuple[Warning, ...]:
    """Say that a whole DICOM PET series serves as the header of a NIfTI PET."""
    return tuple(
        Warning(
            Kind.SERIES,
            f"the NIfTI file is taken as the PET and the {describe(each)} as its header: if the "
            "series is meant, choose it with --pet PATTERN",
        )
        for each in candidates
        if isinstance(each, Series) and each.n_images > 1 and not all(map(_is_header, each.files))
    )


def _nameless_left_out(n_files: int) -> tuple[Warning, ...]:
    """Say that a complete study has more NIfTI files: one may be a second mask."""
    text = (
        f"NIfTI files ({n_files}) have no word for a role in their path and are left out: if one "
        "is meant, choose it by pattern"
    )
    return (Warning(Kind.LEFT_OUT, text),)


def _several_candidates(role: str, candidates: Sequence[Candidate]) -> str:
    """Say that several candidates fit a role, and of what kinds they are."""
    kinds = [describe_beside_others(each) for each in candidates]
    if len(kinds) > MOST_LISTED:
        kinds = [f"{n} x {each}" for each, n in Counter(kinds).items()]
    reason = (
        f"{len(candidates)} candidates for {ROLE_NAMES[role]} ({'; '.join(kinds)}): choose with "
        f"--{role} PATTERN"
    )
    if len(candidates) > MOST_LISTED and all(_is_one_slice(each) for each in candidates):
        reason += (
            f", or, if {tag_of('SeriesInstanceUID')} was changed slice by slice, export the "
            "series again"
        )
    return reason


def _is_one_slice(candidate: Candidate) -> bool:
    return isinstance(candidate, Series) and candidate.n_images == 1


def _several_examinations(fitting: Mapping[str, Sequence[Candidate]]) -> Iterator[str]:
    """Say so where candidates are of several examinations."""
    examinations = {
        joined_text(
            (each.files[0] if isinstance(each, Series) else each).header, "StudyInstanceUID"
        )
        for candidates in fitting.values()
        for each in candidates
        if not isinstance(each, NiftiFile | NiftiFiles)
    }
    if len(examinations) > 1:
        yield (
            f"the files are of {len(examinations)} examinations ({tag_of('StudyInstanceUID')}): "
            "give each its own study folder"
        )


def _hints_of_roles(
    fitting: Mapping[str, Sequence[Candidate]],
    files: StudyFiles,
    patterns: Patterns,
    n_nameless: int,
) -> Iterator[str]:
    """Yield why roles are missing, and what to do."""
    missing = [role for role, found in fitting.items() if not found]
    yield from (f"--{role} fits no candidate" for role in missing if role in patterns.by_role)
    for role, modality in (("ct", "CT"), ("pet", "PT")):
        n_files = sum(file.modality == modality for file in files.dicom)
        if role in missing and n_files and not group_series(files.dicom, modality):
            yield (
                f"DICOM files ({n_files}) of {tag_of('Modality')} {modality} are localizers, "
                "screen saves, reformats or maps: export the original series"
            )
    if "pet" in missing or "header" in missing:
        yield from _other_modalities(files)
    n_files = sum(not file.modality for file in files.dicom)
    if missing and n_files:
        yield (
            f"DICOM files ({n_files}) have an empty {tag_of('Modality')}: set it to CT, PT, SEG or "
            "RTSTRUCT"
        )
    if "header" in missing:
        yield "give one DICOM file of the PET, or --pet-units suv if its values are SUV"
    if n_nameless and missing and missing != ["header"]:
        yield (
            f"NIfTI files ({n_nameless}) have no word for a role in their path: choose with "
            + " ".join(f"--{role} PATTERN" for role in missing if role != "header")
        )


def _other_modalities(files: StudyFiles) -> Iterator[str]:
    """Yield what may be the PET, by a Modality that DICOM does not have for it."""
    for modality in ("NM", "PET"):
        n_files = sum(file.modality.upper() == modality for file in files.dicom)
        if n_files:
            yield (
                f"DICOM files ({n_files}) have {tag_of('Modality')} {modality}, a PET has PT: if "
                "they are PET, correct it"
                + (", or export them from the PET scanner anew" if modality == "NM" else "")
            )


def _hints_of_folder(folder: str, files: StudyFiles) -> Iterator[str]:
    """Yield what a study's folder tells of why roles may be missing."""
    if files.other_formats:
        yield f"{', '.join(files.other_formats)} files are not read: convert or unpack them"
    named = frozenset(words(os.path.basename(folder)))
    if named and any(named <= of_role for of_role in (MASK_WORDS, PET_WORDS, CT_WORDS)):
        yield (
            "the study's folder is named like a role: move CT, PET and mask into one "
            "RAW_PROJECT/<patient>/<study>/"
        )


# --- roles -----------------------------------------------------------------------------------

_MASK_MODALITIES = ("SEG", "RTSTRUCT")


@dataclass(frozen=True)
class Roles:
    """The files of a complete study.

    Attributes
    ----------
    ct, pet : NiftiFile or Series
    mask : NiftiFile, NiftiFiles or DicomFile
        A DicomFile is a SEG or an RTSTRUCT.
    header : Series or None
        PET DICOM files that give the SUV; None where PET is DICOM itself or needs no header.
        Given beside a DICOM PET, it must be of that very series.
    warnings : tuple of Warning
        What was left out or decided; no identity.
    sidecar : str or None
        Path of the PET-BIDS sidecar that gives the SUV of a NIfTI PET without a DICOM header.
    """

    ct: NiftiFile | Series
    pet: NiftiFile | Series
    mask: NiftiFile | NiftiFiles | DicomFile
    header: Series | None
    warnings: tuple[Warning, ...] = ()
    sidecar: str | None = None


@dataclass(frozen=True)
class Survey:
    """What was found in a study.

    Attributes
    ----------
    fitting : dict of role to list of candidates
        Without "header" where none is needed.
    warnings : tuple of Warning
        What was left out or decided; no identity.
    hints : tuple of str
        Why roles may be missing; no identity.
    names : tuple of str
        All candidates, whether patterns fit them or not, and NIfTI files of no role (private).
    lacks_files : bool
        As in `IncompleteStudy`.
    """

    fitting: Mapping[str, Sequence[Candidate]]
    warnings: tuple[Warning, ...] = ()
    hints: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    lacks_files: bool = False

    def summary(self, role: str) -> str:
        """Return in a few words what fits a role; no identity."""
        found = self.fitting.get(role)
        if found is None:  # a header, where the PET has its own or needs none
            return "-"
        if len(found) > 1:
            return f"{len(found)} candidates"
        return describe(found[0]) if found else "missing"


def survey(folder: StudyFolder | str, patterns: Patterns, *, header_needed: bool = True) -> Survey:
    """Find what fits each role of one study.

    Parameters
    ----------
    folder : StudyFolder or str
        The study, or the path of its folder.
    patterns : Patterns
    header_needed : bool
        False where a NIfTI PET is in SUV already.

    Raises
    ------
    StudyError
        A folder or file cannot be read.
    """
    if isinstance(folder, str):
        folder = StudyFolder("", "", folder)
    files = read_files(folder)
    nifti_ct, nifti_pet = (_nifti_in_role(role, files.nifti, patterns) for role in ("ct", "pet"))
    headers = [] if nifti_pet else _files_for_header_alone("pet", files.dicom, patterns)
    beside_ct = _files_for_header_alone("ct", files.dicom, patterns, is_all_allowed=bool(nifti_ct))
    set_apart = {*headers, *beside_ct}
    slices = [file for file in files.dicom if file not in set_apart]
    candidates: dict[str, list[Candidate]] = {
        "ct": [*nifti_ct, *group_series(slices, "CT")],
        "pet": [*nifti_pet, *group_series(slices, "PT")],
        "mask": [
            *_nifti_in_role("mask", files.nifti, patterns),
            *(file for file in files.dicom if file.modality in _MASK_MODALITIES),
        ],
    }
    if headers or (nifti_pet and header_needed):
        of_pet = group_series(headers or files.dicom, "PT")
        if of_pet or not all(sidecar_of(pet.path) for pet in nifti_pet):
            candidates["header"] = [*of_pet]
    fitting = {
        role: [each for each in found if patterns.admit(role, each)]
        for role, found in candidates.items()
    }
    fitting["mask"] = _one_file_a_lesion(fitting["mask"], patterns)
    warnings = files.warnings
    for role in ("ct",) if nifti_pet else ("ct", "pet"):
        fitting[role], left_out = _without_single_slices(fitting[role])
        warnings += left_out
    if nifti_pet and "pet" not in patterns.by_role:
        # DICOM beside a NIfTI PET is its header, be it one file or the whole series.
        warnings += _passed_over(fitting["pet"])
        fitting["pet"] = [*nifti_pet]
    for role in [role for role in ("pet", "header") if role in fitting]:
        fitting[role], left_out = _without_uncorrected(fitting[role])
        warnings += left_out
    nameless = [
        file.name for file in files.nifti if not file.possible_roles and not patterns.fit_any(file)
    ]
    if nameless and all(fitting.values()):
        warnings += _nameless_left_out(len(nameless))
    names = [private_name(role, each) for role, found in candidates.items() for each in found]
    hints = (
        *_hints_of_roles(fitting, files, patterns, len(nameless)),
        *_hints_of_folder(folder.path, files),
    )
    return Survey(fitting, warnings, hints, (*names, *nameless), files.lacks_files)


def choose(found: Survey, *, has_mapping: bool = True) -> Roles:
    """Return the one candidate of each role.

    Parameters
    ----------
    found : Survey
    has_mapping : bool
        Whether several candidates are named in the mapping, as the message then says.

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
    reasons += [_several_candidates(role, fitting[role]) for role in several]
    if several:
        if has_mapping:
            reasons.append("the mapping file names them")
        reasons += _several_examinations(fitting)
    if missing:
        reasons += [*found.hints, *map(str, found.warnings)]
        raise IncompleteStudy(
            "; ".join(reasons), "; ".join(found.names), lacks_files=found.lacks_files
        )
    if several:
        names = [private_name(role, each) for role in several for each in fitting[role]]
        raise StudyError("; ".join(reasons), "; ".join(names))
    ct, pet, mask = (fitting[role][0] for role in ("ct", "pet", "mask"))
    header = fitting["header"][0] if "header" in fitting else None
    has_header = header is not None or isinstance(pet, Series)
    sidecar = None if has_header else sidecar_of(pet.path)  # type: ignore[union-attr]
    return Roles(ct, pet, mask, header, found.warnings, sidecar)  # type: ignore[arg-type]


def find_roles(
    folder: StudyFolder | str, patterns: Patterns, *, header_needed: bool = True
) -> Roles:
    """Find the CT, PET, mask and header of one study; see `survey` and `choose`."""
    return choose(survey(folder, patterns, header_needed=header_needed))


# --- files by kind and name ------------------------------------------------------------------


def _files_for_header_alone(
    role: str, dicom: Sequence[DicomFile], patterns: Patterns, *, is_all_allowed: bool = False
) -> list[DicomFile]:
    """Return the files of PET or CT that are headers and none of its slices.

    --header names them; without it their own name does, or their place: copies of slices in
    another folder. Files that the role's pattern names are not; and where no other file of the
    role would be left, none is, unless that `is_all_allowed`.
    """
    modality = {"pet": "PT", "ct": "CT"}[role]
    of_role = [file for file in dicom if file.modality == modality]
    copies = _copies_elsewhere(group_series(of_role, modality))
    named = [
        file
        for file in of_role
        if (
            patterns.fit("header", file)
            if "header" in patterns.by_role
            else _is_header(file) or file in copies
        )
        and not patterns.fit(role, file)
    ]
    return named if is_all_allowed or len(named) < len(of_role) else []


def _copies_elsewhere(candidates: Sequence[Series]) -> set[DicomFile]:
    """Return the files of folders that hold nothing but copies of slices in other folders.

    Where a series lies there twice as a whole neither is the copy: it will be refused.
    """
    copies: set[DicomFile] = set()
    for series in candidates:
        folders: dict[str, list[DicomFile]] = defaultdict(list)
        for file in series.files:
            folders[os.path.dirname(file.name)].append(file)
        if len(folders) == 1:
            continue
        left = Counter(map(_instance, series.files))
        n_different = len(left)
        for files in sorted(folders.values(), key=len):
            here = Counter(map(_instance, files))
            if len(here) < n_different and all(left[each] > n for each, n in here.items()):
                copies.update(files)
                left -= here
    return copies


def _instance(file: DicomFile) -> tuple[str, ...]:
    """Return what tells an image, even after an anonymiser that numbers those of each folder."""
    keywords = ("SOPInstanceUID", "ImagePositionPatient")
    return tuple(joined_text(file.header, keyword) for keyword in keywords)


def _nifti_in_role(role: str, files: Sequence[NiftiFile], patterns: Patterns) -> list[NiftiFile]:
    """Return the files that the role's pattern names; without one, those whose words tell it.

    A file that the pattern of another role names is that role's alone.
    """
    if role in patterns.by_role:
        return [file for file in files if patterns.fit(role, file)]
    return [file for file in files if role in file.possible_roles and not patterns.fit_any(file)]


def _one_file_a_lesion(masks: Sequence[Candidate], patterns: Patterns) -> list[Candidate]:
    """Take the NIfTI masks as one where a pattern of the user names several, and no DICOM mask."""
    files = [each for each in masks if isinstance(each, NiftiFile)]
    if "mask" not in patterns.by_role or not 1 < len(files) == len(masks):
        return [*masks]
    return [NiftiFiles(tuple(sorted(files, key=lambda file: file.name)))]


def _without_single_slices(
    candidates: Sequence[Candidate],
) -> tuple[list[Candidate], tuple[Warning, ...]]:
    """Leave out single slices beside volumes: scouts, headers and the like.

    One of the same plane and matrix as those of a series may have been torn from it: it stays,
    and the study is ambiguous.
    """
    volumes = [each for each in candidates if isinstance(each, Series) and each.n_images > 1]
    geometries = {_geometry(each) for each in volumes}
    single = [
        each
        for each in candidates
        if isinstance(each, Series) and each.n_images == 1 and _geometry(each) not in geometries
    ]
    if not single or len(single) == len(candidates):
        return [*candidates], ()
    text = f"DICOM series of one {single[0].modality} slice ({len(single)}) are left out"
    return [each for each in candidates if each not in single], (Warning(Kind.LEFT_OUT, text),)


def _without_uncorrected(
    candidates: Sequence[Candidate],
) -> tuple[list[Candidate], tuple[Warning, ...]]:
    """Leave out PET series not corrected for attenuation beside one that is: they give no SUV."""
    series = [each for each in candidates if isinstance(each, Series)]
    uncorrected = [each for each in series if not is_corrected(each)]
    if not uncorrected or len(uncorrected) == len(series):
        return [*candidates], ()
    text = (
        f"PET series not corrected for attenuation ({len(uncorrected)}, "
        f"{tag_of('CorrectedImage')} lacks ATTN, or is missing) are left out"
    )
    corrected = [each for each in candidates if each not in uncorrected]
    return corrected, (Warning(Kind.LEFT_OUT, text),)


def _geometry(series: Series) -> tuple[str, ...]:
    keywords = ("ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
    return tuple(joined_text(series.files[0].header, keyword) for keyword in keywords)
