"""A file that HDF5 writes to and never sees fail.

Where writing fails, on a full disk say, HDF5 loses data without an error and crashes as it
closes. Here the failure is kept from it and raised when all is closed.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GATHERED_BYTES = 1 << 20

_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2)


@contextmanager
def crash_safe_file(path: Path) -> Iterator["CrashSafeFile"]:
    """Create a file for `h5py.File`, which must be closed within.

    Raises
    ------
    OSError
        At the end of the block, why writing failed first.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    stream = CrashSafeFile(descriptor)
    try:
        yield stream
    finally:
        stream.flush()
        try:
            os.close(descriptor)
        except OSError as error:
            # File servers tell of a used-up quota only now.
            stream.error = stream.error or error
    stream.check()


class CrashSafeFile:
    """What h5py's driver for Python files asks for; writing succeeds, if only in memory.

    Blocks that follow each other are gathered: few large ones are written in half the time.
    """

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None
        self._descriptor = descriptor
        self._position = 0
        self._gathered = bytearray(_GATHERED_BYTES)
        self._gathered_at = self._n_gathered = 0
        self._unwritten: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise the first failure; to be called now and then, since memory fills after it."""
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset from the beginning, or from the end."""
        self._position = offset + (self._size() if whence == os.SEEK_END else 0)
        return self._position

    def _size(self) -> int:
        self.flush()
        ends = [at + len(block) for at, block in self._unwritten]
        return max(os.fstat(self._descriptor).st_size, *ends, 0)

    def tell(self) -> int:
        """Return the present offset from the beginning."""
        return self._position

    def write(self, block: memoryview) -> int:
        """Write a block where the file is, soon, or keep it where that fails."""
        view = memoryview(block).cast("B")
        size, begin = len(view), self._n_gathered
        if self._position != self._gathered_at + begin or begin + size > _GATHERED_BYTES:
            self.flush()
            begin = 0
        if size > _GATHERED_BYTES:
            self._write(view, self._position)
        else:
            self._gathered[begin : begin + size] = view
            self._n_gathered = begin + size
        self._position += size
        return size

    def flush(self) -> None:
        """Write what is gathered."""
        self._write(memoryview(self._gathered)[: self._n_gathered], self._gathered_at)
        self._gathered_at, self._n_gathered = self._position, 0

    def _write(self, block: memoryview, offset: int) -> None:
        try:
            self.check()
            written = 0
            while written < len(block):
                written += os.pwrite(self._descriptor, block[written:], offset + written)
            if 2 * written >= _GATHERED_BYTES:
                _start_writing(self._descriptor, offset, written)
        except OSError as error:
            self.error = self.error or error
            self._unwritten.append((offset, bytes(block)))

    def readinto(self, block: memoryview) -> int:
        """Fill a block from where the file is; beyond its end there are zeros."""
        self.flush()
        view, begin = memoryview(block).cast("B"), self._position
        n_read = os.preadv(self._descriptor, [view], begin)
        view[n_read:] = bytes(len(view) - n_read)
        for at, kept in self._unwritten:
            first, last = max(at, begin), min(at + len(kept), begin + len(view))
            if first < last:
                view[first - begin : last - begin] = kept[first - at : last - at]
        self._position += len(view)
        return len(view)

    def read(self, size: int) -> bytes:
        """Return a block from where the file is."""
        block = bytearray(size)
        self.readinto(memoryview(block))
        return bytes(block)

    def truncate(self, size: int) -> None:
        """Set the file's size."""
        self.flush()
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.error = self.error or error


def _start_writing(descriptor: int, offset: int, size: int) -> None:
    """Have the disk write a block meanwhile, if the system can: little is left to wait for."""
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if start is not None:
        start(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _START_WRITING)
