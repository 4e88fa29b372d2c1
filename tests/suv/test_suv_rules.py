"""The rules for weight, dose, decay reference and injection, read literally, on random headers.

An oracle that shares no code with the program: plain `datetime`, one slice after the other.
"""

import math
import os
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, time, timedelta
from typing import Any

import numpy as np
from pet_headers import PerSlice, da, ds, dt, pet_headers, tm
from suv_cases import GE, GE_REFERENCE, PHILIPS, SIEMENS, SIEMENS_REFERENCE

from common.dicom.pet import read_pet_series
from common.errors import StudyError
from common.suv.factors import suv_factors

STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))
N_HEADERS = 250
HALF_LIVES_S = (6586.2, 4057.7, 1223.4, 39_000.0, 45_723.6, 282_240.0)
DAY = datetime(2025, 1, 1)


@dataclass
class Scan:
    """What a header says; three slices."""

    weight: float | None
    dose: float | None
    half_life_s: float
    duration_s: float | None
    decay_correction: str
    acquired: list[datetime]
    series: datetime
    frame_reference_s: list[float] | None
    vendor: str
    stated: datetime | None
    injected: datetime | None
    injected_clock: time | None


class Refused(Exception):
    """The rules do not give a factor."""


def needed(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value <= 0):
        raise Refused
    return value


def factors(scan: Scan) -> list[float]:
    weight_kg, dose_bq = needed(scan.weight), needed(scan.dose)
    if weight_kg >= 1000:
        weight_kg /= 1000
    if dose_bq < 10_000:
        dose_bq *= 1e6
    if not 20e6 <= dose_bq <= 5000e6:
        raise Refused
    if scan.decay_correction == "ADMIN":
        return [weight_kg * 1000 / dose_bq] * 3
    return [
        weight_kg * 1000 / (dose_bq * 2 ** (-uptake / scan.half_life_s))
        for uptake in uptakes_s(scan, references(scan))
    ]


def references(scan: Scan) -> list[datetime]:
    if scan.decay_correction == "NONE":
        return [each + average_rate_time(scan) for each in scan.acquired]
    if scan.stated is not None and not is_overwritten(scan, scan.stated):
        return [scan.stated] * 3
    return [scan.series] * 3 if starts_in_time(scan) else back_from_frames(scan)


def starts_in_time(scan: Scan) -> bool:
    return scan.series <= min(scan.acquired) + timedelta(seconds=1)


def back_from_frames(scan: Scan) -> list[datetime]:
    back = [timedelta(seconds=each) for each in needed(scan.frame_reference_s)]
    forth = timedelta() if scan.vendor == GE else average_rate_time(scan)
    return [each + forth - b for each, b in zip(scan.acquired, back, strict=True)]


def is_overwritten(scan: Scan, stated: datetime) -> bool:
    """No scan refers to `stated`, but one does to the start of the series, or that of frames."""
    others = [[scan.series] * 3] if starts_in_time(scan) else []
    if scan.vendor == GE or min(scan.frame_reference_s or [0]) > 0:
        with suppress(Refused):
            others.append(back_from_frames(scan))
    if not others or any(
        max(abs(each - stated) for each in other) <= timedelta(seconds=60) for other in others
    ):
        return False
    is_short = scan.half_life_s < 41_400
    longest_s = 12 * 3600 if is_short else 2 * scan.half_life_s
    uptakes = []
    if scan.injected:
        uptakes.append(lambda moment: (moment - scan.injected).total_seconds())
    if is_short and (scan.injected or scan.injected_clock):
        by_clock = replace(
            scan,
            injected=None,
            injected_clock=scan.injected.time() if scan.injected else scan.injected_clock,
        )
        uptakes.append(lambda moment: uptake_s(by_clock, moment))
    for uptake in uptakes:
        if all(-3600 <= uptake(each) <= longest_s for each in others[0]):
            return not -3600 <= uptake(stated) <= longest_s
    return False


def average_rate_time(scan: Scan) -> timedelta:
    duration_s, rate = needed(scan.duration_s), math.log(2) / scan.half_life_s
    exponent = rate * duration_s
    return timedelta(seconds=math.log(exponent / (1 - math.exp(-exponent))) / rate)


def uptakes_s(scan: Scan, moments: list[datetime]) -> list[float]:
    found_s = [uptake_s(scan, each) for each in moments]
    if max(found_s) - min(found_s) > 12 * 3600:
        raise Refused
    return found_s


