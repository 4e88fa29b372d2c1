"""mergeh5.py: copies, links, duplicates, compatibility, splits, verifying."""

import csv
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from project_zips import study_images, write_zip
from scipy import ndimage

import mergeh5
import preprocessing
import project_2d
from common.report import verification
from common.report.case_table import COLUMNS, case_rows
from common.run.output import write_table

A, B, C, D = "aaaaaaa001", "aaaaaaa002", "ccccccc003", "ddddddd004"
GROUPS = ("image", "mask", "mask_iso")
SMALL = ("--shape", "20", "18")


def run(*arguments):
    return mergeh5.main([str(argument) for argument in arguments])


def make(path, studies, *options, records=None):
    """A 3D file of studies, each a hash and the seed of its images."""
    images = {key: study_images(seed) for key, seed in studies.items()}
    archive = write_zip(path.with_suffix(".zip"), images, f"{path.stem}/", records)
    arguments = [archive, "-o", path, "--jobs", 1, "-q", *SMALL, *options]
    assert preprocessing.main([str(argument) for argument in arguments]) == 0
    return path


def project(path, *options):
    output = path.with_name(f"{path.stem}_2d.h5")
    arguments = [path, "-o", output, "--jobs", 1, "-q", "--angles", 0, 180, 60, *options]
    assert project_2d.main([str(argument) for argument in arguments]) == 0
    return output


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Files of several kinds, to be copied from and never written to."""
    folder = tmp_path_factory.mktemp("made")
    files = {
        "one": make(folder / "one.h5", {A: 0, B: 1}),
        "two": make(folder / "two.h5", {C: 2, D: 3}),
        "other": make(folder / "other.h5", {A: 7}),
        "coarse": make(folder / "coarse.h5", {C: 2}, "--spacing", 4, 4, 4),
        "lzf": make(folder / "lzf.h5", {C: 2}, "--compression", "lzf"),
        "long": make(folder / "long.h5", {C: 2}, "--shape", 20, 18, 9),
    }
    return files | {"one 2d": project(files["one"]), "two 2d": project(files["two"])}


@pytest.fixture
def inputs(made, tmp_path):
    """The same files, free to be changed."""
    (tmp_path / "in").mkdir()
    return {name: Path(shutil.copy(path, tmp_path / "in")) for name, path in made.items()}


@pytest.fixture
def output(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "all.h5"


def assert_holds(path, sources):
    with h5py.File(path) as file:
        assert sorted(file) == sorted(GROUPS)
        for group in GROUPS:
            assert sorted(file[group]) == sorted(sources)
        for (key, source), group in itertools.product(sources.items(), GROUPS):
            with h5py.File(source) as original:
                np.testing.assert_array_equal(file[group][key][()], original[group][key][()])
                found = {k: str(v) for k, v in file[group][key].attrs.items()}
                assert found == {k: str(v) for k, v in original[group][key].attrs.items()}
                assert file[group][key].chunks == original[group][key].chunks


# --- copying ---------------------------------------------------------------------------------


def test_every_study_is_copied_with_its_attributes(inputs, output, capsys):
    one, two = inputs["one"], inputs["two"]
    assert run(one, two, "-o", output) == 0
    expected = "4 studies: 4 written, 0 unchanged, 0 skipped, 0 failed"
    assert capsys.readouterr().out == f"{expected} -> {output}\n"
    assert_holds(output, {A: one, B: one, C: two, D: two})
    assert sorted(path.name for path in output.parent.iterdir()) == ["all.h5"]


def test_order_of_inputs_does_not_change_a_byte(inputs, output, tmp_path):
    run(inputs["one"], inputs["two"], "-o", output)
    run(inputs["two"], inputs["one"], "-o", tmp_path / "other_order.h5")
    assert output.read_bytes() == (tmp_path / "other_order.h5").read_bytes()


def test_shards_merge_to_the_unsharded_file(tmp_path):
    whole = make(tmp_path / "whole.h5", {A: 0, B: 1, C: 2, D: 3})
    shards = []
    for part in (1, 2, 3):
        shard = tmp_path / f"shard{part}.h5"
        arguments = [tmp_path / "whole.zip", "-o", shard, "-q", *SMALL, "--shard", f"{part}/3"]
        assert preprocessing.main([str(argument) for argument in arguments]) == 0
        shards.append(shard)
    assert run(*reversed(shards), "-o", tmp_path / "all.h5") == 0
    assert (tmp_path / "all.h5").read_bytes() == whole.read_bytes()


def test_projections_merge_the_same_way(inputs, output, capsys):
    one, two = inputs["one 2d"], inputs["two 2d"]
    assert run(one, two, "-o", output) == 0
    assert "4 studies: 4 written" in capsys.readouterr().out
    keys = {f"{key}_{angle}": one for key in (A, B) for angle in ("000", "060", "120")}
    keys |= {f"{key}_{angle}": two for key in (C, D) for angle in ("000", "060", "120")}
    assert_holds(output, keys)


def test_second_run_changes_nothing(inputs, output, capsys):
    run(inputs["one"], inputs["two"], "-o", output)
    before = output.stat()
    capsys.readouterr()
    assert run(inputs["two"], inputs["one"], "-o", output) == 0
    assert "0 written, 4 unchanged" in capsys.readouterr().out
    assert output.stat().st_mtime_ns == before.st_mtime_ns
    assert run(inputs["two"], inputs["one"], "-o", output, "--force") == 0
    assert "4 written" in capsys.readouterr().out
    assert run(inputs["one"], "-o", output) == 1
    assert run(inputs["one"], "-o", output, "--allow-shrink") == 0
    assert_holds(output, {A: inputs["one"], B: inputs["one"]})


# --- what fits -------------------------------------------------------------------------------


def test_a_study_of_which_an_older_version_told_less_is_the_same(inputs, output, tmp_path):
    older = Path(shutil.copy(inputs["one"], tmp_path / "older.h5"))

    def forget(data):
        for name in ("ct_spacing", "pet_spacing", "attributes_sha256"):
            del data.attrs[name]

    changed(older, "image", A, forget)
    assert run(older, inputs["one"], "-o", output) == 0
    assert_holds(output, {A: older, B: inputs["one"]})


def test_other_options_are_refused_unless_allowed(inputs, output, capsys):
    assert run(inputs["one"], inputs["coarse"], "-o", output) == 1
    error = capsys.readouterr().err
    assert "coarse.h5: made with other options than" in error
    assert "spacing: [4.0, 4.0, 4.0], not [2.0, 2.0, 3.0]" in error
    assert not output.exists()
    assert run(inputs["one"], inputs["coarse"], "-o", output, "--allow-mixed") == 0
    assert_holds(output, {A: inputs["one"], B: inputs["one"], C: inputs["coarse"]})
    with h5py.File(output) as file:
        parameters = json.loads(file.attrs["parameters"])
    assert parameters["spacing"] == "mixed"
    assert parameters["orientation"] == "LAS"
    assert run("--verify", output) == 0


def of_type(path, suv_type):
    """Make the images of a file such as those of a zip whose SUV is of another type."""
    with h5py.File(path, "r+") as file:
        for dataset in file["image"].values():
            dataset.attrs["suv_type"] = suv_type


def test_images_of_other_suv_types_are_refused_unless_allowed(inputs, output, capsys):
    """They were merged without a word: SUVlbm beside SUVbw."""
    of_type(inputs["one"], "bw")
    assert run(inputs["one"], inputs["two"], "-o", output) == 0, "a type that is unknown"
    of_type(inputs["two"], "lbm-janma")
    assert run(inputs["one"], inputs["two"], "-o", output) == 1
    assert "two.h5: SUV is of type 'lbm-janma', not 'bw' as in" in capsys.readouterr().err
    assert run(inputs["one"], inputs["two"], "-o", output, "--allow-mixed") == 0


def test_other_length_along_z_fits(inputs, output):
    assert run(inputs["one"], inputs["long"], "-o", output) == 0
    assert_holds(output, {A: inputs["one"], B: inputs["one"], C: inputs["long"]})
    with h5py.File(output) as file:
        assert json.loads(file.attrs["parameters"])["shape"] == [20, 18, None]


def test_other_compression_fits(inputs, output):
    assert run(inputs["one"], inputs["lzf"], "-o", output) == 0
    with h5py.File(output) as file:
        assert file["image"][A].compression == "gzip"
        assert file["image"][C].compression == "lzf"


@pytest.mark.parametrize("allow", [[], ["--allow-mixed"]])
def test_volumes_and_projections_never_mix(inputs, output, capsys, allow):
    assert run(inputs["one"], inputs["two 2d"], "-o", output, *allow) == 1
    assert "give one kind" in capsys.readouterr().err


# --- duplicates ------------------------------------------------------------------------------


def test_same_study_with_other_content_stops_before_anything_is_written(inputs, output, capsys):
    assert run(inputs["one"], inputs["other"], "-o", output) == 1
    error = capsys.readouterr().err
    assert f"study {A} is in " in error
    assert "--on-duplicate" in error
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(("choice", "winner"), [("skip", "one"), ("replace", "other")])
def test_first_or_last_file_wins(choice, winner, inputs, output):
    assert run(inputs["one"], inputs["other"], "-o", output, "--on-duplicate", choice) == 0
    assert_holds(output, {A: inputs[winner], B: inputs["one"]})


def test_a_voxel_that_was_changed_in_place_is_other_content(inputs, output, tmp_path, capsys):
    edited = shutil.copy(inputs["one"], tmp_path / "edited.h5")
    with h5py.File(edited, "r+") as file:
        file["image"][A][0, 0, 0, 0] = 0.5
    assert run(inputs["one"], edited, "-o", output) == 1
    assert f"study {A} is in " in capsys.readouterr().err


def test_same_content_is_no_duplicate(inputs, output, tmp_path):
    twin = shutil.copy(inputs["one"], tmp_path / "twin.h5")
    assert run(inputs["one"], twin, inputs["one"], "-o", output) == 0
    assert_holds(output, {A: twin, B: twin})


def test_same_content_compressed_otherwise_is_no_duplicate(inputs, output):
    lzf = inputs["lzf"]
    with h5py.File(lzf, "r+") as file:
        for group in GROUPS:
            file[group][C].attrs["project"] = "two"
    assert run(inputs["two"], lzf, "-o", output) == 0


# --- links -----------------------------------------------------------------------------------


def test_linked_folder_may_move_and_plain_h5py_reads_it(inputs, tmp_path, capsys):
    folder = tmp_path / "in"
    assert run(inputs["one"], inputs["two"], "-o", folder / "index.h5", "--link") == 0
    assert "4 studies: 4 written" in capsys.readouterr().out
    assert (folder / "index.h5").stat().st_size < 30_000
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    one, two = moved / "one.h5", moved / "two.h5"
    assert_holds(moved / "index.h5", {A: one, B: one, C: two, D: two})
    assert run("--verify", moved / "index.h5") == 0
    assert run(one, two, "-o", moved / "index.h5", "--link") == 0
    assert "4 unchanged" in capsys.readouterr().out


def test_index_is_input_like_any_file(inputs, output, tmp_path):
    index = tmp_path / "in" / "index.h5"
    run(inputs["one"], inputs["two"], "-o", index, "--link")
    assert run(index, "-o", output) == 0
    direct = tmp_path / "direct.h5"
    run(inputs["one"], inputs["two"], "-o", direct)
    assert output.read_bytes() == direct.read_bytes()
    again = tmp_path / "again.h5"
    assert run(index, "-o", again, "--link") == 0
    assert_holds(again, {A: inputs["one"], C: inputs["two"], B: inputs["one"], D: inputs["two"]})


def test_index_becomes_a_copy_and_back(inputs, output, capsys):
    run(inputs["one"], "-o", output, "--link")
    assert run(inputs["one"], "-o", output) == 0
    assert "2 written" in capsys.readouterr().out
    with h5py.File(output) as file:
        assert isinstance(file["image"].get(A, getlink=True), h5py.HardLink)


def test_index_whose_files_are_gone_is_refused(inputs, output, tmp_path, capsys):
    index = tmp_path / "in" / "index.h5"
    run(inputs["one"], "-o", index, "--link")
    (tmp_path / "in" / "one.h5").unlink()
    assert run(index, "-o", output) == 1
    assert "index.h5" in capsys.readouterr().err
    assert not output.exists()


def test_index_takes_no_file_of_the_working_directory_instead(
    inputs, output, tmp_path, capsys, monkeypatch
):
    index = tmp_path / "in" / "index.h5"
    run(inputs["one"], "-o", index, "--link")
    (tmp_path / "elsewhere").mkdir()
    inputs["one"].rename(tmp_path / "elsewhere" / "one.h5")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(index, "-o", output) == 1
    assert "index.h5: links to 'one.h5', which is not there" in capsys.readouterr().err
    assert run("--verify", index) != 0
    assert not output.exists()


# --- splits ----------------------------------------------------------------------------------


def test_splits_part_whole_patients_into_train_and_validation(inputs, output, tmp_path):
    lists = tmp_path / "splits"
    arguments = [inputs["one"], inputs["two"], "-o", output, "--splits", 3, "--splits-dir", lists]
    assert run(*arguments) == 0
    names = {f"fold{fold}_{part}.txt" for fold in (1, 2, 3) for part in ("train", "val")}
    names.add("splits_final.json")
    assert {path.name for path in lists.iterdir()} == names
    held_out = []
    for fold in (1, 2, 3):
        train, val = (
            (lists / f"fold{fold}_{part}.txt").read_text().split() for part in ("train", "val")
        )
        assert sorted(train + val) == [A, B, C, D]
        assert not {key[:7] for key in train} & {key[:7] for key in val}
        held_out += val
        assert json.loads((lists / "splits_final.json").read_text())[fold - 1] == {
            "train": train,
            "val": val,
        }
    assert sorted(held_out) == [A, B, C, D]
    before = {path.name: path.read_bytes() for path in lists.iterdir()}
    run(*arguments, "--force")
    assert {path.name: path.read_bytes() for path in lists.iterdir()} == before
    (lists / "fold_notes.txt").touch()
    assert run(*arguments[:-4], "--splits", 2, "--splits-dir", lists) == 0
    assert {path.name for path in lists.iterdir()} == {
        *(name for name in names if not name.startswith("fold3")),
        "fold_notes.txt",
    }


def test_splits_that_cannot_be_written_leave_the_output_as_it_was(inputs, output, capsys):
    output.write_bytes(b"old")
    (output.parent / "fold2_val.txt").mkdir()
    for more, reason in (
        (["--splits", 9], "3 patients can't fill 9 folds"),
        (["--splits", 2], "fold2_val.txt cannot be written: a folder has its name"),
    ):
        capsys.readouterr()
        assert run(inputs["one"], inputs["two"], "-o", output, *more) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: {reason}")
        assert output.read_bytes() == b"old"


def test_the_length_of_the_patients_part_goes_from_the_zip_to_the_lists(tmp_path, output, capsys):
    """With the default of 7, visits of one patient were taken for two patients' here."""
    studies = {"aaaaa00001": 0, "aaaaa00002": 1, "bbbbb00001": 2, "bbbbb00002": 3}
    told = {key: {"hash_lengths": [5, 5]} for key in studies}
    file = make(tmp_path / "visits.h5", studies, records=told)
    for number, path in enumerate((file, project(file))):
        lists = tmp_path / f"splits{number}"
        arguments = [path, "-o", output, "--splits", 2, "--splits-dir", lists]
        assert run(*arguments) == 0
        sides = [(lists / f"fold1_{part}.txt").read_text().split() for part in ("train", "val")]
        assert {frozenset(key[:5] for key in side) for side in sides} == {
            frozenset({"aaaaa"}),
            frozenset({"bbbbb"}),
        }
        assert run(*arguments, "--patient-characters", 7) == 1
        assert "--patient-characters 7: study aaaaa00001 has at most 5" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["5 5", [5], [0, 10], [5, 6], [5.0, 5.0], {"5": 5}, None])
