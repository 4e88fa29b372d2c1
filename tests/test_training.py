"""Training on the file: patches as they are stored, whole volumes by windows, Dice, refusals."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from project_zips import study_images, write_zip

import preprocessing
from examples import to_patient

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from examples import train  # noqa: E402

ROOT = Path(__file__).parents[1]
KEYS = ["aaaaaaa001", "bbbbbbb002"]
SHAPE = (40, 36, 30)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two studies of noise; PET is hot in the mask, and elsewhere in one place."""
    path = tmp_path_factory.mktemp("training") / "demo_3d.h5"
    with h5py.File(path, "w") as out:
        for seed, key in enumerate(KEYS):
            random = np.random.default_rng(seed)
            mask = np.zeros((1, *SHAPE), np.uint8)
            mask[0, 20:24, 10:14, 12:16] = 1
            image = (random.random((2, *SHAPE)) / 20).astype(np.float16)
            image[0][mask[0] > 0] = image[0, 4:12, 26:34, 18:26] = 0.2
            out[f"image/{key}"], out[f"mask/{key}"] = image, mask
            out[f"mask_iso/{key}"] = mask * (np.arange(SHAPE[2]) < 14).astype(np.uint8)
            out[f"image/{key}"].attrs["suv_range"] = (0.0, 40.0)
            out[f"image/{key}"].attrs["ct_range"] = (-1000.0, 1000.0)
            out[f"image/{key}"].attrs["affine"] = np.diag([-2.0, 2.0, 3.0, 1.0])
            out[f"image/{key}"].attrs["hash_lengths"] = (7, 3)
    return path


def patches_of(file, keys=KEYS, patch=16, count=1000, target="mask", labels=(1,), seed=0):
    options = argparse.Namespace(file=file, train=keys, patch=patch, steps=count, batch=1)
    options.target, options.seed = target, seed
    return train.Patches(options, labels)


def test_a_patch_is_a_flipped_part_of_its_study_image_and_mask_alike(file):
    with h5py.File(file) as stored:
        studies = [
            np.concatenate([train.network_input(image[()], image.attrs), stored["mask"][key][()]])
            for key, image in stored["image"].items()
        ]
    places = [np.lib.stride_tricks.sliding_window_view(s, (3, 16, 16, 16))[0] for s in studies]
    for image, mask in map(patches_of(file).__getitem__, range(6)):
        patch = torch.cat([image, mask[None]]).numpy()
        flips = [np.flip(patch, axes) for n in range(8) for axes in [flip_axes(n)]]
        corner = np.stack([flip[1, 0, 0, 0] for flip in flips])
        assert any(
            (windows[tuple(at)] == flip).all()
            for windows in places
            for flip, value in zip(flips, corner, strict=True)
            for at in np.argwhere(windows[..., 1, 0, 0, 0] == value)
        )


def flip_axes(number):
    return tuple(axis + 1 for axis in range(3) if number >> axis & 1)


def test_patches_are_flipped_along_every_axis_and_seeds_differ(file):
    def patches(seed):
        return [patches_of(file, KEYS[:1], 40, seed=seed)[i][0].numpy() for i in range(24)]

    one = patches(0)
    assert len({patch.tobytes() for patch in one}) == 8  # the whole volume, flipped
    assert all((a == b).all() for a, b in zip(one, patches(0), strict=True))
    assert any((a != b).any() for a, b in zip(one, patches(1), strict=True))


def test_half_of_the_patches_hold_tumour_and_others_hold_other_uptake(file):
    patches = patches_of(file, patch=8)
    held = [
        (bool(y.any()), float(x[0].max()) >= 1.2) for x, y in map(patches.__getitem__, range(80))
    ]
    assert np.mean([tumour for tumour, _ in held[::2]]) > 0.9
    uptake = [hot and not tumour for tumour, hot in held[1::2]]
    assert np.mean(uptake) > 0.9


