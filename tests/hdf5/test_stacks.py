"""Stacks merge like other files: rows, list and digests are those of one stack of all studies."""

import functools
from pathlib import Path

import h5py
import numpy as np
import project_zips
import pytest

import mergeh5
import preprocessing
import project_2d
from common.hdf5.merge import assemble_merged
from common.hdf5.stacks import read_rows

GROUPS = ("image", "mask", "mask_iso")
GRID = ("--spacing", 4, 4, 4, "--shape", 8, 8)
ANGLES = ("--angles", 0, 180, 60)


def run(main, *arguments: object) -> int:
    return main([*map(str, arguments)])


project = functools.partial(run, project_2d.main)
merge = functools.partial(run, mergeh5.main)


def volumes(path: Path, seeds, n_slices: int, *more: object) -> Path:
    """A 3D file of small studies, a number each, `n_slices` long."""
    small = {"ct_shape": (14, 14, 2 * n_slices), "pet_shape": (12, 12, 12)}
    studies = {f"{n:010x}": project_zips.study_images(n, **small) for n in seeds}
    archive = project_zips.write_zip(path.with_suffix(".zip"), studies, folder=f"{path.stem}/")
    assert run(preprocessing.main, archive, "-o", path, *GRID, "-j", 1, *more) == 0
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """short.h5 and long.h5, 3D; all.h5, both; <name>_stack.h5, their stacks."""
    folder = tmp_path_factory.mktemp("stacks")
    short, long = (
        volumes(folder / "short.h5", (1, 3, 5, 7), 8),
        volumes(folder / "long.h5", (2, 4), 11),
    )
    assert merge(short, long, "-o", folder / "all.h5") == 0
    for name in ("short", "long", "all"):
        stack = folder / f"{name}_stack.h5"
        assert project(folder / f"{name}.h5", "-o", stack, *ANGLES, "--stack", "-j", 1) == 0
    return folder


def held(path: Path) -> dict[str, object]:
    """All that a stack holds, but for what it was made from."""
    with h5py.File(path) as file:
        found: dict[str, object] = {group: file[group][()].tobytes() for group in GROUPS}
        for group in GROUPS:
            found[f"{group} layout"] = (
                file[group].shape,
                file[group].chunks,
                file[group].dtype,
                file[group].id.get_storage_size(),
                np.array(file[group].attrs["spacing"]).tolist(),
            )
        found["keys"] = file["key"].asstr()[()].tolist()
        found["digests"] = file["key"].attrs["sha256"].tobytes()
        return found


@pytest.mark.parametrize("kind", [(), ("--stack",)])
def test_shards_merge_to_the_bytes_and_the_list_of_the_whole(kind, folder, tmp_path):
    whole = tmp_path / "whole.h5"
    shards = [tmp_path / f"{number}.h5" for number in (1, 2, 3)]
    assert project(folder / "all.h5", "-o", whole, *ANGLES, *kind, "-j", 1) == 0
    made = []
    for number, shard in enumerate(shards, start=1):
        part = "--shard", f"{number}/3"
        assert project(folder / "all.h5", "-o", shard, *ANGLES, *kind, *part, "-j", 1) in (0, 1)
        made += [shard] if shard.exists() else []
    assert len(made) > 1
    for order in (made, made[::-1]):
        merged = tmp_path / "merged.h5"
        assert merge(*order, "-o", merged, "--force") == 0
        assert merged.read_bytes() == whole.read_bytes()
        listed, of_whole = (path.with_suffix(".csv").read_bytes() for path in (merged, whole))
        assert listed == of_whole


def test_stacks_of_other_lengths_are_padded_as_one_of_all_would_be(folder, tmp_path):
    merged = tmp_path / "merged.h5"
    stacks = folder / "short_stack.h5", folder / "long_stack.h5"
    assert merge(*stacks, "-o", merged) == 0
    assert held(merged) == held(folder / "all_stack.h5")
    listed = (folder / "all_stack.csv").read_text()
    assert merged.with_suffix(".csv").read_text() == listed
    assert "short" in listed
    assert "long" in listed
    assert merge("--verify", merged) == 0


