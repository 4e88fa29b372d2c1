"""The pseudonyms of a raw project's studies, one each or the run stops, and their secret key."""

import argparse
import os
import secrets
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

from common.errors import StageError
from common.hashing import SHORTEST_KEY, pseudonym
from common.raw import mapping
from common.raw.layouts import find_studies
from common.raw.project import StudyFolder

# --- pseudonyms ------------------------------------------------------------------------------


def studies_by_hash(
    project: Path, key: bytes | None, lengths: tuple[int, int], patient: str | None = None
) -> dict[str, StudyFolder]:
    """Return the study folders of a raw project by their pseudonyms, ordered by name.

    Parameters
    ----------
    project : Path
    key, lengths
        As `hashing.pseudonym` takes them.
    patient : str, optional
        Regular expression that finds the patient in a study's name.

    Raises
    ------
    StageError
        No studies, or one pseudonym for two studies, or for two patients in its first part; the
        message names the option that helps.
    """
    folders: dict[str, StudyFolder] = {}
    patients: dict[str, str] = {}
    n_patient, n_study = lengths
    for folder in find_studies(project, patient):
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


# --- key file --------------------------------------------------------------------------------

LONGEST_KEY = 1 << 16
"""What a key file may hold [bytes]; a device would have no end."""


class NewKey(argparse.Action):
    """Writes a new secret key that its owner alone may read, and exits."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Write the key; an existing file is never overwritten."""
        try:
            mapping.create_private(Path(values), secrets.token_bytes(32))
        except OSError as error:
            parser.error(f"key file {values} cannot be made: {error.strerror}")
        parser.exit(0, f"{values}: a new key; keep it safe and secret, outputs depend on it\n")


def read_key(parser: argparse.ArgumentParser, path: Path) -> bytes:
    """Return the key, refusing one that is short or that others may read."""
    try:
        with open(path, "rb") as stream:
            key = stream.read(LONGEST_KEY + 1)
            mode = os.fstat(stream.fileno()).st_mode
    except OSError as error:
        parser.error(f"key file {path} cannot be read: {error.strerror}")
    if len(key) > LONGEST_KEY:
        parser.error(f"key file {path} has more than {LONGEST_KEY} bytes: is it another file?")
    if len(key) < SHORTEST_KEY:
        parser.error(
            f"key file {path} has {len(key)} bytes, at least {SHORTEST_KEY} are needed: "
            "make one with --new-key FILE"
        )
    if mode & 0o077:
        parser.error(f"key file {path} can be read by others: chmod 600 {path}")
    return key
