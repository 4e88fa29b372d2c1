"""How a series becomes SUV: its factors and how they came about, without identity. Pure."""

from dataclasses import dataclass
from typing import Any

from common.body_mass import SUV_UNITS
from common.remarks import Remarks
from common.suv_alternatives import ALTERNATIVES
from common.timeline import Array


@dataclass(frozen=True, eq=False)
class SuvConversion:
    """How a series becomes SUV.

    Attributes
    ----------
    factors : (n_slices,) float64 array
        SUV per rescaled value.
    provenance : dict
        How they came about; JSON-serialisable, without identity:

        ``suv_type``, ``suv_units``
            Type and unit of the SUV.
        ``units``, ``header_suv_type``, ``decay_correction``, ``manufacturer``
            What the header says.
        ``rule``
            What fired; see the modules `common.suv` and `common.decay`.
        ``injection_from``
            The header's "date-time" of injection; or "clock time" where it has no more, which then
            is one within the day before the decay reference; or None where none is needed.
        ``minutes_to_reference``
            [least, largest] from injection to the moment that the values refer to, or None.
        ``factor_range``
            [least, largest] of `factors`.
        ``weight_kg``
            Body weight, or None.
        ``vendor_factor``
            Median factor to SUVbw that Philips states beside Units BQML, or None.
        ``reinterpretations``, ``warnings``
            Lists of sentences.
        ``alternatives``
            Median factors by other rules, or None; see `common.suv_alternatives`.

    """

    factors: Array
    provenance: dict[str, Any]


def provenance(
    suv_type: str,
    rule: str,
    factors: Array,
    weight_kg: float | None,
    remarks: Remarks,
    **found: Any,
) -> dict[str, Any]:
    """Return the provenance of a conversion; `found` are more of the keys in `SuvConversion`."""
    return {
        "suv_type": suv_type,
        "suv_units": SUV_UNITS[suv_type],
        "units": None,
        "header_suv_type": None,
        "decay_correction": None,
        "manufacturer": None,
        "rule": rule,
        "injection_from": None,
        "minutes_to_reference": None,
        "factor_range": value_range(factors),
        "weight_kg": weight_kg,
        "vendor_factor": None,
        "reinterpretations": remarks.reinterpretations,
        "warnings": remarks.warnings,
        "alternatives": dict.fromkeys(ALTERNATIVES),
        **found,
    }


def value_range(values: Array) -> list[float]:
    """Return [least, largest]."""
    return [rounded(float(values.min())), rounded(float(values.max()))]


def rounded(value: float) -> float:
    """Return a value to 12 digits: the same whatever the last bit of a machine's exponential."""
    return float(f"{value:.12g}")