def test_nothing_new_leaves_a_merged_stack_alone(folder, tmp_path, capsys):
    merged = tmp_path / "merged.h5"
    command = (folder / "short_stack.h5", folder / "long_stack.h5", "-o", merged)
    assert merge(*command) == 0
    before = merged.stat()
    assert merge(*command) == 0
    assert "6 studies: 0 written, 6 unchanged" in capsys.readouterr().out
    assert merged.stat() == before or merged.stat().st_mtime_ns == before.st_mtime_ns
    assert merged.stat().st_ino == before.st_ino


@pytest.mark.parametrize("changed", ["short", "long"])
def test_a_stack_made_anew_is_merged_anew(changed, folder, tmp_path, capsys):
    stacks = {}
    for name in ("short", "long"):
        stacks[name] = tmp_path / f"{name}.h5"
        stacks[name].write_bytes((folder / f"{name}_stack.h5").read_bytes())
    command = (*stacks.values(), "-o", tmp_path / "merged.h5")
    assert merge(*command) == 0
    seeds, n_slices = {"short": ((1, 3, 5, 9), 8), "long": ((2, 6), 11)}[changed]
    other = volumes(tmp_path / "other.h5", seeds, n_slices)
    assert (
        project(other, "-o", stacks[changed], *ANGLES, "--stack", "--force", "--allow-shrink") == 0
    )
    capsys.readouterr()
    assert merge(*command, "--allow-shrink") == 0
    assert "6 written" in capsys.readouterr().out
    assert merge("--verify", tmp_path / "merged.h5") == 0


@pytest.mark.parametrize("compression", ["lzf", "none"])
def test_stacks_of_other_compression_merge_by_value(compression, folder, tmp_path):
    other, merged = tmp_path / "other.h5", tmp_path / "merged.h5"
    chosen = "--compression", compression
    assert project(folder / "long.h5", "-o", other, *ANGLES, "--stack", *chosen, "-j", 1) == 0
    for order in ((folder / "short_stack.h5", other), (other, folder / "short_stack.h5")):
        assert merge(*order, "-o", merged, "--force") == 0
        with h5py.File(merged) as file, h5py.File(folder / "all_stack.h5") as expected:
            for group in GROUPS:
                np.testing.assert_array_equal(file[group][()], expected[group][()])
        assert merge("--verify", merged) == 0


def repacked(path: Path, source: Path, plane_chunk, **filters) -> Path:
    """A stack as another tool packs it: other chunks, or other filters."""
    with h5py.File(source) as old, h5py.File(path, "w") as new:
        new.attrs.update(old.attrs)
        for name, stack in old.items():
            chunks = {"chunks": plane_chunk(stack.shape), **filters} if name in GROUPS else {}
            copy = new.create_dataset(name, data=stack[()], dtype=stack.dtype, **chunks)
            copy.attrs.update(stack.attrs)
    return path


