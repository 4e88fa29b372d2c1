"""HDF5 files of many studies from files of one or many, by raw copy, by links, or stacked.

Chunks, filters and attributes go over as they are. The bytes of a result depend on the studies
and parameters alone, not on how the studies are spread over files.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.errors import StageError, blaming
from common.hashing import array_digest, as_hash_lengths, fingerprint
from common.hdf5.index import holds_links
from common.hdf5.studies import (
    ATTRIBUTES_DIGEST,
    DAMAGE,
    GROUPS,
    Content,
    all_attributes,
    attribute,
    content_of,
    dataset_in,
    ending_loops,
    keeping_open,
    new_file,
    open_file,
    open_studies,
    opened,
    projection_key,
    read_attributes,
    read_keys,
    read_parameters,
    read_shapes,
    study_of,
)
from common.splits import Sample

_ORIGIN = ("fingerprint", "hash_lengths", "ct_spacing", "pet_spacing", ATTRIBUTES_DIGEST)
"""Attributes of an image that do not tell what it shows."""

_COPYING_CPU_S = 60
"""What copying a dataset may take; one of a gigabyte takes a second."""


def assemble(
    path: Path, sources: Mapping[str, Path], parameters: Mapping[str, Any], software: str
) -> None:
    """Write the file of the keys in `sources` (key to a file that holds it) by raw copy.

    Raises
    ------
    StageError
        A source that can't be read.
    OSError
        The file can't be written.
    """
    with keeping_open(), new_file(path, parameters, software) as (target, raise_failure):
        for group in GROUPS:
            target.create_group(group)
        for key, source in sorted(sources.items()):
            raise_failure()
            with blaming(source):
                for group in GROUPS:
                    _copy(source, group, key, target)


def _copy(source: Path, group: str, key: str, target: h5py.File) -> None:
    try:
        with ending_loops(_COPYING_CPU_S):
            target.copy(dataset_in(opened(source), group, key), target[group], name=key)
    except DAMAGE as error:
        raise StageError(
            f"{source}: study {key} cannot be copied ({group} is damaged): make that file again"
        ) from error


def assemble_projections(
    path: Path,
    sources: Mapping[str, Path],
    parameters: Mapping[str, Any],
    software: str,
    angles: Sequence[float],
) -> None:
    """Write the 2D file, stacked or not, of the studies in `sources` (hash to a file with it)."""
    of_keys = {
        projection_key(study, angle): source
        for study, source in sources.items()
        for angle in angles
    }
    stacked = content_of(parameters) is Content.STACK
    (assemble_stack if stacked else assemble)(path, of_keys, parameters, software)


# --- what is to be merged --------------------------------------------------------------------


def merged_parameters(inputs: Sequence[Path], allow_mixed: bool) -> dict[str, Any]:
    """Return what all files have in common, or refuse files that differ."""
    first = read_parameters(inputs[0])
    merged = dict(first)
    for path in inputs[1:]:
        other = read_parameters(path)
        if (content_of(first) is Content.VOLUMES) != (content_of(other) is Content.VOLUMES):
            raise StageError(f"{path}: {inputs[0]} is 3D and it 2D, or vice versa: give one kind")
        differing = sorted(k for k in {*first, *other} if first.get(k) != other.get(k))
        refused = [k for k in differing if not _may_differ(k, first.get(k), other.get(k))]
        if refused and not allow_mixed:
            raise StageError(
                f"{path}: made with other options than {inputs[0]} "
                + "; ".join(f"{k}: {_told(other, k)}, not {_told(first, k)}" for k in refused)
                + ": make them alike, or merge with --allow-mixed"
            )
        merged.update(dict.fromkeys(differing, "mixed"))
        if "shape" in differing and "shape" not in refused:
            merged["shape"] = [*first["shape"][:2], None]
    return merged


def _told(parameters: Mapping[str, Any], name: str) -> str:
    """Return an option of value in a line: whoever made the file may have put anything there."""
    value = parameters.get(name)
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text[:80]


def _may_differ(name: str, one: Any, other: Any) -> bool:
    return name == "shape" and bool(one) and bool(other) and one[:2] == other[:2]


def refuse_mixed_suv_types(sources: Mapping[str, Path]) -> None:
    """Raise where images are relative to different things: body weight, lean body mass and so on.

    Those of zips of another make, whose type is unknown, go with any.
    """
    first: tuple[str, Path] | None = None
    for path, keys in keys_by_file(sources).items():
        for suv_type in read_attributes(path, keys, "suv_type").values():
            if suv_type == "unknown":
                continue
            first = first or (suv_type, path)
            if suv_type != first[0]:
                here, there = (f"{each!r:.20}" for each in (suv_type, first[0]))
                raise StageError(
                    f"{path}: SUV is of type {here}, not {there} as in {first[1]}: make them alike "
                    "(createproject.py --suv-type), or merge with --allow-mixed"
                )


def chosen_sources(
    inputs: Sequence[Path], on_duplicate: str, is_wanted: Callable[[str], bool] | None = None
) -> dict[str, Path]:
    """Return which file each key is taken from, of those that are wanted; None: of all."""
    sources: dict[str, Path] = {}
    for path in inputs:
        for key in read_shapes(path):
            if is_wanted is not None and not is_wanted(key):
                continue
            if key not in sources or same_content(key, sources[key], path):
                sources.setdefault(key, path)
            elif on_duplicate == "error":
                raise StageError(
                    f"{path}: study {key} is in {sources[key]} too, with other content: choose "
                    "with --on-duplicate skip (keep the first) or replace (take the last)"
                )
            elif on_duplicate == "replace":
                sources[key] = path
    if not sources:
        raise StageError("the input files hold no study")
    return sources


def holds(
    path: Path, parameters: Mapping[str, Any], sources: Mapping[str, Path], linked: bool
) -> bool:
    """Whether a file has just these parameters and keys, in content as their sources have them."""
    return (
        read_parameters(path) == parameters
        and read_keys(path) == sorted(sources)
        and holds_links(path) == linked
        and read_digests(dict.fromkeys(sources, path)) == read_digests(sources)
    )


# --- what files hold -------------------------------------------------------------------------


def same_content(key: str, one: Path, other: Path) -> bool:
    """Whether two files hold the same arrays and attributes under a key."""
    return _content(one, key) == _content(other, key)


def _content(path: Path, key: str) -> list[dict[str, Any]]:
    with open_file(path) as file:
        content = []
        for group in GROUPS:
            dataset = dataset_in(file, group, key)
            attributes = all_attributes(dataset)
            attributes["sha256"] = array_digest(dataset[()])
            # Where the values came from may differ between equal ones: other compression, say,
            # or an older version, which told less of it.
            for name in _ORIGIN:
                attributes.pop(name, None)
            content.append(attributes)
        return content


def read_digests(sources: Mapping[str, Path]) -> dict[str, list[Any]]:
    """Return fingerprint and digests of each key's datasets, from the file that `sources` names."""
    digests = {}
    for path, keys in keys_by_file(sources).items():
        with open_studies(path) as file:
            for key in keys:
                datasets = [dataset_in(file, group, key) for group in GROUPS]
                made_from = str(attribute(datasets[0], "fingerprint"))
                digests[key] = [made_from, *map(_digest, datasets)]
    return digests


