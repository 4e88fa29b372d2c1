"""A CT or PET series as a stack of slices: their order, their grid, and what forbids both.

Knows pydicom. Slices have DICOM's LPS coordinates, which end here: affines are RAS+.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom.attributes import (
    functional_group,
    items,
    joined_text,
    number,
    required_numbers,
    tag_of,
    texts,
    to_ras,
    whole_number,
)
from common.dicom.files import DicomFile, Series
from common.dicom.rescale import Rescale, rescale_of
from common.errors import Kind, StudyError, Warning

# --- dicom slices ----------------------------------------------------------------------------

_PERPENDICULAR_UNITS = 0.01


@dataclass(frozen=True, eq=False)
class Slice:
    """One image plane.

    Attributes
    ----------
    file : DicomFile
    frame : int
        Its place in the file, from 0.
    position_mm : (3,) array
        Centre of the first pixel [LPS].
    orientation : (6,) array
        Unit vectors from column to column and from row to row [LPS].
    pixel_spacing_mm : (2,) array
        From row to row, and from column to column, as DICOM has it.
    matrix : (int, int)
        Columns, rows.
    rescale : Rescale
        From stored value to HU or the unit of the PET.
    """

    file: DicomFile
    frame: int
    position_mm: NDArray[np.float64]
    orientation: NDArray[np.float64]
    pixel_spacing_mm: NDArray[np.float64]
    matrix: tuple[int, int]
    rescale: Rescale


def _slices_of(file: DicomFile) -> list[Slice]:
    """Return the slices of a file, one or one a frame.

    Raises
    ------
    StudyError
        A slice without its place or rescaling, or one that cannot be.
    """
    frames = items(file.header, "PerFrameFunctionalGroupsSequence")
    if frames:
        return _slices_of_frames(file, frames)
    if file.n_frames > 1:
        raise StudyError(
            f"several frames without a place for each ({tag_of('NumberOfFrames')}): "
            "export the series as single images or as an enhanced object",
            file.name,
        )
    header = file.header
    return [_slice(file, 0, header, header, header, rescale_of(header))]


def _slices_of_frames(file: DicomFile, frames: Sequence[Dataset]) -> list[Slice]:
    if len(frames) != file.n_frames:
        raise StudyError(
            f"{tag_of('PerFrameFunctionalGroupsSequence')} does not describe every frame: "
            "export the series again",
            file.name,
        )
    keywords = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    slices = []
    for index, frame in enumerate(frames):
        position, orientation, measures = (
            functional_group(file.header, frame, keyword) or Dataset() for keyword in keywords
        )
        rescale = rescale_of(file.header, frame)
        slices.append(_slice(file, index, position, orientation, measures, rescale))
    return slices


def _slice(
    file: DicomFile,
    frame: int,
    position: Dataset,
    orientation: Dataset,
    measures: Dataset,
    rescale: Rescale,
) -> Slice:
    """Make a slice of the header, or of the functional groups, that tell its place."""
    axes = _unit_axes(*required_numbers(orientation, "ImageOrientationPatient", 6).tolist())
    pixel_spacing_mm = required_numbers(measures, "PixelSpacing", 2)
    if axes is None:
        raise StudyError(
            f"{tag_of('ImageOrientationPatient')} is not a pair of perpendicular unit vectors: "
            "export the series again",
            file.name,
        )
    if (pixel_spacing_mm <= 0).any():
        raise StudyError(
            f"{tag_of('PixelSpacing')} is not positive: export the series again", file.name
        )
    if rescale.slope < 0:
        raise StudyError(
            f"{tag_of('RescaleSlope')} is {rescale.slope:g}, negative: export the series again",
            file.name,
        )
    return Slice(
        file,
        frame,
        required_numbers(position, "ImagePositionPatient", 3),
        axes,
        pixel_spacing_mm,
        (whole_number(file.header, "Columns"), whole_number(file.header, "Rows")),
        rescale,
    )


@functools.lru_cache(maxsize=64)
def _unit_axes(*stored: float) -> NDArray[np.float64] | None:
    """Return the axes that a series has in common, (6,); None if not perpendicular unit vectors."""
    axes = np.reshape(stored, (2, 3))
    if np.abs(axes @ axes.T - np.eye(2)).max() > _PERPENDICULAR_UNITS:
        return None
    unit: NDArray[np.float64] = (axes / np.linalg.norm(axes, axis=1, keepdims=True)).ravel()
    unit.flags.writeable = False
    return unit


# --- dicom stack -----------------------------------------------------------------------------

LARGEST_SLICE_OFFSET = 0.1
"""Distance of a slice from the evenly spaced grid beyond which a series is refused [spacings]."""

LARGEST_VOLUME = 2**31
"""Voxels beyond which a header is taken as damaged: five times a total-body CT."""

ON_SLICE = 0.01
"""Distance from a plane of an even grid to a slice that still counts as the same [spacings]."""

MOST_GAPS_NAMED = 4
"""Odd gaps whose files are named."""

_SAME_DIRECTION = 1e-3
_SAME_SPACING = 1e-3
_MOVING = ("DYNAMIC", "GATED")


@dataclass(frozen=True, eq=False)
class Stack:
    """The slices of a series in order along their normal, and the grid they make up.

    Attributes
    ----------
    slices : tuple of Slice
    shape : (int, int, int)
        Columns, rows, planes of the grid.
    affine : (4, 4) float64 array
        Voxel index to RAS+ [mm]; sheared where the gantry was tilted.
    warnings : tuple of Warning
        What makes one doubt that all slices are there; no identity.
    places : (n_planes,) float64 array or None
        Of each plane of the grid, its place between the slices: 1.25 is a quarter of the way from
        the second to the third. None where the slices themselves are the grid's planes.
    """

    slices: tuple[Slice, ...]
    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    warnings: tuple[Warning, ...] = ()
    places: NDArray[np.float64] | None = None

    @property
    def headers(self) -> tuple[Dataset, ...]:
        """Headers in slice order, each file's once."""
        return tuple(file.header for file in dict.fromkeys(item.file for item in self.slices))

    @property
    def header_and_frame(self) -> tuple[tuple[int, int], ...]:
        """Of each slice, the index of its header in `headers` and its frame there."""
        place = {id(header): i for i, header in enumerate(self.headers)}
        return tuple((place[id(item.file.header)], item.frame) for item in self.slices)


