"""Paths that the options name: status 2 where one can't be read or written, before any work."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common import outputs
from common.locking import lock_file
from common.stage import failures_file


@contextmanager
def checking(target: argparse.ArgumentParser) -> Iterator[None]:
    """End with status 2 where a path can't even be looked at."""
    try:
        yield
    except OSError as error:
        target.error(f"{error.filename}: {error.strerror}: check the path and its permissions")


def check_files(target: argparse.ArgumentParser, inputs: Sequence[Path]) -> None:
    """End with status 2 where an input is missing, or a device or pipe, which may never end."""
    for path in inputs:
        if not path.exists():
            target.error(f"input {path} does not exist")
        if not (path.is_file() or path.is_dir()):
            target.error(f"input {path} is a device or pipe: give a file")


def check_paths(
    target: argparse.ArgumentParser, options: argparse.Namespace, inputs: Sequence[Path]
) -> None:
    """End with status 2 where an input is missing, or the output or the log can't be or is one."""
    output: Path = options.output
    for path in inputs:
        if not path.exists():
            target.error(f"input {path} does not exist")
        if output.exists() and output.samefile(path):
            target.error(f"output {output} is an input: choose another name")
    if output.is_dir():
        target.error(f"output {output} is a folder: give a file name")
    if output.exists() and not output.is_file():
        target.error(f"output {output} is a device or pipe: give a file name")
    if not output.resolve().parent.is_dir():
        target.error(
            f"folder {output.resolve().parent} of the output does not exist: make it first"
        )
    for path in inputs:
        _check_is_none_of(target, path, _own_files(output))
    check_log_file(target, options, [*inputs, output])


def check_log_file(
    target: argparse.ArgumentParser, options: argparse.Namespace, others: Sequence[Path]
) -> None:
    """End with status 2 where the log would go into another file of this run."""
    if options.log_file is not None:
        own = _own_files(options.output) if options.output is not None else []
        _check_is_none_of(target, options.log_file, [*others, *own])


def check_side_output(
    target: argparse.ArgumentParser, path: Path, options: argparse.Namespace, inputs: Sequence[Path]
) -> None:
    """End with status 2 where a file beside the output can't be written or is another one."""
    _check_is_none_of(target, path, [*inputs, options.output, *_own_files(options.output)])
    if options.log_file is not None:
        _check_is_none_of(target, path, [options.log_file])
    if path.exists() and not path.is_file():
        target.error(f"{path} is a folder, device or pipe: give a file name")
    if not path.parent.is_dir():
        target.error(f"folder {path.parent} of {path.name} does not exist: make it first")
    beside = path.parent.resolve() == options.output.parent.resolve()
    # The output's own folder is tried by the stage.
    if not beside and not os.access(path.parent, os.W_OK):
        target.error(
            f"folder {path.parent} of {path.name} can't be written to: see its permissions"
        )


def _own_files(output: Path) -> list[Path]:
    """Return what a stage writes and removes beside its output unasked."""
    return [lock_file(output), failures_file(output)]


def _check_is_none_of(target: argparse.ArgumentParser, path: Path, others: Sequence[Path]) -> None:
    for other in others:
        if path.resolve() == other.resolve() or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            target.error(f"{path} is another file of this run: choose another name")


def check_folder(target: argparse.ArgumentParser, path: Path, options: argparse.Namespace) -> None:
    """End with status 2 where a folder for results is a file, or can't be made or written to."""
    parts = outputs.parts_folder(options.output)
    path = path.resolve()
    if path == options.output.resolve() or parts in (path, *path.parents):
        target.error(f"folder {path} is the output, or in {parts.name}: choose another name")
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        target.error(f"{there} is not a folder")
    # The output's own folder is tried by the stage.
    beside = options.output.resolve().parent in (there, *there.parents)
    if not beside and not os.access(there, os.W_OK | os.X_OK):
        target.error(f"folder {there} can't be written to: see its permissions")
