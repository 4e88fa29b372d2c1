"""Each call of the system that a run reads or writes files by fails once: nothing is lost.

strace makes the N-th call of a kind fail in a run of each script, one N after the other, in the
parent and in its workers. The output is absent, old or complete; what is wrong is said in one
line; the next run ends well. A sample of the points is tried; TUMORVOLUME_FAULTS=all tries all of
them, and prints what became of each (pytest -s).
"""

import ctypes
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from stages import (
    PATIENCE_S,
    STAGES,
    Files,
    Run,
    Stage,
    before_only,
    contents,
    finished,
    prepared,
    run_uninterrupted,
    start,
    wait_for_orphans,
    write_inputs,
)

EVERY = os.environ.get("TUMORVOLUME_FAULTS") == "all"
SAMPLE = 5
"""Points of each script that are tried where not all are."""

CALLS = ("write", "pwrite64", "fsync", "rename", "ftruncate", "openat", "flock", "mkdir", "unlink")
ERRORS = ("EIO", "ENOSPC", "EINTR")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
    pytest.mark.timeout(PATIENCE_S * (200 if EVERY else 10)),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def uninterrupted(inputs) -> dict[str, tuple[Files, Files, float]]:
    return run_uninterrupted(inputs)


# --- a run under strace ----------------------------------------------------------------------


def wait_for_tracer() -> None:
    """Let any process trace this one, and stop until one does and lets it go on."""
    set_tracer, any_process = 0x59616D61, -1  # PR_SET_PTRACER of prctl(2)
    ctypes.CDLL(None).prctl(set_tracer, any_process, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


def traced(stage: Stage, folder: Path, *rules: str) -> tuple[Run, list[str]]:
    """Run a script under strace from its first own call; return its end and the calls it made."""
    log = folder / "strace"
    run = start(stage.main, command_of(stage), folder, wait_for_tracer)
    os.waitpid(run.pid, os.WUNTRACED)
    command = ["strace", "-f", "-y", "-qq", "-s", "0", "-o", str(log), *rules, "-p", str(run.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        while not is_traced(run.pid):
            if tracer.poll() is not None:
                os.kill(run.pid, signal.SIGKILL)
                pytest.skip(f"strace may not trace here: {tracer.stderr.read().strip()}")
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGCONT)
        finished(run)
        # Workers end after their parent where it failed.
        wait_for_orphans(run.pid)
    return run, log.read_text().splitlines()


def is_traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return re.search(r"^TracerPid:\t[1-9]", status, re.MULTILINE) is not None


def command_of(stage: Stage) -> list[str]:
    """Return a command with one worker: its calls come in the same order each time."""
    return stage.command(*(["-j", "1"] if stage.jobs else []))


@dataclass(frozen=True)
class Point:
    """The N-th call of a kind in each process, its error, and whether there is an output."""

    call: str
    number: int
    error: str
    has_output: bool

    @property
    def rules(self) -> tuple[str, str]:
        rule = f"--inject={self.call}:error={self.error}:when={self.number}"
        return f"--trace={self.call}", rule


def points(stage: Stage, whole: Path) -> list[Point]:
    """Return all points, or a sample, where each process that comes so far is at a file of the run.

    Elsewhere they would fail at Python's own files, and at pipes, of every new worker.
    """
    run, lines = traced(stage, whole, f"--trace={','.join(CALLS)}")
    assert run.status == 0, run.stderr
    counts: Counter[tuple[str, str]] = Counter()
    here, elsewhere = set(), set()
    for process, call, rest in re.findall(r"^(\d+) +(\w+)\((.*)", "\n".join(lines), re.MULTILINE):
        counts[process, call] += 1
        paths = re.sub(r"^AT_FDCWD<[^>]*>", "", rest)
        is_here = str(whole.parents[1]) in paths
        (here if is_here else elsewhere).add((call, counts[process, call]))
    tried = itertools.product(sorted(here - elsewhere), ERRORS)
    found = [Point(*place, error, k % 2 == 1) for k, (place, error) in enumerate(tried)]
    if EVERY:
        return found
    choose = random.Random(stage.name)
    calls = choose.sample(sorted({point.call for point in found}), SAMPLE)
    return [choose.choice([point for point in found if point.call == call]) for call in calls]


# --- what must hold --------------------------------------------------------------------------


def complaint(stage: Stage, run: Run, lines: list[str], before: Files, new: Files) -> str:
    """Return what is wrong with how a run ended; empty where all is well."""
    output = Path(stage.output).name
    found = contents(run.folder / "out").get(output)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    met = [line for line in lines if "(INJECTED)" in line]
    # What is said there is lost; what pipes and semaphores do is no matter of files.
    elsewhere = any(f"{run.folder}/log/" in line or str(run.folder) not in line for line in met)
    fatal = [line for line in errors if not re.match(r"error: [0-9a-f]{10}: ", line)]
    if run.status not in (0, 1, 3):
        return f"status {run.status}"
    if run.status == 0 and found != new[output]:
        return "the output is not complete, though the run ended well"
    if run.status == 1 and found != before.get(output):
        return "the output is not as it was, though the run said so"
    if elsewhere:
        return ""
    if bool(errors) != bool(run.status):
        return f"status {run.status} and {len(errors)} errors"
    if len(fatal) != (run.status == 1):
        return f"{len(fatal)} lines on why the run ended with {run.status}"
    if any("unexpected" in line for line in errors):
        return "an unexpected error"
    return ""


@pytest.mark.parametrize("name", STAGES)
def test_a_call_that_fails_once_loses_nothing(name, inputs, uninterrupted, tmp_path):
    stage = STAGES[name]
    old, new, _ = uninterrupted[name]
    wrong = []
    for point in points(stage, prepared(inputs, tmp_path / "whole")):
        before = old if point.has_output else {}
        folder = prepared(inputs, tmp_path / "run", before)
        run, lines = traced(stage, folder, *point.rules)
        what = complaint(stage, run, lines, before, new)
        again = finished(start(stage.main, command_of(stage), folder))
        if again.status != 0:
            what += f"; the next run ends with {again.status}: {again.stderr.strip()}"
        elif contents(folder / "out") != {**before_only(before, new), **new}:
            what += "; the next run leaves something else"
        shutil.rmtree(folder)
        print(f"{name:13} {point} -> {run.status} {what} {run.stderr.strip().splitlines()[-1:]}")
        if what:
            met = [line for line in lines if "(INJECTED)" in line]
            wrong.append("\n  ".join([f"{point}: {what}", run.stderr.strip(), *met]))
    if wrong:
        pytest.fail(f"{len(wrong)} points:\n" + "\n".join(wrong))
