"""The measures of many studies as CSV: a row a lesion, and a total row a study."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_OF_LESION = (
    "mtv_ml", "iso_mtv_ml", "suv_max", "suv_mean", "iso_suv_mean", "suv_peak", "tlg_g",
    "iso_tlg_g",
)  # fmt: skip
_CENTROID = ("x_mm", "y_mm", "z_mm")
_OF_STUDY = ("lesion_count", "tmtv_ml", "iso_tmtv_ml", "dmax_mm", "dose_fraction")

COLUMNS = ("hash", "project", "lesion", *_OF_LESION, *_CENTROID, *_OF_STUDY, "warnings")


def lesion_table(
    studies: Iterable[tuple[str, str, Mapping[str, Any], Sequence[str]]],
) -> str:
    """Return the CSV of studies, each its hash, project, measures and warnings.

    The total row has sums of volumes and TLG, the mean SUV of all lesions' voxels, the maxima of
    SUVmax and SUVpeak, and the measures of the study as a whole. Units are in the columns' names;
    SUV in g/ml.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for study_hash, project, measures, warnings in studies:
        shared = {"hash": study_hash, "project": project}
        for lesion in measures["lesions"]:
            writer.writerow({**shared, "lesion": lesion["label"], **_lesion_row(lesion)})
        total = _total_row(measures) | {"warnings": " | ".join(map(str, warnings))}
        writer.writerow({**shared, "lesion": "total", **total})
    return text.getvalue()


def _lesion_row(lesion: Mapping[str, Any]) -> dict[str, str]:
    centroid = dict(zip(_CENTROID, lesion["centroid_mm"], strict=True))
    return {
        name: _number(value)
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
        **{name: study[name] for name in _OF_STUDY},
    }
    return {name: _number(value) for name, value in totals.items()}


def _ratio(tlg_g: float, volume_ml: float) -> float | None:
    return tlg_g / volume_ml if volume_ml else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
