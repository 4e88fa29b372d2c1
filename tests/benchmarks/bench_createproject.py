"""createproject.py, the whole process from DICOM to the project zip, against dcm2niix.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_createproject.py [--repeats N]

The study is the demo phantom with 326 CT slices of 512 x 512, 326 PET slices of 400 x 400 and an
RTSTRUCT: once with noise everywhere, once with quiet air, as most scanners write it. Each repeat
runs createproject.py with one worker and ``dcm2niix -z y`` on the two series, start included, all
on one and the same core.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import dcm2niix
import numpy as np
import pydicom

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from processes import ROOT, Run, median, print_machine, print_runs, run, run_python

from examples import phantom

SLICES, MATRIX_CT, MATRIX_PET = 326, 512, 400
AIR_BELOW = {"CT": 0.15, "PET": 0.02}
"""Part of a series' range of stored values below which it is taken as air."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    options = parser.parse_args()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print_machine("pydicom", "deflate", "dcm2niix")
    gzip = "pigz" if shutil.which("pigz") else "its own zlib"
    print(f"{SLICES} CT slices of {MATRIX_CT}, {SLICES} PET slices of {MATRIX_PET}, one core,")
    print(f"median of {options.repeats}; dcm2niix with {gzip}")
    with tempfile.TemporaryDirectory() as temporary:
        raw, out = Path(temporary, "raw"), Path(temporary, "out")
        # In another process: children report the memory of their parent as theirs.
        for kind, prepare in (("noise everywhere", write_study), ("quiet air", quieten)):
            writer = multiprocessing.get_context("spawn").Process(target=prepare, args=[raw])
            writer.start()
            writer.join()
            compare(kind, raw, out, options.repeats)


def write_study(folder: Path) -> None:
    """Write one noisy study of realistic size."""
    grids = phantom.ct_grid(MATRIX_CT, SLICES), phantom.pet_grid(MATRIX_PET, SLICES)
    phantom.write_study(folder, phantom.DEMO_STUDIES[0], *grids, "all")


def quieten(folder: Path) -> None:
    """Give all air of a study one value."""
    for role, part in AIR_BELOW.items():
        headers = {path: pydicom.dcmread(path) for path in sorted(study_of(folder, role).iterdir())}
        least = min(int(header.pixel_array.min()) for header in headers.values())
        for path, header in headers.items():
            pixels = header.pixel_array
            air = pixels < least + part * (int(pixels.max()) - least)
            header.PixelData = np.where(air, least, pixels).astype(pixels.dtype).tobytes()
            header.save_as(path)


def study_of(folder: Path, role: str) -> Path:
    study = phantom.DEMO_STUDIES[0]
    return folder / study.patient / study.study / role


def compare(kind: str, raw: Path, out: Path, repeats: int) -> None:
    """Print what both take for a study, in turn."""
    ours, theirs, megabytes = [], [], [0.0, 0.0]
    for _ in range(repeats):
        for runs, way in ((ours, run_ours), (theirs, run_dcm2niix)):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            runs.append(way(raw, out))
            written = sum(path.stat().st_size for path in out.iterdir())
            megabytes[runs is theirs] = written / 1e6
    medians = median(ours), median(theirs)
    print(f"{kind}: {megabytes[0]:.1f} MB, of dcm2niix {megabytes[1]:.1f} MB")
    print_runs(dict(zip(("createproject.py", "dcm2niix -z y"), medians, strict=True)))
    ratios = (
        medians[0].seconds / medians[1].seconds,
        medians[0].cpu_seconds / medians[1].cpu_seconds,
    )
    print(f"| ratio | {ratios[0]:.2f} | {ratios[1]:.2f} | |", flush=True)


def run_ours(raw: Path, out: Path) -> Run:
    return run_python(ROOT / "createproject.py", raw, "-o", out / "project.zip", "-q", "-j", 1)


def run_dcm2niix(raw: Path, out: Path) -> Run:
    """Convert CT and PET by dcm2niix, one after the other."""
    options = ["-z", "y", "-b", "n", "-f", "image", "-o", str(out)]
    ct, pet = (run([dcm2niix.bin, *options, str(study_of(raw, role))]) for role in ("CT", "PET"))
    return Run(
        ct.seconds + pet.seconds,
        ct.cpu_seconds + pet.cpu_seconds,
        max(ct.peak_gb, pet.peak_gb),
    )


if __name__ == "__main__":
    main()
