"""preprocessing.py, the whole process from zip to finished .h5, against the plain way.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_preprocessing.py [--repeats 5] [--total-body]

The plain way is what one would write with nibabel, nilearn, scipy and h5py; it runs in a process
of its own, with one BLAS thread and no worker beside it, and its file is compared with ours. The
standard study is a CT of 512 x 512 x 326 and a PET of 400 x 400 x 326, with 25 lesions.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Run:
    """One finished process: seconds passed, seconds of processor, peak memory [GB]."""

    seconds: float
    cpu_seconds: float
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="3 by default")
    parser.add_argument("--total-body", action="store_true", help="also CT 512 x 512 x 1500")
    parser.add_argument("--plain", nargs=2, metavar=("ZIP", "H5"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        preprocess_plainly(*options.plain)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare_standard(Path(folder), options.repeats)
        if options.total_body:
            measure_total_body(Path(folder))
        measure_workers(Path(folder))


def compare_standard(folder: Path, repeats: int) -> None:
    import standard_study

    standard_study.write_project(folder / "one.zip", standard_study.STANDARD)
    plain = [sys.executable, __file__, "--plain", str(folder / "one.zip"), str(folder / "plain.h5")]
    rows = {
        "nibabel, nilearn, scipy, h5py": [run(plain) for _ in range(max(1, repeats // 2))],
        "preprocessing.py": [run(ours(folder, "one")) for _ in range(repeats)],
    }
    print("standard study, one worker, one BLAS thread: medians")
    print(f"  {'':32}{'time [s]':>10}{'CPU [s]':>10}{'peak [GB]':>11}{'file [MB]':>11}")
    for (name, runs), file in zip(rows.items(), ("plain.h5", "one.h5"), strict=True):
        megabytes = (folder / file).stat().st_size / 1e6
        columns = [statistics.median(r.seconds for r in runs)]
        columns += [statistics.median(r.cpu_seconds for r in runs), max(r.peak_gb for r in runs)]
        print(f"  {name:32}{columns[0]:10.2f}{columns[1]:10.2f}{columns[2]:11.2f}{megabytes:11.1f}")
    theirs, mine = rows.values()
    for what in ("seconds", "cpu_seconds"):
        ratio = statistics.median(getattr(r, what) for r in theirs) / statistics.median(
            getattr(r, what) for r in mine
        )
        print(f"  ratio by {what:23}{ratio:10.1f}")
    print_agreement(folder / "plain.h5", folder / "one.h5")


def measure_total_body(folder: Path) -> None:
    import standard_study

    sizes = {"one": standard_study.STANDARD, "total": standard_study.TOTAL_BODY}
    standard_study.write_project(folder / "total.zip", sizes["total"])
    print("total-body study, CT 512 x 512 x 1500, PET 400 x 400 x 673")
    for name, size in sizes.items():
        voxels = sum(x * y * z for x, y, z in (size.ct_shape, size.pet_shape)) / 1e6
        result = run(ours(folder, name))
        print(
            f"  {name:10}{result.seconds:8.2f} s {result.cpu_seconds:8.2f} s CPU "
            f"{result.peak_gb:8.2f} GB {result.cpu_seconds / voxels * 1000:8.1f} ms CPU a megavoxel"
        )


def measure_workers(folder: Path, n_studies: int = 8) -> None:
    import standard_study

    standard_study.write_project(folder / "eight.zip", standard_study.STANDARD, n_studies)
    seconds = [run(ours(folder, "eight", jobs)).seconds for jobs in (1, 2)]
    print(f"{n_studies} standard studies")
    print(f"  one worker  {seconds[0]:8.2f} s")
    print(f"  two workers {seconds[1]:8.2f} s: {seconds[0] / seconds[1]:.2f} times the throughput")


def ours(folder: Path, name: str, jobs: int = 1) -> list[str]:
    script = str(ROOT / "preprocessing.py")
    paths = [str(folder / f"{name}.zip"), "-o", str(folder / f"{name}.h5")]
    return [sys.executable, script, *paths, "--force", "-j", str(jobs)]


def run(command: list[str]) -> Run:
    """Run a command to its end; peak memory is that of its largest process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


# --- the plain way ---------------------------------------------------------------------------


def preprocess_plainly(zip_path: str, h5_path: str) -> None:
    """Do what preprocessing.py does by default, by nibabel, nilearn, scipy and h5py."""
    import gzip
    import io
    import warnings
    import zipfile

    import h5py
    import nibabel
    import numpy as np
    from nilearn.image import resample_img, resample_to_img
    from scipy import ndimage

    warnings.simplefilter("ignore")
    images = {}
    with zipfile.ZipFile(zip_path) as archive:
        for name in archive.namelist():
            if name.endswith(".nii.gz"):
                plain = gzip.decompress(archive.read(name))
                image = nibabel.Nifti1Image.from_stream(io.BytesIO(plain))
                role = name.rpartition("_")[2].removesuffix(".nii.gz")
                turn = nibabel.orientations.ornt_transform(
                    nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt("LAS")
                )
                images[role] = image.as_reoriented(turn)
                key = name.split("/")[-2]
    ct, pet, mask = (images[role] for role in ("ct", "petsuv", "mask"))

    spacing, ct_spacing = np.array([2.0, 2.0, 3.0]), np.array(ct.header.get_zooms())
    shape = np.array([200, 200, int(ct.shape[2] * ct_spacing[2] / spacing[2] + 1e-6)])
    directions = ct.affine[:3, :3] / ct_spacing
    lead = ((np.array(ct.shape) - 1) * ct_spacing - (shape - 1) * spacing) / 2 * [1, 1, 0]
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = ct.affine[:3, 3] + directions @ lead

    options = {"force_resample": True, "copy_header": True}
    ct = resample_img(ct, affine, tuple(shape), "continuous", fill_value=-1024, **options)
    suv = resample_to_img(pet, ct, "continuous", fill_value=0, **options).get_fdata()
    lesions = resample_to_img(mask, ct, "nearest", fill_value=0, **options).get_fdata() > 0
    labels, count = ndimage.label(lesions, np.ones((3, 3, 3)))
    contour = np.zeros(lesions.shape, np.uint8)
    for lesion in range(1, count + 1):
        inside = labels == lesion
        contour[inside & (suv >= 0.25 * suv[inside].max())] = 1
    channels = [suv / 40, (ct.get_fdata() + 1000) / 2000]
    image = np.clip(channels, 0, 1).astype(np.float16)
    with h5py.File(h5_path, "w") as file:
        arrays = {"image": image, "mask": lesions[None].astype(np.uint8), "mask_iso": contour[None]}
        for group, array in arrays.items():
            dataset = file.create_dataset(
                f"{group}/{key}", data=array, compression="gzip", chunks=True, shuffle=True
            )
            dataset.attrs["affine"] = affine


def print_agreement(plain_path: Path, our_path: Path) -> None:
    import h5py
    import numpy as np

    with h5py.File(plain_path) as plain, h5py.File(our_path) as mine:
        (key,) = plain["image"]
        theirs, ours = (file["image"][key][()].astype(np.float32) for file in (plain, mine))
        print(f"  images differ by at most {np.abs(theirs - ours).max():.1e} of the range")
        for group in ("mask", "mask_iso"):
            differing = np.count_nonzero(plain[group][key][()] != mine[group][key][()])
            print(f"  {group} differs in {differing} of {theirs[0].size} voxels")


if __name__ == "__main__":
    main()
