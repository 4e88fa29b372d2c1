"""Radioactive decay: the moment PET values refer to, and how long after injection that is.

Pure. The rules, as they are named in the provenance of a study:

    12a  START: the decay reference the vendor states, on every slice (GE, Siemens), unless it was
         dummied by an anonymiser
    12b  START: the start of the series, where it is not later than the earliest acquisition
    12c  START, the start of the series rewritten by post-processing: back from each frame, to
         acquisition - FrameReferenceTime (GE), acquisition + T_ave - FrameReferenceTime (others)
    13   NONE: acquisition + T_ave of each slice
    15   enhanced objects: DecayCorrectionDateTime; or of each frame FrameReferenceDateTime, else
         FrameAcquisitionDateTime + T_ave; likewise PET-BIDS

T_ave is the time into a frame at which the activity equals its average over the frame.

Sources: the IBSI SUV manual (Vacha et al., 2026); the QIBA FDG-PET/CT profile, vendor-neutral
pseudo-code; conformance statements of the vendors.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import time

import numpy as np

from common.errors import Kind, StudyError, Warning
from common.suv.inputs import Caveats, PetSeries, Source
from common.suv.names import (
    ACQUISITION_CLOCK,
    HALF_LIFE,
    NAMES,
    SERIES_CLOCK,
    START_DATETIME,
    START_TIME,
)
from common.suv.nuclides import is_half_life_of_pet
from common.suv.provenance import Rule
from common.suv.timeline import (
    ACQUISITION_DATE,
    DAY_S,
    SERIES_DATE,
    Array,
    Timeline,
    nearest_day_s,
    on_the_clock,
)
from common.suv.vendors import STATED_REFERENCE

HOUR_S = 3_600.0

LONGEST_CLOCK_HALF_LIFE_S = 41_400.0
"""Half-life [s] from which on an uptake may exceed a day, so that a clock time says too little."""

SERIES_TOLERANCE_S = 1.0
"""How much later than the earliest acquisition a series may start, for rounding of its time."""

DISAGREEMENT_S = 60.0
"""Difference [s] between two statements of one moment that is worth a warning."""

LONGEST_SCAN_S = 43_200.0
"""Difference [s] in uptake between slices beyond which a date or time must be wrong."""

LONGEST_UPTAKE_S = 43_200.0
"""Uptake [s] beyond which the vendor's decay reference of a short-lived nuclide was dummied."""

SHORTEST_WAIT_S = 60.0
"""Time [s] from injection to scan below which both may be one dummy."""

MOST_HALF_LIVES = 10.0
"""Uptake in half-lives beyond which one that no nuclide of PET has must be in another unit."""

_SERIES_TIME = f"{SERIES_DATE}, {SERIES_CLOCK}"
_ACQUISITION_TIME = f"{ACQUISITION_DATE}, {ACQUISITION_CLOCK}"
_FRAME_REFERENCE_TIME = "FrameReferenceTime (0054,1300)"
_FRAME_DURATION = "ActualFrameDuration (0018,1242)"


def average_rate_time_s(duration_s: Array, half_life_s: float) -> Array:
    """T_ave: the time [s] into a frame at which the activity equals its average over the frame.

    Parameters
    ----------
    duration_s : (n,) array
        Frame durations [s]; the result is NaN where one is not positive.
    half_life_s : float
        Half-life [s].

    """
    decay_rate = np.log(2) / half_life_s
    exponent = decay_rate * np.where(duration_s > 0, duration_s, np.nan)
    return np.asarray(np.log(exponent / -np.expm1(-exponent)) / decay_rate)


