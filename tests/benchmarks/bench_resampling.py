"""Resampling of a standard study: nilearn, SimpleITK (linear) and this project, side by side.

    python tests/benchmarks/bench_resampling.py [--total-body] [--repeats N]

One process a case, one thread, one BLAS thread. Times are medians of the processor's seconds of
the resampling call alone: images are in memory before, in the types and the memory order in which
NIfTI files hold them.
Peak memory is what the call adds to the process, its output included. Agreement is the largest
difference from nilearn, relative to 2000 HU and 40 SUV; masks: the number of differing voxels.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.geometry import Grid, target_grid
from common.resampling import resample_cubic, resample_nearest

SPACING_MM = (2.0, 2.0, 3.0)
SHAPE = (200, 200)
# Huge pages cost next to nothing or half of our time, as the machine's memory is fragmented.
ALIKE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ALIKE["NUMPY_MADVISE_HUGEPAGE"] = "0"


@dataclass(frozen=True)
class Case:
    """One image and the CT whose field of view gives the target grid."""

    name: str
    dtype: str
    grid: Grid
    ct: Grid
    interpolation: str
    fill_value: float
    clip: bool
    value_range: float


def las_grid(shape, spacing_mm):
    """A grid in LAS orientation around x = y = 0, of a bed at z = -843.3 mm."""
    dx, dy, dz = spacing_mm
    nx, ny, _ = shape
    affine = np.diag([-dx, dy, dz, 1.0])
    affine[:3, 3] = (dx * (nx - 1) / 2, -dy * (ny - 1) / 2, -843.3)
    return Grid(shape, affine)


def standard_study():
    ct = las_grid((512, 512, 326), (0.9765625, 0.9765625, 3.0))
    pet = las_grid((400, 400, 326), (2.03642, 2.03642, 3.0))
    return study_cases("", ct, pet)


def total_body_study():
    ct = las_grid((512, 512, 1500), (0.9765625, 0.9765625, 1.25))
    pet = las_grid((400, 400, 673), (2.03642, 2.03642, 2.886))
    return study_cases("total body ", ct, pet)


def study_cases(prefix, ct, pet):
    return [
        Case(f"{prefix}CT", "int16", ct, ct, "continuous", -1024.0, True, 2000.0),
        Case(f"{prefix}PET", "float32", pet, ct, "continuous", 0.0, False, 40.0),
        Case(f"{prefix}mask", "uint8", pet, ct, "nearest", 0.0, False, 1.0),
    ]


def volume_of(case):
    """Noise on blocks of voxels, in Fortran order as a NIfTI file has it; no large temporaries."""
    rng = np.random.default_rng(0)
    volume = np.empty(case.grid.shape, dtype=case.dtype, order="F")
    blocks = rng.random([n // 16 + 1 for n in case.grid.shape])
    for z in range(case.grid.shape[2]):
        plane = blocks[:, :, z // 16].repeat(16, 0).repeat(16, 1)
        plane = plane[: volume.shape[0], : volume.shape[1]]
        if case.dtype == "uint8":
            volume[:, :, z] = plane > 0.95
        elif case.dtype == "int16":
            volume[:, :, z] = 2000 * plane - 1000 + 50 * rng.standard_normal(plane.shape)
        else:
            volume[:, :, z] = 30 * plane**8 + rng.random(plane.shape)
    return volume


# Each way returns a function of no arguments that resamples, and is given all it likes before.


def by_nilearn(case, volume, target):
    from nibabel import Nifti1Image
    from nilearn.image import resample_img

    warnings.simplefilter("ignore")
    image = Nifti1Image(volume, case.grid.affine)
    return lambda: np.asarray(
        resample_img(
            image,
            target_affine=target.affine,
            target_shape=target.shape,
            interpolation=case.interpolation,
            fill_value=case.fill_value,
            clip=case.clip,
            force_resample=True,
            copy_header=True,
        ).dataobj
    )


def by_simpleitk(case, volume, target):
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = sitk.GetImageFromArray(volume.T)
    _set_geometry(image, case.grid)
    template = sitk.Image(target.shape, sitk.sitkUInt8)
    _set_geometry(template, target)
    nearest = case.interpolation == "nearest"
    return lambda: sitk.Resample(
        image,
        template,
        sitk.Transform(),
        sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
        case.fill_value,
        sitk.sitkUInt8 if nearest else sitk.sitkFloat32,
    )


def _set_geometry(image, grid):
    to_lps = np.diag([-1.0, -1, 1])
    image.SetSpacing(grid.spacing_mm)
    image.SetOrigin((to_lps @ grid.affine[:3, 3]).tolist())
    image.SetDirection((to_lps @ grid.affine[:3, :3] / grid.spacing_mm).ravel().tolist())


def by_this_project(case, volume, target):
    if case.interpolation == "nearest":
        return lambda: resample_nearest(volume, case.grid, target)
    return lambda: resample_cubic(volume, case.grid, target, case.fill_value, clip=case.clip)


WAYS = {"nilearn": by_nilearn, "SimpleITK": by_simpleitk, "tumorvolume": by_this_project}


def measure(way, case, repeats, result_file):
    """Median seconds, and peak memory beyond what was held before the call [MB]."""
    target = target_grid(case.ct, SPACING_MM, SHAPE)
    volume = volume_of(case)
    resample = WAYS[way](case, volume, target)
    del volume
    Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here.
    held_mb = _memory_mb("VmRSS")
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = resample()
        seconds.append(time.process_time() - start)
        if len(seconds) == 1:
            peak_mb = _memory_mb("VmHWM") - held_mb
    if way != "SimpleITK":
        np.save(result_file, result)
    return statistics.median(seconds), peak_mb


def _memory_mb(field):
    """Resident memory of this process, now (VmRSS) or at its peak (VmHWM); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def in_own_process(*arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def disagreement(case, folder):
    expected, result = (
        np.load(folder / f"{way}.npy", mmap_mode="r") for way in ("nilearn", "tumorvolume")
    )
    if case.interpolation == "nearest":
        return f"{np.count_nonzero(expected != result)} voxels"
    worst = max(
        float(np.abs(expected[:, :, z] - result[:, :, z]).max()) for z in range(expected.shape[2])
    )
    return f"{worst / case.value_range:.1e}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="calls a case (nilearn: 2 fewer)")
    parser.add_argument("--total-body", action="store_true", help="also 1500 thin slices (10 GB)")
    options = parser.parse_args(argv)
    os.environ.update(ALIKE)  # Read when a spawned process imports numpy.
    cases = standard_study() + (total_body_study() if options.total_body else [])
    print("| image | way | seconds | times faster than nilearn | peak MB | from nilearn |")
    print("|---|---|---|---|---|---|")
    totals = dict.fromkeys(WAYS, 0.0)
    for case in cases:
        for way, seconds in compare(case, options.repeats).items():
            totals[way] += seconds
    for way, seconds in totals.items():
        print(f"| all | {way} | {seconds:.3f} | {totals['nilearn'] / seconds:.1f} | | |")
    return 0


def compare(case, repeats):
    """Print a line for each way; seconds by way."""
    medians = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for way in WAYS:
            count = max(1, repeats - 2 * (way == "nilearn"))
            medians[way], peak_mb = in_own_process(way, case, count, folder / f"{way}.npy")
            ratio = medians["nilearn"] / medians[way]
            agreement = disagreement(case, folder) if way == "tumorvolume" else ""
            figures = f"{medians[way]:.3f} | {ratio:.1f} | {peak_mb:.0f} | {agreement}"
            print(f"| {case.name} | {way} | {figures} |", flush=True)
    return medians


if __name__ == "__main__":
    sys.exit(main())
