"""What every stage shares: lock, parts, resuming, keeping what is unchanged, atomic replacement.

A stage plans its studies; each worker writes one finished part file, in the layout of the final
output, into ``OUTPUT.parts/``; the stage assembles parts and kept studies into a file beside it,
which then replaces OUTPUT. A part's name holds the fingerprint of its input and options, so a
part of other options or of an older version is never taken for this one's.
"""

import csv
import errno
import fcntl
import io
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import StageError
from common.machine import default_jobs
from common.parallel import PROGRESS, Outcome, Task, Worker, run_apart, run_studies

logger = logging.getLogger("tumorvolume")

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

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_ORPHANS_END_S = 5.0
"""Time in which the workers of a killed run have ended."""


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
    memory_bytes : int
        What its worker takes at most, roughly; 0 where unknown.
    """

    hash: str
    fingerprint: str
    payload: Any
    beside: tuple[Path, ...] = ()
    memory_bytes: int = 0

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
"""Writes the file at the given path from a mapping of hash to a file that holds the study.
Picklable: it is called in a worker process."""

BeforeReplacing = Callable[[Path, Sequence[Outcome]], None]


def run_stage(
    output: Path,
    studies: Sequence[Study],
    finished: Mapping[str, str],
    worker: Worker,
    assemble: Assemble,
    jobs: int | None,
    before_replacing: BeforeReplacing = lambda path, outcomes: None,
    failures_of: str = "",
    known_skips: Mapping[str, str] | None = None,
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
    jobs : int, optional
        Worker processes; by default what CPUs and memory suffice for.
    before_replacing : function, optional
        Called with the path of the complete new output, before it takes its place, and the
        outcomes; with OUTPUT itself where nothing changed.
    failures_of : str
        The stage's name, where failed studies are to be listed beside the output.
    known_skips : dict of hash to reason, optional
        Skipped studies that an earlier run told of already.
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
    computed = {
        outcome.hash: outcome
        for outcome in run_studies(
            worker,
            tasks,
            _worker_processes(jobs, todo),
            lambda outcome: report(outcome, known_skips or {}),
        )
    }
    outcomes = [
        Outcome(study.hash, "unchanged")
        if study.hash in kept_hashes
        else computed.get(study.hash, Outcome(study.hash, "written"))
        for study in studies
    ]
    sources = {study.hash: output for study in kept}
    sources |= {o.hash: part_of[o.hash] for o in outcomes if o.status == "written"}
    changed = sources.keys() != finished.keys() or len(kept) != len(sources)
    if changed or not output.exists():
        replace_output(output, assemble, sources, lambda path: before_replacing(path, outcomes))
    else:
        with _clear_write_errors(output):
            before_replacing(output, outcomes)
    if failures_of:
        _list_failures(output, failures_of, outcomes)
    return outcomes


def _worker_processes(jobs: int | None, todo: Sequence[Study]) -> int:
    if jobs is not None:
        return jobs
    needed = max((study.memory_bytes for study in todo), default=0)
    jobs = default_jobs(needed)
    logger.info("%d worker processes; the largest study takes about %.1f GB", jobs, needed / 1e9)
    return jobs


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


def report(outcome: Outcome, known_skips: Mapping[str, str] | None = None) -> None:
    """Log one outcome by the study's hash; a skip that is known already only with --verbose."""
    for warning in outcome.warnings:
        logger.warning("%s: %s", outcome.hash, warning)
    if outcome.status == "failed":
        logger.error("%s: %s", outcome.hash, outcome.reason)
    elif outcome.status == "skipped":
        known = (known_skips or {}).get(outcome.hash) == outcome.reason
        level = logging.INFO if known else logging.WARNING
        logger.log(level, "%s: skipped, %s", outcome.hash, outcome.reason)
    else:
        logger.info("%s: %s", outcome.hash, outcome.status)