def decay_reference(
    series: PetSeries, times: Timeline, half_life_s: float, caveats: Caveats
) -> tuple[Rule, Array]:
    """Find the moment that the values of each slice refer to (DecayCorrection START or NONE).

    Parameters
    ----------
    series : PetSeries
        The series.
    times : Timeline
        Its moments.
    half_life_s : float
        Half-life [s].
    caveats : Caveats
        Gathers the warnings.

    Returns
    -------
    rule : Rule
        The rule that fired; see the module.
    reference_s : (n,) array
        On the clock of `times`.

    Raises
    ------
    StudyError
        The header does not determine the moment.
    """
    if series.source is not Source.SINGLE_FRAME:
        reference_s = _standard_reference_s(series, times, half_life_s)
        _compare_with_acquisition(series, times, reference_s, half_life_s, caveats)
        return Rule.STANDARD_REFERENCE, reference_s
    if series.decay_correction == "NONE":
        return Rule.FRAME_AVERAGE, _frame_average_s(times, half_life_s)
    if np.isfinite(times.stated_reference_s).all():
        others = _other_references(series, times, half_life_s)
        dummied = _how_dummied(series, times, others, half_life_s)
        if not dummied:
            _compare_stated(series, times, others, caveats)
            return Rule.STATED_REFERENCE, times.stated_reference_s
        caveats.reinterpretations.append(
            f"the vendor's {STATED_REFERENCE[series.manufacturer]} {dummied}: it is not used"
        )
    if _series_starts_in_time(times):
        _compare_with_frames(series, times, half_life_s, caveats)
        return Rule.SERIES_START, np.full(len(series.slices), times.series_start_s)
    reference_s = back_from_frames_s(series, times, half_life_s)
    _compare_among_frames(reference_s, caveats)
    return Rule.BACK_FROM_FRAMES, reference_s


def back_from_frames_s(series: PetSeries, times: Timeline, half_life_s: float) -> Array:
    """Reckon the decay reference back from each frame, as rule 12c does.

    Returns
    -------
    reference_s : (n,) array
        On the clock of `times`.

    Raises
    ------
    StudyError
        A time or duration that this needs is missing.
    """
    if np.isnan(times.frame_reference_time_s).any():
        raise StudyError(
            f"the decay reference can't be reckoned back from the frames ({_FRAME_REFERENCE_TIME} "
            "is missing): export the series from the scanner anew"
        )
    if series.manufacturer == "GE":
        return _acquisition_s(times) - times.frame_reference_time_s
    return _frame_average_s(times, half_life_s) - times.frame_reference_time_s


def uptake_s(times: Timeline, reference_s: Array, half_life_s: float, caveats: Caveats) -> Array:
    """Time from injection to the decay reference of each slice (rule 14).

    RadiopharmaceuticalStartDateTime counts where the reference lies between an hour before it and
    two half-lives after it. Else its clock time does (without it, RadiopharmaceuticalStartTime),
    on the day of the reference, or on the day before if it would come more than an hour later.
    Slice by slice, so that an AcquisitionDate that missed midnight does no harm.

    Parameters
    ----------
    times : Timeline
        Moments of the series.
    reference_s : (n,) array
        As `decay_reference` returns them.
    half_life_s : float
        Half-life [s].
    caveats : Caveats
        Gathers reinterpretations and warnings.

    Returns
    -------
    uptake_s : (n,) array
        Seconds from injection.

    Raises
    ------
    StudyError
        No time of injection, or only a clock time though an uptake may exceed a day; uptakes that
        differ by more than half a day; a half-life that can't be right.
    """
    times = _with_undummied_clock(times, reference_s, half_life_s, caveats)
    _compare_injection_times(times, caveats)
    stated_s = found_s = reference_s - times.injection_s
    if not _are_uptakes(stated_s, half_life_s):
        # Slices whose stated uptake does fit have the same by the clock: it is below 23 h.
        found_s = _uptake_by_clock_s(times, reference_s, half_life_s)
        _note_other_day(stated_s, found_s, times, caveats)
    if np.ptp(found_s) > LONGEST_SCAN_S:
        raise StudyError(
            "the slices lie more than half a day apart, or on both sides of the injection "
            f"({_ACQUISITION_TIME}, {START_DATETIME}, {START_TIME}): correct them in the header"
        )
    _check_uptake(on_the_clock(found_s), half_life_s, times, caveats)
    waited_s = found_s + times.acquisition_s - reference_s
    if np.isfinite(waited_s).all() and np.abs([found_s, waited_s]).max() < SHORTEST_WAIT_S:
        caveats.warnings.append(
            Warning(
                Kind.SUV,
                "injection and scan are less than a minute apart: check that their times are no "
                f"dummies ({NAMES[times.source].times})",
            )
        )
    return found_s


