"""The part of one study: its training volume, or the projections of that; and the volume read.

A part is in the very layout of the final file, see `common.hdf5.studies`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import StageError, StudyError, texts_and_kinds
from common.geometry import ORIENTATIONS
from common.hashing import array_digest, as_hash_lengths
from common.hdf5.studies import (
    GROUPS,
    Content,
    content_of,
    create_file,
    projection_key,
    read_dataset,
    write_dataset,
)
from common.project_zip import ArchivedStudy
from common.volumes import PlacedStudy, Recipe, training_image

# --- volumes ---------------------------------------------------------------------------------


def write_volume(
    path: Path,
    study: ArchivedStudy,
    placed: PlacedStudy,
    recipe: Recipe,
    *,
    compression: str,
    fingerprint: str,
    software: str,
) -> None:
    """Write the training volume of one study as an HDF5 file."""
    arrays = {
        "image": training_image(placed.suv, placed.ct, recipe),
        "mask": placed.mask[None],
        "mask_iso": placed.mask_iso[None],
    }
    attributes = _attributes(study, placed, recipe)
    attributes["image"]["fingerprint"] = fingerprint
    with create_file(path, recipe.parameters, software) as file:
        for group, array in arrays.items():
            write_dataset(file, group, study.hash, array, attributes[group], compression)


def _attributes(
    study: ArchivedStudy, placed: PlacedStudy, recipe: Recipe
) -> dict[str, dict[str, Any]]:
    """Return the attributes of each group's dataset."""
    shared = {
        "affine": placed.ct.grid.affine,
        "project": study.project,
        "spacing": np.array(recipe.spacing),
        "orientation": recipe.orientation,
    }
    of_image = {
        "channels": ["PET", "CT"],
        "ct_spacing": np.array(placed.ct.source.spacing_mm),
        "pet_spacing": np.array(placed.suv.source.spacing_mm),
        "ct_range": np.array(recipe.ct_range),
        "suv_range": np.array(recipe.suv_range),
        "suv_type": study.provenance.get("suv_type", "unknown"),
        "suv": json.dumps(study.provenance, sort_keys=True),
        "measures": json.dumps(placed.measures, sort_keys=True),
        **{
            name: json.dumps(found)
            for name, found in texts_and_kinds([*study.warnings, *placed.warnings]).items()
        },
    }
    lengths = as_hash_lengths(study.record.get("hash_lengths"), study.hash)
    if lengths is not None:
        of_image["hash_lengths"] = np.array(lengths)
    of_iso = {"connectivity": 26, "iso_threshold": recipe.iso_threshold}
    if recipe.iso_suv is not None:
        of_iso = {"connectivity": 26, "iso_suv": recipe.iso_suv}
    return {"image": shared | of_image, "mask": shared, "mask_iso": shared | of_iso}


def read_as_planned(
    path: Path, group: str, key: str, digests: Sequence[str]
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return a dataset and its attributes.

    Parameters
    ----------
    path, group, key
    digests : sequence of str
        Of the study when the run was planned (`reading.read_digests`).

    Raises
    ------
    StageError
        The file is another one now; of both, no mixture is made.
    StudyError
        Damaged.
    """
    array, attributes = read_dataset(path, group, key)
    made_from, *of_groups = digests
    planned = dict(zip(GROUPS, of_groups, strict=True))
    is_other = group == "image" and str(attributes.get("fingerprint")) != made_from
    digest = attributes["sha256"] if "sha256" in attributes else array_digest(array)
    if is_other or digest != planned[group]:
        raise StageError(f"{path}: has been made anew since this run began: run again")
    return array, attributes


def read_volume(
    path: Path, key: str, digests: Sequence[str]
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Return the image (2, X, Y, Z) of one study of a 3D file, and its attributes.

    Raises
    ------
    StageError
        As `read_as_planned`.
    StudyError
        Damaged, or it does not say, or says nonsense of, its place and its values.
    """
    image, attributes = read_as_planned(path, "image", key, digests)
    for name, count in (("spacing", 3), ("suv_range", 2)):
        try:
            values = np.array(attributes[name], np.float64)
            sound = values.shape == (count,) and bool(np.isfinite(values).all())
        except (KeyError, ValueError, TypeError):
            sound = False
        if sound:
            sound = bool((values > 0).all()) if name == "spacing" else bool(values[0] < values[1])
        if not sound:
            raise StudyError(f"its attribute {name!r} is missing or damaged: make the file again")
    if str(attributes.get("orientation")) not in ORIENTATIONS:
        raise StudyError("its attribute 'orientation' is missing or damaged: make the file again")
    return image, attributes


# --- projections -----------------------------------------------------------------------------


def write_projections(
    path: Path,
    study_hash: str,
    mips: Mapping[str, NDArray[Any]],
    angles: Sequence[float],
    of_volume: Mapping[str, Any],
    parameters: Mapping[str, Any],
    *,
    compression: str,
    fingerprint: str,
    software: str,
) -> None:
    """Write the projections of one study as an HDF5 file.

    Parameters
    ----------
    path : Path
    study_hash : str
    mips : dict of group to (N, C, X, Z) array
    angles : sequence of N floats
        [degrees]
    of_volume : dict
        Attributes of the image that was projected.
    parameters, compression, fingerprint, software
        Of the file.
    """
    shared = {
        "project": str(of_volume.get("project", "")),
        "hash": study_hash,
        "spacing": np.array(of_volume["spacing"])[[0, 2]],
    }
    # The masks of a stack are of one type, whichever labels a study has.
    one_type = content_of(parameters) is Content.STACK and "labels" in parameters
    of_image: dict[str, Any] = {"fingerprint": fingerprint}
    lengths = as_hash_lengths(of_volume.get("hash_lengths"), study_hash)
    if lengths is not None:
        of_image["hash_lengths"] = np.array(lengths)
    with create_file(path, parameters, software) as file:
        for i, angle in enumerate(angles):
            for group in GROUPS:
                more = of_image if group == "image" else {}
                array = mips[group][i]
                write_dataset(
                    file,
                    group,
                    projection_key(study_hash, angle),
                    array.astype(np.uint16) if one_type and group != "image" else array,
                    {**shared, "angle": angle, **more},
                    compression,
                )
