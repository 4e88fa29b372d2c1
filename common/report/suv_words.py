"""How the SUV of a study came about, as a file tells it, in words.

Files may be of other makes: `sound_provenance` lets through what is of known types alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.report.untrusted_json import is_number, json_array, json_object
from common.suv.body import SUV_UNITS
from common.suv.provenance import Rule, coarse, rules_of

_ALTERNATIVE_NAMES = {
    "autopet": "first file's AcquisitionTime (autoPET script)",
    "qiba": "QIBA",
    "frame_based": "frame times",
}
_REFERENCE_OF_RULE = {
    Rule.ADMIN: "the dose as injected",
    Rule.STATED_REFERENCE: "the vendor's decay-reference time",
    Rule.SERIES_START: "the start of the series",
    Rule.BACK_FROM_FRAMES: "the frame times, as the series was rewritten",
    Rule.FRAME_AVERAGE: "each slice's own mid-scan time",
    Rule.STANDARD_REFERENCE: "the reference time of the enhanced object, or of PET-BIDS",
}

WORDS_OF_RULE = {
    Rule.GIVEN: "The values came as SUV and are taken as they are.",
    Rule.BQML: (
        "Rule 6: Bq/ml are divided by the dose that was left at the reference, per body weight."
    ),
    Rule.GML: "Rule 7: the scanner stored SUV, taken as it is, or brought to the type asked for.",
    Rule.CM2ML: "Rule 8: the scanner stored SUV per body surface, brought to the type asked for.",
    Rule.CNTS: "Rule 9: the vendor's factor in the header makes SUV, or Bq/ml, of counts.",
    Rule.ADMIN: (
        "Rule 11: decay was corrected to the injection, so that the dose counts as injected."
    ),
    Rule.STATED_REFERENCE: (
        "Rule 12a: decay was corrected to the time that the vendor's own element states, so "
        "that what was left of the dose then counts."
    ),
    Rule.SERIES_START: (
        "Rule 12b: decay was corrected to the start of the series, so that what was left of "
        "the dose then counts."
    ),
    Rule.BACK_FROM_FRAMES: (
        "Rule 12c: the series was rewritten later, so that its start is found from the times "
        "of its frames, and what was left of the dose then counts."
    ),
    Rule.FRAME_AVERAGE: (
        "Rule 13: decay was not corrected, so that for each slice what was left of the dose at "
        "its own time counts."
    ),
    Rule.STANDARD_REFERENCE: (
        "Rule 15: an enhanced PET, or the JSON of PET-BIDS, each of whose frames goes by these "
        "rules."
    ),
}
"""What each rule means, one sentence each."""


def sound_provenance(value: Any) -> Mapping[str, Any]:
    """Return how the SUV came about; empty where a file does not tell it in a known form."""
    provenance = coarse(json_object(value))
    texts = [provenance.get(name) for name in ("suv_type", "rule")]
    factors, minutes, said = (
        provenance.get(name) or []
        for name in ("factor_range", "minutes_to_reference", "reinterpretations")
    )
    alternatives = provenance.get("alternatives") or {}
    known_types = (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(each, list) for each in (factors, minutes, said))
        and isinstance(alternatives, dict)
    )
    if not known_types:
        return {}
    told = [provenance.get("weight_kg"), *alternatives.values()]
    numbers = [*factors, *minutes, *(value for value in told if value is not None)]
    known_types = all(map(is_number, numbers)) and all(isinstance(text, str) for text in said)
    return provenance if known_types else {}


def uptake_minutes(provenance: Mapping[str, Any]) -> float | None:
    """Return the least time from injection to the moment that the values refer to [min].

    None where a file does not tell it, or where that moment is the injection itself, so that the
    values do not tell how long the uptake was.
    """
    told = json_array(provenance.get("minutes_to_reference"))
    is_told = bool(told) and is_number(told[0]) and Rule.ADMIN not in rules_of(provenance)
    return told[0] if is_told else None


def suv_sentence(provenance: Mapping[str, Any]) -> str:
    """Say in one sentence how the SUV came about."""
    if not provenance:
        return "How the SUV came about is not known: the zip had no studies.json."
    units = provenance.get("units")
    suv_type = provenance["suv_type"]
    parts = [f"SUV ({suv_type}, {SUV_UNITS.get(suv_type, 'unknown unit')})"]
    rules = rules_of(provenance)
    if units is None:
        parts.append("as given")
    elif Rule.GML in rules or Rule.CM2ML in rules:
        parts.append(f"as the scanner stored it (Units {units})")
    else:
        reference = next((_REFERENCE_OF_RULE[r] for r in rules if r in _REFERENCE_OF_RULE), None)
        parts.append(f"from Units {units}")
        if provenance.get("decay_correction"):
            parts.append(f"DecayCorrection {provenance['decay_correction']}")
        if reference:
            parts.append(f"decay referred to {reference}")
        if uptake_minutes(provenance) is not None:
            minutes = _span(provenance["minutes_to_reference"], ".0f")
            parts.append(f"{minutes} min after injection")
        if provenance.get("factor_range"):
            parts.append(f"factor {_span(provenance['factor_range'], '.6g')}")
    if provenance.get("weight_kg"):
        parts.append(f"body weight {provenance['weight_kg']:g} kg")
    # What was given as SUV went by no rule of a number.
    rule = f" (rule {provenance['rule']})" if units is not None and rules else ""
    sentence = ", ".join(parts) + rule + "."
    if provenance.get("reinterpretations"):
        sentence += " Reinterpreted: " + "; ".join(provenance["reinterpretations"]) + "."
    return sentence


def rule_sentences(provenance: Mapping[str, Any]) -> str:
    """Say what the rules mean that made the SUV, one sentence each."""
    return " ".join(WORDS_OF_RULE[rule] for rule in rules_of(provenance))


def alternatives_sentence(provenance: Mapping[str, Any]) -> str:
    """Say how other rules in use would have scaled the same images; empty where none applies."""
    middle = float(np.mean(provenance.get("factor_range") or [0.0]))
    found = {
        name: factor
        for name in _ALTERNATIVE_NAMES
        if (factor := (provenance.get("alternatives") or {}).get(name)) and middle > 0
    }
    if not found or provenance.get("units") not in ("BQML", "CNTS"):
        return ""
    return "Other rules would give: " + ", ".join(
        f"{_ALTERNATIVE_NAMES[name]} {100 * (factor / middle - 1):+.1f} %"
        for name, factor in found.items()
    )


def _span(values: Sequence[float], form: str) -> str:
    first, last = (format(value, form) for value in (values[0], values[-1]))
    return first if first == last else f"{first} to {last}"
