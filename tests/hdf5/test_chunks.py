"""Chunks of HDF5 datasets: their shapes, and that any bits come back from them."""

import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.hdf5 import chunks
from common.run import cli

COMPRESSIONS = [name for name in chunks.COMPRESSIONS if name != "blosc"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 7, 9, 8), (2, 33, 5, 70), (2, 20, 31), (1, 1, 1)]),
    st.sampled_from(COMPRESSIONS),
    st.sampled_from(["<f2", "<f4", "|u1"]),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_any_bits_come_back(tmp_path_factory, shape, compression, dtype, filled, seed):
    random = np.random.default_rng(seed)
    array = random.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[
        ..., 0
    ]
    array[random.random(shape) >= filled] = 0
    if array.dtype.kind == "f":
        array[random.random(shape) > 0.9] = -0.0
    path = tmp_path_factory.mktemp("bits") / "a.h5"
    with h5py.File(path, "w") as file:
        chunks.write_chunked(file, "a", array, compression)
        bits = f"u{array.itemsize}"
        np.testing.assert_array_equal(file["a"][()].view(bits), array.view(bits))


def test_what_gzip_would_not_halve_is_stored_and_the_rest_squeezed(tmp_path):
    """Noise in the low bytes, of more than one stored block of deflate; one value in the high."""
    low = np.random.default_rng(0).integers(0, 256, (1, 300, 400), np.uint16)
    array = (low | 0x3800).view(np.float16)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        dataset = chunks.write_chunked(file, "a", array, "gzip")
        np.testing.assert_array_equal(dataset[()], array)
        _, chunk = dataset.id.read_direct_chunk((0, 0, 0))
    assert low.size < len(chunk) < 1.01 * low.size
    assert low.astype(np.uint8).tobytes()[-10_000:] in chunk
    bytes_apart = array.view(np.uint8).reshape(-1, 2).T
    assert zlib.decompress(chunk) == bytes_apart.tobytes()


@pytest.mark.parametrize(("n_high", "squeezed"), [(16, False), (8, True)])
def test_high_bytes_are_stored_with_the_low_where_gzip_hardly_halves_them(
    n_high, squeezed, tmp_path
):
    """Of 4 bits they are a half of their size, of 3 bits three eighths."""
    random = np.random.default_rng(0)
    array = random.integers(0, 256 * n_high, (1, 40, 40, 40), np.uint16).view(np.float16)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = chunks.write_chunked(file, "a", array, "gzip")
        np.testing.assert_array_equal(dataset[()].view(np.uint16), array.view(np.uint16))
        _, chunk = dataset.id.read_direct_chunk((0, 0, 0, 0))
    low, high = array.view(np.uint8).reshape(-1, 2).T
    assert low[-1000:].tobytes() in chunk
    assert (high[-1000:].tobytes() in chunk) is not squeezed
    assert zlib.decompress(chunk) == low.tobytes() + high.tobytes()


def test_chunks_are_even_parts_of_one_channel():
    assert chunks.chunk_shape((2, 200, 200, 326)) == (1, 40, 40, 37)
    assert chunks.chunk_shape((1, 10, 40, 41)) == (1, 10, 40, 21)
    assert chunks.chunk_shape((2, 200, 326)) == (1, 200, 326)


@given(st.integers(1, 2000))
def test_few_even_chunks_leave_little_over(length):
    edge = chunks.chunk_shape((1, length, 1, 1))[1]
    n_chunks = -(-length // edge)
    assert edge <= chunks.PATCH_EDGE
    assert n_chunks == -(-length // chunks.PATCH_EDGE)
    assert n_chunks * edge - length < n_chunks


def test_blosc_without_its_package_is_a_wrong_argument_that_names_it(monkeypatch, capsys):
    monkeypatch.setattr(chunks.importlib.util, "find_spec", lambda name: None)
    parser = cli.make_parser("p", "")
    missing = chunks.missing_packages()
    cli.add_compression_option(parser, chunks.COMPRESSIONS, missing, chunks.COMPRESSIONS_MEAN)
    assert parser.parse_args([]).compression == "gzip"
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--compression", "blosc"])
    assert ended.value.code == 2
    assert "pip install hdf5plugin" in capsys.readouterr().err
