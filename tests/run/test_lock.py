"""The lease beside the kernel's lock: two machines, of which each sees its own locks alone."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from project_zips import study_images, write_zip
from tiny_studies import GRID

import preprocessing
from common.errors import StageError
from common.run import lock as locks
from common.run import output as outputs
from common.run.lock import confirm_lease, lock_file, locked
from common.run.output import exclusive, replace_output
from common.run.pool import in_own_process

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def output(tmp_path, monkeypatch) -> Path:
    """An output where locks hold nothing back, and signs of life are frequent."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    monkeypatch.setattr(locks, "_BEAT_S", 0.05)
    monkeypatch.setattr(locks, "_LEASE_S", 1.0)
    on_machine("one", monkeypatch)
    return tmp_path / "out.h5"


def on_machine(name: str, monkeypatch) -> None:
    monkeypatch.setattr(locks, "_machine", lambda: name)


@pytest.mark.parametrize("lock", [True, False])
def test_a_living_run_on_another_machine_is_named(lock, output, monkeypatch):
    with locked(output, lock=lock):
        on_machine("two", monkeypatch)
        expected = rf"another run writes this output \(process {os.getpid()} on \S+\): wait"
        with pytest.raises(StageError, match=expected):
            locked(output, lock=lock).__enter__()
        confirm_lease(output)
    assert list(output.parent.iterdir()) == []


def test_a_dead_run_on_another_machine_is_waited_for_and_said(output, caplog):
    (output.parent / "out.h5.lock").write_text("process 7 on node7\nof elsewhere\n")
    begin = time.monotonic()
    with locked(output):
        assert time.monotonic() - begin > 1.0
    first, second = caplog.messages
    assert "process 7 on node7 may be writing this output: waiting for a sign of life" in first
    assert "there was none in 1 s: it is dead" in second


@pytest.mark.parametrize("text", ["", "process 7 on node7\n", "\0\xff", "of elsewhere\n"])
def test_a_lock_file_that_tells_no_machine_is_not_waited_for(text, output, monkeypatch):
    (output.parent / "out.h5.lock").write_text(text)
    monkeypatch.setattr(locks, "_LEASE_S", 1000.0)
    with locked(output):
        pass