def _check_uptake(uptake_s: Array, half_life_s: float, times: Timeline, caveats: Caveats) -> None:
    """Warn of uptakes that are odd for a scan; refuse those that can't be."""
    longest_s = float(uptake_s.max())
    if longest_s > MOST_HALF_LIVES * half_life_s and not is_half_life_of_pet(half_life_s):
        raise StudyError(
            f"the half-life can't be right ({HALF_LIFE} is {half_life_s:g}, which no nuclide of "
            f"PET has, and the uptake lasted {longest_s / 60:.0f} min; minutes?): correct it in "
            "the header [s]"
        )
    if uptake_s.min() < 0:
        caveats.warnings.append(Warning(Kind.SUV, "injection is later than the decay reference"))
    if longest_s >= 2 * half_life_s:
        caveats.warnings.append(
            Warning(
                Kind.SUV,
                f"the uptake lasted longer than two half-lives ({longest_s / 60:.0f} min): check "
                f"the times of injection and scan ({NAMES[times.source].times})",
            )
        )


def _are_uptakes(stated_s: Array, half_life_s: float) -> bool:
    stated_s = on_the_clock(stated_s)
    return bool(stated_s.min() >= -HOUR_S and stated_s.max() < 2 * half_life_s)


def _series_starts_in_time(times: Timeline) -> bool:
    if np.isnan(times.series_start_s):
        raise StudyError(
            f"the decay reference is unknown ({SERIES_CLOCK} is missing, or has no minutes): "
            "add it to the header as the scanner wrote it"
        )
    if np.isnan(times.acquisition_s).all():
        raise StudyError(_no_acquisition_time())
    late_s = times.series_start_s - np.nanmin(times.acquisition_s)
    return bool(on_the_clock(late_s) <= SERIES_TOLERANCE_S)


def _other_references(series: PetSeries, times: Timeline, half_life_s: float) -> dict[str, Array]:
    """Return what else tells the decay reference, by the attributes: series start, then frames.

    A FrameReferenceTime of 0, but for GE, is none.
    """
    found = {}
    with suppress(StudyError):
        if _series_starts_in_time(times):
            found[_SERIES_TIME] = np.full(len(series.slices), times.series_start_s)
    if series.manufacturer == "GE" or (times.frame_reference_time_s > 0).all():
        with suppress(StudyError):
            found[_FRAME_REFERENCE_TIME] = back_from_frames_s(series, times, half_life_s)
    return found


def _how_dummied(
    series: PetSeries, times: Timeline, others: Mapping[str, Array], half_life_s: float
) -> str:
    """Say what shows that the vendor's decay reference was overwritten; empty where nothing."""
    stated_s = times.stated_reference_s
    if any(_apart_s(stated_s, other_s) <= DISAGREEMENT_S for other_s in others.values()):
        return ""
    clocks = [each.decay_reference for each in series.slices]
    if any(each is not None and each.time() == time() for each in clocks):
        return "reads 00:00:00"
    if not others:
        return ""
    other_s = next(iter(others.values()))
    injection_s, clock_s = times.injection_s, _injection_clock_s(times)
    uptakes_s = [(other_s - injection_s, stated_s - injection_s)]
    longest_s = 2 * half_life_s
    if half_life_s < LONGEST_CLOCK_HALF_LIFE_S:
        longest_s = LONGEST_UPTAKE_S
        # Where the date of injection does not fit the scan either, the clock has to tell.
        uptakes_s.append((_since_clock_s(other_s, clock_s), _since_clock_s(stated_s, clock_s)))
    for other_uptake_s, stated_uptake_s in uptakes_s:
        if _is_of_one_scan(other_uptake_s, longest_s):
            if _is_of_one_scan(stated_uptake_s, longest_s):
                return ""
            return (
                "is more than an hour before the injection, or "
                f"{longest_s / HOUR_S:.3g} hours after it"
            )
    return ""


