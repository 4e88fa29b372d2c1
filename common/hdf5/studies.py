"""HDF5 files of studies (3D) and of their projections (2D): their layout, reading, writing.

A part of one study is written in the very layout of the final file, so that assembling a run's
parts and merging finished files are the same raw copy (`common.hdf5.merge`).

    image/<key>     (2, X, Y, Z) or (2, X, Z)    float, [0] = PET, [1] = CT
    mask/<key>      (1, X, Y, Z) or (1, X, Z)    uint8, of 0 and 1
    mask_iso/<key>  (1, X, Y, Z) or (1, X, Z)    uint8, of 0 and 1

Masks hold the label values, uint8 or uint16, where parameter `labels` is "keep".

In a stacked 2D file ``image``, ``mask`` and ``mask_iso`` are datasets, (N, 2, X, Z) and
(N, 1, X, Z), and the keys of their rows are in the dataset ``key``.

How arrays lie in them: `common.hdf5.chunks`.
"""

import functools
import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from common.errors import UNREACHABLE, StageError, StudyError, Unreachable
from common.hashing import LONGEST_NAME, array_digest, can_name_study, fingerprint
from common.hdf5.chunks import read_values, write_chunked
from common.hdf5.crash_safe_file import crash_safe_file
from common.projection import angle_name

T = TypeVar("T")

GROUPS = ("image", "mask", "mask_iso")
SCHEMA_VERSION = 1

MASK_TYPES = ("uint8", "uint16")
"""Of 0 and 1, and of label values up to 255; of label values beyond, and in every stack of them."""

ATTRIBUTES_DIGEST = "attributes_sha256"
"""Attribute that holds the digest of all others."""

_FORMAT = ("v108", "v108")
"""Bounds of the file format: every HDF5 since 2008 reads it, attributes may exceed 64 KiB."""

_ATTRIBUTE_CPU_S = 2
"""What reading an attribute may take; it takes less than a millisecond."""

DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
"""What h5py raises, and what follows, where a file is damaged or holds something else."""

_MOST_HOPS = 8
"""Files that a link may lead through, index after index."""

LONGEST_ANGLE = 20
"""Characters that the key of a projection has after the study's."""


# --- what files hold -------------------------------------------------------------------------


class Content(Enum):
    """What a file of studies holds."""

    VOLUMES = "3D"
    PROJECTIONS = "2D"
    STACK = "2D, stacked"


def content_of(parameters: Mapping[str, Any]) -> Content:
    """Tell what a file holds by the options that it was made with."""
    if "angles" not in parameters:
        return Content.VOLUMES
    return Content.STACK if parameters.get("stack") else Content.PROJECTIONS


def projection_key(study_hash: str, angle: float) -> str:
    """Return the key of one projection."""
    return f"{study_hash}_{angle_name(angle)}"


def split_projection_key(key: str) -> tuple[str, str]:
    """Return the study's hash and the angle's name from the key of a projection."""
    study_hash, _, angle = key.rpartition("_")
    return study_hash, angle


def studies_of(keys: Iterable[str], parameters: Mapping[str, Any]) -> list[str]:
    """Return the hashes of the studies behind keys, in order."""
    return sorted({study_of(key, parameters) for key in keys})


def study_of(key: str, parameters: Mapping[str, Any]) -> str:
    """Return the hash of the study behind a key: the keys of a 2D file end in an angle."""
    return key if content_of(parameters) is Content.VOLUMES else split_projection_key(key)[0]


# --- reading ---------------------------------------------------------------------------------


