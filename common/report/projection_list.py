"""The list beside a 2D file: one row a projection, numbered in the order of the keys."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.hdf5.studies import split_projection_key
from common.run.output import write_table

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


def read_projects(path: Path) -> dict[str, str]:
    """Return the projects by hash that the list beside a 2D file tells; none where it is gone."""
    try:
        with open(list_beside(path), encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error):
        return {}
    return {row.get("hash") or "": row.get("project") or "" for row in rows}
