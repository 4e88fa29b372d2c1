"""How time, processor and bytes grow with voxels and with studies, of all three stages.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_growth.py [--voxels] [--studies] [--most N]

Voxels: one study of the demo phantom with a quarter, all and four times the slices of 512 x 512
(CT) and 400 x 400 (PET). Studies: 1, 10 and 100 small ones. One worker, one core. The exponent is
the slope of the logarithms: 1 where twice the work takes twice as much; the start of a process,
half a second, is in the time and lowers it. Without options both are measured.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from processes import ROOT, Run, print_machine, run_python

from examples import phantom

SLICES = (80, 320, 1280)
MATRIX_CT, MATRIX_PET = 512, 400
SMALL_CT, SMALL_PET, SMALL_SLICES = 64, 50, 40
STUDIES = (1, 10, 100)
STAGES = ("createproject.py", "preprocessing.py", "project_2d.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--voxels", action="store_true", help="against voxels alone")
    parser.add_argument("--studies", action="store_true", help="against studies alone")
    parser.add_argument(
        "--most", type=int, default=3, metavar="N", help="sizes, of 3; 3 by default"
    )
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print_machine("nibabel", "pydicom", "deflate", "scipy", "h5py")
    both = options.voxels == options.studies
    if both or options.voxels:
        print_growth("slices", SLICES[: options.most], write_long_study)
    if both or options.studies:
        print_growth("studies", STUDIES[: options.most], write_small_studies)


def write_long_study(folder: Path, n_slices: int) -> None:
    """Write one study of realistic slices."""
    grids = phantom.ct_grid(MATRIX_CT, n_slices), phantom.pet_grid(MATRIX_PET, n_slices)
    phantom.write_study(folder, phantom.DEMO_STUDIES[0], *grids, np.random.default_rng(0))


def write_small_studies(folder: Path, n_studies: int) -> None:
    """Write many small studies, a patient each."""
    grids = phantom.ct_grid(SMALL_CT, SMALL_SLICES), phantom.pet_grid(SMALL_PET, SMALL_SLICES)
    for number in range(n_studies):
        study = replace(phantom.DEMO_STUDIES[0], patient=f"patient{number:03}")
        phantom.write_study(folder, study, *grids, np.random.default_rng(number))


def print_growth(of: str, sizes: Sequence[int], write: Callable[[Path, int], None]) -> None:
    """Print a row a stage and size, and the exponents."""
    print(f"| script | {of} | time | processor | peak memory | output |")
    print("|---|---|---|---|---|---|")
    results = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # In another process: children report the memory of their parent as theirs.
            writer = multiprocessing.get_context("spawn").Process(
                target=write, args=[folder / "raw", size]
            )
            writer.start()
            writer.join()
            results.append(run_chain(folder))
            shutil.rmtree(folder / "raw")
        for script, (run, n_bytes) in results[-1].items():
            print(
                f"| {script} | {size} | {run.seconds:.2f} s | {run.cpu_seconds:.2f} s | "
                f"{run.peak_gb:.2f} GB | {n_bytes / 1e6:.1f} MB |",
                flush=True,
            )
    for script in STAGES if len(sizes) > 1 else ():
        runs, n_bytes = zip(*(result[script] for result in results), strict=True)
        exponents = (
            exponent(sizes[-2:], [run.cpu_seconds for run in runs[-2:]]),
            exponent(sizes, n_bytes),
        )
        print(
            f"  {script}: processor grows with {of} to the power of {exponents[0]:.2f} (the last "
            f"two sizes), bytes to that of {exponents[1]:.2f}"
        )


def run_chain(folder: Path) -> dict[str, tuple[Run, int]]:
    """Run the three stages in turn; return what each took, and the size of its output."""
    raw, archive, volumes, slices = (folder / n for n in ("raw", "p.zip", "3d.h5", "2d.h5"))
    found = {}
    for script, source, output in zip(
        STAGES, (raw, archive, volumes), (archive, volumes, slices), strict=True
    ):
        run = run_python(ROOT / script, source, "-o", output, "-q", "-j", 1)
        found[script] = run, output.stat().st_size
    return found


def exponent(sizes: Sequence[int], amounts: Sequence[float]) -> float:
    """Return the slope of the logarithms between the first and the last."""
    return math.log(amounts[-1] / amounts[0]) / math.log(sizes[-1] / sizes[0])


if __name__ == "__main__":
    main()
