"""The whole chain, from raw project to projections, held against the truth of the demo.

Lesions of the demo are ellipsoids of known place, size and SUV, given in patient coordinates;
nothing here looks into a file between the first and the last.
"""

import csv
import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from skimage import measure

import createproject
import mergeh5
import preprocessing
import project_2d
from examples import phantom

REAL = Path(__file__).parents[2] / "shared" / "data"
ANGLES = (0, 45, 90, 135)
COMPLETE = [study for study in phantom.DEMO_STUDIES if study.mask]
SUV_RANGE = 40
GRID = ["--spacing", 4, 4, 4, "--shape", 100, 100]


def main(script, *arguments):
    return script.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folder of the demo and all that the four scripts make of it."""
    folder = tmp_path_factory.mktemp("chain")
    assert phantom.main([str(folder / "demo"), "--slices", "150", "--noise", "none"]) == 0
    assert main(createproject, folder / "demo", "-o", folder / "demo.zip", "-q", "-j", 1) == 0
    shards = [folder / f"shard{part}_3d.h5" for part in (1, 2)]
    for part, shard in enumerate(shards, start=1):
        options = [*GRID, "--shard", f"{part}/2", "--measures", shard.with_suffix(".csv")]
        assert main(preprocessing, folder / "demo.zip", "-o", shard, "-q", "-j", 1, *options) == 0
    assert main(mergeh5, *shards, "-o", folder / "all_3d.h5") == 0
    angles = ["--angles", 0, 180, 45]
    all_3d, all_2d = folder / "all_3d.h5", folder / "all_2d.h5"
    assert main(project_2d, all_3d, "-o", all_2d, "-q", "-j", 1, *angles) == 0
    return folder


@pytest.fixture(params=COMPLETE, ids=lambda study: f"{study.images}-{study.mask}-{study.study}")
def study(request):
    return request.param


def hash_of(study):
    patient, name = (hashlib.sha256(text.encode()) for text in (study.patient, study.study))
    return patient.hexdigest()[:7] + name.hexdigest()[-3:]


def voxel(affine, point_mm):
    """Where a point lies, in voxels."""
    return (np.linalg.inv(affine) @ (*point_mm, 1))[:3]


def lesions_of(mask, affine):
    """Volume [ml] and centroid [mm] of each connected part of a mask."""
    voxel_ml = abs(np.linalg.det(affine)) / 1000
    return [
        (region.area * voxel_ml, (affine @ (*region.centroid, 1))[:3])
        for region in measure.regionprops(measure.label(mask, connectivity=3))
    ]


def nearest(found, point_mm, place):
    return min(found, key=lambda one: np.linalg.norm(np.subtract(place(one), point_mm)))


def table(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_complete_studies_arrive_under_their_pseudonyms(chain):
    hashes = sorted(map(hash_of, COMPLETE))
    with h5py.File(chain / "all_3d.h5") as file:
        for group in ("image", "mask", "mask_iso"):
            assert sorted(file[group]) == hashes
            assert {data.attrs["project"] for data in file[group].values()} == {"demo"}
    with h5py.File(chain / "all_2d.h5") as file:
        expected = [f"{name}_{angle:03d}" for name in hashes for angle in ANGLES]
        assert sorted(file["image"]) == expected


def test_lesions_are_where_they_were_put_and_as_large(chain, study):
    with h5py.File(chain / "all_3d.h5") as file:
        data = file["mask"][hash_of(study)]
        found = lesions_of(data[0], data.attrs["affine"])
    assert len(found) == len(study.lesions)
    for lesion in study.lesions:
        volume_ml, place_mm = nearest(found, lesion.center_mm, lambda one: one[1])
        # PET voxels are 3.5 x 3.5 x 6.7 mm, those of the grid 4 x 4 x 4 mm.
        assert np.linalg.norm(place_mm - lesion.center_mm) < 3
        assert volume_ml == pytest.approx(lesion.volume_ml, rel=0.12)


def test_isocontour_keeps_hot_lesions_whole(chain, study):
    with h5py.File(chain / "all_3d.h5") as file:
        mask, iso = (file[group][hash_of(study)][0] > 0 for group in ("mask", "mask_iso"))
    assert not (iso & ~mask).any()
    assert iso.sum() > 0.9 * mask.sum()


def inner_voxels(shape, affine, lesion):
    """Voxels in the middle of a lesion, away from its edge, at which splines overshoot."""
    points_mm = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    reach = (points_mm - lesion.center_mm) / (0.4 * np.array(lesion.semi_axes_mm))
    return (reach**2).sum(axis=-1) <= 1


def test_suv_and_hu_are_those_of_the_lesions(chain, study):
    with h5py.File(chain / "all_3d.h5") as file:
        data = file["image"][hash_of(study)]
        pet, ct = data[()].astype(float)
        affine = data.attrs["affine"]
    for lesion in study.lesions:
        inner = inner_voxels(pet.shape, affine, lesion)
        assert inner.sum() > 10
        assert pet[inner].mean() * SUV_RANGE == pytest.approx(lesion.suv, rel=0.04)
        assert pet[inner].max() * SUV_RANGE == pytest.approx(lesion.suv, rel=0.35)
        assert ct[inner].mean() * 2000 - 1000 == pytest.approx(lesion.hu, abs=10)


def test_measures_are_those_of_the_lesions(chain, study):
    rows = [
        row
        for part in (1, 2)
        for row in table(chain / f"shard{part}_3d.csv")
        if row["hash"] == hash_of(study)
    ]
    *lesions, total = rows
    assert len(lesions) == len(study.lesions)
    place = [[float(row[name]) for name in ("x_mm", "y_mm", "z_mm")] for row in lesions]
    for lesion in study.lesions:
        row, _ = nearest(
            list(zip(lesions, place, strict=True)), lesion.center_mm, lambda one: one[1]
        )
        assert float(row["suv_max"]) == pytest.approx(lesion.suv, rel=1e-3)
        assert float(row["mtv_ml"]) == pytest.approx(lesion.volume_ml, rel=0.14)
    centers = np.array([lesion.center_mm for lesion in study.lesions])
    farthest = max(np.linalg.norm(a - b) for a in centers for b in centers)
    assert float(total["dmax_mm"]) == pytest.approx(farthest, abs=3)
    volume_ml = sum(lesion.volume_ml for lesion in study.lesions)
    assert float(total["tmtv_ml"]) == pytest.approx(volume_ml, rel=0.09)
    assert float(total["suv_max"]) == pytest.approx(
        max(lesion.suv for lesion in study.lesions), rel=1e-3
    )
    assert 0 < float(total["dose_fraction"]) < 1


def test_scale_and_mask_of_the_demo_are_not_doubted(chain):
    assert not doubts_in(chain / "all_3d.h5")


def doubts_in(path):
    with h5py.File(path) as file:
        told = [json.loads(image.attrs["warnings"]) for image in file["image"].values()]
    words = (
        "dose fraction out of range", "mask far from uptake", "implausible volume", "may be no HU",
        "may be swapped", "negative values", "missing in the measures", "fall into",
    )  # fmt: skip
    return [text for texts in told for text in texts if any(word in text for word in words)]


@pytest.mark.parametrize("angle", ANGLES)
def test_projected_lesions_are_where_geometry_puts_them(chain, study, angle):
    key = f"{hash_of(study)}_{angle:03d}"
    with h5py.File(chain / "all_3d.h5") as file:
        affine = file["image"][hash_of(study)].attrs["affine"]
        _, nx, ny, _ = file["image"][hash_of(study)].shape
    with h5py.File(chain / "all_2d.h5") as file:
        pet, mask = file["image"][key][0].astype(float), file["mask"][key][0]
        assert list(file["image"][key].attrs["spacing"]) == [4, 4]
    for lesion in study.lesions:
        x, y, z = voxel(affine, lesion.center_mm)
        turn = np.radians(angle)
        column = (
            (nx - 1) / 2 + np.cos(turn) * (x - (nx - 1) / 2) - np.sin(turn) * (y - (ny - 1) / 2)
        )
        pixel = round(column), round(z)
        assert mask[pixel] == 1
        assert pet[pixel] * SUV_RANGE > 0.94 * lesion.suv
        half_width = min(lesion.semi_axes_mm[:2]) / 2
        reach = [round(column + sign * (half_width - 4) / 4) for sign in (-1, 1)]
        assert mask[reach[0] : reach[1] + 1, round(z)].all()
    assert lesion_pixels(study) * 0.6 < mask.sum() < lesion_pixels(study) * 1.3


def lesion_pixels(study):
    """Pixels of 4 x 4 mm that spheres of the lesions' volumes cover, none before another."""
    areas = [np.pi * np.prod(lesion.semi_axes_mm) ** (2 / 3) for lesion in study.lesions]
    return sum(areas) / 16


