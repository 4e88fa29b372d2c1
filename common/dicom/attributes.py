"""One attribute of a DICOM header as a plain value: text, number, sequence, date or time.

Knows pydicom. None stands for what is absent or empty. Messages quote no value, as a misplaced one
may be a name.
"""

import functools
import logging
import math
import re
import warnings
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta, timezone
from typing import Any

import numpy as np
import pydicom.config
from numpy.typing import NDArray
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag
from pydicom.valuerep import AMBIGUOUS_VR, VR, PersonName

from common.errors import StudyError
from common.suv.vendors import PrivateTag

# --- dicom values ----------------------------------------------------------------------------

# pydicom's remarks on odd values quote them, and values may be names: they go nowhere.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom\b")

UNKNOWN_CODE = "UNKNOWN"
"""Stands for a code that DICOM does not define for the attribute."""

_LARGEST_SHARED = 1 << 12
"""Bytes of a value, up to which headers that say the same share its conversion."""

_PLAIN_VALUES = {
    vr: re.compile(rb"%b(?:\\%b)*[ \0]?" % (part, part))
    for vr, part in {
        "UI": rb"[0-9.]+",
        "CS": rb"[A-Z0-9_ ]*[A-Z0-9_]",
        "DA": rb"\d{8}",
        "TM": rb"\d{6}(?:\.\d{1,6})?",
        "IS": rb"[+-]?\d{1,9}",
        "DS": rb" ?[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d{1,2})?",
    }.items()
}
"""What values of a VR look like that are ASCII, one or several, and nothing to be put right."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@functools.cache
def tag_of(keyword: str) -> str:
    """Return ``Keyword (gggg,eeee)``."""
    tag = _tag(keyword)
    return f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X})"


def text(header: Dataset, keyword: str) -> str | None:
    """Return a single value as text.

    Raises
    ------
    StudyError
        Unreadable, or several values.
    """
    return _text(header, _tag(keyword), tag_of(keyword))


def texts(header: Dataset, keyword: str) -> Sequence[str]:
    """Return all values of an attribute as texts.

    Raises
    ------
    StudyError
        Unreadable.
    """
    return _texts(header, _tag(keyword), tag_of(keyword))


def joined_text(header: Dataset, keyword: str) -> str:
    """Return all values of an attribute as one text, empty where it is absent.

    For identifiers and descriptions, where a stray backslash must not matter.

    Raises
    ------
    StudyError
        Unreadable.
    """
    return "\\".join(texts(header, keyword)).strip()


def code(header: Dataset, keyword: str, known: frozenset[str]) -> str | None:
    """Return a code string in capitals, `UNKNOWN_CODE` if it is none of the `known`."""
    value = text(header, keyword)
    if value is None:
        return None
    return value.upper() if value.upper() in known else UNKNOWN_CODE


def number(header: Dataset, keyword: str) -> float | None:
    """Return a single finite number.

    Raises
    ------
    StudyError
        Anything else.
    """
    value = text(header, keyword)
    return None if value is None else _parse_number(value, tag_of(keyword))


def required_number(header: Dataset, keyword: str) -> float:
    """Return a single finite number; see `required_numbers`."""
    (value,) = _numbers(header, keyword, 1)
    return value


def whole_number(header: Dataset, keyword: str) -> int:
    """Return a single whole number.

    Raises
    ------
    StudyError
        Absent or anything else.
    """
    value = required_number(header, keyword)
    if not value.is_integer():
        raise _malformed(tag_of(keyword), "a whole number")
    return int(value)


def required_numbers(header: Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    """Return `count` finite numbers.

    Raises
    ------
    StudyError
        Absent, of another multiplicity, or not numbers.
    """
    return np.array(_numbers(header, keyword, count))


def _numbers(header: Dataset, keyword: str, count: int) -> list[float]:
    label = tag_of(keyword)
    values = texts(header, keyword)
    if not any(values):
        raise StudyError(f"a value is missing in the header ({label}): export the series anew")
    if len(values) != count:
        expected = "a number" if count == 1 else f"{count} numbers"
        raise _malformed(label, expected)
    return [_parse_number(value, label) for value in values]


def to_ras(lps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points or vectors (..., 3) of DICOM's LPS coordinates in RAS+, without a -0."""
    return lps * (-1.0, -1.0, 1.0) + 0.0


