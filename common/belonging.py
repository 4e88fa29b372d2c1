"""Whether the files and images of a study belong together: one patient, one space, one place."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from common.candidates import ROLE_NAMES, Candidate, NiftiFile, modality_of, words
from common.dicom import DicomFile, Series
from common.dicom_masks import (
    contoured_images,
    frame_of_reference,
    referenced_images,
    referenced_series,
)
from common.dicom_values import joined_text, tag_of
from common.errors import StudyError
from common.image import Image
from common.roles import Roles

_OTHER_PATIENT = "give each patient a study folder, or --trust-geometry if it is one patient"
_REMEDIES = {
    "PatientID": _OTHER_PATIENT,
    "PatientBirthDate": _OTHER_PATIENT,
    "PatientName": _OTHER_PATIENT,
    "FrameOfReferenceUID": "register them, or give --trust-geometry if they lie in one space",
    "SeriesInstanceUID": "give a header of this PET, or none, as the series has its own",
}
"""What to do where an attribute differs that has to be the same."""


def check_identity(roles: Roles, *, trusted: bool) -> list[str]:
    """Refuse DICOM files of several patients, frames of reference or PET series.

    Where the user trusts them, what differs is returned as warnings. So are names that differ
    between files whose PatientID agrees: names have many spellings.
    """
    files = {
        ROLE_NAMES[role]: found
        for role in ROLE_NAMES
        if (found := _dicom_files(getattr(roles, role)))
    }
    stated = {
        keyword: {name: _values(each, keyword) for name, each in files.items()}
        for keyword in ("PatientID", "PatientBirthDate", "FrameOfReferenceUID")
    }
    if isinstance(roles.pet, Series):
        stated["SeriesInstanceUID"] = {
            name: _values(files[name], "SeriesInstanceUID")
            for name in (ROLE_NAMES["pet"], ROLE_NAMES["header"])
            if name in files
        }
    is_known = all(stated["PatientID"].values())
    stated["PatientName"] = {name: _values(each, "PatientName") for name, each in files.items()}
    warnings = []
    for keyword, by_name in stated.items():
        for who in _who_differ(by_name):
            trouble = f"{who} do not belong together ({tag_of(keyword)} differs)"
            if trusted:
                warnings.append(f"{trouble}: trusted")
            elif keyword == "PatientName" and is_known:
                warnings.append(
                    f"{who} differ in {tag_of(keyword)}, but not in {tag_of('PatientID')}"
                )
            else:
                raise StudyError(f"{trouble}: {_REMEDIES[keyword]}")
    return warnings


def _dicom_files(source: Candidate | None) -> Sequence[DicomFile]:
    if isinstance(source, Series):
        return source.files
    return [source] if isinstance(source, DicomFile) else []


def _values(files: Sequence[DicomFile], keyword: str) -> frozenset[str]:
    """Return what headers say, leaving out those that say nothing."""
    if keyword == "FrameOfReferenceUID":
        found = {frame_of_reference(each.header) or "" for each in files}
    elif keyword == "PatientName":
        found = {_bare_name(joined_text(each.header, keyword)) for each in files}
    else:
        found = {joined_text(each.header, keyword) for each in files}
    return frozenset(found - {""})


def _bare_name(name: str) -> str:
    """Return the words of family and given name, which scanners and readers write differently."""
    alphabetic, _, _ = name.partition("=")
    family_and_given = " ".join((alphabetic or name).split("^")[:2])
    return " ".join(sorted(words(unicodedata.normalize("NFC", family_and_given))))


def _who_differ(by_name: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """Yield the roles whose files differ among themselves, or who else differs from whom."""
    mixed = [name for name, values in by_name.items() if len(values) > 1]
    yield from (f"the files of the {name}" for name in mixed)
    by_value: dict[str, list[str]] = {}
    for name, values in by_name.items():
        for value in values if name not in mixed else ():
            by_value.setdefault(value, []).append(name)
    if len(by_value) > 1:
        yield " versus ".join(" and ".join(names) for names in by_value.values())


def role_drawn_on(roles: Roles) -> str | None:
    """Return the role, "ct" or "pet", of the series that an RTSTRUCT was drawn on.

    None where the mask is no RTSTRUCT.

    Raises
    ------
    StudyError
        It was drawn on another series, or on both.
    """
    if isinstance(roles.mask, NiftiFile) or modality_of(roles.mask) != "RTSTRUCT":
        return None
    role_of = {
        joined_text(file.header, keyword): role
        for role, source in (("ct", roles.ct), ("pet", roles.pet), ("pet", roles.header))
        if isinstance(source, Series)
        for file in source.files
        for keyword in ("SeriesInstanceUID", "SOPInstanceUID")
    }
    drawn_on: set[str] = set()
    references = [
        f(roles.mask.header) for f in (referenced_series, contoured_images, referenced_images)
    ]
    for uids in references:
        named = {role_of[uid] for uid in uids if uid in role_of}
        if len(named) == 1:
            return named.pop()
        drawn_on |= named
    if not any(references):
        raise StudyError(
            "the RTSTRUCT does not say which series it was drawn on "
            f"({tag_of('RTReferencedSeriesSequence')}): export it with its references, or convert "
            "the mask to NIfTI"
        )
    if drawn_on:
        raise StudyError(
            "the RTSTRUCT was drawn on both the CT and the PET of the study "
            f"({tag_of('RTReferencedSeriesSequence')}): export it for one, or convert the mask to "
            "NIfTI"
        )
    raise StudyError(
        "the RTSTRUCT was drawn on a series that is neither the CT nor the PET of the study "
        f"({tag_of('RTReferencedSeriesSequence')}): add that series or choose it with --ct or "
        "--pet, or convert the mask to NIfTI"
    )


def check_overlap(ct: Image, pet: Image) -> None:
    """Refuse a CT and a PET whose boxes do not overlap in space."""
    if _are_apart(ct, pet) or _are_apart(pet, ct):
        raise StudyError(
            "the PET and the CT do not overlap in space: check that they are of one examination"
        )


def _are_apart(one: Image, other: Image) -> bool:
    """Tell whether one image's box lies beside that of another along an axis of the first."""
    ends = [(-0.5, n - 0.5) for n in other.data.shape]
    corners = np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
    to_one = np.linalg.inv(one.affine) @ other.affine
    there = to_one[:3, :3] @ corners + to_one[:3, 3:]
    upper = np.array(one.data.shape) - 0.5
    return bool((there.max(axis=1) <= -0.5).any() or (there.min(axis=1) >= upper).any())


