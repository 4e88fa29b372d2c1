"""Rotated projections of one standard study: this project against scipy.ndimage.

Run by hand, on an otherwise idle machine::

    python tests/benchmarks/bench_projection.py [--every-angle]

The study is PET and CT (float16, as stored) and two masks on 200 x 200 x 326 voxels, projected at
36 angles, on one core with one BLAS thread. scipy takes minutes for that: without ``--every-angle``
it does 3 of the 36 angles, and its time is multiplied by 12.
"""

import os

os.environ.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[2]))

from common.projection import image_mips, mask_mips, projection_angles

SHAPE = (200, 200, 326)
REPEATS = 5


def standard_study(shape):
    """Image (2, X, Y, Z) float16 and two masks (1, X, Y, Z) uint8: an ellipse with lesions."""
    random = np.random.default_rng(0)
    n_x, n_y, n_z = shape
    x, y = np.ogrid[:n_x, :n_y]
    body = ((x - n_x / 2) / 90) ** 2 + ((y - n_y / 2) / 55) ** 2 < 1
    image = np.empty((2, *shape), np.float16)
    for z in range(n_z):
        image[0, :, :, z] = body * random.gamma(4, 0.006, body.shape)
        image[1, :, :, z] = body * random.normal(0.52, 0.02, body.shape)
    mask = np.zeros((1, *shape), np.uint8)
    mask_iso = np.zeros_like(mask)
    for centre in random.integers((60, 70, 20), (n_x - 60, n_y - 70, n_z - 20), (25, 3)):
        radius = random.integers(3, 10)
        box = tuple(slice(middle - radius, middle + radius + 1) for middle in centre)
        grid = np.indices((2 * radius + 1,) * 3) - radius
        distance = np.sqrt((grid**2).sum(axis=0))
        mask[0][box] |= distance <= radius
        mask_iso[0][box] |= distance <= 0.7 * radius
        image[0][box] += (0.3 * (distance <= 0.7 * radius)).astype(np.float16)
    return image, mask, mask_iso


def ours(study, angles):
    image, *masks = study
    return [image_mips(image, angles), *(mask_mips(mask, angles) for mask in masks)]


def scipys(study, angles):
    mips = []
    for volumes, order in zip(study, (3, 0, 0), strict=True):
        dtype = np.float32 if order else np.uint8
        by_angle = [
            [
                ndimage.rotate(volume, angle, axes=(1, 0), reshape=False, order=order).max(axis=1)
                for volume in volumes.astype(dtype)
            ]
            for angle in angles
        ]
        mips.append(np.array(by_angle))
    return mips


def timed(work, *arguments):
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


def peak_gb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every-angle", action="store_true", help="scipy does all 36 angles")
    options = parser.parse_args()

    angles = projection_angles(0, 180, 5)
    sample = range(len(angles)) if options.every_angle else (1, 9, 26)
    share = len(angles) / len(sample)
    study = standard_study(SHAPE)
    study_gb = peak_gb()

    # The lighter goes first: the system reports the highest peak so far.
    our_seconds = statistics.median(timed(ours, study, angles)[0] for _ in range(REPEATS))
    our_images, *our_masks = ours(study, angles)
    our_gb = peak_gb()
    image_seconds = statistics.median(
        timed(image_mips, study[0], angles)[0] for _ in range(REPEATS)
    )

    scipy_seconds, (images, *masks) = timed(scipys, study, [angles[k] for k in sample])
    difference = np.abs(our_images[list(sample)] - images).max()
    differing = sum(
        int((our[list(sample)] != theirs).sum())
        for our, theirs in zip(our_masks, masks, strict=True)
    )

    measured = "measured" if share == 1 else f"{scipy_seconds:.1f} s for {len(sample)}, scaled"
    print(f"PET, CT and two masks of {SHAPE}, {len(angles)} angles, one core")
    print(f"  scipy              {scipy_seconds * share:8.2f} s  ({measured})")
    print(f"  this project       {our_seconds:8.2f} s  (median of {REPEATS})")
    print(f"    of it images     {image_seconds:8.2f} s")
    print(f"  ratio              {scipy_seconds * share / our_seconds:8.1f}")
    print(
        f"  peak memory        {our_gb:8.2f} GB (study alone {study_gb:.2f}, scipy {peak_gb():.2f})"
    )
    print(f"  images differ by   {difference:8.1e} of a range of 1 at most")
    print(f"  masks differ in    {differing:8d} voxels")


if __name__ == "__main__":
    main()
