"""Seeded damage to files: what disks and networks do to bytes, and what attackers do to fields.

Every function takes the bytes of a sound file and a generator and returns those of a damaged one;
`damaged` chooses among those that fit the kind of file. Fields are damaged with checksums put
right again, so that what lies behind the checksums is reached, too.
"""

import gzip
import io
import struct
import zipfile
from collections.abc import Callable

import h5py
import nibabel
import numpy as np
import pydicom
from numpy.random import Generator
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

DEEP = 2000
"""Sequences within sequences, beyond Python's recursion limit."""

_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40)
_FLOATS = (0.0, -1.0, 1e-30, 1e30, np.nan, np.inf, -np.inf, 1e9)
_TEXTS = (
    *(b"", b"0 ", b"-1", b"1e300 ", b"nan ", b"inf ", b"99999999999 ", b"0.1\\0.2 ", b"\\\\"),
    *(b"\xff" * 8, bytes(8), b"A" * 1000, b"\x1b$B\x1b(B", b"19991399", b"250000", b"'; DROP"),
    *(b"1.2.3", b"PT", b"CT", b"SEG ", b"DYNAMIC ", b"NONE", b"ADMIN ", b"CNTS", b"BQML"),
)
_VRS = ("UN", "SQ", "OB", "OW", "DS", "IS", "US", "FD", "UI", "PN", "LO", "AT", "OF", "UT")
_CONTAINERS = (b"SQ", b"UN", b"OB", b"OW")


def damaged(kind: str, content: bytes, seed: int) -> tuple[bytes, bool]:
    """Damage a file; the same seed gives the same damage.

    Parameters
    ----------
    kind : "dicom", "nifti", "zip" or "hdf5"
        NIfTI means gzipped NIfTI.

    Returns
    -------
    content : bytes
    blind : bool
        Whether bytes were damaged without regard to checksums.
    """
    random = np.random.default_rng(seed)
    # Mostly fields: of blind damage, checksums catch nearly all.
    ways = (*_FIELDS[kind], *_FIELDS[kind], *_BYTES)
    way = ways[random.integers(len(ways))]
    return way(content, random), way in _BYTES


# --- bytes -----------------------------------------------------------------------------------


def flip_bits(content: bytes, random: Generator) -> bytes:
    """Flip 1 to 64 bits."""
    damage = bytearray(content)
    for at in _places(content, random, 1 << int(random.integers(7))):
        damage[at] ^= 1 << int(random.integers(8))
    return bytes(damage)


def truncate(content: bytes, random: Generator) -> bytes:
    """Keep the beginning."""
    return content[: int(random.integers(len(content)))]


def lose_block(content: bytes, random: Generator) -> bytes:
    """Lose a run of bytes."""
    start, length = _run(content, random)
    return content[:start] + content[start + length :]


def repeat_block(content: bytes, random: Generator) -> bytes:
    """Have a run of bytes twice."""
    start, length = _run(content, random)
    return content[: start + length] + content[start:]


def overwrite_block(content: bytes, random: Generator) -> bytes:
    """Fill a run of bytes with zeros, ones or noise."""
    start, length = _run(content, random)
    filling = (bytes(length), b"\xff" * length, random.bytes(length))[random.integers(3)]
    return content[:start] + filling + content[start + length :]


def swap_words(content: bytes, random: Generator) -> bytes:
    """Swap two words of 2 or 4 bytes, lengths perhaps."""
    damage = bytearray(content)
    size = 2 * int(random.integers(1, 3))
    one, other = _places(content[: -size - 1], random, 2)
    damage[one : one + size], damage[other : other + size] = (
        damage[other : other + size],
        damage[one : one + size],
    )
    return bytes(damage)


def put_extreme_integer(content: bytes, random: Generator) -> bytes:
    """Overwrite 2, 4 or 8 bytes with an extreme integer, a length or a count perhaps."""
    size = 1 << int(random.integers(1, 4))
    (start,) = _places(content[: -size - 1], random, 1)
    value = _NUMBERS[random.integers(len(_NUMBERS))] & (1 << 8 * size) - 1
    return content[:start] + value.to_bytes(size, "little") + content[start + size :]


def _places(content: bytes, random: Generator, count: int) -> list[int]:
    """Return positions anywhere, or among the first bytes, where headers are."""
    limit = len(content) if random.integers(2) else min(len(content), 600)
    return [int(at) for at in random.integers(limit, size=count)]


def _run(content: bytes, random: Generator) -> tuple[int, int]:
    (start,) = _places(content, random, 1)
    return start, int(min(random.integers(1, 4096), len(content) - start))


# --- DICOM -----------------------------------------------------------------------------------


