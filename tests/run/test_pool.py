"""Worker processes: one study's death is one failed study, never a hang, never the run's end."""

import faulthandler
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from common.errors import IncompleteStudy, StageError, StudyError, WorkerCrashed, WorkerKilled
from common.run import engine, machine, pool
from common.run.engine import Engine
from common.run.pool import in_own_process
from common.run.worker import Job, Outcome, Written

ROOT = Path(__file__).parents[2]
GIB = 1 << 30

pytestmark = pytest.mark.timeout(120)


def jobs_of(*payloads) -> list[Job]:
    return [Job(f"study{number}", "", payload) for number, payload in enumerate(payloads)]


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def behave(job):
    """A worker that does as its job says."""
    kind, _, argument = str(job.work).partition(" ")
    if kind == "warn":
        return Written([argument])
    if kind == "sleep":
        time.sleep(float(argument))
    elif kind == "raise":
        raise {
            "StudyError": StudyError("no weight: give one", "private text"),
            "IncompleteStudy": IncompleteStudy("no mask"),
            "StageError": StageError("the disk is full"),
            "MemoryError": MemoryError(),
            "ValueError": ValueError("^".join(("Doe", "Jane"))),
        }[argument]
    elif kind == "signal":
        time.sleep(0.3)
        faulthandler.disable()
        os.kill(os.getpid(), int(argument))
    elif kind == "exit":
        time.sleep(0.3)
        sys.exit(int(argument))
    elif kind == "die_with":
        die_with_lock(argument)
    elif kind == "say":
        print("Doe^Jane")
        os.write(2, b"Doe^Jane")
        warnings.warn("Doe^Jane", stacklevel=1)
        logging.getLogger("pydicom").warning("Doe^Jane")
        logging.getLogger("tumorvolume").info("said nothing")
    elif kind == "pid":
        return Written([str(os.getpid())])
    return Written()


def die_with_lock(name):
    """Die like a worker that is killed between two studies, in the middle of the pool's queue."""
    for queue in [each for each in gc.get_objects() if isinstance(each, SimpleQueue)]:
        lock = getattr(queue, name, None)
        if lock is not None and lock.acquire(block=False):
            pool._running[:] = [0] * len(pool._running)
            os.kill(os.getpid(), signal.SIGKILL)


def once(job):
    """Die in the first attempt, between two studies; succeed in the second."""
    path, lock = job.work
    if not path.exists():
        path.touch()
        die_with_lock(lock)
    return Written()


# --- outcomes ---------------------------------------------------------------------------------


def run_studies(worker, jobs, n_workers, *more) -> list[Outcome]:
    return engine.run_studies(worker, jobs, Engine(n_workers), *more)


@pytest.mark.parametrize("jobs", [1, 3])
def test_outcomes_come_in_the_order_of_tasks_whatever_takes_longest(jobs):
    outcomes = run_studies(behave, jobs_of("sleep 0.3", "sleep 0.1", "warn a lesion is lost"), jobs)
    assert [outcome.hash for outcome in outcomes] == ["study0", "study1", "study2"]
    assert statuses(outcomes) == ["written"] * 3
    assert outcomes[2].warnings == ["a lesion is lost"]


def test_each_outcome_is_told_once_as_it_comes():
    told = []
    outcomes = run_studies(behave, jobs_of(*["sleep 0.01"] * 20), 4, told.append)
    assert sorted(told, key=lambda o: o.hash) == sorted(outcomes, key=lambda o: o.hash)
    assert len(told) == 20


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("StudyError", ("failed", "no weight: give one", "private text")),
        ("IncompleteStudy", ("skipped", "no mask", "")),
        ("MemoryError", ("failed", "not enough memory: use fewer --jobs", "")),
        (
            "ValueError",
            (
                "failed",
                "unexpected ValueError: run this study again with --debug and report it",
                "",
            ),
        ),
    ],
)
def test_an_error_fails_its_study_and_no_other(error, outcome):
    bad, good = run_studies(behave, jobs_of(f"raise {error}", "warn fine"), 1)
    assert (bad.status, bad.reason, bad.private) == outcome
    assert good.status == "written"


def test_a_stage_error_ends_the_run_at_once():
    began = time.monotonic()
    with pytest.raises(StageError, match="the disk is full"):
        run_studies(behave, jobs_of("raise StageError", "sleep 60"), 2)
    assert time.monotonic() - began < 20


def test_no_tasks_need_no_worker():
    assert run_studies(behave, [], 4) == []


