"""Training and validation folds of whole patients. Pure."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from common.errors import StageError
from common.hashing import fingerprint


def patient_folds(
    keys: Sequence[str], projects: Mapping[str, str], n_folds: int, patient_characters: int
) -> list[list[str]]:
    """Part keys into folds of about equal size, in total and within each project.

    Parameters
    ----------
    keys : sequence of str
        A study's hash, or, of a 2D file, hash and angle.
    projects : dict of key to project
    n_folds : int
    patient_characters : int
        Leading characters of a key that tell the patient; a patient is in one fold.

    Returns
    -------
    list of n_folds lists of keys, each sorted
        The same for the same keys, whatever their order.

    Raises
    ------
    StageError
        Fewer patients than folds.
    """
    by_patient: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        by_patient[key[:patient_characters]].append(key)
    if len(by_patient) < n_folds:
        raise StageError(f"{len(by_patient)} patients can't fill {n_folds} folds: ask for fewer")
    # Large patients first, so that small ones even out what those leave uneven.
    order = sorted(
        by_patient, key=lambda patient: (-len(by_patient[patient]), fingerprint(patient))
    )
    folds: list[list[str]] = [[] for _ in range(n_folds)]
    of_project: list[Counter[str]] = [Counter() for _ in range(n_folds)]
    for patient in order:
        mine = Counter(projects.get(key, "") for key in by_patient[patient])
        main_project = min(mine, key=lambda project: (-mine[project], project))
        chosen = min(
            range(n_folds),
            key=lambda fold: (of_project[fold][main_project], len(folds[fold]), fold),
        )
        folds[chosen] += by_patient[patient]
        of_project[chosen] += mine
    return [sorted(fold) for fold in folds]
