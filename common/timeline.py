"""The moments of a PET series as seconds on one clock.

Pure. Only differences and times of day mean anything: the origin is an arbitrary midnight.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, time, timedelta

import numpy as np
from numpy.typing import NDArray

from common.errors import StudyError
from common.pet_series import PetSeries
from common.remarks import Remarks

Array = NDArray[np.float64]

DAY_S = 86_400.0

SMALLEST_OFFSET_S = 900.0
"""Step of UTC offsets [s]; clock times closer than that can't be of two zones."""

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
        RadiopharmaceuticalStartDateTime.
    injection_clock_s : float
        RadiopharmaceuticalStartTime, from midnight.

    """

    acquisition_s: Array
    stated_reference_s: Array
    frame_reference_time_s: Array
    frame_duration_s: Array
    series_start_s: float
    injection_s: float
    injection_clock_s: float


def timeline(series: PetSeries, remarks: Remarks) -> Timeline:
    """Put the moments of `series` on one clock.

    Moments without UTC offset are taken at the offset of those that have one. Where none has, any
    will do, as only differences count.

    Raises
    ------
    StudyError
        Some moments have no offset, and the others disagree about it; or the injection's clock
        time, which has none, is not that of its date-time, which has one.
    """
    default = _offset_of_the_others(series, remarks)
    injected = series.injection or series.injection_clock
    zone = default if injected is None else _offset(injected, default)

    def seconds(moments: Iterable[datetime | None]) -> Array:
        return _numbers(
            None
            if each is None
            else (each.replace(tzinfo=None) - _MIDNIGHT - _offset(each, default) + zone)
            / timedelta(seconds=1)
            for each in moments
        )

    series_start_s, injection_s = seconds([series.series_start, series.injection])
    return Timeline(
        acquisition_s=seconds(each.acquisition for each in series.slices),
        stated_reference_s=seconds(each.decay_reference for each in series.slices),
        frame_reference_time_s=_numbers(each.frame_reference_time_s for each in series.slices),
        frame_duration_s=_numbers(each.frame_duration_s for each in series.slices),
        series_start_s=float(series_start_s),
        injection_s=float(injection_s),
        injection_clock_s=_clock_s(series.injection_clock, default, zone),
    )


def on_the_clock(span_s: Array | float) -> Array:
    """Round spans [s] to DICOM's microseconds, as they are compared with a limit."""
    return np.asarray(np.round(span_s, 6))


def _offset_of_the_others(series: PetSeries, remarks: Remarks) -> timedelta:
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
    remarks.reinterpretations.append(
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


def _clock_s(clock: time | None, default: timedelta, zone: timedelta) -> float:
    if clock is None:
        return float("nan")
    since_midnight = _of_day(clock) - _offset(clock, default) + zone
    return since_midnight / timedelta(seconds=1) % DAY_S


def _of_day(clock: time) -> timedelta:
    return datetime.combine(_MIDNIGHT, clock.replace(tzinfo=None)) - _MIDNIGHT


def _numbers(values: Iterable[float | None]) -> Array:
    return np.array([np.nan if each is None else each for each in values], dtype=np.float64)
