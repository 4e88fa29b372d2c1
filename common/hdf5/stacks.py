"""Stacked 2D files: the projections of all studies as the rows of one dataset a group.

image            (N, 2, X, Z)
mask, mask_iso   (N, 1, X, Z)
key              (N,) text; its attributes tell of each study what it was made from, and of each
                 row a digest
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from common.errors import StageError, blaming
from common.hashing import LONGEST_NAME, array_digest, can_name_study, fingerprint
from common.hdf5.chunks import filters_of, read_values, write_row
from common.hdf5.studies import (
    ATTRIBUTES_DIGEST,
    DAMAGE,
    GROUPS,
    LONGEST_ANGLE,
    attribute,
    dataset_in,
    digest_of,
    ending_loops,
    keeping_open,
    new_file,
    open_file,
    opened,
    split_projection_key,
)
from common.projection import padded

KEYS = "key"
"""The dataset that names the rows."""


# --- reading ---------------------------------------------------------------------------------


def read_rows(path: Path) -> list[str]:
    """Return the keys of a stack's rows.

    Raises
    ------
    StageError
        It is no stack; its datasets do not fit each other; keys that can't name a study.
    """
    with open_file(path) as file:
        stack = _Projections(file)
        shapes = [file[group].shape for group in GROUPS]
        n_rows, _, *plane = shapes[0]
        if shapes != [(n_rows, n_channels, *plane) for n_channels in (2, 1, 1)]:
            raise StageError(f"{path}: its stacks have shapes that do not fit: make it again")
        if len(stack.rows) != n_rows or len(stack.digests) != n_rows:
            raise StageError(f"{path}: its rows are not those of its keys: make it again")
        if not all(can_name_study(key, LONGEST_NAME + LONGEST_ANGLE) for key in stack.rows):
            raise StageError(f"{path}: holds a study whose name is no name: make it again")
        return list(stack.rows)


def read_stacked(path: Path) -> dict[str, str]:
    """Return the fingerprints of the studies in a stack; of one of an older version empty ones."""
    with open_file(path) as file:
        names = file[KEYS]
        found = dict(json.loads(attribute(names, "fingerprints")))
        # Only newer versions keep digests of the rows.
        return found if "sha256" in names.attrs else dict.fromkeys(found, "")


def common_length(paths: Sequence[Path]) -> int:
    """Return to what length along z the rows of stacks must be padded to be of one stack.

    Raises
    ------
    StageError
        They differ otherwise, in width, spacing or types.
    """
    kinds: dict[Path, Any] = {}
    lengths = []
    for path in paths:
        with open_file(path) as file:
            stacks = [file[group] for group in GROUPS]
            kinds[path] = [
                (each.shape[1:-1], each.dtype, attribute(each, "spacing")) for each in stacks
            ]
            lengths.append(stacks[0].shape[-1])
        if kinds[path] != kinds[paths[0]]:
            raise StageError(
                f"{path}: its rows have another width, spacing or type than those of {paths[0]}: "
                "make them alike"
            )
    return int(max(lengths))


def same_row(key: str, one: Path, other: Path) -> bool:
    """Whether two stacks hold the same projections under a key, however long they are padded."""
    rows = []
    for path in (one, other):
        with open_file(path) as file:
            stack = _Projections(file)
            rows.append(stack.values(key))
    length = max(values.shape[-1] for row in rows for values in row)
    first, second = ([_padded_row(values, length) for values in row] for row in rows)
    return all(map(np.array_equal, first, second))


def holds_rows(path: Path, sources: Mapping[str, Path], length: int) -> bool:
    """Whether a stack is that of the keys in `sources`, stacks, padded to a length along z.

    Of rows that are longer in it than in their source, the fingerprints alone tell.
    """
    with keeping_open():
        mine = _Projections(opened(path))
        if list(mine.rows) != sorted(sources) or mine.length != length:
            return False
        of_sources = {source: _Projections(opened(source)) for source in set(sources.values())}
        return all(
            mine.fingerprint(key) == of_sources[source].fingerprint(key)
            and (
                of_sources[source].length != length
                or np.array_equal(mine.digest(key), of_sources[source].digest(key))
            )
            for key, source in sources.items()
        )


# --- writing ---------------------------------------------------------------------------------


def assemble_stack(
    path: Path,
    sources: Mapping[str, Path],
    parameters: Mapping[str, Any],
    software: str,
    length: int | None = None,
) -> None:
    """Write a stacked 2D file of the keys in `sources`, by raw copy where rows are as they will be.

    Parameters
    ----------
    path : Path
        To be written.
    sources : dict of key to Path
        Plain 2D files, or stacks, of projections of one width.
    parameters, software
        Of the file.
    length : int, optional
        Along z, which the rows of shorter stacks are padded to; None: all are of one length.

    Raises
    ------
    DamagedSource
        A source can't be read.
    """
    keys = sorted(sources)
    projections_of = functools.lru_cache(maxsize=8)(lambda source: _Projections(opened(source)))
    with keeping_open(), new_file(path, parameters, software) as (target, raise_failure):
        stacks: dict[str, h5py.Dataset] = {}
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
                            stacks[group] = _create_stack(target, group, dataset, len(keys), length)
                        _write_projection(dataset, at, stacks[group], row)
                    fingerprints[split_projection_key(key)[0]] = projections.fingerprint(key)
                    digests[row] = projections.digest(key, length)
                except DAMAGE as error:
                    raise StageError(
                        f"{sources[key]}: projection {key} cannot be copied: make that file again"
                    ) from error
        names = target.create_dataset(KEYS, data=keys, dtype=h5py.string_dtype(), track_times=False)
        names.attrs["fingerprints"] = json.dumps(fingerprints, sort_keys=True)
        names.attrs["sha256"] = digests
        names.attrs[ATTRIBUTES_DIGEST] = stack_digest(keys, names.attrs["fingerprints"], digests)


def row_digest(digests: Sequence[str]) -> NDArray[np.uint8]:
    """Return the digest of a stack's row from those of its image, mask and mask_iso."""
    return np.frombuffer(bytes.fromhex(fingerprint(list(digests))), np.uint8)


