"""Runs that end otherwise than by themselves: terminals that close, pauses, readers that leave.

Whatever ends or stops a run: the output is absent, old or complete, workers end with their parent
and hold no lock, and the next run ends well.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages import (
    PATIENCE_S,
    STAGES,
    Files,
    Run,
    before_only,
    contents,
    finished,
    members,
    prepared,
    run_uninterrupted,
    start,
    write_inputs,
)

ENDS_WITHIN_S = 10.0
"""How long workers may outlive their parent, with a machine that has much else to do."""

pytestmark = pytest.mark.timeout(PATIENCE_S * 4)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def uninterrupted(inputs) -> dict[str, tuple[Files, Files, float]]:
    return run_uninterrupted(inputs)


def wait_for_workers(run: Run, parts: Path) -> None:
    """Wait until a run has begun its work, or has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if not members(run.pid) or (parts.is_dir() and len(members(run.pid)) > 1):
            return
        time.sleep(0.002)


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGKILL], ids=["SIGHUP", "SIGKILL"])
@pytest.mark.parametrize("name", STAGES)
def test_workers_end_with_a_parent_that_is_gone(name, sent, inputs, uninterrupted, tmp_path):
    """A terminal that closes, or the parent alone killed."""
    stage = STAGES[name]
    old, new, duration_s = uninterrupted[name]
    folder = prepared(inputs, tmp_path / "run", old)
    output = folder / stage.output
    run = start(stage.main, stage.command(), folder)
    if stage.jobs:
        wait_for_workers(run, output.with_name(f"{output.name}.parts"))
    else:
        time.sleep(duration_s / 2)
    os.kill(run.pid, sent)
    assert finished(run).status in (-sent, 0)
    deadline = time.monotonic() + ENDS_WITHIN_S
    while members(run.pid) or is_locked(output.with_name(f"{output.name}.lock")):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)
    left = contents(folder / "out")
    assert left.get(output.name) in (old[output.name], new[output.name])
    time.sleep(0.2)
    assert contents(folder / "out") == left
    assert finished(start(stage.main, stage.command(), folder)).status == 0
    assert contents(folder / "out") == {**before_only(old, new), **new}


@pytest.mark.parametrize("who", ["the run", "a worker"])
@pytest.mark.parametrize("name", [name for name in STAGES if STAGES[name].jobs])
def test_a_pause_is_no_end(name, who, inputs, uninterrupted, tmp_path):
    """Ctrl-Z, a laptop that sleeps, a scheduler that suspends jobs."""
    stage = STAGES[name]
    folder = prepared(inputs, tmp_path / "run")
    output = folder / stage.output
    run = start(stage.main, stage.command(), folder)
    wait_for_workers(run, output.with_name(f"{output.name}.parts"))
    processes = members(run.pid)
    paused = processes if who == "the run" else processes[1:2]
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.0)
    for pid in paused:
        os.kill(pid, signal.SIGCONT)
    assert finished(run).status == 0, run.stderr
    assert contents(folder / "out") == uninterrupted[name][1]


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
@pytest.mark.parametrize("limit", [300_000_000, 1_500_000_000])
@pytest.mark.parametrize("name", STAGES)
def test_little_address_space_ends_a_run_in_one_line(name, limit, inputs, uninterrupted, tmp_path):
    """In 300 MB OpenBLAS tried for ever to get its memory."""
    stage = STAGES[name]
    folder = prepared(inputs, tmp_path / "run")
    script = Path(stage.main.__globals__["__file__"])
    command = ["prlimit", f"--as={limit}", sys.executable, str(script), *stage.command()]
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=folder, env=one_thread, capture_output=True, text=True, timeout=PATIENCE_S
    )
    left = contents(folder / "out")
    if run.returncode == 0:
        assert left == uninterrupted[name][1]
    else:
        assert (run.returncode, left.get(Path(stage.output).name)) == (1, None)
        [line] = run.stderr.splitlines()
        assert line.startswith("error: this process may address 300 MB, which is too little")
    assert (run.returncode == 1) == (limit < 400_000_000)


def without_reader() -> None:
    """Make stdout a pipe that nobody reads, as ``| head -0`` does."""
    receiver, sender = os.pipe()
    os.close(receiver)
    os.dup2(sender, 1)


def closed() -> None:
    os.close(1)


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize("prepare", [without_reader, closed, full])
@pytest.mark.parametrize("name", STAGES)
def test_a_closing_line_that_nobody_reads_is_no_error(
    name, prepare, inputs, uninterrupted, tmp_path
):
    stage = STAGES[name]
    folder = prepared(inputs, tmp_path / "run")
    run = finished(start(stage.main, stage.command(), folder, prepare))
    assert run.status == 0, run.stderr
    assert contents(folder / "out") == uninterrupted[name][1]
