"""project_2d.py, the whole process from 3D to 2D file, against scipy.ndimage.rotate and max.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_project_2d.py [--repeats N] [--every-angle]

The standard study on 200 x 200 x 326 voxels, with noise everywhere and with air of one value,
projected at 36 angles, on one core. scipy takes minutes: without ``--every-angle`` it does 3 of the
angles, and their time is multiplied by 12.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from processes import ROOT, Run, median, print_comparison, print_machine, run_python

HERE = Path(__file__).parent
ANGLES = tuple(range(0, 180, 5))
SAMPLE = (5, 45, 130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of ours; 3 by default")
    parser.add_argument("--every-angle", action="store_true", help="scipy does all 36 angles")
    parser.add_argument("--plain", nargs=3, metavar=("3D", "2D", "ALL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        project_plainly(*options.plain)
        return
    print_machine("scipy", "h5py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("standard", "quiet-air"):
            compare(folder, kind, options.repeats, every_angle=options.every_angle)


def compare(folder: Path, kind: str, repeats: int, *, every_angle: bool) -> None:
    """Print the comparison on a study."""
    run_python(HERE / "standard_study.py", folder / "s.zip", kind, 1)
    volumes, ours, theirs = (folder / f"{stem}.h5" for stem in ("3d", "ours", "theirs"))
    run_python(ROOT / "preprocessing.py", folder / "s.zip", "-o", volumes, "--force", "-q", "-j", 1)
    plain = run_python(Path(__file__), "--plain", volumes, theirs, int(every_angle))
    share = 1 if every_angle else len(ANGLES) / len(SAMPLE)
    plain = Run(plain.seconds * share, plain.cpu_seconds * share, plain.peak_gb)
    run_python(ROOT / "project_2d.py", "--help")
    arguments = [volumes, "-o", ours, "--force", "-q", "-j", 1]
    runs = [run_python(ROOT / "project_2d.py", *arguments) for _ in range(repeats)]
    print(f"36 angles of the {kind} study, one core; ours is the median of {len(runs)}")
    way = "scipy, h5py" if every_angle else f"scipy, h5py: {len(SAMPLE)} angles x {share:g}"
    print_comparison(plain, median(runs), "project_2d.py", way)
    print_agreement(theirs, ours)


def project_plainly(volumes: str, slices: str, every_angle: str) -> None:
    """Do what project_2d.py does by default, by scipy and h5py."""
    import h5py
    import numpy as np
    from scipy.ndimage import rotate

    with h5py.File(volumes) as source, h5py.File(slices, "w") as file:
        for key in source["image"]:
            for group, order in (("image", 3), ("mask", 0), ("mask_iso", 0)):
                array = source[group][key][()]
                array = array.astype(np.float32) if order else array
                for angle in ANGLES if int(every_angle) else SAMPLE:
                    mips = [
                        rotate(volume, angle, axes=(1, 0), reshape=False, order=order).max(axis=1)
                        for volume in array
                    ]
                    mip = np.clip(mips, 0, 1).astype(source[group][key].dtype)
                    file.create_dataset(f"{group}/{key}_{angle:03d}", data=mip, compression="lzf")


def print_agreement(theirs: Path, ours: Path) -> None:
    """Print by how much the two files differ."""
    import h5py
    import numpy as np

    with h5py.File(theirs) as plain, h5py.File(ours) as file:
        for group in plain:
            difference = max(
                np.abs(mip[()].astype(np.float32) - file[group][key][()].astype(np.float32)).max()
                for key, mip in plain[group].items()
            )
            print(f"  {group} differs by {difference:.1e} at most")


if __name__ == "__main__":
    main()