def test_without_locks_a_dead_run_of_this_machine_is_not_waited_for(output, monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    told = f"process {ended.pid} on here\nof one {os.readlink('/proc/self/ns/pid')}\n"
    (output.parent / "out.h5.lock").write_text(told)
    monkeypatch.setattr(locks, "_LEASE_S", 1000.0)
    with locked(output, lock=False):
        pass


def test_without_locks_a_file_that_was_made_an_instant_ago_is_another_run_s(output, caplog):
    """Of eight that began at once several held it."""
    lock_file(output).touch()
    with locked(output, lock=False):
        pass
    assert "there was none in 1 s: it is dead" in caplog.messages[1]


def test_signs_of_life_are_shown_while_a_large_output_reaches_the_disk(output, monkeypatch):
    monkeypatch.setattr(outputs, "sync", lambda path: time.sleep(0.3))
    shown = []

    def look(path: Path) -> None:
        shown.append(lock_file(output).stat().st_mtime_ns)

    with exclusive(output):
        look(output)
        replace_output(output, lambda path, sources: path.touch(), {}, look)
    assert shown[1] > shown[0]
    assert output.exists()


def test_without_locks_a_run_in_another_container_may_live_though_no_process_has_its_number(
    output, monkeypatch, caplog
):
    monkeypatch.setattr(locks, "_numbering_of_processes", lambda: "pid:[1]")
    ended = subprocess.Popen(["true"])
    ended.wait()
    (output.parent / "out.h5.lock").write_text(f"process {ended.pid} on here\nof one pid:[2]\n")
    with locked(output, lock=False):
        pass
    assert "may be writing this output: waiting for a sign of life" in caplog.messages[0]


def test_a_run_with_locks_leaves_the_lease_of_one_without(output, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(output, lock=False):
        with pytest.raises(StageError, match="add --no-lock"):
            locked(output).__enter__()
        confirm_lease(output)
    with pytest.raises(StageError, match="add --no-lock"):
        locked(output).__enter__()
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("lock", [True, False])
def test_a_lock_file_that_is_a_link_is_not_followed_and_said(lock, output):
    (output.parent / "other").write_text("of someone")
    lock_file(output).symlink_to("other")
    with pytest.raises(StageError, match=r"out\.h5\.lock: cannot be opened \(.*\): .* delete"):
        locked(output, lock=lock).__enter__()
    assert (output.parent / "other").read_text() == "of someone"


def test_a_suspended_run_that_wakes_sweeps_no_file_of_the_other(output, monkeypatch):
    """With nothing new it replaces nothing, but removes what its index does not lead to."""
    archive, store = output.parent / "p.zip", output.parent / "store"
    write_zip(archive, {"0000000001": study_images(1)})
    words = [str(archive), "-o", str(output), *GRID, "-j", "1", "--store", str(store)]
    assert preprocessing.main(words) == 0
    new = store / "ab" / f"0000000002.{'0' * 16}.h5"

    def taken_over_meanwhile(*arguments):
        new.parent.mkdir()
        new.touch()
        lock_file(output).write_text("process 8 on node8\nof two\n")
        return run_stage(*arguments[:2])

    run_stage = preprocessing.stage.run_stage
    monkeypatch.setattr(preprocessing.stage, "run_stage", lambda *a, **b: taken_over_meanwhile(*a))
    assert preprocessing.main(words) == 1
    assert new.exists()


def test_a_run_that_was_taken_for_dead_replaces_nothing_and_leaves_the_lock(output):
    other = "process 8 on node8\nof two\n"
    with locked(output):
        (output.parent / "out.h5.lock").write_text(other)
        with pytest.raises(StageError, match=r"another run on it \(process 8 on node8\) has taken"):
            confirm_lease(output)
    assert (output.parent / "out.h5.lock").read_text() == other


ON_A_MACHINE = """
import fcntl, sys
sys.path.insert(0, {root!r})
fcntl.flock = lambda descriptor, operation: None
from common.run import lock
lock._machine, lock._BEAT_S, lock._LEASE_S = (lambda: {name!r}), 0.1, 1.0
import preprocessing
sys.exit(preprocessing.main(sys.argv[1:]))
"""


def test_a_suspended_run_and_one_on_another_machine_make_one_whole_output(tmp_path):
    write_zip(tmp_path / "p.zip", {f"{seed:010x}": study_images(seed) for seed in range(8)})
    whole = tmp_path / "whole.h5"
    assert preprocessing.main([str(tmp_path / "p.zip"), "-o", str(whole), *GRID, "-j", "1"]) == 0

    def start(name: str) -> subprocess.Popen[str]:
        code = ON_A_MACHINE.format(root=str(ROOT), name=name)
        words = [sys.executable, "-c", code, "p.zip", "-o", "p_3d.h5", *GRID, "-j", "1"]
        return subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    first = start("one")
    while not list(tmp_path.glob("p_3d.h5.parts/*.h5")):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGSTOP)
    second = start("two")
    told = second.communicate()[1]
    assert f"process {first.pid} on" in told
    assert "there was none in 1 s: it is dead" in told
    assert second.returncode == 0
    os.kill(first.pid, signal.SIGCONT)
    said = first.communicate()[1]
    assert first.returncode == 1
    assert said.count("error: ") == 1
    assert (tmp_path / "p_3d.h5").read_bytes() == whole.read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("p_3d"))
    assert set(left) <= {"p_3d.h5", "p_3d.h5.parts"}


def test_signs_of_life_come_from_no_thread_or_process_but_from_waiting(output):
    """Forks of a process with a thread died on an emulated processor."""
    before = threading.active_count(), multiprocessing.active_children()
    with locked(output):
        assert (threading.active_count(), multiprocessing.active_children()) == before
        path = lock_file(output)
        shown = path.stat().st_mtime_ns
        in_own_process(time.sleep, 0.3)
        assert path.stat().st_mtime_ns > shown
