"""A store: the folder where the finished file of each study stays, for an output of mere links.

    DIR/store.json                the output whose store it is
    DIR/<xx>/<hash>.<digits>.h5   a study; <xx> by its hash, <digits> by what it was made from

A file of a store is never changed, for its name tells what it was made from: a study that is made
anew gets another file. The output is replaced when all files are there, and only then those go that
it no longer leads to.
"""

import glob
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import StageError
from common.hashing import fingerprint
from common.run.atomic import (
    behind_links,
    clear_write_errors,
    sync,
    temporary_beside,
    writing,
)
from common.run.lock import locked

N_DIGITS = 16
"""Digits of a fingerprint that the name of a study's file tells."""

_MARK = "store.json"
_FOLDERS = "[0-9a-f][0-9a-f]"
_STUDIES = f"{_FOLDERS}/*.{'[0-9a-f]' * N_DIGITS}"


def study_file(study_hash: str, made_from: str, suffix: str) -> str:
    """Return the name of a study's finished file, which tells what it was made from."""
    return f"{study_hash}.{made_from[:N_DIGITS]}{suffix}"


def subfolder(folder: Path, study_hash: str) -> Path:
    """Return which of 256 subfolders a study's file is in: folders of thousands are slow."""
    return folder / fingerprint(study_hash)[:2]


def study_files(folder: Path, suffix: str) -> list[Path]:
    """Return all files of studies in the subfolders of a folder."""
    return sorted(folder.glob(_STUDIES + glob.escape(suffix)))


def why_not_a_store(store: Path, output: Path) -> str:
    """Return why a folder can't be the store of an output; empty where it can."""
    store = behind_links(store)
    if not store.exists():
        return ""
    if not store.is_dir():
        return "is not a folder"
    if (store / _MARK).exists():
        owner = _owner(store)
        if owner is None:
            return f"has a damaged {_MARK}: if it is the store of this output, delete that file"
        is_taken = owner.exists() and owner != behind_links(output)
        return f"is the store of {owner}: each output has a folder of its own" if is_taken else ""
    hidden_mark = temporary_beside(store / _MARK).name
    if any(entry != hidden_mark for entry in os.listdir(store)):
        return "holds something else: give an empty folder, or a new name"
    return ""


def _owner(store: Path) -> Path | None:
    """Return the output whose store a folder is; both may have moved together."""
    try:
        return behind_links(store / json.loads((store / _MARK).read_bytes())["output"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def holding_store(store: Path, output: Path, *, lock: bool) -> Iterator[None]:
    """Make a folder the store of an output, whose lock the caller holds, in the body.

    Raises
    ------
    StageError
        It is another output's, or holds something else, or can't be written.
    """
    store = behind_links(store)
    with clear_write_errors(store):
        store.mkdir(parents=True, exist_ok=True)
    with locked(store, lock=lock):
        if fault := why_not_a_store(store, output):
            raise StageError(f"{store}: {fault}")
        if _owner(store) != behind_links(output):
            mark = store / _MARK
            with writing(mark, temporary_beside(mark)) as temporary:
                told = {"output": os.path.relpath(behind_links(output), store)}
                temporary.write_text(json.dumps(told) + "\n")
        for litter in store.glob(f"{_FOLDERS}/*.tmp"):
            litter.unlink(missing_ok=True)
        yield


def sync_folders(files: Collection[Path]) -> None:
    """Have the names of files reach the disk, as their content has."""
    folders = {file.parent for file in files}
    for folder in sorted(folders | {folder.parent for folder in folders}):
        # Some file systems can't make sure of a folder.
        with suppress(OSError):
            sync(folder)


def sweep(store: Path, suffix: str, kept: Collection[Path]) -> None:
    """Remove the files of studies that the output, as it is now, does not lead to."""
    wanted = set(kept)
    for file in study_files(store, suffix):
        if file not in wanted:
            # What can't be removed now is removed by the next run.
            with suppress(OSError):
                file.unlink()
    for folder in store.glob(_FOLDERS):
        with suppress(OSError):
            folder.rmdir()