def test_either_mask_is_the_target(file):
    sums = [
        sum(float(patches_of(file, patch=40, target=t)[i][1].sum()) for i in range(4))
        for t in ("mask", "mask_iso")
    ]
    assert sums == [4 * 64, 4 * 32]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_open_the_file_for_themselves_though_the_parent_has_it_open(file, start):
    patches = patches_of(file, count=12)
    expected = [patches[i] for i in range(12)]
    loader = torch.utils.data.DataLoader(
        patches, batch_size=None, num_workers=2, multiprocessing_context=start
    )
    with h5py.File(file, locking=False) as held:
        assert held["image"][KEYS[0]][()].any()
        for (image, mask), (same_image, same_mask) in zip(loader, expected, strict=True):
            assert torch.equal(image, same_image)
            assert torch.equal(mask, same_mask)


def test_volumes_smaller_than_a_patch_are_padded(file):
    image, mask = patches_of(file, patch=48)[0]
    assert image.shape == (2, 48, 48, 48)
    assert mask.sum() == 64


# --- patches as plain h5py reads them --------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "lzf", "none"])
def test_patches_read_by_chunk_are_those_of_plain_h5py(compression, tmp_path):
    archive = write_zip(tmp_path / "p.zip", {KEYS[0]: study_images()})
    volumes = tmp_path / "p.h5"
    command = [archive, "-o", volumes, "-q", "-j", 1, "--shape", 50, 45, "--spacing", 1, 1, 1]
    assert preprocessing.main([str(a) for a in (*command, "--compression", compression)]) == 0
    random = np.random.default_rng(0)
    with h5py.File(volumes) as stored:
        for group in ("image", "mask"):
            dataset = stored[group][KEYS[0]]
            shape = np.array(dataset.shape[1:])
            assert (shape > dataset.chunks[1:]).any()
            for _ in range(20):
                corner = random.integers(shape)
                size = random.integers(1, shape - corner + 1)
                box = (slice(None), *map(slice, corner, corner + size))
                np.testing.assert_array_equal(train.read_patch(dataset, corner, size), dataset[box])


def test_patches_of_files_of_another_make_are_read_too(tmp_path):
    values = np.random.default_rng(0).random((2, 20, 21, 22)).astype(np.float32)
    kinds = {
        "contiguous": {},
        "plain gzip": {"chunks": (1, 7, 8, 9), "compression": "gzip"},
        "shuffled": {"chunks": (2, 7, 8, 9), "compression": "gzip", "shuffle": True},
        "summed": {"compression": "gzip", "shuffle": True, "fletcher32": True},
        "big-endian": {"dtype": ">f4", "compression": "gzip", "shuffle": True},
        "double": {"dtype": "<f8", "compression": "gzip", "shuffle": True},
    }
    with h5py.File(tmp_path / "x.h5", "w") as out:
        for name, options in kinds.items():
            dataset = out.create_dataset(name, data=values, **options)
            patch = train.read_patch(dataset, (3, 0, 11), (10, 21, 11))
            np.testing.assert_array_equal(patch, values[:, 3:13, :, 11:])


def test_a_damaged_index_of_chunks_is_no_chunk_of_zeros(tmp_path):
    path, values = tmp_path / "x.h5", np.ones((2, 20, 21, 22), np.float16)
    with h5py.File(path, "w") as out:
        out.create_dataset("x", data=values, chunks=(1, 7, 8, 9), compression="gzip", shuffle=True)
    content = bytearray(path.read_bytes())
    at = content.index(b"TREE\1")  # the B-tree, of chunks
    content[at : at + 4] = b"tree"
    path.write_bytes(content)
    with h5py.File(path) as stored, pytest.raises(RuntimeError, match="signature"):
        train.read_patch(stored["x"], (0, 0, 0), (20, 21, 22))


def test_the_page_has_the_reader_as_it_is():
    page, code = ((ROOT / name).read_text() for name in ("docs/training.md", "examples/train.py"))
    [snippet] = re.findall(r"```python\n(import itertools\n.*?)```", page, re.DOTALL)
    exec(compile(snippet, "page", "exec"), {})
    reader = re.search(
        r"^def read_patch.*?return patch\.view.*?\n", code, re.DOTALL | re.MULTILINE
    )[0]
    assert reader in page


