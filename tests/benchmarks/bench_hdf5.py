"""Chunks and compressions of the HDF5 files: size, writing, random patches; and merging.

Run by hand::

    python tests/benchmarks/bench_hdf5.py [--patches N] [--gigabytes N] [--study FILE.h5]

A patch is 96 x 96 x 96 voxels of both channels at a random place of the standard study (200 x 200
x 326, float16), or of the first study of a file, read by one thread. From the disk, as of
collections larger than memory, time is what passes; from the page cache it is the processor's,
since nothing else is waited for, of each patch the least of three times, by h5py and by
`read_patch` of docs/training.md. All are medians. Sizes are those of image and both masks, relative
to a file without chunks and compression. Blosc is measured where hdf5plugin is installed.
mergeh5.py is held against cp in turn, both with what they wrote safe on disk.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from processes import ROOT, median, print_runs, run, run_python

from common.hdf5 import chunks

ReadPatch = Callable[[h5py.Dataset, Sequence[int], Sequence[int]], np.ndarray]

PATCH = 96
EDGES = (16, 32, 40, 64)
MERGES = 5
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=30, metavar="N", help="30 by default")
    parser.add_argument("--gigabytes", type=float, default=2, metavar="N", help="to merge; 2")
    parser.add_argument("--study", type=Path, metavar="FILE.h5", help="a 3D file to take one from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = options.study
        if study is None:
            study = folder / "s.h5"
            make_study = Path(__file__).with_name("standard_study.py")
            run_python(make_study, folder / "s.zip", "standard", 1)
            run_python(ROOT / "preprocessing.py", folder / "s.zip", "-o", study, "-q")
        # First, since processes count the memory of the one that starts them as theirs.
        print_merging(study, folder, options.gigabytes)
        print_compressions(study, folder, options.patches)


def print_compressions(study: Path, folder: Path, n_patches: int) -> None:
    """Print a row a chunk and compression."""
    with h5py.File(study) as file:
        arrays = {group: next(iter(file[group].values()))[()] for group in file}
    path = folder / "contiguous.h5"
    seconds = write_contiguous(path, arrays)
    size, plain = path.stat().st_size, median_patches(path, n_patches)
    print("| chunk | compression | size | written in | 96³ patch from disk | cached | read_patch |")
    print("|---|---|---|---|---|---|---|")
    print_row("contiguous", "none", 1, seconds, plain, plain)
    compressions = [c for c in chunks.COMPRESSIONS if c not in chunks.missing_packages()]
    for edge in EDGES:
        for compression in compressions:
            path = folder / "chunked.h5"
            with mock.patch.object(chunks, "PATCH_EDGE", edge):
                seconds = write_chunked(path, arrays, compression)
                chunk = " x ".join(map(str, chunks.chunk_shape(arrays["image"].shape)[1:]))
            check_values(path, arrays)
            found = median_patches(path, n_patches)
            chosen = edge == chunks.PATCH_EDGE and compression == chunks.COMPRESSIONS[0]
            compression += " (default)" * chosen
            print_row(chunk, compression, path.stat().st_size / size, seconds, found, plain)


def print_row(
    chunk: str,
    compression: str,
    share: float,
    seconds: float,
    patches: Sequence[float],
    plain: Sequence[float],
) -> None:
    """Print a file's size, the time of writing it, and those of a patch in the three ways."""
    times = " | ".join(
        f"{patch * 1e3:.1f} ms, {patch / of_plain:.1f} x"
        for patch, of_plain in zip(patches, plain, strict=True)
    )
    print(f"| {chunk} | {compression} | {share:.2f} | {seconds:.2f} s | {times} |", flush=True)


