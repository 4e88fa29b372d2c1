"""Training on the file: patches as they are stored, workers that open it, a Dice above 0.9."""

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import createproject
import preprocessing
from examples import phantom

torch = pytest.importorskip("torch", reason="PyTorch is optional")

from examples import train  # noqa: E402

ROOT = Path(__file__).parents[1]
KEYS = ["aaaaaaa001", "bbbbbbb002"]
SHAPE = (40, 36, 30)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Two studies of noise; PET is hot in the mask, and elsewhere in one place."""
    path = tmp_path_factory.mktemp("training") / "all_3d.h5"
    with h5py.File(path, "w") as out:
        for seed, key in enumerate(KEYS):
            random = np.random.default_rng(seed)
            mask = np.zeros((1, *SHAPE), np.uint8)
            mask[0, 20:24, 10:14, 12:16] = 1
            image = (random.random((2, *SHAPE)) / 20).astype(np.float16)
            image[0][mask[0] > 0] = image[0, 5:8, 28:31, 20:23] = 0.2
            out[f"image/{key}"], out[f"mask/{key}"] = image, mask
            out[f"mask_iso/{key}"] = mask * (np.arange(SHAPE[2]) < 14).astype(np.uint8)
            out[f"image/{key}"].attrs["suv_range"] = (0.0, 40.0)
            out[f"image/{key}"].attrs["ct_range"] = (-1000.0, 1000.0)
            out[f"image/{key}"].attrs["affine"] = np.diag([-2.0, 2.0, 3.0, 1.0])
    return path


def test_a_patch_is_a_flipped_part_of_its_study_image_and_mask_alike(file):
    with h5py.File(file) as stored:
        studies = [
            np.concatenate([train.network_input(image[()], image.attrs), stored["mask"][key][()]])
            for key, image in stored["image"].items()
        ]
    places = [np.lib.stride_tricks.sliding_window_view(s, (3, 16, 16, 16))[0] for s in studies]
    for image, mask in (train.LesionPatches(file, KEYS, patch=16)[i] for i in range(6)):
        patch = torch.cat([image, mask]).numpy()
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
        return [train.LesionPatches(file, KEYS[:1], 40, seed=seed)[i][0].numpy() for i in range(24)]

    one = patches(0)
    assert len({patch.tobytes() for patch in one}) == 8  # the whole volume, flipped
    assert all((a == b).all() for a, b in zip(one, patches(0), strict=True))
    assert any((a != b).any() for a, b in zip(one, patches(1), strict=True))


def test_half_of_the_patches_hold_tumour_and_others_hold_other_uptake(file):
    patches = train.LesionPatches(file, KEYS, patch=8)
    held = [
        (bool(y.any()), float(x[0].max()) >= 0.75) for x, y in map(patches.__getitem__, range(80))
    ]
    assert np.mean([tumour for tumour, _ in held[::2]]) > 0.9
    uptake = [hot and not tumour for tumour, hot in held[1::4]]
    assert np.mean(uptake) > 0.9


def test_either_mask_is_the_target(file):
    sums = [
        sum(float(train.LesionPatches(file, KEYS, 40, target=t)[i][1].sum()) for i in range(4))
        for t in ("mask", "mask_iso")
    ]
    assert sums == [4 * 64, 4 * 32]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_open_the_file_for_themselves_though_the_parent_has_it_open(file, start):
    patches = train.LesionPatches(file, KEYS, patch=16, count=12)
    expected = [patches[i] for i in range(12)]
    loader = torch.utils.data.DataLoader(
        patches, batch_size=None, num_workers=2, multiprocessing_context=start
    )
    for (image, mask), (same_image, same_mask) in zip(loader, expected, strict=True):
        assert torch.equal(image, same_image)
        assert torch.equal(mask, same_mask)


def test_volumes_smaller_than_a_patch_are_padded(file):
    image, mask = train.LesionPatches(file, KEYS, patch=48)[0]
    assert image.shape == (2, 48, 48, 48)
    assert mask.sum() == 64


def test_the_network_learns_the_demo_to_a_dice_above_0_9(tmp_path, capsys):
    assert phantom.main([str(tmp_path / "raw")]) == 0
    archive, volumes = tmp_path / "demo.zip", tmp_path / "demo_3d.h5"
    assert createproject.main([str(tmp_path / "raw"), "-o", str(archive), "-q"]) == 0
    assert preprocessing.main([str(archive), "-o", str(volumes), "-q"]) == 0
    capsys.readouterr()
    assert train.main([str(volumes)]) == 0
    scores = re.findall(r"Dice (\d\.\d+)", capsys.readouterr().out)
    assert len(scores) == 6
    assert float(scores[-1]) > 0.9


@pytest.mark.parametrize("library", ["PyTorch", "MONAI", "TorchIO"])
def test_the_snippets_read_the_file(library, tmp_path):
    pytest.importorskip({"PyTorch": "torch"}.get(library, library.lower()))
    page = (ROOT / "docs/training.md").read_text()
    snippet = re.search(rf"## {library}\n.*?```python\n(.*?)```", page, flags=re.DOTALL)[1]
    with h5py.File(tmp_path / "all_3d.h5", "w") as out:
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