def items(header: Dataset, keyword: str) -> list[Dataset]:
    """Return the items of a sequence; none where it is absent.

    Raises
    ------
    StudyError
        Not a sequence.
    """
    value = _sequence_alike(header, _tag(keyword), tag_of(keyword))
    if value is None:
        value = _value(header, _tag(keyword), tag_of(keyword))
    if value is None:
        return []
    if not isinstance(value, DicomSequence):
        raise _malformed(tag_of(keyword), "a sequence")
    return list(value)


def functional_group(header: Dataset, frame: Dataset, keyword: str) -> Dataset | None:
    """Return a functional group of a multi-frame object: the frame's own, else the shared one."""
    return next(iter(functional_groups(header, frame, keyword)), None)


def functional_groups(header: Dataset, frame: Dataset, keyword: str) -> list[Dataset]:
    """Return all items of a functional group: the frame's own, else the shared ones."""
    places = (frame, *items(header, "SharedFunctionalGroupsSequence"))
    return next(filter(None, (items(groups, keyword) for groups in places)), [])


def has_creator(header: Dataset, private: PrivateTag) -> bool:
    """Tell whether a header has a block of a private attribute's creator."""
    return _block_tag(header, private) is not None


def _private_text(header: Dataset, private: PrivateTag) -> str | None:
    """Return a private value as text.

    Raises
    ------
    StudyError
        Unreadable, or several values.
    """
    return _text(header, _private_tag(header, private), str(private))


def private_number(header: Dataset, private: PrivateTag) -> float | None:
    """Return a private number; None where it is unreadable, too."""
    try:
        value = _private_text(header, private)
        return None if value is None else _parse_number(value, str(private))
    except StudyError:
        return None


@functools.cache
def _tag(keyword: str) -> BaseTag:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return one_tag(tag)


one_tag = functools.cache(BaseTag)
"""Returns the one object that stands for a tag: a dictionary finds it without comparing."""


def _private_tag(header: Dataset, private: PrivateTag) -> int:
    """Tag of a private attribute; in the first block where its creator is missing."""
    tag = _block_tag(header, private)
    return private.group << 16 | 0x1000 | private.element if tag is None else tag


def _block_tag(header: Dataset, private: PrivateTag) -> int | None:
    """Tag of a private attribute in its creator's block, None where there is no such block."""
    # To look for a creator takes long, and a dataset's own iterator reads every element.
    if not any(tag >> 16 == private.group for tag in header.keys()):  # noqa: SIM118
        return None
    try:
        return int(header.private_block(private.group, private.creator).get_tag(private.element))
    except Exception:  # no such block; or a creator that pydicom cannot convert
        return None


def _value(header: Dataset, tag: int, label: str) -> Any:
    return _read(header, tag, label, _alike(header, tag))


def _read(header: Dataset, tag: int, label: str, alike: tuple[Any, ...] | None) -> Any:
    try:
        element = header.get(tag) if alike is None else _converted(*alike)
        return None if element is None else element.value
    except Exception as error:  # pydicom converts on access, with errors of many types
        raise _malformed(label, "readable") from error


def _sequence_alike(header: Dataset, tag: BaseTag, label: str) -> Any:
    """Return a short sequence that is unread, one object for all headers that say the same."""
    raw = header.get_item(tag, keep_deferred=True)
    if (
        not isinstance(raw, RawDataElement)
        or not raw.value
        or raw.VR != VR.SQ
        or len(raw.value) > _LARGEST_SHARED
    ):
        return None
    encodings = _encodings(header)
    alike = tag, raw.VR, raw.value, raw.is_implicit_VR, raw.is_little_endian, *encodings
    return _read(header, tag, label, alike)


def _alike(header: Dataset, tag: int) -> tuple[Any, ...] | None:
    """Return all that the value of an unread element depends on; None where that is much.

    The headers of a series say nearly everything alike: what is converted once serves them all.
    """
    raw = header.get_item(tag, keep_deferred=True)
    if (
        not isinstance(raw, RawDataElement)
        or raw.value is None
        or len(raw.value) > _LARGEST_SHARED
        or raw.VR == VR.SQ
        or not _stands_alone(tag)
    ):
        return None
    encodings = _encodings(header)
    return tag, raw.VR, raw.value, raw.is_implicit_VR, raw.is_little_endian, *encodings


def _encodings(header: Dataset) -> Sequence[str]:
    """Return a header's character sets; it has but one where it names none."""
    encodings = header.original_character_set
    return (encodings,) if isinstance(encodings, str) else encodings