def stack_slices(series: Series, *, resample_uneven: bool = False) -> Stack:
    """Order the slices of a series and find the grid they make up.

    Parameters
    ----------
    series : Series
    resample_uneven : bool
        Bring unevenly spaced slices onto their finest even grid instead of refusing them.

    Raises
    ------
    StudyError
        Dynamic or gated series, mixed orientations, matrices or pixel spacings, missing,
        duplicate or unevenly spaced slices, a slice without its place or rescaling.
    """
    role = {"PT": "PET", "CT": "CT"}[series.modality]
    refuse_moving(series)
    slices = [item for file in series.files for item in _slices_of(file)]
    _refuse_mixed(slices, role)
    normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
    slices.sort(key=lambda item: float(item.position_mm @ normal))
    grid = _even_grid(slices, normal, role, resample_uneven=resample_uneven)
    shape = (*slices[0].matrix, grid.n_planes)
    if min(shape) < 1 or np.prod(shape, dtype=np.int64) > LARGEST_VOLUME:
        raise StudyError(
            f"the {role} has an implausible size ({tag_of('Rows')}, {tag_of('Columns')}): "
            "export it again"
        )
    affine = _affine(slices[0], grid.step_mm)
    warnings = (*grid.warnings, *_signs_of_loss(slices, role))
    return Stack(tuple(slices), shape, affine, warnings, grid.places)


# --- what forbids a stack --------------------------------------------------------------------


def refuse_moving(series: Series) -> None:
    """Refuse a PET that says it is dynamic or gated, be it in SeriesType or ImageType.

    Raises
    ------
    StudyError
        It does.
    """
    if series.modality != "PT":
        return
    for file in series.files:
        for keyword, place in (("SeriesType", 0), ("ImageType", 2)):
            words = texts(file.header, keyword)[place : place + 1]
            kind = next((m for m in _MOVING if words and m in words[0].upper()), None)
            if kind is not None:
                raise StudyError(
                    f"the PET is {kind.lower()} ({tag_of(keyword)}): "
                    "give a static or whole-body series"
                )


def _refuse_mixed(slices: Sequence[Slice], role: str) -> None:
    first = slices[0]
    of_kind: dict[tuple[Any, ...], Slice] = {}
    for item in slices:
        kind = (item.orientation.tobytes(), item.pixel_spacing_mm.tobytes(), item.matrix)
        of_kind.setdefault(kind, item)
    for item in of_kind.values():
        if np.abs(item.orientation - first.orientation).max() > _SAME_DIRECTION:
            raise StudyError(
                f"the {role} series mixes orientations ({tag_of('ImageOrientationPatient')}): "
                "give one stack of parallel slices"
            )
        if not np.allclose(item.pixel_spacing_mm, first.pixel_spacing_mm, rtol=_SAME_SPACING):
            raise StudyError(
                f"the {role} series mixes pixel spacings ({tag_of('PixelSpacing')}): "
                "give one reconstruction"
            )
        if item.matrix != first.matrix:
            raise StudyError(
                f"the {role} series mixes matrices ({tag_of('Rows')}, {tag_of('Columns')}): "
                "give one reconstruction"
            )


# --- the grid of slices ----------------------------------------------------------------------


class _EvenGrid(NamedTuple):
    """Planes from the first slice on; see `Stack` for `places`."""

    n_planes: int
    step_mm: NDArray[np.float64]
    """From plane to plane [LPS]; not along the normal where the gantry tilts."""
    places: NDArray[np.float64] | None = None
    warnings: tuple[Warning, ...] = ()


