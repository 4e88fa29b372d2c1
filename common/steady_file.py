"""A file that HDF5 writes to and never sees fail.

Where writing fails, on a full disk say, HDF5 loses data without an error and crashes as it
closes. Here the failure is kept from it and raised when all is closed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def steady_file(path: Path) -> Iterator["SteadyFile"]:
    """Create a file for `h5py.File`, which must be closed within.

    Raises
    ------
    OSError
        At the end of the block, why writing failed first.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    stream = SteadyFile(descriptor)
    try:
        yield stream
    finally:
        try:
            os.close(descriptor)
        except OSError as error:
            # File servers tell of a used-up quota only now.
            stream.error = stream.error or error
    stream.check()


class SteadyFile:
    """What h5py's driver for Python files asks for; writing succeeds, if only in memory."""

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None
        self._descriptor = descriptor
        self._position = 0
        self._unwritten: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise the first failure; to be called now and then, since memory fills after it."""
        if self.error is not None:
            raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset from the beginning, or from the end."""
        ends = [at + len(block) for at, block in self._unwritten]
        size = max(os.fstat(self._descriptor).st_size, *ends, 0)
        self._position = offset + (size if whence == os.SEEK_END else 0)
        return self._position

    def tell(self) -> int:
        """Return the present offset from the beginning."""
        return self._position

    def write(self, block: memoryview) -> int:
        """Write a block where the file is, or keep it where that fails."""
        view = memoryview(block).cast("B")
        written = 0
        try:
            self.check()
            while written < len(view):
                written += os.pwrite(self._descriptor, view[written:], self._position + written)
        except OSError as error:
            self.error = self.error or error
            self._unwritten.append((self._position, bytes(view)))
        self._position += len(view)
        return len(view)

    def readinto(self, block: memoryview) -> int:
        """Fill a block from where the file is; beyond its end there are zeros."""
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
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.error = self.error or error

    def flush(self) -> None:
        """Do nothing: all is written at once."""
