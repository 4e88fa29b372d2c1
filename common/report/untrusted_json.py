"""What the attributes of an image tell, read without trust in whoever made the file."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_object(value: Any) -> Mapping[str, Any]:
    """Return a JSON object; empty where there is none."""
    found = _parsed(value)
    return found if isinstance(found, dict) else {}


def json_array(value: Any) -> list[Any]:
    """Return a JSON array; empty where there is none."""
    found = _parsed(value)
    return found if isinstance(found, list) else []


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
