"""HDF5 files of many studies from files of one or many, by raw copy, by links, or stacked.

Chunks, filters and attributes go over as they are. The bytes of a result depend on the studies
and parameters alone, not on how the studies are spread over files.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from common.errors import StageError, blaming
from common.hashing import array_digest, fingerprint
from common.hdf5.chunks import read_values
from common.hdf5.index import holds_links, read_links
from common.hdf5.stacks import assemble_stack, common_length, holds_rows, read_rows, same_row
from common.hdf5.studies import (
    ATTRIBUTES_DIGEST,
    DAMAGE,
    GROUPS,
    Content,
    all_attributes,
    attribute,
    content_of,
    dataset_in,
    digest_of,
    ending_loops,
    keeping_open,
    new_file,
    open_file,
    opened,
    projection_key,
    read_each,
    read_keys,
    read_parameters,
)

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


def assemble_merged(
    path: Path, sources: Mapping[str, Path], parameters: Mapping[str, Any], software: str
) -> None:
    """Write the file of the keys in `sources`, files of one kind: 3D, 2D, or stacks.

    Raises
    ------
    StageError
        A source that can't be read; stacks that do not fit together.
    """
    if content_of(parameters) is Content.STACK:
        length = common_length(sorted(set(sources.values())))
        assemble_stack(path, sources, parameters, software, length)
    else:
        assemble(path, sources, parameters, software)


# --- what is to be merged --------------------------------------------------------------------


def merged_parameters(inputs: Sequence[Path], allow_mixed: bool) -> dict[str, Any]:
    """Return what all files have in common, or refuse files that differ."""
    first = read_parameters(inputs[0])
    merged = dict(first)
    for path in inputs[1:]:
        other = read_parameters(path)
        if (content := content_of(other)) is not content_of(first):
            raise StageError(
                f"{path}: is {content.value}, and {inputs[0]} is {content_of(first).value}: "
                "give one kind"
            )
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


@dataclass(frozen=True, slots=True)
class Found:
    """A key in one of the files that are merged.

    Attributes
    ----------
    source : Path
        The file, as it was given.
    file : Path
        The one that holds the datasets: the source, or what that leads to.
    suv_type : str
        What the image is relative to; of projections empty.
    digest : str
        Of values and attributes; empty where it was not asked for.
    """

    source: Path
    file: Path
    suv_type: str = ""
    digest: str = ""


def find_studies(
    inputs: Sequence[Path],
    parameters: Mapping[str, Any],
    on_duplicate: str,
    wanted: Set[str] | None = None,
    *,
    with_digests: bool = False,
) -> dict[str, Found]:
    """Return where each key is taken from, of the wanted ones; None: of all.

    Each file, and each that it leads to, is read once.

    Raises
    ------
    StageError
        A file can't be read; files hold a study with other content; there is no study.
    """
    stacked = content_of(parameters) is Content.STACK
    is_same = same_row if stacked else _same_content
    chosen: dict[str, Found] = {}
    for path in inputs:
        found = (
            dict.fromkeys(read_rows(path), Found(path, path))
            if stacked
            else read_each(path, functools.partial(_found, path, with_digests))
        )
        for key, each in found.items():
            if wanted is not None and key not in wanted:
                continue
            if key not in chosen or is_same(key, chosen[key].source, path):
                chosen.setdefault(key, each)
            elif on_duplicate == "error":
                raise StageError(
                    f"{path}: study {key} is in {chosen[key].source} too, with other content: "
                    "choose with --on-duplicate skip (keep the first) or replace (take the last)"
                )
            elif on_duplicate == "replace":
                chosen[key] = each
    if not chosen:
        raise StageError("the input files hold no study")
    return chosen


def _found(source: Path, with_digests: bool, key: str, datasets: Sequence[h5py.Dataset]) -> Found:
    return Found(
        source,
        _place_of(h5py.h5f.get_name(datasets[0].id)),
        str(attribute(datasets[0], "suv_type") or "") if datasets[0].ndim == 4 else "",
        fingerprint(list(map(_told_of, datasets))) if with_digests else "",
    )


@functools.lru_cache(maxsize=8)
def _place_of(filename: bytes) -> Path:
    return Path(os.fsdecode(filename)).resolve()


def _told_of(dataset: h5py.Dataset) -> list[Any]:
    """Return the digest of attributes, that of the values among them; of a foreign file both."""
    told = attribute(dataset, ATTRIBUTES_DIGEST)
    return [told] if told else [all_attributes(dataset), digest_of(dataset)]


def refuse_mixed_suv_types(found: Mapping[str, Found]) -> None:
    """Raise where images are relative to different things: body weight, lean body mass and so on.

    Those of zips of another make, whose type is unknown, go with any.
    """
    first: Found | None = None
    for each in found.values():
        if each.suv_type in ("", "unknown"):
            continue
        first = first or each
        if each.suv_type != first.suv_type:
            here, there = (f"{one.suv_type!r:.20}" for one in (each, first))
            raise StageError(
                f"{each.source}: SUV is of type {here}, not {there} as in {first.source}: make "
                "them alike (createproject.py --suv-type), or merge with --allow-mixed"
            )


def holds(path: Path, parameters: Mapping[str, Any], found: Mapping[str, Found]) -> bool:
    """Whether a file has just these parameters and keys, in content as they were found."""
    if read_parameters(path) != parameters:
        return False
    if content_of(parameters) is Content.STACK:
        sources = {key: each.source for key, each in found.items()}
        return holds_rows(path, sources, common_length(sorted(set(sources.values()))))
    if read_keys(path) != sorted(found) or holds_links(path):
        return False
    held = read_each(path, functools.partial(_found, path, True))
    return all(held[key].digest == each.digest for key, each in found.items())


def links_to(path: Path, parameters: Mapping[str, Any], found: Mapping[str, Found]) -> bool:
    """Whether a file is the index, with just these parameters, of the keys that were found."""
    files = {key: each.file for key, each in found.items()}
    return read_parameters(path) == parameters and read_links(path) == files


def _same_content(key: str, one: Path, other: Path) -> bool:
    """Whether two files hold the same arrays and attributes under a key."""
    return _content(one, key) == _content(other, key)


def _content(path: Path, key: str) -> list[dict[str, Any]]:
    with open_file(path) as file:
        content = []
        for group in GROUPS:
            dataset = dataset_in(file, group, key)
            attributes = all_attributes(dataset)
            attributes["sha256"] = array_digest(read_values(dataset))
            # Where the values came from may differ between equal ones: other compression, say,
            # or an older version, which told less of it.
            for name in _ORIGIN:
                attributes.pop(name, None)
            content.append(attributes)
        return content
