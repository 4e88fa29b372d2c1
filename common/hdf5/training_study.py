"""One study of a project zip: read, brought onto the training grid, and written to a file."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import project_zip
from common.errors import IncompleteStudy, Warning, texts_and_kinds, warnings_from
from common.geometry import Image
from common.hashing import as_hash_lengths
from common.hdf5.studies import create_file, write_dataset
from common.image_checks import check_labels, check_mask, check_overlap
from common.masks import completed
from common.plausibility import summary_of, weight_of
from common.volumes import (
    Recipe,
    Volume,
    measures,
    number_lesions,
    on_pet,
    outline,
    place_ct,
    place_labels,
    place_pet,
    plausibility_warnings,
    resampling_warnings,
    training_image,
)


@dataclass(frozen=True, eq=False)
class PlacedStudy:
    """One study on the target grid, in HU and SUV.

    Attributes
    ----------
    ct, suv, lesions : Volume
        HU, SUV, and the number of each voxel's lesion.
    mask, mask_iso : (X, Y, Z) uint8 arrays
        uint8 or uint16 where label values are kept.
    measures : dict
        Of its lesions and of the study, on the PET's own grid; plain JSON.
    warnings : sequence of Warning
        What the target grid loses, and what can't be right, but for what the zip tells already.
    """

    ct: Volume
    suv: Volume
    lesions: Volume
    mask: NDArray[np.uint8 | np.uint16]
    mask_iso: NDArray[np.uint8 | np.uint16]
    measures: Mapping[str, Any]
    warnings: Sequence[Warning]

    @property
    def images(self) -> dict[str, Image]:
        """The images by the names that they have in files."""
        arrays = {
            "ct": self.ct.data,
            "petsuv": self.suv.data,
            "mask": self.mask,
            "mask_iso": self.mask_iso,
        }
        return {name: Image(array, self.ct.grid.affine) for name, array in arrays.items()}

    @property
    def how_resampled(self) -> str:
        """How each image was resampled, in words."""
        volumes = {"CT": self.ct, "PET": self.suv, "mask": self.lesions}
        return ", ".join(
            f"{name} {'axis by axis' if volume.axis_by_axis else 'by nilearn'}"
            for name, volume in volumes.items()
        )


class StepTimes:
    """Seconds spent in the named steps of one study."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, step: str) -> None:
        """Add the time since the last call to `step`."""
        now = time.perf_counter()
        self._seconds[step] = self._seconds.get(step, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{step} {seconds:.2f} s" for step, seconds in self._seconds.items())


def place_study(
    zip_path: Path, study: project_zip.ArchivedStudy, recipe: Recipe, times: StepTimes
) -> PlacedStudy:
    """Read the images of a study, at no time CT and PET both, and resample them.

    Raises
    ------
    IncompleteStudy
        The zip lacks one of the images.
    StudyError
        One of them is damaged; they do not belong together; the mask holds no labels.
    """
    if study.missing:
        raise IncompleteStudy("no " + ", no ".join(study.missing))
    original_ct = project_zip.read_image(zip_path, study, "ct")
    times.end("reading")
    ct_grid, ct_summary = original_ct.grid, summary_of(original_ct)
    ct = place_ct(original_ct, recipe)
    del original_ct
    times.end("resampling")
    pet = project_zip.read_image(zip_path, study, "petsuv")
    check_overlap(ct_grid, pet.grid)
    labels = check_labels(project_zip.read_image(zip_path, study, "mask"))
    warnings = [*check_mask(labels, pet.grid, allow_empty=True)]
    labels = completed(labels, pet.grid, ct_grid)
    lesions = number_lesions(labels)
    times.end("reading")
    suv = place_pet(pet, ct, recipe)
    placed = place_labels(lesions, ct, recipe)
    kept = recipe.labels == "keep"
    times.end("resampling")
    outlined = place_labels(labels, ct, recipe) if kept else placed
    mask, mask_iso = outline(suv, outlined, recipe)
    times.end("isocontour")
    warnings += resampling_warnings(pet, lesions, ct, suv, placed, recipe)
    pet_lesions, weight_kg = on_pet(lesions, pet), weight_of(_provenance(study))
    pet_labels = on_pet(labels, pet) if kept else None
    found = measures(pet, pet_lesions, pet_labels, weight_kg, recipe)
    fraction = found["study"]["dose_fraction"]
    warnings += plausibility_warnings(
        pet, labels, lesions, pet_lesions, ct_summary, fraction, weight_kg
    )
    times.end("measures")
    told = {warning.text for warning in _told(study)}
    new = [warning for warning in warnings if warning.text not in told]
    return PlacedStudy(ct, suv, placed, mask, mask_iso, found, new)


def write_study(
    path: Path,
    study: project_zip.ArchivedStudy,
    placed: PlacedStudy,
    recipe: Recipe,
    compression: str,
    fingerprint: str,
    software: str,
) -> None:
    """Write the HDF5 file of one study."""
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
    study: project_zip.ArchivedStudy, placed: PlacedStudy, recipe: Recipe
) -> dict[str, dict[str, Any]]:
    """Return the attributes of each group's dataset."""
    provenance = _provenance(study)
    told = [*_told(study), *placed.warnings]
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
        "suv_type": provenance.get("suv_type", "unknown"),
        "suv": json.dumps(provenance, sort_keys=True),
        "measures": json.dumps(placed.measures, sort_keys=True),
        **{name: json.dumps(found) for name, found in texts_and_kinds(told).items()},
    }
    lengths = as_hash_lengths(study.record.get("hash_lengths"), study.hash)
    if lengths is not None:
        of_image["hash_lengths"] = np.array(lengths)
    of_iso = {"connectivity": 26, "iso_threshold": recipe.iso_threshold}
    if recipe.iso_suv is not None:
        of_iso = {"connectivity": 26, "iso_suv": recipe.iso_suv}
    return {"image": shared | of_image, "mask": shared, "mask_iso": shared | of_iso}


def _provenance(study: project_zip.ArchivedStudy) -> Mapping[str, Any]:
    found: Mapping[str, Any] = study.record.get("suv", {})
    return found


def _told(study: project_zip.ArchivedStudy) -> list[Warning]:
    """Return the warnings that the zip holds."""
    return warnings_from(study.record.get("warnings", []), study.record.get("warning_kinds", []))
