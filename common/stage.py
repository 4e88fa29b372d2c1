"""What every stage shares: lock, parts, resuming, keeping what is unchanged, atomic replacement.

A stage plans its studies; each worker writes one finished part file, in the layout of the final
output, into ``OUTPUT.parts/``; the stage assembles parts and kept studies into a file beside it,
which then replaces OUTPUT. A part's name holds the fingerprint of its input and options, so a
part of other options or of an older version is never taken for this one's.
"""

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import StageError
from common.parallel import PROGRESS, Outcome, Task, Worker, run_studies

logger = logging.getLogger("tumorvolume")

_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
}


@dataclass(frozen=True)
class Study:
    """One study in the plan.

    Attributes
    ----------
    hash : str
    fingerprint : str
        Digest of all that its part depends on: input, options of value, layout version.
    payload : object
        What the worker needs besides the path of its part; picklable.
    beside : tuple of Path
        Files besides OUTPUT that its worker writes; where one is missing, it runs again.
    """

    hash: str
    fingerprint: str
    payload: Any
    beside: tuple[Path, ...] = ()

    @property
    def all_beside(self) -> bool:
        """Whether every file that the worker writes beside OUTPUT is there."""
        return all(path.exists() for path in self.beside)


@dataclass(frozen=True)
class PartTask:
    """What a worker gets: the study's payload and where its finished part goes."""

    hash: str
    payload: Any
    part: Path


Assemble = Callable[[Path, Mapping[str, Path]], None]
"""Writes the file at the given path from a mapping of hash to a file that holds the study."""

BeforeReplacing = Callable[[Path, Sequence[Outcome]], None]


def run_stage(
    output: Path,
    studies: Sequence[Study],
    finished: Mapping[str, str],
    worker: Worker,
    assemble: Assemble,
    jobs: int,
    before_replacing: BeforeReplacing = lambda path, outcomes: None,
    rewrite: bool = False,
) -> list[Outcome]:
    """Compute what is missing, then replace the output; return the outcomes in study order.

    Parameters
    ----------
    output : Path
        Locked by the caller (`exclusive`).
    studies : sequence of Study
        All that the output shall hold; their hashes differ.
    finished : dict of hash to fingerprint
        What the present output holds.
    worker : function
        Gets a `PartTask`, writes the part (`writing_part`) and returns warnings.
    assemble : function
        Writes the whole output from parts and kept studies.
    jobs : int
        Worker processes.
    before_replacing : function, optional
        Called with the path of the complete new output, before it takes its place, and the
        outcomes; with OUTPUT itself where nothing changed.
    rewrite : bool
        Assemble even if no study changed.
    """
    parts = parts_folder(output)
    kept = [s for s in studies if finished.get(s.hash) == s.fingerprint and s.all_beside]
    kept_hashes = {study.hash for study in kept}
    part_of = {s.hash: parts / _part_name(s, output) for s in studies if s.hash not in kept_hashes}
    todo = [
        s for s in studies if s.hash in part_of and not (part_of[s.hash].exists() and s.all_beside)
    ]
    _report_plan(studies, kept, todo, finished)

    with _clear_write_errors(output):
        if part_of:
            parts.mkdir(exist_ok=True)
        tasks = [Task(s.hash, PartTask(s.hash, s.payload, part_of[s.hash])) for s in todo]
        computed = {outcome.hash: outcome for outcome in run_studies(worker, tasks, jobs, report)}
        outcomes = [
            Outcome(study.hash, "unchanged")
            if study.hash in kept_hashes
            else computed.get(study.hash, Outcome(study.hash, "written"))
            for study in studies
        ]
        sources = {study.hash: output for study in kept}
        sources |= {o.hash: part_of[o.hash] for o in outcomes if o.status == "written"}
        changed = sources.keys() != finished.keys() or len(kept) != len(sources)
        if changed or rewrite or not output.exists():
            with replacing(output) as temporary:
                assemble(temporary, sources)
                before_replacing(temporary, outcomes)
        else:
            before_replacing(output, outcomes)
    shutil.rmtree(parts, ignore_errors=True)
    return outcomes


