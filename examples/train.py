#!/usr/bin/env python3
"""Train a small 3D U-Net on a file of preprocessing.py: an example to start from.

Learns from one list of studies, reports early the Dice of whole volumes of another, and writes its
predictions for examples/to_patient.py. On real data raise --steps, --width and --patch.

Needs PyTorch: pip install torch. Without a GPU its CPU build spares gigabytes: give pip the index
address that pytorch.org shows for "CPU", by the option --index-url.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import nibabel
import numpy as np
import torch
from deflate import zlib_decompress as inflate
from scipy import ndimage
from torch import nn

HOT_SUV, FEWEST_VOXELS = 4.0, 500  # uptake that a network takes for tumour first, and no noise
SUV_SCALE, HU_MIDDLE, HU_SCALE = 5.0, 40.0, 100.0
PALE = math.sqrt(1 / SUV_SCALE)  # input of SUV 1: where nothing is brighter is air, or a limb
EARLY_STUDIES = 3  # validated with now and then; in the end all are


def read_patch(dataset: h5py.Dataset, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Return ``dataset[:, x:x + nx, y:y + ny, z:z + nz]``, faster than h5py inflates its chunks."""
    box = [(0, len(dataset)), *((int(a), int(a + n)) for a, n in zip(corner, size, strict=True))]
    width, edges, chunks = dataset.dtype.itemsize, dataset.chunks, dataset.id
    ours = dataset.dtype.str in ("<f2", "<f4", "|u1") and dataset.shuffle == (width > 1)
    if dataset.compression != "gzip" or dataset.fletcher32 or not ours:
        return dataset[tuple(slice(*ends) for ends in box)]
    cuts = [  # of each axis: where a chunk begins, its part inside, and that part's place
        [(at, slice(max(a - at, 0), b - at), slice(max(at - a, 0), at + e - a)) for at in starts]
        for (a, b), e in zip(box, edges, strict=True)
        for starts in [range(a // e * e, b, e)]
    ]
    patch = np.empty([b - a for a, b in box], f"<u{width}")
    for at, inside, place in (zip(*cut, strict=True) for cut in itertools.product(*cuts)):
        try:
            squeezed = chunks.read_direct_chunk(at)[1]
        except RuntimeError:
            if chunks.get_chunk_info_by_coord(at).size:
                raise
            patch[place] = 0  # a chunk of zeros is not in the file
            continue
        bytes_apart = np.frombuffer(inflate(squeezed, width * math.prod(edges)), np.uint8)
        *lower, values = bytes_apart.reshape(width, *edges)[:, *inside[:-1]]
        for byte in reversed(lower):
            values = np.multiply(values, 256, dtype=patch.dtype)
            values |= byte
        patch[place] = values[..., inside[-1]]
    return patch.view(dataset.dtype)


def network_input(image: np.ndarray, attributes: h5py.AttributeManager) -> np.ndarray:
    """Return PET and CT (2, X, Y, Z) with the contrast that a reader would choose."""
    least, most = np.transpose([attributes["suv_range"], attributes["ct_range"]]).astype(np.float32)
    suv, hu = (image[n] * (most[n] - least[n]) + least[n] for n in (0, 1))
    return np.stack([np.sqrt(suv.clip(0) / SUV_SCALE), ((hu - HU_MIDDLE) / HU_SCALE).clip(-1, 1)])


def classes_of(mask: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Return the class of each voxel: n for the n-th label value, else 0."""
    return sum((mask == label) * np.int64(n) for n, label in enumerate(labels, start=1))


class Patches(torch.utils.data.Dataset):
    """Random patches (2, P, P, P) and classes (P, P, P), in turn around lesions and uptake."""

    def __init__(self, options: argparse.Namespace, labels: Sequence[int]) -> None:
        self.options, self.labels = options, labels
        self.boxes: dict[str, tuple[list, list]] = {}

    def __len__(self) -> int:
        return self.options.steps * self.options.batch

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        chance, edge = np.random.default_rng((self.options.seed, index)), self.options.patch
        key = self.options.train[chance.integers(len(self.options.train))]
        # Opened in each worker, as HDF5 does not survive a fork; without a lock many may.
        with h5py.File(self.options.file, "r", locking=False) as file:
            image, mask = file["image"][key], file[self.options.target][key]
            if key not in self.boxes:
                self.boxes[key] = boxes_of(image, mask)  # the whole study is read once
            found = self.boxes[key][index % 2] or [[slice(0, n) for n in image.shape[1:]]]
            center = [chance.integers(s.start, s.stop) for s in found[chance.integers(len(found))]]
            corner = np.add(center, chance.integers(-edge // 4, edge // 4 + 1, 3)) - edge // 2
            corner = corner.clip(0, np.subtract(image.shape[1:], edge).clip(0))
            size = np.minimum(edge, image.shape[1:])
            x = network_input(read_patch(image, corner, size), image.attrs)
            y = classes_of(read_patch(mask, corner, size), self.labels)
        padding = [(0, 0), *((0, edge - n) for n in size)]
        flipped = [axis for axis in (1, 2, 3) if chance.random() < 0.5]
        x, y = (np.flip(np.pad(each, padding), flipped).copy() for each in (x, y))
        return torch.from_numpy(x), torch.from_numpy(y[0])


def boxes_of(image: h5py.Dataset, mask: h5py.Dataset) -> tuple[list, list]:
    """Return the box of each lesion, and of each other region of high uptake."""
    tumour, (least, most) = mask[0] > 0, image.attrs["suv_range"]
    uptake = ~tumour & (image[0] > (HOT_SUV - least) / (most - least))
    lesions, others = (ndimage.find_objects(ndimage.label(each)[0]) for each in (tumour, uptake))
    return lesions, [b for b in others if math.prod(s.stop - s.start for s in b) >= FEWEST_VOXELS]


class UNet(nn.Sequential):
    """PET and CT (N, 2, X, Y, Z) to logits (N, classes, X, Y, Z), by blocks of 2 x 2 x 2 voxels."""

    def __init__(self, width: int, labels: Sequence[int]) -> None:
        inner: list[nn.Module] = []
        for w, wider in ((4 * width, 4 * width), (2 * width, 4 * width), (width, 2 * width)):
            inner = [Coarser(w, wider, inner), block(w, w)]
        first = nn.Conv3d(2, width, 2, stride=2)
        last = nn.ConvTranspose3d(width, len(labels) + 1, 2, stride=2)
        super().__init__(first, block(width, width), *inner, last)
        self.width, self.labels = width, list(labels)


class Coarser(nn.Module):
    """Add what is seen at half the resolution, and by the modules within."""

    def __init__(self, width: int, wider: int, inner: Sequence[nn.Module]) -> None:
        super().__init__()
        up = nn.Conv3d(wider, width, 1), nn.Upsample(scale_factor=2)
        self.seen = nn.Sequential(nn.MaxPool3d(2), block(width, wider), *inner, *up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.seen(x)


def block(n_in: int, n_out: int) -> nn.Sequential:
    convolution = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(n_out), nn.ReLU(inplace=True))


def loss_of(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus one minus the soft Dice of all classes but 0."""
    shares, over = torch.softmax(logits, 1)[:, 1:], (0, 2, 3, 4)
    true = nn.functional.one_hot(classes, logits.shape[1]).movedim(-1, 1)[:, 1:]
    dice = (2 * (shares * true).sum(over) + 1) / (shares.sum(over) + true.sum(over) + 1)
    return nn.functional.cross_entropy(logits, classes) + 1 - dice.mean()


@torch.no_grad()
def predict(network: nn.Module, image: np.ndarray, window: int, device: str) -> np.ndarray:
    """Return the class of each voxel of an input (2, X, Y, Z), by windows that overlap."""
    network.eval()
    padding = ((0, max(0, window - n)) for n in image.shape[1:])
    padded = torch.from_numpy(np.pad(image, [(0, 0), *padding]))
    ramp = torch.arange(1, window + 1).minimum(torch.arange(window, 0, -1)) / window
    weight = (ramp[:, None, None] * ramp[:, None] * ramp).to(device)
    total = torch.zeros(len(network.labels) + 1, *padded.shape[1:])
    starts = ([*range(0, n - window, window * 3 // 4), n - window] for n in padded.shape[1:])
    for corner in itertools.product(*starts):
        box = (slice(None), *(slice(at, at + window) for at in corner))
        if padded[box][0].max() > PALE:
            total[box] += (network(padded[box][None].to(device))[0] * weight).cpu()
    return total.argmax(0)[tuple(map(slice, image.shape[1:]))].numpy()


def dice_of(found: np.ndarray, true: np.ndarray) -> float:
    """Return the mean Dice of the classes but 0 that either has; 1 where there is none."""
    pairs = [(found == n, true == n) for n in {*np.unique(found), *np.unique(true)} - {0}]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs] or 1.0))


def validate(network: UNet, options: argparse.Namespace, keys: Sequence[str]) -> Iterator[float]:
    """Yield the Dice of each study, and write what is predicted as NIfTI on the training grid."""
    with h5py.File(options.file, "r", locking=False) as file:
        for key in keys:
            image, mask = file["image"][key], file[options.target][key]
            x = network_input(read_patch(image, (0, 0, 0), image.shape[1:]), image.attrs)
            found = predict(network, x, options.window, options.device)
            if options.predictions:
                labels = np.array([0, *network.labels], mask.dtype)[found]
                prediction = nibabel.Nifti1Image(labels, image.attrs["affine"])
                prediction.header.set_xyzt_units("mm")
                nibabel.save(prediction, options.predictions / f"{key}.nii.gz")
            yield dice_of(found, classes_of(mask[0], network.labels))


def train(network: UNet, options: argparse.Namespace) -> None:
    """Train on random patches; report, and keep a checkpoint, now and then."""
    patches = Patches(options, network.labels)
    loader = torch.utils.data.DataLoader(patches, options.batch, num_workers=options.workers)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    for step, (x, y) in enumerate(loader, start=1):
        network.train()
        loss = loss_of(network(x.to(options.device)), y.to(options.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % options.report == 0 and step < options.steps:
            scores = [*validate(network, options, options.val[:EARLY_STUDIES])]
            told = f"loss {loss.item():.3f}, validation Dice {np.mean(scores):.3f}"
            print(f"step {step} of {options.steps}: {told}", flush=True)
        if options.checkpoint and (step % options.report == 0 or step == options.steps):
            kept = {"width": network.width, "labels": network.labels, "state": network.state_dict()}
            half = options.checkpoint.with_name(f".{options.checkpoint.name}.tmp")
            torch.save(kept, half)
            half.replace(options.checkpoint)


def network_of(options: argparse.Namespace) -> UNet:
    """Return the network of a checkpoint, or a new one for the labels in the masks."""
    if options.load:
        try:
            kept = torch.load(options.load, map_location="cpu", weights_only=True)
            network = UNet(kept["width"], kept["labels"])
            network.load_state_dict(kept["state"])
        except Exception:  # of a dozen classes
            sys.exit(f"error: {options.load}: cannot be read, or is no checkpoint of train.py")
        return network
    with h5py.File(options.file, "r", locking=False) as file:
        masks = (file[options.target][key][()] for key in options.train)
        labels = {label for mask in masks for label in np.unique(mask).tolist() if label}
    if not labels:
        sys.exit(f"error: no study of the training list has a voxel of {options.target}")
    return UNet(options.width, sorted(labels))


def check(options: argparse.Namespace) -> None:
    """Read the lists, and end in a line where something can't be done, before anything is."""
    try:
        with h5py.File(options.file, "r", locking=False) as file:
            lengths = {k: v.attrs.get("hash_lengths", [None])[0] for k, v in file["image"].items()}
            if any(study.ndim != 4 for study in file["image"].values()):
                raise KeyError("2D")
    except (AttributeError, KeyError, OSError):  # AttributeError: a stack of projections
        sys.exit(f"error: {options.file}: cannot be read, or is no 3D file of preprocessing.py")
    for name in ("train", "val"):
        path = vars(options)[name]
        keys = path.read_text().split() if path else []
        if unknown := [key for key in keys if key not in lengths]:
            told = f"{len(unknown)} of {len(keys)} studies are not in {options.file}"
            sys.exit(f"error: {path}: {told}, the first is {unknown[0]!r}")
        if path and not keys:
            sys.exit(f"error: {path}: names no study")
        setattr(options, name, keys)
    train, val = ({key[: lengths[key]] for key in keys} for keys in (options.train, options.val))
    if both := train & val:
        told = f"{len(both)} patients are in both lists, the first is {min(both)}"
        sys.exit(f"error: {told}: take lists of mergeh5.py --splits")
    if not options.train and not options.load:
        sys.exit("error: give --train LIST to learn, or --load NET.pt to validate a network")
    for folder in (options.predictions, options.checkpoint and options.checkpoint.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no GPU: take cpu, or its CUDA build")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"


NUMBERS = {  # default, factor, meaning
    "steps": (1000, 1, "of training"),
    "report": (500, 1, f"validate every N steps with {EARLY_STUDIES} studies, in the end with all"),
    "patch": (48, 16, "edge of a patch [voxels]"),
    "window": (96, 16, "edge of a window in whole volumes [voxels]"),
    "batch": (4, 1, "patches a step"),
    "width": (16, 1, "channels on top"),
    "workers": (1, 0, "processes that read patches"),
    "seed": (0, 0, "of weights and patches"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print each validation study's Dice."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("file", type=Path, metavar="FILE_3d.h5", help="of preprocessing.py or mergeh5.py")
    add("--train", type=Path, metavar="LIST", help="studies to learn from")
    add("--val", type=Path, metavar="LIST", required=True, help="studies to validate with")
    add("--target", choices=("mask", "mask_iso"), default="mask", help="(default: mask)")
    add("--checkpoint", type=Path, metavar="NET.pt", help="keep the network")
    add("--load", type=Path, metavar="NET.pt", help="begin with it; without --train use it alone")
    add("--predictions", type=Path, metavar="DIR", help="write <hash>.nii.gz of those validated")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    for name, (default, _, told) in NUMBERS.items():
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{told} ({default})")
    options = parser.parse_args(argv)
    for name, (_, factor, _) in NUMBERS.items():
        if vars(options)[name] < factor or vars(options)[name] % max(1, factor):
            parser.error(f"--{name}: give a multiple of {factor}" if factor else f"--{name}: >= 0")
    try:
        check(options)
        torch.manual_seed(options.seed)
        network = network_of(options).to(options.device)
        if options.train:
            train(network, options)
        scores = [*validate(network, options, options.val)]
    except OSError as error:
        sys.exit(f"error: {error}")
    for key, dice in zip(options.val, scores, strict=True):
        print(f"{key}  Dice {dice:.3f}")
    print(f"mean validation Dice {np.mean(scores):.3f} of {len(scores)} studies")


if __name__ == "__main__":
    main()
