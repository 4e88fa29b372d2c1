#!/usr/bin/env python3
"""Train a small 3D U-Net on a file of preprocessing.py: an example to start from.

Needs PyTorch (pip install torch). With the demo's file it learns all lesions within two minutes on
a CPU; on real data raise --steps, --width and --patch, and give a fold of mergeh5.py --splits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

UPTAKE = 0.1
"""PET value from which on tissue counts as taking up tracer: SUV 4 with the default range."""


class LesionPatches(torch.utils.data.Dataset):
    """Random patches of PET and CT with the tumour mask.

    Of four patches two are around tumour, one is around other uptake (what a network takes for
    tumour first: kidneys, bladder, brain), one is anywhere.

    Parameters
    ----------
    path : path of a 3D file
    keys : sequence of str
        Studies to draw from.
    patch : int
        Edge of a patch [voxels]; smaller volumes are padded with zeros.
    count : int
        Patches an epoch.
    target : "mask" or "mask_iso"
    seed : int
        The same index always gives the same patch.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        patch: int = 64,
        count: int = 1000,
        target: str = "mask",
        seed: int = 0,
    ) -> None:
        self.path, self.keys, self.patch, self.count = path, list(keys), patch, count
        self.target, self.seed = target, seed
        self.file: h5py.File | None = None
        self.places: dict[tuple[str, str], np.ndarray] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.file is None:  # each DataLoader worker opens the file for itself
            self.file = h5py.File(self.path, "r")
        random = np.random.default_rng((self.seed, index))
        key = self.keys[random.integers(len(self.keys))]
        image, mask = self.file["image"][key], self.file[self.target][key]
        start = self._start(key, ("tumour", "uptake", "tumour", "anywhere")[index % 4], random)
        box = tuple(slice(s, s + self.patch) for s in start)
        x = self._padded(image[(slice(None), *box)])
        y = self._padded(mask[(slice(None), *box)])
        flipped = tuple(axis for axis in (1, 2, 3) if random.random() < 0.5)
        return tuple(
            torch.from_numpy(np.flip(array, flipped).astype(np.float32)) for array in (x, y)
        )

    def _start(self, key: str, around: str, random: np.random.Generator) -> list[int]:
        last = [max(0, n - self.patch) for n in self.file[self.target][key].shape[1:]]
        voxels = self._voxels(key, around)
        if not len(voxels):
            return [int(random.integers(n + 1)) for n in last]
        center = voxels[random.integers(len(voxels))]
        shift = random.integers(-self.patch // 4, self.patch // 4 + 1, 3)
        return [int(s) for s in np.clip(center + shift - self.patch // 2, 0, last)]

    def _voxels(self, key: str, around: str) -> np.ndarray:
        if (key, around) not in self.places:
            mask = self.file[self.target][key][0] > 0
            if around == "uptake":
                mask = ~mask & (self.file["image"][key][0] > UPTAKE)
            chosen = np.argwhere(mask) if around != "anywhere" else np.empty((0, 3))
            self.places[key, around] = chosen.astype(np.int16)
        return self.places[key, around]

    def _padded(self, array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), *((0, self.patch - n) for n in array.shape[1:])])


class SmallUNet(nn.Module):
    """Two levels down, two up: from PET and CT (N, 2, X, Y, Z) to logits (N, 1, X, Y, Z)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.top = block(2, width)
        self.middle = block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.up_middle = block(6 * width, 2 * width)
        self.up_top = block(3 * width, width)
        self.out = nn.Conv3d(width, 1, 1)
        self.down, self.up = nn.MaxPool3d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top = self.top(x)
        middle = self.middle(self.down(top))
        bottom = self.bottom(self.down(middle))
        middle = self.up_middle(torch.cat([self.up(bottom), middle], 1))
        return self.out(self.up_top(torch.cat([self.up(middle), top], 1)))


def block(n_in: int, n_out: int) -> nn.Sequential:
    """Return convolution, batch normalisation (SUV keeps its scale) and ReLU."""
    return nn.Sequential(nn.Conv3d(n_in, n_out, 3, padding=1), nn.BatchNorm3d(n_out), nn.ReLU())


def loss_of(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus soft Dice loss."""
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, mask)
    return entropy + 1 - dice_of(torch.sigmoid(logits), mask)


def dice_of(prediction: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the Dice coefficient of a prediction in [0, 1]; 1 where both are empty."""
    overlap = (prediction * mask).sum()
    return (2 * overlap + 1) / (prediction.sum() + mask.sum() + 1)


def train(
    path: Path, keys: Sequence[str], steps: int, patch: int, batch: int, width: int, target: str
) -> nn.Module:
    """Return a network trained on the studies `keys`."""
    torch.manual_seed(0)
    network = SmallUNet(width)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    patches = LesionPatches(path, keys, patch, steps * batch, target)
    loader = torch.utils.data.DataLoader(patches, batch, num_workers=0)
    for step, (x, y) in enumerate(loader, start=1):
        loss = loss_of(network(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", file=sys.stderr)
    return network


@torch.no_grad()
def evaluate(network: nn.Module, path: Path, keys: Sequence[str], target: str) -> dict[str, float]:
    """Return the Dice coefficient of each whole study."""
    network.eval()
    found = {}
    with h5py.File(path, "r") as file:
        for key in keys:
            image = torch.from_numpy(file["image"][key][()].astype(np.float32))[None]
            mask = torch.from_numpy(file[target][key][()].astype(np.float32))[None]
            # The network halves the volume twice.
            room = [r for n in reversed(image.shape[2:]) for r in (0, -n % 4)]
            logits = network(nn.functional.pad(image, room))
            prediction = (logits > 0).float()[
                ..., : mask.shape[2], : mask.shape[3], : mask.shape[4]
            ]
            found[key] = float(dice_of(prediction, mask))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print each study's Dice, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE_3d.h5")
    parser.add_argument("--keys", type=Path, help="key list, as of mergeh5.py --splits")
    parser.add_argument("--target", choices=("mask", "mask_iso"), default="mask")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--patch", type=int, default=32, help="edge [voxels], a multiple of 4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--save", type=Path, metavar="WEIGHTS.pt")
    options = parser.parse_args(argv)
    with h5py.File(options.file, "r") as file:
        keys = sorted(file["image"])
    if options.keys:
        keys = options.keys.read_text().split()
    network = train(
        options.file,
        keys,
        options.steps,
        options.patch,
        options.batch,
        options.width,
        options.target,
    )
    scores = evaluate(network, options.file, keys, options.target)
    for key, dice in scores.items():
        print(f"{key}  Dice {dice:.3f}")
    print(f"mean Dice {np.mean(list(scores.values())):.3f}")
    if options.save:
        torch.save(network.state_dict(), options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
