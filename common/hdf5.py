"""HDF5 files of studies (3D) and of their projections (2D): layout, reading, raw-copy assembly.

The only module that knows h5py. A part of one study is written in the very layout of the final
file, so assembling a run's parts and merging finished files are the same raw copy: chunks,
filters and attributes go over as they are.

    image/<key>     (2, X, Y, Z) or (2, X, Z)    float, [0] = PET, [1] = CT
    mask/<key>      (1, X, Y, Z) or (1, X, Z)    uint8
    mask_iso/<key>  (1, X, Y, Z) or (1, X, Z)    uint8

In a stacked 2D file ``image``, ``mask`` and ``mask_iso`` are datasets, (N, 2, X, Z) and
(N, 1, X, Z), and the keys of their rows are in the dataset ``key``.
"""

import functools
import importlib.util
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.errors import StageError, StudyError
from common.hashing import array_digest

GROUPS = ("image", "mask", "mask_iso")
COMPRESSIONS = ("lzf", "gzip", "blosc", "none")
SCHEMA_VERSION = 1

_FORMAT = ("v108", "v108")
"""Bounds of the file format: every HDF5 since 2008 reads it, attributes may exceed 64 KiB."""

_PATCH = 48
"""Edge of a 3D chunk [voxels], for random patches of 64 to 128."""


# --- reading ---------------------------------------------------------------------------------


@contextmanager
def open_studies(path: Path) -> Iterator[h5py.File]:
    """Open a file of studies, 3D or 2D but not stacked, for reading.

    Raises
    ------
    StageError
        No such file, not HDF5, truncated, or with other content than the three groups.
    """
    with _open(path) as file:
        if set(file) != set(GROUPS) or not all(isinstance(file[g], h5py.Group) for g in GROUPS):
            raise StageError(
                f"{path}: does not hold the groups {', '.join(GROUPS)} and nothing else: "
                "give a file of preprocessing.py, mergeh5.py or project_2d.py (not stacked)"
            )
        if not set(file["image"]) == set(file["mask"]) == set(file["mask_iso"]):
            raise StageError(f"{path}: its groups hold different studies: make it again")
        yield file


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError as error:
        raise StageError(f"{path}: no such file") from error
    except OSError as error:
        raise StageError(f"{path}: not an HDF5 file, or truncated: make it again") from error
    with file:
        yield file


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file of studies in order."""
    with open_studies(path) as file:
        return sorted(file["image"])


def read_attributes(path: Path, keys: Sequence[str], name: str) -> dict[str, Any]:
    """Return one attribute of the image datasets of `keys`; absent ones are left out."""
    with open_studies(path) as file:
        images = file["image"]
        return {
            key: _plain(images[key].attrs[name])
            for key in keys
            if key in images and name in images[key].attrs
        }


def read_parameters(path: Path) -> dict[str, Any]:
    """Return the options of value that a file of studies was made with.

    Raises
    ------
    StageError
        The file has none: it is not of this suite.
    """
    with _open(path) as file:
        try:
            parameters = json.loads(file.attrs["parameters"])
        except (KeyError, TypeError, ValueError) as error:
            raise StageError(
                f"{path}: has no attribute 'parameters': not a file of preprocessing.py, "
                "mergeh5.py or project_2d.py"
            ) from error
        if not isinstance(parameters, dict):
            raise StageError(f"{path}: has a damaged attribute 'parameters': make it again")
        return parameters


def read_dataset(path: Path, group: str, key: str) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return one dataset and its attributes, verified against its digest.

    Raises
    ------
    StudyError
        Damaged chunks, or values that differ from the digest kept with them.
    """
    with open_studies(path) as file:
        dataset = file[group][key]
        attributes = {name: _plain(value) for name, value in dataset.attrs.items()}
        try:
            array = dataset[()]
        except OSError as error:
            raise StudyError(f"{group} is damaged in the HDF5 file: make the file again") from error
    digest = attributes.get("sha256")
    if digest is not None and digest != array_digest(array):
        raise StudyError(f"{group} is damaged in the HDF5 file (checksum): make the file again")
    return array, attributes


def same_content(key: str, one: Path, other: Path) -> bool:
    """Whether two files hold the same arrays and attributes under a key."""
    return _content(one, key) == _content(other, key)