@functools.cache
def _stands_alone(tag: int) -> bool:
    """Tell whether an element is no sequence, and its type depends on no other element."""
    return not BaseTag(tag).is_private and dictionary_VR(tag) not in {*AMBIGUOUS_VR, VR.SQ}


@functools.lru_cache(maxsize=4096)
def _converted(
    tag: BaseTag, vr: str | None, value: bytes, implicit: bool, little: bool, *encodings: str
) -> DataElement:
    raw = RawDataElement(tag, vr, len(value), value, 0, implicit, little)
    return convert_raw_data_element(raw, encoding=list(encodings))


def _texts(header: Dataset, tag: int, label: str) -> Sequence[str]:
    if (alike := _alike(header, tag)) is not None:
        return _texts_alike(label, *alike)
    return _texts_of(_read(header, tag, label, None), label)


@functools.lru_cache(maxsize=4096)
def _texts_alike(label: str, *alike: Any) -> tuple[str, ...]:
    if (plain := _plain_texts(*alike[:3])) is not None:
        return plain
    try:
        value = _converted(*alike).value
    except Exception as error:
        raise _malformed(label, "readable") from error
    return _texts_of(value, label)


def _plain_texts(tag: BaseTag, vr: str | None, value: bytes) -> tuple[str, ...] | None:
    """Return what pydicom does, ten times as fast, of values as they should be; else None."""
    pattern = _PLAIN_VALUES.get(vr or dictionary_VR(tag))
    if pattern is None or not pattern.fullmatch(value):
        return None
    return tuple(part.strip(" \0") for part in value.decode("ascii").split("\\"))


def _texts_of(value: Any, label: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, DicomSequence):
        raise _malformed(label, "a plain value")
    if isinstance(value, bytes):  # VR UN
        value = value.decode("latin-1")
    elif isinstance(value, PersonName):  # iterates over its characters
        value = str(value)
    parts = value.split("\\") if isinstance(value, str) else value
    return tuple(str(part).strip(" \0") for part in (parts if np.iterable(parts) else [parts]))


def _text(header: Dataset, tag: int, label: str) -> str | None:
    values = _texts(header, tag, label)
    if len(values) > 1:
        raise _malformed(label, "a single value")
    return values[0] or None if values else None


def _parse_number(value: str, label: str) -> float:
    parsed = float(value) if _NUMBER.fullmatch(value) else math.nan
    if not math.isfinite(parsed):
        raise _malformed(label, "a number")
    return parsed


def _malformed(label: str, expected: str) -> StudyError:
    """Return the error that an attribute is not what it should be."""
    return StudyError(
        f"malformed header ({label} is not {expected}): correct it, or export the series anew"
    )


# --- dicom times -----------------------------------------------------------------------------

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
) -> datetime | time | None:
    """Return the moment that a date (DA) and a time (TM) make up.

    The time of day alone where the date is missing; None where the time is.
    """
    day, clock = text(header, date_keyword), clock_time(header, time_keyword, zone)
    if day is None or clock is None:
        return clock
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
        value = _private_text(header, private)
        return None if value is None else _parse_date_time(value, zone, str(private))
    except StudyError:
        return None


def _parse_time(value: str, label: str) -> time:
    match = _TIME.fullmatch(value)
    if match is None:
        raise _malformed(label, "a time of day")
    hour, minute, second, fraction = match.groups()
    microsecond = int((fraction or "").ljust(6, "0")[:6])
    try:
        # DICOM allows a leap second, which datetime does not.
        return time(int(hour), int(minute), min(int(second or 0), 59), microsecond)
    except ValueError as error:
        raise _malformed(label, "a time of day") from error


def _parse_moment(day: str, clock: time, label: str) -> datetime:
    match = _DATE.fullmatch(day)
    try:
        year, month, day_of_month = map(int, match.groups() if match else ())
        return datetime.combine(date(year, month, day_of_month), clock)
    except ValueError as error:
        raise _malformed(label, "a date") from error


def _parse_date_time(value: str, zone: timezone | None, label: str) -> datetime | None:
    if _DATE_TIME_WITHOUT_MINUTES.fullmatch(value):
        return None
    match = _DATE_TIME.fullmatch(value)
    if match is None:
        raise _malformed(label, "a date-time")
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
        raise _malformed(label, "a UTC offset") from error
