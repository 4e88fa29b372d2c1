"""Lesions of a mask: components, isocontours and the measures that are reported of them.

A lesion is a 26-connected component of the mask. Everything about one lesion is computed within
its bounding box, so that the cost follows the tumour volume, not the field of view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
Box = tuple[slice, slice, slice]

_CONNECTIVITY_26 = np.ones((3, 3, 3), dtype=bool)
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


def bounding_box(mask: Array) -> Box | None:
    """Return the smallest box around the voxels above 0, None if there are none."""
    footprint = mask.max(axis=2, initial=0)
    profiles = (footprint.max(axis=1), footprint.max(axis=0), mask.max(axis=(0, 1), initial=0))
    occupied = [np.flatnonzero(profile > 0) for profile in profiles]
    if not occupied[0].size:
        return None
    x, y, z = (slice(int(indices[0]), int(indices[-1]) + 1) for indices in occupied)
    return x, y, z


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
    labels = np.zeros(mask.shape, dtype=np.int32)
    box = bounding_box(mask)
    if box is None:
        return labels, 0
    # In C order, in which the components are searched: twice as fast.
    lesions = np.greater(mask[box], 0, order="C")
    count: int = ndimage.label(lesions, structure=_CONNECTIVITY_26, output=labels[box])
    return labels, count


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
    contour = np.zeros(mask.shape, dtype=bool)
    for _, box, lesion in _lesions(mask):
        contour[box] |= _lesion_isocontour(suv[box], lesion, threshold_percent, threshold_suv)
    return contour


def measure_lesions(
    suv: Array,
    mask: Array,
    affine: FloatArray,
    threshold_percent: float = 25.0,
    threshold_suv: float | None = None,
) -> tuple[Lesion, ...]:
    """Measure each lesion of a mask, in the order of :func:`label_lesions`.

    Parameters
    ----------
    suv, mask : (X, Y, Z) arrays
        SUV [g/ml], and the mask on the same grid (the PET's own, where measures are meant).
    affine : (4, 4) array
        Voxel -> RAS+ mm, oblique or sheared too.
    threshold_percent, threshold_suv
        As for :func:`isocontour`.

    Notes
    -----
    SUVmax, SUVmean, MTV and TLG are those of the voxels. SUVpeak is the highest mean SUV in a
    sphere of 1 ml (radius 6.2 mm) around the centre of any of the lesion's voxels: the best
    placed sphere of PERCIST (Wahl et al., J Nucl Med 2009;50(Suppl 1):122S-150S), the "global
    intensity peak" of IBSI (0F91, Zwanenburg et al., Radiology 2020;295:328-338). The sphere may
    reach beyond the lesion; voxels weigh by the part of them inside the sphere (IBSI counts
    them whole, by their centres: 1.2 ml at voxels of 4 mm), and what lies outside the image is
    left out.
    """
    voxel_ml = _voxel_ml(affine)
    sphere = _peak_sphere(affine)
    measures = []
    for label, box, lesion in _lesions(mask):
        values = suv[box][lesion].astype(np.float64)
        contour = _lesion_isocontour(suv[box], lesion, threshold_percent, threshold_suv)
        iso_values = suv[box][contour].astype(np.float64)
        voxels = np.argwhere(lesion) + [axis.start for axis in box]
        measures.append(
            Lesion(
                label=label,
                mtv_ml=values.size * voxel_ml,
                suv_max=float(values.max()),
                suv_mean=float(values.mean()),
                suv_peak=_suv_peak(suv, box, lesion, sphere),
                tlg_g=float(values.sum()) * voxel_ml,
                iso_mtv_ml=iso_values.size * voxel_ml,
                iso_suv_mean=float(iso_values.mean()) if iso_values.size else 0.0,
                iso_tlg_g=float(iso_values.sum()) * voxel_ml,
                centroid_mm=_to_mm(voxels.mean(axis=0), affine),
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
    return float(suv.sum(dtype=np.float64)) * _voxel_ml(affine) / (1000 * weight_kg)


def _lesions(mask: Array) -> Iterator[tuple[int, Box, Mask]]:
    """Each lesion's label, bounding box, and its voxels within the box."""
    outer = bounding_box(mask)
    if outer is None:
        return
    labels, _ = label_lesions(mask[outer])
    for label, inner in enumerate(ndimage.find_objects(labels), start=1):
        x, y, z = (
            slice(whole.start + part.start, whole.start + part.stop)
            for whole, part in zip(outer, inner, strict=True)
        )
        yield label, (x, y, z), labels[inner] == label


def _lesion_isocontour(
    suv: Array, lesion: Mask, threshold_percent: float, threshold_suv: float | None
) -> Mask:
    if threshold_suv is not None:
        fixed: Mask = lesion & (suv >= threshold_suv)
        return fixed
    suv_max = suv[lesion].max()
    if suv_max <= 0:
        return np.zeros_like(lesion)
    contour: Mask = lesion & (suv >= threshold_percent / 100 * suv_max)
    return contour


def _suv_peak(suv: Array, box: Box, lesion: Mask, sphere: tuple[Array, FloatArray]) -> float:
    """Highest weighted mean around any voxel of a lesion."""
    offsets, weights = sphere
    reach = np.abs(offsets).max(axis=0)
    nearby, in_image = _surroundings(suv, box, reach)
    centres = np.ravel_multi_index(tuple((np.argwhere(lesion) + reach).T), nearby.shape)
    shifts = offsets @ [nearby.shape[1] * nearby.shape[2], nearby.shape[2], 1]
    weighted = np.zeros(len(centres))
    weight_in_image = np.zeros(len(centres))
    for shift, weight in zip(shifts, weights, strict=True):
        weighted += weight * nearby.take(centres + shift)
        weight_in_image += weight * in_image.take(centres + shift)
    return float((weighted / weight_in_image).max())


def _surroundings(suv: Array, box: Box, reach: Array) -> tuple[Array, Mask]:
    """A box grown by `reach` to all sides, 0 beyond the image, and which voxels are in it."""
    grown = [(part.start - n, part.stop + n) for part, n in zip(box, reach, strict=True)]
    in_suv = tuple(
        slice(max(0, start), min(size, stop))
        for (start, stop), size in zip(grown, suv.shape, strict=True)
    )
    missing = [
        (max(0, -start), max(0, stop - size))
        for (start, stop), size in zip(grown, suv.shape, strict=True)
    ]
    nearby = np.pad(suv[in_suv], missing)
    in_image = np.pad(np.ones_like(suv[in_suv], dtype=bool), missing)
    return nearby, in_image


def _peak_sphere(affine: FloatArray) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Voxel offsets (N, 3) touched by the 1 ml sphere, and the part of each inside it (N,)."""
    to_mm = affine[:3, :3]
    # Rows of the inverse are the normals of the voxel planes: how far the sphere reaches.
    reach = np.ceil(_PEAK_RADIUS_MM * np.linalg.norm(np.linalg.inv(to_mm), axis=1) + 0.5)
    offsets = np.stack(
        np.meshgrid(*(np.arange(-n, n + 1) for n in reach.astype(int)), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    middles = (np.arange(_POINTS_PER_VOXEL) + 0.5) / _POINTS_PER_VOXEL - 0.5
    points = np.stack(np.meshgrid(middles, middles, middles, indexing="ij"), axis=-1)
    points_mm = points.reshape(-1, 3) @ to_mm.T
    parts = np.array(
        [
            (((offset @ to_mm.T + points_mm) ** 2).sum(axis=1) <= _PEAK_RADIUS_MM**2).mean()
            for offset in offsets
        ]
    )
    return offsets[parts > 0], parts[parts > 0]


def _to_mm(voxel: FloatArray, affine: FloatArray) -> tuple[float, float, float]:
    x, y, z = (affine[:3, :3] @ voxel + affine[:3, 3]).tolist()
    return x, y, z


def _voxel_ml(affine: FloatArray) -> float:
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000
