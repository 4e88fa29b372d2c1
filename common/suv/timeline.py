"""The moments of a PET series as seconds on one clock.

Pure. The origin is an arbitrary midnight: only differences and times of day mean anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, time, timedelta

import numpy as np
from numpy.typing import NDArray

from common.errors import StudyError
from common.suv.inputs import Caveats, PetSeries, Source

Array = NDArray[np.float64]

DAY_S = 86_400.0

SMALLEST_OFFSET_S = 900.0
"""Step of UTC offsets [s]; clock times closer than that can't be of two zones."""

SERIES_DATE = "SeriesDate (0008,0021)"
ACQUISITION_DATE = "AcquisitionDate (0008,0022)"

_MIDNIGHT = datetime(2000, 1, 1)


@dataclass(frozen=True, eq=False)
class Timeline:
    """Moments of a series [s] in the time zone of the injection; NaN where the header has none.

    Attributes
    ----------
    acquisition_s, stated_reference_s : (n,) arrays
        Acquisition and stated decay reference of each slice.
    frame_reference_time_s, frame_duration_s : (n,) arrays
        FrameReferenceTime and ActualFrameDuration of each slice: spans, not moments.
    series_start_s : float
        Start of the series.
    injection_s : float
        RadiopharmaceuticalStartDateTime; NaN also where no moment of the scan has a date.
    injection_clock_s : float
        RadiopharmaceuticalStartTime, from midnight; where no moment of the scan has a date, the
        time of day of RadiopharmaceuticalStartDateTime, if that is there.
    is_dated : bool
        Some moment of the scan has a date.
    source : Source
        What they were read from, by which messages name them.

    """

    acquisition_s: Array
    stated_reference_s: Array
    frame_reference_time_s: Array
    frame_duration_s: Array
    series_start_s: float
    injection_s: float
    injection_clock_s: float
    is_dated: bool
    source: Source


def timeline(series: PetSeries, caveats: Caveats) -> Timeline:
    """Put the moments of `series` on one clock.

    Moments without UTC offset are taken at the offset of those that have one. Where none has, any
    will do, as only differences count.

    Raises
    ------
    StudyError
        Some moments have no offset, and the others disagree about it; or the injection's clock
        time, which has none, is not that of its date-time, which has one.
    """
    default = _offset_of_the_others(series, caveats)
    injected = series.injection or series.injection_clock
    zone = default if injected is None else _offset(injected, default)

    def seconds(moment: datetime | time | None) -> float:
        if moment is None:
            return float("nan")
        if isinstance(moment, time):
            return _clock_s(moment, default, zone)
        since = moment.replace(tzinfo=None) - _MIDNIGHT - _offset(moment, default) + zone
        return since / timedelta(seconds=1)

    acquisitions = [each.acquisition for each in series.slices]
    scan = [series.series_start, *acquisitions]
    scan_s = np.array([seconds(each) for each in scan])
    stated_s = np.array([seconds(each.decay_reference) for each in series.slices])
    undated = np.array([isinstance(each, time) for each in scan])
    dated_s = scan_s[~undated & np.isfinite(scan_s)]
    stated_dates_s = stated_s[np.isfinite(stated_s)]
    if undated.any():
        _note_missing_dates(undated, caveats)
        near_s = float([*dated_s, *scan_s[undated]][0])
        if not dated_s.size and stated_dates_s.size:
            near_s = float(nearest_day_s(near_s, stated_dates_s[0]))
        scan_s[undated] = nearest_day_s(scan_s[undated], near_s)
    injection_s, injection_clock_s = seconds(series.injection), seconds(series.injection_clock)
    is_dated = bool(dated_s.size or stated_dates_s.size or not undated.any())
    if not is_dated and np.isfinite(injection_s):
        injection_s, injection_clock_s = float("nan"), injection_s % DAY_S
    return Timeline(
        acquisition_s=scan_s[1:],
        stated_reference_s=stated_s,
        frame_reference_time_s=_numbers(each.frame_reference_time_s for each in series.slices),
        frame_duration_s=_numbers(each.frame_duration_s for each in series.slices),
        series_start_s=float(scan_s[0]),
        injection_s=injection_s,
        injection_clock_s=injection_clock_s,
        is_dated=is_dated,
        source=series.source,
    )


def nearest_day_s(clock_s: Array | float, moment_s: float) -> Array:
    """Put times of day [s] on the day on which they are nearest to a moment."""
    return np.asarray(moment_s + (clock_s - moment_s + DAY_S / 2) % DAY_S - DAY_S / 2)


def _note_missing_dates(undated: NDArray[np.bool_], caveats: Caveats) -> None:
    """Say which dates are missing: of the series, the first of `undated`, or of slices."""
    missing = [
        name
        for name, is_missing in ((SERIES_DATE, undated[0]), (ACQUISITION_DATE, undated[1:].any()))
        if is_missing
    ]
    caveats.reinterpretations.append(
        f"no date ({' and '.join(missing)} missing): times count by the clock alone"
    )


def on_the_clock(span_s: Array | float) -> Array:
    """Round spans [s] to DICOM's microseconds, as they are compared with a limit."""
    return np.asarray(np.round(span_s, 6))


def _offset_of_the_others(series: PetSeries, caveats: Caveats) -> timedelta:
    """UTC offset of the moments that have none."""
    moments = [series.injection, series.injection_clock, series.series_start]
    moments += [each.acquisition for each in series.slices]
    moments += [each.decay_reference for each in series.slices]
    offsets = {each.utcoffset() for each in moments if each is not None}
    stated = sorted(each for each in offsets if each is not None)
    if None not in offsets or not stated:
        return timedelta()
    if len(stated) > 1:
        raise StudyError(
            "date-times with different UTC offsets beside times with none "
            "(TimezoneOffsetFromUTC (0008,0201) is missing): add it to the header"
        )
    if _injection_is_in_two_zones(series):
        raise StudyError(
            "RadiopharmaceuticalStartDateTime (0018,1078) and RadiopharmaceuticalStartTime "
            "(0018,1072) are in different time zones, and that of the scan is unknown "
            "(TimezoneOffsetFromUTC (0008,0201) is missing): add it to the header"
        )
    caveats.reinterpretations.append(
        "times without UTC offset (TimezoneOffsetFromUTC (0008,0201) is missing) "
        "are taken at the offset of the header's date-times"
    )
    return stated[0]


def _injection_is_in_two_zones(series: PetSeries) -> bool:
    """Tell whether the clock time, without offset, is not that of the date-time, with one."""
    stated, clock = series.injection, series.injection_clock
    if stated is None or clock is None or stated.tzinfo is None or clock.tzinfo is not None:
        return False
    later_s = (_of_day(stated.time()) - _of_day(clock)) / timedelta(seconds=1) % DAY_S
    return min(later_s, DAY_S - later_s) >= SMALLEST_OFFSET_S


def _offset(moment: datetime | time, default: timedelta) -> timedelta:
    offset = moment.utcoffset()
    return default if offset is None else offset


def _clock_s(clock: time, default: timedelta, zone: timedelta) -> float:
    since_midnight = _of_day(clock) - _offset(clock, default) + zone
    return since_midnight / timedelta(seconds=1) % DAY_S


def _of_day(clock: time) -> timedelta:
    return datetime.combine(_MIDNIGHT, clock.replace(tzinfo=None)) - _MIDNIGHT


def _numbers(values: Iterable[float | None]) -> Array:
    return np.array([np.nan if each is None else each for each in values], dtype=np.float64)
