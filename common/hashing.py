"""Pseudonyms of patients and studies, and digests of content. Pure: no paths, no files."""

import hashlib
import hmac
import json
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHORTEST_KEY = 16
"""Least length of a pseudonymisation key [bytes]."""

DEFAULT_LENGTHS = (7, 3)
"""Hex digits that a pseudonym takes from the patient's and from the study's digest."""


def pseudonym(
    patient: str,
    study: str,
    key: bytes | None = None,
    lengths: tuple[int, int] = DEFAULT_LENGTHS,
) -> str:
    """Return the hash by which a study is known: patient digits, then study digits.

    Parameters
    ----------
    patient, study : str
        Directory names; spellings that differ only in Unicode composition are one name.
    key : bytes, optional
        With a key the digests are HMAC-SHA256, which can't be guessed from a list of names;
        without one they are plain SHA-256.
    lengths : (int, int)
        Leading hex digits of the patient's digest and trailing ones of the study's.
    """
    patient_digits, study_digits = lengths
    return _name_digest(patient, key)[:patient_digits] + _name_digest(study, key)[-study_digits:]


def as_hash_lengths(value: Any, study_hash: str) -> tuple[int, int] | None:
    """Return the lengths of a hash's parts as a file tells them; None where it does not.

    Parameters
    ----------
    value : any
        What stands in the file, which may be of another make.
    study_hash : str
    """
    if not isinstance(value, list | tuple) or not all(isinstance(n, int) for n in value):
        return None
    if len(value) != 2 or min(value) < 1 or sum(value) != len(study_hash):
        return None
    return value[0], value[1]


def _name_digest(name: str, key: bytes | None) -> str:
    text = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    if key is None:
        return hashlib.sha256(text).hexdigest()
    return hmac.new(key, text, hashlib.sha256).hexdigest()


def fingerprint(value: Any) -> str:
    """Return the SHA-256 hex digest of a JSON-serialisable value, whatever its key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def array_digest(array: NDArray[Any]) -> str:
    """Return the SHA-256 hex digest of an array's shape, type and values in C order."""
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{little_endian.dtype.str}{little_endian.shape}".encode())
    digest.update(little_endian.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# --- names of studies ------------------------------------------------------------------------

LONGEST_NAME = 100
"""Characters of a study's name."""


def can_name_study(text: str, longest: int = LONGEST_NAME) -> bool:
    """Tell whether a text can name a study in files, datasets, logs and spreadsheets.

    It is neither hidden nor a formula, has no control characters, and is not too long.
    """
    return 0 < len(text) <= longest and text.isprintable() and text[0] not in ".=+-@"
