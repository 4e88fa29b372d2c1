"""Thousands of tiny studies through the four scripts: what the run costs besides the studies.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_scale.py [--studies 10000] [--dry-studies 1000] [--in FOLDER]

Studies of 8 x 8 x 8 voxels take the workers next to nothing; what is left is planning, handing
out, assembling. Of each script: seconds passed; CPU seconds of the workers, of the parent and of
assembling, and of the latter two a study; peak memory of the parent, and of the largest of its
children. Then a dry run of studies of 651 DICOM files, of which only the headers are read: a
thousand of those take 4 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from processes import ROOT

sys.path.insert(0, str(ROOT))

from common.geometry import Image
from common.hdf5 import merge, studies
from common.nifti import write_nifti_file
from common.run.cli import SOFTWARE
from examples import phantom

MOST_MS_A_STUDY, MOST_PARENT_MB, MOST_DRY_S = 5, 300, 180
SIDE, SLICES = 8, 325

RUN = """
import importlib, json, resource, sys, time
from common.run import output
script, arguments = sys.argv[1], sys.argv[2:]
assembling_s, replace = 0.0, output.replace_output
def cpu_s():
    found = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return [used.ru_utime + used.ru_stime for used in found]
def timed(*arguments):
    global assembling_s
    before = cpu_s()[1]
    replace(*arguments)
    assembling_s += cpu_s()[1] - before
output.replace_output = timed
began = time.perf_counter()
status = importlib.import_module(script).main(arguments)
passed = time.perf_counter() - began
assert status == 0, status
parent_s, children_s = cpu_s()
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps({
    "passed": passed, "parent": parent_s, "assembling": assembling_s,
    "workers": children_s - assembling_s, "peak": peak / 1024,
    "child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
}))
"""


def measure(title, n_studies, script, *arguments):
    """Run a script in a process of its own and print what it took."""
    command = [sys.executable, "-c", RUN, script, *map(str, arguments), "-q"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    overhead_ms = 1000 * (found["parent"] + found["assembling"]) / n_studies
    print(
        f"  {title:26}{found['passed']:10.1f}{found['workers']:10.1f}{found['parent']:10.1f}"
        f"{found['assembling']:12.1f}{overhead_ms:12.2f}{found['peak']:11.0f}"
        f"{found['child']:11.0f}",
        flush=True,
    )
    return found


def write_raw(folder, n_studies):
    """Write tiny NIfTI studies, a patient each."""
    random = np.random.default_rng(0)
    shape = (SIDE,) * 3
    mask = np.zeros(shape, np.uint8)
    mask[3:5, 3:5, 3:5] = 1
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    images = {
        "ct": random.integers(-1000, 1000, shape).astype(np.int16),
        "pet": random.random(shape, np.float32) * 10,
        "mask": mask,
    }
    first = folder / "first"
    first.mkdir(parents=True)
    for role, data in images.items():
        write_nifti_file(first / f"{role}.nii.gz", Image(data, affine))
    contents = {path.name: path.read_bytes() for path in first.iterdir()}
    for number in range(n_studies):
        study = folder / "raw" / f"patient{number}" / "study"
        study.mkdir(parents=True)
        for name, content in contents.items():
            (study / name).write_bytes(content)


def write_single_files(source, folder):
    """Write a file of its own for each study of a 3D file."""
    folder.mkdir()
    parameters = studies.read_parameters(source)
    for key in studies.read_keys(source):
        merge.assemble(folder / f"{key}.h5", {key: source}, parameters, SOFTWARE)


def write_dicom(folder, n_studies):
    """Write studies of many DICOM files with few pixels, alike but in files of their own."""
    grids = phantom.ct_grid(16, SLICES), phantom.pet_grid(16, SLICES)
    study = phantom.DEMO_STUDIES[0]
    phantom.write_study(folder / "first", study, *grids)
    one = folder / "first" / study.patient / study.study
    contents = {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    for number in range(n_studies):
        for name, content in contents.items():
            path = folder / "raw" / f"patient{number}" / "study" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return len(contents)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--dry-studies", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--in", dest="folder", type=Path, metavar="FOLDER", help="for the files")
    options = parser.parse_args()
    headings = (
        "passed [s]",
        "workers",
        "parent",
        "assembling",
        "ms a study",
        "peak [MB]",
        "child [MB]",
    )
    widths = (10, 10, 10, 12, 12, 11, 11)
    heading = "".join(f"{word:>{n}}" for word, n in zip(headings, widths, strict=True))
    found = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        write_raw(folder, n := options.studies)
        raw, project, volumes, mips = (folder / name for name in ("raw", "p.zip", "3d.h5", "2d.h5"))
        print(f"{n} studies of {SIDE} x {SIDE} x {SIDE}\n  {'':26}{heading}")
        as_suv = ("--pet-units", "suv", "--hash-length", 12, 4)
        grid = ("--shape", SIDE, SIDE, "--spacing", 4, 4, 4)
        angles = ("--angles", 0, 180, 90)
        for title, script, *arguments in (
            ("createproject.py", "createproject", raw, "-o", project, *as_suv),
            ("  nothing new", "createproject", raw, "-o", project, *as_suv),
            ("preprocessing.py", "preprocessing", project, "-o", volumes, *grid),
            ("  nothing new", "preprocessing", project, "-o", volumes, *grid),
            ("project_2d.py, 2 angles", "project_2d", volumes, "-o", mips, *angles),
            ("  nothing new", "project_2d", volumes, "-o", mips, *angles),
            ("  --stack", "project_2d", volumes, "-o", folder / "s.h5", *angles, "--stack"),
        ):
            found.append(measure(title, n, script, *arguments))
        write_single_files(volumes, folder / "single")
        singles = sorted((folder / "single").iterdir())
        for title, *more in (("mergeh5.py", "-o", "all.h5"), ("  --link", "--link", "-o", "i.h5")):
            *link, _, name = more
            arguments = *singles, *link, "-o", folder / name
            found.append(measure(title, n, "mergeh5", *arguments))
    worst_ms = max(1000 * (each["parent"] + each["assembling"]) / n for each in found)
    worst_mb = max(each["peak"] for each in found)
    print(f"  at most {worst_ms:.2f} ms a study (goal: {MOST_MS_A_STUDY}), ", end="")
    print(f"{worst_mb:.0f} MB of the parent (goal: {MOST_PARENT_MB})")
    if options.dry_studies:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            n_files = write_dicom(Path(temporary), options.dry_studies)
            print(f"{options.dry_studies} studies of {n_files} DICOM files\n  {'':26}{heading}")
            arguments = (Path(temporary, "raw"), "-o", Path(temporary, "p.zip"), "--dry-run")
            n_thousands = options.dry_studies / 1000
            dry = measure("dry run", options.dry_studies, "createproject", *arguments)
            print(f"  a thousand in {dry['passed'] / n_thousands:.0f} s (goal: {MOST_DRY_S})")


if __name__ == "__main__":
    main()