# --- whole volumes ---------------------------------------------------------------------------


class Brightest(torch.nn.Module):
    """Class 1 where the PET is above half of its scale, 2 where the CT is: voxel by voxel."""

    labels = (1, 2)

    def forward(self, x):
        return torch.cat([torch.full_like(x[:, :1], 0.5), x], 1)


@pytest.mark.parametrize("shape", [(37, 50, 16), (16, 16, 16), (5, 60, 33), (48, 17, 29)], ids=str)
def test_windows_cover_a_volume_of_any_size(shape):
    image = np.random.default_rng(1).random((2, *shape)).astype(np.float32)
    found = train.predict(Brightest(), image, 16, "cpu")
    expected = np.concatenate([np.full((1, *shape), 0.5), image]).argmax(0)
    np.testing.assert_array_equal(found, expected)


def test_windows_overlap_by_a_quarter_at_least():
    seen = []

    class Seeing(Brightest):
        def forward(self, x):
            seen.append(int(x[0, 0, 0, 0, 0]))
            return super().forward(x)

    for n in range(16, 80):
        seen.clear()
        image = np.zeros((2, n, 16, 16), np.float32) + np.arange(1, n + 1)[:, None, None]
        train.predict(Seeing(), image.astype(np.float32), 16, "cpu")
        assert (seen[0], seen[-1]) == (1, n - 15)
        assert max(np.diff(seen), default=0) <= 12


def test_pale_windows_are_background():
    image = np.full((2, 16, 16, 16), 0.9 * train.PALE, np.float32)
    image[1] = 0.9
    assert not train.predict(Brightest(), image, 16, "cpu").any()
    image[0, 3, 3, 3] *= 1.2
    assert train.predict(Brightest(), image, 16, "cpu").all()


def test_dice_is_the_mean_of_the_classes_that_occur():
    true, found = np.array([0, 1, 1, 0, 0, 0]), np.array([0, 1, 0, 0, 2, 0])
    assert train.dice_of(found, true) == pytest.approx((2 / 3 + 0) / 2)
    assert train.dice_of(true * 0, true * 0) == 1
    assert train.dice_of(true, true) == 1


# --- learning --------------------------------------------------------------------------------


