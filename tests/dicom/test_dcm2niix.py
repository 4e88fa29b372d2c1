"""CT and PET series against dcm2niix, voxel by voxel; ``pytest -s`` shows the table.

dcm2niix writes its images with rows turned about; both are compared in one order of voxels.
"""

import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_builders import (
    ORIENTATIONS,
    affine_of,
    build_enhanced,
    build_slices,
    noise,
    write_file,
    write_slices,
)
from dicom_checks import SYNTAXES, read_image

from examples import phantom

dcm2niix = pytest.importorskip("dcm2niix", reason="the oracle dcm2niix is not installed")

DATA = Path(__file__).parents[3] / "shared" / "data"
FLOAT32 = 2**-23
SAME_PLACE_MM = 0.005


# --- comparison ------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def heading():
    """Name the columns of the table."""
    print(f"\n{'series':32} {'grid':>12} {'greatest difference, value':>22} {'apart':>12}", end="")


def by_dcm2niix(folder, out):
    """Return the only image that dcm2niix makes of a folder, but for one freed of its tilt."""
    out.mkdir()
    options = ["-b", "n", "-z", "n", "-f", "image", "-o", out]
    subprocess.run([dcm2niix.bin, *options, folder], check=True, capture_output=True)
    (path,) = (path for path in out.glob("*.nii") if "Tilt" not in path.name)
    return nibabel.load(path)


def assert_agreement(name, folder, out, modality, *, tilted=False):
    """Compare value and place of every voxel, and print a line of the table.

    dcm2niix leaves a tilt of the gantry out of the affine; the slices are compared all the same.
    """
    ours, theirs = read_image(folder, modality), by_dcm2niix(folder, out)
    straight = np.copy(ours.affine)
    if tilted:
        _, column, step = ours.affine[:3, :3].T
        straight[:3, 2] -= step @ column / (column @ column) * column
    values, apart_mm = in_our_order(theirs, straight, ours.data.shape)
    difference = np.abs(values - ours.data.astype(np.float64)).max()
    largest = np.abs(values).max()
    grid = "x".join(map(str, ours.data.shape))
    print(f"\n{name:32} {grid:>12} {difference:9.2g} of {largest:9.6g} {apart_mm:9.1e} mm", end="")
    assert difference <= (0 if ours.data.dtype == np.int16 else FLOAT32 * largest)
    assert apart_mm < SAME_PLACE_MM


def in_our_order(theirs, affine, shape):
    """Return their values in our order of voxels, and the greatest distance of two voxels [mm]."""
    to_theirs = np.linalg.inv(theirs.affine) @ affine
    turn, shift = np.rint(to_theirs[:3, :3]).astype(int), np.rint(to_theirs[:3, 3]).astype(int)
    np.testing.assert_array_equal(np.abs(turn).sum(axis=0), 1)
    np.testing.assert_array_equal(np.abs(turn) @ shape, theirs.shape)
    ours = np.indices(shape).reshape(3, -1)
    there = turn @ ours + shift[:, np.newaxis]
    assert (there >= 0).all()
    places_mm = affine[:3, :3] @ ours + affine[:3, 3:]
    their_places_mm = theirs.affine[:3, :3] @ there + theirs.affine[:3, 3:]
    apart_mm = np.sqrt(((places_mm - their_places_mm) ** 2).sum(axis=0)).max()
    return theirs.get_fdata()[tuple(there)].reshape(shape), apart_mm


# --- the phantom -----------------------------------------------------------------------------


def phantom_slices(modality, affine):
    """Build slices of the demo phantom in HU + 1024, or in 16 bits with a slope each."""
    quantity = {"CT": "hu", "PT": "suv"}[modality]
    study = phantom.DEMO_STUDIES[0]
    grid = phantom.ct_grid(64, 100)
    regions = [*phantom.anatomy(study), *study.lesions]
    values = phantom.sample(grid, regions, quantity)[:, 10:60, ::10]
    if modality == "CT":
        stored = np.clip(values + 1024, 0, 4095).astype(np.uint16)
        return build_slices(stored, affine, intercept=-1024, bits_stored=12)
    slopes = values.max(axis=(0, 1)) * 5000 / np.arange(30000, 30000 + values.shape[2])
    stored = np.rint(values * 5000 / slopes).astype(np.int16)
    return build_slices(stored, affine, "PT", slopes=slopes)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_phantom_in_every_orientation(tmp_path, modality, orientation):
    affine = affine_of(ORIENTATIONS[orientation])
    write_slices(tmp_path / "in", phantom_slices(modality, affine))
    assert_agreement(f"{modality} {orientation}", tmp_path / "in", tmp_path / "out", modality)


@pytest.mark.parametrize("tilt_degrees", [-21, 14.5])
def test_phantom_under_a_tilted_gantry(tmp_path, tilt_degrees):
    affine = affine_of(tilt_degrees=tilt_degrees)
    write_slices(tmp_path / "in", phantom_slices("CT", affine))
    name = f"CT tilted by {tilt_degrees} degrees"
    assert_agreement(name, tmp_path / "in", tmp_path / "out", "CT", tilted=True)


@pytest.mark.parametrize("syntax", [name for name in SYNTAXES if name != "deflated"])
@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_phantom_in_every_transfer_syntax(tmp_path, modality, syntax):
    write_slices(tmp_path / "in", phantom_slices(modality, affine_of()), SYNTAXES[syntax])
    assert_agreement(f"{modality} {syntax}", tmp_path / "in", tmp_path / "out", modality)


@pytest.mark.parametrize(
    ("bits", "signed", "allocated"),
    [(8, False, 8), (10, False, 16), (12, True, 16), (16, False, 16), (16, True, 16),
     (32, True, 32)],
)  # fmt: skip
def test_every_pixel_format(tmp_path, bits, signed, allocated):
    stored = noise((24, 20, 5), bits, signed=signed, allocated=allocated)
    datasets = build_slices(stored, affine_of(), intercept=-1024, bits_stored=bits)
    write_slices(tmp_path / "in", datasets)
    name = f"CT {bits} of {allocated} bits{' signed' * signed}"
    assert_agreement(name, tmp_path / "in", tmp_path / "out", "CT")


@pytest.mark.parametrize("modality", ["CT", "PT"])
def test_one_enhanced_object(tmp_path, modality):
    """With one slope and in order: dcm2niix takes the first frame's slope for all."""
    (tmp_path / "in").mkdir()
    affine = affine_of(ORIENTATIONS["oblique"])
    enhanced = build_enhanced(noise((24, 20, 5), 12), affine, modality, slopes=0.25)
    write_file(tmp_path / "in" / "enhanced.dcm", enhanced)
    assert_agreement(f"enhanced {modality}", tmp_path / "in", tmp_path / "out", modality)


# --- real series -----------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["CT", "PT"])
@pytest.mark.parametrize("study", ["STS_002", "STS_025", "STS_042"])
def test_sarcomas(tmp_path, study, modality):
    folders = sorted((DATA / "sts_dicom" / study).glob(f"*/{modality.replace('PT', 'PET')}"))
    if not folders:
        pytest.skip("the real sarcoma series are not at hand")
    assert_agreement(f"{study} {modality}", folders[0], tmp_path / "out", modality)


@pytest.mark.parametrize("number", range(9))
def test_reference_objects(tmp_path, number):
    folders = sorted(DATA.glob("suv_dro/*/PT"))
    if not folders:
        pytest.skip("the reference objects for SUV are not at hand")
    folder = folders[number]
    assert_agreement(folder.parent.name, folder, tmp_path / "out", "PT")
