"""DICOM RT structure sets: contours in mm -> a label volume on the grid they were drawn on.

Knows pydicom.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom.attributes import items, joined_text, number, tag_of, to_ras, whole_number
from common.dicom.contours import fill_contours
from common.dicom.masks import (
    Mask,
    listed,
    matching,
    names_by_number,
    no_tumours,
    refusing_malformed,
)
from common.errors import Kind, StudyError, Warning

Points = NDArray[np.float64]

XOR = "CLOSEDPLANAR_XOR"
"""Contours of a region that by their type exclude what they have in common."""
CLOSED = ("CLOSED_PLANAR", XOR)

NO_TUMOURS = frozenset(
    {
        *("EXTERNAL", "ORGAN", "AVOIDANCE", "CAVITY", "CONTRAST_AGENT", "BOLUS", "SUPPORT"),
        *("FIXATION", "MARKER", "REGISTRATION", "ISOCENTER", "CONTROL", "DOSE_REGION"),
        *("DOSE_MEASUREMENT", "TREATED_VOLUME", "IRRAD_VOLUME", "BRACHY_CHANNEL"),
        *("BRACHY_ACCESSORY", "BRACHY_SRC_APP", "BRACHY_CHNL_SHLD"),
        # Tumours with the tissue around them.
        *("CTV", "PTV"),
    }
)
"""Types of regions (3006,00A4) that are no tumours where others are; many files type all ORGAN."""

_TYPE = tag_of("RTROIInterpretedType")


def read_rtstruct(
    dataset: Dataset,
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    roi: re.Pattern[str] | None = None,
    move: Callable[[Points], Points] | None = None,
) -> Mask:
    """Rasterise the regions of an RTSTRUCT on the grid of the series that it references.

    Parameters
    ----------
    dataset : pydicom.Dataset
        The RT structure set.
    shape, affine
        Grid of the series: counts along x, y, z and (4, 4) voxel -> RAS+ mm.
    roi : re.Pattern, optional
        Unite the regions in whose ROIName it is found (case ignored); None: all of them but
        the outline of the body.
    move : callable, optional
        Moves points (n, 3) [RAS+ mm] before they are placed on the grid.

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
        names = dict.fromkeys(contours_of, "") | region_names(dataset)
        types = _interpreted_types(dataset)
        chosen, warnings = _without_body(matching(names, roi, "ROIName"), types, roi)
        labels = np.zeros(shape, dtype=np.uint8, order="F")
        taken, n_others = [], 0
        for region in chosen:
            drawn = contours_of.get(region, [])
            kinds = [_kind(each) for each in drawn]
            contours = [
                _points_mm(each) for each, kind in zip(drawn, kinds, strict=True) if kind in CLOSED
            ]
            if move is not None:
                contours = [move(each) for each in contours]
            filled = fill_contours(contours, shape, affine, may_overlap=XOR in kinds)
            for k, inside in filled.inside.items():
                labels[:, :, k] |= inside
            warnings += [
                Warning(Kind.MASK, f"region {region}: {note}")
                for note in (*_left_out(len(drawn), len(contours)), *filled.warnings)
            ]
            taken += [region] if contours else []
            n_others += len(drawn) - len(contours)
    if n_others and not taken:
        raise StudyError(
            f"the regions have only points or open lines ({tag_of('ContourGeometricType')}): "
            "choose others with --roi, or give the mask as NIfTI"
        )
    return Mask(
        labels,
        np.array(affine, dtype=np.float64),
        (*_several(taken, types, roi), *warnings),
        tuple(names[region] for region in taken),
    )


def region_names(dataset: Dataset) -> dict[int, str]:
    """Return number -> ROIName of the regions (private).

    Raises
    ------
    StudyError
        There are none, or several of one number.
    """
    return names_by_number(dataset, "StructureSetROISequence", "ROINumber", "ROIName")


def _without_body(
    chosen: Sequence[int], types: Mapping[int, str], roi: re.Pattern[str] | None
) -> tuple[list[int], list[Warning]]:
    """Leave out outlines of the body, which would swallow all tumours, unless chosen by name."""
    bodies = [region for region in chosen if types.get(region) == "EXTERNAL"]
    if not bodies:
        return list(chosen), []
    if roi is not None:
        text = f"regions chosen by --roi are the outline of the body ({_TYPE} EXTERNAL): "
        return list(chosen), [Warning(Kind.REGIONS, f"{text}{listed(bodies)}")]
    if len(bodies) == len(chosen):
        raise StudyError(
            f"all regions are outlines of the body ({_TYPE} EXTERNAL): choose one with --roi if "
            "it is a tumour, or export the tumours"
        )
    text = (
        f"the outline of the body is left out ({_TYPE} EXTERNAL): region {listed(bodies)}; choose "
        "with --roi if it is a tumour"
    )
    return [region for region in chosen if region not in bodies], [Warning(Kind.REGIONS, text)]


def _several(
    taken: Sequence[int], types: Mapping[int, str], roi: re.Pattern[str] | None
) -> list[Warning]:
    """Warn where regions were united that the user has not named, or that may be no tumours."""
    kind_of = {
        region: kind
        for region, kind in types.items()
        if kind in NO_TUMOURS and not (kind == "EXTERNAL" and roi is not None)
    }
    warnings = no_tumours(taken, kind_of, "RTROIInterpretedType", "region")
    if len(taken) > 1 and roi is None:
        text = (
            f"regions {listed(taken)} united ({len(taken)} regions): choose with --roi if not all "
            "of them are tumours"
        )
        warnings.insert(0, Warning(Kind.REGIONS, text))
    return warnings


def _interpreted_types(dataset: Dataset) -> dict[int, str]:
    return {
        whole_number(each, "ReferencedROINumber"): joined_text(each, "RTROIInterpretedType").upper()
        for each in items(dataset, "RTROIObservationsSequence")
    }


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


def _kind(contour: Dataset) -> str:
    kind = joined_text(contour, "ContourGeometricType")
    if not kind:
        raise StudyError(
            f"a contour does not say whether it is closed ({tag_of('ContourGeometricType')} is "
            "absent): export the RTSTRUCT again, or choose other regions with --roi"
        )
    return kind


def _left_out(n_drawn: int, n_closed: int) -> list[str]:
    if not n_drawn:
        return ["no contours"]
    n_open = n_drawn - n_closed
    return [f"{n_open} contour(s) are points or open lines: ignored"] if n_open else []


def _points_mm(contour: Dataset) -> Points:
    """Parse ContourData into (n, 3) RAS+, from its bytes: pydicom's numbers are 20x slower."""
    element = contour.get_item("ContourData")
    value = element.value if element is not None else None
    if not value:
        raise StudyError(
            f"a contour has no points ({tag_of('ContourData')} is missing): export the RTSTRUCT "
            "again"
        )
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
