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
    found : str
        Names and descriptions of the files and series in question.
    input, output : str
        Digests by which a later run sees that the study is unchanged.
    """

    project: str
    patient: str
    study: str
    hash: str
    status: str
    reason: str
    found: str = ""
    input: str = ""
    output: str = ""


COLUMNS = tuple(field.name for field in fields(Row))
_FIRST_COLUMNS = ",".join(COLUMNS[:6])
"""How every mapping begins, whatever columns of its own a version adds."""


def read(path: Path) -> list[Row]:
    """Return the rows of a mapping; none where it is absent, empty, damaged or of other columns.

    Raises
    ------
    StageError
        It may not be read, or is something else, which must not be replaced.
    """
    try:
        content = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StageError(
            f"{path}: the mapping cannot be read ({error.strerror}): check it and its permissions"
        ) from error
    if content and not content.startswith(_FIRST_COLUMNS):
        raise StageError(
            f"{path}: is no mapping of this program, or was saved by another one: move it away, "
            "or name another file by --mapping"
        )
    table = csv.DictReader(io.StringIO(content, newline=""))
    try:
        if tuple(table.fieldnames or ()) != COLUMNS:
            return []
        return [Row(**row) for row in table if None not in row and None not in row.values()]
    except csv.Error:
        return []


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the mapping; the file is private from its first byte.

    Where nothing changed, nothing is written.

    Raises
    ------
    StageError
        It cannot be written.
    """
    text = io.StringIO(newline="")
    # With the line ends of RFC 4180 csv quotes both of their characters, which names may have.
    table = csv.DictWriter(text, COLUMNS, lineterminator="\r\n")
    table.writeheader()
    table.writerows(asdict(row) for row in rows)
    content = text.getvalue().encode("utf-8", "surrogateescape")
    # A link to a safer disk stays, and nothing is written on this side of it.
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if path.exists() and path.read_bytes() == content:
            path.chmod(0o600)
            return
        temporary.unlink(missing_ok=True)
        create_private(temporary, content)
        temporary.replace(path)
    except OSError as error:
        raise StageError(
            f"{path}: the mapping cannot be written ({error.strerror}): check the folder, or name "
            "another file by --mapping"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def create_private(path: Path, content: bytes) -> None:
    """Write a new file with mode 0600 from its first byte; an existing one is an OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