def _is_of_one_scan(uptake_s: Array, longest_s: float) -> bool:
    found_s = on_the_clock(uptake_s)
    return bool(((found_s >= -HOUR_S) & (found_s <= longest_s)).all())


def _since_clock_s(moment_s: Array, clock_s: float) -> Array:
    """Time [s] since the clock last said `clock_s`; or to when it will, if within the hour."""
    found_s = moment_s % DAY_S - clock_s
    return np.where(on_the_clock(found_s) < -HOUR_S, found_s + DAY_S, found_s)


def _compare_stated(
    series: PetSeries, times: Timeline, others: Mapping[str, Array], caveats: Caveats
) -> None:
    """Warn where the vendor's decay reference is far from whatever else tells it."""
    apart_s = min((_apart_s(times.stated_reference_s, each) for each in others.values()), default=0)
    if apart_s > DISAGREEMENT_S:
        caveats.warnings.append(
            Warning(
                Kind.DECAY_REFERENCE,
                f"decay reference disagrees: the vendor's {STATED_REFERENCE[series.manufacturer]} "
                f"is {_minutes(apart_s)} from that by {' and '.join(others)}; the former is used",
            )
        )


def _compare_with_acquisition(
    series: PetSeries, times: Timeline, reference_s: Array, half_life_s: float, caveats: Caveats
) -> None:
    """Warn where decay is corrected to a moment after the scan began, or long before."""
    if series.decay_correction == "NONE" or np.isnan(times.acquisition_s).all():
        return
    late_s = float(reference_s[0] - np.nanmin(times.acquisition_s))
    if not -max(LONGEST_SCAN_S, 2 * half_life_s) <= late_s <= DISAGREEMENT_S:
        caveats.warnings.append(
            Warning(
                Kind.DECAY_REFERENCE,
                f"decay reference disagrees: {NAMES[series.source].decay_reference} is "
                f"{_minutes(abs(late_s))} "
                f"{'after' if late_s > 0 else 'before'} the first frame; it is used",
            )
        )


def _compare_among_frames(reference_s: Array, caveats: Caveats) -> None:
    """Warn where frames that START refers to one moment give several."""
    # By the clock: an AcquisitionDate that missed midnight does no harm.
    apart_s = float(np.ptp(nearest_day_s(reference_s, float(reference_s[0]))))
    if apart_s > DISAGREEMENT_S:
        caveats.warnings.append(
            Warning(
                Kind.DECAY_REFERENCE,
                f"decay reference disagrees: by {ACQUISITION_CLOCK} and {_FRAME_REFERENCE_TIME} "
                f"the slices refer to moments {_minutes(apart_s)} apart; each is taken at its own",
            )
        )


def _apart_s(these_s: Array, those_s: Array | float) -> float:
    return float(np.abs(these_s - those_s).max())


def _compare_with_frames(
    series: PetSeries, times: Timeline, half_life_s: float, caveats: Caveats
) -> None:
    try:
        frames_s = back_from_frames_s(series, times, half_life_s)
    except StudyError:
        return
    apart_s = _apart_s(frames_s, times.series_start_s)
    if apart_s > DISAGREEMENT_S:
        caveats.warnings.append(
            Warning(
                Kind.DECAY_REFERENCE,
                f"decay reference disagrees: {_SERIES_TIME} and {_FRAME_REFERENCE_TIME} are "
                f"{_minutes(apart_s)} apart; the former is used",
            )
        )


def _compare_injection_times(times: Timeline, caveats: Caveats) -> None:
    later_s = (times.injection_s - times.injection_clock_s) % DAY_S
    apart_s = min(later_s, DAY_S - later_s)
    if apart_s > DISAGREEMENT_S:
        caveats.warnings.append(
            Warning(
                Kind.SUV,
                f"injection times disagree: {START_DATETIME} and {START_TIME} are "
                f"{_minutes(apart_s)} apart; the former is used",
            )
        )


