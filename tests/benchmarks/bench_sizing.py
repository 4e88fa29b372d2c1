"""What each stage takes a study of real size: time, memory, bytes read and written; for sizing.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_sizing.py [--studies N] [--in FOLDER]

One worker, one BLAS thread. Bytes are those of the file calls, not of the disk, and the memory is
that of the largest process, beside what the stage itself expects, by which it chooses --jobs.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import ONE_THREAD, ROOT

sys.path.insert(0, str(ROOT))

import standard_study

from examples import phantom

SCAN_MM = 326 * 3.27

RUN = """
import importlib, json, resource, sys, time
began = time.perf_counter()
from common.run import stage
expected, run_studies = [], stage.run_studies
def noting(worker, jobs, *more):
    expected.extend(job.memory for job in jobs)
    return run_studies(worker, jobs, *more)
stage.run_studies = noting
script, arguments = sys.argv[1], sys.argv[2:]
status = importlib.import_module(script).main(arguments)
assert status == 0, status
used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
with open("/proc/self/io") as lines:
    io = {name: int(value) for name, value in (line.split(":") for line in lines)}
print(json.dumps({
    "seconds": time.perf_counter() - began,
    "CPU": sum(each.ru_utime + each.ru_stime for each in used),
    "peak": max(each.ru_maxrss for each in used) * 1024 / 1e9,
    "expected": max(expected, default=0) / 1e9,
    "read": io["rchar"] / 1e6, "written": io["wchar"] / 1e6,
}))
"""


def measure(title, n_studies, output, script, *arguments):
    """Run a script in a process of its own and print what it took a study."""
    command = [sys.executable, "-c", RUN, script, *map(str, arguments), "-o", str(output), "-q"]
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    per_study = [found[name] / n_studies for name in ("seconds", "CPU", "read", "written")]
    size = output.stat().st_size / 1e6 / n_studies if output.exists() else 0
    print(
        f"  {title:26}{per_study[0]:10.2f}{per_study[1]:10.2f}{per_study[2]:11.0f}"
        f"{per_study[3]:11.0f}{size:11.1f}{found['peak']:11.2f}{found['expected']:11.2f}",
        flush=True,
    )


def write_raw(folder):
    """Write a DICOM study with an RTSTRUCT, of the standard size."""
    size = standard_study.STANDARD
    grids = (
        phantom.ct_grid(size.ct_shape[0], size.ct_shape[2], SCAN_MM),
        phantom.pet_grid(size.pet_shape[0], size.pet_shape[2], SCAN_MM),
    )
    phantom.write_study(folder, phantom.DEMO_STUDIES[0], *grids, "all")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--in", dest="folder", type=Path, metavar="FOLDER", help="for the files")
    options = parser.parse_args()
    headings = ("passed [s]", "CPU [s]", "read [MB]", "wrote [MB]", "file [MB]", "peak [GB]")
    print(f"  {'a study':26}{headings[0]:>10}{headings[1]:>10}", end="")
    print("".join(f"{word:>11}" for word in (*headings[2:], "expected")))
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder, n = Path(temporary), options.studies
        for write, *arguments in (
            (write_raw, folder / "raw"),
            (standard_study.write_project, folder / "p.zip", standard_study.STANDARD, n),
        ):
            # In another process: children report the memory of their parent as theirs.
            writer = multiprocessing.get_context("spawn").Process(target=write, args=arguments)
            writer.start()
            writer.join()
        raw, project, volumes = folder / "raw", folder / "p.zip", folder / "3d.h5"
        measure("createproject.py, DICOM", 1, folder / "raw.zip", "createproject", raw, "-j", 1)
        measure("  dry run", 1, folder / "dry.zip", "createproject", raw, "-j", 1, "--dry-run")
        measure("preprocessing.py", n, volumes, "preprocessing", project, "-j", 1)
        measure("project_2d.py, 36 angles", n, folder / "2d.h5", "project_2d", volumes, "-j", 1)
        measure("mergeh5.py", n, folder / "all.h5", "mergeh5", volumes)
        measure("  --link", n, folder / "index.h5", "mergeh5", volumes, "--link")


if __name__ == "__main__":
    main()
