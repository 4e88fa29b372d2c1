#!/usr/bin/env python3
"""Train a small 3D U-Net on a file of preprocessing.py: an example to start from.

Learns from one list of studies, reports early and often how well it finds the lesions of another
(Dice of whole volumes, by overlapping windows), keeps the network, and writes what it predicts as
NIfTI on the training grid, for examples/to_patient.py. On real data raise --steps, --width and
--patch.

Needs PyTorch: pip install torch. Without a GPU its CPU build spares gigabytes: give pip the index
address that pytorch.org shows for "CPU", by the option --index-url.
"""

import argparse
import itertools
import math
import os
import pickle
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from scipy import ndimage
from torch import nn

try:  # libdeflate: three times as fast
    from deflate import zlib_decompress as inflate
except ImportError:

    def inflate(squeezed: bytes, size: int) -> bytes:
        """Return what zlib makes of a chunk."""
        return zlib.decompress(squeezed, bufsize=size)


EPILOG = """examples:
  python mergeh5.py demo/out/raw_3d.h5 -o all_3d.h5 --splits 4 --splits-dir splits
  python examples/train.py all_3d.h5 --train splits/fold1_train.txt --val splits/fold1_val.txt
  python examples/train.py all_3d.h5 --train splits/fold1_train.txt --val splits/fold1_val.txt \\
      --checkpoint net.pt --predictions predictions
  python examples/train.py new_3d.h5 --val new.txt --load net.pt --predictions predictions
"""

HOT_SUV = 4.0
"""Uptake that a network takes for tumour first: brain, kidneys, bladder."""

PALE_SUV = 1.0
"""What no tumour stays below, nor blood: where nothing is brighter is air, or a limb."""

SUV_SCALE, HU_MIDDLE, HU_SCALE = 10.0, 40.0, 100.0
"""By which SUV and HU become a network's input."""

AROUND = (*("tumour", "uptake") * 3, "tumour", "anywhere")
"""What one patch after the other is around."""

FEWEST_VOXELS, MOST_PLACES = 500, 2000
"""Of uptake that is no noise, nor a lesion's rim; voxels of a region that patches are around."""


# --- the file --------------------------------------------------------------------------------


def opened(path: Path) -> h5py.File:
    """Open a file for reading; without a lock many processes may, on any file system."""
    return h5py.File(path, "r", locking=False)


