"""How arrays lie in the files: cut into chunks and compressed, so that patches read fast.

The measurements behind the choices: ``tests/benchmarks/bench_hdf5.py``.
"""

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import deflate
import h5py
import numpy as np
from numpy.typing import NDArray

from common.errors import Unreachable

COMPRESSIONS = ("gzip", "lzf", "blosc", "none")
"""gzip, the default, is read by every HDF5; lzf by every h5py; blosc where hdf5plugin is."""

COMPRESSIONS_MEAN = (
    "of the HDF5 file (default: gzip, read everywhere; blosc, which h5py reads faster in patches, "
    "needs hdf5plugin)"
)
"""What the scripts' help says of them."""

PATCH_EDGE = 40
"""Longest edge of a 3D chunk [voxels], for random patches of 64 to 160."""

_GZIP_LEVEL = 1

_ZLIB_HEADER = b"\x78\x01"
_LONGEST_STORED = 0xFFFF
_HARDLY_HALVED = 0.46
"""Share of its size to which gzip takes noisy air: files at most a tenth larger, a sixth faster."""
_SAMPLED = 64
"""Bytes in a row of a sample: what deflate finds repeated lies near by."""

Block = tuple[slice, ...]


def missing_packages() -> dict[str, str]:
    """Return which package each compression lacks that can't be had."""
    return {} if importlib.util.find_spec("hdf5plugin") is not None else {"blosc": "hdf5plugin"}


def write_chunked(group: h5py.Group, name: str, array: NDArray[Any], compression: str) -> Any:
    """Write an array as a dataset of a group and return the dataset.

    Parameters
    ----------
    group : h5py.Group
    name : str
    array : (C, X, Y, Z) or (C, X, Z) array
    compression : str
        One of `COMPRESSIONS`. Chunks are checked as they are read: gzip has a checksum of its
        own, the others get HDF5's.
    """
    dataset = group.create_dataset(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunk_shape(array.shape),
        track_times=False,
        **_filters(compression, array.dtype),
    )
    write = _write_gzipped if compression == "gzip" else _write_block
    for block in _blocks(array.shape, dataset.chunks):
        values = np.ascontiguousarray(array[block])
        # What is not written reads as zeros, at no cost: most of a mask.
        if values.view(f"u{array.itemsize}").any():
            write(dataset, block, values)
    return dataset


def write_row(stack: h5py.Dataset, row: int, array: NDArray[Any]) -> None:
    """Write an array (C, X, Z) as a row of a stack that has none yet, as `write_chunked` does."""
    write = _write_gzipped if _has_our_gzip(stack) else _write_block
    for channel, plane in enumerate(array):
        values = np.ascontiguousarray(plane)[None, None]
        if values.view(f"u{array.itemsize}").any():
            corner = (row, channel, 0, 0)
            block = tuple(slice(at, at + n) for at, n in zip(corner, values.shape, strict=True))
            write(stack, block, values)


def _has_our_gzip(dataset: h5py.Dataset) -> bool:
    """Whether a dataset has the filters of `_write_gzipped`; tools that repack set others."""
    shuffle = [h5py.h5z.FILTER_SHUFFLE] if dataset.dtype.itemsize > 1 else []
    codes = [code for code, *_ in filters_of(dataset)]
    return codes == [*shuffle, h5py.h5z.FILTER_DEFLATE]


def filters_of(dataset: h5py.Dataset) -> list[tuple[Any, ...]]:
    """Return code, flags, options and name of each filter that a dataset's chunks go through."""
    properties = dataset.id.get_create_plist()
    return [properties.get_filter(number) for number in range(properties.get_nfilters())]


def read_values(dataset: h5py.Dataset, at: tuple[int, ...] = ()) -> NDArray[Any]:
    """Return all values of a dataset, or those at its leading indices.

    Raises
    ------
    Unreachable
        They are compressed by what is not installed.
    OSError
        A chunk is damaged.
    """
    _load_filters(dataset)
    return np.asarray(dataset[at])


def _load_filters(dataset: h5py.Dataset) -> None:
    """Have HDF5 know the filters of a dataset that h5py brings none for, such as blosc."""
    if all(h5py.h5z.filter_avail(code) for code, *_ in filters_of(dataset)):
        return
    path = dataset.file.filename
    try:
        # Slow to load, and not there for those who never asked for such a compression.
        import hdf5plugin  # noqa: F401
    except ImportError as error:
        raise Unreachable(
            f"{path}: its compression needs hdf5plugin: pip install hdf5plugin, and run again"
        ) from error
    for code, _, _, name in filters_of(dataset):
        if not h5py.h5z.filter_avail(code):
            raise Unreachable(
                f"{path}: is compressed by {name!r:.40} (HDF5 filter {code}), which hdf5plugin "
                "does not know: make it again with another --compression"
            )


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the chunk of a dataset: a block of one channel in 3D, one channel's plane in 2D."""
    if len(shape) == 4:
        return (1, *(_even_part(n, PATCH_EDGE) for n in shape[1:]))
    return (1, *shape[1:])


