"""project_2d.py, from 3D to 2D files, against scipy.ndimage.rotate and max."""

import csv
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from project_zips import study_images, write_zip
from scipy.ndimage import rotate

import mergeh5
import preprocessing
import project_2d
from common.hdf5 import studies

A, B, C = "aaaaaaa001", "bbbbbbb002", "ccccccc003"
GROUPS = ("image", "mask", "mask_iso")
SMALL = ("--shape", "21", "18")
FEW = ("--angles", "0", "180", "60")


def run(source, output, *options):
    arguments = [source, "-o", output, "--jobs=1", *options]
    return project_2d.main([str(argument) for argument in arguments])


def make(path, images, *options):
    archive = write_zip(path.with_suffix(".zip"), images)
    arguments = [archive, "-o", path, "--jobs", 1, "-q", *SMALL, *options]
    assert preprocessing.main([str(argument) for argument in arguments]) == 0
    return path


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """A 3D file of two studies of different length."""
    folder = tmp_path_factory.mktemp("volumes")
    images = {B: study_images(1, ct_shape=(56, 50, 40)), A: study_images(0)}
    return make(folder / "v.h5", images)


@pytest.fixture(scope="module")
def projected(volumes, tmp_path_factory):
    output = tmp_path_factory.mktemp("projected") / "p.h5"
    assert run(volumes, output, *FEW) == 0
    return output


def test_film_and_still_of_a_study_that_is_gone_leave_their_folders(tmp_path, capsys):
    source, films = tmp_path / "v.h5", tmp_path / "films"
    options = (tmp_path / "p.h5", *FEW, "--gif", films, "--png", films)
    make(source, {A: study_images(0), B: study_images(1)})
    assert run(source, *options) == 0
    (films / f"{A}.txt").touch()
    make(source, {B: study_images(1)})
    before = (films / f"{B}.gif").stat().st_mtime_ns
    assert run(source, *options) == 0
    assert sorted(path.name for path in films.iterdir()) == [f"{A}.txt", f"{B}.gif", f"{B}.png"]
    assert (films / f"{B}.gif").stat().st_mtime_ns == before
    said = capsys.readouterr().err
    assert f"removed with them: {films / A}.gif, {films / A}.png" in said


def by_scipy(volume, angle, order):
    turned = rotate(
        volume.astype(np.float32 if order else np.uint8),
        angle,
        axes=(1, 0),
        reshape=False,
        order=order,
        mode="constant",
        cval=0,
    )
    return turned.max(axis=1)


def assert_equals_scipy(path, volumes, key, angle, name):
    with h5py.File(path) as file, h5py.File(volumes) as source:
        for group, order in zip(GROUPS, (3, 0, 0), strict=True):
            found = file[group][f"{key}_{name}"][()]
            expected = np.stack([by_scipy(v, angle, order) for v in source[group][key][()]])
            if order:
                np.testing.assert_allclose(found, expected.clip(0, 1), rtol=0, atol=1e-3)
            else:
                np.testing.assert_array_equal(found, expected)


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [A, B])
@pytest.mark.parametrize("angle", [0, 60, 120])
def test_projections_are_those_of_scipy(key, angle, volumes, projected):
    assert_equals_scipy(projected, volumes, key, angle, f"{angle:03d}")


def test_angles_have_three_digits_and_a_fraction_where_they_need_it(volumes, tmp_path):
    assert run(volumes, tmp_path / "p.h5", "--angles", "7.5", "100", "27.5") == 0
    with h5py.File(tmp_path / "p.h5") as file:
        names = ["007.5", "035", "062.5", "090"]
        assert sorted(file["image"]) == [f"{key}_{name}" for key in (A, B) for name in names]
    assert_equals_scipy(tmp_path / "p.h5", volumes, A, 62.5, "062.5")


def test_single_precision_and_oblong_planes_are_those_of_scipy(tmp_path):
    source = make(tmp_path / "v.h5", {A: study_images()}, "--dtype=float32", "--shape", 31, 12)
    assert run(source, tmp_path / "p.h5", "--angles", 20, 100, 70) == 0
    with h5py.File(tmp_path / "p.h5") as file:
        assert file["image"][f"{A}_020"].dtype == np.float32
    assert_equals_scipy(tmp_path / "p.h5", source, A, 20, "020")
    assert_equals_scipy(tmp_path / "p.h5", source, A, 90, "090")


