"""Whole HDF5 files of studies held against their own checksums, attributes and layout."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.errors import StageError, Unreachable
from common.geometry import orientation_of
from common.hashing import array_digest
from common.hdf5.chunks import read_values
from common.hdf5.stacks import KEYS, row_digest, stack_digest
from common.hdf5.studies import (
    ATTRIBUTES_DIGEST,
    DAMAGE,
    GROUPS,
    MASK_TYPES,
    Content,
    all_attributes,
    content_of,
    dataset_in,
    ending_loops,
    file_left_open,
    open_file,
    read_keys,
    read_parameters,
    sound_attributes,
    split_projection_key,
)

_COPIED = ("spacing", "orientation", "ct_range", "suv_range", "iso_threshold", "iso_suv")
"""Options that datasets repeat."""

_IMAGE_TYPES = ("float16", "float32")


def keys_to_check(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the keys of a file in order, and its parameters.

    The keys of a stacked file are checked as one, by the name of the dataset ``key``.

    Raises
    ------
    StageError
        The file as a whole is damaged, or of another make.
    """
    parameters = read_parameters(path)
    return [KEYS] if content_of(parameters) is Content.STACK else read_keys(path), parameters


def faults_of(path: Path, key: str, parameters: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a key of a file, whose parameters are given; nothing if sound.

    The file stays open for the next key, in a worker process or within `keeping_open`.
    """
    with file_left_open(path) as file:
        if content_of(parameters) is Content.STACK:
            return _stack_faults(file, parameters)
        return _study_faults(file, key, parameters)


def read_indices(path: Path) -> None:
    """Read the indices of a file that neither values nor attributes need.

    Raises
    ------
    StageError
        One is damaged.
    """
    with open_file(path) as file:
        file.visit(lambda name: None)


def _study_faults(file: h5py.File, key: str, parameters: Mapping[str, Any]) -> list[str]:
    arrays: dict[str, NDArray[Any]] = {}
    attributes: dict[str, dict[str, Any]] = {}
    faults = []
    for group in GROUPS:
        try:
            dataset = dataset_in(file, group, key)
            arrays[group], attributes[group] = read_values(dataset), all_attributes(dataset)
        except Unreachable:
            raise
        except (*DAMAGE, StageError):
            faults.append(f"{group} cannot be read")
            continue
        if attributes[group].get("sha256") != array_digest(arrays[group]):
            faults.append(f"{group} differs from its checksum")
        if ATTRIBUTES_DIGEST not in attributes[group] or not sound_attributes(attributes[group]):
            faults.append(f"the attributes of {group} differ from their checksum")
        faults += [
            f"{group} has another {name} than the file"
            for name in _COPIED
            if name in attributes[group] and content_of(parameters) is Content.VOLUMES
            if not _alike(attributes[group][name], parameters.get(name))
        ]
    if faults:
        return faults
    volumes = content_of(parameters) is Content.VOLUMES
    geometry_faults = _volume_faults if volumes else _slice_faults
    return [*_array_faults(arrays, parameters), *geometry_faults(key, attributes, parameters)]


def _alike(value: Any, option: Any) -> bool:
    return option == "mixed" or np.array_equal(value, option)


def _array_faults(
    arrays: Mapping[str, NDArray[Any]], parameters: Mapping[str, Any]
) -> Iterator[str]:
    image, mask, mask_iso = (arrays[group] for group in GROUPS)
    of_volumes = content_of(parameters) is Content.VOLUMES
    n_axes = 4 if of_volumes else 3
    if image.ndim != n_axes or image.shape[0] != 2:
        yield "image has another shape than (2, X, Y, Z), of a projection (2, X, Z)"
    if any(n not in (None, m) for n, m in zip(_shape(parameters), image.shape[1:], strict=False)):
        yield "image has another shape than the file says"
    if not mask.shape == mask_iso.shape == (1, *image.shape[1:]):
        yield "the masks have another shape than the image"
        return
    if image.dtype not in _IMAGE_TYPES or not _alike(image.dtype.name, parameters.get("dtype")):
        yield "image has another type than the file says"
    kept = "labels" in parameters
    if not {mask.dtype.name, mask_iso.dtype.name} <= set(MASK_TYPES if kept else MASK_TYPES[:1]):
        yield "a mask has another type than uint8, or uint16 of labels"
    if not (image >= 0).all() or not (image <= 1).all():
        yield "image has values outside 0 to 1"
    if not kept and (mask > 1).any():
        yield "a mask has other values than 0 and 1"
    # Where projections of labels overlap, the isocontour in front may be of a lower label.
    beyond = (mask_iso > 0) & (mask_iso != mask) if of_volumes else mask_iso > mask
    if beyond.any():
        yield "mask_iso reaches beyond mask, or has other labels"


def _shape(parameters: Mapping[str, Any]) -> Sequence[int | None]:
    """Voxels along x, y and z as far as they are said."""
    shape = parameters.get("shape")
    return shape if isinstance(shape, list) and content_of(parameters) is Content.VOLUMES else ()


def _volume_faults(
    key: str, attributes: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Any]
) -> Iterator[str]:
    code, spacing_mm = "", np.empty(0)
    with suppress(KeyError, ValueError, TypeError, IndexError):
        affine = np.array(attributes["image"]["affine"], np.float64)
        spacing_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
        code = orientation_of(affine)
    for group in GROUPS:
        try:
            sound = (
                np.array_equal(attributes[group]["affine"], attributes["image"]["affine"])
                and np.allclose(spacing_mm, attributes[group]["spacing"], rtol=1e-4)
                and code == attributes[group]["orientation"]
                and "project" in attributes[group]
            )
        except (KeyError, ValueError, TypeError, IndexError):
            sound = False
        if not sound:
            yield f"{group} lacks a project, or an affine that fits spacing and orientation"


def _slice_faults(
    key: str, attributes: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Any]
) -> Iterator[str]:
    study, angle = split_projection_key(key)
    for group in GROUPS:
        found = attributes[group]
        try:
            sound = (
                found["hash"] == study
                and found["angle"] == float(angle)
                and len(found["spacing"]) == 2
                and "project" in found
            )
        except (KeyError, ValueError, TypeError):
            sound = False
        if not sound:
            yield f"{group} lacks project, hash, angle or spacing, or they are another slice's"


def _stack_faults(file: h5py.File, parameters: Mapping[str, Any]) -> list[str]:
    with ending_loops():
        names = [name.decode() for name in file[KEYS][()]]
    about = all_attributes(file[KEYS])
    digests = np.array(about.get("sha256"), np.uint8)
    kept = stack_digest(names, about.get("fingerprints", ""), digests)
    if about.get(ATTRIBUTES_DIGEST) != kept or digests.shape != (len(names), 32):
        return ["the list of its keys is damaged"]
    faults = [] if names == sorted(set(names)) else ["the keys are not in order"]
    for group in GROUPS:
        if file[group].shape[:2] != (len(names), 2 if group == "image" else 1):
            return [f"{group} has not a row a key"]
    for row, name in enumerate(names):
        try:
            values = [read_values(file[group], (row,)) for group in GROUPS]
        except DAMAGE:
            faults.append(f"{name} cannot be read")
            continue
        if not np.array_equal(row_digest([array_digest(v) for v in values]), digests[row]):
            faults.append(f"{name} differs from its checksum")
        of_0_to_1 = values[:1] if "labels" in parameters else values
        if not all(((v >= 0) & (v <= 1)).all() for v in of_0_to_1):
            faults.append(f"{name} has values outside 0 to 1")
    return faults
