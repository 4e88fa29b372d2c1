"""The private mapping from hash to patient: a CSV file that its owner alone may read."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from common.errors import StageError


@dataclass(frozen=True)
class Row:
    """One study.

    Attributes
    ----------
    project, patient, study : str
        Names of folders: these identify.
    hash, status, reason : str
        The pseudonym; "written", "skipped" or "failed"; why.
    input, output : str
        Digests by which a later run sees that the study is unchanged.
    """

    project: str
    patient: str
    study: str
    hash: str
    status: str
    reason: str
    input: str
    output: str


COLUMNS = tuple(field.name for field in fields(Row))


def read(path: Path) -> dict[str, Row]:
    """Return the rows of a mapping by hash; none where it is absent or of another form."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                return {}
            return {row["hash"]: Row(**row) for row in reader if None not in row.values()}
    except FileNotFoundError:
        return {}
    except (OSError, csv.Error, TypeError) as error:
        raise StageError(f"{path}: the mapping cannot be read: check it") from error


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the mapping; the file is private from its first byte. Nothing changed, nothing
    is written."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    content = text.getvalue().encode("utf-8", "surrogateescape")
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        create_private(temporary, content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def create_private(path: Path, content: bytes) -> None:
    """Write a new file with mode 0600 from its first byte; an existing one is an OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
