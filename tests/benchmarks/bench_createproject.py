"""One whole-body study from DICOM to the members of the project zip: this project and dcm2niix.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_createproject.py [--repeats N]

The study is the noisy demo phantom with 326 CT slices of 512 x 512, 326 PET slices of 400 x 400
and an RTSTRUCT. Each repeat runs the worker of createproject.py (roles, SUV, mask, gzip, zip) and
``dcm2niix -z y`` on the two series, each in a process of its own, all on one and the same core.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dcm2niix
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples import phantom

ROOT = Path(__file__).parents[2]
SLICES, MATRIX_CT, MATRIX_PET = 326, 512, 400
MOST_TIMES, MOST_GB = 1.3, 0.7

WORKER = """
import sys, time
from pathlib import Path
import createproject
from common.raw.roles import Patterns
from common.run.worker import Job
from common.raw.study import Conversion
start = time.perf_counter()
raw = createproject.RawStudy(sys.argv[1], "bench", Patterns(), Conversion())
createproject.convert_study(Job("0" * 10, "", raw, part=Path(sys.argv[2], "part")))
print(time.perf_counter() - start)
"""


def write_study(folder):
    """Write one study of realistic size."""
    grids = phantom.ct_grid(MATRIX_CT, SLICES), phantom.pet_grid(MATRIX_PET, SLICES)
    phantom.write_study(folder, phantom.DEMO_STUDIES[0], *grids, np.random.default_rng(0))


def run(command, out):
    """Run a command that writes to a new folder; return its last line of output and its figures."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed:\n{output}")
    figures = {
        "seconds": time.perf_counter() - start,
        "CPU seconds": usage.ru_utime + usage.ru_stime,
        "peak GB": usage.ru_maxrss * 1024 / 1e9,
        "MB written": sum(path.stat().st_size for path in out.iterdir()) / 1e6,
    }
    return output.splitlines()[-1], figures


def run_worker(study, out):
    """Convert the study by our worker; its seconds are those without the start of Python."""
    seconds, figures = run([sys.executable, "-c", WORKER, str(study), str(out)], out)
    return {**figures, "seconds": float(seconds), "with start": figures["seconds"]}


def run_dcm2niix(study, out):
    """Convert CT and PET by dcm2niix, one after the other."""
    options = ["-z", "y", "-b", "n", "-f", "image", "-o", str(out)]
    runs = [run([dcm2niix.bin, *options, str(study / role)], out)[1] for role in ("CT", "PET")]
    totals = {name: sum(figures[name] for figures in runs) for name in runs[0]}
    return {**totals, "peak GB": max(figures["peak GB"] for figures in runs)}


def medians(runs):
    return {name: statistics.median(figures[name] for figures in runs) for name in runs[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    options = parser.parse_args()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as temporary:
        raw, out = Path(temporary, "raw"), Path(temporary, "out")
        # In another process: children report the memory of their parent as theirs.
        writer = multiprocessing.get_context("spawn").Process(target=write_study, args=[raw])
        writer.start()
        writer.join()
        study = raw / phantom.DEMO_STUDIES[0].patient / phantom.DEMO_STUDIES[0].study
        runs = [(run_worker(study, out), run_dcm2niix(study, out)) for _ in range(options.repeats)]
    ours, theirs = (medians(each) for each in zip(*runs, strict=True))

    gzip = "pigz" if shutil.which("pigz") else "its own zlib"
    print(f"{SLICES} CT slices of {MATRIX_CT}, {SLICES} PET slices of {MATRIX_PET}, one core,")
    print(f"median of {options.repeats}; dcm2niix with {gzip}")
    print(f"{'':24}{'this project':>14}{'dcm2niix -z y':>16}")
    for name in ("seconds", "with start", "CPU seconds", "peak GB", "MB written"):
        print(f"  {name:22}{ours[name]:14.2f}{theirs.get(name, theirs['seconds']):16.2f}")
    for name in ("seconds", "with start", "CPU seconds"):
        ratio = ours[name] / theirs.get(name, theirs["seconds"])
        print(f"  ratio of {name:13}{ratio:14.2f}   (of seconds: at most {MOST_TIMES})")
    print(f"  peak memory {ours['peak GB']:.2f} GB (at most {MOST_GB})")


if __name__ == "__main__":
    main()
