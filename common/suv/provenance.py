"""How the SUV of a study came about, without identity: the rules that fired and what they found.

Pure.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import Kind, Warning
from common.suv.body import SUV_UNITS


class Rule(StrEnum):
    """The rules by their numbers in docs/suv.md; see `common.suv.factors` and `.decay`."""

    GIVEN = "given as SUV"
    BQML = "6"
    GML = "7"
    CM2ML = "8"
    CNTS = "9"
    ADMIN = "11"
    STATED_REFERENCE = "12a"
    SERIES_START = "12b"
    BACK_FROM_FRAMES = "12c"
    FRAME_AVERAGE = "13"
    STANDARD_REFERENCE = "15"


@dataclass(frozen=True)
class Provenance:
    """How the factors of a series came about.

    Attributes
    ----------
    suv_type : str
        Type of the SUV, a key of `SUV_UNITS`.
    rules : tuple of Rule
        What fired: what the values are; then, unless they are SUV, the moment that they refer to.
    factor_range : (float, float)
        Least and largest factor from rescaled value to SUV.
    weight_kg : float or None
        Body weight.
    reinterpretations : tuple of str
        Header values taken to mean something else than they say.
    warnings : tuple of Warning
        Contradictions that did not stop the conversion.
    alternatives : dict of str to float or None
        Median factors by other rules; see `common.suv.alternatives`.
    units, header_suv_type, decay_correction, manufacturer : str or None
        What the header says.
    injection_from : str or None
        The header's "date-time" of injection; or "clock time" where it has no more, which then is
        one within the day before the decay reference; or None where none is needed.
    minutes_to_reference : (float, float) or None
        Least and largest time from injection to the moment that the values refer to.
    vendor_factor : float or None
        Median factor to SUVbw that Philips states beside Units BQML.
    """

    suv_type: str
    rules: tuple[Rule, ...]
    factor_range: tuple[float, float]
    weight_kg: float | None
    reinterpretations: tuple[str, ...]
    warnings: tuple[Warning, ...]
    alternatives: dict[str, float | None]
    units: str | None = None
    header_suv_type: str | None = None
    decay_correction: str | None = None
    manufacturer: str | None = None
    injection_from: str | None = None
    minutes_to_reference: tuple[float, float] | None = None
    vendor_factor: float | None = None

    @property
    def rule(self) -> str:
        """The rules that fired in one word, as files name them: 6 goes without saying."""
        return "+".join(rule for rule in self.rules if rule is not Rule.BQML)

    @property
    def told(self) -> tuple[Warning, ...]:
        """What the user should know of it: reinterpretations, then warnings."""
        reinterpreted = (Warning(Kind.REINTERPRETED, text) for text in self.reinterpretations)
        return (*reinterpreted, *self.warnings)

    @property
    def record(self) -> dict[str, Any]:
        """What ``studies.json`` and the attribute ``suv`` say of it; see `coarse`."""
        fields = asdict(self) | {
            "warnings": [warning.text for warning in self.warnings],
            "suv_units": SUV_UNITS[self.suv_type],
            "rule": self.rule,
        }
        del fields["rules"]
        return coarse(
            {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in fields.items()
            }
        )


# --- what is told of it ----------------------------------------------------------------------

MINIMAL = ("rule", "units", "suv_type")
"""What `--minimal-provenance` keeps of a record."""


def coarse(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record without the digits that could single out a patient.

    Of weight [kg], minutes and factor, were they exact, the injected dose follows to eleven digits.
    The weight is told to 1 kg, minutes to 1, factors to 6 digits. What is of no such type, in files
    of other makes, stays.
    """
    return {name: _rounded(value, _ROUNDED.get(name)) for name, value in record.items()}


def rules_of(record: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return the rules that a record names, but for those that are unknown here."""
    known = {rule.value: rule for rule in Rule}
    named = str(record.get("rule", "")).split("+")
    return tuple(known[each] for each in named if each in known)


def minimal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--minimal-provenance` keeps of a record."""
    return {name: record[name] for name in MINIMAL}


def _to_six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _to_one_kg(weight_kg: float) -> float:
    # What weighs less is an animal or a phantom.
    return round(weight_kg) if weight_kg >= 1 else _to_six_digits(weight_kg)


_ROUNDED: Mapping[str, Callable[[float], float]] = {
    "weight_kg": _to_one_kg,
    "minutes_to_reference": round,
    "factor_range": _to_six_digits,
    "vendor_factor": _to_six_digits,
    "alternatives": _to_six_digits,
}


def _rounded(value: Any, to: Callable[[float], float] | None) -> Any:
    if to is None:
        return value
    if isinstance(value, Mapping):
        return {name: _rounded(each, to) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each, to) for each in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return to(value) if is_number and math.isfinite(value) else value


# --- values ----------------------------------------------------------------------------------


def value_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least and the largest value."""
    return rounded(float(values.min())), rounded(float(values.max()))


def rounded(value: float) -> float:
    """Return a value to 12 digits: the same whatever the last bit of a machine's exponential."""
    return float(f"{value:.12g}")
