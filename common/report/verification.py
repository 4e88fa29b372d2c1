"""Files held against their own checksums and attributes by worker processes, told line by line."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import StageError, StudyError, counted
from common.hdf5.studies import Content, content_of, study_of
from common.hdf5.verify import faults_of, keys_to_check, read_indices
from common.run.cli import of_shard
from common.run.engine import Engine, run_studies
from common.run.pool import in_own_process
from common.run.worker import Job, Outcome

logger = logging.getLogger("tumorvolume")

_MOST_TOLD = 10
"""Faults of a dataset that are told: every row of a stack may have some."""


@dataclass(frozen=True)
class _Stored:
    """An image and its masks, or a stack, in a file that was made with `parameters`."""

    path: Path
    key: str
    parameters: Mapping[str, Any]


def verify_files(paths: Sequence[Path], shard: tuple[int, int], engine: Engine) -> list[Outcome]:
    """Check every dataset of every file, of a shard's studies, and go on after a damaged one.

    Returns
    -------
    list of Outcome
        Of each dataset, an image and its masks; those that are not sound have failed.

    Raises
    ------
    StageError
        Files can't be read, which is said of each.
    """
    jobs, readable = [], []
    for path in paths:
        try:
            keys, parameters = in_own_process(keys_to_check, path)
        except StageError as error:
            logger.error("%s", error)
            continue
        readable.append(path)
        mine = of_shard((study_of(key, parameters) for key in keys), shard)
        is_stack = content_of(parameters) is Content.STACK
        jobs += [
            Job(path.name if is_stack else key, "", _Stored(path, key, parameters))
            for key in keys
            if study_of(key, parameters) in mine
        ]
    outcomes = run_studies(_verify, jobs, engine, _report)
    if not any(outcome.status == "failed" for outcome in outcomes):
        readable = [path for path in readable if _has_sound_indices(path)]
    n_unreadable = len(paths) - len(readable)
    if n_unreadable:
        raise StageError(f"{n_unreadable} of {len(paths)} files cannot be read: see above")
    return outcomes


def _verify(job: Job) -> None:
    stored: _Stored = job.work
    try:
        faults = faults_of(stored.path, stored.key, stored.parameters)
    except StageError as error:
        raise StudyError(str(error)) from error
    if faults:
        told, n_more = "; ".join(faults[:_MOST_TOLD]), len(faults) - _MOST_TOLD
        more = f"; {n_more} more" if n_more > 0 else ""
        raise StudyError(f"{told}{more} in {stored.path}: make that file again")


def _has_sound_indices(path: Path) -> bool:
    try:
        in_own_process(read_indices, path)
    except StageError as error:
        logger.error("%s", error)
        return False
    return True


def _report(outcome: Outcome) -> None:
    if outcome.status == "failed":
        logger.error("%s: %s", outcome.hash, outcome.reason)
    else:
        logger.info("%s: sound", outcome.hash)


def verified_line(outcomes: Sequence[Outcome]) -> str:
    """Return ``12 datasets: 11 sound, 1 failed``; a dataset has an image and its masks."""
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    checked = counted(len(outcomes), "dataset", "datasets")
    return f"{checked}: {len(outcomes) - failed} sound, {failed} failed"
