"""One run at a time on an output: ``OUTPUT.lock``, locked by the kernel, and a lease besides.

Locks of some file systems reach no other machine (Lustre with localflock, NFS with local_lock),
some have none (--no-lock). So the file tells who holds it, and its time of change moves every few
seconds for as long as that run works: a run on another machine looks for this sign of life. A run
that was taken for dead, for it was only suspended, finds another's name and replaces nothing.
"""

import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import StageError
from common.run.atomic import behind_links

logger = logging.getLogger("tumorvolume")

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_ORPHANS_END_S = 5.0
"""Time in which the workers of a killed run have ended."""

_RETRY_S = 0.05
_BEAT_S = 5.0

_LEASE_S = 40.0
"""A run on another machine without a sign of life for so long is dead. Clients of file servers
may see one late."""


@dataclass
class _Lease:
    """A lock file that this process holds: what it has written, and when it last showed life."""

    descriptor: int
    told: str
    shown_s: float


_held: dict[Path, _Lease] = {}


def lock_file(output: Path) -> Path:
    """Return the file that is locked while a run writes an output."""
    return output.with_name(output.name + ".lock")


@contextmanager
def locked(output: Path, patience_s: float = 0.0, *, lock: bool = True) -> Iterator[None]:
    """Hold ``OUTPUT.lock`` in the body; the kernel frees it where this process is killed.

    Another run may hold it for `patience_s`. Without `lock` there is the lease alone, where the
    file can be made.

    Raises
    ------
    StageError
        Another run holds it, or it cannot be created, or the file system has no locks.
    """
    path, descriptor = lock_file(output), None
    try:
        descriptor = _open_locked(path, patience_s, lock=lock)
    except OSError as error:
        if lock and error.errno in _NO_LOCKS:
            with suppress(OSError):
                # One that tells something is a run's that was started with --no-lock.
                if path.stat().st_size == 0:
                    path.unlink()
            raise StageError(
                f"{path}: the file system has no locks ({error.strerror}): see to it that no "
                "other run writes this output, and add --no-lock"
            ) from error
        if os.path.lexists(path):
            # A link, or of another user: what it guards can't be told.
            raise StageError(
                f"{path}: cannot be opened ({error.strerror}): where no run writes this output, "
                "delete that file or have its owner do so"
            ) from error
        if lock:
            raise StageError(
                f"{path}: cannot be created ({error.strerror}): choose a folder that you may write "
                "to"
            ) from error
    if descriptor is None:
        yield
        return
    try:
        told = (
            f"process {os.getpid()} on {socket.gethostname()}\n"
            f"of {_machine()} {_numbering_of_processes()}\n"
        )
        lease = _held[path] = _Lease(descriptor, "", time.monotonic())
        # Who holds it is for people, too: on a full disk the lock holds all the same.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, told.encode(), 0)
            lease.told = told
            os.fsync(descriptor)
        yield
    finally:
        is_taken = _is_taken_over(path)
        _held.pop(path, None)
        # The output may have been replaced by now: what follows changes nothing of it.
        if not is_taken:
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            os.close(descriptor)


def show_life() -> None:
    """Move the time of change of the files held, where some seconds have passed.

    Called by all that waits for workers. No thread or process does it: workers are forks, and
    those of a process with threads may hang; who looks for workers finds no other process.
    """
    for lease in _held.values():
        if time.monotonic() >= lease.shown_s + _BEAT_S:
            lease.shown_s = time.monotonic()
            with suppress(OSError):
                os.utime(lease.descriptor)


def confirm_lease(output: Path) -> None:
    """Make sure, before an output is replaced, that no other run has taken it over.

    Raises
    ------
    StageError
        One has, for this run gave no sign of life: it was suspended, say.
    """
    path = lock_file(behind_links(output))
    if _is_taken_over(path):
        raise StageError(
            f"{output}: another run on it ({_read(path) or 'ended by now'}) has taken this one for "
            "dead: left as that makes it; see that one run at a time writes it"
        )


def _is_taken_over(path: Path) -> bool:
    if path not in _held:
        return False
    try:
        return path.read_text(errors="replace") != _held[path].told
    except FileNotFoundError:
        return True
    except OSError:
        # A server that does not answer tells nothing.
        return False


