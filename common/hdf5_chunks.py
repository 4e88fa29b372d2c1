"""How arrays are cut into chunks and squeezed in HDF5 files, so that patches of them read fast.

The measurements behind the choices: ``tests/benchmarks/bench_hdf5.py``.
"""

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

COMPRESSIONS = ("gzip", "lzf", "blosc", "none")
"""gzip, the default, is read by every HDF5; lzf by every h5py; blosc where hdf5plugin is."""

PATCH_EDGE = 40
"""Longest edge of a 3D chunk [voxels], for random patches of 64 to 160."""

_GZIP_LEVEL = 1

_ISAL_LEVEL = 3
"""isal's levels 1 and 2 give other bytes, now and then, in another process."""

_ZLIB_HEADER = b"\x78\x01"
_LAST_BLOCK = b"\x01\x00\x00\xff\xff"
_LONGEST_STORED = 0xFFFF

Block = tuple[slice, ...]


def has_blosc() -> bool:
    """Whether the optional package that reads and writes blosc is installed."""
    return importlib.util.find_spec("hdf5plugin") is not None


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
    bytes_apart = np.ascontiguousarray(chunk.reshape(-1, 1).view(np.uint8).T)
    dataset.id.write_direct_chunk(tuple(axis.start for axis in block), _zlib_stream(bytes_apart))


def _zlib_stream(bytes_apart: NDArray[np.uint8]) -> bytes:
    """Compress the first bytes of all values, the second ones and so on, (itemsize, N), by isal.

    Each kind has a code of its own, which makes files smaller. What gzip would not halve, the
    noise of low bytes, is stored in the stream as it is: readers copy that ten times as fast as
    they inflate. Formats: RFC 1950 and 1951.
    """
    parts = [_ZLIB_HEADER]
    for of_one_kind in bytes_apart:
        deflate = isal_zlib.compressobj(_ISAL_LEVEL, wbits=-isal_zlib.MAX_WBITS)
        squeezed = deflate.compress(of_one_kind) + deflate.flush(isal_zlib.Z_SYNC_FLUSH)
        parts.append(
            squeezed if 2 * len(squeezed) < of_one_kind.size else _stored(of_one_kind.tobytes())
        )
    checksum = isal_zlib.adler32(bytes_apart)
    return b"".join([*parts, _LAST_BLOCK, checksum.to_bytes(4, "big")])


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
