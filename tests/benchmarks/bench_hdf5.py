"""Chunks and compressions of the HDF5 files: size, writing, random patches; and merging.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_hdf5.py [--patches N]

A patch is 96 x 96 x 96 voxels of both channels at a random place of the standard study (200 x 200
x 326, float16), read by h5py, by one thread: once from the disk, as of collections larger than
memory, once from the page cache. Sizes are those of image and both masks, relative to a file
without chunks and compression. Blosc is measured where
hdf5plugin is installed. mergeh5.py is held against cp, both with what they wrote safe on disk.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from processes import ROOT, median, run, run_python

from common import hdf5_chunks

PATCH = 96
EDGES = (16, 24, 32, 48, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=60, metavar="N", help="60 by default")
    parser.add_argument("--gigabytes", type=float, default=2, metavar="N", help="to merge; 2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_python(Path(__file__).with_name("standard_study.py"), folder / "s.zip", "standard", 1)
        run_python(ROOT / "preprocessing.py", folder / "s.zip", "-o", folder / "s.h5", "-q")
        print_compressions(folder, options.patches)
        print_merging(folder, options.gigabytes)


def print_compressions(folder: Path, n_patches: int) -> None:
    """Print a row a chunk and compression."""
    with h5py.File(folder / "s.h5") as file:
        arrays = {group: next(iter(file[group].values()))[()] for group in file}
    path = folder / "contiguous.h5"
    seconds = write_contiguous(path, arrays)
    size, plain = path.stat().st_size, median_patches(path, n_patches)
    print(f"{'chunk':16}{'compression':13}{'size':>7}{'write':>9}{'from disk':>17}{'cached':>18}")
    print_row("none", "none", 1, seconds, plain, plain)
    compressions = [c for c in hdf5_chunks.COMPRESSIONS if c != "blosc" or hdf5_chunks.has_blosc()]
    for edge in EDGES:
        for compression in compressions:
            path = folder / "chunked.h5"
            with mock.patch.object(hdf5_chunks, "PATCH_EDGE", edge):
                seconds = write_chunked(path, arrays, compression)
                chunk = " x ".join(map(str, hdf5_chunks.chunk_shape(arrays["image"].shape)[1:]))
            found = median_patches(path, n_patches)
            chosen = edge == hdf5_chunks.PATCH_EDGE and compression == hdf5_chunks.COMPRESSIONS[0]
            share = path.stat().st_size / size
            print_row(chunk, compression, share, seconds, found, plain, "  default" * chosen)


def print_row(
    chunk: str,
    compression: str,
    share: float,
    seconds: float,
    patches: Sequence[float],
    plain: Sequence[float],
    note: str = "",
) -> None:
    """Print a file's size, the time of writing it, and those of a patch from disk and cache."""
    times = "".join(
        f"{patch * 1e3:7.1f} ms{patch / of_plain:6.1f} x"
        for patch, of_plain in zip(patches, plain, strict=True)
    )
    print(f"{chunk:16}{compression:13}{share:7.2f}{seconds:7.2f} s{times}{note}", flush=True)


def write_contiguous(path: Path, arrays: dict[str, np.ndarray]) -> float:
    """Write arrays as plain h5py does without options; return the seconds."""
    start = time.perf_counter()
    with h5py.File(path, "w") as file:
        for group, array in arrays.items():
            file[group] = array
    return time.perf_counter() - start


def write_chunked(path: Path, arrays: dict[str, np.ndarray], compression: str) -> float:
    """Write arrays as the scripts do; return the seconds."""
    start = time.perf_counter()
    with h5py.File(path, "w", libver=("v108", "v108")) as file:
        for group, array in arrays.items():
            hdf5_chunks.write_chunked(file, group, array, compression)
    return time.perf_counter() - start


def median_patches(path: Path, n_patches: int) -> tuple[float, float]:
    """Return the median seconds of reading a random patch from disk, and from the cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    corners = corners_of(path, n_patches)
    from_disk, from_cache = (
        statistics.median(patch_seconds(path, corner, cached=cached) for corner in corners)
        for cached in (False, True)
    )
    return from_disk, from_cache


def corners_of(path: Path, n_patches: int) -> np.ndarray:
    """Return where random patches begin, the same ones of every file."""
    with h5py.File(path) as file:
        most = np.array(file["image"].shape[1:]) - PATCH + 1
    return np.random.default_rng(0).integers(0, most, (n_patches, 3))


def patch_seconds(path: Path, corner: np.ndarray, *, cached: bool) -> float:
    """Return the seconds of reading one patch."""
    patch = tuple(slice(at, at + PATCH) for at in corner)
    with path.open("rb") as file:
        if cached:
            file.read()
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with h5py.File(path) as file:
        image = file["image"]
        start = time.perf_counter()
        image[(slice(None), *patch)]
        return time.perf_counter() - start


def print_merging(folder: Path, gigabytes: float) -> None:
    """Print the speed of mergeh5.py and of cp."""
    source = folder / "many.h5"
    n_studies = max(2, round(gigabytes * 1e9 / (folder / "s.h5").stat().st_size))
    with h5py.File(folder / "s.h5") as one, h5py.File(source, "w", libver=("v108", "v108")) as many:
        for name, value in one.attrs.items():
            many.attrs[name] = value
        for group in one:
            for number in range(n_studies):
                one.copy(
                    next(iter(one[group].values())), many.require_group(group), f"{number:010}"
                )
    target, copy = folder / "merged.h5", folder / "copy.h5"
    command = ["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(source), str(copy)]
    copies, merges = [], []
    for _ in range(3):
        for path in (copy, target):
            path.unlink(missing_ok=True)
        os.sync()
        copies.append(run(command))
        merges.append(run_python(ROOT / "mergeh5.py", source, "-o", target, "-q"))
    copying, merging = median(copies), median(merges)
    megabytes, of_cp = source.stat().st_size / 1e6, copying.seconds / merging.seconds
    print(f"{n_studies} studies of {megabytes / n_studies:.0f} MB")
    print(f"  cp        {megabytes / copying.seconds:8.0f} MB/s")
    print(
        f"  mergeh5   {megabytes / merging.seconds:8.0f} MB/s, {of_cp:.0%} of cp, "
        f"{merging.peak_gb:.2f} GB of memory"
    )


if __name__ == "__main__":
    main()
