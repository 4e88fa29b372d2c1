"""The measures of many studies as CSV: a row a lesion, and a total row a study."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import StageError
from common.hdf5.studies import read_attributes, read_keys
from common.report.tables import OF_STUDY, in_columns, number_cell
from common.run.output import write_table
from common.run.pool import in_own_process

_OF_LESION = (
    "mtv_ml", "iso_mtv_ml", "suv_max", "suv_mean", "iso_suv_mean", "suv_peak", "tlg_g",
    "iso_tlg_g",
)  # fmt: skip
_CENTROID = ("x_mm", "y_mm", "z_mm")
_OF_STUDY_ALONE = tuple(name for name in OF_STUDY if name not in _OF_LESION)

COLUMNS = ("hash", "project", "lesion", *_OF_LESION, *_CENTROID, *_OF_STUDY_ALONE, "warnings")


def write_measures(path: Path, studies_file: Path) -> None:
    """Write the measures kept in an HDF5 file of studies as CSV, and replace the old file at once.

    The total row has sums of volumes and TLG, the mean SUV of all lesions' voxels, the maxima of
    SUVmax and SUVpeak, and the measures of the study as a whole. Units are in the columns' names;
    SUV in g/ml.
    """
    write_table(path, COLUMNS, in_own_process(_measures_rows, studies_file))


def _measures_rows(studies_file: Path) -> list[list[str]]:
    """Return the rows of the table below its heading."""
    keys = read_keys(studies_file)
    projects, measures, warnings = (
        read_attributes(studies_file, keys, name) for name in ("project", "measures", "warnings")
    )
    rows = []
    for key in keys:
        if key not in measures:
            raise StageError(f"{studies_file}: study {key} has no measures: make that file again")
        shared = {"hash": key, "project": projects[key]}
        found = json.loads(measures[key])
        total = _total_row(found) | {"warnings": " | ".join(json.loads(warnings[key]))}
        rows += [
            *(
                {**shared, "lesion": lesion["label"], **_lesion_row(lesion)}
                for lesion in found["lesions"]
            ),
            {**shared, "lesion": "total", **total},
        ]
    return in_columns(rows, COLUMNS)


def _lesion_row(lesion: Mapping[str, Any]) -> dict[str, str]:
    centroid = dict(zip(_CENTROID, lesion["centroid_mm"], strict=True))
    return {
        name: number_cell(value)
        for name, value in {**{name: lesion[name] for name in _OF_LESION}, **centroid}.items()
    }


def _total_row(measures: Mapping[str, Any]) -> dict[str, str]:
    study, lesions = measures["study"], measures["lesions"]
    totals = {
        "mtv_ml": study["tmtv_ml"],
        "iso_mtv_ml": study["iso_tmtv_ml"],
        "tlg_g": study["tlg_g"],
        "iso_tlg_g": study["iso_tlg_g"],
        "suv_mean": _ratio(study["tlg_g"], study["tmtv_ml"]),
        "iso_suv_mean": _ratio(study["iso_tlg_g"], study["iso_tmtv_ml"]),
        "suv_max": max((lesion["suv_max"] for lesion in lesions), default=None),
        "suv_peak": max((lesion["suv_peak"] for lesion in lesions), default=None),
        **{name: study[name] for name in _OF_STUDY_ALONE},
    }
    return {name: number_cell(value) for name, value in totals.items()}


def _ratio(tlg_g: float, volume_ml: float) -> float | None:
    return tlg_g / volume_ml if volume_ml else None