def test_lengths_of_another_form_are_none(told, tmp_path, output, capsys):
    records = {A: {"hash_lengths": told}, C: {"hash_lengths": told}}
    file = make(tmp_path / "odd.h5", {A: 0, C: 1}, records=records)
    with h5py.File(file) as held:
        assert "hash_lengths" not in held["image"][A].attrs
    assert run(file, "-o", output, "--splits", 2) == 0


def test_hashes_of_an_unknown_make_need_to_be_told_apart(tmp_path, output, capsys):
    file = make(tmp_path / "foreign.h5", {"case1_a": 0, "case1_b": 1, "case2_a": 2})
    assert run(file, "-o", output, "--splits", 2) == 1
    assert "say it with --patient-characters P" in capsys.readouterr().err
    assert not output.exists()
    assert run(file, "-o", output, "--splits", 2, "--patient-characters", 5) == 0
    assert sorted(output.with_name("fold1_val.txt").read_text().split()) == ["case1_a", "case1_b"]


def test_equal_images_are_named_and_kept_together(tmp_path, output, capsys):
    """One scan under the names of two sites, twice."""
    file = make(tmp_path / "both.h5", {A: 0, C: 0, D: 1, "eeeeeee005": 1})
    for path in (file, project(file)):
        assert run(path, "-o", output, "--splits", 2) == 0
        said = capsys.readouterr().err.splitlines()
        assert said == [
            f"warning: {one}, {other}: hold the same image, and are never in training and "
            "validation at once"
            for one, other in ((A, C), (D, "eeeeeee005"))
        ]
        keys = output.with_name("fold1_val.txt").read_text().split()
        assert {key[:10] for key in keys} in ({A, C}, {D, "eeeeeee005"})
        assert run(path, "-o", output, "--splits", 3) == 1
        assert "2 patients can't fill 3 folds" in capsys.readouterr().err