def _list_failures(output: Path, stage: str, outcomes: Sequence[Outcome]) -> None:
    """Write ``OUTPUT_failed.csv``; where no study failed, there is none."""
    path = output.with_name(f"{output.stem}_failed.csv")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if not failed:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("hash", "stage", "reason"))
    writer.writerows((outcome.hash, stage, outcome.reason) for outcome in failed)
    write_beside(path, text.getvalue())


# --- files that are complete or not there ----------------------------------------------------


def parts_folder(output: Path) -> Path:
    """Return the folder that holds finished parts while a run is under way."""
    real = _behind_links(output)
    return real.with_name(real.name + ".parts")


def _part_name(study: Study, output: Path) -> str:
    return f"{study.hash}.{study.fingerprint[:16]}{output.suffix}"


@contextmanager
def writing_part(part: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes the finished part, or nothing does."""
    with _writing(part, part.with_name(f"{part.name}.{os.getpid()}.tmp")) as temporary:
        yield temporary


@contextmanager
def writing_beside(path: Path) -> Iterator[Path]:
    """Yield a hidden path of the same suffix; what is written there then takes the file's place."""
    real = _behind_links(path)
    with _writing(real, real.with_name(f".{real.stem}.tmp{real.suffix}")) as temporary:
        yield temporary


def write_beside(path: Path, text: str) -> None:
    """Replace a text file at once; one that holds the text already is left as it is."""
    content = text.encode()
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    with writing_beside(path) as temporary:
        temporary.write_bytes(content)


def replace_output(
    output: Path,
    assemble: Assemble,
    sources: Mapping[str, Path],
    before_replacing: Callable[[Path], None] = lambda path: None,
) -> None:
    """Have a worker process write the new output from `sources`, then put it in OUTPUT's place.

    A failure to write, or a crash of a library on a damaged source, leaves the old output as it
    was. `before_replacing` is called with the path of the complete new output.
    """
    parts = parts_folder(output)
    with _clear_write_errors(output):
        parts.mkdir(exist_ok=True)
        real = _behind_links(output)
        with _writing(real, parts / f"assembled.tmp{output.suffix}") as temporary:
            run_apart(_assemble, output, assemble, temporary, sources)
            before_replacing(temporary)
        # The new file is there; some file systems can't make sure of a folder.
        with suppress(OSError):
            _sync(real.parent)


def _assemble(
    output: Path, assemble: Assemble, temporary: Path, sources: Mapping[str, Path]
) -> None:
    with _clear_write_errors(output):
        assemble(temporary, sources)


@contextmanager
def _writing(path: Path, temporary: Path) -> Iterator[Path]:
    with _clear_write_errors(path):
        try:
            yield temporary
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


def _behind_links(path: Path) -> Path:
    """Return where a file is: a link to it stays, and large temporaries go to its disk."""
    return Path(os.path.realpath(path))


@contextmanager
def _clear_write_errors(path: Path) -> Iterator[None]:
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


# --- one run at a time -----------------------------------------------------------------------


@contextmanager
def exclusive(output: Path, *, force: bool = False, lock: bool = True) -> Iterator[None]:
    """Hold the lock of an output, ``OUTPUT.lock``, while the body runs.

    With `force` the parts of an interrupted run are thrown away first. At success no parts are
    left. Without `lock` the caller sees to it that no other run writes the output.

    Raises
    ------
    StageError
        Another run holds it, or it cannot be created, or the file system has no locks.
    """
    parts = parts_folder(output)
    with _held(_behind_links(output)) if lock else nullcontext():
        if force:
            shutil.rmtree(parts, ignore_errors=True)
        for litter in parts.glob("*.tmp*"):
            litter.unlink(missing_ok=True)
        try:
            yield
            shutil.rmtree(parts, ignore_errors=True)
        finally:
            with suppress(OSError):
                parts.rmdir()


@contextmanager
def _held(output: Path) -> Iterator[None]:
    lock = output.with_name(output.name + ".lock")
    try:
        descriptor = _locked(lock)
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


def _locked(lock: Path) -> int:
    orphans_end = time.monotonic() + _ORPHANS_END_S
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
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
        if lock.exists() and os.path.samestat(os.fstat(descriptor), os.stat(lock)):
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