def read_image_attributes(
    sources: Mapping[str, Path], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return those attributes of each key's image that are there, by key and name."""
    found = {}
    for path, keys in keys_by_file(sources).items():
        with open_studies(path) as file:
            for key in keys:
                image = dataset_in(file, "image", key)
                found[key] = {name: attribute(image, name) for name in names if name in image.attrs}
    return found


def read_samples(sources: Mapping[str, Path], parameters: Mapping[str, Any]) -> list[Sample]:
    """Return what decides the fold of each key, in order of key.

    Parameters
    ----------
    sources : dict of key to file
    parameters : dict
        Of the files; they tell 2D from 3D.
    """
    samples = []
    for path, keys in keys_by_file(sources).items():
        with open_studies(path) as file:
            for key in keys:
                image, study = dataset_in(file, "image", key), study_of(key, parameters)
                # Whoever made the file may have put anything there.
                lengths = as_hash_lengths(attribute(image, "hash_lengths"), study)
                samples.append(
                    Sample(
                        key,
                        study,
                        project=str(attribute(image, "project") or ""),
                        digest=_digest(image),
                        patient_characters=lengths[0] if lengths is not None else None,
                    )
                )
    return sorted(samples, key=lambda sample: sample.key)


def keys_by_file(sources: Mapping[str, Path]) -> dict[Path, list[str]]:
    """Return which keys each file is the source of."""
    found: dict[Path, list[str]] = {}
    for key, path in sources.items():
        found.setdefault(path, []).append(key)
    return found


def _digest(dataset: h5py.Dataset) -> str:
    return attribute(dataset, "sha256") or array_digest(dataset[()])


def read_projected(path: Path) -> dict[str, str]:
    """Return the fingerprints of the studies in a 2D file, plain or stacked; unknown ones empty."""
    found: dict[str, str] = {}
    if content_of(read_parameters(path)) is Content.STACK:
        with open_file(path) as file:
            found = dict(json.loads(attribute(file["key"], "fingerprints")))
            # Without digests it is of an older version.
            return found if "sha256" in file["key"].attrs else dict.fromkeys(found, "")
    with open_studies(path) as file:
        for key in file["image"]:
            study = key.rpartition("_")[0]
            if study not in found:
                found[study] = attribute(dataset_in(file, "image", key), "fingerprint") or ""
    return found


# --- stacks ----------------------------------------------------------------------------------


def assemble_stack(
    path: Path, sources: Mapping[str, Path], parameters: Mapping[str, Any], software: str
) -> None:
    """Write a stacked 2D file of the keys in `sources` by raw copy.

    The sources are plain 2D files of projections of one size, or stacked files.
    """
    projections_of = functools.lru_cache(maxsize=8)(_Projections)
    keys = sorted(sources)
    with keeping_open(), new_file(path, parameters, software) as (target, raise_failure):
        stacks = {}
        fingerprints: dict[str, str] = {}
        digests = np.empty((len(keys), 32), np.uint8)
        for row, key in enumerate(keys):
            raise_failure()
            with blaming(sources[key]):
                try:
                    projections = projections_of(sources[key])
                    for group in GROUPS:
                        dataset, at = projections.find(group, key)
                        if row == 0:
                            stacks[group] = _create_stack(target, group, dataset, len(keys))
                        _copy_chunks(dataset, at, stacks[group], row)
                    fingerprints[key.rpartition("_")[0]] = projections.fingerprint(key)
                    digests[row] = projections.digest(key)
                except DAMAGE as error:
                    raise StageError(
                        f"{sources[key]}: projection {key} cannot be copied: make that file again"
                    ) from error
        names = target.create_dataset(
            "key", data=keys, dtype=h5py.string_dtype(), track_times=False
        )
        names.attrs["fingerprints"] = json.dumps(fingerprints, sort_keys=True)
        names.attrs["sha256"] = digests
        names.attrs[ATTRIBUTES_DIGEST] = stack_digest(keys, names.attrs["fingerprints"], digests)


def row_digest(digests: Sequence[str]) -> NDArray[np.uint8]:
    """Return the digest of a stack's row from those of its image, mask and mask_iso."""
    return np.frombuffer(bytes.fromhex(fingerprint(list(digests))), np.uint8)


def stack_digest(keys: Sequence[str], fingerprints: str, digests: NDArray[np.uint8]) -> str:
    """Return the digest of all that the dataset ``key`` tells of a stack."""
    return fingerprint([list(keys), fingerprints, digests.tobytes().hex()])


def _create_stack(target: h5py.File, name: str, like: h5py.Dataset, n_rows: int) -> h5py.Dataset:
    """Create an empty stack of datasets such as `like`, with its filters."""
    n_channels, n_x, n_z = like.shape[-3:]
    properties = like.id.get_create_plist()
    properties.set_chunk((1, 1, n_x, n_z))
    space = h5py.h5s.create_simple((n_rows, n_channels, n_x, n_z))
    stack = h5py.h5d.create(target.id, name.encode(), like.id.get_type(), space, properties)
    spacing = like.attrs["spacing"]
    dataset = h5py.Dataset(stack)
    dataset.attrs["spacing"] = spacing
    return dataset


def _copy_chunks(source: h5py.Dataset, at: tuple[int, ...], stack: h5py.Dataset, row: int) -> None:
    for channel in range(source.shape[-3]):
        corner = (*at, channel, 0, 0)
        # A plane of zeros has no chunk.
        if source.id.get_chunk_info_by_coord(corner).size:
            mask, chunk = source.id.read_direct_chunk(corner)
            stack.id.write_direct_chunk((row, channel, 0, 0), chunk, mask)


class _Projections:
    """Where a 2D file, plain or stacked, holds the projection of a key."""

    def __init__(self, path: Path) -> None:
        self._file = opened(path)
        self._rows: dict[str, int] = {}
        self._fingerprints: dict[str, str] = {}
        self._digests: NDArray[np.uint8] | None = None
        if "key" in self._file:
            with ending_loops():
                names = self._file["key"].asstr()[()]
            self._rows = {key: row for row, key in enumerate(names)}
            self._digests = self._file["key"].attrs["sha256"]
            self._fingerprints = json.loads(attribute(self._file["key"], "fingerprints"))

    def find(self, group: str, key: str) -> tuple[h5py.Dataset, tuple[int, ...]]:
        """Return the dataset and the leading indices of the projection in it."""
        if self._rows:
            return self._file[group], (self._rows[key],)
        return dataset_in(self._file, group, key), ()

    def digest(self, key: str) -> NDArray[np.uint8]:
        """Return the digest of the projection's values, as it was kept with them."""
        if self._digests is not None:
            return np.asarray(self._digests[self._rows[key]], np.uint8)
        return row_digest([_digest(dataset_in(self._file, group, key)) for group in GROUPS])

    def fingerprint(self, key: str) -> str:
        """Return the fingerprint of the study that the projection is of."""
        if self._rows:
            return self._fingerprints[key.rpartition("_")[0]]
        return attribute(dataset_in(self._file, "image", key), "fingerprint") or ""
