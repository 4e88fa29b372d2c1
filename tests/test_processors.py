"""The zip is the same, byte for byte, whatever processor it was made on."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_studies import write_raw

SCRIPT = Path(__file__).parents[1] / "createproject.py"
OLD_PROCESSOR = "Nehalem"
"""Of 2008, the oldest that numpy's wheels run on: SSE4.2, no AVX, no FMA."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processors") / "raw"
    write_raw(folder)
    return folder


@pytest.fixture(scope="module")
def zip_of_this_processor(raw):
    return made_zip(raw, "this.zip")


def made_zip(raw, name, *before, **environment):
    output = raw.with_name(name)
    # The worker is a fork: it runs as the command does.
    command = [*before, sys.executable, SCRIPT, raw, "-o", output, "-q", "-j", "1"]
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    return output.read_bytes()


def test_zip_does_not_depend_on_what_numpy_and_blas_find_in_the_processor(
    raw, zip_of_this_processor
):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the names of features are those of x86-64")
    in_use = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    plain = made_zip(
        raw,
        "plain.zip",
        NPY_DISABLE_CPU_FEATURES=" ".join(in_use),
        OPENBLAS_CORETYPE=OLD_PROCESSOR,
    )
    assert plain == zip_of_this_processor


def test_zip_of_an_emulated_processor_without_avx_is_the_same(raw, zip_of_this_processor):
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or platform.machine() != "x86_64":
        pytest.skip("qemu-user is not installed, or this is no x86-64")
    emulated = made_zip(raw, "emulated.zip", emulator, "-cpu", OLD_PROCESSOR)
    assert emulated == zip_of_this_processor