@pytest.mark.parametrize(
    ("plane_chunk", "filters"),
    [
        (lambda shape: (1, 1, *shape[2:]), {"shuffle": False}),
        (lambda shape: (1, 1, *shape[2:]), {"shuffle": True, "fletcher32": True}),
        (lambda shape: (1, 1, shape[2] // 2, shape[3]), {"shuffle": True}),
        (lambda shape: (2, *shape[1:]), {"shuffle": True}),
    ],
    ids=["no shuffle", "checksums", "half planes", "several rows"],
)
def test_repacked_stacks_merge_by_value(plane_chunk, filters, folder, tmp_path):
    """What was written for our own filters and chunks held 64736 and inf, at status 0."""
    packed = repacked(
        tmp_path / "packed.h5",
        folder / "short_stack.h5",
        plane_chunk,
        compression="gzip",
        **filters,
    )
    made_by = {"parameters": {"angles": [0, 180, 60], "stack": True}, "software": "test 1"}
    for stacks, name in (((packed, folder / "long_stack.h5"), "all"), ((packed,), "short")):
        merged = tmp_path / f"{name}.h5"
        sources = {key: path for path in stacks for key in read_rows(path)}
        assemble_merged(merged, sources, **made_by)
        with h5py.File(merged) as file, h5py.File(folder / f"{name}_stack.h5") as expected:
            for group in GROUPS:
                np.testing.assert_array_equal(file[group][()], expected[group][()])


def test_rows_in_two_stacks_are_one_row_however_long_they_are_padded(folder, tmp_path):
    merged = tmp_path / "merged.h5"
    assert merge(folder / "short_stack.h5", folder / "all_stack.h5", "-o", merged) == 0
    assert held(merged) == held(folder / "all_stack.h5")


def test_other_rows_of_one_key_are_refused_unless_one_is_chosen(folder, tmp_path, capsys):
    other, stack = volumes(tmp_path / "other.h5", (1,), 8, "--align", "corner"), tmp_path / "s.h5"
    assert project(other, "-o", stack, *ANGLES, "--stack", "-j", 1) == 0
    command = (folder / "short_stack.h5", stack, "-o", tmp_path / "merged.h5", "--allow-mixed")
    assert merge(*command) == 1
    assert "with other content" in capsys.readouterr().err
    assert merge(*command, "--on-duplicate", "replace") == 0
    with h5py.File(tmp_path / "merged.h5") as file, h5py.File(stack) as chosen:
        row = file["key"].asstr()[()].tolist().index(f"{1:010x}_060")
        np.testing.assert_array_equal(file["image"][row], chosen["image"][1])


@pytest.mark.parametrize("options", [("--link",), ("--splits", 2), ("--leave-out", "project")])
def test_what_stacks_cannot_give_is_refused(options, folder, tmp_path, capsys):
    assert merge(folder / "short_stack.h5", "-o", tmp_path / "m.h5", *options) == 1
    assert "take no stacks" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_stack_and_a_plain_file_or_other_widths_do_not_merge(folder, tmp_path, capsys):
    plain, wide = tmp_path / "plain.h5", tmp_path / "wide.h5"
    stack = folder / "short_stack.h5"
    assert project(folder / "long.h5", "-o", plain, *ANGLES, "-j", 1) == 0
    assert merge(stack, plain, "-o", tmp_path / "m.h5", "--allow-mixed") == 1
    assert "give one kind" in capsys.readouterr().err
    source = volumes(tmp_path / "w.h5", (2,), 8, "--shape", 9, 9)
    assert project(source, "-o", wide, *ANGLES, "--stack", "-j", 1) == 0
    assert merge(stack, wide, "-o", tmp_path / "m.h5", "--allow-mixed") == 1
    assert "another width, spacing or type" in capsys.readouterr().err
    assert not (tmp_path / "m.h5").exists()


def test_a_list_that_is_gone_leaves_projects_empty_with_a_word(folder, tmp_path, capsys):
    alone = tmp_path / "alone.h5"
    alone.write_bytes((folder / "short_stack.h5").read_bytes())
    assert merge(alone, "-o", tmp_path / "m.h5") == 0
    assert "alone.csv does not list all of its studies" in capsys.readouterr().err
    rows = (tmp_path / "m.csv").read_text().splitlines()
    assert rows[1] == f"0,{1:010x},000,,{1:010x}_000"


def test_shards_keys_and_the_present_output_are_read_of_stacks_too(folder, tmp_path):
    keys, merged = tmp_path / "keys.txt", tmp_path / "m.h5"
    keys.write_text(f"{3:010x}\n{5:010x}\n")
    assert merge(folder / "short_stack.h5", "-o", merged, "--keys", keys) == 0
    with h5py.File(merged) as file:
        found = {key.rpartition("_")[0] for key in file["key"].asstr()[()]}
    assert found == {f"{3:010x}", f"{5:010x}"}
