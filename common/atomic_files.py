"""Files that are there complete or not at all, and clear words where one can't be written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    errno.ENOTDIR: "something else has its name: move that away",
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