def uptake_s(scan: Scan, moment: datetime) -> float:
    if scan.injected is not None:
        stated_s = (moment - scan.injected).total_seconds()
        if -3600 <= stated_s < 2 * scan.half_life_s:
            return stated_s
    clock = scan.injected.time() if scan.injected else needed(scan.injected_clock)
    if scan.half_life_s >= 41_400:
        raise Refused
    injected = datetime.combine(moment.date(), clock)
    if injected > moment + timedelta(seconds=3600):
        injected -= timedelta(days=1)
    return (moment - injected).total_seconds()


def random_scan(rng: random.Random) -> Scan:
    microseconds = rng.choice((0, 0, 1, 100_000, 687_000))
    start = DAY + timedelta(seconds=rng.randrange(86_400), microseconds=microseconds)
    before_s = (3600, 3600, 5400, -1800, -3600, -3601, 10_000, 90_000, 200_000)
    injected = start - timedelta(seconds=rng.choice(before_s))
    acquired = sorted(start + timedelta(seconds=rng.choice((0, 1, 120, 900))) for _ in range(3))
    vendor = rng.choice((GE, SIEMENS, PHILIPS, "Synthetic"))
    states = vendor in (GE, SIEMENS) and rng.random() < 0.3
    return Scan(
        weight=rng.choice((70.0, 70.0, 80.5, 64.0, 70_000.0, 0.0, None)),
        dose=rng.choice((3e8, 3e8, 1e8, 300.0, 3e8, 5e9, 8.1, 9999.0, -1.0, None)),
        half_life_s=rng.choice(HALF_LIVES_S),
        duration_s=rng.choice((300.0, 120.0, 0.0, None)),
        decay_correction=rng.choice(("START", "START", "START", "NONE", "ADMIN")),
        acquired=acquired,
        series=acquired[0] + timedelta(seconds=rng.choice((0, 0, -600, 0.9, 1, 1.5, 3600))),
        frame_reference_s=rng.choice((None, [150.0] * 3, [0.0, 200.0, 400.0])),
        vendor=vendor,
        stated=start - timedelta(seconds=77) if states else None,
        injected=rng.choice((None, injected, injected, injected - timedelta(days=900))),
        injected_clock=rng.choice((None, injected.time())),
    )


def headers(scan: Scan) -> list[Any]:
    tag, creator = {
        GE: (GE_REFERENCE, "GEMS_PETD_01"),
        SIEMENS: (SIEMENS_REFERENCE, "SIEMENS MED PT"),
    }.get(scan.vendor, (0, ""))
    offsets_s = scan.frame_reference_s or [None] * 3
    return pet_headers(
        3,
        private={tag: (creator, "DT", dt(scan.stated))} if scan.stated else {},
        PatientWeight=scan.weight,
        RadionuclideTotalDose=scan.dose,
        RadionuclideHalfLife=scan.half_life_s,
        ActualFrameDuration=None if scan.duration_s is None else int(scan.duration_s * 1000),
        DecayCorrection=scan.decay_correction,
        CorrectedImage=["ATTN"] if scan.decay_correction == "NONE" else ["ATTN", "DECY"],
        AcquisitionDate=PerSlice(*map(da, scan.acquired)),
        AcquisitionTime=PerSlice(*map(tm, scan.acquired)),
        SeriesDate=da(scan.series),
        SeriesTime=tm(scan.series),
        FrameReferenceTime=PerSlice(*(None if s is None else ds(s * 1000) for s in offsets_s)),
        Manufacturer=scan.vendor,
        RadiopharmaceuticalStartDateTime=dt(scan.injected) if scan.injected else None,
        RadiopharmaceuticalStartTime=(
            tm(datetime.combine(DAY, scan.injected_clock)) if scan.injected_clock else None
        ),
    )


def converted(scan: Scan) -> tuple[str, Any]:
    """The rule and the factors of the program; "refused" and None where there are none."""
    try:
        conversion = suv_factors(read_pet_series(headers(scan)))
    except StudyError:
        return "refused", None
    return conversion.provenance.record["rule"], conversion.factors


def test_random_headers_convert_and_are_refused_as_the_rules_say() -> None:
    rng, endings = random.Random(3), Counter[str]()
    for _ in range(N_HEADERS * STRESS):
        scan = random_scan(rng)
        try:
            expected = factors(scan)
        except Refused:
            expected = None
        rule, found = converted(scan)
        endings[rule] += 1
        assert (found is None) is (expected is None), (scan, rule)
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=str(scan))
    assert set(endings) == {"11", "12a", "12b", "12c", "13", "refused"}
    assert min(endings.values()) >= 3