# --- killed workers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jobs", "how", "reason"),
    [
        (
            jobs,
            "signal 9",
            "the worker process was killed (signal 9), probably for want of memory: "
            "use fewer --jobs",
        )
        for jobs in (1, 2)
    ]
    + [
        (1, "signal 11", "the worker process was killed (signal 11): report it"),
        (2, "exit 0", "the worker process was killed (it ended by itself): report it"),
    ],
)
def test_a_killed_worker_fails_its_study_and_the_others_complete(how, reason, jobs):
    began = time.monotonic()
    outcomes = run_studies(
        behave, jobs_of("warn a", how, "sleep 0.2", "warn b", how, "warn c"), jobs
    )
    assert statuses(outcomes) == ["written", "failed", "written", "written", "failed", "written"]
    assert outcomes[1].reason == outcomes[4].reason == reason
    assert time.monotonic() - began < 20


def test_work_of_other_studies_goes_on_when_a_worker_is_killed(tmp_path):
    """A study under way in another worker is not begun anew."""
    outcomes = run_studies(note_start, jobs_of((tmp_path, 0.8), None, (tmp_path, 0.8)), 2)
    assert statuses(outcomes) == ["written", "failed", "written"]
    assert len(list(tmp_path.iterdir())) == 2


def note_start(job):
    if job.work is None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    folder, seconds = job.work
    (folder / str(time.monotonic_ns())).touch()
    time.sleep(seconds)
    return Written()