def put_odd_value(content: bytes, random: Generator) -> bytes:
    """Replace the value of one attribute, nested ones included."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    parent, tag = _attribute(dataset, random)
    value = _TEXTS[random.integers(len(_TEXTS))]
    _put_raw(parent, tag, parent[tag].VR, value + b" " * (len(value) % 2))
    return _written(dataset, content)


def put_odd_representation(content: bytes, random: Generator) -> bytes:
    """Declare another value representation for an attribute."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    parent, tag = _attribute(dataset, random)
    value = parent[tag].value
    text = value.encode() if isinstance(value, str) else str(value)[:60].encode()
    _put_raw(parent, tag, str(random.choice(_VRS)), text + b" " * (len(text) % 2))
    return _written(dataset, content)


def drop_attribute(content: bytes, random: Generator) -> bytes:
    """Leave an attribute out."""
    dataset = pydicom.dcmread(io.BytesIO(content))
    parent, tag = _attribute(dataset, random)
    del parent[tag]
    return _written(dataset, content)


def nest_deeply(content: bytes, random: Generator) -> bytes:
    """Put sequences within sequences in front of an attribute."""
    depth = int(random.choice([20, 200, DEEP, 10 * DEEP]))
    at = content.find(b"PN", 132) - 4
    return content[:at] + nested(depth) + content[at:]


def nested(depth: int) -> bytes:
    """Return a sequence `depth` levels deep, of undefined lengths."""
    opening = struct.pack(
        "<HH2sHIHHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    closing = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return opening * depth + closing * depth


def put_extreme_length(content: bytes, random: Generator) -> bytes:
    """Overwrite the length of an explicit element."""
    places = [
        at for at in range(132, min(len(content) - 8, 4000)) if content[at : at + 2].isupper()
    ]
    at = int(random.choice(places))
    value = _NUMBERS[random.integers(len(_NUMBERS))]
    if content[at : at + 2] in _CONTAINERS:
        return content[: at + 4] + struct.pack("<I", value & 0xFFFFFFFF) + content[at + 8 :]
    return content[: at + 2] + struct.pack("<H", value & 0xFFFF) + content[at + 4 :]


def _attribute(dataset: pydicom.Dataset, random: Generator) -> tuple[pydicom.Dataset, int]:
    """Choose any attribute but the pixels, at any depth."""
    while True:
        tags = sorted(set(dataset.keys()) - {0x7FE00010})
        tag = tags[random.integers(len(tags))]
        items = dataset[tag].value if dataset[tag].VR == "SQ" else ()
        if not items or not random.integers(8):
            return dataset, tag
        dataset = items[random.integers(len(items))]
        if not dataset:
            raise AssertionError("an empty item: build the sound file without")


def _put_raw(dataset: pydicom.Dataset, tag: int, vr: str, value: bytes) -> None:
    dataset[tag] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)


def _written(dataset: pydicom.Dataset, content: bytes) -> bytes:
    stream = io.BytesIO()
    try:
        dataset.save_as(stream)
    except Exception:  # what can't be written is no case
        return content
    return stream.getvalue()


# --- NIfTI -----------------------------------------------------------------------------------


def put_odd_header(content: bytes, random: Generator) -> bytes:
    """Replace one header field; gzip's checksum is right."""
    raw = gzip.decompress(content)
    header = nibabel.Nifti1Header(raw[:348], check=False)
    field = str(random.choice(list(header.keys())))
    array = header[field]
    if array.dtype.kind == "S":
        header[field] = random.bytes(array.dtype.itemsize)
    else:
        flat = array.reshape(-1).copy()
        odd = _NUMBERS if array.dtype.kind in "iu" else _FLOATS
        for at in random.integers(flat.size, size=int(random.integers(1, 3))):
            value = odd[random.integers(len(odd))]
            if array.dtype.kind in "iu":
                value &= (1 << 8 * array.dtype.itemsize) - 1
                flat[at] = np.array(value, f"u{array.dtype.itemsize}").astype(array.dtype)
            else:
                flat[at] = value
        header[field] = flat.reshape(array.shape)
    return gzip.compress(header.binaryblock + raw[348:], 1, mtime=0)


def damage_within_gzip(content: bytes, random: Generator) -> bytes:
    """Damage the bytes of the NIfTI; gzip's checksum is right."""
    way = _BYTES[random.integers(len(_BYTES))]
    return gzip.compress(way(gzip.decompress(content), random), 1, mtime=0)


# --- zip -------------------------------------------------------------------------------------


def damage_within_zip(content: bytes, random: Generator) -> bytes:
    """Damage one member; the zip's checksums are right."""
    members = _members(content)
    chosen = str(random.choice(sorted(members)))
    if chosen.endswith(".json"):
        way: Callable[[bytes, Generator], bytes] = _BYTES[random.integers(len(_BYTES))]
    else:
        way = (put_odd_header, damage_within_gzip)[random.integers(2)]
    members[chosen] = way(members[chosen], random)
    return _zipped(members, zipfile.ZIP_DEFLATED if random.integers(2) else zipfile.ZIP_STORED)