def _content(path: Path, key: str) -> list[dict[str, Any]]:
    with open_studies(path) as file:
        content = []
        for group in GROUPS:
            dataset = file[group][key]
            attributes = {name: _plain(value) for name, value in dataset.attrs.items()}
            attributes.setdefault("sha256", array_digest(dataset[()]))
            # Where the values came from may differ between equal ones: other compression, say.
            attributes.pop("fingerprint", None)
            content.append(attributes)
        return content


def read_digests(sources: Mapping[str, Path]) -> dict[str, list[Any]]:
    """Return digests of the datasets of each key, read from the file that `sources` names."""
    digests = {}
    for path in sorted(set(sources.values())):
        with open_studies(path) as file:
            for key in (key for key, source in sources.items() if source == path):
                attributes = file["image"][key].attrs
                of_arrays = [
                    file[group][key].attrs.get("sha256") or array_digest(file[group][key][()])
                    for group in GROUPS
                ]
                digests[key] = [attributes.get("fingerprint"), *of_arrays]
    return digests


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each image by key.

    Raises
    ------
    StageError
        Shapes that volumes or projections can't have, or masks that do not fit.
    """
    with open_studies(path) as file:
        shapes = {}
        for key in sorted(file["image"]):
            shape, *others = (file[group][key].shape for group in GROUPS)
            if shape[:1] != (2,) or any(other != (1, *shape[1:]) for other in others):
                raise StageError(f"{path}: study {key} has shapes that do not fit: make it again")
            shapes[key] = shape
        return shapes


def read_projected(path: Path) -> dict[str, str]:
    """Return the fingerprints of the studies in a 2D file, plain or stacked; unknown ones empty."""
    with _open(path) as file:
        if isinstance(file.get("image"), h5py.Dataset):
            return dict(json.loads(file["key"].attrs["fingerprints"]))
    found: dict[str, str] = {}
    with open_studies(path) as file:
        for key in file["image"]:
            study = key.rpartition("_")[0]
            if study not in found:
                found[study] = file["image"][key].attrs.get("fingerprint", "")
    return found


def holds_links(path: Path) -> bool:
    """Whether a file of studies is an index of external links."""
    with open_studies(path) as file:
        images = file["image"]
        return any(
            isinstance(images.get(key, getlink=True), h5py.ExternalLink)
            for key in itertools.islice(images, 1)
        )


def studies_of(keys: Iterable[str], parameters: Mapping[str, Any]) -> list[str]:
    """Return the hashes of the studies behind keys: those of a 2D file end in an angle."""
    if "angles" in parameters:
        return sorted({key.rpartition("_")[0] for key in keys})
    return sorted(keys)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


# --- writing ---------------------------------------------------------------------------------


@contextmanager
def create_file(path: Path, parameters: Mapping[str, Any], software: str) -> Iterator[h5py.File]:
    """Create a file with the three groups and the file attributes."""
    with h5py.File(path, "w", libver=_FORMAT) as file:
        _write_file_attributes(file, parameters, software)
        for group in GROUPS:
            file.create_group(group)
        yield file


def _write_file_attributes(file: h5py.File, parameters: Mapping[str, Any], software: str) -> None:
    file.attrs["schema_version"] = SCHEMA_VERSION
    file.attrs["software"] = software
    file.attrs["parameters"] = json.dumps(parameters, sort_keys=True)


def write_dataset(
    file: h5py.File,
    group: str,
    key: str,
    array: NDArray[Any],
    attributes: Mapping[str, Any],
    compression: str,
) -> None:
    """Write one array with its attributes and the digest of its values."""
    dataset = file[group].create_dataset(
        key,
        data=array,
        chunks=chunk_shape(array.shape),
        track_times=False,
        **_filters(compression),
    )
    for name, value in sorted({**attributes, "sha256": array_digest(array)}.items()):
        dataset.attrs[name] = value


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the chunk of a dataset: a cube of one channel in 3D, one channel's plane in 2D."""
    if len(shape) == 4:
        return (1, *(min(n, _PATCH) for n in shape[1:]))
    return (1, *shape[1:])


def _filters(compression: str) -> dict[str, Any]:
    if compression == "none":
        return {}
    if compression == "lzf":
        return {"compression": "lzf", "shuffle": True}
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": 4, "shuffle": True}
    # Optional: only this compression needs the package, in writing as in reading.
    import hdf5plugin

    return dict(hdf5plugin.Blosc(cname="zstd", clevel=5, shuffle=hdf5plugin.Blosc.SHUFFLE))


def has_blosc() -> bool:
    """Whether the optional package that reads and writes blosc is installed."""
    return importlib.util.find_spec("hdf5plugin") is not None