@contextmanager
def open_studies(path: Path) -> Iterator[h5py.File]:
    """Open a file of studies, 3D or 2D but not stacked, for reading.

    Raises
    ------
    StageError
        As `open_file`; other content than the three groups; keys that can't name a study.
    """
    with open_file(path) as file:
        if set(file) != set(GROUPS) or not all(isinstance(file[g], h5py.Group) for g in GROUPS):
            raise StageError(
                f"{path}: does not hold the groups {', '.join(GROUPS)} and nothing else: "
                "give a file of preprocessing.py, mergeh5.py or project_2d.py (not stacked)"
            )
        keys = set(file["image"])
        if not keys == set(file["mask"]) == set(file["mask_iso"]):
            raise StageError(f"{path}: its groups hold different studies: make it again")
        if not all(can_name_study(key, LONGEST_NAME + LONGEST_ANGLE) for key in keys):
            raise StageError(
                f"{path}: holds a study whose name is hidden, a formula, not printable or too "
                "long: make it again"
            )
        yield file


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """Open any HDF5 file for reading; what fails within is the file's fault.

    Raises
    ------
    Unreachable
        No such file, or no permission; another process has locked it; the disk or server fails.
    StageError
        Not HDF5, damaged, made by a newer version, or with links in place of groups.
    """
    with _refusing_damage(path), keeping_open(), _open(path) as file:
        yield file


@contextmanager
def file_left_open(path: Path) -> Iterator[h5py.File]:
    """As `open_file`, and leave it open: for a process that reads study after study of a file."""
    with _refusing_damage(path):
        yield opened(path)


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        _raise_if_unreachable(path, error)
        raise StageError(
            f"{path}: damaged, or links to a file that is not there: make it again"
        ) from error


def _open(path: Path) -> h5py.File:
    try:
        # No lock: files are replaced, never changed, and some file systems have none.
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError as error:
        raise Unreachable(
            f"{path}: no such file: check that its disk is mounted, and run again"
        ) from error
    except PermissionError as error:
        raise Unreachable(f"{path}: no permission to read it") from error
    except DAMAGE as error:
        _raise_if_unreachable(path, error)
        if isinstance(error, OSError) and error.errno:
            # The system's refusal; of a file's content HDF5 tells no number.
            reason = os.strerror(error.errno)
            raise Unreachable(
                f"{path}: cannot be read ({reason}): check the disk, and run again"
            ) from error
        raise StageError(f"{path}: not an HDF5 file, or truncated: make it again") from error
    try:
        _check_file(path, file)
    except BaseException:
        file.close()
        raise
    return file


