"""How the SUV of a study came about, without identity: the rules that fired and what they found.

Pure.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.suv.body import SUV_UNITS


class Rule(StrEnum):
    """The rules by their numbers in docs/suv.md; see `common.suv.factors` and `.decay`."""

    GIVEN = "given as SUV"
    GML = "7"
    CM2ML = "8"
    CNTS = "9"
    ADMIN = "11"
    STATED_REFERENCE = "12a"
    SERIES_START = "12b"
    BACK_FROM_FRAMES = "12c"
    FRAME_AVERAGE = "13"
    ENHANCED = "15"


@dataclass(frozen=True)
class Provenance:
    """How the factors of a series came about.

    Attributes
    ----------
    suv_type : str
        Type of the SUV, a key of `SUV_UNITS`.
    rules : tuple of Rule
        What fired: what the values are, then the moment that they refer to; the former is not
        named where the values are Bq/ml.
    factor_range : (float, float)
        Least and largest factor from rescaled value to SUV.
    weight_kg : float or None
        Body weight.
    reinterpretations, warnings : tuple of str
        Sentences.
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
    warnings: tuple[str, ...]
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
        """The rules that fired in one word, as files name them; empty for Bq/ml given as SUV."""
        return "+".join(self.rules)

    @property
    def record(self) -> dict[str, Any]:
        """The same as JSON has it, in ``studies.json`` and in the attribute ``suv``."""
        fields = asdict(self) | {"suv_units": SUV_UNITS[self.suv_type], "rule": self.rule}
        del fields["rules"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }


def value_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least and the largest value."""
    return rounded(float(values.min())), rounded(float(values.max()))


def rounded(value: float) -> float:
    """Return a value to 12 digits: the same whatever the last bit of a machine's exponential."""
    return float(f"{value:.12g}")
