"""Indices: HDF5 files of external links to the files that hold the datasets.

An index is read like one file (`common.hdf5.studies.dataset_in`). Its links are relative to its
folder, and lead to the datasets themselves, never to another index.
"""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from common.errors import StageError, blaming
from common.hdf5.studies import (
    DAMAGE,
    GROUPS,
    create_file,
    dataset_in,
    keeping_open,
    open_file,
    opened,
    projection_key,
    read_keys,
    read_parameters,
    study_of,
)


def assemble_links(
    path: Path,
    files: Mapping[str, Path],
    parameters: Mapping[str, Any],
    software: str,
    output: Path,
) -> None:
    """Write an index.

    Parameters
    ----------
    path : Path
        To be written.
    files : dict of key to Path
        Those that hold the datasets.
    parameters, software
        Of the file.
    output : Path
        Where the index will be.
    """
    relative = functools.lru_cache(maxsize=8)(
        functools.partial(os.path.relpath, start=output.resolve().parent)
    )
    with create_file(path, parameters, software) as target:
        for key, file in sorted(files.items()):
            for group in GROUPS:
                target[group][key] = h5py.ExternalLink(relative(file), f"/{group}/{key}")


def assemble_index(
    path: Path,
    sources: Mapping[str, Path],
    parameters: Mapping[str, Any],
    software: str,
    output: Path,
    angles: Sequence[float] | None = None,
) -> None:
    """Write an index of finished files, a study each; those in the present OUTPUT are not opened.

    Parameters
    ----------
    path : Path
        To be written.
    sources : dict of hash to Path
        Files of studies.
    parameters, software
        Of the file.
    output : Path
        Where the index will be, and an older one may be.
    angles : sequence of float, optional
        Of projections [degrees]; None: the files hold volumes.

    Raises
    ------
    DamagedSource
        A file that is new can't be read.
    """
    keys_of = {
        study: [study] if angles is None else [projection_key(study, angle) for angle in angles]
        for study in sources
    }
    linked = _linked_files(output)
    with keeping_open():
        for study, source in sorted(sources.items()):
            if linked.get(study) != source:
                with blaming(source):
                    _check(source, keys_of[study][0])
    files = {key: source for study, source in sources.items() for key in keys_of[study]}
    assemble_links(path, files, parameters, software, output)


def _check(source: Path, key: str) -> None:
    try:
        for group in GROUPS:
            dataset_in(opened(source), group, key)
    except DAMAGE as error:
        raise StageError(f"{source}: study {key} is damaged: make that file again") from error


def holds_links(path: Path) -> bool:
    """Whether a file of studies is an index; a stack is none."""
    with open_file(path) as file:
        images = file["image"]
        return isinstance(images, h5py.Group) and any(
            isinstance(images.get(key, getlink=True), h5py.ExternalLink)
            for key in itertools.islice(images, 1)
        )


def read_stored(store: Path, index: Path) -> dict[str, str]:
    """Return from what the studies of an index were made, as the names in its store tell.

    No other file is opened.

    Returns
    -------
    dict of hash to str
        First digits of the fingerprint; empty where the file is not in the store.
    """
    parameters = read_parameters(index)
    there = set(store.glob("*/*"))
    made_from = {study_of(key, parameters): "" for key in read_keys(index)}
    for study, file in _linked_files(index).items():
        if file in there:
            made_from[study] = file.name.removesuffix(index.suffix).rpartition(".")[2]
    return made_from


def _linked_files(index: Path) -> dict[str, Path]:
    """Return the file that an index links to by hash; none where it is no sound index."""
    try:
        parameters = read_parameters(index)
        # All projections of a study are in one file.
        return read_links(index, lambda key: study_of(key, parameters))
    except StageError:
        return {}


def read_links(index: Path, name_of: Callable[[str], str] = str) -> dict[str, Path]:
    """Return the files that an index links to by key, or by another name: the first key's of each.

    Parameters
    ----------
    index : Path
        Keys that it does not link are left out.
    name_of : function, optional
        From a key.
    """
    folder = index.resolve().parent
    place_of = functools.lru_cache(maxsize=8)(
        lambda relative: Path(os.path.normpath(folder / relative))
    )
    found: dict[str, Path] = {}
    with open_file(index) as file:
        images = file["image"]
        for key in images:
            name = name_of(key)
            if name not in found:
                link = images.get(key, getlink=True)
                if isinstance(link, h5py.ExternalLink):
                    found[name] = place_of(link.filename)
    return found