def test_each_project_is_left_out_once(inputs, output, capsys):
    arguments = [inputs["one"], inputs["two"], "-o", output, "--leave-out", "project"]
    assert run(*arguments) == 0
    said = capsys.readouterr().err
    assert "fold 1 validates with project one" in said
    assert "fold 2 validates with project two" in said
    for fold, (train, val) in enumerate((((C, D), (A, B)), ((A, B), (C, D))), start=1):
        assert output.with_name(f"fold{fold}_train.txt").read_text().split() == [*train]
        assert output.with_name(f"fold{fold}_val.txt").read_text().split() == [*val]
    assert run(*arguments, "--splits", 2) == 0
    assert run(*arguments, "--splits", 3) == 1
    assert "makes 2 folds, one a project, not 3" in capsys.readouterr().err


def test_a_patient_of_the_project_left_out_is_not_trained_on(inputs, output, tmp_path, capsys):
    later = make(tmp_path / "later.h5", {"aaaaaaa009": 5, "eeeeeee005": 6})
    arguments = ["-o", output, "--leave-out", "project"]
    assert run(inputs["one"], inputs["two"], later, *arguments) == 0
    said = capsys.readouterr().err
    assert "warning: fold 1 does not train on 2 images of other projects: their patients" in said
    assert output.with_name("fold1_val.txt").read_text().split() == ["aaaaaaa009", "eeeeeee005"]
    assert output.with_name("fold1_train.txt").read_text().split() == [C, D]
    assert output.with_name("fold2_train.txt").read_text().split() == [C, D, "eeeeeee005"]
    output.unlink()
    assert run(inputs["one"], later, *arguments) == 1
    assert "without 'later' there is nothing to train on" in capsys.readouterr().err
    assert not output.exists()


