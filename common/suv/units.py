"""What the rescaled values of a PET are, by their Units: SUV already, activity, or counts.

Pure. Vendors' own factors, where they state some beside the values, are held against ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from common.errors import Kind, StudyError, Warning
from common.suv.inputs import Caveats, PetSeries, Source
from common.suv.names import DECAY_CORRECTION, NAMES
from common.suv.provenance import Rule
from common.suv.timeline import Array
from common.suv.vendors import PHILIPS_ACTIVITY_FACTOR, PHILIPS_SUV_FACTOR

LARGEST_WITNESS_DIFFERENCE = 0.01
"""Relative difference between a factor and the vendor's own that is worth a warning."""

_MANUFACTURER = "Manufacturer (0008,0070)"

_TYPE_OF_GML = {
    None: "bw",
    "BW": "bw",
    "LBMJANMA": "lbm-janma",
    "LBMJAMES128": "lbm-james",
    "IBW": "ibw",
}


@dataclass(frozen=True, eq=False)
class Scale:
    """What rescaled values times `per_unit` are.

    Attributes
    ----------
    rule : Rule
        The rule that fired.
    suv_type : str or None
        SUV of this type; None for activity concentration [Bq/ml].
    per_unit : (n_slices,) array

    """

    rule: Rule
    suv_type: str | None
    per_unit: Array


def scale_of_units(series: PetSeries) -> Scale:
    """Find what the rescaled values are.

    Raises
    ------
    StudyError
        Nothing that can become SUV, or the header leaves open what.
    """
    in_units = np.array([each.real_world_slope for each in series.slices])
    match series.units:
        case "GML":
            return Scale(Rule.GML, _type_of_gml(series), in_units)
        case "CM2ML":
            return Scale(Rule.CM2ML, "bsa", in_units)
        case "BQML":
            _require_decay_correction(series)
            return Scale(Rule.BQML, None, in_units)
        case "CNTS":
            _require_decay_correction(series)
            return _scale_of_counts(series)
        case None:
            raise StudyError(
                f"the unit of the values is unknown ({NAMES[series.source].units} is missing): "
                "add it to the header, or name it by --pet-units"
            )
        case other:
            raise StudyError(
                f"such values can't become SUV ({NAMES[series.source].units} {state_of(other)}): "
                "export the series as BQML"
            )


def compare_with_vendor(series: PetSeries, factors: Array, caveats: Caveats) -> float | None:
    """Hold `factors` to SUVbw, (n_slices,), against those that Philips states beside BQML.

    Returns
    -------
    vendor_factor : float or None
        Median of the stated factors; None where there are none.
    """
    if series.units != "BQML":
        return None
    suv = _on_every_slice(each.philips_suv_factor for each in series.slices)
    activity = _on_every_slice(each.philips_activity_factor for each in series.slices)
    if suv is None or activity is None:
        return None
    difference = float(np.abs(factors * activity / suv - 1).max())
    if difference > LARGEST_WITNESS_DIFFERENCE:
        caveats.warnings.append(
            Warning(
                Kind.SUV,
                f"vendor's factor disagrees: {PHILIPS_SUV_FACTOR} over "
                f"{PHILIPS_ACTIVITY_FACTOR} differs by up to {difference:.1%}; it is not used",
            )
        )
    return float(np.median(suv / activity))


def _type_of_gml(series: PetSeries) -> str:
    if series.suv_type in _TYPE_OF_GML:
        return _TYPE_OF_GML[series.suv_type]
    where = NAMES[series.source].suv_type
    why = ", which leaves the formula open" if series.suv_type == "LBM" else ""
    raise StudyError(
        f"the type of SUV is unknown ({where} {state_of(series.suv_type)}{why}): export it as BQML"
    )


def _require_decay_correction(series: PetSeries) -> None:
    if series.decay_correction not in ("START", "ADMIN", "NONE"):
        names = NAMES[series.source]
        raise StudyError(
            f"the decay correction is unknown ({names.decay_correction} "
            f"{state_of(series.decay_correction)}): "
            f"set it to {names.decay_corrections} in {names.place}"
        )


def _scale_of_counts(series: PetSeries) -> Scale:
    suv = _on_every_slice(each.philips_suv_factor for each in series.slices)
    if suv is not None and series.decay_correction != "NONE":
        return Scale(Rule.CNTS, "bw", suv)
    activity = _on_every_slice(each.philips_activity_factor for each in series.slices)
    if activity is not None:
        return Scale(Rule.CNTS, None, activity)
    raise _no_scale(series, has_suv_factor=suv is not None)


def _no_scale(series: PetSeries, *, has_suv_factor: bool) -> StudyError:
    """Return the refusal of counts, with what helps its maker."""
    remedy = "export with private tags, or as BQML"
    if series.source is Source.ENHANCED:
        why, remedy = "for which Enhanced PET states none", "export the series as Bq/ml"
    elif series.manufacturer != "PHILIPS":
        why = f"and {_MANUFACTURER} is not Philips, who alone state it"
        remedy = "export the series as BQML"
    elif has_suv_factor:
        why = (
            f"but Philips' {PHILIPS_ACTIVITY_FACTOR} is missing or 0, and {PHILIPS_SUV_FACTOR} "
            f"does not hold where {DECAY_CORRECTION} is NONE"
        )
    else:
        why = f"but Philips' {PHILIPS_SUV_FACTOR} and {PHILIPS_ACTIVITY_FACTOR} are missing or 0"
    is_cnts = f"{NAMES[series.source].units} is CNTS"
    return StudyError(f"counts without scale ({is_cnts}, {why}): {remedy}")


def state_of(code: str | None) -> str:
    """Say of a code that it is missing, unknown, or what it is."""
    if code is None:
        return "is missing"
    return "is none that DICOM defines" if code == "UNKNOWN" else f"is {code}"


def _on_every_slice(values: Iterable[float | None]) -> Array | None:
    """Values as an array, None unless every slice has one other than 0."""
    array = np.array([each or 0.0 for each in values])
    return array if array.all() else None
