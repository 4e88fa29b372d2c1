"""Folds parted as they are asked for, and the lists of their keys for training."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from common import nnunet, splits
from common.errors import StageError
from common.run.console import PROGRESS
from common.run.output import make_folder, write_beside
from common.splits import Fold, Sample

logger = logging.getLogger("tumorvolume")

_LIST = re.compile(r"fold(\d+)_(train|val)\.txt", re.ASCII)


def plan_folds(
    samples: Sequence[Sample],
    n_folds: int | None,
    by_project: bool,
    patient_characters: int | None = None,
) -> list[Fold]:
    """Return folds of whole patients and images, and say what they keep together.

    Parameters
    ----------
    samples : sequence of Sample
    n_folds : int, optional
        None: as many as there are projects, or as nnU-Net trains.
    by_project : bool
        Whether each fold validates with one project.
    patient_characters : int, optional
        See `splits.patient_characters`.

    Raises
    ------
    StageError
        The patients, or the projects, can't be parted so.
    """
    n_characters = splits.patient_characters(samples, patient_characters)
    for studies in splits.equal_images(samples):
        logger.warning(
            "%s: hold the same image, and are never in training and validation at once",
            ", ".join(studies),
        )
    groups = splits.inseparable(samples, n_characters)
    if by_project:
        return _project_folds(groups, n_folds)
    n_folds = n_folds or min(nnunet.N_FOLDS, len(groups))
    if n_folds == 1:
        logger.warning("one patient alone makes no folds: nnU-Net will part its studies")
        return []
    return splits.balanced_folds(groups, n_folds)


def _project_folds(groups: Sequence[Sequence[Sample]], n_folds: int | None) -> list[Fold]:
    folds = splits.project_folds(groups)
    if n_folds not in (None, len(folds)):
        raise StageError(
            f"--leave-out project makes {len(folds)} folds, one a project, not {n_folds}: "
            "leave out --splits"
        )
    n_samples = sum(map(len, groups))
    for number, (project, fold) in enumerate(folds.items(), start=1):
        n_apart = n_samples - len(fold.train) - len(fold.validation)
        logger.log(PROGRESS, "fold %d validates with project %s", number, project)
        if n_apart:
            logger.warning(
                "fold %d does not train on %d images of other projects: their patients, or equal "
                "images, are in the project that it validates with",
                number,
                n_apart,
            )
    return list(folds.values())


def write_fold_lists(folder: Path, folds: Sequence[Fold]) -> None:
    """Write fold<i>_train.txt and fold<i>_val.txt, a key a line, and nnU-Net's list of them."""
    make_folder(folder)
    for number, fold in enumerate(folds, start=1):
        for name, keys in (("train", fold.train), ("val", fold.validation)):
            text = "".join(f"{key}\n" for key in keys)
            write_beside(folder / f"fold{number}_{name}.txt", text)
    write_beside(folder / "splits_final.json", nnunet.splits_json(folds))
    logger.info("%d folds of whole patients in %s", len(folds), folder)
    for path in sorted(folder.iterdir()):
        # Of an earlier run with more folds, in which patients are spread differently.
        found = _LIST.fullmatch(path.name)
        if found and int(found[1]) > len(folds):
            path.unlink()
