"""Which studies to take: a list of keys, or the ratings that a quality page saves. Pure."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from common.errors import StageError
from common.hashing import can_name_study

VERDICTS = ("accept", "doubt", "reject", "")
"""What a study can be rated; empty where there is only a note on it."""

_LONGEST_KEY = 120
"""Characters: a hash, or hash and angle."""


@dataclass(frozen=True)
class Choice:
    """What a list takes of the studies that are there.

    Attributes
    ----------
    keys : set of str
        Of the studies that it takes.
    unknown : sequence of str
        What it lists though it is not there.
    n_left_out, n_studies : int
        Studies that are there: those that it does not take, and all.
    """

    keys: Set[str]
    unknown: Sequence[str]
    n_left_out: int
    n_studies: int


def choose(content: bytes, studies: Mapping[str, str]) -> Choice:
    """Return what a list takes of the keys that are there, each with the hash of its study.

    Raises
    ------
    StageError
        As `_listed_keys`; not UTF-8; none of what it lists is there.
    """
    try:
        listed = set(_listed_keys(content.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        raise StageError("is no text in UTF-8: give a list of hashes") from error
    # A hash in a list stands for all projections of its study.
    keys = {key for key, study in studies.items() if key in listed or study in listed}
    if not keys:
        raise StageError("none of its studies is in the input files: give their own list")
    there, taken = set(studies.values()), {studies[key] for key in keys}
    unknown = sorted(listed - studies.keys() - there)
    return Choice(keys, unknown, len(there) - len(taken), len(there))


def _listed_keys(text: str) -> list[str]:
    """Return the keys of a list, sorted; of ratings those that they accept.

    Parameters
    ----------
    text : str
        A key a line, blank lines between them or not; or
        ``{"ratings": {KEY: {"verdict": "accept", ...}, ...}}``.

    Raises
    ------
    StageError
        Neither; something that can't be a key; a verdict that is not known; or no key at all.
    """
    is_json = text.lstrip().startswith("{")
    keys = _accepted(text) if is_json else [line.strip(" \t\r") for line in text.split("\n")]
    found = sorted({key for key in keys if key})
    for key in found:
        _check(key)
    if not found:
        raise StageError("accepts no study" if is_json else "names no study")
    return found


def _accepted(text: str) -> list[str]:
    try:
        ratings = json.loads(text, object_pairs_hook=_without_twins)["ratings"]
        verdicts = {key: rating["verdict"] for key, rating in ratings.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StageError(
            "is damaged, or not what the page saves: save the ratings once more"
        ) from error
    for key, verdict in verdicts.items():
        _check(key)
        if verdict not in VERDICTS:
            raise StageError(f"rates {key} {verdict!r:.40}: give accept, doubt or reject")
    return [key for key, verdict in verdicts.items() if verdict == "accept"]


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice in one object")
    return found


def _check(key: str) -> None:
    if not can_name_study(key, _LONGEST_KEY):
        raise StageError(f"{key!r:.40} can't be a study: give hashes, one a line")
