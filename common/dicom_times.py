"""Dates, times of day and moments of a DICOM header as `datetime` has them.

Knows pydicom. Messages quote no value, as a misplaced one may be a name.
"""

import re
from datetime import date, datetime, time, timedelta, timezone

from pydicom.dataset import Dataset

from common.dicom_values import PrivateTag, malformed, private_text, tag_of, text
from common.errors import StudyError

_DATE = re.compile(r"(\d{4})\.?(\d{2})\.?(\d{2})", re.ASCII)
_HOUR = re.compile(r"\d{2}", re.ASCII)
_TIME = re.compile(r"(\d{2}):?(\d{2}):?(?:(\d{2})(?:\.(\d*))?)?", re.ASCII)
_DATE_TIME = re.compile(r"(\d{8})(\d{4}(?:\d{2}(?:\.\d*)?)?)([+-]\d{4})?", re.ASCII)
_DATE_TIME_WITHOUT_MINUTES = re.compile(r"\d{4}(\d{2}){0,3}([+-]\d{4})?", re.ASCII)
_OFFSET = re.compile(r"([+-])(\d{2})([0-5]\d)", re.ASCII)


def utc_offset(header: Dataset) -> timezone | None:
    """Return TimezoneOffsetFromUTC."""
    keyword = "TimezoneOffsetFromUTC"
    value = text(header, keyword)
    return None if value is None else _parse_offset(value, tag_of(keyword))


def clock_time(header: Dataset, keyword: str, zone: timezone | None) -> time | None:
    """Return a time of day (TM), aware of `zone` if there is one.

    None also where it has no minutes, as DICOM allows.
    """
    value = text(header, keyword)
    if value is None or _HOUR.fullmatch(value):
        return None
    return _parse_time(value, tag_of(keyword)).replace(tzinfo=zone)


def date_and_time(
    header: Dataset, date_keyword: str, time_keyword: str, zone: timezone | None
) -> datetime | None:
    """Return the moment that a date (DA) and a time (TM) make up, None unless both are there."""
    day, clock = text(header, date_keyword), clock_time(header, time_keyword, zone)
    if day is None or clock is None:
        return None
    return _parse_moment(day, clock, tag_of(date_keyword))


def date_time(header: Dataset, keyword: str, zone: timezone | None) -> datetime | None:
    """Return a moment (DT), aware of its own UTC offset, else of `zone`.

    None also where it has no minutes, as DICOM allows.
    """
    value = text(header, keyword)
    return None if value is None else _parse_date_time(value, zone, tag_of(keyword))


def private_date_time(
    header: Dataset, private: PrivateTag, zone: timezone | None
) -> datetime | None:
    """Return a private moment (DT); None where it is unreadable, too."""
    try:
        value = private_text(header, private)
        return None if value is None else _parse_date_time(value, zone, private.creator)
    except StudyError:
        return None


def _parse_time(value: str, label: str) -> time:
    match = _TIME.fullmatch(value)
    if match is None:
        raise malformed(label, "a time of day")
    hour, minute, second, fraction = match.groups()
    microsecond = int((fraction or "").ljust(6, "0")[:6])
    try:
        # DICOM allows a leap second, which datetime does not.
        return time(int(hour), int(minute), min(int(second or 0), 59), microsecond)
    except ValueError as error:
        raise malformed(label, "a time of day") from error


def _parse_moment(day: str, clock: time, label: str) -> datetime:
    match = _DATE.fullmatch(day)
    try:
        year, month, day_of_month = map(int, match.groups() if match else ())
        return datetime.combine(date(year, month, day_of_month), clock)
    except ValueError as error:
        raise malformed(label, "a date") from error


def _parse_date_time(value: str, zone: timezone | None, label: str) -> datetime | None:
    if _DATE_TIME_WITHOUT_MINUTES.fullmatch(value):
        return None
    match = _DATE_TIME.fullmatch(value)
    if match is None:
        raise malformed(label, "a date-time")
    day, clock, offset = match.groups()
    own_zone = _parse_offset(offset, label) if offset else zone
    return _parse_moment(day, _parse_time(clock, label).replace(tzinfo=own_zone), label)


def _parse_offset(value: str, label: str) -> timezone:
    match = _OFFSET.fullmatch(value)
    try:
        sign, hours, minutes = match.groups() if match else ()
        offset = timedelta(hours=int(hours), minutes=int(minutes))
        return timezone(-offset if sign == "-" else offset)
    except ValueError as error:
        raise malformed(label, "a UTC offset") from error
