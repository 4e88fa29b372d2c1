"""preprocessing.py, the whole process from zip to finished .h5, against the plain way.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_preprocessing.py [--repeats N] [--total-body]

The plain way is what one would write with nibabel, nilearn, scipy and h5py. Each way runs in a
process of its own, start-up included, on one core with one BLAS thread, and the files are
compared. The standard study is a CT of 512 x 512 x 326 and a PET of 400 x 400 x 326 voxels, with
noise everywhere; another one has air of one value, as most scanners write it.
"""

import argparse
import gzip
import io
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from processes import ROOT, Run, median, print_comparison, print_machine, print_runs, run_python

HERE = Path(__file__).parent
VOXELS = {
    "standard": 512 * 512 * 326 + 400 * 400 * 326,
    "total-body": 512 * 512 * 1500 + 400 * 400 * 673,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of ours; 3 by default")
    parser.add_argument("--total-body", action="store_true", help="also CT 512 x 512 x 1500")
    parser.add_argument("--plain", nargs=2, metavar=("ZIP", "H5"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        preprocess_plainly(*options.plain)
        return
    print_machine("nibabel", "nilearn", "scipy", "h5py")
    with tempfile.TemporaryDirectory() as folder:
        ours = [compare(Path(folder), kind, options.repeats) for kind in ("standard", "quiet-air")]
        if options.total_body:
            measure_total_body(Path(folder), ours[0])


def compare(folder: Path, kind: str, repeats: int) -> Run:
    """Print the comparison on a study, and return our medians."""
    archive, plain_file, our_file = (folder / name for name in ("s.zip", "plain.h5", "ours.h5"))
    run_python(HERE / "standard_study.py", archive, kind, 1)
    plain = run_python(Path(__file__), "--plain", archive, plain_file)
    run_python(ROOT / "preprocessing.py", "--help")
    ours = median([preprocess(archive, our_file) for _ in range(repeats)])
    print(f"{kind} study, one core; ours is the median of {repeats}")
    print_comparison(plain, ours, "preprocessing.py", "nibabel, nilearn, scipy, h5py")
    print_agreement(plain_file, our_file)
    return ours


def measure_total_body(folder: Path, standard: Run) -> None:
    """Print what a long study takes, in all and a voxel."""
    run_python(HERE / "standard_study.py", folder / "t.zip", "total-body", 1)
    total = preprocess(folder / "t.zip", folder / "t.h5")
    print("total-body study, CT 512 x 512 x 1500, PET 400 x 400 x 673")
    runs = {"standard": standard, "total-body": total}
    print_runs(runs)
    for name, result in runs.items():
        per_voxel_ns = result.cpu_seconds / VOXELS[name] * 1e9
        print(f"  {name}: {per_voxel_ns:.1f} ns of processor a voxel of CT and PET")


def preprocess(archive: Path, output: Path) -> Run:
    """Run preprocessing.py with default options of value."""
    return run_python(ROOT / "preprocessing.py", archive, "-o", output, "--force", "-q", "-j", 1)


# --- the plain way ---------------------------------------------------------------------------


def preprocess_plainly(zip_path: str, h5_path: str) -> None:
    """Do what preprocessing.py does by default, by nibabel, nilearn, scipy and h5py."""
    import warnings

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
                unzipped = io.BytesIO(gzip.decompress(archive.read(name)))
                image = nibabel.Nifti1Image.from_stream(unzipped)
                turn = nibabel.orientations.ornt_transform(
                    nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt("LAS")
                )
                role = name.rpartition("_")[2].removesuffix(".nii.gz")
                images[role] = image.as_reoriented(turn)
                key = name.split("/")[-2]
    ct, pet, mask = (images[role] for role in ("ct", "petsuv", "mask"))

    spacing, ct_spacing = np.array([2.0, 2.0, 3.0]), nibabel.affines.voxel_sizes(ct.affine)
    shape = np.array([200, 200, int(ct.shape[2] * ct_spacing[2] / spacing[2] + 1e-6)])
    directions = ct.affine[:3, :3] / ct_spacing
    lead_mm = ((np.array(ct.shape) - 1) * ct_spacing - (shape - 1) * spacing) / 2 * [1, 1, 0]
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = ct.affine[:3, 3] + directions @ lead_mm

    options = {"force_resample": True, "copy_header": True}
    ct = resample_img(ct, affine, tuple(shape), "continuous", fill_value=-1024, **options)
    suv = resample_to_img(pet, ct, "continuous", fill_value=0, **options).get_fdata()
    lesions = resample_to_img(mask, ct, "nearest", fill_value=0, **options).get_fdata() > 0
    labels, count = ndimage.label(lesions, np.ones((3, 3, 3)))
    contour = np.zeros(lesions.shape, np.uint8)
    for lesion in range(1, count + 1):
        inside = labels == lesion
        contour[inside & (suv >= 0.25 * suv[inside].max())] = 1
    image = np.clip([suv / 40, (ct.get_fdata() + 1000) / 2000], 0, 1).astype(np.float16)
    with h5py.File(h5_path, "w") as file:
        arrays = {"image": image, "mask": lesions[None].astype(np.uint8), "mask_iso": contour[None]}
        for group, array in arrays.items():
            dataset = file.create_dataset(
                f"{group}/{key}", data=array, chunks=True, compression="lzf", shuffle=True
            )
            dataset.attrs["affine"] = affine


def print_agreement(plain_file: Path, our_file: Path) -> None:
    """Print by how much the two files differ."""
    import h5py
    import numpy as np

    with h5py.File(plain_file) as plain, h5py.File(our_file) as ours:
        (key,) = plain["image"]
        image, our_image = (file["image"][key][()].astype(np.float32) for file in (plain, ours))
        differences = np.abs(image - our_image)
        print(
            f"  images differ by {differences.max():.1e} of the range at most (a step of float16 "
            f"is 4.9e-04 at 1), {np.mean(differences > 1e-5):.2%} of the voxels by more than 1e-05"
        )
        for group in ("mask", "mask_iso"):
            differing = np.count_nonzero(plain[group][key][()] != ours[group][key][()])
            print(f"  {group} differs in {differing} voxels")


if __name__ == "__main__":
    main()
