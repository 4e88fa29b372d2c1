"""OUTPUT, its parts, and the files beside it: each is there complete or not at all.

While a run is under way, ``OUTPUT.parts/`` holds finished parts, in the layout of the output.
"""

import csv
import glob
import io
import itertools
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from common.run.atomic import (
    PARTS_SUFFIX,
    behind_links,
    clear_write_errors,
    remove_listed,
    sync,
    temporary_beside,
    writing,
)
from common.run.lock import confirm_lease, locked
from common.run.pool import in_own_process
from common.run.store import holding_store, sync_folders

Assemble = Callable[[Path, Mapping[str, Path]], None]
"""Writes the file at the given path from a mapping of hash to a file that holds the study.
Picklable: it is called in a worker process."""


def parts_folder(output: Path) -> Path:
    """Return the folder that holds finished parts while a run is under way."""
    real = behind_links(output)
    return real.with_name(real.name + PARTS_SUFFIX)


def make_folder(path: Path) -> None:
    """Make a folder for results, and those above it, where they are not there."""
    with clear_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing_part(part: Path, beside: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes the finished part, or nothing does.

    Old files `beside` OUTPUT go first: those there are when the part is there belong to it.
    """
    for path in beside:
        with clear_write_errors(path):
            path.unlink(missing_ok=True)
    with writing(part, part.with_name(f"{part.name}.{_here()}.tmp")) as temporary:
        yield temporary


def _here() -> str:
    """Return what tells this process from others, also where locks do not reach."""
    return f"{socket.gethostname()}.{os.getpid()}"


@contextmanager
def writing_beside(path: Path) -> Iterator[Path]:
    """Yield a hidden path of the same suffix; what is written there then takes the file's place."""
    with writing(behind_links(path), temporary_beside(path)) as temporary:
        yield temporary


def write_beside(path: Path, text: str) -> None:
    """Replace a text file at once; one that holds the text already is left as it is."""
    content = text.encode()
    with suppress(OSError):
        if path.read_bytes() == content:
            temporary_beside(path).unlink(missing_ok=True)
            return
    with writing_beside(path) as temporary:
        temporary.write_bytes(content)


def write_table(path: Path, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Replace a CSV file at once; one that holds the rows already is left as it is."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows(rows)
    write_beside(path, text.getvalue())


def replace_output(
    output: Path,
    assemble: Assemble,
    sources: Mapping[str, Path],
    before_replacing: Callable[[Path], None] = lambda path: None,
    *,
    links: bool = False,
) -> None:
    """Have a worker process write the new output from `sources`, then put it in OUTPUT's place.

    A failure to write, or a crash of a library on a damaged source, leaves the old output as it
    was. `before_replacing` is called with the path of the complete new output. One that `links` to
    its sources is written in OUTPUT's own folder: the links are relative to that.
    """
    parts = parts_folder(output)
    with clear_write_errors(output):
        parts.mkdir(exist_ok=True)
        real = behind_links(output)
        temporary_path = parts / f"assembled.{_here()}.tmp{output.suffix}"
        if links:
            temporary_path = real.with_name(f".{real.name}.{_here()}.tmp")
        with writing(real, temporary_path) as temporary:
            in_own_process(_assemble, output, assemble, temporary, sources)
            confirm_lease(output)
            before_replacing(temporary)
            if links:
                sync_folders(sources.values())
            confirm_lease(output)
        # The new file is there; some file systems can't make sure of a folder.
        with suppress(OSError):
            sync(real.parent)


def _assemble(
    output: Path, assemble: Assemble, temporary: Path, sources: Mapping[str, Path]
) -> None:
    with clear_write_errors(output):
        assemble(temporary, sources)
        # Here, since it may take minutes, in which the run must show signs of life.
        sync(temporary)


# --- one run at a time -----------------------------------------------------------------------


@contextmanager
def exclusive(
    output: Path, *, force: bool = False, lock: bool = True, store: Path | None = None
) -> Iterator[None]:
    """Hold the lock of an output, ``OUTPUT.lock``, and of its store, while the body runs.

    With `force` the parts of an interrupted run are thrown away first. At success no parts are
    left. Without `lock` there is the lease alone, see `locked`.

    Raises
    ------
    StageError
        Another run holds it, or it cannot be created, or the file system has no locks; the store
        is another output's.
    """
    parts, real = parts_folder(output), behind_links(output)
    with (
        locked(real, lock=lock),
        holding_store(store, output, lock=lock) if store is not None else nullcontext(),
    ):
        remove_listed(parts)
        if force:
            shutil.rmtree(parts, ignore_errors=True)
        litter = (
            parts.glob("*.tmp*"),
            parts.glob("??/*.tmp"),
            real.parent.glob(f".{glob.escape(real.name)}.*.tmp"),
        )
        for path in itertools.chain(*litter):
            path.unlink(missing_ok=True)
        try:
            yield
            shutil.rmtree(parts, ignore_errors=True)
        finally:
            with suppress(OSError):
                parts.rmdir()
