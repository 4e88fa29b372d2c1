"""Roles in a study, and the words in a file's path that tell them."""

import re
from pathlib import PurePath

ROLE_NAMES = {"ct": "CT", "pet": "PET", "mask": "mask", "header": "DICOM header"}

MASK_WORDS = frozenset(
    {"mask", "seg", "label", "roi", "gtv", "tumor", "tumour", "lesion", "lesions", "gt", "dseg"}
)
PET_WORDS = frozenset({"pet", "pt", "suv", "suvbw"})
TRACER_WORDS = frozenset({"fdg"})
CT_WORDS = frozenset({"ct", "gk", "lowdose"})
"""Words in a NIfTI file's path that tell its role; that of a tracer only where no other does."""

WORDS = {
    "CT": sorted(CT_WORDS),
    "PET": [*sorted(PET_WORDS), *sorted(TRACER_WORDS)],
    "mask": sorted(MASK_WORDS),
}


def roles_by_words(name: str) -> frozenset[str]:
    """Return the roles that the words in a NIfTI file's path tell, those of its last part first.

    A mask is named after the image it was drawn on, so in one part a mask's words go first.
    "PET/CT" names the examination; a part with words of PET and of CT besides may be either.
    """
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    for part in reversed(PurePath(stem).parts):
        found = set(re.sub(r"\bpe?t ct\b", "", " ".join(words(part))).split())
        if found & MASK_WORDS:
            return frozenset({"mask"})
        images = (("pet", PET_WORDS), ("ct", CT_WORDS))
        if roles := frozenset(role for role, of_role in images if found & of_role):
            return roles
        if found & TRACER_WORDS:
            return frozenset({"pet"})
    return frozenset()


def words(name: str) -> list[str]:
    """Return the words of a name, in lower case."""
    return re.findall(r"[^\W_]+", name.lower())
