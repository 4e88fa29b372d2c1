"""Where the frames of a DICOM segmentation lie: an evenly spaced stack, absent planes included.

Knows pydicom. A SEG may hold the planes alone that have a label, and state no spacing or a wrong
one: which planes are absent is told by its header, by the image it was drawn on, or by the planes.
DICOM's LPS coordinates end here: affines are RAS+.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from common.dicom.attributes import functional_group, tag_of, to_ras, whole_number
from common.errors import Kind, StudyError, Warning
from common.geometry import SAME_VOXEL, Grid, inverse

POSITION_TOLERANCE = 0.1
"""Distance of a plane from the evenly spaced grid [slice spacings]: as for image series."""

SAME_PLANE_MM = 0.01
"""Frames of several segments repeat the position of their plane, rounded differently at worst."""

ON_SLICES = 0.02
"""Distance [slice spacings] from an image's slices for planes of other pixels to lie on them."""

SEEN, SEEN_AND_AGREED = 4, 2
"""Gaps as wide as the declared spacing that confirm it: alone, or together with the thickness."""

FAR_APART = 1.5
"""Times the slice spacing of PET and CT from which on planes are hardly those of one lesion."""

ORIENTATION_TOLERANCE = 2e-3
"""Direction cosines are often written with 3 or 4 decimals."""

LARGEST_MM, SMALLEST_MM = 1e4, 1e-3
"""Beyond 10 m from the origin, and for spacings below 1 um, numbers are damaged."""

FloatArray = NDArray[np.float64]


class FramePlaces(NamedTuple):
    """Where the frames of a SEG lie."""

    slice_of_frame: NDArray[np.intp]
    n_slices: int
    affine: FloatArray
    warnings: list[Warning]


def place_frames(
    dataset: Dataset,
    frames: Sequence[Dataset],
    images: Sequence[Grid] = (),
    *,
    is_of_images: bool = False,
) -> FramePlaces:
    """Place the frames on an evenly spaced stack of slices, absent planes included.

    Parameters
    ----------
    dataset : pydicom.Dataset
        The segmentation.
    frames : sequence of pydicom.Dataset
        The functional groups of each frame's own.
    images : sequence of Grid
        What the segmentation may have been drawn on, the likeliest first. Where the planes lie
        on slices of one, these tell which planes are absent.
    is_of_images : bool
        Whether it can't be of another reconstruction, whose slices may be further apart.

    Raises
    ------
    StudyError
        They form no regular volume.
    """
    measures = group_of_frames(dataset, frames, "PixelMeasuresSequence")
    row_mm, column_mm = _common([_numbers(item, "PixelSpacing", 2) for item in measures], 0.01)
    cosines = _common(
        [
            _numbers(item, "ImageOrientationPatient", 6)
            for item in group_of_frames(dataset, frames, "PlaneOrientationSequence")
        ],
        ORIENTATION_TOLERANCE,
    ).reshape(2, 3)
    skew = abs(cosines @ cosines.T - np.eye(2)).max()
    if skew > ORIENTATION_TOLERANCE or min(row_mm, column_mm) < SMALLEST_MM:
        raise StudyError(
            f"the SEG's axes are not perpendicular ({tag_of('ImageOrientationPatient')}) or its "
            f"{tag_of('PixelSpacing')} is not positive: export it again"
        )
    positions = np.array(
        [
            _numbers(item, "ImagePositionPatient", 3)
            for item in group_of_frames(dataset, frames, "PlanePositionSequence")
        ]
    )
    normal = np.cross(*cosines)
    axes_mm = cosines * [[column_mm], [row_mm]]
    n_pixels = (whole_number(dataset, "Columns"), whole_number(dataset, "Rows"))
    found = (_on_slices_of(image, positions, axes_mm, n_pixels) for image in images)
    on_slices = [each for each in found if each is not None]
    drawn_on = next((each for each in on_slices if each.same_pixels), None)
    plane_of_frame, plane_mm = _planes(positions @ normal)
    is_coarser = not is_of_images and _is_seen(np.diff(plane_mm), measures[0])
    if drawn_on is not None and not is_coarser:
        slice_of_frame, spacing_mm = drawn_on.slice_of_frame, drawn_on.spacing_mm
        notes = _contradiction(_positive(measures[0], "SpacingBetweenSlices"), spacing_mm)
    else:
        slices_mm = [each.spacing_mm for each in on_slices if each.off <= ON_SLICES]
        slice_of_plane, spacing_mm, notes = _slices(plane_mm, measures[0], slices_mm)
        slice_of_frame = slice_of_plane[plane_of_frame]
        notes += _thicker_than_slices(np.diff(slice_of_plane), spacing_mm, measures[0], images)
    first, last = slice_of_frame.argmin(), slice_of_frame.argmax()
    n_steps = int(slice_of_frame[last])
    # Not along the normal where the gantry was tilted.
    step = (positions[last] - positions[first]) / n_steps if n_steps else normal * spacing_mm
    off_grid_mm = np.linalg.norm(
        positions - positions[first] - slice_of_frame[:, np.newaxis] * step, axis=1
    )
    if off_grid_mm.max() > POSITION_TOLERANCE * spacing_mm:
        raise StudyError(
            f"the SEG's frames are shifted against each other ({tag_of('ImagePositionPatient')}): "
            "give the mask as NIfTI"
        )
    affine = np.eye(4)
    affine[:3] = to_ras(np.array([*axes_mm, step, positions[first]])).T
    return FramePlaces(
        slice_of_frame, n_steps + 1, affine, [Warning(Kind.MASK, note) for note in notes]
    )


