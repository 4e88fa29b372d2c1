"""The JSON sidecar of a PET by PET-BIDS: what its SUV needs, where no DICOM header is there."""

import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import StudyError, UnreachableStudy
from common.raw.layouts import PARTICIPANTS
from common.suv.decay import average_rate_time_s
from common.suv.inputs import PetSeries, PetSlice, Source
from common.suv.nuclides import HALF_LIFE_S, nuclide_in

_BQ_PER = {"bq": 1.0, "kbq": 1e3, "mbq": 1e6, "gbq": 1e9}

_NO_CORRECTION = re.compile(r"\s*($|(no|none|not|n/a|false|without|uncorrected)\b)", re.IGNORECASE)
"""Values of AttenuationCorrection by which there was none."""

_DAY_OF_SCAN = datetime(2000, 1, 1)
"""PET-BIDS has clock times and seconds, no dates."""

_WEIGHTS = ("weight", "weight_kg", "body_weight", "bodyweight", "patientweight", "subjectweight")


def sidecar_of(pet_path: str) -> str | None:
    """Return the path of the PET-BIDS sidecar beside a NIfTI PET; None where there is none.

    Raises
    ------
    UnreachableStudy
        Whether there is one can't be told.
    """
    path = re.sub(r"\.nii(\.gz)?$", ".json", pet_path, flags=re.IGNORECASE)
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
        "source": Source.BIDS,
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
        with open(project / PARTICIPANTS, encoding="utf-8-sig") as stream:
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
