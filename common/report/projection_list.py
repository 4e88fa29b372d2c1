"""The list beside a 2D file: one row a projection, numbered in the order of the keys."""

import csv
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.hdf5.reading import keys_by_file
from common.hdf5.studies import Content, content_of, read_attributes, split_projection_key
from common.run.output import write_table

logger = logging.getLogger("tumorvolume")

_COLUMNS = ("number", "hash", "angle", "project", "dataset")


def list_beside(path: Path) -> Path:
    """Return where the list of a 2D file is."""
    return path.with_suffix(".csv")


def write_list(path: Path, keys: Iterable[str], projects: Mapping[str, str]) -> None:
    """Write the list of a 2D file with those keys; projects are by hash."""
    rows = []
    for number, key in enumerate(sorted(keys)):
        study, angle = split_projection_key(key)
        rows.append((number, study, angle, projects.get(study, ""), key))
    write_table(list_beside(path), _COLUMNS, rows)


def read_projects(
    sources: Mapping[str, Path], output: Path, parameters: Mapping[str, Any]
) -> dict[str, str]:
    """Return the project of each study of 2D files, by hash; of stacks the lists beside them tell.

    Parameters
    ----------
    sources : dict of key to file
    output : Path
        What they are merged to.
    parameters : dict
        Of the files; they tell stacks from others.
    """
    stacked = content_of(parameters) is Content.STACK
    projects: dict[str, str] = {}
    for path, keys in keys_by_file(sources).items():
        if stacked:
            found = _listed_projects(path)
        else:
            # All projections of a study tell the same.
            first = {split_projection_key(key)[0]: key for key in reversed(keys)}
            of_keys = read_attributes(path, list(first.values()), "project")
            found = {study: str(of_keys.get(key, "")) for study, key in first.items()}
        studies = {split_projection_key(key)[0] for key in keys}
        if not studies <= found.keys():
            logger.warning(
                "%s does not list all of its studies: their projects stay empty in %s",
                list_beside(path).name,
                list_beside(output).name,
            )
        projects |= {study: found.get(study, "") for study in studies}
    return projects


def _listed_projects(path: Path) -> dict[str, str]:
    """Return the projects by hash that the list beside a 2D file tells; none where it is gone."""
    try:
        with open(list_beside(path), encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error):
        return {}
    return {row.get("hash") or "": row.get("project") or "" for row in rows}