def test_more_folds_than_patients_are_refused(inputs, output, capsys):
    assert run(inputs["one"], "-o", output, "--splits", 2) == 1
    assert "1 patients can't fill 2 folds" in capsys.readouterr().err
    assert not output.exists()


# --- cases -----------------------------------------------------------------------------------


def rows_of(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_a_study_tells_what_the_files_hold(tmp_path, output):
    provenance = {
        "suv_type": "bw",
        "rule": "12b",
        "decay_correction": "START",
        "minutes_to_reference": [61.625, 61.625],
        "weight_kg": 80.4375,
        "factor_range": [0.000401664014, 0.000401664014],
    }
    told = {"suv": provenance, "hash_lengths": [6, 4], "warnings": ["first", "second"]}
    one = make(tmp_path / "one.h5", {A: 0}, "--measures", tmp_path / "m.csv", records={A: told})
    two = make(tmp_path / "two.h5", {C: 1})
    cases = tmp_path / "cases.csv"
    assert run(one, two, "-o", output, "--cases", cases) == 0
    row, other = rows_of(cases)
    assert (row["hash"], row["project"], row["patient"]) == (A, "one", A[:6])
    assert (row["suv_type"], row["suv_rule"], row["uptake_minutes"]) == ("bw", "12b", "62")
    assert row["weight_kg"] == "80"
    with h5py.File(output) as file:
        # Earlier versions made zips that tell the weight exactly.
        held = json.loads(file["image"][A].attrs["suv"])
    assert (held["weight_kg"], held["minutes_to_reference"]) == (80, [62, 62])
    assert held["factor_range"] == [0.000401664, 0.000401664]
    earlier = {"suv": json.dumps(provenance)}
    [cells] = case_rows([(A, A[:6], earlier)])
    assert (cells[COLUMNS.index("uptake_minutes")], cells[COLUMNS.index("weight_kg")]) == (
        "62",
        "80",
    )
    for grid, sizes in {"ct": "1.5 1.5 2", "pet": "4 4 4", "training": "2 2 3"}.items():
        assert [row[f"{grid}_{axis}_mm"] for axis in "xyz"] == sizes.split()
    assert row["warnings"].startswith("first | second")
    total = rows_of(tmp_path / "m.csv")[-1]
    assert total["lesion"] == "total"
    for name in ("lesion_count", "tmtv_ml", "iso_tmtv_ml", "tlg_g", "suv_max", "dose_fraction"):
        assert row[name] == total[name] != ""
    assert (other["project"], other["suv_type"], other["suv_rule"]) == ("two", "unknown", "")
    assert (other["uptake_minutes"], other["weight_kg"]) == ("", "")


@pytest.mark.parametrize("labels", ["binary", "keep"])
def test_volumes_and_values_of_a_row_are_those_of_the_images(labels, tmp_path, output):
    file = make(
        tmp_path / "one.h5",
        {A: 0},
        *(("--labels", "keep") if labels == "keep" else ()),
        records={A: {"suv": {"suv_type": "bw", "weight_kg": 80}}},
    )
    assert run(file, "-o", output, "--cases", tmp_path / "cases.csv") == 0
    [row] = rows_of(tmp_path / "cases.csv")
    images = study_images(0)
    suv, mask = (np.asanyarray(images[name].dataobj) for name in ("petsuv", "mask"))
    lesions, n_lesions = ndimage.label(mask > 0, np.ones((3, 3, 3)))
    numbers = range(1, n_lesions + 1)
    voxel_ml = 4**3 / 1000
    hot = [suv[lesions == n][suv[lesions == n] >= suv[lesions == n].max() / 4] for n in numbers]
    centroids = 4.0 * np.array(ndimage.center_of_mass(lesions > 0, lesions, numbers))
    wanted = {
        "lesion_count": n_lesions,
        "tmtv_ml": (mask > 0).sum() * voxel_ml,
        "iso_tmtv_ml": sum(map(len, hot)) * voxel_ml,
        "tlg_g": suv[mask > 0].sum(dtype=float) * voxel_ml,
        "iso_tlg_g": sum(values.sum(dtype=float) for values in hot) * voxel_ml,
        "suv_max": suv[mask > 0].max(),
        "dmax_mm": max(np.linalg.norm(a - b) for a in centroids for b in centroids),
        "dose_fraction": suv.sum(dtype=float) * voxel_ml / 80_000,
    }
    assert {name: float(row[name]) for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_who_the_patient_is_stays_open_where_nothing_tells_it(tmp_path, output, capsys):
    file = make(tmp_path / "foreign.h5", {"case1_a": 0})
    cases = tmp_path / "cases.csv"
    assert run(file, "-o", output, "--cases", cases) == 0
    assert "warning: the column patient of cases.csv is empty" in capsys.readouterr().err
    assert rows_of(cases)[0]["patient"] == ""
    assert run(file, "-o", output, "--cases", cases, "--patient-characters", 5) == 0
    assert rows_of(cases)[0]["patient"] == "case1"
    assert run(file, "-o", output, "--cases", cases, "--patient-characters", 7) == 1


def test_what_others_put_into_a_file_is_left_out_of_the_table(inputs, output, tmp_path):
    def spoil(data):
        for name, text in {"suv": "[1]", "measures": '{"lesions": [2]}', "warnings": "{"}.items():
            data.attrs[name] = text
        del data.attrs["attributes_sha256"], data.attrs["ct_spacing"]
        data.attrs["pet_spacing"] = "?"

    changed(inputs["one"], "image", A, spoil)
    assert run(inputs["one"], "-o", output, "--cases", tmp_path / "cases.csv") == 0
    row = rows_of(tmp_path / "cases.csv")[0]
    assert {name for name, cell in row.items() if cell} == {
        "hash", "project", "patient", "suv_type", "training_x_mm", "training_y_mm", "training_z_mm",
    }  # fmt: skip


def test_projections_make_no_table(inputs, output, tmp_path, capsys):
    assert run(inputs["one 2d"], "-o", output, "--cases", tmp_path / "cases.csv") == 1
    assert "need 3D files" in capsys.readouterr().err


def test_every_column_of_the_cases_is_explained():
    text = (Path(__file__).parents[1] / "docs/formats.md").read_text()
    section = text.split("## Cases")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(cells)) == [*COLUMNS]


# --- verifying -------------------------------------------------------------------------------


def test_sound_files_verify(made, capsys):
    assert run("--verify", made["one"], made["two"], made["one 2d"], "-v") == 0
    out, err = capsys.readouterr()
    assert out == "10 datasets: 10 sound, 0 failed\n"
    assert f"{A}: sound\n" in err
    assert "written" not in err


def test_a_dataset_that_crashes_its_reader_is_one_damaged_dataset(made, monkeypatch, capsys):
    faults_of = verification.faults_of

    def crash_on_b(path, key, parameters):
        return os.abort() if key == B else faults_of(path, key, parameters)

    monkeypatch.setattr(verification, "faults_of", crash_on_b)
    assert run("--verify", made["one"], made["two"], "--jobs", 2) == 3
    out, err = capsys.readouterr()
    assert out == "4 datasets: 3 sound, 1 failed\n"
    assert f"error: {B}: the worker process was killed (signal 6)" in err


def test_shards_of_a_merge_are_disjoint_and_make_the_whole(inputs, output):
    whole, again = output.with_name("whole.h5"), output.with_name("again.h5")
    parts = [output.with_name(f"part{number}.h5") for number in (1, 2, 3)]
    assert run(inputs["one"], inputs["two"], "-o", whole) == 0
    for number, part in enumerate(parts, start=1):
        assert run(inputs["one"], inputs["two"], "-o", part, "--shard", f"{number}/3") == 0
    held = [set(h5py.File(part)["image"]) for part in parts]
    assert sorted(key for keys in held for key in keys) == [A, B, C, D]
    assert max(map(len, held)) < 4
    assert run(*parts, "-o", again) == 0
    assert again.read_bytes() == whole.read_bytes()


def test_all_angles_of_a_study_are_in_one_shard(inputs, output):
    flat = project(inputs["one"])
    held = []
    for number in (1, 2):
        part = output.with_name(f"part{number}.h5")
        assert run(flat, "-o", part, "--shard", f"{number}/2") == 0
        held.append({key.rpartition("_")[0] for key in h5py.File(part)["image"]})
    assert held[0] | held[1] == {A, B}
    assert not held[0] & held[1]


def test_stack_verifies(inputs, capsys):
    assert run("--verify", project(inputs["one"], "--stack")) == 0


def test_a_damaged_stack_is_told_by_its_file_and_few_of_its_rows(inputs, capsys):
    stack = project(inputs["one"], "--stack")
    with h5py.File(stack, "r+") as file:
        file["image"][...] = 2
    capsys.readouterr()
    assert run("--verify", stack) == 3
    out, err = capsys.readouterr()
    assert out == "1 dataset: 0 sound, 1 failed\n"
    assert err.startswith(
        f"error: one_2d.h5: {A}_000 differs from its checksum; {A}_000 has values"
    )
    assert err.count(";") == 10
    assert err.endswith(f"; 2 more in {stack}: make that file again\n")


def changed(path, group, key, change):
    with h5py.File(path, "r+") as file:
        change(file[group][key])


DAMAGE = {
    "values": lambda data: data.__setitem__((0, 0, 0, 0), 1 - data[0, 0, 0, 0]),
    "affine": lambda data: data.attrs.modify("affine", np.diag([2.0, 2, 3, 1])),
    "spacing": lambda data: data.attrs.modify("spacing", [2.0, 2, 2]),
    "project": lambda data: data.attrs.__delitem__("project"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("group", GROUPS)
def test_damage_is_found_and_named(kind, group, inputs, capsys):
    changed(inputs["one"], group, B, DAMAGE[kind])
    assert run("--verify", inputs["one"], inputs["two"]) == 3
    out, err = capsys.readouterr()
    assert out == "4 datasets: 3 sound, 1 failed\n"
    assert f"error: {B}: " in err
    assert group in err
    assert "one.h5" in err


def test_unreadable_file_does_not_keep_the_others_from_being_verified(inputs, capsys, tmp_path):
    (tmp_path / "text.h5").write_text("no HDF5")
    changed(inputs["one"], "image", A, DAMAGE["values"])
    assert run("--verify", tmp_path / "text.h5", inputs["one"]) == 1
    err = capsys.readouterr().err
    assert "text.h5: not an HDF5 file" in err
    assert f"error: {A}: image differs from its checksum" in err


# --- the page --------------------------------------------------------------------------------


def cards_of(page):
    return re.findall(r'<article id="(\w+)"', page.read_text())


@pytest.mark.parametrize("how", [(), ("--link",)])
def test_the_page_of_a_merged_file_or_an_index_shows_the_studies_of_all(how, inputs, output):
    page, table = output.with_suffix(".html"), output.with_suffix(".csv")
    beside = "--report", page, "--measures", table
    command = (inputs["one"], inputs["two"], "-o", output, *beside, "-j", 1, *how)
    assert run(*command) == 0
    assert cards_of(page) == [A, B, C, D]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["hash"] for row in rows if row["lesion"] == "total"] == [A, B, C, D]
    text = page.read_text()
    assert re.findall(r'data-project="(\w+)"', text) == ["one", "one", "two", "two"]
    assert text.count("<img src") > 8
    written = page.stat().st_mtime_ns
    assert run(*command) == 0
    assert page.stat().st_mtime_ns == written


def test_the_page_of_a_merged_file_is_that_of_its_project(inputs, output, tmp_path):
    archive = inputs["one"].with_suffix(".zip")
    write_zip(archive, {key: study_images(seed) for key, seed in {A: 0, B: 1}.items()}, "one/")
    alone, merged = tmp_path / "alone.html", tmp_path / "merged.html"
    again = tmp_path / "all.h5"
    tables = [path.with_suffix(".csv") for path in (alone, merged)]
    options = ["-j", "1", *SMALL, "--report", str(alone), "--measures", str(tables[0])]
    assert preprocessing.main([str(archive), "-o", str(again), *options]) == 0
    beside = "--report", merged, "--measures", tables[1]
    assert run(inputs["one"], "-o", output, *beside, "-j", 1) == 0
    assert alone.read_bytes() == merged.read_bytes()
    assert tables[0].read_bytes() == tables[1].read_bytes()


def test_a_study_without_measures_is_named_where_their_table_is_asked_for(inputs, output, capsys):
    changed(inputs["one"], "image", A, lambda data: data.attrs.__delitem__("measures"))
    assert run(inputs["one"], "-o", output, "--measures", output.with_suffix(".csv")) == 1
    assert f"study {A} has no measures: make that file again" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


def test_lists_of_failed_studies_are_joined_and_tell_the_status(inputs, output, capsys):
    rows = {"one": [("eeeeeee005", "preprocessing", "NaN, there")], "two": [(A, "project_2d", "x")]}
    lists = [inputs[name].with_name(f"{name}_failed.csv") for name in rows]
    for path, told in zip(lists, rows.values(), strict=True):
        write_table(path, ("hash", "stage", "reason"), told)
    page = output.with_suffix(".html")
    command = inputs["one"], inputs["two"], "-o", output, "--report", page
    for status in ("written", "unchanged"):
        assert run(*command, "--failed", *lists) == 3
        assert f"5 studies: 3 {status}" in capsys.readouterr().out.replace("0 written, ", "")
        with open(output.with_name(f"{output.stem}_failed.csv"), newline="") as stream:
            assert list(csv.reader(stream))[1:] == [list(*rows["two"]), list(*rows["one"])]
    assert "NaN, there" in page.read_text()
    assert run(*command) == 0
    assert not output.with_name(f"{output.stem}_failed.csv").exists()
    assert run(*command, "--failed", inputs["one"]) == 1
    assert "is no list of failed studies" in capsys.readouterr().err
    write_table(lists[1], ("hash", "stage", "reason"), [])
    assert run(*command, "--failed", lists[1]) == 0
    assert not output.with_name(f"{output.stem}_failed.csv").exists()


def test_a_study_of_another_make_is_shown_without_what_its_file_does_not_tell(
    inputs, output, tmp_path
):
    def forget(data):
        for name in ("measures", "suv", "warnings", "warning_kinds", "project", "fingerprint"):
            del data.attrs[name]
        del data.attrs["attributes_sha256"]

    changed(inputs["one"], "image", A, forget)
    page = tmp_path / "page.html"
    assert run(inputs["one"], "-o", output, "--report", page, "-j", 1) == 0
    card = page.read_text().partition(f'id="{A}"')[2].partition("</article>")[0]
    assert "The file holds no measures of the lesions." in card
    assert "not known" in card
    assert card.count("<img src") == 2


def test_a_study_without_a_scale_is_named_and_the_others_are_shown(
    inputs, output, tmp_path, capsys
):
    def forget(data):
        del data.attrs["suv_range"]
        del data.attrs["attributes_sha256"]

    changed(inputs["one"], "image", A, forget)
    page = tmp_path / "page.html"
    assert run(inputs["one"], "-o", output, "--report", page, "-j", 1) == 0
    assert f"{A}: is not shown in the report: its attribute 'suv_range'" in capsys.readouterr().err
    assert cards_of(page) == [A, B]
    assert page.read_text().count('class="failed"') == 1


def test_projections_make_no_page(inputs, output, tmp_path, capsys):
    assert run(inputs["one 2d"], "-o", output, "--report", tmp_path / "page.html") == 1
    assert "--measures, --report and --export-nnunet need 3D files" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


# --- chosen studies --------------------------------------------------------------------------


def ratings(**verdicts):
    return json.dumps({"ratings": {k: {"verdict": v, "note": ""} for k, v in verdicts.items()}})


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (f"{A}\n{D}\n", [A, D]),
        (f"\ufeff{D}\r\n\r\n  {A}\t\r\n{A}", [A, D]),
        (ratings(**{A: "accept", B: "reject", C: "doubt", D: ""}), [A]),
        ("\ufeff \n" + ratings(**{C: "accept", "ffffffffff": "reject"}), [C]),
    ],
    ids=["list", "list of a Windows editor", "ratings", "ratings with a mark"],
)
def test_keys_that_are_listed_or_accepted_alone_are_merged(
    text, taken, inputs, output, tmp_path, capsys
):
    keys = tmp_path / "keys"
    keys.write_text(text, newline="")
    assert run(inputs["one"], inputs["two"], "-o", output, "--keys", keys) == 0
    with h5py.File(output) as file:
        assert sorted(file["image"]) == taken
    captured = capsys.readouterr()
    assert captured.out == f"{output_line(len(taken))} -> {output}\n"
    assert f"keys leaves out {4 - len(taken)} of 4 studies" in captured.err