def test_half_a_turn_is_a_mirror_image(volumes, tmp_path):
    run(volumes, tmp_path / "p.h5", "--angles", 0, 181, 180)
    with h5py.File(tmp_path / "p.h5") as file:
        for group in GROUPS:
            front, back = (file[group][f"{A}_{angle}"][()] for angle in ("000", "180"))
            np.testing.assert_allclose(front[:, ::-1], back, atol=1e-3)


# --- layout ----------------------------------------------------------------------------------


def test_each_slice_is_a_dataset_with_its_attributes(volumes, projected):
    names = [f"{key}_{angle}" for key in (A, B) for angle in ("000", "060", "120")]
    with h5py.File(projected) as file, h5py.File(volumes) as source:
        assert sorted(file) == sorted(GROUPS)
        for group in GROUPS:
            assert sorted(file[group]) == names
        for name in names:
            key, _, angle = name.partition("_")
            _, n_x, _, n_z = source["image"][key].shape
            assert file["image"][name].shape == (2, n_x, n_z)
            assert file["image"][name].dtype == np.float16
            for group in GROUPS:
                attributes = file[group][name].attrs
                assert attributes["project"] == "proj"
                assert attributes["hash"] == key
                assert attributes["angle"] == float(angle)
                assert list(attributes["spacing"]) == [2, 3]
            for group in GROUPS[1:]:
                assert file[group][name].shape == (1, n_x, n_z)
                assert file[group][name].dtype == np.uint8
        parameters = json.loads(file.attrs["parameters"])
    assert parameters["angles"] == [0, 180, 60]
    assert parameters["suv_range"] == [0, 40]