def rename_member(content: bytes, random: Generator) -> bytes:
    """Give a member another name: absolute, upwards, doubled, without end."""
    members = _members(content)
    chosen = str(random.choice(sorted(members)))
    others = [
        *("/etc/passwd", f"../{chosen}", f"a/../../{chosen}", "C:\\windows\\a.nii.gz", "\\\\a\\b"),
        *(f"x/{chosen}", "x", "a" * 5000, chosen.upper(), sorted(members)[0], "..", "\n\x1b[31m"),
        *(f"{'h' * 300}/{'h' * 300}_ct.nii.gz", "-/-_ct.nii.gz", "../.._ct.nii.gz"),
    ]
    renamed = others[random.integers(len(others))]
    return _zipped({renamed if name == chosen else name: body for name, body in members.items()})


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return stream.getvalue()


# --- HDF5 ------------------------------------------------------------------------------------


def put_odd_attribute(content: bytes, random: Generator) -> bytes:
    """Replace or remove one attribute of the file or of a dataset."""

    def change(file: h5py.File) -> None:
        holders = [file, *(file[group][key] for group in file for key in file[group])]
        holder = holders[random.integers(len(holders))]
        name = str(random.choice(sorted(holder.attrs)))
        odd = (
            *("", "{}", "null", "[1, 2]", '"text"', "\ud800".encode("utf-8", "surrogatepass"), -1),
            *(np.nan, np.inf, 1e30, np.zeros((4, 4)), np.full(3, np.nan), np.zeros(0), 1 << 40),
            *(np.array([-1.0, 2, 3]), np.array([1e-9] * 3), h5py.Empty("f"), None),
        )
        value = odd[random.integers(len(odd))]
        del holder.attrs[name]
        if value is not None:
            holder.attrs[name] = value

    return _changed(content, change)


def put_odd_dataset(content: bytes, random: Generator) -> bytes:
    """Replace a dataset: another shape, type or kind of object, or values that can't be."""

    def change(file: h5py.File) -> None:
        group = file[str(random.choice(sorted(file)))]
        key = str(random.choice(sorted(group)))
        attributes = dict(group[key].attrs)
        shape, dtype = group[key].shape, group[key].dtype
        del group[key]
        match int(random.integers(10)):
            case 0:
                group.create_dataset(
                    key, shape, dtype, fillvalue=np.nan if dtype.kind == "f" else 9
                )
            case 1:
                group.create_dataset(
                    key, (2, 1 << 17, 1 << 17, 1 << 17), dtype, chunks=(1, 8, 8, 8)
                )
            case 2:
                group.create_dataset(key, (*shape, 1), dtype)
            case 3:
                group.create_dataset(key, (0, *shape[1:]), dtype)
            case 4:
                group.create_dataset(key, data="text")
            case 5:
                group.create_group(key)
                return
            case 6:
                group[key] = h5py.SoftLink(f"{group.name}/{key}")
                return
            case 7:
                group[key] = h5py.ExternalLink("nowhere.h5", "/image/x")
                return
            case 8:
                group.create_dataset(key, shape, "i8", fillvalue=-(1 << 62))
            case 9:
                return
        group[key].attrs.update(attributes)

    return _changed(content, change)


def put_odd_object(content: bytes, random: Generator) -> bytes:
    """Add, rename or remove groups and keys."""

    def change(file: h5py.File) -> None:
        match int(random.integers(5)):
            case 0:
                del file[str(random.choice(sorted(file)))]
            case 1:
                file.create_group("extra")
            case 2:
                for group in file.values():
                    key = sorted(group)[0]
                    group.move(key, "..")
            case 3:
                for group in file.values():
                    key = sorted(group)[0]
                    group.move(key, "h" * 5000)
            case 4:
                name = str(random.choice(sorted(file)))
                del file[name]
                file[name] = h5py.SoftLink("/")

    return _changed(content, change)


def _changed(content: bytes, change: Callable[[h5py.File], None]) -> bytes:
    stream = io.BytesIO(content)
    with h5py.File(stream, "r+") as file:
        change(file)
    return stream.getvalue()


_BYTES = (
    *(flip_bits, truncate, lose_block, repeat_block, overwrite_block, swap_words),
    put_extreme_integer,
)
_FIELDS = {
    "dicom": (
        *(put_odd_value, put_odd_value, put_odd_representation, drop_attribute, nest_deeply),
        put_extreme_length,
    ),
    "nifti": (put_odd_header, put_odd_header, damage_within_gzip),
    "zip": (damage_within_zip, damage_within_zip, rename_member),
    "hdf5": (put_odd_attribute, put_odd_attribute, put_odd_dataset, put_odd_object),
}