def assemble(
    path: Path,
    sources: Mapping[str, Path],
    parameters: Mapping[str, Any],
    software: str,
) -> None:
    """Write the file of the keys in `sources` (key to a file that holds it) by raw copy.

    The bytes of the result depend on the studies and parameters alone, not on how the studies
    are spread over files.
    """
    # One file serves many keys in a row of merging; closing follows from being forgotten.
    opened = functools.lru_cache(maxsize=8)(lambda source: h5py.File(source, "r"))
    with create_file(path, parameters, software) as target:
        for key, source in sorted(sources.items()):
            for group in GROUPS:
                try:
                    opened(source).copy(f"{group}/{key}", target[group], name=key)
                except (OSError, RuntimeError, KeyError) as error:
                    raise StageError(
                        f"{source}: study {key} cannot be copied ({group} is damaged): "
                        "make that file again"
                    ) from error
        opened.cache_clear()


def assemble_links(
    path: Path,
    sources: Mapping[str, Path],
    parameters: Mapping[str, Any],
    software: str,
    folder: Path,
) -> None:
    """Write an index file: external links, relative to `folder`, instead of copies."""
    with create_file(path, parameters, software) as target:
        for key, source in sorted(sources.items()):
            relative = os.path.relpath(source.resolve(), folder.resolve())
            for group in GROUPS:
                target[group][key] = h5py.ExternalLink(relative, f"/{group}/{key}")


def assemble_stack(
    path: Path,
    sources: Mapping[str, Path],
    parameters: Mapping[str, Any],
    software: str,
) -> None:
    """Write a stacked 2D file of the keys in `sources` by raw copy.

    The sources are plain 2D files of projections of one size, or stacked files.
    """
    opened = functools.lru_cache(maxsize=8)(_Projections)
    keys = sorted(sources)
    with h5py.File(path, "w", libver=_FORMAT) as target:
        _write_file_attributes(target, parameters, software)
        stacks = {}
        fingerprints: dict[str, str] = {}
        for row, key in enumerate(keys):
            projections = opened(sources[key])
            for group in GROUPS:
                dataset, at = projections.find(group, key)
                if row == 0:
                    stacks[group] = _create_stack(target, group, dataset, len(keys))
                for channel in range(dataset.shape[-3]):
                    mask, chunk = dataset.id.read_direct_chunk((*at, channel, 0, 0))
                    stacks[group].id.write_direct_chunk((row, channel, 0, 0), chunk, mask)
            fingerprints[key.rpartition("_")[0]] = projections.fingerprint(key)
        names = target.create_dataset(
            "key", data=keys, dtype=h5py.string_dtype(), track_times=False
        )
        names.attrs["fingerprints"] = json.dumps(fingerprints, sort_keys=True)
        opened.cache_clear()


def _create_stack(target: h5py.File, name: str, like: h5py.Dataset, n_rows: int) -> h5py.Dataset:
    n_channels, n_x, n_z = like.shape[-3:]
    filters = {
        "compression": like.compression,
        "compression_opts": like.compression_opts,
        "shuffle": like.shuffle,
    }
    stack = target.create_dataset(
        name,
        shape=(n_rows, n_channels, n_x, n_z),
        dtype=like.dtype,
        chunks=(1, 1, n_x, n_z),
        track_times=False,
        **filters,
    )
    stack.attrs["spacing"] = like.attrs["spacing"]
    return stack


class _Projections:
    """Where a 2D file, plain or stacked, holds the projection of a key."""

    def __init__(self, path: Path) -> None:
        self._file = h5py.File(path, "r")
        self._rows: dict[str, int] = {}
        self._fingerprints: dict[str, str] = {}
        if "key" in self._file:
            names = self._file["key"].asstr()[()]
            self._rows = {key: row for row, key in enumerate(names)}
            self._fingerprints = json.loads(self._file["key"].attrs["fingerprints"])

    def find(self, group: str, key: str) -> tuple[h5py.Dataset, tuple[int, ...]]:
        """Return the dataset and the leading indices of the projection in it."""
        if self._rows:
            return self._file[group], (self._rows[key],)
        return self._file[group][key], ()

    def fingerprint(self, key: str) -> str:
        """Return the fingerprint of the study that the projection is of."""
        if self._rows:
            return self._fingerprints[key.rpartition("_")[0]]
        return str(self._file["image"][key].attrs.get("fingerprint", ""))
