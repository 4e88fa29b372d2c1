"""Files that are there complete or not at all, clear words where one can't be written, locks."""

import errno
import fcntl
import json
import os
import socket
import time
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


# --- locking ---------------------------------------------------------------------------------

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_ORPHANS_END_S = 5.0
"""Time in which the workers of a killed run have ended."""


def lock_file(output: Path) -> Path:
    """Return the file that is locked while a run writes an output."""
    return output.with_name(output.name + ".lock")


@contextmanager
def locked(output: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold ``OUTPUT.lock`` in the body; the kernel frees it where this process is killed.

    Another run may hold it for `patience_s`.

    Raises
    ------
    StageError
        Another run holds it, or it cannot be created, or the file system has no locks.
    """
    lock = lock_file(output)
    try:
        descriptor = _open_locked(lock, patience_s)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            with suppress(OSError):
                lock.unlink()
            raise StageError(
                f"{lock}: the file system has no locks ({error.strerror}): see to it that no "
                "other run writes this output, and add --no-lock"
            ) from error
        raise StageError(
            f"{lock}: cannot be created ({error.strerror}): choose a folder that you may write to"
        ) from error
    try:
        # Who holds it is for people to read: on a full disk the lock holds all the same.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        # The output may have been replaced by now: what follows changes nothing of it.
        with suppress(OSError):
            lock.unlink()
        with suppress(OSError):
            os.close(descriptor)


def _open_locked(lock: Path, patience_s: float) -> int:
    begin = time.monotonic()
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            wait_s = max(patience_s, _ORPHANS_END_S if _is_dead(holder) else 0.0)
            if time.monotonic() < begin + wait_s:
                time.sleep(0.05)
                continue
            raise StageError(
                f"{lock}: another run writes this output ({holder or 'unknown process'}): "
                "wait for it to end"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        # The last holder may have removed the file between our opening and locking it.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)


def _is_dead(holder: str) -> bool:
    """Tell whether a killed run's workers, which share its lock, are about to end after it."""
    words = holder.split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdigit():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