def test_list_of_slices_names_every_study(chain):
    rows = table(chain / "all_2d.csv")
    assert len(rows) == len(COMPLETE) * len(ANGLES)
    assert {row["hash"] for row in rows} == set(map(hash_of, COMPLETE))


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not here")
def test_dicom_and_nifti_of_the_same_patients_give_the_same_volumes(tmp_path):
    files = []
    for kind, options in (("sts_dicom", []), ("sts_nifti", ["--pet-units", "suv"])):
        archive, output = tmp_path / f"{kind}.zip", tmp_path / f"{kind}.h5"
        arguments = [REAL / kind, "-o", archive, "-q", "-j", 1, "--name", "sts", *options]
        assert main(createproject, *arguments) == 0
        small = ["--shape", 100, 100, "--dtype", "float32"]
        assert main(preprocessing, archive, "-o", output, "-q", "-j", 1, *small) == 0
        files.append(output)
        assert not doubts_in(output)
    with h5py.File(files[0]) as dicom, h5py.File(files[1]) as nifti:
        assert len(dicom["image"]) == 3
        for key in dicom["image"]:
            one, other = dicom["image"][key], nifti["image"][key]
            np.testing.assert_allclose(one.attrs["affine"], other.attrs["affine"], atol=1e-3)
            np.testing.assert_allclose(one[0] * 40, other[0] * 40, atol=1e-4)
            np.testing.assert_allclose(one[1] * 2000, other[1] * 2000, atol=1e-1)
            for group in ("mask", "mask_iso"):
                np.testing.assert_array_equal(dicom[group][key][()], nifti[group][key][()])