def _with_undummied_clock(
    times: Timeline, reference_s: Array, half_life_s: float, caveats: Caveats
) -> Timeline:
    """Give a date-time of injection that reads 00:00:00, and does not fit, the clock's time."""
    is_midnight = on_the_clock(times.injection_s % DAY_S) == 0
    has_other_clock = np.isfinite(times.injection_clock_s) and times.injection_clock_s > 0
    if not (is_midnight and has_other_clock) or _are_uptakes(
        reference_s - times.injection_s, half_life_s
    ):
        return times
    caveats.reinterpretations.append(
        f"{START_DATETIME} reads 00:00:00 and does not fit the scan: the time of day is that of "
        f"{START_TIME}"
    )
    return replace(times, injection_s=times.injection_s + times.injection_clock_s)


def _injection_clock_s(times: Timeline) -> float:
    dated = not np.isnan(times.injection_s)
    return times.injection_s % DAY_S if dated else times.injection_clock_s


def _uptake_by_clock_s(times: Timeline, reference_s: Array, half_life_s: float) -> Array:
    clock_s = _injection_clock_s(times)
    if np.isnan(clock_s):
        raise StudyError(
            f"the time of injection is unknown ({START_DATETIME} and {START_TIME} are missing, "
            "or have no minutes): "
            "add one of them to the header"
        )
    if half_life_s >= LONGEST_CLOCK_HALF_LIFE_S:
        if not times.is_dated:
            raise StudyError(
                "the day of the scan is unknown, and with this half-life the uptake may exceed a "
                f"day ({SERIES_DATE} and {ACQUISITION_DATE} missing): add them to the header"
            )
        dated = not np.isnan(times.injection_s)
        names = NAMES[times.source]
        trouble = "does not fit the date of the scan" if dated else "is missing"
        raise StudyError(
            "the day of injection is unknown, and with this half-life the uptake may exceed a day "
            f"({names.injection} {trouble}): correct it in {names.place}"
        )
    return _since_clock_s(reference_s, clock_s)


def _note_other_day(stated_s: Array, found_s: Array, times: Timeline, caveats: Caveats) -> None:
    if not np.isnan(stated_s).all() and np.abs(found_s - stated_s).max() > 1e-3:
        caveats.reinterpretations.append(
            f"only the clock time of {NAMES[times.source].injection} is used: "
            "its date does not fit the date of the scan"
        )


def _standard_reference_s(series: PetSeries, times: Timeline, half_life_s: float) -> Array:
    found_s = times.stated_reference_s
    if series.decay_correction == "NONE":
        average_s = times.acquisition_s + average_rate_time_s(times.frame_duration_s, half_life_s)
        found_s = np.where(np.isfinite(found_s), found_s, average_s)
    if np.isfinite(found_s).all():
        return found_s
    missing = (
        "FrameReferenceDateTime (0018,9151), or FrameAcquisitionDateTime (0018,9074) and "
        "FrameAcquisitionDuration (0018,9220),"
        if series.decay_correction == "NONE"
        else NAMES[series.source].decay_reference
    )
    raise StudyError(f"the decay reference is unknown ({missing} is missing): add it to the header")


def _frame_average_s(times: Timeline, half_life_s: float) -> Array:
    average_s = average_rate_time_s(times.frame_duration_s, half_life_s)
    if np.isnan(average_s).any():
        raise StudyError(
            f"the mean time of the frames is unknown ({_FRAME_DURATION} is missing or not "
            "positive): export the series from the scanner anew"
        )
    return _acquisition_s(times) + average_s


def _acquisition_s(times: Timeline) -> Array:
    if np.isnan(times.acquisition_s).any():
        raise StudyError(_no_acquisition_time())
    return times.acquisition_s


def _no_acquisition_time() -> str:
    return (
        f"the time of acquisition is unknown ({ACQUISITION_CLOCK} is missing, or has no minutes): "
        "export the series from the scanner anew"
    )


def _minutes(span_s: float) -> str:
    # A longer span could tell the date of the scan, where the other date is a known dummy.
    return f"{span_s / 60:.0f} min" if span_s < DAY_S else "more than a day"
