"""Whether the files of a study belong together: one patient, one space, a mask of this image."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from common.dicom.attributes import joined_text, tag_of
from common.dicom.files import DicomFile, Series
from common.dicom.masks import (
    contoured_images,
    listed,
    matching,
    referenced_images,
    referenced_series,
    region_frames,
    series_of_frames,
)
from common.dicom.rtstruct import region_names
from common.errors import Kind, StudyError, Warning
from common.raw.candidates import Candidate
from common.raw.roles import Roles
from common.raw.words import ROLE_NAMES, words

_OTHER_PATIENT = "give each patient a study folder, or --trust-geometry if it is one patient"
_REMEDIES = {
    "PatientID": _OTHER_PATIENT,
    "PatientBirthDate": _OTHER_PATIENT,
    "PatientName": _OTHER_PATIENT,
    "FrameOfReferenceUID": "register them, or give --trust-geometry if they lie in one space",
    "SeriesInstanceUID": "give a header of this PET, or none, as the series has its own",
}
"""What to do where an attribute differs that has to be the same."""


def check_identity(roles: Roles, *, trusted: bool) -> list[Warning]:
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
                warnings.append(Warning(Kind.TRUSTED, f"{trouble}: trusted"))
            elif keyword == "PatientName" and is_known:
                warnings.append(
                    Warning(
                        Kind.TRUSTED,
                        f"{who} differ in {tag_of(keyword)}, but not in {tag_of('PatientID')}",
                    )
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
        # The regions of an RTSTRUCT name their own: see `check_frames`.
        images = (each for each in files if each.modality != "RTSTRUCT")
        found = {joined_text(each.header, keyword) for each in images}
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


class DrawnOn(NamedTuple):
    """The image on which an RTSTRUCT was drawn."""

    role: str
    """ "ct" or "pet"."""
    series_is_there: bool
    """Whether the RTSTRUCT names that very series, or `--mask-on` says so."""
    by_option: bool = False
    """Whether `--mask-on` alone says so."""


def find_drawn_on(roles: Roles, mask_on: str | None = None) -> DrawnOn | None:
    """Return the image that an RTSTRUCT was drawn on; `mask_on` where the RTSTRUCT can't tell.

    None where the mask is no RTSTRUCT.

    Raises
    ------
    StudyError
        It was drawn on another series, or on both, and `mask_on` does not say on which.
    """
    if not isinstance(roles.mask, DicomFile) or roles.mask.modality != "RTSTRUCT":
        return None
    role_of = _roles_by_uid(roles)
    drawn_on: set[str] = set()
    references = []
    for find_references in (referenced_series, contoured_images, referenced_images):
        uids = find_references(roles.mask.header)
        references.append(uids)
        named = {role_of[uid] for uid in uids if uid in role_of}
        if len(named) == 1:
            return DrawnOn(named.pop(), series_is_there=True)
        drawn_on |= named
    if mask_on is not None:
        return DrawnOn(mask_on, series_is_there=bool(drawn_on), by_option=True)
    keyword = tag_of("RTReferencedSeriesSequence")
    remedy = "say by --mask-on ct or --mask-on pet on which, or convert the mask to NIfTI"
    if not any(references):
        raise StudyError(
            f"the RTSTRUCT does not say which series it was drawn on ({keyword}): {remedy}"
        )
    if drawn_on:
        raise StudyError(
            f"the RTSTRUCT was drawn on both the CT and the PET of the study ({keyword}): {remedy}"
        )
    raise StudyError(
        "the RTSTRUCT was drawn on a series that is neither the CT nor the PET of the study "
        f"({keyword}): add that series or choose it with --ct or --pet; if only its UIDs were "
        f"changed, {remedy}"
    )


def _roles_by_uid(roles: Roles) -> dict[str, str]:
    """Return "ct" or "pet" by the UIDs of the series and of its images."""
    return {
        joined_text(file.header, keyword): role
        for role, source in (("ct", roles.ct), ("pet", roles.pet), ("pet", roles.header))
        if isinstance(source, Series)
        for file in source.files
        for keyword in ("SeriesInstanceUID", "SOPInstanceUID")
    }


def check_frames(
    roles: Roles, drawn_on: DrawnOn, roi: re.Pattern[str] | None, *, trusted: bool
) -> tuple[Warning, ...]:
    """Hold the frames of reference of an RTSTRUCT's regions against that of their image.

    Where the very series is there that the RTSTRUCT names, the regions lie in it, whatever frame
    they name; unless it is the frame of yet another series that the RTSTRUCT names, too.
    """
    assert isinstance(roles.mask, DicomFile)
    header = roles.mask.header
    sources = [roles.ct] if drawn_on.role == "ct" else [roles.pet, roles.header]
    images = [image for source in sources for image in _dicom_files(source)]
    here = {joined_text(image.header, "FrameOfReferenceUID") for image in images} - {""}
    frames = region_frames(header)
    chosen = matching(region_names(header), roi, "ROIName")
    others = [n for n in chosen if here and n in frames and frames[n] not in here]
    if not others:
        return ()
    role_of = _roles_by_uid(roles)
    elsewhere = {
        frame
        for frame, series in series_of_frames(header).items()
        if series and not any(uid in role_of for uid in series)
    }
    abroad = [n for n in others if drawn_on.series_is_there and frames[n] in elsewhere]
    trouble = (
        f"region {listed(abroad or others)} of the RTSTRUCT names another frame of reference "
        f"({tag_of('ReferencedFrameOfReferenceUID')}) than the {ROLE_NAMES[drawn_on.role]} has"
    )
    if trusted:
        return (Warning(Kind.TRUSTED, f"{trouble}: trusted"),)
    if drawn_on.series_is_there and not abroad:
        text = f"{trouble}: read all the same, as the series that it was drawn on is there"
        return (Warning(Kind.TRUSTED, text),)
    raise StudyError(
        f"{trouble}: leave it out with --roi, or give --trust-geometry if all lie in one space"
    )
