"""Killed, interrupted, out of disk, two at once: the output is absent, old or complete.

Every stage runs in a forked process of its own group, is killed at seeded random moments, and run
again. TUMORVOLUME_STRESS multiplies the number of kills.
"""

import csv
import errno
import fcntl
import locale
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
from stages import (
    N_STUDIES,
    PATIENCE_S,
    STAGES,
    Files,
    Run,
    Stage,
    before_only,
    contents,
    finished,
    finished_parts,
    members,
    n_to_compute,
    prepared,
    restore,
    run_uninterrupted,
    start,
    wait_for_orphans,
    with_other_options,
    write_inputs,
)

import mergeh5

STRESS = int(os.environ.get("TUMORVOLUME_STRESS", "1"))
KILLS = 15 * STRESS
INTERRUPTIONS = 5 * STRESS
PAGE = resource.getpagesize()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills by /proc, mounts tmpfs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def uninterrupted(inputs) -> dict[str, tuple[Files, Files, float]]:
    return run_uninterrupted(inputs)


# --- kill -9 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(KILLS))
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.timeout(PATIENCE_S * 4)
def test_killed_at_a_random_moment(name, number, inputs, uninterrupted, tmp_path):
    stage = STAGES[name]
    old, new, duration_s = uninterrupted[name]
    rng = random.Random(f"{name} {number}")
    victim = rng.choice(["parent", "worker", "group"])
    before = rng.choice([{}, old])
    folder = prepared(inputs, tmp_path / "run", before)
    output = Path(stage.output).name

    run = start(stage.main, stage.command(), folder)
    time.sleep(rng.uniform(0, duration_s))
    workers = members(run.pid)[1:]
    if victim == "parent":
        os.kill(run.pid, signal.SIGKILL)
    elif victim == "group":
        os.killpg(run.pid, signal.SIGKILL)
    elif workers:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(workers), signal.SIGKILL)
    finished(run)
    found = contents(folder / "out")

    if victim == "worker":
        assert run.status in (0, 1, 3), run.stderr
        # One that drew a study for the report takes no study along.
        told = [line for line in run.stderr.splitlines() if "is not shown" not in line]
        failed = sum("the worker process was killed" in line for line in told)
        assert (failed > 0) == (run.status != 0), run.stderr
        if run.status == 1:
            assert found.get(output) == before.get(output)
        listed = found.get(f"{Path(output).stem}_failed.csv", b"").decode()
        if run.status == 3 and name != "createproject":
            assert listed.count("the worker process was killed") == failed == 1
    else:
        assert found.get(output) in (before.get(output), new[output])

    done = finished_parts(folder, stage)
    again = finished(start(stage.main, stage.command("-v"), folder))
    assert again.status == 0, again.stderr
    wait_for_orphans(run.pid)
    assert contents(folder / "out") == {**before_only(before, new), **new}
    if name != "mergeh5":
        done_before = N_STUDIES if found.get(output) == new[output] else len(done)
        assert n_to_compute(again.stderr) <= n_studies(stage, inputs) - min(
            done_before, n_studies(stage, inputs)
        )


def n_studies(stage: Stage, inputs: Path) -> int:
    if stage.name == "project_2d":
        with h5py.File(inputs / "a.h5") as file:
            return len(file["image"])
    return N_STUDIES


def test_a_rerun_computes_only_what_an_interrupted_one_had_not_finished(inputs, tmp_path):
    stage = STAGES["preprocessing"]
    folder = prepared(inputs, tmp_path / "run")
    run = start(stage.main, stage.command("-j", "1"), folder)
    deadline = time.monotonic() + PATIENCE_S
    while len(finished_parts(folder, stage)) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(run.pid, signal.SIGKILL)
    finished(run)
    n_parts = len(finished_parts(folder, stage))
    assert 2 <= n_parts < N_STUDIES
    again = finished(start(stage.main, stage.command("-v"), folder))
    assert n_to_compute(again.stderr) == N_STUDIES - n_parts
    assert f"resuming: {n_parts} studies are finished already" in again.stderr


