"""Layouts other than ``<patient>/<study>/``: nnU-Net's raw data, and BIDS.

A case of nnU-Net is ``imagesTr/CASE_0000.nii.gz`` and so on with ``labelsTr/CASE.nii.gz``; the flat
form of HECKTOR writes ``CASE__CT.nii.gz``. A study of BIDS is ``sub-X[/ses-Y]/`` with its masks
below ``derivatives/``; the sidecar of its PET, by PET-BIDS, gives the SUV where no DICOM header is
there.
"""

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StageError, StudyError, UnreachableStudy
from common.raw.project import (
    Member,
    StudyFolder,
    is_file,
    is_folder,
    list_studies,
    listed_files,
    text_of,
)
from common.suv.decay import average_rate_time_s
from common.suv.inputs import PetSeries, PetSlice
from common.suv.nuclides import HALF_LIFE_S, nuclide_in

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
        if is_nnunet(project):
            return nnunet_cases(project, patient)
        if is_bids(project):
            if patient is not None:
                raise StageError(
                    f"{project}: --patient is for layouts that do not tell the patient, but "
                    "BIDS does (sub-...): leave it out"
                )
            return bids_studies(project)
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


def is_nnunet(project: Path) -> bool:
    """Tell whether a folder is nnU-Net's raw data of one dataset."""
    return is_folder(project / "imagesTr")


def nnunet_cases(project: Path, patient: str | None) -> list[StudyFolder]:
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

_PARTICIPANTS = "participants.tsv"


def is_bids(project: Path) -> bool:
    """Tell whether a folder holds subjects of BIDS."""
    return any(
        entry.name.startswith("sub-") and is_folder(entry) for entry in sorted(project.iterdir())
    )


def bids_studies(project: Path) -> list[StudyFolder]:
    """Return a study for each session, or each subject without sessions, ordered by name."""
    derived = listed_files(project, "derivatives")
    studies = []
    for subject in sorted(p.name for p in project.glob("sub-*") if is_folder(p)):
        sessions = sorted(p.name for p in (project / subject).glob("ses-*") if is_folder(p))
        for session in sessions or [""]:
            own = "/".join(filter(None, (subject, session)))
            names = listed_files(project, own)
            names += [name for name in derived if _is_of(name, subject, session)]
            if is_file(project / _PARTICIPANTS):
                names.append(_PARTICIPANTS)
            members = tuple(Member(name, "") for name in names)
            study = text_of(session or subject)
            studies.append(StudyFolder(text_of(subject), study, str(project), members))
    return studies


def _is_of(name: str, subject: str, session: str) -> bool:
    """Tell whether a derived file is of a subject and session, by its folders or its own name."""
    words = set(name.split("/")) | set(re.split(r"[_/]", os.path.basename(name)))
    return subject in words and (not session or session in words)


# --- the sidecar of a PET --------------------------------------------------------------------


def sidecar_of(pet_path: str) -> str | None:
    """Return the path of the PET-BIDS sidecar beside a NIfTI PET; None where there is none.

    Raises
    ------
    UnreachableStudy
        Whether there is one can't be told.
    """
    path = re.sub(_NIFTI, ".json", pet_path, flags=re.IGNORECASE)
    try:
        with open(path, encoding="utf-8") as stream:
            fields = json.load(stream)
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    except OSError as error:
        raise _unreadable(error) from error
    # Other programs write sidecars of other fields.
    is_bids_pet = isinstance(fields, dict) and "InjectedRadioactivity" in fields
    return path if is_bids_pet else None


def _unreadable(error: OSError) -> StudyError:
    return UnreachableStudy(
        f"a file beside the PET cannot be read ({error.strerror}): check it and its permissions"
    )


_BQ_PER = {"bq": 1.0, "kbq": 1e3, "mbq": 1e6, "gbq": 1e9}

_NO_CORRECTION = re.compile(r"\s*($|(no|none|not|n/a|false|without|uncorrected)\b)", re.IGNORECASE)
"""Values of AttenuationCorrection by which there was none."""

_DAY_OF_SCAN = datetime(2000, 1, 1)
"""PET-BIDS has clock times and seconds, no dates."""

_WEIGHTS = ("weight", "weight_kg", "body_weight", "bodyweight", "patientweight", "subjectweight")


