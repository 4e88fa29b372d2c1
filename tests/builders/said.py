"""What warnings say."""

from collections.abc import Iterable

from common.errors import Warning


def texts(warnings: Iterable[Warning]) -> list[str]:
    """Return the texts of warnings, in their order."""
    return [warning.text for warning in warnings]
