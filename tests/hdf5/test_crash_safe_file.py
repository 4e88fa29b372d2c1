"""What HDF5 writes to: the same bytes as its own file, and a failure at any byte is one error."""

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

from common.hdf5 import crash_safe_file as module
from common.hdf5.crash_safe_file import crash_safe_file

VOLUME = np.random.default_rng(0).integers(0, 255, (1, 20, 20, 20), np.uint8)


def fill(file: h5py.File) -> None:
    group = file.create_group("image")
    for number in range(8):
        dataset = group.create_dataset(
            str(number), data=VOLUME, chunks=(1, 8, 8, 8), compression="lzf", track_times=False
        )
        dataset.attrs["text"] = "x" * 3000


def write(path: Path) -> None:
    with crash_safe_file(path) as stream, h5py.File(stream, "w", libver=("v108", "v108")) as file:
        fill(file)


def test_the_bytes_are_those_of_hdf5s_own_file(tmp_path):
    with h5py.File(tmp_path / "own.h5", "w", libver=("v108", "v108")) as file:
        fill(file)
    write(tmp_path / "written.h5")
    assert (tmp_path / "written.h5").read_bytes() == (tmp_path / "own.h5").read_bytes()


def test_an_older_longer_file_is_replaced(tmp_path):
    (tmp_path / "a.h5").write_bytes(bytes(10_000_000))
    write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["image/7"][()], VOLUME)


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_the_disk_is_asked_to_write_large_blocks_meanwhile(tmp_path, monkeypatch):
    ranges = []
    libc = ctypes.CDLL(None, use_errno=True)

    class Watched:
        @staticmethod
        def sync_file_range(descriptor, offset, size, flags):
            ranges.append((offset.value, size.value))
            assert libc.sync_file_range(descriptor, offset, size, flags) == 0, ctypes.get_errno()

    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: Watched)
    block = bytes(1 << 20)
    with crash_safe_file(tmp_path / "a") as stream:
        for _ in range(10):
            stream.write(block)
    assert ranges == [(number << 20, 1 << 20) for number in range(10)]
    assert (tmp_path / "a").read_bytes() == 10 * block


def test_a_failure_at_any_byte_is_raised_at_the_end_and_crashes_nothing(tmp_path, monkeypatch):
    write(tmp_path / "whole.h5")
    size = (tmp_path / "whole.h5").stat().st_size
    pwrite = os.pwrite
    for limit in range(0, size, size // 40):

        def limited(descriptor, block, offset, limit=limit):
            if offset >= limit:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            return pwrite(descriptor, block[: limit - offset], offset)

        monkeypatch.setattr(os, "pwrite", limited)
        with pytest.raises(OSError, match="Disk quota exceeded"):
            write(tmp_path / "half.h5")
        monkeypatch.undo()
        write(tmp_path / "next.h5")
        assert (tmp_path / "next.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_failure_can_be_asked_for_before_the_end(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with suppress(OSError), crash_safe_file(tmp_path / "a.h5") as stream:
        stream.check()
        monkeypatch.setattr(os, "pwrite", full)
        stream.write(b"abc")
        assert stream.seek(0, os.SEEK_END) == 3
        stream.seek(1)
        assert stream.read(2) == b"bc"
        with pytest.raises(OSError, match="No space left"):
            stream.check()


def test_a_failure_that_closing_tells_of_is_raised(tmp_path, monkeypatch):
    """As file servers do with quotas."""
    close = os.close

    def over_quota(descriptor):
        close(descriptor)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(OSError, match="quota"), crash_safe_file(tmp_path / "a.h5"):
        monkeypatch.setattr(os, "close", over_quota)
