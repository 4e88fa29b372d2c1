"""The angles of projections and their names. Pure."""

import math
from decimal import Decimal

ANGLE_DECIMALS = 6
MAX_ANGLES = 3_600


def projection_angles(start: float, stop: float, step: float) -> tuple[float, ...]:
    """Angles START, START + STEP, ... < STOP.

    They are counted in decimals, as they were typed: ``0 1 0.1`` gives 10 angles, not 11.

    Parameters
    ----------
    start, stop, step : float
        [degrees]

    Returns
    -------
    tuple of float
        Angles [degrees], each with a name of its own (`angle_name`).

    Raises
    ------
    ValueError
        The range is empty, not finite or has too many angles, STEP is not positive, an angle is
        outside [0, 1000) or has more decimals than a name can hold.
    """
    for name, value in (("START", start), ("STOP", stop), ("STEP", step)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: give a finite number of degrees")
    if step <= 0:
        raise ValueError(f"STEP is {step}: give a number of degrees above 0")
    if start >= stop:
        raise ValueError(f"no angle from START {start} to below STOP {stop}: raise STOP")
    _check_decimals("STEP", step)
    angle_name(start)

    first, limit, stride = (Decimal(repr(float(value))) for value in (start, stop, step))
    count = math.ceil((limit - first) / stride)
    if count > MAX_ANGLES:
        raise ValueError(f"more than {MAX_ANGLES} angles: raise STEP or lower STOP")
    angles = tuple(float(first + number * stride) for number in range(count))
    angle_name(angles[-1])
    return angles


def angle_name(angle: float) -> str:
    """Name of an angle: three digits, and as few decimals as it needs.

    Parameters
    ----------
    angle : float
        [degrees]

    Returns
    -------
    str
        ``035`` for 35, ``007.5`` for 7.5; ``float`` of it is `angle` again.

    Raises
    ------
    ValueError
        The angle is outside [0, 1000) or has more than six decimals: names would collide.
    """
    if not 0 <= angle < 1000:
        raise ValueError(f"angle {angle}: give angles from 0 to below 1000 degrees")
    _check_decimals("angle", angle)
    return f"{abs(angle):0{4 + ANGLE_DECIMALS}.{ANGLE_DECIMALS}f}".rstrip("0").rstrip(".")


def _check_decimals(name: str, degrees: float) -> None:
    if round(degrees, ANGLE_DECIMALS) != degrees:
        raise ValueError(f"{name} {degrees}: give at most {ANGLE_DECIMALS} decimals")
