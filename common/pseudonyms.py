"""The pseudonyms of a raw project's studies: one each, or the run stops."""

import unicodedata
from pathlib import Path
from typing import NoReturn

from common.errors import StageError
from common.hashing import pseudonym
from common.raw_project import StudyFolder, list_studies


def studies_by_hash(
    project: Path, key: bytes | None, lengths: tuple[int, int]
) -> dict[str, StudyFolder]:
    """Return the study folders of a raw project by their pseudonyms, ordered by name.

    Parameters
    ----------
    project : Path
    key, lengths
        As `hashing.pseudonym` takes them.

    Raises
    ------
    StageError
        No studies, or one pseudonym for two studies, or for two patients in its first part; the
        message names the option that helps.
    """
    folders: dict[str, StudyFolder] = {}
    patients: dict[str, str] = {}
    n_patient, n_study = lengths
    for folder in list_studies(project):
        study_hash = pseudonym(folder.patient, folder.study, key, (n_patient, n_study))
        namesake = patients.setdefault(study_hash[:n_patient], folder.patient)
        if namesake != folder.patient:
            _refuse_collision("patients", namesake, folder.patient, (n_patient + 5, n_study))
        if study_hash in folders:
            namesake = folders[study_hash].study
            _refuse_collision("studies", namesake, folder.study, (n_patient, n_study + 5))
        folders[study_hash] = folder
    return folders


def _refuse_collision(what: str, one: str, other: str, longer: tuple[int, int]) -> NoReturn:
    if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
        raise StageError(
            f"two {what} have folders of the same name, but for the Unicode spelling of its "
            "accents: rename one, or put both into one folder"
        )
    raise StageError(
        f"two {what} share a pseudonym: lengthen it with --hash-length {longer[0]} {longer[1]}"
    )
