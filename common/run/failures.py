"""The list of failed studies beside an output, ``OUTPUT_failed.csv``."""

import csv
import logging
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from common.errors import StageError
from common.run import output as outputs
from common.run.atomic import temporary_beside
from common.run.console import PROGRESS

logger = logging.getLogger("tumorvolume")


@dataclass(frozen=True)
class Failure:
    """A study that failed, at which stage, and why."""

    hash: str
    stage: str
    reason: str


_COLUMNS = tuple(each.name for each in fields(Failure))


def failures_file(output: Path) -> Path:
    """Return where failed studies are listed."""
    return output.with_name(f"{output.stem}_failed.csv")


def list_failures(output: Path, failures: Iterable[Failure]) -> None:
    """Write the list beside an output; where no study failed, there is none."""
    path, rows = failures_file(output), list(map(astuple, failures))
    if not rows:
        for stale in (path, temporary_beside(path)):
            stale.unlink(missing_ok=True)
        return
    outputs.write_table(path, _COLUMNS, rows)
    logger.log(PROGRESS, "failed studies are listed in %s", path)


def join_failures(paths: Iterable[Path]) -> list[Failure]:
    """Return what lists tell, in the order of hashes; raises as `_read_failures`."""
    failures = (failure for path in paths for failure in _read_failures(path))
    return sorted(failures, key=lambda failure: failure.hash)


def _read_failures(path: Path) -> list[Failure]:
    """Return what a list tells.

    Raises
    ------
    StageError
        It can't be read, or is no such list.
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            heading, *rows = csv.reader(stream, strict=True)
            if tuple(heading) != _COLUMNS:
                raise ValueError("another heading")
            return [Failure(*row) for row in rows]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise StageError(
            f"{path}: is no list of failed studies, as scripts write beside their output: give "
            "X_failed.csv of X.h5"
        ) from error
