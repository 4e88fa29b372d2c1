"""The private mapping from hash to patient: a CSV file that its owner alone may read.

It is the only way back to the patients, so nothing of it is ever lost: rows of other projects,
columns of other makes and notes stay, and a file that can't be understood is not replaced.
"""

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from common.errors import StageError
from common.run.atomic import sync


@dataclass(frozen=True)
class Taken:
    """What a study was read from, for the mapping alone: these names may identify.

    Attributes
    ----------
    ct, pet, mask : str
        Description and number of slices of a series, or the file below the study.
    regions : str
        Names of the regions or segments that are in the mask.
    """

    ct: str
    pet: str
    mask: str
    regions: str


@dataclass(frozen=True)
class Row:
    """One study.

    Attributes
    ----------
    project, patient, study : str
        Names of folders: these identify.
    hash, status, reason : str
        The pseudonym; "written", "skipped", "failed" or "gone"; why.
    ct, pet, mask, regions : str
        As in `Taken`.
    found : str
        Names and descriptions of the files and series in question.
    input, output, options : str
        Digests by which a later run sees that the study, and how it is made, are unchanged.
    further : dict
        Cells in columns of another make, by their headings.
    notes : tuple of str
        Cells beyond the last heading.
    """

    project: str
    patient: str
    study: str
    hash: str
    status: str
    reason: str
    ct: str = ""
    pet: str = ""
    mask: str = ""
    regions: str = ""
    found: str = ""
    input: str = ""
    output: str = ""
    options: str = ""
    further: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """What a study is known by: projects may hold the same folders."""
        return self.project, self.hash

    @property
    def taken(self) -> Taken:
        """What the study was read from."""
        return Taken(**{each.name: getattr(self, each.name) for each in fields(Taken)})


COLUMNS = tuple(each.name for each in fields(Row) if each.name not in ("further", "notes"))
N_PROMISED = 6
"""Columns that every mapping begins with, whatever else a version or a reader adds."""

LONGEST_CELL = 32_000
"""Characters of a cell; spreadsheets cut off those beyond 32,767."""

# A cell that a spreadsheet would take for a formula is written behind an apostrophe; a folder
# may be named so too, and gets one more. Signs before plain words and numbers do no harm.
_FORMULA = re.compile(r"'*(?:[=@\t\r]|[+-].*[^\w .-])", re.DOTALL)
_ESCAPED = re.compile(r"'+(?:[=@\t\r]|[+-].*[^\w .-])", re.DOTALL)


def shortened(text: str) -> str:
    """Return a text that fits into a cell."""
    if len(text) <= LONGEST_CELL:
        return text
    return f"{text[:LONGEST_CELL]} ... and {len(text) - LONGEST_CELL} characters more"


# --- reading ---------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Return the rows of a mapping; none where it is absent or empty.

    Columns are found by their headings: versions differ in those after the first six.

    Raises
    ------
    StageError
        It may not be read, or is something else or damaged, and must not be replaced.
    """
    try:
        content = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StageError(
            f"{path}: the mapping cannot be read ({error.strerror}): check it and its permissions"
        ) from error
    csv.field_size_limit(sys.maxsize)
    try:
        heading, *table = csv.reader(io.StringIO(content, newline=""), strict=True) or [[]]
    except ValueError:
        return []
    except csv.Error as error:
        raise StageError(
            f"{path}: the mapping is damaged ({error}): mend it, or move it away if it is of no use"
        ) from error
    while heading and not heading[-1]:
        heading.pop()
    _check_heading(path, heading)
    return [_row(heading, cells) for cells in table if any(cells)]


def _check_heading(path: Path, heading: Sequence[str]) -> None:
    if tuple(heading[:N_PROMISED]) != COLUMNS[:N_PROMISED]:
        raise StageError(
            f"{path}: is no mapping of this program, or was saved by another one: move it away, "
            "or name another file by --mapping"
        )
    repeated = [name for name, count in Counter(heading).items() if count > 1 or not name]
    if repeated:
        raise StageError(
            f"{path}: the mapping has columns without a heading, or several of one: give each a "
            "heading of its own"
        )


def _row(heading: Sequence[str], cells: Sequence[str]) -> Row:
    texts = [cell[1:] if _ESCAPED.match(cell) else cell for cell in cells]
    # What was cut short lacks its last cells.
    texts += [""] * (len(heading) - len(texts))
    by_name = dict(zip(heading, texts, strict=False))
    own = {name: by_name.pop(name, "") for name in COLUMNS}
    notes = texts[len(heading) :]
    while notes and not notes[-1]:
        notes.pop()
    return Row(**own, further=by_name, notes=tuple(notes))


# --- writing ---------------------------------------------------------------------------------


def merged(
    old: Iterable[Row], new: Iterable[Row], project: str, asked_for: Iterable[str]
) -> list[Row]:
    """Return the rows of a mapping after a run, ordered by name.

    Parameters
    ----------
    old, new : rows
        Of the mapping as it is, and of the run.
    project : str
        The run's.
    asked_for : hashes
        Of `old` rows of the project that the run would have, were their studies still there:
        they are gone. Their pseudonyms may be in files that were passed on.
    """
    by_key = {row.key: row for row in new}
    asked = {(project, study_hash) for study_hash in asked_for}
    kept = []
    annotated = set()
    for row in old:
        if row.key not in by_key:
            if not (row.key in asked and _stands_for_a_folder(row)):
                kept.append(_gone(row) if row.key in asked and row.hash else row)
        elif row.key not in annotated:
            annotated.add(row.key)
            by_key[row.key] = replace(by_key[row.key], further=row.further, notes=row.notes)
        elif row.notes or any(row.further.values()):
            # Someone has copied the row.
            kept.append(row)
    rows = [*kept, *by_key.values()]
    return sorted(rows, key=lambda row: (row.project, row.patient, row.study, row.status != "gone"))


def _stands_for_a_folder(row: Row) -> bool:
    """Tell whether a row is of a patient's folder that could not be listed, and of no study."""
    return not (row.study or row.output or row.notes or any(row.further.values()))


def _gone(row: Row) -> Row:
    return replace(
        row, status="gone", reason="no longer in the input", input="", output="", options=""
    )


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the mapping; the file is private from its first byte.

    Where nothing changed, nothing is written. Where several runs share a mapping, the caller
    holds its lock from reading to writing.

    Raises
    ------
    StageError
        It cannot be written.
    """
    content = _text(rows).encode("utf-8", "surrogateescape")
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
        # Some file systems can't make sure of a folder.
        with suppress(OSError):
            sync(path.parent)
    except OSError as error:
        raise StageError(
            f"{path}: the mapping cannot be written ({error.strerror}): check the folder, or name "
            "another file by --mapping"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _text(rows: Sequence[Row]) -> str:
    further = list(dict.fromkeys(name for row in rows for name in row.further))
    text = io.StringIO(newline="")
    # With the line ends of RFC 4180 csv quotes both of their characters, which names may have.
    table = csv.writer(text, lineterminator="\r\n")
    table.writerow([*COLUMNS, *map(_cell, further)])
    for row in rows:
        own = [getattr(row, name) for name in COLUMNS]
        others = [row.further.get(name, "") for name in further]
        table.writerow([_cell(each) for each in (*own, *others, *row.notes)])
    return text.getvalue()


def _cell(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text


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
