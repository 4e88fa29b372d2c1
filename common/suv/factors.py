"""Standardised uptake values: a factor for each slice of a PET series, and its provenance.

Pure. SUV = stored value * RescaleSlope * factor. The rules, as they are named in the provenance
(6 to 9 are told by `common.suv.units`):

    6    Units BQML: activity concentrations; not named in files, as it goes without saying
    7    Units GML: SUV already; converted where another type is asked for
    8    Units CM2ML: SUV by body surface area already; likewise
    9    Units CNTS of Philips: (7053,1000) is the factor; else "9+", and (7053,1009) gives Bq/ml
    11   DecayCorrection ADMIN: the values refer to the injection
    12a, 12b, 12c, 13, 15
         The values refer to another moment: see `common.suv.decay`

Where values are activity concentrations (Units BQML, and CNTS by (7053,1009)), the factor is body
weight [g] over the dose [Bq] left at the moment that the values refer to.

Sources: the IBSI SUV manual (Vacha et al., 2026); the QIBA FDG-PET/CT profile, vendor-neutral
pseudo-code; conformance statements of the vendors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import Kind, StudyError, Warning
from common.suv.alternatives import ALTERNATIVES, alternative_factors
from common.suv.body import SUV_UNITS, body_quantity
from common.suv.decay import decay_reference, uptake_s
from common.suv.inputs import Caveats, PetSeries, Source, refuse_reinterpretations
from common.suv.names import DECAY_CORRECTED, DECAY_CORRECTION, HALF_LIFE, NAMES
from common.suv.nuclides import SAME_NUCLIDE, is_half_life_of_pet
from common.suv.provenance import Provenance, Rule, rounded, value_range
from common.suv.timeline import Array, timeline
from common.suv.units import (
    compare_with_vendor,
    scale_of_units,
    state_of,
)
from common.suv.vendors import PHILIPS_ACTIVITY_FACTOR, PHILIPS_SUV_FACTOR

# --- conversion ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SuvConversion:
    """How a series becomes SUV.

    Attributes
    ----------
    factors : (n_slices,) float64 array
        SUV per rescaled value.
    provenance : Provenance
        How they came about.
    """

    factors: Array
    provenance: Provenance


# --- suv -------------------------------------------------------------------------------------

LEAST_WEIGHT_IN_GRAMS = 1000.0
"""PatientWeight from which on it must be in grams."""

LEAST_DOSE_IN_BQ = 10_000.0
"""RadionuclideTotalDose below which it must be in MBq."""

POSSIBLE_DOSE_IN_BQ = (20e6, 5_000e6)
"""Injected doses [Bq]; others are in another unit (mCi, GBq)."""

SAME_HALF_LIFE = 0.01
"""Relative difference of a half-life from that of the nuclide that is worth a warning."""

_CORRECTED_IMAGE = "CorrectedImage (0028,0051)"
_ATTENUATION_CORRECTED = "AttenuationCorrected (0018,9759)"


def suv_factors(series: PetSeries, suv_type: str = "bw", strict: bool = False) -> SuvConversion:
    """Find the factor from rescaled value to SUV of each slice.

    Parameters
    ----------
    series : PetSeries
        What the headers say.
    suv_type : str
        The type asked for: "bw", "lbm-janma", "lbm-james" or "ibw" [g/ml], or "bsa" [cm2/ml].
    strict : bool
        Refuse a header that needs a reinterpretation.

    Raises
    ------
    StudyError
        The header does not determine the SUV.
    """
    _require_suv_type(suv_type)
    caveats = Caveats([*series.reinterpretations])
    _require_corrections(series, caveats)
    scale = scale_of_units(series)
    weight_kg = _weight_kg(series, caveats)
    if scale.suv_type is None:
        rule, uptake, dose_bq = _dose_at_reference(series, caveats)
        with np.errstate(over="ignore", divide="ignore"):
            to_suvbw = scale.per_unit * _quantity("bw", series, weight_kg) / dose_bq
        vendor_factor = compare_with_vendor(series, to_suvbw, caveats)
        factors = to_suvbw * _ratio(suv_type, "bw", series, weight_kg)
    else:
        rule, uptake, vendor_factor = None, None, None
        factors = scale.per_unit * _ratio(suv_type, scale.suv_type, series, weight_kg)
    _require_positive(factors, series)
    alternatives = _alternatives(suv_type, series, weight_kg)
    if rule is Rule.BACK_FROM_FRAMES:
        _compare_with_qiba(series, factors, alternatives["qiba"], caveats)
    if strict:
        refuse_reinterpretations(caveats)
    provenance = Provenance(
        suv_type=suv_type,
        rules=(scale.rule,) if rule is None else (scale.rule, rule),
        factor_range=value_range(factors),
        weight_kg=weight_kg,
        reinterpretations=tuple(caveats.reinterpretations),
        warnings=tuple(caveats.warnings),
        alternatives=alternatives,
        units=series.units,
        header_suv_type=series.suv_type,
        decay_correction=series.decay_correction,
        manufacturer=series.manufacturer,
        injection_from=None if uptake is None else _injection_from(series),
        minutes_to_reference=None if uptake is None else value_range(uptake / 60),
        vendor_factor=None if vendor_factor is None else rounded(vendor_factor),
    )
    return SuvConversion(factors, provenance)


def already_suv(
    per_rescaled: Sequence[float],
    suv_type: str = "bw",
    series: PetSeries | None = None,
    strict: bool = False,
) -> SuvConversion:
    """Take values as SUV of `suv_type` (`--pet-units suv`).

    Parameters
    ----------
    per_rescaled : sequence of float
        Value per rescaled value of each slice, as `PetSlice.real_world_slope`: nearly always 1.
    suv_type : str
        Type of SUV that the values are, as `suv_factors` takes it.
    series : PetSeries, optional
        Only its weight counts, for the provenance.
    strict : bool
        Refuse a weight that needs a reinterpretation.

    Raises
    ------
    StudyError
        Strict, and the weight is in grams.
    """
    _require_suv_type(suv_type)
    caveats = Caveats()
    factors = np.array(per_rescaled, dtype=np.float64)
    weight_kg = None if series is None else _weight_kg(series, caveats)
    if strict:
        refuse_reinterpretations(caveats)
    provenance = Provenance(
        suv_type=suv_type,
        rules=(Rule.GIVEN,),
        factor_range=value_range(factors),
        weight_kg=weight_kg,
        reinterpretations=tuple(caveats.reinterpretations),
        warnings=tuple(caveats.warnings),
        alternatives=dict.fromkeys(ALTERNATIVES),
    )
    return SuvConversion(factors, provenance)


def spread_factors(conversion: SuvConversion, n_slices: int) -> Array:
    """Factors of a volume's `n_slices`, where one header may stand for all of them.

    Raises
    ------
    StudyError
        Neither one header nor one for each slice; or one, but without decay correction each slice
        refers to a moment of its own.
    """
    n_headers = len(conversion.factors)
    if n_headers == n_slices:
        return conversion.factors
    if n_headers != 1:
        raise StudyError(
            f"{n_headers} PET headers for {n_slices} slices: give one header, or one for each slice"
        )
    if Rule.FRAME_AVERAGE in conversion.provenance.rules:
        raise StudyError(
            f"one header can't tell when each slice was acquired ({DECAY_CORRECTION} is NONE): "
            "give the header of every slice"
        )
    return np.full(n_slices, conversion.factors[0])


def _require_suv_type(suv_type: str) -> None:
    if suv_type not in SUV_UNITS:
        raise ValueError(f"no such type of SUV: {suv_type}")


def _require_corrections(series: PetSeries, caveats: Caveats) -> None:
    is_enhanced = series.source is Source.ENHANCED
    if not series.corrected_image and not is_enhanced:
        raise StudyError(
            f"it is unknown whether attenuation was corrected for ({_CORRECTED_IMAGE} is missing): "
            "add it to the header as the scanner wrote it, or export the series anew"
        )
    if "ATTN" not in series.corrected_image:
        state = (
            f"{_ATTENUATION_CORRECTED} is not YES"
            if is_enhanced
            else f"{_CORRECTED_IMAGE} lacks ATTN"
        )
        raise StudyError(
            f"not corrected for attenuation ({state}): give the attenuation-corrected series"
        )
    decay_corrected = "DECY" in series.corrected_image
    if not decay_corrected and series.decay_correction != "NONE":
        state = (
            f"{DECAY_CORRECTED} is neither YES nor NO"
            if is_enhanced
            else f"{_CORRECTED_IMAGE} lacks DECY, but {DECAY_CORRECTION} "
            f"{state_of(series.decay_correction)}, not NONE"
        )
        raise StudyError(
            f"it is unclear whether decay was corrected for ({state}): correct the header"
        )
    if decay_corrected and series.decay_correction == "NONE":
        caveats.warnings.append(
            Warning(Kind.SUV, f"{_CORRECTED_IMAGE} has DECY, but {DECAY_CORRECTION} is NONE")
        )


def _weight_kg(series: PetSeries, caveats: Caveats) -> float | None:
    """Body weight [kg], None where there is none."""
    weight = series.weight_kg
    if weight is None or weight <= 0:
        return None
    if weight < LEAST_WEIGHT_IN_GRAMS:
        return weight
    caveats.reinterpretations.append(
        f"{NAMES[series.source].weight} is 1000 or more: it is taken as grams"
    )
    return weight / 1000


def _quantity(suv_type: str, series: PetSeries, weight_kg: float | None) -> float:
    if weight_kg is None:
        state = "is missing" if series.weight_kg is None else f"is {series.weight_kg:g}"
        names = NAMES[series.source]
        raise StudyError(f"no body weight ({names.weight} {state}): set it in {names.weight_place}")
    if suv_type != "bw" and series.source is Source.BIDS:
        raise StudyError(
            f"SUV ({suv_type}) needs more than the weight, which PET-BIDS does not tell (height, "
            "sex): give a DICOM header of the PET, or ask for --suv-type bw"
        )
    return body_quantity(suv_type, weight_kg, series.height_m, series.sex)


def _ratio(to_type: str, from_type: str, series: PetSeries, weight_kg: float | None) -> float:
    """SUV of `to_type` per SUV of `from_type`."""
    if to_type == from_type:
        return 1.0
    return _quantity(to_type, series, weight_kg) / _quantity(from_type, series, weight_kg)


def _dose_at_reference(series: PetSeries, caveats: Caveats) -> tuple[Rule, Array, Array]:
    """Rule, time from injection [s] and dose left then [Bq] of each slice."""
    dose_bq, half_life_s = _dose_bq(series, caveats), _half_life_s(series, caveats)
    if series.decay_correction == "ADMIN":
        at_injection = np.zeros(len(series.slices))
        return Rule.ADMIN, at_injection, at_injection + dose_bq
    times = timeline(series, caveats)
    rule, reference_s = decay_reference(series, times, half_life_s, caveats)
    uptake = uptake_s(times, reference_s, half_life_s, caveats)
    return rule, uptake, dose_bq * np.exp2(-uptake / half_life_s)


def _injection_from(series: PetSeries) -> str | None:
    if series.decay_correction == "ADMIN":
        return None
    return "clock time" if series.injection is None else "date-time"


def _dose_bq(series: PetSeries, caveats: Caveats) -> float:
    dose, names = series.dose_bq, NAMES[series.source]
    if dose is None or dose <= 0:
        state = "is missing" if dose is None else f"is {dose:g}"
        raise StudyError(f"no injected dose ({names.dose} {state}): set it in {names.dose_place}")
    in_mbq = dose < LEAST_DOSE_IN_BQ
    dose_bq = dose * 1e6 if in_mbq else dose
    least, largest = POSSIBLE_DOSE_IN_BQ
    if not least <= dose_bq <= largest:
        raise StudyError(
            f"the injected dose can't be right ({names.dose} is {dose:g}: neither as Bq nor as MBq "
            f"is it within {least / 1e6:g} to {largest / 1e6:g} MBq; mCi or GBq?): "
            f"correct it in {names.dose_place}"
        )
    if in_mbq:
        caveats.reinterpretations.append(f"{names.dose} is below 10000: it is taken as MBq")
    return dose_bq


def _half_life_s(series: PetSeries, caveats: Caveats) -> float:
    half_life_s = series.half_life_s
    if half_life_s is None or half_life_s <= 0:
        state = "is missing" if half_life_s is None else f"is {half_life_s:g}"
        raise StudyError(f"no half-life ({HALF_LIFE} {state}): set it in the header [s]")
    of_nuclide_s = series.nuclide_half_life_s
    difference = abs(half_life_s / of_nuclide_s - 1) if of_nuclide_s else 0.0
    if difference > SAME_NUCLIDE:
        raise StudyError(
            f"the half-life can't be right ({HALF_LIFE} is {half_life_s:g}, that of the nuclide "
            f"in RadionuclideCodeSequence (0054,0300) {of_nuclide_s:g} s; minutes?): "
            "correct it in the header [s]"
        )
    if difference > SAME_HALF_LIFE:
        caveats.warnings.append(
            Warning(
                Kind.SUV,
                f"half-life disagrees: {HALF_LIFE} is {half_life_s:g} s, that of the nuclide in "
                f"RadionuclideCodeSequence (0054,0300) {of_nuclide_s:g} s; the former is used",
            )
        )
    if of_nuclide_s is None and not is_half_life_of_pet(half_life_s):
        caveats.warnings.append(
            Warning(
                Kind.SUV,
                f"the half-life may be wrong: {HALF_LIFE} is {half_life_s:g} s, which no usual "
                "nuclide of PET has, and RadionuclideCodeSequence (0054,0300) names none",
            )
        )
    return half_life_s


def _require_positive(factors: Array, series: PetSeries) -> None:
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        names = NAMES[series.source]
        stated_in = f"{names.dose}, {names.half_life}, times of injection and scan"
        if series.units == "CNTS":
            stated_in = f"{PHILIPS_SUV_FACTOR} or {PHILIPS_ACTIVITY_FACTOR}, {stated_in}"
        raise StudyError(
            f"the factor to SUV is not a positive number ({stated_in}): correct {names.place}"
        )


def _compare_with_qiba(
    series: PetSeries, factors: Array, by_qiba: float | None, caveats: Caveats
) -> None:
    """Say what QIBA's rule gives where a FrameReferenceTime is 0, which it takes as missing."""
    is_zero = any(each.frame_reference_time_s == 0 for each in series.slices)
    if series.manufacturer == "GE" or not is_zero or by_qiba is None:
        return
    change = by_qiba / float(np.median(factors)) - 1
    caveats.warnings.append(
        Warning(
            Kind.DECAY_REFERENCE,
            "FrameReferenceTime (0054,1300) is 0 and is used as such; by QIBA's rule, which takes "
            f"0 as missing, the factor to SUV is {by_qiba:.6g} ({change:+.2%})",
        )
    )


def _alternatives(
    suv_type: str, series: PetSeries, weight_kg: float | None
) -> dict[str, float | None]:
    try:
        per_suvbw = _ratio(suv_type, "bw", series, weight_kg)
    except StudyError:
        per_suvbw = None
    return alternative_factors(series, per_suvbw)
