"""What may play a role in a study: its files and series, by kind, by name, by the user's patterns.

Of a NIfTI file the words in its path below the study tell the role; of DICOM the Modality does.
"""

import fnmatch
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from common.dicom import DicomFile, Series
from common.dicom_values import joined_text

ROLE_NAMES = {"ct": "CT", "pet": "PET", "mask": "mask", "header": "DICOM header"}

MASK_WORDS = frozenset({"mask", "seg", "label", "roi", "gtv"})
PET_WORDS = frozenset({"pet", "pt", "suv"})
CT_WORDS = frozenset({"ct", "gk"})
"""Words in a NIfTI file's path that tell its role."""


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file: its path and its path below the study (private)."""

    path: str
    name: str


Candidate = NiftiFile | Series | DicomFile


def modality_of(file: DicomFile) -> str:
    """Return the Modality."""
    return file.modality


def kind(candidate: Candidate) -> str:
    """Return what a candidate is, and of how many slices; no identity."""
    if isinstance(candidate, NiftiFile):
        return "NIfTI file"
    if isinstance(candidate, Series):
        return f"DICOM series of {candidate.n_images}"
    return f"DICOM {modality_of(candidate)}"


# --- patterns --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patterns:
    """The user's globs by role: on the path below the study, or on the SeriesDescription."""

    by_role: Mapping[str, str] = field(default_factory=dict)

    def match(self, role: str, candidate: Candidate) -> bool:
        """Tell whether a candidate fits the role's pattern; without one all do."""
        return role not in self.by_role or self.name(role, candidate)

    def name(self, role: str, candidate: Candidate) -> bool:
        """Tell whether the role has a pattern, and it fits the candidate."""
        pattern = self.by_role.get(role)
        return pattern is not None and any(_fits(label, pattern) for label in labels(candidate))

    def name_any(self, candidate: Candidate) -> bool:
        """Tell whether a pattern of any role fits the candidate."""
        return any(self.name(role, candidate) for role in self.by_role)


def _fits(label: str, pattern: str) -> bool:
    """Match a glob, one that names a folder with all that lies below it."""
    label, pattern = (unicodedata.normalize("NFC", each) for each in (label, pattern))
    return any(fnmatch.fnmatchcase(label, p) for p in (pattern, pattern.rstrip("/") + "/*"))


def labels(candidate: Candidate) -> list[str]:
    """Return what a pattern may match: a description, and paths below the study."""
    if isinstance(candidate, NiftiFile):
        return [candidate.name]
    files = candidate.files if isinstance(candidate, Series) else (candidate,)
    return [joined_text(files[0].header, "SeriesDescription"), *(file.name for file in files)]


# --- words -----------------------------------------------------------------------------------


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
    return frozenset()


def words(name: str) -> list[str]:
    """Return the words of a name, in lower case."""
    return re.findall(r"[^\W_]+", name.lower())