def _machine() -> str:
    """Return what tells this machine from others, of the same name too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _numbering_of_processes() -> str:
    """Return what tells apart the containers of a machine: each counts processes by itself."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "all"


def _open_locked(path: Path, patience_s: float, *, lock: bool) -> int:
    """Return the lock file, open, once it is this run's."""
    begin = time.monotonic()
    watch = _Watch(path, begin + patience_s, lock=lock)
    while True:
        show_life()
        try:
            descriptor, is_new = _opened(path)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            continue
        if is_new and not lock:
            return descriptor
        with ExitStack() as unless_kept:
            unless_kept.callback(os.close, descriptor)
            if lock and not _is_locked_now(descriptor):
                holder = _holder(descriptor)
                wait_s = max(patience_s, _ORPHANS_END_S if _is_dead(holder) else 0.0)
                if time.monotonic() >= begin + wait_s:
                    raise _in_use(path, holder)
                pause_s = _RETRY_S
            else:
                # The last holder may have removed the file between our opening and locking it.
                if _is_at(path, descriptor) and watch.finds_nobody(descriptor):
                    unless_kept.pop_all()
                    return descriptor
                pause_s = watch.pause_s
        time.sleep(pause_s)


def _is_locked_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class _Watch:
    """For a sign of life of the run that a lock file names, though this run can have its lock."""

    def __init__(self, path: Path, until_s: float, *, lock: bool) -> None:
        self._path, self._until_s, self._lock = path, until_s, lock
        self._seen: tuple[str, int, int] | None = None
        self._since_s = 0.0

    @property
    def pause_s(self) -> float:
        """How long to wait until the next look [s]."""
        return 0.0 if self._seen is None else min(_BEAT_S, 0.5)

    def finds_nobody(self, descriptor: int) -> bool:
        """Tell whether the file names no run, or one that is dead by now.

        Raises
        ------
        StageError
            It lives, and this run need not wait any longer.
        """
        status, holder = os.fstat(descriptor), _holder(descriptor)
        if not _may_live(holder, lock=self._lock):
            return True
        seen, now = (holder, status.st_mtime_ns, status.st_ino), time.monotonic()
        if seen == self._seen:
            if now <= self._since_s + _LEASE_S:
                return False
            logger.warning("%s: there was none in %g s: it is dead", self._path, _LEASE_S)
            return True
        if self._seen is None:
            logger.warning(
                "%s: %s may be writing this output: waiting for a sign of life of it",
                self._path,
                _first_line(holder),
            )
        elif now > self._until_s:
            raise _in_use(self._path, holder)
        self._seen, self._since_s = seen, now
        return False


def _holder(descriptor: int) -> str:
    """Return what a lock file says of the run that holds it."""
    return os.pread(descriptor, 200, 0).decode(errors="replace")


def _opened(path: Path) -> tuple[int, bool]:
    """Return the file open, and whether it was made by that: of several only one makes it."""
    flags = os.O_RDWR | os.O_NOFOLLOW
    with suppress(FileExistsError):
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), True
    return os.open(path, flags), False


def _in_use(path: Path, holder: str) -> StageError:
    return StageError(
        f"{path}: another run writes this output ({_first_line(holder) or 'unknown process'}): "
        "wait for it to end"
    )


def _first_line(holder: str) -> str:
    return holder.strip().partition("\n")[0]


def _read(path: Path) -> str:
    with suppress(OSError):
        return _first_line(path.read_text(errors="replace"))
    return ""


_HOLDER = re.compile(r"process (\d+) on (\S+)\nof (\S+)(?: (\S+))?\n")


def _may_live(holder: str, *, lock: bool) -> bool:
    """Tell whether the run that a lock file names may be at work, though the file can be locked."""
    told = _HOLDER.fullmatch(holder)
    if told is None:
        # Made an instant ago by a run that has not told of itself yet.
        return not lock and not holder
    if told[3] != _machine():
        return True
    # Locks reach all processes of a machine.
    return not lock and not _is_dead(holder)


def _is_dead(holder: str) -> bool:
    """Tell whether a run of this machine has ended; its workers, which share its lock, will.

    False of one in another container: that is not known.
    """
    told = _HOLDER.fullmatch(holder)
    if told is None or (told[3], told[4]) != (_machine(), _numbering_of_processes()):
        return False
    try:
        os.kill(int(told[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
