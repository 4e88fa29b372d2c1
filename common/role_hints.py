"""What to say of the files of a study that fit no role, or of several that fit one."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from common.candidates import (
    CT_WORDS,
    MASK_WORDS,
    PET_WORDS,
    ROLE_NAMES,
    Candidate,
    NiftiFile,
    Patterns,
    kind,
    labels,
    modality_of,
    words,
)
from common.dicom import DicomFile, Series, group_series
from common.dicom_values import joined_text, tag_of
from common.study_files import StudyFiles

MOST_LISTED = 4
"""Candidates for one role that are listed one by one; of more, how many are of each kind."""


def is_header(file: DicomFile) -> bool:
    """Tell whether a file is called a header."""
    return "header" in words(file.name)


def passed_over(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Say that a whole DICOM PET series serves as the header of a NIfTI PET."""
    return tuple(
        f"the NIfTI file is taken as the PET and the {kind(each)} as its header: if the series is "
        "meant, choose it with --pet PATTERN"
        for each in candidates
        if isinstance(each, Series) and each.n_images > 1 and not all(map(is_header, each.files))
    )


def nameless_left_out(n_files: int) -> tuple[str, ...]:
    """Say that a complete study has more NIfTI files: one may be a second mask."""
    return (
        f"NIfTI files ({n_files}) have no word for a role in their path and are left out: if one "
        "is meant, choose it by pattern",
    )


def private_name(role: str, candidate: Candidate) -> str:
    """Return a candidate's description and path, for the private mapping alone."""
    return f"{ROLE_NAMES[role]}: {kind(candidate)}: {' | '.join(labels(candidate)[:2])}"


def several_candidates(role: str, candidates: Sequence[Candidate]) -> str:
    """Say that several candidates fit a role, and of what kinds they are."""
    kinds = [kind(each) for each in candidates]
    if len(kinds) > MOST_LISTED:
        kinds = [f"{n} x {each}" for each, n in Counter(kinds).items()]
    reason = (
        f"{len(candidates)} candidates for {ROLE_NAMES[role]} ({'; '.join(kinds)}): choose with "
        f"--{role} PATTERN"
    )
    if len(candidates) > MOST_LISTED and all(_is_one_slice(each) for each in candidates):
        reason += (
            f", or, if {tag_of('SeriesInstanceUID')} was changed slice by slice, export the "
            "series again"
        )
    return reason


def _is_one_slice(candidate: Candidate) -> bool:
    return isinstance(candidate, Series) and candidate.n_images == 1


def several_examinations(fitting: Mapping[str, Sequence[Candidate]]) -> Iterator[str]:
    """Say so where candidates are of several examinations."""
    examinations = {
        joined_text(
            (each.files[0] if isinstance(each, Series) else each).header, "StudyInstanceUID"
        )
        for candidates in fitting.values()
        for each in candidates
        if not isinstance(each, NiftiFile)
    }
    if len(examinations) > 1:
        yield (
            f"the files are of {len(examinations)} examinations ({tag_of('StudyInstanceUID')}): "
            "give each its own study folder"
        )


def hints_of_roles(
    fitting: Mapping[str, Sequence[Candidate]],
    files: StudyFiles,
    patterns: Patterns,
    n_nameless: int,
) -> Iterator[str]:
    """Yield why roles are missing, and what to do."""
    missing = [role for role, found in fitting.items() if not found]
    yield from (f"--{role} fits no candidate" for role in missing if role in patterns.by_role)
    for role, modality in (("ct", "CT"), ("pet", "PT")):
        n_files = sum(modality_of(file) == modality for file in files.dicom)
        if role in missing and n_files and not group_series(files.dicom, modality):
            yield (
                f"DICOM files ({n_files}) of {tag_of('Modality')} {modality} are localizers, "
                "screen saves, reformats or maps: export the original series"
            )
    if "header" in missing:
        yield "give one DICOM file of the PET, or --pet-units suv if its values are SUV"
    if n_nameless and missing and missing != ["header"]:
        yield (
            f"NIfTI files ({n_nameless}) have no word for a role in their path: choose with "
            f"--{missing[0]} PATTERN"
        )


def hints_of_folder(folder: str, files: StudyFiles) -> Iterator[str]:
    """Yield what a study's folder tells of why roles may be missing."""
    if files.other_formats:
        yield f"{', '.join(files.other_formats)} files are not read: convert or unpack them"
    named = frozenset(words(os.path.basename(folder)))
    if named and any(named <= of_role for of_role in (MASK_WORDS, PET_WORDS, CT_WORDS)):
        yield (
            "the study's folder is named like a role: move CT, PET and mask into one "
            "RAW_PROJECT/<patient>/<study>/"
        )