@pytest.mark.parametrize("lock", ["_rlock", "_wlock"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_worker_killed_with_a_lock_of_the_pool_stops_nothing(lock, jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.5)
    began = time.monotonic()
    quick = [(tmp_path, "")] * 4
    outcomes = run_studies(once, jobs_of(*quick, (tmp_path / "dead", lock), *quick), jobs)
    assert statuses(outcomes) == ["written"] * 9
    assert time.monotonic() - began < 30


def test_workers_that_always_die_between_studies_end_the_run(monkeypatch):
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(pool, "_MOST_BREAKDOWNS", 2)
    with pytest.raises(StageError, match="worker processes die before they begin"):
        run_studies(behave, jobs_of("die_with _rlock", "die_with _rlock"), 2)


@pytest.mark.parametrize("n_workers", [2, 3])
def test_idle_workers_that_are_killed_cost_nothing(n_workers, tmp_path):
    """All but one have no study left, and wait for one in the lock of the pool's queue."""
    busy = tmp_path / "busy"

    quick = iter(range(n_workers - 1))

    def kill_the_idle(outcome):
        if outcome.hash == "study0" or next(quick) < n_workers - 2:
            return
        time.sleep(0.1)
        # On a busy machine the long study may be the last to begin.
        while not (busy.exists() and busy.read_text()):
            time.sleep(0.01)
        for process in multiprocessing.active_children():
            if str(process.pid) != busy.read_text():
                process.kill()

    payloads = [busy, *[None] * (n_workers - 1)]
    outcomes = run_studies(long_if_path, jobs_of(*payloads), n_workers, kill_the_idle)
    assert statuses(outcomes) == ["written"] * n_workers


def long_if_path(job):
    if job.work is not None:
        job.work.write_text(str(os.getpid()))
        time.sleep(3)
    else:
        time.sleep(0.1)
    return Written()


def test_workers_end_at_once_when_their_parent_is_killed(tmp_path):
    """Also those in C code that never lets another thread run."""
    code = (
        "import sys; sys.path[:0] = [{root!r}, {tests!r}]\n"
        "import test_pool as t\n"
        "t.run_studies(t.never_yield, t.jobs_of({folder!r}, {folder!r}), 2)\n"
    ).format(root=str(ROOT), tests=str(Path(__file__).parent), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        assert len(workers) == 2
        parent.kill()
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.01)


def never_yield(job):
    (Path(job.work) / str(os.getpid())).touch()
    sum(range(10**11))  # one bytecode: the interpreter's lock is held for an hour
    return Written()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- what a worker says -----------------------------------------------------------------------


@pytest.fixture
def logged(monkeypatch) -> Iterator[list[logging.LogRecord]]:
    """What is logged, whatever handlers earlier runs have left."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("tumorvolume")
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.DEBUG)
    yield records
    logger.setLevel(level)


def test_only_log_lines_leave_a_worker_and_the_parent_writes_them(capfd, logged):
    run_studies(behave, jobs_of("say", "say"), 1)
    assert [record.getMessage() for record in logged] == ["said nothing"] * 2
    assert {record.process for record in logged} == {os.getpid()}
    assert capfd.readouterr() == ("", "")


def test_an_unexpected_error_is_traced_without_its_text(logged):
    run_studies(behave, jobs_of("raise ValueError"), 1)
    [line] = [record.getMessage() for record in logged]
    assert line.startswith("study0: Traceback ")
    assert line.endswith("\nValueError")
    assert Path(__file__).name in line
    assert "Doe^Jane" not in line


# --- one call in a process of its own ---------------------------------------------------------


def test_a_call_in_a_process_of_its_own_does_its_work_in_another_process():
    assert in_own_process(os.getpid) != os.getpid()


def memory_status() -> str:
    path = Path("/proc/self/status")
    return path.read_text() if path.exists() else ""


@pytest.mark.skipif("THP_enabled" not in memory_status(), reason="this system has no such pages")
def test_workers_do_without_huge_pages():
    assert "THP_enabled:\t1" in memory_status()
    assert "THP_enabled:\t0" in in_own_process(memory_status)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("raise StageError", "the disk is full"),
        ("raise StudyError", "no weight: give one"),
        ("raise ValueError", "unexpected ValueError"),
        ("signal 11", r"the worker process was killed \(signal 11\)"),
    ],
)
def test_a_call_in_a_process_of_its_own_that_fails_is_a_stage_error(payload, reason):
    with pytest.raises(StageError, match=reason):
        in_own_process(behave, Job("", "", payload))


@pytest.mark.parametrize(
    ("number", "kind"), [(9, WorkerKilled), (15, WorkerKilled), (11, WorkerCrashed)]
)
def test_who_was_killed_is_told_from_who_crashed(number, kind):
    with pytest.raises(kind):
        in_own_process(behave, Job("", "", f"signal {number}"))


def test_no_room_for_worker_processes_is_said(monkeypatch):
    def no_room(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool.CONTEXT, "RawArray", no_room)
    with pytest.raises(StageError, match=r"cannot be started \(No space left on device\)"):
        run_studies(behave, jobs_of("warn a"), 1)


# --- CPUs and memory --------------------------------------------------------------------------


def tree(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "proc", folder / "cgroup"


MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {40 * GIB // 1024} kB\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 40 * GIB),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/slurm/job_1/step_0\n",
                "cgroup/slurm/job_1/memory.max": f"{8 * GIB}\n",
                "cgroup/slurm/job_1/memory.current": f"{3 * GIB}\n",
                "cgroup/slurm/job_1/memory.stat": f"anon 1\ninactive_file {GIB}\n",
                "cgroup/slurm/job_1/step_0/memory.max": "max\n",
                "cgroup/slurm/job_1/step_0/memory.current": "5\n",
            },
            6 * GIB,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/\n",
                "cgroup/memory.max": f"{2 * GIB}\n",
                "cgroup/memory.current": f"{3 * GIB}\n",
            },
            0,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n",
                "cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
                "cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
                "cgroup/memory/memory.stat": f"total_inactive_file {GIB}\n",
            },
            3 * GIB,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:memory:/\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": "5\n",
            },
            40 * GIB,
        ),
    ],
    ids=["unknown", "machine", "slurm, v2", "over its limit, v2", "container, v1", "no limit, v1"],
)
def test_available_memory_is_the_least_that_machine_and_control_groups_leave(
    files, available, tmp_path
):
    assert machine.available_memory(*tree(tmp_path, files)) == available


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ({"cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"cgroup/cpu.max": "max 100000\n"}, 8),
        ({"cgroup/cpu.max": "5000 100000\n"}, 1),
        (
            {"cgroup/cpu/cpu.cfs_quota_us": "300000\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ({"cgroup/cpu/cpu.cfs_quota_us": "-1\n", "cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_a_container_has_the_cpus_of_its_quota(quota, cpus, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    files = {"proc/self/cgroup": "0::/\n1:cpu,cpuacct:/\n", **quota}
    assert machine.available_cpus(*tree(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("cpus", "memory", "needed", "jobs"),
    [
        (8, 16 * GIB, 0, 8),
        (8, None, 4 * GIB, 8),
        (8, 16 * GIB, GIB, 8),
        (8, 16 * GIB, 4 * GIB, 4),
        (8, 16 * GIB, 5 * GIB, 3),
        (8, 1 * GIB, 4 * GIB, 1),
    ],
)
def test_default_jobs_are_what_cpus_and_memory_suffice_for(cpus, memory, needed, jobs, monkeypatch):
    monkeypatch.setattr(machine, "available_cpus", lambda: cpus)
    monkeypatch.setattr(machine, "available_memory", lambda: memory)
    assert machine.default_jobs(needed) == jobs


def test_memory_and_cpus_of_this_machine_are_known():
    assert 1 <= machine.available_cpus() <= os.cpu_count()
    if sys.platform == "linux":
        assert machine.available_memory() > 0
