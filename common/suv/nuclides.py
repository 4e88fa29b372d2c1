"""Half-lives of the nuclides of PET, by the many ways in which headers name them.

Pure.
"""

import itertools
import re

HALF_LIFE_S = {
    "C11": 1_221.8,
    "N13": 597.9,
    "O15": 122.24,
    "F18": 6_586.2,
    "CU61": 12_020.4,
    "CU64": 45_723.6,
    "GA68": 4_057.7,
    "BR76": 58_320.0,
    "RB82": 75.45,
    "Y86": 53_064.0,
    "ZR89": 282_276.0,
    "I124": 360_806.4,
}
"""Half-lives [s] (NNDC, Brookhaven)."""

SAME_NUCLIDE = 0.1
"""Relative difference from a nuclide's half-life beyond which one is in another unit (minutes), or
another nuclide's."""

_SYMBOL_OF_ELEMENT = {
    "CARBON": "C",
    "NITROGEN": "N",
    "OXYGEN": "O",
    "FLUORINE": "F",
    "COPPER": "CU",
    "GALLIUM": "GA",
    "BROMINE": "BR",
    "RUBIDIUM": "RB",
    "YTTRIUM": "Y",
    "ZIRCONIUM": "ZR",
    "IODINE": "I",
}


def nuclide_in(name: str) -> str | None:
    """Return the nuclide that a text names, as `HALF_LIFE_S` has it; None where there is none.

    ``^18^Fluorine``, ``Fluorine-18``, ``F-18``, ``18F`` and ``[18F]FDG`` are all F18.
    """
    parts = re.findall(r"[A-Z]+|\d+", name.upper())
    for one, other in itertools.pairwise(parts):
        element, mass = (one, other) if other.isdigit() else (other, one)
        nuclide: str = _SYMBOL_OF_ELEMENT.get(element, element) + mass
        if nuclide in HALF_LIFE_S:
            return nuclide
    return None


def is_half_life_of_pet(half_life_s: float) -> bool:
    """Tell whether some nuclide of PET has such a half-life [s]."""
    return any(abs(half_life_s / each_s - 1) <= SAME_NUCLIDE for each_s in HALF_LIFE_S.values())