def test_parts_of_other_options_are_not_trusted_and_are_removed(inputs, uninterrupted, tmp_path):
    stage = STAGES["preprocessing"]
    folder = prepared(inputs, tmp_path / "run")
    run = start(stage.main, with_other_options(stage), folder)
    deadline = time.monotonic() + PATIENCE_S
    while not finished_parts(folder, stage) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(run.pid, signal.SIGKILL)
    finished(run)
    assert finished_parts(folder, stage)
    again = finished(start(stage.main, stage.command("-v"), folder))
    assert n_to_compute(again.stderr) == N_STUDIES
    assert contents(folder / "out") == uninterrupted["preprocessing"][1]


# --- SIGINT and SIGTERM -----------------------------------------------------------------------


@pytest.mark.parametrize("number", range(INTERRUPTIONS))
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.timeout(PATIENCE_S * 4)
def test_interrupted_or_terminated_at_a_random_moment(
    name, number, inputs, uninterrupted, tmp_path
):
    stage = STAGES[name]
    _, new, duration_s = uninterrupted[name]
    rng = random.Random(f"signal {name} {number}")
    sent = rng.choice([signal.SIGINT, signal.SIGTERM])
    send = rng.choice([os.kill, os.killpg])
    folder = prepared(inputs, tmp_path / "run")
    run = start(stage.main, stage.command(), folder)
    wait_for_handlers(run)
    time.sleep(rng.uniform(0, duration_s))
    with suppress(ProcessLookupError):
        send(run.pid, sent)
    finished(run)
    # One that comes after the end, when handlers are as before, ends the process at once.
    came_after = run.status == -sent and run.stdout != ""
    assert came_after or run.status in (0, {signal.SIGINT: 130, signal.SIGTERM: 143}[sent])
    if run.status and not came_after:
        assert run.stdout == ""
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[sent]
        assert run.stderr.splitlines()[-1] == (
            f"error: {word}: finished studies are kept, the same command goes on from there"
        )
    wait_for_orphans(run.pid)
    again = finished(start(stage.main, stage.command(), folder))
    assert again.status == 0, again.stderr
    assert contents(folder / "out") == new


def wait_for_handlers(run: Run) -> None:
    """Wait until a run handles its signals itself: until then they are the shell's affair."""
    deadline = time.monotonic() + PATIENCE_S
    terminating = 1 << (signal.SIGTERM - 1)
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{run.pid}/status").read_text()
        except OSError:
            return
        caught = re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)
        if "\nState:\tZ" in status or (caught and int(caught[1], 16) & terminating):
            return
        time.sleep(0.001)


def test_an_impatient_second_signal_is_no_traceback(inputs, tmp_path):
    stage = STAGES["preprocessing"]
    for number in range(5):
        folder = prepared(inputs, tmp_path / str(number))
        run = start(stage.main, stage.command(), folder)
        wait_for_handlers(run)
        time.sleep(0.1)
        said = folder / "log/stderr"
        for _ in range(20):
            # Handlers are as before then; a signal is this test's own affair.
            if "interrupted" in said.read_text():
                break
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGINT)
            time.sleep(0.002)
        assert finished(run).status in (0, 130)


