"""Private attributes in which vendors state what decides the SUV.

Pure: where they stand, and what messages call them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateTag:
    """A private attribute: group, number within its block, the block's creator, and its name."""

    group: int
    element: int
    creator: str
    name: str

    def __str__(self) -> str:
        """Return ``name (gggg,10ee)``, as it stands in the first block."""
        return f"{self.name} ({self.group:04X},{0x1000 | self.element:04X})"


STATED_REFERENCE = {
    "GE": PrivateTag(0x0009, 0x0D, "GEMS_PETD_01", "decay reference"),
    "SIEMENS": PrivateTag(0x0071, 0x22, "SIEMENS MED PT", "decay reference"),
}
"""The moment that values refer to, by vendor."""

PHILIPS_SUV_FACTOR = PrivateTag(0x7053, 0x00, "Philips PET Private Group", "SUV scale factor")
PHILIPS_ACTIVITY_FACTOR = PrivateTag(
    0x7053, 0x09, "Philips PET Private Group", "activity concentration scale factor"
)
