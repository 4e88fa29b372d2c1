"""HDF5 files: layout, what h5py reads back, raw copies, damage noticed."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest

from common.errors import DamagedSource, StageError, StudyError
from common.hdf5 import chunks, merge, reading, verify
from common.hdf5 import studies as stored
from common.run.pool import in_own_process

PARAMETERS = {"dtype": "float16", "spacing": [2, 2, 3], "orientation": "LAS"}
MADE_BY = {"parameters": PARAMETERS, "software": "test 1"}
STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))
COMPRESSIONS = [name for name in chunks.COMPRESSIONS if name != "blosc"]


def study_arrays(seed=0, shape=(40, 35, 33), dtype=np.float16):
    """Noise in a ball and zeros around it; a mask and its isocontour."""
    random = np.random.default_rng(seed)
    middle = [(n - 1) / 2 for n in shape]
    distance = sum((x - m) ** 2 for x, m in zip(np.indices(shape), middle, strict=True)) ** 0.5
    image = (random.random((2, *shape)) * (distance < 12)).astype(dtype)
    mask = (distance < 6).astype(np.uint8)[None]
    return {"image": image, "mask": mask, "mask_iso": mask * (image[:1] > 0.3)}


def write(path, studies, compression="gzip", attributes=None, made_by=MADE_BY):
    with stored.create_file(path, **made_by) as file:
        for key, arrays in studies.items():
            for group, array in arrays.items():
                shared = {"project": "p", **(attributes or {})}
                stored.write_dataset(file, group, key, array, shared, compression)
    return path


# --- writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_plain_h5py_reads_what_was_written(compression, dtype, tmp_path):
    arrays = study_arrays(dtype=dtype)
    path = write(tmp_path / "a.h5", {"a": arrays}, compression)
    with h5py.File(path) as file:
        assert sorted(file) == ["image", "mask", "mask_iso"]
        for group, array in arrays.items():
            assert file[group]["a"].dtype == array.dtype
            np.testing.assert_array_equal(file[group]["a"][()], array)
            assert file[group]["a"].attrs["project"] == "p"
        assert json.loads(file.attrs["parameters"]) == MADE_BY["parameters"]
        assert file.attrs["software"] == "test 1"
        assert file.attrs["schema_version"] == 1


@pytest.mark.skipif("blosc" in chunks.missing_packages(), reason="hdf5plugin is not installed")
def test_blosc_is_read_back_with_its_plugin(tmp_path):
    arrays = study_arrays()
    path = write(tmp_path / "a.h5", {"a": arrays}, "blosc")
    for group, array in arrays.items():
        np.testing.assert_array_equal(stored.read_dataset(path, group, "a")[0], array)


READING = """
import sys
from pathlib import Path
from common.errors import StageError
from common.hdf5 import studies, verify

{before}
path = Path({path!r})
for read in (
    lambda: studies.read_dataset(path, "image", "a")[0].sum(),
    lambda: verify.faults_of(path, "a", studies.read_parameters(path)),
):
    try:
        print(read())
    except StageError as error:
        print(error)