# --- no room ----------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a small file system on a folder; yield what mounts it anew with other options."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(
            ["mount", "-o", f"remount,{options}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def one_clear_line(run: Run, reason: str) -> None:
    """The run said why it could not go on, in one line, and nothing else."""
    assert run.status == 1
    assert run.stdout == ""
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert reason in last
    assert sum(line.startswith("error: ") for line in run.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.timeout(PATIENCE_S * 4)
def test_full_disk(name, inputs, uninterrupted, tmp_path):
    stage = STAGES[name]
    old, new, _ = uninterrupted[name]
    output = Path(stage.output).name
    folder = prepared(inputs, tmp_path / "run")
    rng = random.Random(f"disk {name}")
    enough = 2 * sum(map(len, new.values())) + PAGE * len(new)
    n_refused = 0
    with mounted(folder / "out", "16m"):
        for _ in range(4 * STRESS):
            restore(old, folder / "out")
            filler = folder / "out" / "filler"
            space = os.statvfs(folder / "out")
            filler.write_bytes(bytes(space.f_bavail * PAGE - rng.randrange(0, enough)))
            run = finished(start(stage.main, stage.command(), folder))
            filler.unlink()
            found = contents(folder / "out")
            if run.status == 0:
                assert found[output] == new[output]
                continue
            n_refused += 1
            one_clear_line(run, "cannot be written: the disk is full: make room, and run again")
            assert found[output] == old[output]
            assert all(p in {**old, **new} or p.startswith(f"{output}.parts/") for p in found)
            assert finished(start(stage.main, stage.command(), folder)).status == 0
            assert contents(folder / "out") == {**before_only(old, new), **new}
    assert n_refused


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.timeout(PATIENCE_S * 4)
def test_file_size_limit(name, inputs, uninterrupted, tmp_path):
    stage = STAGES[name]
    _, new, _ = uninterrupted[name]
    output = Path(stage.output).name
    folder = prepared(inputs, tmp_path / "run")
    size = len(new[output])
    for limit in (0, 100, size // (2 * N_STUDIES), size // 2, size - 1):
        run = start(
            stage.main,
            stage.command(),
            folder,
            lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        finished(run)
        if limit < PAGE:
            # The limit is on the log too, and on what worker processes share.
            assert run.status == 1
        else:
            one_clear_line(run, "cannot be written: the file-size limit is reached: raise it")
        assert output not in contents(folder / "out")
    assert finished(start(stage.main, stage.command(), folder)).status == 0
    assert contents(folder / "out") == new


@pytest.mark.parametrize("name", STAGES)
def test_read_only_folder(name, inputs, uninterrupted, tmp_path):
    stage = STAGES[name]
    _, new, _ = uninterrupted[name]
    folder = prepared(inputs, tmp_path / "run")
    with mounted(folder / "out", "16m") as remount:
        restore(new, folder / "out")
        remount("ro")
        one_clear_line(finished(start(stage.main, stage.command(), folder)), "Read-only file")
        one_clear_line(
            finished(start(stage.main, stage.command("--no-lock", "--force"), folder)),
            "the file system is read-only",
        )
        assert contents(folder / "out") == new


# --- two at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_a_second_run_stops_at_once_and_says_who_is_first(name, inputs, uninterrupted, tmp_path):
    stage = STAGES[name]
    folder = prepared(inputs, tmp_path / "run")
    lock = folder / f"{stage.output}.lock"
    first = start(stage.main, stage.command(), folder)
    deadline = time.monotonic() + PATIENCE_S
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGSTOP)
    shutil.copytree(folder / "log", folder / "log_of_first")
    second = finished(start(stage.main, stage.command("--force"), folder))
    one_clear_line(second, f"another run writes this output (process {first.pid} on ")
    os.killpg(first.pid, signal.SIGCONT)
    assert finished(first).status == 0
    assert contents(folder / "out") == uninterrupted[name][1]


def test_a_stale_lock_file_is_no_lock(inputs, uninterrupted, tmp_path):
    stage = STAGES["mergeh5"]
    folder = prepared(inputs, tmp_path / "run")
    for text in ("", "process 1 on elsewhere\n", f"process {os.getpid()} on here\n", "\0\xff"):
        (folder / f"{stage.output}.lock").write_text(text)
        assert finished(start(stage.main, stage.command("--force"), folder)).status == 0
    assert contents(folder / "out") == uninterrupted["mergeh5"][1]


def test_a_reader_of_the_old_output_goes_on_reading_it(inputs, uninterrupted, tmp_path):
    stage = STAGES["project_2d"]
    old, new, _ = uninterrupted["project_2d"]
    folder = prepared(inputs, tmp_path / "run", old)
    with h5py.File(folder / stage.output) as reader:
        keys = sorted(reader["image"])
        first = reader["image"][keys[0]][()]
        assert finished(start(stage.main, stage.command(), folder)).status == 0
        assert sorted(reader["image"]) == keys
        np.testing.assert_array_equal(reader["image"][keys[0]][()], first)
        assert all(np.isfinite(reader["image"][key][()]).all() for key in keys)
    assert (folder / stage.output).read_bytes() == new["mips.h5"]


def test_an_output_that_is_open_for_writing_elsewhere_can_be_read(inputs, uninterrupted, tmp_path):
    stage = STAGES["project_2d"]
    folder = prepared(inputs, tmp_path / "run", uninterrupted["project_2d"][1])
    code = f"import h5py; f = h5py.File({stage.output!r}, 'r+'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as notebook:
        notebook.stdout.readline()
        run = finished(start(stage.main, stage.command(), folder))
        notebook.communicate(b"\n")
    assert (run.status, run.stderr) == (0, "")
    assert ": 0 written, " in run.stdout


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(number, inputs, uninterrupted, tmp_path):
    stage = STAGES["mergeh5"]
    folder = prepared(inputs, tmp_path / "run")

    def take_locks_away():
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        fcntl.flock = flock

    run = finished(start(stage.main, stage.command(), folder, take_locks_away))
    one_clear_line(run, "the file system has no locks")
    assert "--no-lock" in run.stderr
    assert contents(folder / "out") == {}
    run = finished(start(stage.main, stage.command("--no-lock"), folder, take_locks_away))
    assert run.status == 0
    assert contents(folder / "out") == uninterrupted["mergeh5"][1]


# --- night after night ------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_a_rerun_with_nothing_new_prints_one_line_and_touches_nothing(
    name, inputs, uninterrupted, tmp_path
):
    stage = STAGES[name]
    folder = prepared(inputs, tmp_path / "run", uninterrupted[name][1])
    before = {path: path.stat() for path in sorted((folder / "out").rglob("*"))}
    (folder / "out").chmod(0o755)
    run = finished(start(stage.main, stage.command(), folder))
    assert (run.status, run.stderr) == (0, "")
    assert re.fullmatch(
        rf"\d studies: 0 written, \d unchanged, 0 skipped, 0 failed -> {stage.output}\n", run.stdout
    )
    after = {path: path.stat() for path in sorted((folder / "out").rglob("*"))}
    assert after.keys() == before.keys()
    for path, status in before.items():
        if path.is_file():
            assert (after[path].st_ino, after[path].st_mtime_ns) == (
                status.st_ino,
                status.st_mtime_ns,
            ), path


def test_a_new_a_changed_and_a_vanished_study(inputs, tmp_path):
    stage = STAGES["createproject"]
    folder = prepared(inputs, tmp_path / "run")
    (folder / "raw").unlink()
    shutil.copytree(inputs / "raw", folder / "raw")

    def closing_line() -> str:
        run = finished(start(stage.main, stage.command(), folder))
        return run.stdout + run.stderr

    end = "0 skipped, 0 failed -> out/p.zip\n"
    n, one_more = N_STUDIES, N_STUDIES + 1
    assert closing_line() == f"{n} studies: {n} written, 0 unchanged, {end}"
    shutil.copytree(folder / "raw/patient0", folder / "raw/patient9")
    shutil.rmtree(folder / "raw/patient9/study1")
    assert closing_line() == f"{one_more} studies: 1 written, {n} unchanged, {end}"
    os.utime(folder / "raw/patient9/study0/ct.nii.gz", ns=(1, 1))
    assert closing_line() == f"{one_more} studies: 1 written, {n} unchanged, {end}"
    shutil.rmtree(folder / "raw/patient9")
    said = closing_line()
    assert said.startswith(f"{n} studies: 0 written, {n} unchanged, {end}")
    assert "1 study of the old output is no longer in the input and stays out" in said
    assert closing_line() == f"{n} studies: 0 written, {n} unchanged, {end}"


def test_an_incomplete_study_is_told_of_once(inputs, tmp_path):
    stage = STAGES["createproject"]
    folder = prepared(inputs, tmp_path / "run")
    (folder / "raw").unlink()
    shutil.copytree(inputs / "raw", folder / "raw")
    (folder / "raw/patient0/study0/mask.nii.gz").unlink()
    first = finished(start(stage.main, stage.command(), folder))
    assert "skipped, no mask" in first.stderr
    second = finished(start(stage.main, stage.command(), folder))
    assert (second.status, second.stderr) == (0, "")
    assert second.stdout == (
        f"{N_STUDIES} studies: 0 written, {N_STUDIES - 1} unchanged, 1 skipped, 0 failed"
        " -> out/p.zip\n"
    )


def test_an_option_of_value_recomputes_all_and_force_starts_afresh(inputs, uninterrupted, tmp_path):
    stage = STAGES["preprocessing"]
    old, new, _ = uninterrupted["preprocessing"]
    folder = prepared(inputs, tmp_path / "run", old)
    for more in ((), ("--force",)):
        run = finished(start(stage.main, stage.command("-v", *more), folder))
        assert n_to_compute(run.stderr) == N_STUDIES
        assert contents(folder / "out") == new


def test_failed_studies_are_listed_until_they_are_mended(inputs, tmp_path):
    stage = STAGES["preprocessing"]
    folder = prepared(inputs, tmp_path / "run")
    (folder / "p.zip").unlink()
    whole = (inputs / "p.zip").read_bytes()
    at = whole.index(b"_ct.nii.gz") + 200
    (folder / "p.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for _ in range(2):
        run = finished(start(stage.main, stage.command(), folder))
        assert run.status == 3
        with open(folder / "out/p_failed.csv", newline="") as stream:
            [row] = csv.DictReader(stream)
        assert row["stage"] == "preprocessing"
        assert f"error: {row['hash']}: {row['reason']}\n" in run.stderr
    (folder / "p.zip").write_bytes(whole)
    assert finished(start(stage.main, stage.command(), folder)).status == 0
    assert not (folder / "out/p_failed.csv").exists()


# --- the same bytes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["createproject", "preprocessing", "project_2d"])
def test_any_number_of_jobs_gives_the_same_bytes(name, inputs, uninterrupted, tmp_path):
    stage = STAGES[name]
    for jobs in ("1", "4"):
        folder = prepared(inputs, tmp_path / jobs)
        assert finished(start(stage.main, stage.command("-j", jobs), folder)).status == 0
        assert contents(folder / "out") == uninterrupted[name][1]


@pytest.mark.parametrize("name", ["preprocessing", "project_2d"])
def test_shards_are_disjoint_complete_and_merge_to_the_same_bytes(
    name, inputs, uninterrupted, tmp_path
):
    stage = STAGES[name]
    folder = prepared(inputs, tmp_path / "run")
    whole = folder / stage.output
    assert finished(start(stage.main, stage.command(), folder)).status == 0
    n_shards = 3
    shards, keys = [], []
    for number in range(1, n_shards + 1):
        shards.append(f"out/shard{number}.h5")
        command = [*stage.command("--shard", f"{number}/{n_shards}"), "-o", shards[-1]]
        assert finished(start(stage.main, command, folder)).status == 0
        with h5py.File(folder / shards[-1]) as file:
            keys += sorted(file["image"])
    with h5py.File(whole) as file:
        assert sorted(keys) == sorted(file["image"])
    for order in (shards, shards[::-1], [shards[1], shards[2], shards[0]]):
        run = finished(start(mergeh5.main, [*order, "-o", "out/merged.h5", "--force"], folder))
        assert run.status == 0, run.stderr
        assert (folder / "out/merged.h5").read_bytes() == whole.read_bytes()


ENVIRONMENTS = {
    "another hash seed and time zone": {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu"},
    "no locale": {"PYTHONHASHSEED": "2", "TZ": "America/St_Johns", "LC_ALL": "C", "LANG": "C"},
    "Turkish, where I is not i": {"LC_ALL": "tr_TR.UTF-8"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_hash_seed_locale_time_zone_and_folder_change_no_byte(
    environment, inputs, uninterrupted, tmp_path
):
    """The scripts as they are run from a shell."""
    variables = ENVIRONMENTS[environment]
    if "LC_ALL" in variables and not has_locale(variables["LC_ALL"]):
        pytest.skip(f"this machine has no locale {variables['LC_ALL']}")
    for name, stage in STAGES.items():
        folder = prepared(inputs, tmp_path / name)
        run = subprocess.run(
            [sys.executable, Path(sys.modules[name].__file__), *stage.command()],
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert contents(folder / "out") == uninterrupted[name][1]


def has_locale(name: str) -> bool:
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        return False
    finally:
        locale.setlocale(locale.LC_ALL, before)
    return True