def _report_plan(
    studies: Sequence[Study],
    kept: Sequence[Study],
    todo: Sequence[Study],
    finished: Mapping[str, str],
) -> None:
    resumed = len(studies) - len(kept) - len(todo)
    logger.info("%d studies: %d unchanged, %d to compute", len(studies), len(kept), len(todo))
    if resumed:
        logger.log(PROGRESS, "resuming: %d studies are finished already", resumed)
    vanished = sorted(finished.keys() - {study.hash for study in studies})
    if vanished:
        logger.warning(
            "%d studies of the old output are no longer in the input and stay out: %s",
            len(vanished),
            ", ".join(vanished[:10]) + (" ..." if len(vanished) > 10 else ""),
        )


def report(outcome: Outcome) -> None:
    """Log one outcome by the study's hash."""
    for warning in outcome.warnings:
        logger.warning("%s: %s", outcome.hash, warning)
    if outcome.status == "failed":
        logger.error("%s: %s", outcome.hash, outcome.reason)
    elif outcome.status == "skipped":
        logger.warning("%s: skipped, %s", outcome.hash, outcome.reason)
    else:
        logger.info("%s: %s", outcome.hash, outcome.status)


def parts_folder(output: Path) -> Path:
    """Return the folder that holds finished parts while a run is under way."""
    return output.with_name(output.name + ".parts")


def _part_name(study: Study, output: Path) -> str:
    return f"{study.hash}.{study.fingerprint[:16]}{output.suffix}"


@contextmanager
def writing_part(part: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes the finished part, or nothing does."""
    temporary = part.with_name(f"{part.name}.{os.getpid()}.tmp")
    with _clear_write_errors(part):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(part)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yield a temporary path in the parts folder; the file there then takes OUTPUT's place.

    At success the parts folder is removed.
    """
    parts = parts_folder(output)
    temporary = parts / f"assembled{output.suffix}"
    with _clear_write_errors(output):
        parts.mkdir(exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(output)
            _sync(output.parent)
        finally:
            temporary.unlink(missing_ok=True)
    shutil.rmtree(parts, ignore_errors=True)


def write_beside(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _clear_write_errors(path):
        try:
            temporary.write_text(text, encoding="utf-8", newline="")
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _clear_write_errors(path: Path) -> Iterator[None]:
    """Turn failures to write into a `StageError` that says why; HDF5 hides the number in text."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        if number is None and (found := re.search(r"errno = (\d+)", str(error))):
            number = int(found[1])
        if number not in _NO_ROOM:
            raise
        raise StageError(
            f"{path.name} cannot be written ({_NO_ROOM[number]}): make room and run again; "
            "finished studies are kept"
        ) from error


@contextmanager
def exclusive(output: Path, *, force: bool = False) -> Iterator[None]:
    """Hold the lock of an output, ``OUTPUT.lock``, while the body runs.

    With `force` the parts of an interrupted run are thrown away first.

    Raises
    ------
    StageError
        Another run holds it, or it cannot be created.
    """
    lock = output.with_name(output.name + ".lock")
    try:
        descriptor = _locked(lock)
    except OSError as error:
        raise StageError(f"{lock}: cannot be created ({error.strerror})") from error
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        if force:
            shutil.rmtree(parts_folder(output), ignore_errors=True)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if _just_killed(holder):
                time.sleep(0.1)
                continue
            raise StageError(
                f"{lock}: another run writes this output ({holder or 'unknown process'}): "
                "wait for it to end"
            ) from None
        # The last holder may have removed the file between our opening and locking it.
        if lock.exists() and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            return descriptor
        os.close(descriptor)


def _just_killed(holder: str) -> bool:
    """Tell whether the holder is dead, so that its last workers give the lock up in a moment."""
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