def output_line(n):
    return f"{n} {'study' if n == 1 else 'studies'}: {n} written, 0 unchanged, 0 skipped, 0 failed"


def test_a_study_that_is_not_listed_may_be_in_two_files_with_other_content(
    inputs, output, tmp_path
):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{B}\n")
    assert run(inputs["one"], inputs["other"], "-o", output, "--keys", keys) == 0


def test_a_hash_takes_all_projections_of_its_study_and_a_key_one(inputs, output, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{A}\n{C}_060\n")
    assert run(inputs["one 2d"], inputs["two 2d"], "-o", output, "--keys", keys) == 0
    with h5py.File(output) as file:
        assert sorted(file["image"]) == [f"{A}_000", f"{A}_060", f"{A}_120", f"{C}_060"]


def test_a_hash_takes_its_rows_of_a_stack(inputs, output, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{B}\n")
    assert run(project(inputs["one"], "--stack"), "-o", output, "--keys", keys) == 0
    with h5py.File(output) as file:
        assert list(file["key"].asstr()) == [f"{B}_000", f"{B}_060", f"{B}_120"]


def test_listed_studies_that_no_file_holds_are_named(inputs, output, tmp_path, capsys):
    keys = tmp_path / "keys.txt"
    keys.write_text(f"{A}\n{C}\n{D}\n")
    assert run(inputs["one"], "-o", output, "--keys", keys) == 0
    told = capsys.readouterr().err
    assert f"warning: not in the input files, though keys.txt lists them: {C}, {D}\n" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "names no study"),
        (b" \n\n", "names no study"),
        (f"{C}\n".encode(), "none of its studies is in the input files"),
        (f"{A}\n\x1b[31m{B}\n".encode(), r"'\\x1b[31maaaaaaa002' can't be a study"),
        (f"{A}\x00\n".encode(), "can't be a study"),
        (b"=1+1\n", "can't be a study"),
        (b"../" * 50, "can't be a study"),
        (A.encode("utf-16"), "is no text in UTF-8"),
        (b'{"ratings": ', "is damaged, or not what the page saves"),
        (b'{"ratings": [1]}', "is damaged, or not what the page saves"),
        (b'{"a": 1}', "is damaged, or not what the page saves"),
        (b'{"ratings":' + b"{" * 9, "is damaged, or not what the page saves"),
        (b'{"a":' * 100_000, "is damaged, or not what the page saves"),
        (ratings(**{A: "doubt"}).encode(), "accepts no study"),
        (ratings(**{A: "Accept"}).encode(), f"rates {A} 'Accept': give accept, doubt or reject"),
        (ratings(**{"a\tb": "reject", A: "accept"}).encode(), "can't be a study"),
        (
            ratings(**{A: "accept", B: "reject"}).replace(B, A).encode(),
            "is damaged, or not what the page saves",
        ),
    ],
)
def test_what_is_no_list_of_these_files_is_refused(content, told, inputs, output, tmp_path, capsys):
    keys = tmp_path / "keys.txt"
    keys.write_bytes(content)
    assert run(inputs["one"], "-o", output, "--keys", keys) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told.replace("\\\\", "\\") in error
    assert "keys.txt" in error
    assert error.count("\n") == 1
    assert not output.exists()


