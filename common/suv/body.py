"""Body quantities by which an SUV is normalised: weight, lean mass, ideal weight, surface area.

Pure: numbers in, a number out.
"""

from collections.abc import Callable

from common.errors import StudyError

SUV_UNITS = {
    "bw": "g/ml",
    "lbm-janma": "g/ml",
    "lbm-james": "g/ml",
    "ibw": "g/ml",
    "bsa": "cm2/ml",
}
"""Unit of each type of SUV."""

TALLEST_M = 3.0
"""Height [m] beyond which a PatientSize can't be in metres."""


def _james_lean_mass_kg(weight_kg: float, height_cm: float, sex: str) -> float:
    """Lean body mass [kg] after James, with the multiplier 128 for men (`sex` "M" or "F").

    Source: James WPT (1976), Research on obesity, HMSO; DICOM PS3.3 C.8.9.1 (LBMJAMES128).
    """
    slope, curvature = (1.10, 128.0) if sex == "M" else (1.07, 148.0)
    return slope * weight_kg - curvature * (weight_kg / height_cm) ** 2


def _janmahasatian_lean_mass_kg(weight_kg: float, height_cm: float, sex: str) -> float:
    """Lean body mass [kg] after Janmahasatian (`sex` "M" or "F").

    Source: Janmahasatian S et al. (2005), Clin Pharmacokinet 44:1051-65.
    """
    bmi = weight_kg / (height_cm / 100) ** 2
    intercept, slope = (6680.0, 216.0) if sex == "M" else (8780.0, 244.0)
    return 9270.0 * weight_kg / (intercept + slope * bmi)


def _ideal_weight_kg(weight_kg: float, height_cm: float, sex: str) -> float:
    """Ideal body weight [kg] after Sugawara, of height alone (`sex` "M" or "F").

    Source: Sugawara Y et al. (1999), Radiology 213:521-5.
    """
    weight_at_152_cm, kg_per_cm = (48.0, 1.06) if sex == "M" else (45.5, 0.91)
    return weight_at_152_cm + kg_per_cm * (height_cm - 152.0)


def _surface_area_m2(weight_kg: float, height_cm: float) -> float:
    """Body surface area [m2] after Du Bois and Du Bois (1916), Arch Intern Med 17:863-71."""
    return float(0.007184 * height_cm**0.725 * weight_kg**0.425)


_MASS_KG: dict[str, Callable[[float, float, str], float]] = {
    "lbm-janma": _janmahasatian_lean_mass_kg,
    "lbm-james": _james_lean_mass_kg,
    "ibw": _ideal_weight_kg,
}


def body_quantity(
    suv_type: str, weight_kg: float, height_m: float | None, sex: str | None
) -> float:
    """What an SUV of `suv_type` is normalised by: a mass [g], or the surface area [cm2].

    Parameters
    ----------
    suv_type : str
        A key of `SUV_UNITS`.
    weight_kg : float
        Body weight [kg].
    height_m : float or None
        Height [m]; needed by all types but "bw".
    sex : str or None
        "M", "F" or "O" (the mean of both); needed by the masses.

    Raises
    ------
    StudyError
        Height or sex is needed but missing or out of range, or the formula gives no positive mass.
    """
    if suv_type == "bw":
        return weight_kg * 1e3
    height_cm = _height_cm(height_m)
    if suv_type == "bsa":
        return _surface_area_m2(weight_kg, height_cm) * 1e4
    mass_kg = _MASS_KG[suv_type]
    masses_kg = [mass_kg(weight_kg, height_cm, each) for each in _sexes(sex)]
    if min(masses_kg) <= 0:
        raise StudyError(
            f"the {suv_type} formula gives no positive mass for this PatientWeight (0010,1030) "
            "and PatientSize (0010,1020): correct them, or ask for --suv-type bw"
        )
    return sum(masses_kg) / len(masses_kg) * 1e3


def _height_cm(height_m: float | None) -> float:
    if height_m is None:
        raise StudyError(
            "no body height (PatientSize (0010,1020) is missing): add it to the header [m]"
        )
    if not 0 < height_m < TALLEST_M:
        raise StudyError(
            f"no plausible body height (PatientSize (0010,1020) is {height_m:g}): "
            "correct it in the header [m]"
        )
    return height_m * 100


def _sexes(sex: str | None) -> str:
    if sex is None:
        raise StudyError(
            "sex is unknown (PatientSex (0010,0040) is missing): set it to M, F or O in the header"
        )
    if sex not in ("M", "F", "O"):
        raise StudyError(
            "sex is unknown (PatientSex (0010,0040) is none of M, F, O): correct it in the header"
        )
    return "MF" if sex == "O" else sex