def read_sidecar(path: str) -> PetSeries:
    """Return what a PET-BIDS sidecar says of the SUV of its PET.

    Parameters
    ----------
    path : str
        The JSON file beside the PET. The body weight may stand in ``participants.tsv`` above it.

    Raises
    ------
    StudyError
        It can't be read, or lacks what SUV needs; the message names the field.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            fields = json.load(stream)
        if not isinstance(fields, dict):
            raise ValueError
    except OSError as error:
        raise _unreadable(error) from error
    except ValueError as error:
        raise StudyError(
            "the JSON sidecar of the PET cannot be read: correct it, or give a DICOM header"
        ) from error
    units = str(fields.get("Units", "")).replace(" ", "").lower()
    corrected = fields.get("ImageDecayCorrected")
    if corrected not in (True, False):
        raise _lacking("ImageDecayCorrected", "true or false")
    if _NO_CORRECTION.match(str(fields.get("AttenuationCorrection") or "")):
        raise StudyError(
            "the PET is not corrected for attenuation, or its JSON sidecar does not say so "
            "(AttenuationCorrection): give the corrected PET, or correct the sidecar"
        )
    weight_kg = _weight_kg(fields, Path(path))
    shared: dict[str, Any] = {
        "corrected_image": frozenset({"ATTN", "DECY"} if corrected else {"ATTN"}),
        "decay_correction": "START" if corrected else "NONE",
        "weight_kg": weight_kg,
    }
    if units in ("g/ml", "suv", "suvbw"):
        return PetSeries((PetSlice(),), "GML", suv_type="BW", **shared)
    activity, _, volume = units.partition("/")
    if activity not in _BQ_PER or volume not in ("ml", "cc", "cm3"):
        raise _lacking("Units", "Bq/mL")
    nuclide = nuclide_in(str(fields.get("TracerRadionuclide", "")))
    if nuclide is None:
        raise _lacking("TracerRadionuclide", "one of " + ", ".join(HALF_LIFE_S))
    half_life_s = HALF_LIFE_S[nuclide]
    injected = str(fields.get("InjectedRadioactivityUnits", "")).strip().lower()
    if injected not in _BQ_PER:
        raise _lacking("InjectedRadioactivityUnits", "MBq")
    dose_bq = _number(fields, "InjectedRadioactivity") * _BQ_PER[injected]
    if dose_bq <= 0:
        raise _lacking("InjectedRadioactivity", "a number above 0")
    if not weight_kg:
        raise StudyError(
            "no body weight: give it as weight [kg] in participants.tsv, or as PatientWeight in "
            "the JSON sidecar of the PET"
        )
    zero = _time_zero(fields)
    injection = zero + timedelta(seconds=_number(fields, "InjectionStart"))
    start_s, duration_s = _first_frame(fields)
    if corrected:
        reference_s = _number(fields, "ImageDecayCorrectionTime")
    else:
        reference_s = start_s + float(average_rate_time_s(np.array(duration_s), half_life_s))
    frame = PetSlice(
        acquisition=zero + timedelta(seconds=start_s),
        frame_duration_s=duration_s,
        decay_reference=zero + timedelta(seconds=reference_s),
        real_world_slope=_BQ_PER[activity],
    )
    return PetSeries(
        (frame,),
        "BQML",
        dose_bq=dose_bq,
        half_life_s=half_life_s,
        injection=injection,
        series_start=zero + timedelta(seconds=start_s),
        # Its reference time is standard, as an enhanced object's.
        enhanced=True,
        **shared,
    )


def _time_zero(fields: Mapping[str, Any]) -> datetime:
    try:
        clock = datetime.strptime(str(fields["TimeZero"])[:8], "%H:%M:%S")
    except (KeyError, ValueError) as error:
        raise _lacking("TimeZero", "a clock time such as 09:30:00") from error
    return _DAY_OF_SCAN + (clock - datetime(1900, 1, 1))


def _first_frame(fields: Mapping[str, Any]) -> tuple[float, float]:
    """Return start and duration [s] of the one frame, from TimeZero."""
    starts, durations = (fields.get(name) or [] for name in ("FrameTimesStart", "FrameDuration"))
    starts, durations = (
        [each] if isinstance(each, int | float) else each for each in (starts, durations)
    )
    if not starts:
        raise _lacking("FrameTimesStart", "the frame's start [s]")
    if len(starts) > 1:
        raise StudyError(
            f"the PET has {len(starts)} frames (FrameTimesStart): dynamic series are not read: "
            "give one static frame"
        )
    first_s = _number({"FrameTimesStart": starts[0]}, "FrameTimesStart")
    if not durations:
        raise _lacking("FrameDuration", "the frame's length [s]")
    return first_s, _number({"FrameDuration": durations[0]}, "FrameDuration")


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _lacking(name, "a number")
    return float(value)


def _weight_kg(fields: Mapping[str, Any], path: Path) -> float | None:
    for name, value in fields.items():
        if name.lower() in _WEIGHTS and isinstance(value, int | float):
            return float(value)
    subject = next((part for part in path.parts if part.startswith("sub-")), None)
    if subject is None:
        return None
    project = Path(*path.parts[: path.parts.index(subject)])
    try:
        with open(project / _PARTICIPANTS, encoding="utf-8-sig") as stream:
            heading, *rows = (line.rstrip("\r\n").split("\t") for line in stream)
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise _unreadable(error) from error
    column = next((i for i, name in enumerate(heading) if name.strip().lower() in _WEIGHTS), None)
    for row in rows:
        if column is not None and row[0] == subject and len(row) > column:
            try:
                return float(row[column])
            except ValueError:
                return None
    return None


def _lacking(name: str, expected: str) -> StudyError:
    return StudyError(
        f"the JSON sidecar of the PET has no usable {name} (PET-BIDS; expected: {expected}): add "
        "it, or give a DICOM header of the PET"
    )