# --- refusals --------------------------------------------------------------------------------


WRONG = {
    "no output": ["one"],
    "output is an input": ["one", "-o", "one"],
    "missing input": ["one", "nosuch", "-o", "out"],
    "one fold": ["one", "-o", "out", "--splits", "1"],
    "folds in the output's place": ["one", "-o", "out", "--splits", "2", "--splits-dir", "out"],
    "folds among the parts": ["one", "-o", "out", "--splits", "2", "--splits-dir", "parts"],
    "leave out what": ["one", "-o", "out", "--leave-out", "patient"],
    "verify makes no folds": ["--verify", "one", "--leave-out", "project"],
    "number of no dataset": ["one", "-o", "out", "--dataset-id", "3"],
    "number beyond nnU-Net's": ["one", "-o", "out", "--export-nnunet", "x", "--dataset-id", "1000"],
    "export in the output's place": ["one", "-o", "out", "--export-nnunet", "out"],
    "cases in an input's place": ["one", "-o", "out", "--cases", "one"],
    "cases in the output's place": ["one", "-o", "out", "--cases", "out"],
    "verify lists no cases": ["--verify", "one", "--cases", "x.csv"],
    "verify exports nothing": ["--verify", "one", "--export-nnunet", "x"],
    "keys missing": ["one", "-o", "out", "--keys", "nosuch"],
    "keys in a folder": ["one", "-o", "out", "--keys", "."],
    "output in the keys' place": ["one", "-o", "two", "--keys", "two"],
    "page in an input's place": ["one", "-o", "out", "--report", "one"],
    "page in the keys' place": ["one", "-o", "out", "--keys", "two", "--report", "two"],
    "measures in the cases' place": ["one", "-o", "out", "--cases", "x", "--measures", "x"],
    "a list that is missing": ["one", "-o", "out", "--failed", "nosuch"],
    "verify joins no lists": ["--verify", "one", "--failed", "two"],
    "page in the table's place": ["one", "-o", "out", "--cases", "x", "--report", "x"],
    "verify takes no keys": ["--verify", "one", "--keys", "two"],
    "verify makes no page": ["--verify", "one", "--report", "x.html"],
    "folder without folds": ["one", "-o", "out", "--splits-dir", "x"],
    "verify writes nothing": ["--verify", "one", "-o", "out"],
    "verify a missing file": ["--verify", "nosuch"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_end_with_status_2(name, inputs, output, capsys):
    words = {
        "one": inputs["one"],
        "two": inputs["two"],
        "out": output,
        "nosuch": output.with_name("nosuch.h5"),
    }
    words["parts"] = output.with_name(f"{output.name}.parts") / "x"
    with pytest.raises(SystemExit) as ending:
        run(*(words.get(word, word) for word in WRONG[name]))
    assert ending.value.code == 2
    assert list(output.parent.iterdir()) == []


def test_damaged_input_leaves_the_old_output(inputs, output, capsys):
    run(inputs["one"], "-o", output)
    before = output.read_bytes()
    data = inputs["two"].read_bytes()
    inputs["two"].write_bytes(data[: len(data) // 2])
    assert run(inputs["one"], inputs["two"], "-o", output) == 1
    assert "two.h5: not an HDF5 file, or truncated" in capsys.readouterr().err
    assert output.read_bytes() == before
