"""DICOM RT structure sets: contours in mm -> a label volume on the grid they were drawn on.

Knows pydicom.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom.attributes import items, joined_text, number, tag_of, to_ras, whole_number
from common.dicom.contours import fill_contours
from common.dicom.masks import Mask, matching, names_by_number, refusing_malformed
from common.errors import Kind, StudyError, Warning

CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


def read_rtstruct(
    dataset: Dataset,
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    roi: re.Pattern[str] | None = None,
) -> Mask:
    """Rasterise the regions of an RTSTRUCT on the grid of the series that it references.

    Parameters
    ----------
    dataset : pydicom.Dataset
        The RT structure set.
    shape, affine
        Grid of the series: counts along x, y, z and (4, 4) voxel -> RAS+ mm.
    roi : re.Pattern, optional
        Unite the regions in whose ROIName it is found (case ignored); None: all of them.

    Returns
    -------
    Mask
        Label 1 where a voxel's centre lies inside any of the regions.

    Raises
    ------
    StudyError
        Malformed, no region matches, or a region can't be placed on the grid.
    """
    with refusing_malformed("RTSTRUCT"):
        contours_of = _contours_by_region(dataset)
        names = dict.fromkeys(contours_of, "") | names_by_number(
            dataset, "StructureSetROISequence", "ROINumber", "ROIName"
        )
        chosen = matching(names, roi, "ROIName")
        warnings = _body_outlines(dataset, chosen)
        labels = np.zeros(shape, dtype=np.uint8, order="F")
        n_closed, n_others = 0, 0
        for region in chosen:
            drawn = contours_of.get(region, [])
            contours = [_points_mm(each) for each in drawn if _kind(each) in CLOSED]
            filled = fill_contours(contours, shape, affine)
            labels |= filled.inside.view(np.uint8)
            warnings += [
                Warning(Kind.MASK, f"region {region}: {note}")
                for note in (*_left_out(len(drawn), len(contours)), *filled.warnings)
            ]
            n_closed += len(contours)
            n_others += len(drawn) - len(contours)
    if n_others and not n_closed:
        raise StudyError(
            f"the regions have only points or open lines ({tag_of('ContourGeometricType')}): "
            "choose others with --roi, or give the mask as NIfTI"
        )
    return Mask(labels, np.array(affine, dtype=np.float64), tuple(warnings))


def _contours_by_region(dataset: Dataset) -> dict[int, list[Dataset]]:
    if "ROIContourSequence" not in dataset:
        raise StudyError(
            f"the RTSTRUCT ends before its contours ({tag_of('ROIContourSequence')} is missing): "
            "export it again"
        )
    contours: dict[int, list[Dataset]] = {}
    for region in items(dataset, "ROIContourSequence"):
        drawn = contours.setdefault(whole_number(region, "ReferencedROINumber"), [])
        drawn += items(region, "ContourSequence")
    return contours


def _body_outlines(dataset: Dataset, chosen: Sequence[int]) -> list[Warning]:
    """Warn where the outline of the body is among several regions: it would swallow them all."""
    outlines = [
        whole_number(observation, "ReferencedROINumber")
        for observation in items(dataset, "RTROIObservationsSequence")
        if joined_text(observation, "RTROIInterpretedType") == "EXTERNAL"
    ]
    return [
        Warning(
            Kind.MASK,
            f"region {region}: it is the outline of the body ({tag_of('RTROIInterpretedType')} "
            "EXTERNAL): choose the tumours with --roi",
        )
        for region in chosen
        if region in outlines
    ]


def _kind(contour: Dataset) -> str:
    return joined_text(contour, "ContourGeometricType")


def _left_out(n_drawn: int, n_closed: int) -> list[str]:
    if not n_drawn:
        return ["no contours"]
    n_open = n_drawn - n_closed
    return [f"{n_open} contour(s) are points or open lines: ignored"] if n_open else []


def _points_mm(contour: Dataset) -> NDArray[np.float64]:
    """Parse ContourData into (n, 3) RAS+, from its bytes: pydicom's numbers are 20x slower."""
    element = contour.get_item("ContourData")
    value = element.value if element is not None else None
    numbers = value.strip(b" \0").split(b"\\") if isinstance(value, bytes) else value
    try:
        lps_mm = np.array(numbers, dtype=np.float64).reshape(-1, 3)
    except (TypeError, ValueError) as error:
        raise StudyError(
            f"{tag_of('ContourData')} is not a list of points x\\y\\z: export the RTSTRUCT again"
        ) from error
    declared = number(contour, "NumberOfContourPoints")
    if declared is not None and declared != len(lps_mm):
        raise StudyError(
            f"{tag_of('ContourData')} has {len(lps_mm)} points, "
            f"{tag_of('NumberOfContourPoints')} says {declared:.0f}: export the RTSTRUCT again"
        )
    return to_ras(lps_mm)
