"""What resampling to a training grid loses: found, measured in ml, and said in words. Pure."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from common.lesions import label_lesions
from common.resampling import Grid

LEAST_UPTAKE_SUV = 0.5
"""PET voxels below this count as air: their lying outside the CT is no loss."""


def lesion_losses(
    lesion_ids: NDArray[np.integer],
    source: Grid,
    resampled_ids: NDArray[np.integer],
    target: Grid,
) -> list[str]:
    """Say which labelled voxels and lesions do not survive resampling.

    Parameters
    ----------
    lesion_ids : (X, Y, Z) array
        Number of each voxel's lesion on the mask's own grid, 0 outside.
    source, target : Grid
    resampled_ids : array
        The same on the target grid, by nearest neighbour.
    """
    return [
        *_outside(lesion_ids, source, target),
        *_vanished(lesion_ids, source, resampled_ids),
        *_merged(resampled_ids, target),
    ]


def _outside(ids: NDArray[np.integer], source: Grid, target: Grid) -> Iterator[str]:
    voxels = np.argwhere(ids)
    if not len(voxels):
        return
    to_target = np.linalg.inv(target.affine) @ source.affine
    there = voxels @ to_target[:3, :3].T + to_target[:3, 3]
    outside = ((there < -0.5) | (there > np.array(target.shape) - 0.5)).any(axis=1)
    if outside.any():
        lesions = len(np.unique(ids[tuple(voxels[outside].T)]))
        yield (
            f"{outside.sum() * source.voxel_ml:.2f} ml of {lesions} lesion(s) lie outside the "
            "target grid: give a larger --shape"
        )


def _vanished(
    ids: NDArray[np.integer], source: Grid, resampled_ids: NDArray[np.integer]
) -> Iterator[str]:
    sizes = np.bincount(ids.ravel(order="K"))
    present = np.zeros(len(sizes), bool)
    present[np.unique(resampled_ids)] = True
    lost = np.flatnonzero((sizes > 0) & ~present)
    lost = lost[lost > 0]
    if not len(lost):
        return
    volume_ml = sizes[lost].sum() * source.voxel_ml
    yield f"{len(lost)} lesion(s) of {volume_ml:.2f} ml vanish by resampling: use a finer --spacing"
    if len(lost) == np.count_nonzero(sizes[1:]):
        yield f"the mask of {volume_ml:.2f} ml becomes empty by resampling"


def _merged(resampled_ids: NDArray[np.integer], target: Grid) -> Iterator[str]:
    components, count = label_lesions(resampled_ids > 0)
    inside = components > 0
    pairs = np.unique(np.stack([components[inside], resampled_ids[inside]]), axis=1)
    per_component = np.bincount(pairs[0], minlength=count + 1)
    merged = np.flatnonzero(per_component > 1)
    if len(merged):
        volume_ml = np.isin(components, merged).sum() * target.voxel_ml
        yield (
            f"{per_component[merged].sum()} lesions of {volume_ml:.2f} ml merge into "
            f"{len(merged)} by resampling: use a finer --spacing"
        )


def clipped_uptake(
    suv: NDArray[np.floating], mask: NDArray[np.integer], brightest: float, grid: Grid
) -> list[str]:
    """Say how much of the labelled tumour is brighter than `brightest` and will be clipped."""
    values = suv[mask > 0]
    clipped = values > brightest
    if not clipped.any():
        return []
    return [
        f"{clipped.sum() * grid.voxel_ml:.2f} ml of lesions are brighter than the SUV range "
        f"(SUVmax {values.max():.1f} > {brightest:g}) and are clipped: give a larger --suv-range"
    ]


def uncovered_uptake(suv: NDArray[np.floating], pet: Grid, ct: Grid) -> list[str]:
    """Say how much uptake lies where the CT does not reach."""
    to_ct = np.linalg.inv(ct.affine) @ pet.affine
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in pet.shape], indexing="ij")).reshape(3, -1)
    there = to_ct[:3, :3] @ corners + to_ct[:3, 3:]
    tops = np.array(ct.shape)[:, None] - 0.5
    if (there >= -0.5).all() and (there <= tops).all():
        return []
    voxels = np.argwhere(suv >= LEAST_UPTAKE_SUV)
    there = to_ct[:3, :3] @ voxels.T + to_ct[:3, 3:]
    outside = ((there < -0.5) | (there > tops)).any(axis=0)
    if not outside.any():
        return []
    return [
        f"{outside.sum() * pet.voxel_ml:.1f} ml of PET with uptake (SUV >= {LEAST_UPTAKE_SUV:g}) "
        "are not covered by the CT: there the CT is filled with air"
    ]
