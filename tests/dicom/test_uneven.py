"""Masks drawn on unevenly spaced slices: each plane of the even grid is the nearest slice's."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_builders import ORIENTATIONS, affine_of, build_slices, noise, read_series, write_slices
from mask_builders import build_rtstruct, build_seg

from common.dicom.files import DicomFile
from common.dicom.seg import read_seg
from common.dicom.series import stack_slices
from common.dicom.uneven import lies_on_slices, read_mask_of_uneven

GAPS_MM = {
    "two spacings": [3.27] * 4 + [6.54] * 3,
    "an odd last slice": [3.27] * 6 + [1.9],
    "a slice at a table joint": [3.0, 3.0, 1.0, 2.0, 3.0, 3.0, 3.0],
    "rounded to whole mm": [3.0, 3.0, 4.0, 3.0, 3.0, 3.0, 4.0],
}
N_SLICES = 8
SHAPE = (9, 8, N_SLICES)


def write_series(folder, affine, heights_mm):
    """Write slices at heights above the first, along the third axis of an affine."""
    datasets = build_slices(noise(SHAPE), affine)
    step = affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    positions = affine[:3, 3] + np.outer(heights_mm, step)
    for dataset, position in zip(datasets, positions, strict=True):
        dataset.ImagePositionPatient = [f"{mm:.6f}" for mm in position * (-1, -1, 1)]
    write_slices(folder, datasets)
    return positions


def labels_of_slices():
    """A lesion in slices 1 to 5 that shrinks, and a second in slice 6 alone."""
    labels = np.zeros(SHAPE, np.uint8)
    for k in range(1, 6):
        labels[2 : 8 - k // 2, 2:5, k] = 1
    labels[7, 6, 6] = 1
    return labels


def expected_on(stack, heights_mm):
    """Each plane takes the slice that is nearest to its own height."""
    steps = np.linspace(0, heights_mm[-1], stack.shape[2])
    away_mm = np.abs(np.subtract.outer(steps, heights_mm)).round(2)
    nearest = away_mm.argmin(axis=1)
    return labels_of_slices()[:, :, nearest]


def as_rtstruct(affine, positions):
    """Outline each labelled part of each slice half a voxel around it."""
    contours = []
    for k, position in enumerate(positions):
        labels = labels_of_slices()[:, :, k]
        if labels.any():
            i, j = np.nonzero(labels)
            low, high = (i.min() - 0.5, j.min() - 0.5), (i.max() + 0.5, j.max() + 0.5)
            corners = np.array([low, (high[0], low[1]), high, (low[0], high[1])])
            contours.append(position + corners @ affine[:3, :2].T)
    return build_rtstruct({"lesion": contours}, decimals=4)


def as_seg(affine, positions):
    seg = build_seg(labels_of_slices(), affine, ["lesion"])
    for groups in seg.PerFrameFunctionalGroupsSequence:
        plane = groups.PlanePositionSequence[0]
        even_mm = np.array(plane.ImagePositionPatient, float) * (-1, -1, 1) - affine[:3, 3]
        k = round(float(np.linalg.norm(even_mm) / np.linalg.norm(affine[:3, 2])))
        plane.ImagePositionPatient = [f"{mm:.6f}" for mm in positions[k] * (-1, -1, 1)]
    return seg


@pytest.mark.parametrize("orientation", ["axial, head first, supine", "axial, head first, prone",
                                         "oblique"])  # fmt: skip
@pytest.mark.parametrize("build", [as_rtstruct, as_seg])
@pytest.mark.parametrize("gaps_mm", GAPS_MM.values(), ids=GAPS_MM)
def test_each_plane_is_that_of_the_nearest_slice(tmp_path, gaps_mm, build, orientation):
    """A slice at a table joint left 4 ml of 11.5: planes between slices were empty."""
    affine = affine_of(ORIENTATIONS[orientation])
    heights_mm = np.cumsum([0, *gaps_mm])
    positions = write_series(tmp_path / "CT", affine, heights_mm)
    stack = stack_slices(*read_series(tmp_path / "CT"), resample_uneven=True)
    path = tmp_path / "mask.dcm"
    header = build(affine, positions)
    header.save_as(path, enforce_file_format=True)
    file = DicomFile(str(path), "mask.dcm", header, Path(path).stat().st_size)
    assert lies_on_slices(file, stack)
    mask = read_mask_of_uneven(file, stack)
    np.testing.assert_array_equal(mask.affine, stack.affine)
    np.testing.assert_array_equal(mask.labels, expected_on(stack, heights_mm))
    assert mask.warnings == ()


def test_frames_of_one_plane_are_moved_once_and_other_files_keep_their_spacing(tmp_path):
    """Headers that say the same share what was read: moved twice, or without its spacing."""
    affine = affine_of(ORIENTATIONS["axial, head first, supine"])
    heights_mm = np.cumsum([0, *GAPS_MM["two spacings"]])
    positions = write_series(tmp_path / "CT", affine, heights_mm)
    stack = stack_slices(*read_series(tmp_path / "CT"), resample_uneven=True)
    two = np.zeros((*SHAPE, 2), np.uint8)
    two[1:3, 1:4, 3:7, 0], two[5:8, 1:4, 3:7, 1] = 1, 1
    whole = build_seg(two, affine, ["a", "b"])
    path = tmp_path / "mask.dcm"
    whole.save_as(path, enforce_file_format=True)
    expected = read_seg(path)
    seg = pydicom.dcmread(path)
    for groups in seg.PerFrameFunctionalGroupsSequence:
        plane = groups.PlanePositionSequence[0]
        k = round((float(plane.ImagePositionPatient[2]) - affine[2, 3]) / affine[2, 2])
        plane.ImagePositionPatient = [f"{mm:.6f}" for mm in positions[k] * (-1, -1, 1)]
    seg.save_as(tmp_path / "uneven.dcm", enforce_file_format=True)
    file = DicomFile(str(tmp_path / "uneven.dcm"), "uneven.dcm", seg, 1)
    first, second = (read_mask_of_uneven(file, stack).labels for _ in range(2))
    nearest = np.abs(
        np.subtract.outer(np.linspace(0, heights_mm[-1], stack.shape[2]), heights_mm).round(2)
    ).argmin(axis=1)
    np.testing.assert_array_equal(first, (two[..., 0] + 2 * two[..., 1])[:, :, nearest])
    np.testing.assert_array_equal(second, first)
    again = read_seg(path)
    np.testing.assert_array_equal(again.affine, expected.affine)
    assert again.warnings == expected.warnings


@pytest.mark.parametrize("gaps_mm", GAPS_MM.values(), ids=GAPS_MM)
def test_a_seg_on_an_even_grid_of_its_own_does_not_lie_on_uneven_slices(tmp_path, gaps_mm):
    """Read as if it were, it was a plane too long, or refused."""
    affine = affine_of(ORIENTATIONS["oblique"])
    write_series(tmp_path / "CT", affine, np.cumsum([0, *gaps_mm]))
    stack = stack_slices(*read_series(tmp_path / "CT"), resample_uneven=True)
    on_even_grid = np.zeros(stack.shape, np.uint8)
    on_even_grid[2:6, 2:5, 1:-1] = 1
    header = build_seg(on_even_grid, stack.affine, ["lesion"])
    assert not lies_on_slices(DicomFile("mask.dcm", "mask.dcm", header, 1), stack)
