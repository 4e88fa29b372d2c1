"""Throughput of one worker and of two, of all three stages, on studies of real size.

Run by hand, on an otherwise idle machine of two cores or more::

    python tests/benchmarks/bench_workers.py [--studies N] [--repeats N] [--dask]

The studies are one of the demo phantom, with 326 CT slices of 512 x 512, 326 PET slices of
400 x 400 and quiet air, under the names of as many patients. Both ways take turns.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bench_createproject import quieten, write_study
from processes import ROOT, Run, median, print_machine, print_runs, run_python

STAGES = (
    ("createproject.py", "raw", "p.zip"),
    ("preprocessing.py", "p.zip", "3d.h5"),
    ("project_2d.py", "3d.h5", "2d.h5"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=24, metavar="N", help="default: 24")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--dask", action="store_true", help="also workers of a dask cluster")
    options = parser.parse_args()
    print_machine("deflate", "h5py")
    print(f"{options.studies} studies, median of {options.repeats}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process: children report the memory of their parent as theirs.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_studies, args=[folder / "raw", options.studies]
        )
        writer.start()
        writer.join()
        engines = {"": (), " of dask": ("--dask", "local")} if options.dask else {"": ()}
        for script, source, output in STAGES:
            for engine_name, engine in engines.items():
                paths = folder / source, folder / output
                compare(script, *paths, engine, engine_name, options.repeats)


def write_studies(folder: Path, n_studies: int) -> None:
    """Write one study, and link its files under the names of other patients."""
    write_study(folder)
    quieten(folder)
    (first,) = folder.iterdir()
    for number in range(1, n_studies):
        shutil.copytree(first, folder / f"patient_{number + 1:02}", copy_function=os.link)


def compare(
    script: str, source: Path, output: Path, engine: tuple[str, ...], engine_name: str, repeats: int
) -> None:
    """Print what one worker and two take, in turn."""
    runs: dict[int, list[Run]] = {1: [], 2: []}
    for _ in range(repeats):
        for n_workers, done in runs.items():
            arguments = source, "-o", output, "--force", "-q", "-j", n_workers, *engine
            done.append(run_python(ROOT / script, *arguments))
    one, two = (median(done) for done in runs.values())
    print_runs({f"{script}, one worker{engine_name}": one, f"two workers{engine_name}": two})
    print(f"  two workers have {one.seconds / two.seconds:.2f} times the throughput", flush=True)


if __name__ == "__main__":
    main()