def _raise_if_unreachable(path: Path, error: Exception) -> None:
    # Where HDF5_USE_FILE_LOCKING is set, HDF5 locks all the same.
    if "unable to lock file" in str(error):
        raise Unreachable(
            f"{path}: is locked by another process: wait for it to end, or set "
            "HDF5_USE_FILE_LOCKING=FALSE"
        ) from error
    # Most of libhdf5's errors have the number in their text alone.
    found = re.search(r"errno = (\d+)", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    if number in UNREACHABLE:
        raise Unreachable(
            f"{path}: cannot be read ({os.strerror(number)}): check the disk or the file server"
        ) from error


def _check_file(path: Path, file: h5py.File) -> None:
    """Refuse links that libhdf5 would follow to a pipe for ever, damage, and newer versions."""
    if not all(isinstance(file.get(name, getlink=True), h5py.HardLink) for name in file):
        raise StageError(f"{path}: has links in place of groups: make it again")
    version = attribute(file, "schema_version")
    attributes = all_attributes(file)
    if not sound_attributes(attributes):
        raise StageError(f"{path}: its attributes differ from their checksum: make it again")
    if version is not None and not (isinstance(version, int) and version <= SCHEMA_VERSION):
        raise StageError(
            f"{path}: was made by a newer version (schema_version {version!r:.20}, this one reads "
            f"up to {SCHEMA_VERSION}): use that version, or make it again with this one"
        )


def opened(path: Path) -> h5py.File:
    """Return a file open for reading, once however many studies it serves.

    See `open_file` for what it raises; to be called within `keeping_open`.
    """
    status = path.stat()
    return _opened_version(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _opened_version(path: Path, *version: int) -> h5py.File:
    return _open(path)


@functools.lru_cache(maxsize=8)
def _folder_of(path: Path) -> Path:
    return path.resolve().parent


@contextmanager
def keeping_open() -> Iterator[None]:
    """Keep the files of `opened` open in the body."""
    try:
        yield
    finally:
        _opened_version.cache_clear()
        _folder_of.cache_clear()


@contextmanager
def ending_loops(cpu_s: float = _ATTRIBUTE_CPU_S) -> Iterator[None]:
    """Have the kernel end this process where the body takes more seconds of CPU.

    In a damaged heap of strings libhdf5 reads for ever, and nothing else interrupts it. So files
    are read in worker processes, and the parent is told.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def read_all_attributes(path: Path) -> None:
    """Read every attribute of a file, for what that may bring to light."""
    with open_file(path) as file:
        for name, group in file.items():
            for key in group if isinstance(group, h5py.Group) else ():
                all_attributes(dataset_in(file, name, key))
            all_attributes(group)


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file of studies, not stacked, in order."""
    with open_studies(path) as file:
        return sorted(file["image"])


def read_fingerprints(path: Path) -> dict[str, str]:
    """Return what each study was made from by key; of a foreign one it is empty."""
    with open_studies(path) as file:
        return {
            key: attribute(dataset_in(file, "image", key), "fingerprint") or ""
            for key in file["image"]
        }


def read_attributes(path: Path, keys: Sequence[str], name: str) -> dict[str, Any]:
    """Return one attribute of the image datasets of `keys`; absent ones are left out."""
    with open_studies(path) as file:
        images = {k: dataset_in(file, "image", k) for k in keys if k in file["image"]}
        return {k: attribute(v, name) for k, v in images.items() if name in v.attrs}


def read_parameters(path: Path) -> dict[str, Any]:
    """Return the options of value that a file of studies was made with.

    Raises
    ------
    StageError
        The file has none: it is not of this suite.
    """
    with open_file(path) as file:
        try:
            parameters = json.loads(attribute(file, "parameters"))
        except (KeyError, TypeError, ValueError) as error:
            raise StageError(
                f"{path}: has no attribute 'parameters': not a file of preprocessing.py, "
                "mergeh5.py or project_2d.py"
            ) from error
        if not isinstance(parameters, dict):
            raise StageError(f"{path}: has a damaged attribute 'parameters': make it again")
        return parameters


def read_dataset(path: Path, group: str, key: str) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return one dataset and its attributes, verified against their digests.

    The file's other keys are not looked at: there may be many.

    Raises
    ------
    StudyError
        Damaged chunks, or values or attributes that differ from the digests kept with them.
    """
    with open_file(path) as file:
        try:
            dataset = dataset_in(file, group, key)
            array, attributes = read_values(dataset), all_attributes(dataset)
        except DAMAGE as error:
            _raise_if_unreachable(path, error)
            raise StudyError(f"{group} is damaged in the HDF5 file: make the file again") from error
    if not (_holds(attributes, "sha256", array_digest(array)) and sound_attributes(attributes)):
        raise StudyError(f"{group} is damaged in the HDF5 file (checksum): make the file again")
    return array, attributes


def sound_attributes(attributes: Mapping[str, Any]) -> bool:
    """Whether attributes agree with their digest, if they have one."""
    others = {name: value for name, value in attributes.items() if name != ATTRIBUTES_DIGEST}
    return _holds(attributes, ATTRIBUTES_DIGEST, fingerprint(others))


def _holds(attributes: Mapping[str, Any], name: str, digest: str) -> bool:
    return bool(attributes.get(name, digest) == digest)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each image by key; raises as `read_each`."""
    return read_each(path, lambda key, datasets: datasets[0].shape)


def read_each(path: Path, read: Callable[[str, list[h5py.Dataset]], T]) -> dict[str, T]:
    """Return by key what a function reads from an image and its masks, each opened once.

    Raises
    ------
    StageError
        Shapes or types that volumes or projections can't have, masks that do not fit, or data
        that lie where they must not.
    """
    with open_studies(path) as file:
        found = {}
        for key in sorted(file["image"]):
            image, *masks = (dataset_in(file, group, key) for group in GROUPS)
            if image.shape[:1] != (2,) or any(m.shape != (1, *image.shape[1:]) for m in masks):
                raise StageError(f"{path}: study {key} has shapes that do not fit: make it again")
            if image.dtype.kind != "f" or any(mask.dtype not in MASK_TYPES for mask in masks):
                raise StageError(f"{path}: study {key} has types that do not fit: make it again")
            found[key] = read(key, [image, *masks])
        return found


def dataset_in(file: h5py.File, group: str, key: str) -> h5py.Dataset:
    """Return a dataset of a file, or the one in another file that an index links to.

    Links are followed here, for libhdf5 would look in the working directory too, and wait for a
    pipe for ever.

    Raises
    ------
    StageError
        A link to a file that is not there, to a pipe or device, or to something else; values that
        lie in another file.
    """
    first = Path(file.filename)
    for _ in range(_MOST_HOPS):
        link = file[group].get(key, getlink=True)
        if link is None:
            raise KeyError(key)
        if isinstance(link, h5py.HardLink):
            dataset = file[group][key]
            if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
                raise StageError(
                    f"{first}: {key} is no dataset with its values in the file: make it again"
                )
            return dataset
        path = Path(file.filename)
        if not isinstance(link, h5py.ExternalLink) or link.path != f"/{group}/{key}":
            raise StageError(f"{path}: has links to something else than studies: make it again")
        there = _folder_of(path) / link.filename
        if not there.exists():
            raise StageError(f"{path}: links to {link.filename!r}, which is not there: put it back")
        if not there.is_file():
            raise StageError(f"{path}: links to a device, pipe or folder: make it again")
        file = opened(there)
    raise StageError(
        f"{first}: links that lead through more than {_MOST_HOPS} files: make it again"
    )


def digest_of(dataset: h5py.Dataset) -> str:
    """Return the digest of a dataset's values, as it is kept with them or else is computed."""
    return attribute(dataset, "sha256") or array_digest(read_values(dataset))


# --- attributes ------------------------------------------------------------------------------


def all_attributes(holder: h5py.Dataset | h5py.File) -> dict[str, Any]:
    """Return the attributes of a dataset, or of a file, as plain Python values."""
    with ending_loops():
        return {name: _plain(value) for name, value in holder.attrs.items()}


def attribute(holder: h5py.Dataset | h5py.File, name: str) -> Any:
    """Return an attribute as a plain Python value; None where it is absent."""
    if name not in holder.attrs:
        return None
    with ending_loops():
        return _plain(holder.attrs[name])


def _plain(value: Any) -> Any:
    """Return the value of an attribute as a string, a number, or a list of those."""
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


# --- writing ---------------------------------------------------------------------------------


@contextmanager
def new_file(
    path: Path, parameters: Mapping[str, Any], software: str
) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Create a file with its attributes; yield it, and what raises a failure to write so far."""
    with crash_safe_file(path) as stream, h5py.File(stream, "w", libver=_FORMAT) as file:
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["software"] = software
        file.attrs["parameters"] = json.dumps(parameters, sort_keys=True)
        file.attrs[ATTRIBUTES_DIGEST] = fingerprint(all_attributes(file))
        yield file, stream.check


@contextmanager
def create_file(path: Path, parameters: Mapping[str, Any], software: str) -> Iterator[h5py.File]:
    """Create a file with its attributes and the three groups."""
    with new_file(path, parameters, software) as (file, _):
        for group in GROUPS:
            file.create_group(group)
        yield file


def write_dataset(
    file: h5py.File,
    group: str,
    key: str,
    array: NDArray[Any],
    attributes: Mapping[str, Any],
    compression: str,
) -> None:
    """Write one array with its attributes and the digests of its values and of those."""
    dataset = write_chunked(file[group], key, array, compression)
    for name, value in sorted({**attributes, "sha256": array_digest(array)}.items()):
        dataset.attrs[name] = value
    # HDF5 keeps strings where it has no checksum of its own.
    dataset.attrs[ATTRIBUTES_DIGEST] = fingerprint(all_attributes(dataset))
