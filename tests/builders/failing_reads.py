"""Python's calls that look at files of a folder, of which one fails once.

The calls are counted over a process and those it forks, so that the N-th of a run can fail.
"""

import builtins
import errno
import io
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_counted = multiprocessing.Value("l", 0)
_failing = multiprocessing.Value("l", 0)
_number = multiprocessing.Value("i", errno.EIO)
_folder = ""

_stat, _scandir, _open = os.stat, os.scandir, builtins.open


def _is_own(path: Any) -> bool:
    return not isinstance(path, int) and (os.fsdecode(path) + os.sep).startswith(_folder)


def _look(path: Any) -> None:
    """Count a call at the folder or what is below it, and fail it where it is its turn."""
    if not _is_own(path):
        return
    with _counted.get_lock():
        _counted.value += 1
        is_turn = _counted.value == _failing.value
    if is_turn:
        raise OSError(_number.value, os.strerror(_number.value), os.fsdecode(path))


class _File(io.FileIO):
    """A file each of whose reads is counted."""

    def __init__(self, path: Any, *arguments: Any, **options: Any) -> None:
        _look(path)
        super().__init__(path, *arguments, **options)

    def read(self, *arguments: Any) -> Any:
        _look(self.name)
        return super().read(*arguments)

    def readall(self) -> bytes:
        _look(self.name)
        return super().readall()

    def readinto(self, block: Any) -> int:
        _look(self.name)
        return super().readinto(block)


class _Entry:
    """An entry of a folder whose looks at its file are counted."""

    def __init__(self, entry: os.DirEntry[Any]) -> None:
        self._entry = entry
        self.name, self.path = entry.name, entry.path

    def __fspath__(self) -> str:
        return self.path

    def __getattr__(self, name: str) -> Any:
        _look(self.path)
        return getattr(self._entry, name)


class _Entries:
    def __init__(self, entries: Any) -> None:
        self._entries = entries

    def __enter__(self) -> "_Entries":
        return self

    def __exit__(self, *error: object) -> None:
        self._entries.close()

    def __iter__(self) -> Iterator[_Entry]:
        return map(_Entry, self._entries)

    def __next__(self) -> _Entry:
        return _Entry(next(self._entries))

    def close(self) -> None:
        self._entries.close()


def _failing_stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
    _look(path)
    return _stat(path, *arguments, **options)


def _failing_scandir(path: Any = ".") -> Any:
    _look(path)
    return _Entries(_scandir(path)) if _is_own(path) else _scandir(path)


def _failing_open(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
    if not _is_own(path) or set(mode) & set("wax"):
        return _open(path, mode, *arguments, **options)
    stream = io.BufferedReader(_File(path))
    if "b" in mode:
        return stream
    return io.TextIOWrapper(stream, encoding=options.get("encoding", "utf-8"))


@contextmanager
def failing(folder: Path, call: int, number: int = errno.EIO) -> Iterator[Any]:
    """Have the `call`-th look at a file below `folder` fail in the body; 0: none.

    Yields the number of calls so far, as `.value`.
    """
    global _folder
    _folder = str(folder) + os.sep
    _counted.value, _failing.value, _number.value = 0, call, number
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", _failing_stat)
        patch.setattr(os, "scandir", _failing_scandir)
        patch.setattr(builtins, "open", _failing_open)
        patch.setattr(io, "open", _failing_open)
        patch.setattr(io, "FileIO", _File)
        yield _counted
