"""What RTSTRUCT and SEG have in common: the mask they become, their regions, what they refer to.

Knows pydicom. Arrays leave as [column, row, slice], slices ascending along cross(row, column),
with an affine to RAS+ mm: the convention of the image series.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom.attributes import items, joined_text, tag_of, whole_number
from common.errors import Kind, StudyError, UnreachableStudy, Warning, system_error

LabelArray = NDArray[np.uint8 | np.uint16]


@dataclass(frozen=True, eq=False)
class Mask:
    """A label volume.

    Attributes
    ----------
    labels : (X, Y, Z) array of uint8 or uint16
        In Fortran order; 0 is background.
    affine : (4, 4) float64 array
        Voxel index to RAS+ [mm].
    warnings : tuple of Warning
        What was put right, united or left out; no identity.
    regions : tuple of str
        Names of the regions or segments that were taken (private).
    """

    labels: LabelArray
    affine: NDArray[np.float64]
    warnings: tuple[Warning, ...] = ()
    regions: tuple[str, ...] = ()


@contextmanager
def refusing_malformed(what: str) -> Iterator[None]:
    """Turn whatever pydicom raises on damaged bytes, which may be anything, into a refusal."""
    try:
        yield
    except (StudyError, MemoryError):
        raise
    except Exception as error:
        if (refusal := system_error(error)) is not None:
            raise UnreachableStudy(
                f"cannot read the {what} ({refusal.strerror}): check the file"
            ) from error
        raise StudyError(
            f"the {what} can't be read ({type(error).__name__}): export it again, or give the "
            "mask as NIfTI"
        ) from error


# --- regions and segments --------------------------------------------------------------------


def names_by_number(dataset: Dataset, sequence: str, number: str, name: str) -> dict[int, str]:
    """Return number -> name of the regions or segments that a sequence describes.

    Raises
    ------
    StudyError
        The sequence is absent, or uses a number twice.
    """
    described = items(dataset, sequence)
    names = {whole_number(item, number): joined_text(item, name) for item in described}
    if not described or len(names) < len(described):
        raise StudyError(
            f"{tag_of(sequence)} is absent or uses a number twice ({tag_of(number)}): export the "
            "mask again"
        )
    return names


def matching(names: Mapping[int, str], roi: re.Pattern[str] | None, keyword: str) -> list[int]:
    """Return the numbers of the names in which `roi` is found.

    Neither case nor the Unicode spelling of accents matters.

    Raises
    ------
    StudyError
        There are none; `keyword` is where the names are from.
    """
    if roi is not None:
        roi = re.compile(_composed(roi.pattern), roi.flags | re.IGNORECASE)
    chosen = [number for number in sorted(names) if not roi or roi.search(_composed(names[number]))]
    if not chosen:
        raise StudyError(
            f"none of {len(names)} names matches ({tag_of(keyword)}): give a --roi that does"
        )
    return chosen


def no_tumours(
    taken: Sequence[int], kind_of: Mapping[int, str], keyword: str, what: str
) -> list[Warning]:
    """Warn of what was united with others but is no tumour, or more than that, by its kind.

    Parameters
    ----------
    taken
        Numbers of the regions or segments.
    kind_of
        The kinds of those that are no tumours.
    keyword, what
        Where the kinds are from, and "region" or "segment".
    """
    regions_of: dict[str, list[int]] = {}
    for number in taken if len(taken) > 1 else ():
        if number in kind_of:
            regions_of.setdefault(kind_of[number], []).append(number)
    return [
        Warning(
            Kind.REGIONS,
            f"{kind} by {tag_of(keyword)}, united with other {what}s: {what} {listed(regions)}; "
            "choose with --roi if it is no tumour",
        )
        for kind, regions in sorted(regions_of.items())
    ]


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def listed(numbers: Iterable[int]) -> str:
    """Return numbers for a message, ascending, such as ``1, 2, 5-9``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    short = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(short)


# --- what a mask refers to -------------------------------------------------------------------


def referenced_series(dataset: Dataset) -> tuple[str, ...]:
    """Return the SeriesInstanceUIDs an RTSTRUCT or SEG was drawn on; () where it names none."""
    with refusing_malformed("mask object"):
        series = [*_rt_referenced_series(dataset), *items(dataset, "ReferencedSeriesSequence")]
        return _unique(series, "SeriesInstanceUID")


def referenced_images(dataset: Dataset) -> tuple[str, ...]:
    """Return the SOPInstanceUIDs that an RTSTRUCT names with the series it was drawn on.

    They find the series where it is not named itself.
    """
    with refusing_malformed("mask object"):
        return _images_of(_rt_referenced_series(dataset))


def contoured_images(dataset: Dataset) -> tuple[str, ...]:
    """Return the SOPInstanceUIDs that the contours of an RTSTRUCT name themselves."""
    with refusing_malformed("mask object"):
        regions = items(dataset, "ROIContourSequence")
        return _images_of(each for r in regions for each in items(r, "ContourSequence"))


def _images_of(groups: Iterable[Dataset]) -> tuple[str, ...]:
    images = (image for group in groups for image in items(group, "ContourImageSequence"))
    return _unique(images, "ReferencedSOPInstanceUID")


def region_frames(dataset: Dataset) -> dict[int, str]:
    """Return the frame of reference that each region of an RTSTRUCT names, by its number.

    Where it names none, that of the whole structure set, if there is one.
    """
    with refusing_malformed("RTSTRUCT"):
        frames = items(dataset, "ReferencedFrameOfReferenceSequence")
        of_all = _unique([*frames, dataset], "FrameOfReferenceUID")
        usual = of_all[0] if len(of_all) == 1 else ""
        named = {
            whole_number(region, "ROINumber"): joined_text(region, "ReferencedFrameOfReferenceUID")
            for region in items(dataset, "StructureSetROISequence")
        }
    found = {number: frame or usual for number, frame in named.items()}
    return {number: frame for number, frame in found.items() if frame}


def series_of_frames(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """Return the SeriesInstanceUIDs that an RTSTRUCT names in each frame of reference."""
    with refusing_malformed("RTSTRUCT"):
        return {
            joined_text(frame, "FrameOfReferenceUID"): _unique(
                _series_of_frame(frame), "SeriesInstanceUID"
            )
            for frame in items(dataset, "ReferencedFrameOfReferenceSequence")
        }


def _rt_referenced_series(dataset: Dataset) -> list[Dataset]:
    return [
        series
        for frame in items(dataset, "ReferencedFrameOfReferenceSequence")
        for series in _series_of_frame(frame)
    ]


def _series_of_frame(frame: Dataset) -> list[Dataset]:
    return [
        series
        for study in items(frame, "RTReferencedStudySequence")
        for series in items(study, "RTReferencedSeriesSequence")
    ]


def _unique(datasets: Iterable[Dataset], keyword: str) -> tuple[str, ...]:
    values = (joined_text(dataset, keyword) for dataset in datasets)
    return tuple(dict.fromkeys(value for value in values if value))
