"""Layouts other than ``<patient>/<study>/``: nnU-Net's raw data, and BIDS.

A case of nnU-Net is ``imagesTr/CASE_0000.nii.gz`` and so on with ``labelsTr/CASE.nii.gz``; the flat
form of HECKTOR writes ``CASE__CT.nii.gz``. A study of BIDS is ``sub-X[/ses-Y]/`` with its masks
below ``derivatives/``; see `sidecar` for its SUV.
"""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from common.errors import StageError
from common.raw.project import (
    Member,
    StudyFolder,
    is_file,
    is_folder,
    list_studies,
    listed_files,
    text_of,
)

logger = logging.getLogger("tumorvolume")

_MANY_STUDIES = 5
"""Undated folders below one patient's from which on each may be a patient's own."""

_DATE = re.compile(r"\d{6}|\d{1,4}[-._ ]\d{1,2}[-._ ]\d{1,4}")
_PATIENT_NUMBER = re.compile(r"(?<!\d)\d{3,5}(?!\d)")


def find_studies(project: Path, patient: str | None = None) -> list[StudyFolder]:
    """Return the studies of a raw project in whatever layout, ordered by patient and study.

    Parameters
    ----------
    project : Path
    patient : str, optional
        Regular expression that finds the patient in a case's or study folder's name (its first
        group, or the whole match), where the layout does not tell.

    Raises
    ------
    StageError
        The project can't be read, holds no study, or `patient` does not fit.
    """
    try:
        if _is_nnunet(project):
            return _nnunet_cases(project, patient)
        if _is_bids(project):
            if patient is not None:
                raise StageError(
                    f"{project}: --patient is for layouts that do not tell the patient, but "
                    "BIDS does (sub-...): leave it out"
                )
            return _bids_studies(project)
    except OSError as error:
        raise StageError(
            f"the raw project cannot be read ({error.strerror}): check the folder and its "
            "permissions"
        ) from error
    studies = list_studies(project)
    _refuse_layout_below(project, studies)
    if patient is None:
        _warn_of_sites(studies)
        return studies
    found = sorted(
        (_of_patient_in_name(each, patient) for each in studies),
        key=lambda each: (each.patient, each.study),
    )
    _warn_of_one_patient(found)
    return found


def _refuse_layout_below(project: Path, studies: Sequence[StudyFolder]) -> None:
    """Refuse the folder above one or several of another layout, whose parts look like studies."""
    for layout, part in (("nnU-Net's", "imagesTr"), ("BIDS's", "sub-*")):
        folders = {each.patient for each in studies if fnmatchcase(each.study, part)}
        if folders:
            raise StageError(
                f"{project}: no study in it: {len(folders)} folder(s) in it are of {layout} layout "
                f"({part}): give such a folder itself"
            )


def _warn_of_one_patient(studies: Sequence[StudyFolder]) -> None:
    patients = {each.patient for each in studies}
    if len(patients) == 1 < len(studies):
        logger.warning(
            "--patient finds one and the same patient in all %d names: check the pattern",
            len(studies),
        )


def _of_patient_in_name(folder: StudyFolder, pattern: str) -> StudyFolder:
    if not folder.study:
        return folder
    # The whole path names the study: two sites may use one name.
    name = f"{folder.patient}/{folder.study}"
    return replace(folder, patient=patient_in(name, pattern), study=name)


def _warn_of_sites(studies: Sequence[StudyFolder]) -> None:
    """Say where what lies below a patient's folder looks like patients of a site."""
    below: dict[str, list[str]] = defaultdict(list)
    for each in studies:
        if each.study and not _DATE.search(each.study):
            below[each.patient].append(each.study)
    sites = [names for names in below.values() if _are_patients(names)]
    if sites:
        logger.warning(
            "%d folders lie below %d folder(s) at the place of a patient: they share the "
            "patient's part of their pseudonyms; if each is a patient, give --patient REGEX, which "
            "finds the patient in FOLDER/FOLDER",
            sum(map(len, sites)),
            len(sites),
        )


def _are_patients(names: Sequence[str]) -> bool:
    """Tell whether undated folders are many, or numbered as patients are (CHUM-001)."""
    is_numbered = len(names) > 1 and all(map(_PATIENT_NUMBER.search, names))
    return is_numbered or len(names) >= _MANY_STUDIES


# --- nnU-Net ---------------------------------------------------------------------------------

_NIFTI = r"\.nii(?:\.gz)?$"
_CHANNEL = re.compile(rf"^(?P<case>.+?)_+(?P<channel>\d{{4}}|CT|PET|PT|SUV){_NIFTI}", re.IGNORECASE)
_LABEL = re.compile(rf"^(?P<case>.+){_NIFTI}", re.IGNORECASE)