def read_patch(dataset: h5py.Dataset, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Return ``dataset[:, x:x + nx, y:y + ny, z:z + nz]``, faster than h5py inflates its chunks."""
    first, stop = np.array([0, *corner]), np.array([dataset.shape[0], *np.add(corner, size)])
    is_plain = dataset.compression != "gzip" or dataset.fletcher32
    if is_plain or dataset.shuffle != (dataset.dtype.itemsize > 1):
        return dataset[tuple(map(slice, first, stop))]
    patch, edges = np.zeros(stop - first, dataset.dtype), np.array(dataset.chunks)
    whole = np.dtype(f"u{dataset.dtype.itemsize}")
    starts = (range(a // e * e, b, e) for a, b, e in zip(first, stop, edges, strict=True))
    for at in itertools.product(*map(list, starts)):
        if not dataset.id.get_chunk_info_by_coord(at).size:
            continue  # a chunk of zeros is not in the file
        squeezed = dataset.id.read_direct_chunk(at)[1]
        bytes_apart = np.frombuffer(inflate(squeezed, int(edges.prod()) * whole.itemsize), np.uint8)
        values = np.zeros(edges.prod(), whole)
        for place, each in enumerate(bytes_apart.reshape(whole.itemsize, -1)):
            values |= each.astype(whole) << 8 * place
        low, high = np.maximum(first, at), np.minimum(stop, at + edges)
        inside = tuple(map(slice, low - at, high - at))
        chunk = values.view(dataset.dtype).reshape(edges)
        patch[tuple(map(slice, low - first, high - first))] = chunk[inside]
    return patch


def in_units(values: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    """Return normalised values in SUV or HU, by the range that the file keeps."""
    return values.astype(np.float32) * (limits[1] - limits[0]) + limits[0]


def network_input(image: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    """Return PET and CT (2, X, Y, Z) with the contrast that a reader would choose."""
    suv = in_units(image[0], attributes["suv_range"])
    hu = in_units(image[1], attributes["ct_range"])
    return np.stack(
        [np.minimum(suv / SUV_SCALE, 2), np.clip((hu - HU_MIDDLE) / HU_SCALE, -1, 1)]
    ).astype(np.float32)


class LesionPatches(torch.utils.data.Dataset):
    """Random patches of PET and CT with the tumour mask, flipped at random.

    Half of them are around a lesion, three eighths around other uptake, the others anywhere.

    Parameters
    ----------
    path : path of a 3D file
    keys : sequence of str
        Studies to draw from.
    patch : int
        Edge of a patch [voxels]; smaller volumes are padded with zeros.
    count : int
        Patches in all.
    target : "mask" or "mask_iso"
    labels : sequence of int
        Label values of classes 1, 2 and so on; other voxels are of class 0.
    seed : int
        The same index always gives the same patch, in whichever worker.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        patch: int = 64,
        count: int = 1000,
        target: str = "mask",
        labels: Sequence[int] = (1,),
        seed: int = 0,
    ) -> None:
        self.path, self.keys, self.patch, self.count = path, list(keys), patch, count
        self.target, self.labels, self.seed = target, labels, seed
        self.file, self.opened_by = None, 0
        self.places: dict[tuple[str, str], list[np.ndarray]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an image (2, P, P, P) and the class of each voxel (P, P, P)."""
        file, chance = self._opened(), np.random.default_rng((self.seed, index))
        key = self.keys[chance.integers(len(self.keys))]
        image, mask = file["image"][key], file[self.target][key]
        start = self._start(key, AROUND[index % len(AROUND)], chance)
        size = np.minimum(self.patch, image.shape[1:])
        x = self._padded(network_input(read_patch(image, start, size), image.attrs))
        y = classes_of(self._padded(read_patch(mask, start, size))[0], self.labels)
        flipped = tuple(axis for axis in (0, 1, 2) if chance.random() < 0.5)
        x, y = np.flip(x, [axis + 1 for axis in flipped]), np.flip(y, flipped)
        return torch.from_numpy(x.copy()), torch.from_numpy(y.copy())

    def _opened(self) -> h5py.File:
        # Each DataLoader worker opens the file for itself: HDF5 does not survive a fork.
        if self.opened_by != os.getpid():
            self.file, self.opened_by = opened(self.path), os.getpid()
        return self.file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "file": None, "opened_by": 0}

    def _start(self, key: str, around: str, chance: np.random.Generator) -> list[int]:
        last = [max(0, n - self.patch) for n in self._opened()[self.target][key].shape[1:]]
        voxels = self._voxels(key, around, chance)
        if not len(voxels):
            return [int(chance.integers(n + 1)) for n in last]
        center = voxels[chance.integers(len(voxels))]
        shift = chance.integers(-self.patch // 4, self.patch // 4 + 1, 3)
        return [int(s) for s in np.clip(center + shift - self.patch // 2, 0, last)]

    def _voxels(self, key: str, around: str, chance: np.random.Generator) -> np.ndarray:
        """Return the voxels of one lesion or organ, each as likely as any other of the study."""
        if (key, "tumour") not in self.places:  # the whole study is read once
            image, mask = self._opened()["image"][key], self._opened()[self.target][key]
            tumour = read_patch(mask, (0, 0, 0), mask.shape[1:])[0] > 0
            suv = read_patch(image, (0, 0, 0), image.shape[1:])[0]
            least, most = image.attrs["suv_range"]
            uptake = ~tumour & (suv > (HOT_SUV - least) / (most - least))
            self.places[key, "tumour"] = regions(tumour)
            self.places[key, "uptake"] = regions(uptake, FEWEST_VOXELS)
        found = self.places.get((key, around))
        return found[chance.integers(len(found))] if found else np.empty((0, 3), np.int16)

    def _padded(self, array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 0), *((0, self.patch - n) for n in array.shape[1:])])


def regions(chosen: np.ndarray, fewest: int = 1) -> list[np.ndarray]:
    """Return some voxels (N, 3) of each connected region of a mask that has as many as `fewest`."""
    numbers, _ = ndimage.label(chosen)
    voxels = np.argwhere(chosen).astype(np.int16)
    order = np.argsort(numbers[chosen], kind="stable")
    _, starts, sizes = np.unique(numbers[chosen][order], return_index=True, return_counts=True)
    return [
        voxels[order[start : start + size]][:: 1 + size // MOST_PLACES]
        for start, size in zip(starts, sizes, strict=True)
        if size >= fewest
    ]


def classes_of(mask: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Return the class of each voxel: n for the n-th label value, else 0."""
    classes = np.zeros(mask.shape, np.int64)
    for number, label in enumerate(labels, start=1):
        classes[mask == label] = number
    return classes


def labels_in(path: Path, keys: Sequence[str], target: str) -> list[int]:
    """Return the label values of masks: 1, or several with preprocessing.py --labels keep."""
    found: set[int] = set()
    with opened(path) as file:
        for key in keys:
            mask = file[target][key]
            found.update(np.unique(read_patch(mask, (0, 0, 0), mask.shape[1:])).tolist())
    return sorted(found - {0})


# --- the network -----------------------------------------------------------------------------


class SmallUNet(nn.Module):
    """PET and CT (N, 2, X, Y, Z) to logits (N, classes, X, Y, Z), mostly at half resolution.

    Edges are halved four times: a network that sees no more than a patch takes the heart, where
    that has uptake, for tumour.
    """

    def __init__(self, width: int = 8, n_classes: int = 2) -> None:
        super().__init__()
        channels = [2 * width, 4 * width, 4 * width, 8 * width]
        pairs = list(itertools.pairwise(channels))
        self.stem = nn.Conv3d(2, width, 2, stride=2)
        self.first = block(width, channels[0])
        self.downs = nn.ModuleList(block(upper, lower) for upper, lower in pairs)
        self.narrows = nn.ModuleList(nn.Conv3d(lower, upper, 1) for upper, lower in pairs)
        self.ups = nn.ModuleList(block(2 * upper, upper) for upper, _ in pairs)
        self.rise = nn.ConvTranspose3d(channels[0], width // 2, 2, stride=2)
        self.fine = block(2 + width // 2, width)
        self.out = nn.Conv3d(width, n_classes, 1)
        self.shrink, self.grow = nn.MaxPool3d(2), nn.Upsample(scale_factor=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        levels = [self.first(self.stem(image))]
        for down in self.downs:
            levels.append(down(self.shrink(levels[-1])))
        x = levels.pop()
        for narrow, up in zip(reversed(self.narrows), reversed(self.ups), strict=True):
            x = up(torch.cat([self.grow(narrow(x)), levels.pop()], 1))
        return self.out(self.fine(torch.cat([self.rise(x), image], 1)))


def block(n_in: int, n_out: int) -> nn.Sequential:
    """Return convolution, batch normalisation (SUV keeps its scale) and ReLU."""
    convolution = nn.Conv3d(n_in, n_out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(n_out), nn.ReLU(inplace=True))


def loss_of(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus one minus the soft Dice of all classes but 0."""
    shares = torch.softmax(logits, 1)[:, 1:]
    true = nn.functional.one_hot(classes, logits.shape[1]).movedim(-1, 1)[:, 1:]
    over = (0, 2, 3, 4)
    dice = (2 * (shares * true).sum(over) + 1) / (shares.sum(over) + true.sum(over) + 1)
    return nn.functional.cross_entropy(logits, classes) + 1 - dice.mean()


# --- whole volumes ---------------------------------------------------------------------------


@torch.no_grad()
def predict(network: nn.Module, image: np.ndarray, window: int, device: str) -> np.ndarray:
    """Return the class of each voxel of a network's input (2, X, Y, Z), of any size.

    Windows overlap by a quarter at least; their logits are averaged, the middle of each counting
    most. Where the PET of a window is as pale as air, all of it is background.
    """
    network.eval()
    room = [max(0, window - n) for n in image.shape[1:]]
    padded = torch.from_numpy(np.pad(image, [(0, 0), *((0, r) for r in room)]))
    ramp = torch.arange(1, window + 1).minimum(torch.arange(window, 0, -1)) / window
    weight = (ramp[:, None, None] * ramp[:, None] * ramp).to(device)
    total = torch.zeros(network.out.out_channels, *padded.shape[1:])
    for corner in corners(padded.shape[1:], window):
        box = (slice(None), *(slice(at, at + window) for at in corner))
        if padded[box][0].max() > PALE_SUV / SUV_SCALE:
            total[box] += (network(padded[box][None].to(device))[0] * weight).cpu()
    nx, ny, nz = image.shape[1:]
    return total.argmax(0)[:nx, :ny, :nz].numpy()


def corners(shape: Sequence[int], window: int) -> Iterator[tuple[int, ...]]:
    """Yield where windows begin that cover a volume evenly, each a quarter in the next."""
    along = []
    for last in (n - window for n in shape):
        n_windows = 1 + math.ceil(last / (window - window // 4))
        along.append(np.linspace(0, last, n_windows).astype(int).tolist())
    return itertools.product(*along)


def dice_of(found: np.ndarray, true: np.ndarray, n_classes: int) -> float:
    """Return the mean Dice of the classes but 0 that either has; 1 where there is none."""
    scores = []
    for number in range(1, n_classes):
        here, there = found == number, true == number
        if here.any() or there.any():
            scores.append(2 * (here & there).sum() / (here.sum() + there.sum()))
    return float(np.mean(scores)) if scores else 1.0


def validate(
    network: nn.Module,
    options: argparse.Namespace,
    labels: Sequence[int],
    keys: Sequence[str],
    folder: Path | None = None,
) -> dict[str, float]:
    """Return the Dice of each study, and write what is predicted to a folder."""
    scores = {}
    with opened(options.file) as file:
        for key in keys:
            image, mask = file["image"][key], file[options.target][key]
            whole = (0, 0, 0), image.shape[1:]
            x = network_input(read_patch(image, *whole), image.attrs)
            found = predict(network, x, options.window, options.device)
            true = classes_of(read_patch(mask, *whole)[0], labels)
            scores[key] = dice_of(found, true, len(labels) + 1)
            if folder is not None:
                values = np.array([0, *labels], mask.dtype)[found]
                write_nifti(folder / f"{key}.nii.gz", values, image.attrs["affine"])
    return scores


def write_nifti(path: Path, labels: np.ndarray, affine: np.ndarray) -> None:
    """Write labels with their place in space."""
    import nibabel

    image = nibabel.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


# --- training --------------------------------------------------------------------------------


def train(network: nn.Module, options: argparse.Namespace, labels: Sequence[int]) -> None:
    """Train on random patches; report, and keep a checkpoint, now and then."""
    patches = LesionPatches(
        options.file,
        options.train,
        options.patch,
        options.steps * options.batch,
        options.target,
        labels,
        options.seed,
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    # On several GPUs: sampler=torch.utils.data.DistributedSampler(patches, shuffle=False).
    loader = torch.utils.data.DataLoader(patches, options.batch, num_workers=options.workers)
    for step, (x, y) in enumerate(loader, start=1):
        network.train()
        x, y = x.to(options.device), y.to(options.device)
        loss = loss_of(network(x.contiguous(memory_format=torch.channels_last_3d)), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % options.report == 0 and step < options.steps:
            dice = mean(validate(network, options, labels, options.val[: options.report_studies]))
            told = f"loss {loss.item():.3f}, validation Dice {dice:.3f}"
            print(f"step {step} of {options.steps}: {told}", flush=True)
            if options.checkpoint:
                save(options.checkpoint, network, options.width, labels)


def mean(scores: Mapping[str, float]) -> float:
    """Return the mean of all studies."""
    return float(np.mean(list(scores.values())))


def save(path: Path, network: nn.Module, width: int, labels: Sequence[int]) -> None:
    """Replace a checkpoint at once: weights, and what is needed to make their network."""
    made = {"width": width, "labels": list(labels), "weights": network.state_dict()}
    torch.save(made, path.with_name(f".{path.name}.tmp"))
    path.with_name(f".{path.name}.tmp").replace(path)


# --- options ---------------------------------------------------------------------------------


class Refusal(Exception):
    """What keeps the training from beginning, in a line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print each validation study's Dice, and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for name in NUMBERS:
        if not vars(options)[name.replace("-", "_")] and name not in ("seed", "workers"):
            parser.error(f"--{name}: give at least 1")
    if options.patch % 16 or options.window % 16 or options.width % 2:
        parser.error("--patch and --window are multiples of 16, --width of 2: the network halves")
    try:
        run(options)
    except (Refusal, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


NUMBERS = {
    "steps": (450, "of training"),
    "report": (150, "validate every N steps"),
    "report-studies": (4, "with so many studies; in the end with all"),
    "patch": (48, "edge of a patch [voxels]"),
    "window": (64, "edge of a window in whole volumes [voxels]"),
    "batch": (4, "patches a step"),
    "width": (8, "channels on top"),
    "workers": (1, "processes that read patches"),
    "threads": (torch.get_num_threads(), "of the network"),
    "seed": (0, "of weights and patches"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE_3d.h5", help="of preprocessing.py or mergeh5.py")
    add("--train", type=Path, metavar="LIST", help="studies to learn from")
    add("--val", type=Path, metavar="LIST", help="to validate with (default: every 4th patient)")
    add("--target", choices=("mask", "mask_iso"), default="mask", help="(default: mask)")
    add("--checkpoint", type=Path, metavar="NET.pt", help="keep the network")
    add("--load", type=Path, metavar="NET.pt", help="begin with it; without --train use it alone")
    add("--predictions", type=Path, metavar="DIR", help="write <hash>.nii.gz of those validated")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    for name, (default, told) in NUMBERS.items():
        told = f"{told} (default: {default})"
        add(f"--{name}", type=whole_number, default=default, metavar="N", help=told)
    return parser


def whole_number(text: str) -> int:
    """Parse a number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Do what the options ask for."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.device = device_of(options.device)
    options.train, options.val = lists_of(options)
    if options.predictions:
        options.predictions.mkdir(parents=True, exist_ok=True)
    if options.checkpoint and not options.checkpoint.parent.is_dir():
        raise Refusal(f"{options.checkpoint}: its folder does not exist")
    loaded = load(options.load) if options.load else {}
    options.width = loaded.get("width", options.width)
    labels = loaded.get("labels") or labels_in(options.file, options.train, options.target)
    if not labels:
        raise Refusal(f"no study of the training list has a voxel of {options.target}")
    network = SmallUNet(options.width, len(labels) + 1)
    network.load_state_dict(loaded.get("weights", network.state_dict()))
    network.to(options.device, memory_format=torch.channels_last_3d)
    if options.train:
        train(network, options, labels)
    if options.checkpoint:
        save(options.checkpoint, network, options.width, labels)
    scores = validate(network, options, labels, options.val, options.predictions)
    for key, dice in scores.items():
        print(f"{key}  Dice {dice:.3f}")
    print(f"mean validation Dice {mean(scores):.3f} of {len(scores)} studies")


def device_of(name: str) -> str:
    """Return where the network is: on a GPU if there is one, unless told."""
    if name == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: PyTorch finds no GPU: take --device cpu, or its CUDA build")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load(path: Path) -> dict[str, Any]:
    """Return what `save` has written."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        KeyError,
        ValueError,
        EOFError,
        IndexError,
        pickle.UnpicklingError,
    ) as error:
        raise Refusal(f"{path}: is no checkpoint of train.py") from error


def lists_of(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the studies to learn from and to validate with: no patient is on both sides."""
    patient_of = patients_in(options.file)
    if options.val is None:
        if options.train or options.load:
            raise Refusal("--val LIST is missing: studies that the network has not seen")
        patients = sorted({*patient_of.values()})
        if len(patients) < 2:
            raise Refusal("one patient alone can't be validated with: give a file of several")
        held_out = {*patients[::4]}
        return (
            [key for key, patient in patient_of.items() if patient not in held_out],
            [key for key, patient in patient_of.items() if patient in held_out],
        )
    lists = []
    for path in (options.train, options.val):
        keys = path.read_text().split() if path else []
        unknown = [key for key in keys if key not in patient_of]
        if unknown:
            raise Refusal(
                f"{path}: {len(unknown)} of {len(keys)} studies are not in {options.file}, the "
                f"first is {unknown[0]!r}: give the lists that mergeh5.py --splits wrote for it"
            )
        if path and not keys:
            raise Refusal(f"{path}: names no study")
        lists.append(keys)
    shared = {patient_of[key] for key in lists[0]} & {patient_of[key] for key in lists[1]}
    if shared:
        raise Refusal(
            f"{len(shared)} patients are in both lists, the first is {min(shared)}: its Dice would "
            "say nothing of others; make lists by mergeh5.py --splits"
        )
    if not lists[0] and not options.load:
        raise Refusal("give --train LIST to learn, or --load NET.pt to validate a network")
    return lists[0], lists[1]


def patients_in(path: Path) -> dict[str, str]:
    """Return the patient's part of the hash of each study; the whole of it where nothing tells."""
    try:
        with opened(path) as file:
            images = file["image"]
            if not isinstance(images, h5py.Group) or any(i.ndim != 4 for i in images.values()):
                raise Refusal(f"{path}: is 2D: give the 3D file of preprocessing.py")
            lengths = {key: image.attrs.get("hash_lengths") for key, image in images.items()}
    except (KeyError, OSError) as error:
        raise Refusal(f"{path}: cannot be read, or is no file of preprocessing.py") from error
    return {key: key if found is None else key[: found[0]] for key, found in lengths.items()}


if __name__ == "__main__":
    sys.exit(main())
