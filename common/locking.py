"""One run at a time: the lock of an output."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import StageError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_ORPHANS_END_S = 5.0
"""Time in which the workers of a killed run have ended."""


def lock_file(output: Path) -> Path:
    """Return the file that is locked while a run writes an output."""
    return output.with_name(output.name + ".lock")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold ``OUTPUT.lock`` in the body; the kernel frees it where this process is killed.

    Raises
    ------
    StageError
        Another run holds it, or it cannot be created, or the file system has no locks.
    """
    lock = lock_file(output)
    try:
        descriptor = _open_locked(lock)
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
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(lock: Path) -> int:
    orphans_end = time.monotonic() + _ORPHANS_END_S
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if _is_dead(holder) and time.monotonic() < orphans_end:
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