def check_mask(mask: Image, pet: Image, *, allow_empty: bool) -> tuple[str, ...]:
    """Refuse a mask without a label on the PET; warn of labels beside it."""
    n_labelled, n_on_pet = _count_labelled(mask, pet)
    if not n_labelled:
        if allow_empty:
            return ()
        raise StudyError(
            "the mask is empty: give a mask with labelled voxels, or --allow-empty-mask if the "
            "study is negative"
        )
    if not n_on_pet:
        raise StudyError(
            "the mask's labelled voxels and the PET do not overlap in space: check that they are "
            "of one examination"
        )
    if n_on_pet == n_labelled:
        return ()
    beside_ml = (n_labelled - n_on_pet) * abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    return (f"{beside_ml:.3g} ml of the mask lie outside the PET",)


def _count_labelled(mask: Image, pet: Image) -> tuple[int, int]:
    """Return the number of labelled voxels, and of those whose centre lies in the PET's box."""
    to_pet = np.linalg.inv(pet.affine) @ mask.affine
    upper = np.array(pet.data.shape)[:, None] - 0.5
    n_labelled = n_on_pet = 0
    for k in range(mask.data.shape[2]):
        i, j = np.nonzero(mask.data[:, :, k])
        places = to_pet[:3, :2] @ (i, j) + (to_pet[:3, 2] * k + to_pet[:3, 3])[:, None]
        n_labelled += len(i)
        n_on_pet += int(((places >= -0.5) & (places <= upper)).all(axis=0).sum())
    return n_labelled, n_on_pet
