"""Plain DICOM headers of single images, read in a fraction of the time that pydicom takes.

Knows pydicom, whose datasets it makes. What is not plain - another encoding, no pixels, a long
header, damage - is left to pydicom, which takes any file.
"""

import functools
import struct

from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataelem import RawDataElement, convert_raw_data_element, empty_value_for_VR
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)
from pydicom.valuerep import EXPLICIT_VR_LENGTH_16, EXPLICIT_VR_LENGTH_32

from common.dicom.attributes import one_tag

_META_BEGIN = 132
_UNDEFINED = 0xFFFFFFFF
_PIXEL_DATA = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_CHARACTER_SET, _TRANSFER_SYNTAX = 0x00080005, 0x00020010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DEEPEST = 16

_SHORT = {str(vr).encode(): str(vr) for vr in EXPLICIT_VR_LENGTH_16}
_LONG = {str(vr).encode(): str(vr) for vr in EXPLICIT_VR_LENGTH_32}
_PLAIN_SYNTAXES = frozenset(map(str, AllTransferSyntaxes)) - {
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
}
_explicit = struct.Struct("<HH2sH").unpack_from
_implicit = struct.Struct("<HHI").unpack_from
_long_length = struct.Struct("<I").unpack_from

Elements = dict[BaseTag, RawDataElement]


class _NotPlain(Exception):
    """A header that pydicom has to read."""


def scan_header(path: str, start: bytes) -> tuple[FileDataset, int] | None:
    """Return a header as `pydicom.dcmread` does, and where the pixel data element begins.

    Parameters
    ----------
    path : str
    start : bytes
        The first bytes of the file.

    Returns
    -------
    (FileDataset, int) or None
        None where it is not plain, or its end is not among the first bytes.
    """
    if start[128:_META_BEGIN] != b"DICM":
        return None
    try:
        meta, begin = _elements(start, _META_BEGIN, False, group=2)
        syntax = meta[BaseTag(_TRANSFER_SYNTAX)].value.rstrip(b"\0 ").decode("ascii")
        if syntax not in _PLAIN_SYNTAXES or start[begin : begin + 2] != b"\x08\x00":
            return None
        implicit = syntax == ImplicitVRLittleEndian
        if implicit and start[begin + 4 : begin + 6].isupper():
            return None
        elements, pixel_offset = _elements(start, begin, implicit)
        encoding = _encoding(elements)
    except (_NotPlain, struct.error, KeyError, ValueError, LookupError, AttributeError):
        return None
    file_meta = FileMetaDataset(meta)
    file_meta.set_original_encoding(False, True, default_encoding)
    # Without a path pydicom does not look for the file's time.
    header = FileDataset("", elements, start[:128], file_meta, implicit, True)
    header.filename = path
    header.set_original_encoding(implicit, True, encoding)
    return header, pixel_offset


def _elements(
    block: bytes, at: int, implicit: bool, group: int | None = None
) -> tuple[Elements, int]:
    """Return the elements of a group, or all up to the pixel data, and where they end."""
    elements: Elements = {}
    while True:
        if implicit:
            first, second, length = _implicit(block, at)
            vr, value_at = None, at + 8
        else:
            first, second, code, length = _explicit(block, at)
            vr, value_at = _SHORT.get(code), at + 8
        number = first << 16 | second
        if number in _PIXEL_DATA or (group is not None and first != group):
            return elements, at
        if vr is None and not implicit:
            vr, (length,), value_at = _LONG[code], _long_length(block, at + 8), at + 12
        if length == _UNDEFINED:
            if (vr or _vr_of_items(number, block, value_at)) != "SQ":
                raise _NotPlain
            vr = "SQ"
            at, end = _sequence_end(block, value_at, implicit, 0)
        else:
            at = end = value_at + length
        if end > len(block) or first == 0xFFFE:
            raise _NotPlain
        value = block[value_at:end] if end > value_at else empty_value_for_VR(vr, raw=True)
        tag = one_tag(number)
        elements[tag] = RawDataElement(tag, vr, end - value_at, value, value_at, implicit, True)


def _vr_of_items(number: int, block: bytes, at: int) -> str:
    """Return the type of an element that does not tell it, as pydicom takes it."""
    known = _known_vr(number)
    if known is None and block[at : at + 4] == b"\xfe\xff\x00\xe0":
        return "SQ"
    return known or "UN"


@functools.cache
def _known_vr(number: int) -> str | None:
    """Return the type of an element by the dictionary, None of a private one."""
    return str(dictionary_VR(number)) if dictionary_has_tag(number) else None


def _sequence_end(block: bytes, at: int, implicit: bool, depth: int) -> tuple[int, int]:
    """Return what follows a sequence of undefined length that begins here, and its own end."""
    if depth > _DEEPEST:
        raise _NotPlain
    while True:
        first, second, length = _implicit(block, at)
        number = first << 16 | second
        if number == _SEQUENCE_END:
            return at + 8, at
        if number != _ITEM:
            raise _NotPlain
        stop = None if length == _UNDEFINED else at + 8 + length
        at = _item_end(block, at + 8, stop, implicit, depth)


def _item_end(block: bytes, at: int, stop: int | None, implicit: bool, depth: int) -> int:
    """Return what follows an item that begins here; `stop` is where one of defined length does."""
    while at != stop:
        first, second, length = _implicit(block, at)
        number, value_at, code = first << 16 | second, at + 8, None
        if number == _ITEM_END and stop is None:
            return at + 8
        if not implicit:
            code, length = _explicit(block, at)[2:]
            if code not in _SHORT:
                if code not in _LONG:
                    raise _NotPlain
                (length,), value_at = _long_length(block, at + 8), at + 12
        if length != _UNDEFINED:
            at = value_at + length
        elif code == b"SQ" or (implicit and _vr_of_items(number, block, value_at) == "SQ"):
            at, _ = _sequence_end(block, value_at, implicit, depth + 1)
        else:
            raise _NotPlain
        if first == 0xFFFE or at > (len(block) if stop is None else stop):
            raise _NotPlain
    return at


def _encoding(elements: Elements) -> str | list[str]:
    """Return the character sets, as pydicom names them."""
    raw = elements.get(one_tag(_CHARACTER_SET))
    return default_encoding if raw is None else list(_python_encodings(raw.VR, raw.value))


@functools.lru_cache(maxsize=64)
def _python_encodings(vr: str | None, value: bytes | None) -> tuple[str, ...]:
    length = len(value or b"")
    raw = RawDataElement(one_tag(_CHARACTER_SET), vr, length, value, 0, vr is None, True)
    return tuple(convert_encodings(convert_raw_data_element(raw).value))
