"""Training and validation folds: no patient and no image is ever on both sides. Pure."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import StageError
from common.hashing import DEFAULT_LENGTHS, fingerprint

_DEFAULT_HASH = re.compile(rf"[0-9a-f]{{{sum(DEFAULT_LENGTHS)}}}")


@dataclass(frozen=True)
class Sample:
    """What decides the side that an image is on.

    Attributes
    ----------
    key : str
        A study's hash, or, in a 2D file, hash and angle.
    study : str
        The hash of its study.
    project : str
    digest : str
        SHA-256 of its values.
    patient_characters : int, optional
        Leading characters of the hash that tell the patient, where the file says so.
    """

    key: str
    study: str
    project: str = ""
    digest: str = ""
    patient_characters: int | None = None


@dataclass(frozen=True)
class Fold:
    """Sorted keys to train on, and to validate with."""

    train: Sequence[str]
    validation: Sequence[str]


def patient_characters(samples: Iterable[Sample], asked: int | None = None) -> int:
    """Return how many leading characters of a hash tell the patient.

    Where files say different numbers it is the least: a patient in several files, whose hash is
    longer in one, stays whole.

    Parameters
    ----------
    samples : iterable of Sample
    asked : int, optional
        The number that the user gives.

    Raises
    ------
    StageError
        More are asked for than tell the patient, which would spread a patient over folds; or
        none, and neither do the files say nor do the hashes look like those of the default length.
    """
    told = {sample.study: sample.patient_characters for sample in samples}
    if asked is not None:
        for study, number in told.items():
            most = len(study) - 1 if number is None else number
            if asked > most:
                raise StageError(
                    f"--patient-characters {asked}: study {study} has at most {most} that tell the "
                    "patient, more would put one patient on both sides: give that number, or none "
                    "where the files hold it"
                )
        return asked
    silent = [study for study, number in told.items() if number is None]
    if not all(map(_DEFAULT_HASH.fullmatch, silent)) or _seem_shorter(silent):
        raise StageError(
            "how many characters of a hash tell the patient is not in every file, and the hashes "
            "are not those of the default --hash-length: say it with --patient-characters P"
        )
    numbers = {number for number in told.values() if number is not None}
    return min(numbers | ({DEFAULT_LENGTHS[0]} if silent else set()))


def _seem_shorter(studies: Sequence[str]) -> bool:
    """Whether hashes share beginnings shorter than a patient's more often than by chance.

    By Chebyshev's inequality chance does so for a given length once in a thousand projects.
    """
    patients = {study[: DEFAULT_LENGTHS[0]] for study in studies}
    n_pairs = math.comb(len(patients), 2)
    for length in range(1, DEFAULT_LENGTHS[0]):
        counts = Counter(patient[:length] for patient in patients).values()
        alike, expected = sum(math.comb(n, 2) for n in counts), n_pairs / 16**length
        if alike > expected and (alike - expected) ** 2 > 1000 * expected:
            return True
    return False


def equal_images(samples: Iterable[Sample]) -> list[list[str]]:
    """Return the studies, sorted, of each image that several studies hold."""
    holders: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.digest:
            holders[sample.digest].add(sample.study)
    found = {tuple(sorted(studies)) for studies in holders.values() if len(studies) > 1}
    return [list(studies) for studies in sorted(found)]


def inseparable(samples: Sequence[Sample], n_characters: int) -> list[list[Sample]]:
    """Group samples that must be on one side: of one patient, or with equal images.

    Parameters
    ----------
    samples : sequence of Sample
    n_characters : int
        Leading characters of a key that tell the patient.
    """
    leader = {sample.key[:n_characters]: sample.key[:n_characters] for sample in samples}

    def leader_of(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    for studies in equal_images(samples):
        first, *others = sorted({leader_of(study[:n_characters]) for study in studies})
        leader.update(dict.fromkeys(others, first))
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[leader_of(sample.key[:n_characters])].append(sample)
    # Large groups first, so that small ones even out what those leave uneven.
    order = sorted(groups, key=lambda name: (-len(groups[name]), fingerprint(name)))
    return [groups[name] for name in order]


def balanced_folds(groups: Sequence[Sequence[Sample]], n_folds: int) -> list[Fold]:
    """Part groups into folds of about equal size, in total and within each project.

    Parameters
    ----------
    groups : as `inseparable` returns them
    n_folds : int

    Returns
    -------
    list of n_folds Folds
        The same for the same samples, whatever their order.

    Raises
    ------
    StageError
        Fewer groups than folds.
    """
    if len(groups) < n_folds:
        raise StageError(f"{len(groups)} patients can't fill {n_folds} folds: ask for fewer")
    held_out: list[list[str]] = [[] for _ in range(n_folds)]
    of_project: list[Counter[str]] = [Counter() for _ in range(n_folds)]
    for group in groups:
        mine = Counter(sample.project for sample in group)
        main_project = min(mine, key=lambda project: (-mine[project], project))
        chosen = min(
            range(n_folds),
            key=lambda fold: (of_project[fold][main_project], len(held_out[fold]), fold),
        )
        held_out[chosen] += [sample.key for sample in group]
        of_project[chosen] += mine
    return [_fold(groups, set(keys)) for keys in held_out]


def project_folds(groups: Sequence[Sequence[Sample]]) -> dict[str, Fold]:
    """Return a fold a project that validates with all of it and trains on all others.

    Patients and images of the project that other projects hold too are not trained on.

    Raises
    ------
    StageError
        Fewer than two projects, or one that shares patients or images with all others.
    """
    of_project: dict[str, set[str]] = defaultdict(set)
    for group in groups:
        for sample in group:
            of_project[sample.project].add(sample.key)
    if len(of_project) < 2:
        raise StageError(
            "--leave-out project: the files hold one project alone: merge those of several, or ask "
            "for --splits K"
        )
    folds = {project: _fold(groups, keys) for project, keys in sorted(of_project.items())}
    for project, fold in folds.items():
        if not fold.train:
            raise StageError(
                f"--leave-out project: without {project!r} there is nothing to train on, as its "
                "patients or images are in all others: ask for --splits K"
            )
    return folds


def _fold(groups: Sequence[Sequence[Sample]], held_out: set[str]) -> Fold:
    train = [
        sample.key
        for group in groups
        if not any(sample.key in held_out for sample in group)
        for sample in group
    ]
    return Fold(sorted(train), sorted(held_out))