def bright_study(seed):
    """A study whose two kinds of lesion differ in PET and CT from all around."""
    images = study_images(seed, (48, 48, 40), (2.0, 2.0, 2.0), (24, 24, 20), (4.0, 4.0, 4.0))
    ct, pet, mask = (np.asanyarray(images[role].dataobj) for role in ("ct", "petsuv", "mask"))
    random = np.random.default_rng(seed)
    ct[...], pet[...], mask[...] = 40, 1.5, 0
    for label in (3, 7):
        x, y, z = random.integers(5, 15, 3)
        mask[x : x + 5, y : y + 5, z : z + 4] = label
    for label, suv in ((3, 9), (7, 18)):
        pet[mask == label] = suv
    return images


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Eight studies of four patients with labels 3 and 7, trained on three of these patients."""
    folder = tmp_path_factory.mktemp("learnt")
    keys = [f"{patient * 7}00{visit}" for patient in "abcd" for visit in (1, 2)]
    records = {key: {"hash_lengths": [7, 3]} for key in keys}
    studies = {key: bright_study(seed) for seed, key in enumerate(keys)}
    archive = write_zip(folder / "p.zip", studies, records=records)
    volumes = folder / "p.h5"
    command = [archive, "-o", volumes, "-q", "-j", 1, "--labels", "keep", "--shape", 48, 48]
    assert preprocessing.main([str(a) for a in (*command, "--spacing", 2, 2, 2)]) == 0
    (folder / "train.txt").write_text("\n".join(keys[:6]))
    (folder / "val.txt").write_text("\n".join(keys[6:]))
    return folder, keys


def lists(folder):
    return "--train", folder / "train.txt", "--val", folder / "val.txt"


def run(*arguments):
    train.main([str(argument) for argument in arguments])


QUICK = ("--workers", 0, "--width", 12, "--patch", 32, "--window", 32)


@pytest.fixture(scope="module")
def trained(learnt):
    folder, _ = learnt
    numbers = ("--steps", 150, "--report", 50, *QUICK)
    kept = ("--checkpoint", folder / "new" / "net.pt", "--predictions", folder / "predictions")
    command = [sys.executable, ROOT / "examples/train.py", folder / "p.h5", *lists(folder)]
    done = subprocess.run(
        [str(a) for a in (*command, *numbers, *kept)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_held_out_studies_are_told_of_early_and_in_the_end(trained, learnt):
    _, keys = learnt
    lines = trained.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["step 50 of 150", "step 100 of 150"]
    assert all("validation Dice 0." in line for line in lines[:2])
    assert [line.split()[0] for line in lines[2:4]] == keys[6:]
    assert re.fullmatch(r"mean validation Dice 0\.\d{3} of 2 studies", lines[4])


def test_two_labels_are_learnt_and_predicted_as_they_are(trained, learnt):
    """The Dice that is told is that of the files, and to_patient.py takes these."""
    folder, keys = learnt
    with h5py.File(folder / "p.h5") as stored:
        for key in keys[6:]:
            image = nibabel.load(folder / "predictions" / f"{key}.nii.gz")
            found, true = np.asanyarray(image.dataobj), stored["mask"][key][0]
            np.testing.assert_allclose(image.affine, stored["mask"][key].attrs["affine"], atol=1e-4)
            assert found.shape == true.shape
            assert set(np.unique(found)) <= {0, 3, 7}
            scores = [
                2 * ((found == n) & (true == n)).sum() / ((found == n).sum() + (true == n).sum())
                for n in (3, 7)
            ]
            [told] = re.findall(rf"{key}  Dice (\S+)", trained)
            assert float(told) == pytest.approx(np.mean(scores), abs=1e-3)
            assert np.mean(scores) > 0.5
            back = [str(folder / "predictions" / f"{key}.nii.gz"), str(folder / "p.zip")]
            assert to_patient.main(back) == 0


def test_a_checkpoint_finds_again_what_it_found(trained, learnt, tmp_path, capsys):
    folder, keys = learnt
    known = ("--val", folder / "val.txt", "--load", folder / "new" / "net.pt")
    run(folder / "p.h5", *known, "--predictions", tmp_path / "again", *QUICK)
    assert capsys.readouterr().out.splitlines() == trained.splitlines()[2:]
    for key in keys[6:]:
        name = f"predictions/{key}.nii.gz"
        again = (tmp_path / "again" / f"{key}.nii.gz").read_bytes()
        assert (folder / name).read_bytes() == again


def spoilt(kind, folder, tmp_path):
    """Arguments of which one can't be met."""
    volumes, known = folder / "p.h5", folder / "val.txt"
    other = tmp_path / "other.txt"
    match kind:
        case "unknown study":
            other.write_text("ddddddd001\nnobody0001\n")
            return [volumes, "--train", folder / "train.txt", "--val", other]
        case "empty list":
            other.write_text("\n")
            return [volumes, "--train", other, "--val", known]
        case "no such list":
            return [volumes, "--train", other, "--val", known]
        case "a patient on both sides":
            other.write_text("ccccccc001\nddddddd002\n")
            return [volumes, "--train", folder / "train.txt", "--val", other]
        case "no such file":
            return [tmp_path / "none.h5", *lists(folder)]
        case "no HDF5":
            other.write_text("text")
            return [other, *lists(folder)]
        case "2D":
            with h5py.File(tmp_path / "2d.h5", "w") as out:
                out["image/ddddddd001_000"] = np.zeros((2, 4, 4))
            return [tmp_path / "2d.h5", *lists(folder)]
        case "nothing to learn from":
            return [volumes, "--val", known]
        case "no checkpoint":
            other.write_text("text")
            return [volumes, "--val", known, "--load", other]
        case "no voxel":
            with h5py.File(folder / "p.h5") as full, h5py.File(tmp_path / "empty.h5", "w") as out:
                full.copy("image", out)
                for key in full["image"]:
                    out[f"mask/{key}"] = np.zeros((1, 4, 4, 4), np.uint8)
            return [tmp_path / "empty.h5", *lists(folder)]
        case "no GPU":
            return [volumes, *lists(folder), "--device", "cuda"]
    other.write_text("text")
    return [volumes, *lists(folder), "--checkpoint", other / "net.pt"]


