"""What files of studies tell of each study without its volumes, for plans, folds and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py

from common.hashing import as_hash_lengths
from common.hdf5.stacks import read_rows, read_stacked
from common.hdf5.studies import (
    GROUPS,
    Content,
    attribute,
    content_of,
    dataset_in,
    digest_of,
    open_studies,
    read_keys,
    read_parameters,
    split_projection_key,
    study_of,
)
from common.splits import Sample


def keys_by_file(sources: Mapping[str, Path]) -> dict[Path, list[str]]:
    """Return which keys each file is the source of."""
    found: dict[Path, list[str]] = {}
    for key, path in sources.items():
        found.setdefault(path, []).append(key)
    return found


def read_keys_of_any(path: Path) -> list[str]:
    """Return the keys of a file of studies, stacked or not, in order."""
    stacked = content_of(read_parameters(path)) is Content.STACK
    return read_rows(path) if stacked else read_keys(path)


def read_projected(path: Path) -> dict[str, str]:
    """Return the fingerprints of the studies in a 2D file, plain or stacked; unknown ones empty."""
    if content_of(read_parameters(path)) is Content.STACK:
        return read_stacked(path)
    found: dict[str, str] = {}
    with open_studies(path) as file:
        for key in file["image"]:
            study, _ = split_projection_key(key)
            if study not in found:
                found[study] = attribute(dataset_in(file, "image", key), "fingerprint") or ""
    return found


def read_digests(sources: Mapping[str, Path]) -> dict[str, list[Any]]:
    """Return fingerprint and digests of each key's datasets, from the file that `sources` names."""
    digests = {}
    for path, keys in keys_by_file(sources).items():
        with open_studies(path) as file:
            for key in keys:
                digests[key] = digests_of([dataset_in(file, group, key) for group in GROUPS])
    return digests


def digests_of(datasets: Sequence[h5py.Dataset]) -> list[str]:
    """Return fingerprint and digests of an image and its masks."""
    return [str(attribute(datasets[0], "fingerprint")), *map(digest_of, datasets)]


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
                        digest=digest_of(image),
                        patient_characters=lengths[0] if lengths is not None else None,
                    )
                )
    return sorted(samples, key=lambda sample: sample.key)