"""


@pytest.mark.skipif("blosc" in chunks.missing_packages(), reason="hdf5plugin is not installed")
@pytest.mark.parametrize("is_installed", [True, False])
def test_blosc_is_read_by_another_process_than_wrote_it(is_installed, tmp_path):
    """Sound files were called damaged, for only writing loaded the plugin."""
    path = sound_file(tmp_path / "a.h5", compression="blosc")
    before = "" if is_installed else "sys.modules['hdf5plugin'] = None"
    code = READING.format(before=before, path=str(path))
    environment = {k: v for k, v in os.environ.items() if k != "HDF5_PLUGIN_PATH"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True
    ).stdout.splitlines()
    if is_installed:
        assert said == [str(study_arrays(shape=(12, 11, 10))["image"].sum()), "[]"]
    else:
        needs = "its compression needs hdf5plugin: pip install hdf5plugin, and run again"
        assert said == [f"{path}: {needs}"] * 2


def test_chunks_of_zeros_take_no_room(tmp_path):
    array = np.zeros((1, 96, 96, 96), np.uint8)
    array[0, 40, 40, 40] = 1
    with h5py.File(write(tmp_path / "a.h5", {"a": {"mask": array}})) as file:
        assert file["mask/a"].id.get_num_chunks() == 1
        np.testing.assert_array_equal(file["mask/a"][()], array)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_flipped_bit_is_noticed_by_plain_h5py(compression, tmp_path):
    path = write(tmp_path / "a.h5", {"a": study_arrays()}, compression)
    damage(path, "image", "a")
    with h5py.File(path) as file, pytest.raises(OSError, match=r"[Cc]an't|filter|checksum"):
        file["image/a"][()]


def damage(path, group, key, n_bits=1):
    """Flip a bit in the middle of the largest chunk of a dataset."""
    with h5py.File(path) as file:
        identity = file[group][key].id
        chunks = [identity.get_chunk_info(n) for n in range(identity.get_num_chunks())]
        largest = max(chunks, key=lambda chunk: chunk.size)
    data = bytearray(path.read_bytes())
    data[largest.byte_offset + largest.size // 2] ^= 1 << n_bits
    path.write_bytes(data)


# --- reading ---------------------------------------------------------------------------------


def test_damaged_dataset_fails_its_study_alone(tmp_path):
    path = write(tmp_path / "a.h5", {"a": study_arrays(0), "b": study_arrays(1)})
    damage(path, "image", "b")
    stored.read_dataset(path, "image", "a")
    with pytest.raises(StudyError, match="image is damaged in the HDF5 file"):
        stored.read_dataset(path, "image", "b")


def test_values_changed_by_hand_fail_their_checksum(tmp_path):
    path = write(tmp_path / "a.h5", {"a": study_arrays()})
    with h5py.File(path, "r+") as file:
        file["mask/a"][0, 0, 0, 0] = 1
    with pytest.raises(StudyError, match=r"mask is damaged in the HDF5 file \(checksum\)"):
        stored.read_dataset(path, "mask", "a")


FOREIGN = {
    "text": lambda path: path.write_text("no HDF5"),
    "nothing": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other groups": lambda path: h5py.File(path, "w").create_group("volumes").file.close(),
    "datasets": lambda path: write_datasets(path),
    "a study in one group only": lambda path: drop(path, "mask/a"),
    "gone": lambda path: path.unlink(),
}


def write_datasets(path):
    with h5py.File(path, "w") as file:
        for group in stored.GROUPS:
            file[group] = [1, 2]


def drop(path, name):
    with h5py.File(path, "r+") as file:
        del file[name]


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_file_of_studies_is_refused_by_name(kind, tmp_path):
    path = write(tmp_path / "a.h5", {"a": study_arrays()})
    FOREIGN[kind](path)
    with pytest.raises(StageError, match=r"a\.h5: "):
        stored.read_keys(path)


def test_what_the_system_refuses_is_not_called_damaged(tmp_path):
    """A disk that failed once had a sound file made again; here a link to itself is refused."""
    path = tmp_path / "a.h5"
    path.symlink_to(path)
    with pytest.raises(StageError, match=r"a\.h5: cannot be read \(Too many levels of symbolic"):
        stored.read_keys(path)


def test_file_without_parameters_is_refused(tmp_path):
    path = write(tmp_path / "a.h5", {"a": study_arrays()})
    with h5py.File(path, "r+") as file:
        del file.attrs["parameters"], file.attrs["attributes_sha256"]
    with pytest.raises(StageError, match="has no attribute 'parameters'"):
        stored.read_parameters(path)


def everything(path):
    """Arrays and attributes of a file."""
    with h5py.File(path) as file:
        found = {"file": dict(file.attrs)}
        for group, key in itertools.product(stored.GROUPS, file["image"]):
            dataset = file[group][key]
            found[group, key] = (dataset[()].tobytes(), stored.all_attributes(dataset))
        return repr(found)


def sound_file(path, key="a", compression="gzip"):
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    attributes = {"affine": affine, "spacing": [2, 2, 3], "orientation": "LAS"}
    return write(path, {key: study_arrays(shape=(12, 11, 10))}, compression, attributes)


def faults_in(path):
    keys, parameters = verify.keys_to_check(path)
    with stored.keeping_open():
        return [fault for key in keys for fault in verify.faults_of(path, key, parameters)]


def test_mutated_file_is_refused_or_holds_what_it_held(tmp_path):
    path = sound_file(tmp_path / "a.h5")
    sound, content = path.read_bytes(), everything(path)
    assert not faults_in(path)
    # The heap of strings is left out: one wrong size in it makes HDF5 itself (2.0) loop for ever.
    heap = sound.index(b"GCOL")
    places = [n for n in range(len(sound)) if not heap <= n < heap + 4096]
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60 * STRESS):
        data = bytearray(sound)
        for place in random.choice(places, 3):
            data[place] ^= 1 << random.integers(8)
        path.write_bytes(data)
        try:
            accepted = not faults_in(path)
        except StageError:
            accepted = False
        refused += not accepted
        assert not accepted or everything(path) == content
    assert refused > 30 * STRESS


def test_a_study_may_be_named_as_the_keys_of_a_stack_are(tmp_path):
    assert not faults_in(sound_file(tmp_path / "a.h5", key="key"))


def test_changed_text_of_an_attribute_is_found(tmp_path):
    path = sound_file(tmp_path / "a.h5")
    data = path.read_bytes()
    found = []
    for place in re.finditer(b"LAS", data):
        path.write_bytes(data[: place.start()] + b"LPS" + data[place.end() :])
        try:
            found += faults_in(path)
        except StageError as error:
            found.append(str(error).removeprefix(f"{path}: "))
    assert set(found) >= {
        "its attributes differ from their checksum: make it again",
        *(f"the attributes of {group} differ from their checksum" for group in stored.GROUPS),
    }


# --- assembling ------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_assembled_file_depends_on_the_studies_alone(compression, tmp_path):
    studies = {key: study_arrays(seed) for seed, key in enumerate("abcd")}
    parts = {
        key: write(tmp_path / f"{key}.h5", {key: arrays}, compression)
        for key, arrays in studies.items()
    }
    one, two, three = (tmp_path / f"{n}.out" for n in range(3))
    merge.assemble(one, parts, **MADE_BY)
    merge.assemble(two, dict(reversed(parts.items())), **MADE_BY)
    merge.assemble(tmp_path / "ab.h5", {k: parts[k] for k in "ab"}, **MADE_BY)
    from_two = {"a": tmp_path / "ab.h5", "b": tmp_path / "ab.h5", "c": parts["c"], "d": parts["d"]}
    merge.assemble(three, from_two, **MADE_BY)
    assert one.read_bytes() == two.read_bytes() == three.read_bytes()
    with h5py.File(one) as file:
        for key, group in itertools.product("abcd", stored.GROUPS):
            np.testing.assert_array_equal(file[group][key][()], studies[key][group])
            with h5py.File(parts[key]) as part:
                copied, original = file[group][key], part[group][key]
                assert dict(copied.attrs) == dict(original.attrs)
                assert copied.chunks == original.chunks
                assert copied.compression == original.compression
                assert copied.id.get_storage_size() == original.id.get_storage_size()


def test_source_that_cannot_be_copied_is_named(tmp_path):
    path = write(tmp_path / "a.h5", {"a": study_arrays()})
    drop(path, "mask_iso/a")
    with pytest.raises(StageError, match=r"a\.h5: study a cannot be copied \(mask_iso"):
        merge.assemble(tmp_path / "o.h5", {"a": path}, **MADE_BY)


@pytest.mark.parametrize("n_left", [0, 100, -30])
def test_source_that_was_cut_short_is_named_by_a_worker_too(n_left, tmp_path):
    parts = {key: write(tmp_path / f"{key}.h5", {key: study_arrays()}) for key in "ab"}
    parts["b"].write_bytes(parts["b"].read_bytes()[:n_left])
    with pytest.raises(DamagedSource) as raised:
        in_own_process(functools.partial(merge.assemble, **MADE_BY), tmp_path / "o.h5", parts)
    assert raised.value.source == parts["b"]


def test_attributes_beyond_64_kib_are_copied(tmp_path):
    long = json.dumps(list(range(30000)))
    path = write(tmp_path / "a.h5", {"a": study_arrays()}, attributes={"measures": long})
    merge.assemble(tmp_path / "o.h5", {"a": path}, **MADE_BY)
    assert stored.read_attributes(tmp_path / "o.h5", ["a"], "measures") == {"a": long}


def test_thousand_attributes_read_as_plain_values(tmp_path):
    attributes = {"channels": ["PET", "CT"], "affine": np.eye(4), "angle": 7.5}
    path = write(tmp_path / "a.h5", {"a": study_arrays()}, attributes=attributes)
    _, found = stored.read_dataset(path, "image", "a")
    assert found["channels"] == ["PET", "CT"]
    assert found["affine"] == np.eye(4).tolist()
    assert found["angle"] == 7.5


def slices(seed, n_x=6, n_z=5):
    random = np.random.default_rng(seed)
    mask = (random.random((1, n_x, n_z)) > 0.7).astype(np.uint8) * (seed % 2)
    return {
        "image": random.random((2, n_x, n_z)).astype(np.float16),
        "mask": mask,
        "mask_iso": mask,
    }


def test_stack_has_a_row_a_key_and_can_be_stacked_again(tmp_path):
    attributes = {"spacing": [2.0, 3.0], "fingerprint": "f"}
    keys = [f"{study}_{angle:03d}" for study in "ab" for angle in (0, 90)]
    projections = {key: slices(seed) for seed, key in enumerate(keys)}
    sources = {}
    for study in "ab":
        own = {key: value for key, value in projections.items() if key.startswith(study)}
        path = write(tmp_path / f"{study}.h5", own, attributes=attributes)
        sources |= dict.fromkeys(own, path)
    stacked, again = tmp_path / "s.h5", tmp_path / "t.h5"
    made_by = MADE_BY | {"parameters": {**PARAMETERS, "angles": [0, 180, 90], "stack": True}}
    merge.assemble_stack(stacked, sources, **made_by)
    with h5py.File(stacked) as file:
        assert sorted(file) == ["image", "key", "mask", "mask_iso"]
        assert [name.decode() for name in file["key"][()]] == keys
        for group in stored.GROUPS:
            expected = np.stack([projections[key][group] for key in keys])
            assert file[group].dtype == expected.dtype
            np.testing.assert_array_equal(file[group][()], expected)
            assert file[group].attrs["spacing"].tolist() == [2, 3]
    assert reading.read_projected(stacked) == {"a": "f", "b": "f"}
    merge.assemble_stack(again, dict.fromkeys(keys, stacked), **made_by)
    assert again.read_bytes() == stacked.read_bytes()
