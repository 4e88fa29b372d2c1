"""Files that are there complete or not at all, and clear words where one can't be written."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import StageError, Unreachable

# --- files -----------------------------------------------------------------------------------


@contextmanager
def writing(path: Path, temporary: Path) -> Iterator[Path]:
    """Yield the temporary path; what is written there then takes the place of `path`, at once."""
    with clear_write_errors(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            # The next run removes what can't be removed now.
            with suppress(OSError):
                temporary.unlink()
            raise


def sync(path: Path) -> None:
    """Have a file, or the entries of a folder, reach the disk."""
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


def is_there(path: Path) -> bool:
    """Tell whether there is a file; where that can't be told, the output could be lost.

    Raises
    ------
    Unreachable
        It can't be looked at.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Unreachable(
            f"{path}: cannot be looked at ({error.strerror}): check the disk and its permissions"
        ) from error
    return True


# --- files that can't be written -------------------------------------------------------------

PARTS_SUFFIX = ".parts"
"""Ends the name of the folder that holds finished parts."""

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
    errno.EINTR: "the file system broke off: check it",
    errno.ESTALE: "the file server has lost it: check the server",
    errno.ENOTCONN: "the file server does not answer: check the server",
    errno.ETIMEDOUT: "the file server does not answer: check the server",
    errno.EHOSTDOWN: "the file server does not answer: check the server",
    errno.ENODEV: "its disk is gone: connect it",
}


@contextmanager
def clear_write_errors(path: Path) -> Iterator[None]:
    """Turn failures to write into a `StageError` that says why."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        remedy = _REMEDIES[error.errno]
        if error.errno == errno.ENOENT and _was_taken_away(path):
            remedy = (
                "another run on the same output has taken its unfinished files away: let one run "
                "at a time write it"
            )
        raise StageError(
            f"{path.name} cannot be written: {remedy}, and run again; finished studies are kept"
        ) from error


def _was_taken_away(path: Path) -> bool:
    """Tell whether a temporary file is gone, or the folder of parts, which runs make and remove."""
    folders = path.parent, path.parent.parent
    return path.parent.is_dir() or any(each.name.endswith(PARTS_SUFFIX) for each in folders)


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