def _even_grid(
    slices: Sequence[Slice], normal: NDArray[np.float64], role: str, *, resample_uneven: bool
) -> _EvenGrid:
    n_slices = len(slices)
    if n_slices == 1:
        raise StudyError(f"the {role} has one slice: give the whole series")
    positions_mm = np.array([item.position_mm for item in slices])
    heights_mm = (positions_mm - positions_mm[0]) @ normal
    gaps_mm = np.diff(heights_mm)
    spacing_mm = float(gaps_mm.mean())
    if gaps_mm.min() <= LARGEST_SLICE_OFFSET * spacing_mm:
        raise StudyError(
            f"the {role} has several slices in one place ({tag_of('ImagePositionPatient')}): "
            "duplicate, dynamic or gated images; give each slice once",
            _files_at(slices, gaps_mm, [int(gaps_mm.argmin())]),
        )
    whole_mm = positions_mm[-1] - positions_mm[0]
    step_mm = whole_mm / (n_slices - 1)
    if _offset_mm(positions_mm, np.arange(n_slices), step_mm) <= LARGEST_SLICE_OFFSET * spacing_mm:
        return _EvenGrid(n_slices, step_mm)
    uneven = (
        f"{tag_of('ImagePositionPatient')}: gaps from {gaps_mm.min():.2f} to "
        f"{gaps_mm.max():.2f} mm, {n_slices} slices"
    )
    n_steps = int(np.ceil(heights_mm[-1] / gaps_mm.min() - LARGEST_SLICE_OFFSET))
    step_mm = whole_mm / n_steps
    fine_mm = float(step_mm @ normal)
    is_straight = (
        _offset_mm(positions_mm, heights_mm / fine_mm, step_mm) <= LARGEST_SLICE_OFFSET * fine_mm
    )
    if not (resample_uneven and is_straight):
        raise StudyError(
            f"the {role} has missing or unevenly spaced slices ({uneven}): export the complete "
            "series" + (", or give --uneven-slices resample" if is_straight else ""),
            _files_at(slices, gaps_mm, _odd_gaps(gaps_mm)),
        )
    text = (
        f"the {role} has unevenly spaced slices ({uneven}): resampled linearly onto "
        f"{n_steps + 1} slices of {fine_mm:.2f} mm"
    )
    places = np.interp(np.arange(n_steps + 1) * fine_mm, heights_mm, np.arange(n_slices))
    on_slice = np.abs(places - np.rint(places)) * gaps_mm.max() <= ON_SLICE * fine_mm
    places = np.where(on_slice, np.rint(places), places)
    return _EvenGrid(n_steps + 1, step_mm, places, (Warning(Kind.SERIES, text),))


def _offset_mm(
    positions_mm: NDArray[np.float64], places: NDArray[Any], step_mm: NDArray[np.float64]
) -> float:
    """Return how far [mm] a slice lies at most from its place on a line of even steps."""
    on_line_mm = positions_mm[0] + places[:, np.newaxis] * step_mm
    return float(np.linalg.norm(positions_mm - on_line_mm, axis=1).max())


def _odd_gaps(gaps_mm: NDArray[np.float64]) -> list[int]:
    """Return the gaps least like the others, in their order."""
    usual_mm = np.median(gaps_mm)
    unlike = np.abs(gaps_mm - usual_mm)
    odd = np.flatnonzero(unlike > LARGEST_SLICE_OFFSET * usual_mm)
    oddest = odd[np.argsort(-unlike[odd], kind="stable")[:MOST_GAPS_NAMED]]
    return sorted(map(int, oddest if len(odd) else [unlike.argmax()]))


def _files_at(slices: Sequence[Slice], gaps_mm: NDArray[np.float64], gaps: Iterable[int]) -> str:
    """Return the files on both sides of gaps, and how wide these are (private)."""
    return "; ".join(
        f"{slices[gap].file.name} and {slices[gap + 1].file.name}: {gaps_mm[gap]:.2f} mm apart"
        for gap in gaps
    )


def _signs_of_loss(slices: Sequence[Slice], role: str) -> tuple[Warning, ...]:
    """Warn of lossy compression, and of fewer slices than a PET had: ends are lost unseen."""
    header = slices[0].file.header
    warnings = []
    if joined_text(header, "LossyImageCompression") == "01":
        warnings.append(
            Warning(
                Kind.SERIES,
                f"the {role} was compressed with loss ({tag_of('LossyImageCompression')}): its "
                "values are not those measured; export it without",
            )
        )
    declared = number(header, "NumberOfSlices") if role == "PET" else None
    if declared is not None and declared > len(slices):
        warnings.append(
            Warning(
                Kind.SERIES,
                f"the PET has {len(slices)} slices, its headers tell of {declared:.0f} "
                f"({tag_of('NumberOfSlices')}): check that the export is complete",
            )
        )
    return tuple(warnings)


def _affine(first: Slice, step_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    row_spacing_mm, column_spacing_mm = first.pixel_spacing_mm
    columns_mm = (
        first.orientation[:3] * column_spacing_mm,
        first.orientation[3:] * row_spacing_mm,
        step_mm,
        first.position_mm,
    )
    affine = np.eye(4)
    affine[:3] = to_ras(np.array(columns_mm)).T
    return affine