def check_values(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """End where a file does not hold the very values."""
    with h5py.File(path) as file:
        for group, array in arrays.items():
            if not np.array_equal(file[group][()], array):
                raise SystemExit(f"{group} is not what was written")


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
            chunks.write_chunked(file, group, array, compression)
    return time.perf_counter() - start


def median_patches(path: Path, n_patches: int) -> list[float]:
    """Return the median seconds of a random patch: from disk, from the cache, by `read_patch`."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    corners = corners_of(path, n_patches)
    from_disk = [patch_seconds(path, corner, time.perf_counter, by_h5py) for corner in corners]
    # As training fills the cache: in the large pages of a file just written, rows copy faster.
    drop_from_cache(path)
    for corner in corners:
        patch_seconds(path, corner, time.process_time, by_h5py)
    cached = [
        np.min(
            [
                [patch_seconds(path, corner, time.process_time, read) for corner in corners]
                for _ in range(REPEATS)
            ],
            axis=0,
        )
        for read in (by_h5py, reader_of_the_page())
    ]
    return [statistics.median(seconds) for seconds in (from_disk, *cached)]


def drop_from_cache(path: Path) -> None:
    """Have the disk be where a file is read from."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def by_h5py(image: h5py.Dataset, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Return a patch as plain h5py reads it."""
    return image[(slice(None), *map(slice, corner, np.add(corner, size)))]


def reader_of_the_page() -> ReadPatch:
    """Return `read_patch` of docs/training.md, which examples/train.py has too, with PyTorch."""
    page = (ROOT / "docs" / "training.md").read_text()
    found = {}
    exec(re.search(r"```python\n(import itertools\n.*?)```", page, re.DOTALL)[1], found)
    return found["read_patch"]


def corners_of(path: Path, n_patches: int) -> np.ndarray:
    """Return where random patches begin, the same ones of every file."""
    with h5py.File(path) as file:
        most = np.maximum(np.array(file["image"].shape[1:]) - PATCH, 0) + 1
    return np.random.default_rng(0).integers(0, most, (n_patches, 3))


def patch_seconds(
    path: Path, corner: np.ndarray, clock: Callable[[], float], read: ReadPatch
) -> float:
    """Return the seconds of reading one patch, from the disk where the clock counts waiting."""
    if clock is time.perf_counter:
        drop_from_cache(path)
    with h5py.File(path) as file:
        image = file["image"]
        start = clock()
        read(image, corner, (PATCH,) * 3)
        return clock() - start


def print_merging(study: Path, folder: Path, gigabytes: float) -> None:
    """Print the speed of mergeh5.py and of cp."""
    source, copy, merged = (folder / f"{name}.h5" for name in ("many", "copy", "merged"))
    n_studies = write_copies(study, source, gigabytes)
    megabytes = source.stat().st_size / 1e6
    cp = ["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(source), str(copy)]
    copies, merges = [], []
    for _ in range(MERGES):
        start_afresh(copy, merged)
        copies.append(run(cp))
        start_afresh(copy, merged)
        merges.append(run_python(ROOT / "mergeh5.py", source, "-o", merged, "-q"))
    of_cp = statistics.median(
        one.seconds / other.seconds for one, other in zip(copies, merges, strict=True)
    )
    print(f"{n_studies} studies of {megabytes / n_studies:.0f} MB; medians of {MERGES}")
    results = {"cp and sync": median(copies), "mergeh5.py": median(merges)}
    print_runs(results)
    speeds = ", ".join(f"{megabytes / result.seconds:.0f} MB/s" for result in results.values())
    print(f"  {speeds}; mergeh5.py has {of_cp:.0%} of the speed of cp, median of pairs")


def write_copies(study: Path, path: Path, gigabytes: float) -> int:
    """Write a file of copies of the first study of another; return how many."""
    with h5py.File(study) as one, h5py.File(path, "w", libver=("v108", "v108")) as many:
        datasets = {group: next(iter(one[group].values())) for group in one}
        size = sum(dataset.id.get_storage_size() for dataset in datasets.values())
        n_studies = max(2, round(gigabytes * 1e9 / size))
        for name, value in one.attrs.items():
            many.attrs[name] = value
        for group, dataset in datasets.items():
            for number in range(n_studies):
                one.copy(dataset, many.require_group(group), f"{number:010}")
    return n_studies


def start_afresh(*paths: Path) -> None:
    """Remove files, and have all that waits to be written on the disk."""
    for path in paths:
        path.unlink(missing_ok=True)
    os.sync()


if __name__ == "__main__":
    main()