def read_list(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_list_beside_the_file_names_every_slice(projected):
    rows = read_list(projected.with_suffix(".csv"))
    assert list(rows[0]) == ["number", "hash", "angle", "project", "dataset"]
    assert [row["number"] for row in rows] == [str(n) for n in range(6)]
    with h5py.File(projected) as file:
        assert [row["dataset"] for row in rows] == sorted(file["image"])
    for row in rows:
        assert row["dataset"] == f"{row['hash']}_{row['angle']}"
        assert row["project"] == "proj"


def test_stack_pads_at_the_superior_end_and_names_its_rows(volumes, projected, tmp_path):
    stacked = tmp_path / "s.h5"
    assert run(volumes, stacked, *FEW, "--stack") == 0
    with h5py.File(stacked) as file, h5py.File(projected) as plain:
        keys = [name.decode() for name in file["key"][()]]
        assert keys == sorted(plain["image"])
        assert file["image"].shape == (6, 2, 21, 26)
        assert file["mask"].shape == file["mask_iso"].shape == (6, 1, 21, 26)
        for row, key in enumerate(keys):
            for group in GROUPS:
                expected = plain[group][key][()]
                n_z = expected.shape[-1]
                np.testing.assert_array_equal(file[group][row, ..., :n_z], expected)
                assert not file[group][row, ..., n_z:].any()
        assert {plain["image"][key].shape[-1] for key in keys} == {22, 26}
    rows = read_list(stacked.with_suffix(".csv"))
    assert [(int(row["number"]), row["dataset"]) for row in rows] == list(enumerate(keys))


def test_volumes_of_several_widths_cannot_be_stacked(tmp_path, capsys):
    wide = make(tmp_path / "v.h5", {A: study_images()}, "--shape", 20, 18)
    with h5py.File(wide, "r+") as file:
        for group in GROUPS:
            array = file[group][A][()]
            file[group][B] = np.concatenate([array, array], axis=1)
    assert run(wide, tmp_path / "s.h5", *FEW, "--stack") == 1
    assert "several widths" in capsys.readouterr().err


@pytest.mark.parametrize("compression", ["lzf", "none"])
@pytest.mark.parametrize("stack", [[], ["--stack"]])
def test_compression_changes_no_value(compression, stack, volumes, tmp_path):
    chosen, default = tmp_path / "c.h5", tmp_path / "d.h5"
    assert run(volumes, chosen, *FEW, *stack, "--compression", compression) == 0
    assert run(volumes, default, *FEW, *stack) == 0
    with h5py.File(chosen) as one, h5py.File(default) as other:

        def compare(name, item):
            if isinstance(item, h5py.Dataset) and name != "key":
                np.testing.assert_array_equal(item[()], other[name][()])
                assert item.compression == (None if compression == "none" else compression)

        one.visititems(compare)


# --- runs ------------------------------------------------------------------------------------


def test_jobs_and_shards_do_not_change_what_a_study_gives(volumes, projected, tmp_path):
    script = project_2d.__file__
    command = [sys.executable, script, str(volumes), *FEW, "-q", "--jobs", "2"]
    subprocess.run([*command, "-o", str(tmp_path / "two.h5")], check=True)
    assert (tmp_path / "two.h5").read_bytes() == projected.read_bytes()
    keys = []
    for part in (1, 2):
        shard = tmp_path / f"shard{part}.h5"
        assert run(volumes, shard, *FEW, "--shard", f"{part}/2") == 0
        keys += studies.read_keys(shard)
        assert len(read_list(shard.with_suffix(".csv"))) == len(studies.read_keys(shard))
    with h5py.File(projected) as file:
        assert sorted(keys) == sorted(file["image"])


def test_rerun_projects_what_is_new_or_changed(tmp_path, capsys):
    source, output = tmp_path / "v.h5", tmp_path / "p.h5"

    def summary(images, *options):
        make(source, images)
        capsys.readouterr()
        assert run(source, output, *FEW, *options) == 0
        return capsys.readouterr().out.partition(": ")[2].partition(",")[0]

    first, second = study_images(0), study_images(1)
    assert summary({A: first}) == "1 written"
    before = output.stat().st_mtime_ns
    assert summary({A: first}) == "0 written"
    assert output.stat().st_mtime_ns == before
    assert summary({A: first, B: second}) == "1 written"
    assert summary({A: second, B: second}) == "1 written"
    assert summary({B: second}) == "0 written"
    assert {key.partition("_")[0] for key in studies.read_keys(output)} == {B}
    assert {row["hash"] for row in read_list(output.with_suffix(".csv"))} == {B}
    assert summary({B: second}, "--angles", 0, 180, 90) == "1 written"
    assert summary({B: second}, "--stack") == "1 written"
    assert summary({B: second}, "--stack") == "0 written"
    assert summary({B: second, C: first}, "--stack") == "1 written"
    with h5py.File(output) as file:
        assert file["image"].shape[0] == 6


def test_missing_list_is_written_again(volumes, tmp_path):
    output = tmp_path / "p.h5"
    run(volumes, output, *FEW)
    expected = output.with_suffix(".csv").read_bytes()
    output.with_suffix(".csv").unlink()
    run(volumes, output, *FEW)
    assert output.with_suffix(".csv").read_bytes() == expected


def test_damaged_study_fails_and_the_others_are_projected(volumes, tmp_path, capsys):
    source = tmp_path / "v.h5"
    source.write_bytes(volumes.read_bytes())
    with h5py.File(source, "r+") as file:
        file["mask"][A][0, 5, 5, 5] = 1 - file["mask"][A][0, 5, 5, 5]
    assert run(source, tmp_path / "p.h5", *FEW) == 3
    out, err = capsys.readouterr()
    assert "2 studies: 1 written, 0 unchanged, 0 skipped, 1 failed" in out
    assert f"error: {A}: mask is damaged in the HDF5 file (checksum)" in err
    assert {key.partition("_")[0] for key in studies.read_keys(tmp_path / "p.h5")} == {B}


def test_pictures_show_each_study(volumes, tmp_path):
    gifs, pngs = tmp_path / "gif", tmp_path / "png"
    assert run(volumes, tmp_path / "p.h5", *FEW, "--gif", gifs, "--png", pngs) == 0
    for key in (A, B):
        with Image.open(pngs / f"{key}.png") as still, Image.open(gifs / f"{key}.gif") as film:
            # 21 x 2 mm wide, 22 or 26 slices of 3 mm high, enlarged; a bar of SUVs beside it.
            width = 21 * 2 * 400 / ((22 if key == A else 26) * 3)
            assert still.size == film.size == (round(width) + 44, 400)
            assert film.n_frames == 6


WRONG = {
    "empty range": ["--angles", "90", "90", "5"],
    "no step": ["--angles", "0", "180", "0"],
    "backwards": ["--angles", "0", "180", "-5"],
    "not a number": ["--angles", "0", "nan", "5"],
    "below zero": ["--angles", "-10", "180", "5"],
    "too fine": ["--angles", "0", "180", "0.0000001"],
    "compression": ["--compression", "zip"],
    "gif is a file": ["--gif", "FILE"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_end_with_status_2(name, volumes, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = [tmp_path / "file" if word == "FILE" else word for word in WRONG[name]]
    with pytest.raises(SystemExit) as ending:
        run(volumes, tmp_path / "p.h5", *options)
    assert ending.value.code == 2
    assert not (tmp_path / "p.h5").exists()


def test_projections_are_not_projected_again(projected, tmp_path, capsys):
    assert run(projected, tmp_path / "p.h5") == 1
    assert "holds projections already" in capsys.readouterr().err


def test_what_is_no_hdf5_leaves_the_old_output(volumes, tmp_path, capsys):
    source, output = tmp_path / "v.h5", tmp_path / "p.h5"
    source.write_bytes(volumes.read_bytes())
    run(source, output, *FEW)
    before = output.read_bytes()
    source.write_bytes(b"no HDF5")
    assert run(source, output, *FEW) == 1
    assert "v.h5: not an HDF5 file" in capsys.readouterr().err
    assert output.read_bytes() == before


# --- labels ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A 3D file of label values, those of one study beyond 255."""
    one, other = study_images(0), study_images(1)
    large = other["mask"].get_fdata().astype(np.uint16) * 150
    other["mask"] = type(other["mask"])(large, other["mask"].affine)
    folder = tmp_path_factory.mktemp("labelled")
    return make(folder / "v.h5", {A: one, B: other}, "--labels", "keep")


def test_labels_are_projected_the_greatest_in_front(labelled, tmp_path):
    pictures = ["--png", tmp_path / "png", "--gif", tmp_path / "gif"]
    assert run(labelled, tmp_path / "p.h5", *FEW, *pictures) == 0
    with h5py.File(tmp_path / "p.h5") as file, h5py.File(labelled) as source:
        for key, labels in ((A, {0, 1, 2}), (B, {0, 150, 300})):
            for group in ("mask", "mask_iso"):
                found = file[group][f"{key}_060"]
                assert found.dtype == source[group][key].dtype
                assert set(np.unique(found[()])) == labels
                turned = rotate(source[group][key][0], 60, axes=(1, 0), reshape=False, order=0)
                np.testing.assert_array_equal(found[0], turned.max(axis=1))
    assert mergeh5.main(["--verify", str(tmp_path / "p.h5"), str(labelled)]) == 0


def test_a_stack_of_labels_has_masks_of_one_type(labelled, tmp_path):
    assert run(labelled, tmp_path / "s.h5", *FEW, "--stack") == 0
    assert run(labelled, tmp_path / "p.h5", *FEW) == 0
    with h5py.File(tmp_path / "s.h5") as stack, h5py.File(tmp_path / "p.h5") as plain:
        for row, key in enumerate(stack["key"].asstr()):
            for group in ("mask", "mask_iso"):
                assert stack[group].dtype == np.uint16
                np.testing.assert_array_equal(stack[group][row], plain[group][key][()])
    assert mergeh5.main(["--verify", str(tmp_path / "s.h5")]) == 0


def test_labels_and_masks_of_0_and_1_are_not_merged_unless_allowed(labelled, volumes, tmp_path):
    merge = [str(path) for path in (labelled, volumes, "-o", tmp_path / "m.h5")]
    merge += ["--on-duplicate", "skip"]
    assert mergeh5.main(merge) == 1
    assert mergeh5.main([*merge, "--allow-mixed"]) == 0
    assert mergeh5.main(["--verify", str(tmp_path / "m.h5")]) == 0
