"""The role that each file of a study plays: CT, PET, mask, or header of the PET.

Where several fit, a pattern of the user decides; none is picked silently.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.candidates import (
    ROLE_NAMES,
    Candidate,
    NiftiFile,
    Patterns,
    kind,
    modality_of,
    roles_by_words,
)
from common.dicom import DicomFile, Series, group_series
from common.dicom_values import joined_text
from common.errors import IncompleteStudy, StudyError
from common.role_hints import (
    hints_of_folder,
    hints_of_roles,
    is_header,
    nameless_left_out,
    passed_over,
    private_name,
    several_candidates,
    several_examinations,
)
from common.study_files import read_files

_MASK_MODALITIES = ("SEG", "RTSTRUCT")


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
    for role in ("ct",) if nifti_pet else ("ct", "pet"):
        fitting[role], left_out = _without_single_slices(fitting[role])
        remarks += left_out
    if nifti_pet and "pet" not in patterns.by_role:
        # DICOM beside a NIfTI PET is its header, be it one file or the whole series.
        remarks += passed_over(fitting["pet"])
        fitting["pet"] = [*nifti_pet]
    nameless = [
        file.name
        for file in files.nifti
        if not roles_by_words(file.name) and not patterns.name_any(file)
    ]
    if nameless and all(fitting.values()):
        remarks += nameless_left_out(len(nameless))
    names = [private_name(role, each) for role, found in candidates.items() for each in found]
    hints = (
        *hints_of_roles(fitting, files, patterns, len(nameless)),
        *hints_of_folder(folder, files),
    )
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
    reasons += [several_candidates(role, fitting[role]) for role in several]
    if several:
        reasons += ["the mapping file names them", *several_examinations(fitting)]
    if missing:
        reasons += [*found.hints, *found.remarks]
        raise IncompleteStudy("; ".join(reasons), "; ".join(found.names))
    if several:
        names = [private_name(role, each) for role in several for each in fitting[role]]
        raise StudyError("; ".join(reasons), "; ".join(names))
    ct, pet, mask = (fitting[role][0] for role in ("ct", "pet", "mask"))
    header = fitting["header"][0] if "header" in fitting else None
    return Roles(ct, pet, mask, header, found.remarks)  # type: ignore[arg-type]


def find_roles(folder: str, patterns: Patterns, *, header_needed: bool = True) -> Roles:
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
    of_role = [file for file in dicom if modality_of(file) == modality]
    copies = _copies_elsewhere(group_series(of_role, modality))
    named = [
        file
        for file in of_role
        if (
            patterns.name("header", file)
            if "header" in patterns.by_role
            else is_header(file) or file in copies
        )
        and not patterns.name(role, file)
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
        return [file for file in files if patterns.name(role, file)]
    return [
        file for file in files if role in roles_by_words(file.name) and not patterns.name_any(file)
    ]


def _without_single_slices(
    candidates: Sequence[Candidate],
) -> tuple[list[Candidate], tuple[str, ...]]:
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
    remark = f"DICOM series of one {single[0].modality} slice ({len(single)}) are left out"
    return [each for each in candidates if each not in single], (remark,)


def _geometry(series: Series) -> tuple[str, ...]:
    keywords = ("ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
    return tuple(joined_text(series.files[0].header, keyword) for keyword in keywords)
