"""One study more, changed or gone, among thousands: bytes and seconds, of one file and of a store.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_store.py [--studies 10000] [--angles 2] [--in FOLDER]

Studies of 8 x 8 x 8 voxels take the workers next to nothing. `preprocessing.py`, `mergeh5.py`
(copies, and links to the index) and `project_2d.py` run on all studies, once more with nothing
new, with one study more, one changed and one gone; then `mergeh5.py --verify`. Bytes are those
that the kernel counts as written to files, of all processes of a run.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from processes import ROOT

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "builders"))

from project_zips import nifti_bytes

SIDE = 8

RUN = """
import importlib, json, resource, sys, time
script, arguments = sys.argv[1], sys.argv[2:]
def written():
    with open("/proc/self/io") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))
before, began = written(), time.perf_counter()
status = importlib.import_module(script).main(arguments)
assert status == 0, status
cpu = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps({
    "passed": time.perf_counter() - began, "cpu": sum(u.ru_utime + u.ru_stime for u in cpu),
    "written": written() - before, "peak": peak / 1024,
}))
"""


def run(script, *arguments):
    """Run a script in a process of its own and return what it took."""
    command = [sys.executable, "-c", RUN, script, *map(str, arguments), "-q"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def study_members(seed):
    """Return the gzipped images of a tiny study by role."""
    import nibabel

    random = np.random.default_rng(seed)
    shape, affine = (SIDE,) * 3, np.diag([4.0, 4.0, 4.0, 1.0])
    mask = np.zeros(shape, np.uint8)
    mask[3:5, 3:5, 3:5] = 1
    images = {
        "ct": random.integers(-1000, 1000, shape).astype(np.int16),
        "petsuv": random.random(shape, np.float32) + 10 * mask.astype(np.float32),
        "mask": mask,
    }
    return {
        role: gzip.compress(nifti_bytes(nibabel.Nifti1Image(data, affine)), 1, mtime=0)
        for role, data in images.items()
    }


def write_zip(path, numbers, changed=()):
    """Write a zip of tiny studies, alike but for those changed."""
    alike, other = study_members(0), study_members(1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in numbers:
            study = f"{number * 2654435761 % 2**40:010x}"
            for role, content in (other if number in changed else alike).items():
                archive.writestr(f"p/{study}/{study}_{role}.nii.gz", content)


def size_of(*paths):
    files = (p for path in paths for p in (path.rglob("*") if path.is_dir() else [path]))
    return sum(p.stat().st_size for p in files if p.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--angles", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--only", choices=("one file", "store"), help="default: both")
    parser.add_argument("--in", dest="folder", type=Path, metavar="FOLDER", help="for the files")
    options = parser.parse_args()
    n = options.studies
    nights = {
        "first": (range(n), ()),
        "nothing new": (range(n), ()),
        "one more": (range(n + 1), ()),
        "one changed": (range(n + 1), (n // 2,)),
        "one gone": (range(n), (n // 2,)),
    }
    grid = ("--shape", SIDE, SIDE, "--spacing", 4, 4, 4)
    angles = ("--angles", 0, 180, 180 / options.angles)
    for form in ("one file", "store") if options.only is None else (options.only,):
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            project, volumes, merged, mips = (
                folder / name for name in ("p.zip", "3d.h5", "all_3d.h5", "2d.h5")
            )
            stores = (folder / "3d.studies", folder / "2d.studies")
            of_3d, link, of_2d = (
                ((), (), ())
                if form == "one file"
                else (("--store", stores[0]), ("--link",), ("--store", stores[1]))
            )
            print(f"{n} studies, {form}", flush=True)
            columns = ("written [MB]", "passed [s]", "CPU [s]", "parent [MB]")
            print(f"  {'':32}" + "".join(f"{column:>14}" for column in columns))
            for night, (numbers, changed) in nights.items():
                if night != "nothing new":
                    write_zip(project, numbers, changed)
                for script, *arguments in (
                    ("preprocessing", project, "-o", volumes, *grid, *of_3d),
                    ("mergeh5", volumes, "-o", merged, *link),
                    ("project_2d", merged, "-o", mips, *angles, *of_2d),
                ):
                    took = run(script, *arguments)
                    print(
                        f"  {script + '.py, ' + night:32}{took['written'] / 1e6:14.1f}"
                        f"{took['passed']:14.1f}{took['cpu']:14.1f}{took['peak']:14.0f}",
                        flush=True,
                    )
            took = run("mergeh5", "--verify", merged)
            print(f"  {'mergeh5.py --verify':46}{took['passed']:14.1f}{took['cpu']:14.1f}")
            print(
                f"  3D {size_of(volumes, *stores[:1]) / 1e6:.1f} MB, its index or file "
                f"{size_of(volumes) / 1e6:.1f} MB; 2D {size_of(mips, *stores[1:]) / 1e6:.1f} MB, "
                f"its index or file {size_of(mips) / 1e6:.1f} MB"
            )


if __name__ == "__main__":
    main()
