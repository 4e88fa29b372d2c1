"""What may play a role in a study, and the patterns by which the user names one.

A NIfTI file, several masks of one lesion each, a DICOM series, or a DICOM file.
"""

import fnmatch
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.dicom.attributes import joined_text
from common.dicom.files import DicomFile, Series
from common.dicom.pet import attenuation_corrected
from common.raw.words import ROLE_NAMES, roles_by_words


@dataclass(frozen=True)
class NiftiFile:
    """A NIfTI file: its path and its path below the study (private).

    `role_by_layout` is "ct", "pet" or "mask" where the layout tells it, else "".
    """

    path: str
    name: str
    role_by_layout: str = ""

    @property
    def possible_roles(self) -> frozenset[str]:
        """The roles that it may play, by the layout or by the words in its path."""
        by_layout = frozenset({self.role_by_layout} - {""})
        return by_layout or roles_by_words(self.name)


@dataclass(frozen=True)
class NiftiFiles:
    """The NIfTI masks that one pattern of the user names, in the order of their names."""

    files: tuple[NiftiFile, ...]


Candidate = NiftiFile | NiftiFiles | Series | DicomFile


def is_corrected(pet: Series) -> bool | None:
    """Tell whether a PET series is corrected for attenuation; None where it does not say."""
    states = {attenuation_corrected(file.header) for file in pet.files}
    return None if states == {None} else states == {True}


def describe(candidate: Candidate) -> str:
    """Return what a candidate is, and of how many slices; no identity."""
    if isinstance(candidate, NiftiFile):
        return "NIfTI file"
    if isinstance(candidate, NiftiFiles):
        return f"{len(candidate.files)} NIfTI files"
    if isinstance(candidate, Series):
        return f"DICOM series of {candidate.n_images}"
    return f"DICOM {candidate.modality}"


def describe_beside_others(candidate: Candidate) -> str:
    """Return what tells a candidate from others of its role; no identity."""
    if isinstance(candidate, Series) and candidate.modality == "PT":
        state = {True: "yes", False: "no", None: "unknown"}[is_corrected(candidate)]
        return f"{describe(candidate)}, ATTN {state}"
    return describe(candidate)


def private_name(role: str, candidate: Candidate) -> str:
    """Return a candidate's description and path, for the private mapping alone."""
    described = " | ".join(_names_of(candidate)[:2])
    return f"{ROLE_NAMES[role]}: {describe_beside_others(candidate)}: {described}"


# --- patterns --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patterns:
    """The user's globs by role: on the path below the study, or on the SeriesDescription."""

    by_role: Mapping[str, str] = field(default_factory=dict)

    def admit(self, role: str, candidate: Candidate) -> bool:
        """Tell whether a candidate fits the role's pattern; without one all do."""
        return role not in self.by_role or self.fit(role, candidate)

    def fit(self, role: str, candidate: Candidate) -> bool:
        """Tell whether the role has a pattern, and it fits the candidate."""
        pattern = self.by_role.get(role)
        return pattern is not None and any(_fits(name, pattern) for name in _names_of(candidate))

    def fit_any(self, candidate: Candidate) -> bool:
        """Tell whether a pattern of any role fits the candidate."""
        return any(self.fit(role, candidate) for role in self.by_role)


def _fits(name: str, pattern: str) -> bool:
    """Match a glob, one that names a folder with all that lies below it."""
    name, pattern = (unicodedata.normalize("NFC", each) for each in (name, pattern))
    return any(fnmatch.fnmatchcase(name, p) for p in (pattern, pattern.rstrip("/") + "/*"))


def _names_of(candidate: Candidate) -> list[str]:
    """Return what a pattern may match: a description, and paths below the study."""
    if isinstance(candidate, NiftiFile):
        return [candidate.name]
    if isinstance(candidate, NiftiFiles):
        return [file.name for file in candidate.files]
    files = candidate.files if isinstance(candidate, Series) else (candidate,)
    return [joined_text(files[0].header, "SeriesDescription"), *(file.name for file in files)]