def group_of_frames(dataset: Dataset, frames: Sequence[Dataset], keyword: str) -> list[Dataset]:
    """Return a functional group for each frame.

    Raises
    ------
    StudyError
        A frame has none.
    """
    groups = [functional_group(dataset, frame, keyword) for frame in frames]
    present = [group for group in groups if group is not None]
    if len(present) < len(frames):
        raise StudyError(f"the SEG has frames without {tag_of(keyword)}: give the mask as NIfTI")
    return present


def _planes(along_mm: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
    """Return the plane of each frame, and each plane's position along the normal, ascending."""
    order = np.argsort(along_mm, kind="stable")
    starts = np.diff(along_mm[order], prepend=-np.inf) > SAME_PLANE_MM
    plane_of_frame = np.empty(len(order), dtype=np.intp)
    plane_of_frame[order] = np.cumsum(starts) - 1
    return plane_of_frame, along_mm[order][starts]


class _OnSlices(NamedTuple):
    """The frames of a SEG as slices of an image."""

    slice_of_frame: NDArray[np.intp]  # from the lowest on, along the SEG's normal
    spacing_mm: float
    off: float
    """Largest distance from a slice [slice spacings]."""
    same_pixels: bool


def _on_slices_of(
    image: Grid, positions: FloatArray, axes_mm: FloatArray, n_pixels: tuple[int, int]
) -> _OnSlices | None:
    """Find the slices of an image on which all frames lie; None if they don't."""
    to_image = inverse(image.affine)
    first = to_ras(positions) @ to_image[:3, :3].T + to_image[:3, 3]
    extent = np.subtract(n_pixels, 1)[:, np.newaxis]
    across = (to_ras(axes_mm) * extent) @ to_image[:3, :3].T
    nearest = np.rint(first)
    slices = nearest[:, 2].astype(np.intp)
    off = float(np.abs(first[:, 2] - slices).max())
    inside = slices.min() >= 0 and slices.max() < image.shape[2]
    if np.abs(across[:, 2]).max() > SAME_VOXEL or off > SAME_VOXEL or not inside:
        return None
    step_mm = float(
        to_ras(np.cross(*axes_mm)) @ image.affine[:3, 2] / np.linalg.norm(np.cross(*axes_mm))
    )
    if step_mm < 0:
        slices = -slices
    # Rows and columns may run the other way, or be exchanged.
    lengths = np.abs(across[:, :2])
    off_pixels = max(
        min(np.abs(lengths - axes * extent).max() for axes in (np.eye(2), np.eye(2)[::-1])),
        np.abs(first[:, :2] - nearest[:, :2]).max(),
    )
    return _OnSlices(slices - slices.min(), abs(step_mm), off, bool(off_pixels <= SAME_VOXEL))


def _slices(
    plane_mm: FloatArray, measures: Dataset, image_mm: Sequence[float]
) -> tuple[NDArray[np.intp], float, list[str]]:
    """Number the slices on which the planes lie; return also the spacing [mm] and notes.

    Which planes are absent is told by a spacing that is declared and equals the thickness or is
    seen; by the slices of an image on which the planes lie, `image_mm` apart; by the thickness;
    by the spacing that is declared alone. Planes alone may be of lesions far apart: only where
    most of them are neighbours do they tell.
    """
    declared_mm = _positive(measures, "SpacingBetweenSlices")
    thickness_mm = _positive(measures, "SliceThickness")
    gaps_mm = np.diff(plane_mm)
    candidates: list[tuple[float | None, str]] = []
    is_agreed = declared_mm and thickness_mm and _alike(thickness_mm, declared_mm)
    if is_agreed or _is_seen(gaps_mm, measures):
        candidates.append((declared_mm, ""))
    candidates += [(mm, "the slices of the image that the planes lie on") for mm in image_mm]
    by_header = [(thickness_mm, tag_of("SliceThickness")), (declared_mm, "")]
    # A thickness may be that of the beam; nothing contradicts the spacing of a single plane.
    candidates += by_header if gaps_mm.size else by_header[::-1]
    if gaps_mm.size and np.mean([_alike(gap, gaps_mm.min()) for gap in gaps_mm]) > 0.5:
        candidates.append((float(gaps_mm.min()), "the planes") if len(gaps_mm) > 1 else (None, ""))
    for candidate_mm, source in candidates:
        if candidate_mm is None:
            continue
        # Gap by gap: small deviations of real tables must not add up along the stack.
        steps = np.rint(gaps_mm / candidate_mm).astype(np.intp)
        slice_of_plane = np.concatenate([[0], np.cumsum(steps)])
        n_steps = int(slice_of_plane[-1])
        spacing_mm = float((plane_mm[-1] - plane_mm[0]) / n_steps) if n_steps else candidate_mm
        off_mm = abs(plane_mm - plane_mm[0] - slice_of_plane * spacing_mm).max()
        if (
            steps.min(initial=1) > 0
            and _alike(spacing_mm, candidate_mm)
            and off_mm <= POSITION_TOLERANCE * spacing_mm
        ):
            return (
                slice_of_plane,
                spacing_mm,
                _spacing_notes(steps, spacing_mm, declared_mm, source),
            )
    if declared_mm or thickness_mm or len(gaps_mm) > 1:
        raise StudyError(
            f"the SEG's planes are not evenly spaced ({tag_of('ImagePositionPatient')}): "
            "give the mask as NIfTI"
        )
    raise StudyError(
        f"nothing tells the spacing of the SEG's {len(plane_mm)} plane(s): it has neither "
        f"{tag_of('SpacingBetweenSlices')} nor {tag_of('SliceThickness')}, and they lie on no "
        "slices of PET or CT: give the mask as NIfTI"
    )


def _is_seen(gaps_mm: FloatArray, measures: Dataset) -> bool:
    """Tell whether planes lie as far apart as is declared, and not by chance.

    Some writers declare the gap between two lesions. But slices of another reconstruction may be
    twice as far apart as those of the image at hand.
    """
    declared_mm = _positive(measures, "SpacingBetweenSlices")
    if declared_mm is None:
        return False
    thickness_mm = _positive(measures, "SliceThickness")
    is_agreed = thickness_mm is not None and _alike(thickness_mm, declared_mm)
    n_seen = sum(_alike(gap, declared_mm) for gap in gaps_mm)
    return n_seen >= (SEEN_AND_AGREED if is_agreed else SEEN)


def _alike(one_mm: float, other_mm: float) -> bool:
    return abs(one_mm - other_mm) <= POSITION_TOLERANCE * other_mm


def _spacing_notes(
    steps: NDArray[np.intp], spacing_mm: float, declared_mm: float | None, source: str
) -> list[str]:
    if source and declared_mm is None:
        keyword = tag_of("SpacingBetweenSlices")
        return [f"{keyword} is absent: spacing of {spacing_mm:.3f} mm from {source}"]
    if source:
        return _contradiction(declared_mm, spacing_mm)
    if steps.min(initial=2) > 1 and steps.size:
        return [
            f"no two planes are neighbours by {tag_of('SpacingBetweenSlices')}, "
            f"{spacing_mm:.3f} mm: taken as sparse"
        ]
    return []


def _contradiction(declared_mm: float | None, spacing_mm: float) -> list[str]:
    if declared_mm is None or _alike(spacing_mm, declared_mm):
        return []
    return [
        f"{tag_of('SpacingBetweenSlices')} is wrong, {declared_mm:.3f} mm: the planes lie "
        f"on a grid of {spacing_mm:.3f} mm"
    ]


def _thicker_than_slices(
    steps: NDArray[np.intp], spacing_mm: float, measures: Dataset, images: Sequence[Grid]
) -> list[str]:
    """Warn of planes that are neighbours by the declared spacing alone, far apart as they lie."""
    widest_mm = max((image.spacing_mm[2] for image in images), default=np.inf)
    if (
        _positive(measures, "SliceThickness") is not None
        or not steps.size
        or steps.max() > 1
        or spacing_mm <= FAR_APART * widest_mm
    ):
        return []
    return [
        f"the planes are {spacing_mm:.3f} mm apart and taken as neighbours, as "
        f"{tag_of('SpacingBetweenSlices')} says alone, but slices of PET and CT are at most "
        f"{widest_mm:.3f} mm apart: check that they are not single planes of separate lesions"
    ]


def _positive(item: Dataset, keyword: str) -> float | None:
    """Return a length [mm] without its sign (some spacings are negative); None if absent or 0."""
    if item.get(keyword) is None:
        return None
    value = abs(float(_numbers(item, keyword, 1)[0]))
    return value if value >= SMALLEST_MM else None


def _numbers(item: Dataset, keyword: str, count: int) -> FloatArray:
    if item.get(keyword) is None:
        raise StudyError(
            f"a value is missing in the SEG ({tag_of(keyword)}): export the mask again"
        )
    try:
        numbers = np.atleast_1d(np.array(item.get(keyword), dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise StudyError(f"{tag_of(keyword)} is not a number: export the mask again") from error
    if numbers.shape != (count,) or not (abs(numbers) < LARGEST_MM).all():
        raise StudyError(
            f"{tag_of(keyword)} is not {count} plausible number(s): export the mask again"
        )
    return numbers


def _common(values: Sequence[FloatArray], tolerance: float) -> FloatArray:
    """Return the first of values that must agree in all frames."""
    if np.ptp(values, axis=0).max() > tolerance:
        raise StudyError(
            f"the SEG's frames differ in {tag_of('ImageOrientationPatient')} or "
            f"{tag_of('PixelSpacing')}: give the mask as NIfTI"
        )
    return values[0]