def _is_nnunet(project: Path) -> bool:
    """Tell whether a folder is nnU-Net's raw data of one dataset."""
    return is_folder(project / "imagesTr")


def _nnunet_cases(project: Path, patient: str | None) -> list[StudyFolder]:
    """Return a study for each case of ``imagesTr``, ordered by name.

    Parameters
    ----------
    project : Path
    patient : str, optional
        Regular expression that finds the patient in a case's name: its first group, or all of it.
        Without it each case is a patient.

    Raises
    ------
    StageError
        `patient` is not found in a name, or channels are neither CT nor PET.
    """
    role_of = _roles_of_channels(project)
    members: dict[str, list[Member]] = defaultdict(list)
    for name in listed_files(project, "imagesTr"):
        found = _CHANNEL.match(os.path.basename(name))
        if found and (role := role_of.get(found["channel"].lower())):
            members[text_of(found["case"])].append(Member(name, role))
    if not members:
        raise StageError(
            f"{project}: imagesTr holds no case of CASE_0000.nii.gz (CT) and CASE_0001.nii.gz (PET)"
        )
    for name in listed_files(project, "labelsTr"):
        found = _LABEL.match(os.path.basename(name))
        if found and (case := text_of(found["case"])) in members:
            members[case].append(Member(name, "mask"))
    studies = [
        StudyFolder(patient_in(case, patient), case, str(project), tuple(members[case]))
        for case in sorted(members)
    ]
    if patient is not None:
        _warn_of_one_patient(studies)
    return studies


def _roles_of_channels(project: Path) -> dict[str, str]:
    """Return the role of each channel, by what ``dataset.json`` calls it."""
    roles = {"ct": "ct", "pet": "pet", "pt": "pet", "suv": "pet"}
    try:
        described = json.loads((project / "dataset.json").read_bytes())
        names = described.get("channel_names") or described.get("modality") or {}
        named = {f"{int(number):04d}": str(name) for number, name in dict(names).items()}
    except FileNotFoundError:
        named = {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StageError(
            f"{project}: dataset.json cannot be read ({type(error).__name__}): mend it, or take "
            "it away: then channel 0000 is the CT and 0001 the PET"
        ) from error
    if not named:
        return roles | {"0000": "ct", "0001": "pet"}
    for number, name in named.items():
        found = {roles[word] for word in re.findall(r"[a-z]+", name.lower()) if word in roles}
        if len(found) == 1:
            roles[number] = found.pop()
    if missing := {"ct", "pet"} - {roles[number] for number in named if number in roles}:
        listed = ", ".join(f"{number}: {name}" for number, name in sorted(named.items()))
        raise StageError(
            f"{project}: dataset.json names no channel {' and no channel '.join(sorted(missing))} "
            f"(channel_names: {listed}): name them CT and PET"
        )
    return roles


def patient_in(name: str, pattern: str | None) -> str:
    """Return what a regular expression finds in a name: its first group, or the whole match."""
    if pattern is None:
        return name
    found = re.search(pattern, name)
    if not found or not (patient := found[1] if found.re.groups else found[0]):
        raise StageError(
            f"--patient {pattern!r} finds no patient in a study's name: the pattern must fit all "
            "names (try it with --dry-run)"
        )
    return patient


# --- BIDS ------------------------------------------------------------------------------------

PARTICIPANTS = "participants.tsv"
"""The table that may tell the body weight of BIDS subjects."""


def _is_bids(project: Path) -> bool:
    """Tell whether a folder holds subjects of BIDS."""
    return any(
        entry.name.startswith("sub-") and is_folder(entry) for entry in sorted(project.iterdir())
    )


def _bids_studies(project: Path) -> list[StudyFolder]:
    """Return a study for each session, or each subject without sessions, ordered by name."""
    derived = listed_files(project, "derivatives")
    studies = []
    for subject in sorted(p.name for p in project.glob("sub-*") if is_folder(p)):
        sessions = sorted(p.name for p in (project / subject).glob("ses-*") if is_folder(p))
        for session in sessions or [""]:
            own = "/".join(filter(None, (subject, session)))
            names = listed_files(project, own)
            names += [name for name in derived if _is_of(name, subject, session)]
            if is_file(project / PARTICIPANTS):
                names.append(PARTICIPANTS)
            members = tuple(Member(name, "") for name in names)
            study = text_of(session or subject)
            studies.append(StudyFolder(text_of(subject), study, str(project), members))
    return studies


def _is_of(name: str, subject: str, session: str) -> bool:
    """Tell whether a derived file is of a subject and session, by its folders or its own name."""
    words = set(name.split("/")) | set(re.split(r"[_/]", os.path.basename(name)))
    return subject in words and (not session or session in words)