def _even_part(length: int, longest: int) -> int:
    """Cut a length into as few even parts as may be: little of the last chunk lies outside."""
    return -(-length // -(-length // longest))


def _filters(compression: str, dtype: np.dtype[Any]) -> dict[str, Any]:
    shuffle = dtype.itemsize > 1
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": _GZIP_LEVEL, "shuffle": shuffle}
    if compression == "lzf":
        return {"compression": "lzf", "shuffle": shuffle, "fletcher32": True}
    if compression == "none":
        return {"fletcher32": True}
    # Optional: only this compression needs the package, in writing as in reading.
    import hdf5plugin

    blosc = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.BITSHUFFLE)
    return {**blosc, "fletcher32": True}


def _blocks(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[Block]:
    starts = (range(0, length, edge) for length, edge in zip(shape, chunks, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(at, at + edge) for at, edge in zip(corner, chunks, strict=True))


def _write_block(dataset: h5py.Dataset, block: Block, values: NDArray[Any]) -> None:
    dataset[block] = values


def _write_gzipped(dataset: h5py.Dataset, block: Block, values: NDArray[Any]) -> None:
    """Do what HDF5's filters shuffle and gzip do, faster to write and to read."""
    chunk = values
    if values.shape != dataset.chunks:
        chunk = np.zeros(dataset.chunks, values.dtype)
        chunk[tuple(slice(n) for n in values.shape)] = values
    bits = chunk.reshape(-1).view(f"<u{chunk.itemsize}")
    bytes_apart = np.empty((chunk.itemsize, bits.size), np.uint8)
    for number, of_one_kind in enumerate(bytes_apart):
        of_one_kind[:] = bits >> 8 * number  # a third of the time of copying every second byte
    dataset.id.write_direct_chunk(tuple(axis.start for axis in block), _zlib_stream(bytes_apart))


def _zlib_stream(bytes_apart: NDArray[np.uint8]) -> bytes:
    """Compress the first bytes of all values, the second ones and so on, (itemsize, N).

    Low bytes that gzip would not halve, noise, are stored in the stream as they are: readers copy
    that ten times as fast as they inflate. So are the highest, of noisy air, where the others are
    and gzip hardly halves them. libdeflate makes the rest, in one piece: it ends a stream.
    Formats: RFC 1950 and 1951.
    """
    n_stored = 0
    while n_stored < len(bytes_apart) - 1 and not _is_halved(bytes_apart[n_stored]):
        n_stored += 1
    squeezed = deflate.deflate_compress(bytes_apart[n_stored:], _GZIP_LEVEL)
    if n_stored == len(bytes_apart) - 1 and len(squeezed) > _HARDLY_HALVED * len(bytes_apart[-1]):
        n_stored, squeezed = len(bytes_apart), deflate.deflate_compress(b"", _GZIP_LEVEL)
    stored = _stored(bytes_apart[:n_stored].tobytes())
    checksum = deflate.adler32(bytes_apart)
    return b"".join([_ZLIB_HEADER, stored, squeezed, checksum.to_bytes(4, "big")])


def _is_halved(of_one_kind: NDArray[np.uint8]) -> bool:
    """Tell whether gzip halves bytes, by a quarter of them, taken throughout."""
    n_rows = of_one_kind.size // _SAMPLED
    sample = of_one_kind
    if n_rows >= 64:
        sample = of_one_kind[: n_rows * _SAMPLED].reshape(n_rows, _SAMPLED)[::4].copy()
    return 2 * len(deflate.deflate_compress(sample, _GZIP_LEVEL)) < sample.size


def _stored(content: bytes) -> bytes:
    """Blocks of a deflate stream, none the last, that hold bytes as they are."""
    parts = []
    for first in range(0, len(content), _LONGEST_STORED):
        part = content[first : first + _LONGEST_STORED]
        length = len(part)
        parts += [
            b"\x00",
            length.to_bytes(2, "little"),
            (length ^ _LONGEST_STORED).to_bytes(2, "little"),
            part,
        ]
    return b"".join(parts)
