"""Studies as CSV, a row a study: whose it is, how its SUV came about, how much tumour it has."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import splits
from common.errors import StageError
from common.report.suv_words import uptake_minutes
from common.report.tables import OF_STUDY, in_columns, number_cell
from common.report.untrusted_json import is_number, json_array, json_object
from common.run.output import write_table
from common.splits import Sample
from common.suv.provenance import coarse

logger = logging.getLogger("tumorvolume")

ATTRIBUTES = (
    "project", "spacing", "ct_spacing", "pet_spacing", "suv_type", "suv", "measures", "warnings",
)  # fmt: skip
"""What the table takes from the attributes of an image."""

_SPACINGS = {"ct": "ct_spacing", "pet": "pet_spacing", "training": "spacing"}

COLUMNS = (
    "hash", "project", "patient", "suv_type", "suv_rule", "uptake_minutes", "weight_kg",
    *(f"{grid}_{axis}_mm" for grid in _SPACINGS for axis in "xyz"),
    "suv_max", *OF_STUDY, "warnings",
)  # fmt: skip


def write_cases(
    path: Path,
    studies: Mapping[str, Mapping[str, Any]],
    samples: Sequence[Sample],
    patient_characters: int | None = None,
) -> None:
    """Write the table; who the patient is stays empty where nothing tells it.

    Parameters
    ----------
    path : Path
    studies : dict of hash to dict
        `ATTRIBUTES` of their images.
    samples : sequence of Sample
        Of the studies.
    patient_characters : int, optional
        See `splits.patient_characters`.

    Raises
    ------
    StageError
        More characters are asked for than tell the patient.
    """
    try:
        n_characters = splits.patient_characters(samples, patient_characters)
    except StageError as error:
        if patient_characters is not None:
            raise
        logger.warning("the column patient of %s is empty: %s", path.name, error)
        n_characters = 0
    rows = case_rows((key, key[:n_characters], about) for key, about in sorted(studies.items()))
    write_table(path, COLUMNS, rows)


def case_rows(studies: Iterable[tuple[str, str, Mapping[str, Any]]]) -> list[list[str]]:
    """Return the rows of the table below its heading.

    Each study is its hash, the patient's part of that, and its attributes. What a file does not
    tell is empty. Units are in the columns' names; SUV in g/ml.
    """
    rows = (
        {"hash": study_hash, "patient": patient, **_row(attributes)}
        for study_hash, patient, attributes in studies
    )
    return in_columns(rows, COLUMNS)


def _row(attributes: Mapping[str, Any]) -> dict[str, str]:
    provenance = coarse(json_object(attributes.get("suv")))
    measures = json_object(attributes.get("measures"))
    of_study = json_object(measures.get("study"))
    lesions = [json_object(lesion) for lesion in json_array(measures.get("lesions"))]
    brightest = [lesion["suv_max"] for lesion in lesions if is_number(lesion.get("suv_max"))]
    spacings = {
        f"{grid}_{axis}_mm": number_cell(edge_mm)
        for grid, name in _SPACINGS.items()
        for axis, edge_mm in zip("xyz", json_array(attributes.get(name)), strict=False)
    }
    return {
        "project": str(attributes.get("project", "")),
        "suv_type": str(attributes.get("suv_type", "")),
        "suv_rule": str(provenance.get("rule", "")),
        "uptake_minutes": number_cell(uptake_minutes(provenance)),
        "weight_kg": number_cell(provenance.get("weight_kg")),
        **spacings,
        "suv_max": number_cell(max(brightest, default=None)),
        **{name: number_cell(of_study.get(name)) for name in OF_STUDY},
        "warnings": " | ".join(map(str, json_array(attributes.get("warnings")))),
    }
