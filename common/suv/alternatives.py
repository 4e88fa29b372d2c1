"""What other rules in use make of a PET series, so that a centre sees whether older SUVs agree.

Pure. Header values are used as they are, without the reinterpretations of `common.suv`.

autopet
    AcquisitionTime of the first file less RadiopharmaceuticalStartTime, whatever Units,
    DecayCorrection and dates say; as in the script that made the autoPET data (lab-midas,
    TCIA_processing).
qiba
    The vendor-neutral pseudo-code of the QIBA FDG-PET/CT profile (2016), appendix G.
frame_based
    The decay reference reckoned back from each frame, as `common.suv.decay` does in rule 12c only.
"""

from collections.abc import Callable
from datetime import datetime, time

import numpy as np

from common.errors import StudyError
from common.suv.decay import average_rate_time_s, back_from_frames_s, uptake_s
from common.suv.inputs import Caveats, PetSeries, Source
from common.suv.provenance import rounded
from common.suv.timeline import Array, Timeline, timeline

ALTERNATIVES = ("autopet", "qiba", "frame_based")


def alternative_factors(series: PetSeries, per_suvbw: float | None) -> dict[str, float | None]:
    """Median factor of the series by each of the other rules; None where it can't be formed.

    They are rules for single-frame headers.

    Parameters
    ----------
    series : PetSeries
        What the headers say.
    per_suvbw : float or None
        From SUVbw to the type of SUV asked for; None where it is unknown.

    """
    if series.source is not Source.SINGLE_FRAME or per_suvbw is None:
        return dict.fromkeys(ALTERNATIVES)
    return {
        "autopet": _of_type(_autopet_factor(series), per_suvbw),
        "qiba": _of_type(_qiba_factor(series), per_suvbw),
        "frame_based": _of_type(_frame_based_factor(series), per_suvbw),
    }


def _autopet_factor(series: PetSeries) -> float | None:
    acquired, injected = series.slices[series.first_file].acquisition, series.injection_clock
    if acquired is None or injected is None:
        return None
    return _factor(series, np.array([_time_of_day_s(acquired) - _time_of_day_s(injected)]))


def _qiba_factor(series: PetSeries) -> float | None:
    if series.decay_correction != "START" or not {"ATTN", "DECY"} <= series.corrected_image:
        return None
    if series.units == "GML":
        return 1.0
    if series.units == "BQML":
        return _factor_at(series, _qiba_reference_s)
    if series.units == "CNTS":
        return _qiba_factor_of_counts(series)
    return None


def _qiba_factor_of_counts(series: PetSeries) -> float | None:
    factors = [each.philips_suv_factor or 0.0 for each in series.slices]
    if all(factors):
        return _median(np.array(factors))
    activity = [each.philips_activity_factor or 0.0 for each in series.slices]
    factor = _factor_at(series, _qiba_reference_s) if all(activity) else None
    return None if factor is None else factor * _median(np.array(activity))


def _qiba_reference_s(series: PetSeries, times: Timeline, half_life_s: float) -> Array:
    earliest_s = np.min(times.acquisition_s)
    if times.series_start_s <= earliest_s:
        return np.full(len(series.slices), times.series_start_s)
    if series.manufacturer == "GE" and np.isfinite(times.stated_reference_s).all():
        return times.stated_reference_s
    average_s = average_rate_time_s(times.frame_duration_s, half_life_s)
    back_s = times.acquisition_s - times.frame_reference_time_s + average_s
    usable = (times.frame_reference_time_s > 0) & np.isfinite(back_s)
    return np.where(usable, back_s, earliest_s)


def _frame_based_factor(series: PetSeries) -> float | None:
    if series.units != "BQML" or series.decay_correction != "START":
        return None
    return _factor_at(series, back_from_frames_s)


def _factor_at(
    series: PetSeries, reference_s: Callable[[PetSeries, Timeline, float], Array]
) -> float | None:
    if series.half_life_s is None or series.half_life_s <= 0:
        return None
    try:
        times = timeline(series, Caveats())
        at_s = reference_s(series, times, series.half_life_s)
        return _factor(series, uptake_s(times, at_s, series.half_life_s, Caveats()))
    except StudyError:
        return None


def _factor(series: PetSeries, uptake_s: Array) -> float | None:
    weight_kg, dose_bq, half_life_s = series.weight_kg, series.dose_bq, series.half_life_s
    if weight_kg is None or dose_bq is None or half_life_s is None:
        return None
    if min(weight_kg, dose_bq, half_life_s) <= 0:
        return None
    with np.errstate(over="ignore"):
        return _median(1000 * weight_kg / dose_bq * np.exp2(uptake_s / half_life_s))


def _median(values: Array) -> float:
    """Return what `np.median` does, which would load all of `numpy.ma`."""
    ordered = np.sort(values)
    if np.isnan(ordered[-1]):  # they come last
        return float("nan")
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return float(middle.mean())


def _time_of_day_s(moment: datetime | time) -> float:
    return moment.hour * 3600 + moment.minute * 60 + moment.second + moment.microsecond * 1e-6


def _of_type(factor: float | None, per_suvbw: float) -> float | None:
    if factor is None or not np.isfinite(factor):
        return None
    return rounded(factor * per_suvbw)
