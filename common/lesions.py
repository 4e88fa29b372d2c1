"""Lesions of a mask: components, isocontours and the measures that are reported of them.

A lesion is a 26-connected component of the mask. All is computed from lists of its voxels, so that
the cost follows the tumour volume, not the field of view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.components import Components, Voxels, components, voxels_by_number
from common.geometry import inverse, voxel_ml

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

# Radius of the sphere of 1 ml in which SUVpeak is the mean.
_PEAK_RADIUS_MM = (3 * 1000 / (4 * math.pi)) ** (1 / 3)
# Points along each axis of a voxel that share its volume between inside and outside the sphere.
_POINTS_PER_VOXEL = 11


@dataclass(frozen=True)
class Lesion:
    """Measures of one lesion; `iso_` marks those of its isocontour.

    Volumes (MTV) in ml, SUV in g/ml, TLG = SUVmean * MTV in g, centroid in RAS+ mm.
    An empty isocontour has volume, mean and TLG 0.
    """

    label: int
    mtv_ml: float
    suv_max: float
    suv_mean: float
    suv_peak: float
    tlg_g: float
    iso_mtv_ml: float
    iso_suv_mean: float
    iso_tlg_g: float
    centroid_mm: tuple[float, float, float]


@dataclass(frozen=True)
class TumourBurden:
    """Measures of one study: lesion count, total volumes (TMTV), total TLG, spread (Dmax)."""

    lesion_count: int
    tmtv_ml: float
    tlg_g: float
    iso_tmtv_ml: float
    iso_tlg_g: float
    dmax_mm: float


def label_lesions(mask: Array) -> tuple[npt.NDArray[np.int32], int]:
    """Number the 26-connected components of a mask.

    Parameters
    ----------
    mask : (X, Y, Z) array
        Voxels above 0 belong to lesions.

    Returns
    -------
    labels : (X, Y, Z) int32 array
        0, and 1 to `count` in the order of each lesion's first voxel.
    count : int
    """
    lesions = components(mask)
    labels = np.zeros(mask.shape, dtype=np.int32)
    labels[tuple(lesions.voxels)] = lesions.numbers
    return labels, lesions.count


def isocontour(
    suv: Array, mask: Array, threshold_percent: float = 25.0, threshold_suv: float | None = None
) -> Mask:
    """Voxels of each lesion that reach a part of its own SUVmax, or a fixed SUV.

    Parameters
    ----------
    suv : (X, Y, Z) array
        SUV [g/ml].
    mask : (X, Y, Z) array
        Voxels above 0; lesions are its 26-connected components.
    threshold_percent : float
        Voxels with SUV >= this percentage of their lesion's SUVmax are taken.
    threshold_suv : float, optional
        Voxels with SUV >= this value are taken instead.

    Returns
    -------
    (X, Y, Z) bool array
        A subset of `mask`. A lesion without uptake (SUVmax <= 0) has no percentage isocontour
        and vanishes: a part of nothing would take every voxel, or those colder than the
        maximum, and none of them is metabolically active.
    """
    lesions = components(mask)
    values = suv[tuple(lesions.voxels)]
    taken = _in_isocontour(values, lesions, threshold_percent, threshold_suv)
    contour = np.zeros(mask.shape, dtype=bool)
    contour[tuple(lesions.voxels[:, taken])] = True
    return contour


def measure_lesions(
    suv: Array,
    lesions: Array,
    affine: FloatArray,
    threshold_percent: float = 25.0,
    threshold_suv: float | None = None,
    rows: Array | None = None,
) -> tuple[Lesion, ...]:
    """Measure each lesion, in the order of their numbers.

    Parameters
    ----------
    suv, lesions : (X, Y, Z) arrays
        SUV [g/ml], and the number of each voxel's lesion, 0 outside, on the same grid (the PET's
        own, where measures are meant). Voxels of one number are one lesion, connected or not: on
        a grid coarser than that on which lesions were numbered they may touch, or fall apart.
    affine : (4, 4) array
        Voxel -> RAS+ mm, oblique or sheared too.
    threshold_percent, threshold_suv
        As for :func:`isocontour`.
    rows : (X, Y, Z) array, optional
        Numbers above 0 wherever `lesions` are, such as label values: these are measured instead,
        each with the isocontours of its lesions.

    Notes
    -----
    SUVmax is the highest voxel, SUVmean the mean of the voxels, MTV their volume, in the mask and
    in the isocontour (41 and 50 % of SUVmax: Boellaard et al., EANM guideline 2.0, EJNMMI
    2015;42:328-354; SUV 4.0: Barrington et al., J Nucl Med 2021;62:332-337). TLG = SUVmean * MTV
    (Larson et al., Clin Positron Imaging 1999;2:159-171). The centroid is the mean place of the
    voxels, unweighted (IBSI's geometric centre of mass). SUVpeak is the highest mean SUV in a
    sphere of 1 ml (radius 6.2 mm) around the centre of any of the lesion's voxels: the best
    placed sphere of PERCIST (Wahl et al., J Nucl Med 2009;50(Suppl 1):122S-150S), the "global
    intensity peak" of IBSI (0F91, Zwanenburg et al., Radiology 2020;295:328-338). The sphere may
    reach beyond the lesion; voxels weigh by the part of them inside the sphere (IBSI counts
    them whole, by their centres: 1.2 ml at voxels of 4 mm), and what lies outside the image is
    left out.
    """
    groups, numbers = voxels_by_number(lesions)
    taken = _in_isocontour(suv[tuple(groups.voxels)], groups, threshold_percent, threshold_suv)
    if rows is not None:
        contour = np.zeros(lesions.shape, dtype=bool)
        contour[tuple(groups.voxels[:, taken])] = True
        groups, numbers = voxels_by_number(rows)
        taken = contour[tuple(groups.voxels)]
    values = suv[tuple(groups.voxels)]
    peaks = _peak_means(suv, groups.voxels, affine)
    ml = voxel_ml(affine)
    measures: list[Lesion] = []
    ends = (groups.starts + groups.sizes).tolist()
    for number, start, end in zip(numbers.tolist(), groups.starts.tolist(), ends, strict=True):
        lesion = slice(start, end)
        suvs = values[lesion].astype(np.float64)
        iso_suvs = suvs[taken[lesion]]
        measures.append(
            Lesion(
                label=number,
                mtv_ml=suvs.size * ml,
                suv_max=float(suvs.max()),
                suv_mean=float(suvs.mean()),
                suv_peak=float(peaks[lesion].max()),
                tlg_g=float(suvs.sum()) * ml,
                iso_mtv_ml=iso_suvs.size * ml,
                iso_suv_mean=float(iso_suvs.mean()) if iso_suvs.size else 0.0,
                iso_tlg_g=float(iso_suvs.sum()) * ml,
                centroid_mm=_to_mm(groups.voxels[:, lesion].mean(axis=1), affine),
            )
        )
    return tuple(measures)


def tumour_burden(lesions: Sequence[Lesion]) -> TumourBurden:
    """Sum up the lesions of one study.

    Notes
    -----
    Dmax is the largest distance between the centroids of two lesions (Cottereau et al., J Nucl
    Med 2020;61:40-45, and Ann Oncol 2021;32:404-411); 0 with fewer than two lesions.
    """
    centroids_mm = np.array([lesion.centroid_mm for lesion in lesions]).reshape(-1, 3)
    return TumourBurden(
        lesion_count=len(lesions),
        tmtv_ml=math.fsum(lesion.mtv_ml for lesion in lesions),
        tlg_g=math.fsum(lesion.tlg_g for lesion in lesions),
        iso_tmtv_ml=math.fsum(lesion.iso_mtv_ml for lesion in lesions),
        iso_tlg_g=math.fsum(lesion.iso_tlg_g for lesion in lesions),
        dmax_mm=max(
            (float(np.linalg.norm(centroids_mm - one, axis=1).max()) for one in centroids_mm),
            default=0.0,
        ),
    )


def dose_fraction(suv: Array, affine: FloatArray, weight_kg: float) -> float:
    """Part of the injected dose that the image holds: sum(SUV * voxel volume) / body weight.

    It follows from the definition SUVbw = concentration / (dose / body weight): summed over the
    volume, the concentration is the activity in the image.

    Parameters
    ----------
    suv : (X, Y, Z) array
        SUV normalised to body weight [g/ml].
    affine : (4, 4) array
        Voxel -> mm.
    weight_kg : float

    Returns
    -------
    float
        Little above 1 at most where the scale of the SUV is right, for decay is corrected and
        no activity comes from nowhere; less by what was excreted or out of view.
    """
    return float(suv.sum(dtype=np.float64)) * voxel_ml(affine) / (1000 * weight_kg)


def _in_isocontour(
    values: Array, lesions: Components, threshold_percent: float, threshold_suv: float | None
) -> Mask:
    """Which voxels of lesions, whose SUVs are `values`, their isocontours take."""
    if threshold_suv is not None or not lesions.count:
        fixed: Mask = values >= (threshold_suv or 0)
        return fixed
    suv_max = np.maximum.reduceat(values, lesions.starts)
    # No voxel reaches infinity.
    threshold = np.where(suv_max > 0, threshold_percent / 100 * suv_max, np.inf)
    taken: Mask = values >= np.repeat(threshold, lesions.sizes)
    return taken


def _peak_means(suv: Array, voxels: Voxels, affine: FloatArray) -> FloatArray:
    """Weighted mean of the 1 ml sphere around each of some voxels (3, N)."""
    offsets, weights = _peak_sphere(affine)
    reach = np.abs(offsets).max(axis=0)[:, None]
    size = np.array(suv.shape)[:, None]
    within = ((voxels >= reach) & (voxels < size - reach)).all(axis=0)
    means = np.empty(voxels.shape[1])
    means[within] = _means_within(suv, voxels[:, within], offsets, weights)
    means[~within] = _means_at_border(suv, voxels[:, ~within], offsets, weights)
    return means


def _means_within(suv: Array, voxels: Voxels, offsets: Indices, weights: FloatArray) -> FloatArray:
    # A view of images in the memory order of NIfTI.
    flat = suv.reshape(-1, order="F")
    steps = np.array([1, suv.shape[0], suv.shape[0] * suv.shape[1]])
    centres = steps @ voxels
    total = np.zeros(voxels.shape[1])
    for step, weight in zip(offsets @ steps, weights, strict=True):
        total += weight * flat.take(centres + step)
    means: FloatArray = total / weights.sum()
    return means


def _means_at_border(
    suv: Array, voxels: Voxels, offsets: Indices, weights: FloatArray
) -> FloatArray:
    total, weight_in_image = np.zeros((2, voxels.shape[1]))
    last = np.array(suv.shape)[:, None] - 1
    for offset, weight in zip(offsets, weights, strict=True):
        near = voxels + offset[:, None]
        nearest = near.clip(0, last)
        in_image = (near == nearest).all(axis=0)
        total += weight * in_image * suv[tuple(nearest)]
        weight_in_image += weight * in_image
    return total / weight_in_image


def _peak_sphere(affine: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Voxel offsets (N, 3) touched by the 1 ml sphere, and the part of each inside it (N,)."""
    to_mm = affine[:3, :3]
    # Rows of the inverse are the normals of the voxel planes: how far the sphere reaches.
    reach = np.ceil(_PEAK_RADIUS_MM * np.linalg.norm(inverse(affine)[:3, :3], axis=1) + 0.5)
    offsets = np.stack(
        np.meshgrid(*(np.arange(-n, n + 1) for n in reach.astype(int)), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    middles = (np.arange(_POINTS_PER_VOXEL) + 0.5) / _POINTS_PER_VOXEL - 0.5
    points = np.stack(np.meshgrid(middles, middles, middles, indexing="ij"), axis=-1)
    points_mm = points.reshape(-1, 3) @ to_mm.T
    half_mm = np.linalg.norm(points_mm, axis=1).max()
    distances_mm = np.linalg.norm(offsets @ to_mm.T, axis=1)
    parts = (distances_mm + half_mm <= _PEAK_RADIUS_MM).astype(np.float64)
    # Points tell only where the surface of the sphere may pass.
    for i in np.flatnonzero(np.abs(distances_mm - _PEAK_RADIUS_MM) <= half_mm):
        from_centre = offsets[i] @ to_mm.T + points_mm
        parts[i] = ((from_centre**2).sum(axis=1) <= _PEAK_RADIUS_MM**2).mean()
    return offsets[parts > 0], parts[parts > 0]


def _to_mm(voxel: FloatArray, affine: FloatArray) -> tuple[float, float, float]:
    x, y, z = (affine[:3, :3] @ voxel + affine[:3, 3]).tolist()
    return x, y, z