@pytest.mark.parametrize(
    ("kind", "said"),
    {
        "unknown study": "1 of 2 studies are not in",
        "empty list": "names no study",
        "no such list": "No such file",
        "a patient on both sides": "1 patients are in both lists, the first is ccccccc",
        "no such file": "cannot be read",
        "no HDF5": "is no 3D file of preprocessing.py",
        "2D": "is no 3D file of preprocessing.py",
        "nothing to learn from": "give --train LIST",
        "no checkpoint": "is no checkpoint",
        "no voxel": "has a voxel of mask",
        "no GPU": "finds no GPU",
        "no folder": "File exists",
    }.items(),
)
def test_what_can_not_be_done_is_one_line(kind, said, learnt, tmp_path):
    if kind == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        run(*spoilt(kind, learnt[0], tmp_path), *QUICK)
    told = ended.value.code  # printed to stderr, with status 1
    assert said in told
    assert told.startswith("error: ")
    assert "\n" not in told


@pytest.mark.parametrize(
    "options",
    [("--patch", 40), ("--steps", 0), ("--width", -1), ("--seed", -1), ("--device", "tpu")],
    ids=str,
)
def test_wrong_arguments_end_with_status_2(options, learnt):
    with pytest.raises(SystemExit) as ended:
        run(learnt[0] / "p.h5", *lists(learnt[0]), *options)
    assert ended.value.code == 2


def test_studies_to_validate_with_must_be_named(learnt):
    with pytest.raises(SystemExit) as ended:
        run(learnt[0] / "p.h5", "--train", learnt[0] / "train.txt")
    assert ended.value.code == 2


# --- snippets --------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["PyTorch", "MONAI", "TorchIO"])
def test_the_snippets_read_the_file(library, tmp_path):
    pytest.importorskip({"PyTorch": "torch"}.get(library, library.lower()))
    page = (ROOT / "docs/training.md").read_text()
    snippet = re.search(rf"## {library}\n.*?```python\n(.*?)```", page, flags=re.DOTALL)[1]
    with h5py.File(tmp_path / "demo_3d.h5", "w") as out:
        for key in KEYS:
            mask = np.zeros((1, 100, 96, 70), np.uint8)
            mask[:, 45:55, 45:55, 30:40] = 1
            out[f"image/{key}"] = np.repeat(mask, 2, axis=0).astype(np.float16) / 4
            out[f"mask/{key}"] = mask
            out[f"image/{key}"].attrs["affine"] = np.diag([-2.0, 2.0, 3.0, 1.0])
            out[f"mask/{key}"].attrs["affine"] = np.diag([-2.0, 2.0, 3.0, 1.0])
    told = {
        "PyTorch": "image, mask = next(iter(loader)); size = (1, 2, 96, 96, 70)",
        "MONAI": "image, mask = batch['image'], batch['mask']; size = (8, 2, 64, 64, 64)",
        "TorchIO": "image, mask = (batch[n]['data'] for n in ('image', 'mask'));"
        "size = (8, 2, 64, 64, 32)",
    }[library]
    checks = (
        f"\n{told}\n"
        "assert tuple(image.shape) == size\n"
        "assert tuple(mask.shape) == (size[0], 1, *size[2:])\n"
        "assert mask.any()\n"
        "assert (image[:, :1] == mask / 4).all()\n"
    )
    run = subprocess.run([sys.executable, "-c", snippet + checks], cwd=tmp_path, text=True)
    assert run.returncode == 0
