"""What the tables of measures have in common: columns of a study, rows by column, numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.report.untrusted_json import is_number

OF_STUDY = (
    "lesion_count", "tmtv_ml", "iso_tmtv_ml", "tlg_g", "iso_tlg_g", "dmax_mm", "dose_fraction",
)  # fmt: skip
"""Measures of a study as a whole, in the order of their columns."""


def in_columns(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[list[Any]]:
    """Return the cells of rows in the order of columns; what a row does not tell is empty."""
    return [[row.get(column, "") for column in columns] for row in rows]


def number_cell(value: Any) -> str:
    """Return a number with six digits; empty where it is none."""
    return f"{value:.6g}" if is_number(value) else ""
