"""Files that are there complete or not at all, and clear words where one can't be written."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import StageError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EFBIG: "the file-size limit is reached: raise it (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "no permission to write: choose another folder",
    errno.EPERM: "no permission to write: choose another folder",
    errno.ENOENT: "its folder is gone: make it again",
    errno.EEXIST: "something else has its name: move that away",
    errno.EISDIR: "a folder has its name: move that away",
    errno.ENOTDIR: "something else has its name: move that away",
    errno.ENAMETOOLONG: "its name is too long: choose a shorter one",
    errno.EIO: "the disk fails: check it",
    errno.ESTALE: "the file server has lost it: check the server",
}


@contextmanager
def writing(path: Path, temporary: Path) -> Iterator[Path]:
    with clear_write_errors(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def behind_links(path: Path) -> Path:
    """Return where a file is: a link to it stays, and large temporaries go to its disk."""
    return Path(os.path.realpath(path))


def temporary_beside(path: Path) -> Path:
    """Return the hidden name, of the same suffix, that a file is written under beside its place."""
    real = behind_links(path)
    return real.with_name(f".{real.stem}.tmp{real.suffix}")


# --- what a killed worker leaves beside the output -------------------------------------------

_LIST = "beside.tmp"
"""File among the parts: the temporary files that workers may be writing elsewhere."""


def list_temporaries(parts: Path, paths: Iterable[Path]) -> None:
    """Note which files workers are about to write besides parts, for `remove_listed`."""
    listed = [os.path.relpath(temporary_beside(path), parts) for path in paths]
    if listed:
        (parts / _LIST).write_text(json.dumps(listed))


def remove_listed(parts: Path) -> None:
    """Remove the temporary files of workers that have ended; a later run finds the rest."""
    try:
        listed = json.loads((parts / _LIST).read_bytes())
    except (OSError, ValueError):
        return
    for path in (parts / str(name) for name in listed):
        if path.name.startswith(".") and ".tmp" in path.name:
            with suppress(OSError):
                path.unlink()
    (parts / _LIST).unlink(missing_ok=True)


@contextmanager
def clear_write_errors(path: Path) -> Iterator[None]:
    """Turn failures to write into a `StageError` that says why."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        raise StageError(
            f"{path.name} cannot be written: {_REMEDIES[error.errno]}, and run again; "
            "finished studies are kept"
        ) from error