def stack_digest(keys: Sequence[str], fingerprints: str, digests: NDArray[np.uint8]) -> str:
    """Return the digest of all that the dataset ``key`` tells of a stack."""
    return fingerprint([list(keys), fingerprints, digests.tobytes().hex()])


def _create_stack(
    target: h5py.File, name: str, like: h5py.Dataset, n_rows: int, length: int | None
) -> h5py.Dataset:
    """Create an empty stack of datasets such as `like`, with its filters."""
    n_channels, n_x, n_z = like.shape[-3:]
    n_z = length or n_z
    properties = like.id.get_create_plist()
    properties.set_chunk((1, 1, n_x, n_z))
    space = h5py.h5s.create_simple((n_rows, n_channels, n_x, n_z))
    stack = h5py.h5d.create(target.id, name.encode(), like.id.get_type(), space, properties)
    spacing = like.attrs["spacing"]
    dataset = h5py.Dataset(stack)
    dataset.attrs["spacing"] = spacing
    return dataset


def _write_projection(
    source: h5py.Dataset, at: tuple[int, ...], stack: h5py.Dataset, row: int
) -> None:
    """Write what a dataset holds as a row: its chunks, or its values where those do not fit."""
    if _layout(source) == _layout(stack):
        _copy_chunks(source, at, stack, row)
    else:
        write_row(stack, row, _padded_row(read_values(source, at), stack.shape[-1]))


def _layout(dataset: h5py.Dataset) -> tuple[Any, ...]:
    """Return how a plane lies: its pixels, whether one is one chunk, and the filters."""
    *leading, n_x, n_z = dataset.shape
    is_one_chunk = dataset.chunks == (*(1 for _ in leading), n_x, n_z)
    return n_x, n_z, is_one_chunk, filters_of(dataset)


def _copy_chunks(source: h5py.Dataset, at: tuple[int, ...], stack: h5py.Dataset, row: int) -> None:
    for channel in range(source.shape[-3]):
        corner = (*at, channel, 0, 0)
        # A plane of zeros has no chunk.
        if source.id.get_chunk_info_by_coord(corner).size:
            mask, chunk = source.id.read_direct_chunk(corner)
            stack.id.write_direct_chunk((row, channel, 0, 0), chunk, mask)


def _padded_row(values: NDArray[Any], length: int) -> NDArray[Any]:
    return np.asarray(padded(values[None], length)[0])


# --- where projections are -------------------------------------------------------------------


class _Projections:
    """Where an open 2D file, plain or stacked, holds the projection of a key."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self.rows: dict[str, int] = {}
        self.digests: NDArray[np.uint8] = np.empty((0, 32), np.uint8)
        self._fingerprints: dict[str, str] = {}
        if KEYS in file:
            with ending_loops():
                names = file[KEYS].asstr()[()]
            self.rows = {key: row for row, key in enumerate(names)}
            self.digests = np.asarray(file[KEYS].attrs["sha256"], np.uint8)
            self._fingerprints = json.loads(attribute(file[KEYS], "fingerprints"))

    @property
    def length(self) -> int:
        """Pixels along z of a stack's rows."""
        return int(self._file["image"].shape[-1])

    def find(self, group: str, key: str) -> tuple[h5py.Dataset, tuple[int, ...]]:
        """Return the dataset and the leading indices of the projection in it."""
        if self.rows:
            return self._file[group], (self.rows[key],)
        return dataset_in(self._file, group, key), ()

    def values(self, key: str) -> list[NDArray[Any]]:
        """Return the projection in each group, (C, X, Z)."""
        found = (self.find(group, key) for group in GROUPS)
        return [read_values(dataset, at) for dataset, at in found]

    def digest(self, key: str, length: int | None = None) -> NDArray[np.uint8]:
        """Return the digest of the projection's values, as it was kept with them.

        Where they are to be padded to another length along z, it is computed.
        """
        if not self.rows:
            return row_digest([digest_of(dataset_in(self._file, group, key)) for group in GROUPS])
        if length is None or length == self.length:
            return np.asarray(self.digests[self.rows[key]], np.uint8)
        return row_digest([array_digest(_padded_row(each, length)) for each in self.values(key)])

    def fingerprint(self, key: str) -> str:
        """Return the fingerprint of the study that the projection is of."""
        if self.rows:
            return self._fingerprints[split_projection_key(key)[0]]
        return attribute(dataset_in(self._file, "image", key), "fingerprint") or ""
