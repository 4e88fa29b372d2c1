"""A dask cluster instead of the pool: the same bytes, whoever dies, and nothing said elsewhere."""

import functools
import hashlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster_work import SECRET, behave
from project_zips import study_images, write_zip
from tiny_studies import ANGLES, GRID, STUDIES, write_raw

import createproject
import preprocessing
import project_2d
from common.errors import StageError
from common.run import cli, dask, engine
from common.run.engine import Engine
from common.run.worker import Job, Outcome

distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
dask_utils = pytest.importorskip("dask.utils", reason="dask[distributed] is not installed")

ROOT = Path(__file__).parents[2]
KILLER = (
    "it has killed its worker process 3 times, probably for want of memory: give the workers more"
)

PATIENCE_S = 240
"""With a machine that has much else to do."""

pytestmark = pytest.mark.timeout(2 * PATIENCE_S)


# --- a cluster of other processes, as on other machines ---------------------------------------


@dataclass(frozen=True)
class Cluster:
    """A scheduler with two workers, by its scheduler file, and all that they write."""

    address: str
    logs: Path

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in self.logs.iterdir())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    logs = tmp_path_factory.mktemp("logs")
    address = folder / "scheduler.json"
    at = ["--scheduler-file", str(address), "--no-dashboard"]
    commands = {
        "scheduler": ["scheduler", *at, "--host", "127.0.0.1", "--port", "0"],
        **{
            f"worker{number}": ["worker", *at, "--nthreads", "1", "--local-directory", str(folder)]
            for number in (1, 2)
        },
    }
    # Not the folder of the scripts: workers find it by what they are sent.
    with running(commands, folder, logs, PYTHONPATH=str(ROOT / "tests/builders")):
        wait_for(address.exists)
        yield Cluster(str(address), logs)


@contextmanager
def running(
    commands: Mapping[str, Sequence[str]], folder: Path, logs: Path, **variables: str
) -> Iterator[dict[str, subprocess.Popen]]:
    """Run dask's commands by name, each with a log of its own, and kill them at the end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    processes: dict[str, subprocess.Popen] = {}
    try:
        for name, command in commands.items():
            with open(logs / name, "w") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "dask", *command],
                    cwd=folder,
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
        yield processes
    finally:
        for process in reversed(processes.values()):
            process.kill()
        for process in processes.values():
            process.wait(timeout=PATIENCE_S)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never comes"
        time.sleep(0.02)


@contextmanager
def at_line(words: str, do: Callable[[], object]) -> Iterator[None]:
    """Do something once, when this process logs a line that ends so, whether it is shown or not."""
    logger = logging.getLogger("tumorvolume")
    told = []

    def look(record: logging.LogRecord) -> bool:
        if not told and record.getMessage().endswith(words):
            told.append(record)
            do()
        return True

    logger.addFilter(look)
    try:
        yield
    finally:
        logger.removeFilter(look)
    assert told, f"no line ends with {words!r}"


def run_studies(
    cluster: Cluster, notes: Path | None, *payloads, n_workers: int | None = None, **more
) -> list[Outcome]:
    jobs = [Job(f"study{number}", "", payload) for number, payload in enumerate(payloads)]
    return engine.run_studies(behave, jobs, Engine(n_workers, cluster.address), notes=notes, **more)


def folders(tmp_path: Path, *names: str) -> list[Path]:
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


# --- the same bytes as the pool's -------------------------------------------------------------


def chain(folder: Path, raw: Path, *options: str) -> dict[str, str]:
    """Run the three scripts, and return the digests of what they write."""
    folder.mkdir()
    for main, source, output, *more in (
        (createproject.main, raw, "p.zip"),
        (preprocessing.main, folder / "p.zip", "3d.h5", *GRID, "--report", folder / "r.html"),
        (project_2d.main, folder / "3d.h5", "2d.h5", *ANGLES, "--png", folder / "png"),
    ):
        assert main([str(source), "-o", str(folder / output), *map(str, more), *options]) == 0
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_chain_gives_the_bytes_of_the_pool_and_no_worker_names_a_patient(
    cluster, tmp_path, capfd
):
    write_raw(tmp_path / "raw")
    of_pool = chain(tmp_path / "pool", tmp_path / "raw", "-j", "2")
    of_cluster = chain(tmp_path / "cluster", tmp_path / "raw", "--dask", cluster.address)
    assert of_cluster == of_pool
    assert len(of_pool) == 9
    said = cluster.said + capfd.readouterr().err
    for name in (*STUDIES, str(tmp_path / "raw"), "raw/"):
        assert name not in said


def test_a_dry_run_says_the_same(cluster, tmp_path, capsys):
    write_raw(tmp_path / "raw")
    command = [str(tmp_path / "raw"), "-o", str(tmp_path / "p.zip"), "--dry-run"]
    said = []
    for options in (["-j", "1"], ["--dask", cluster.address]):
        assert createproject.main([*command, *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


# --- outcomes ---------------------------------------------------------------------------------


def test_outcomes_and_log_lines_come_back_and_nothing_else_is_said(cluster, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("tumorvolume").propagate = True
    told: list[Outcome] = []
    kinds = ["StudyError", "IncompleteStudy", "ValueError", "SystemExit"]
    outcomes = run_studies(
        cluster,
        tmp_path,
        ("warn", "a lesion is lost"),
        ("say", ""),
        *(("raise", kind) for kind in kinds),
        on_outcome=told.append,
    )
    assert [outcome.hash for outcome in outcomes] == [f"study{i}" for i in range(6)]
    assert [(o.status, o.reason, o.private) for o in outcomes[2:]] == [
        ("failed", "no weight: give one", "private text"),
        ("skipped", "no mask", ""),
        (
            "failed",
            "unexpected ValueError: run this study again with --debug and report it",
            "",
        ),
        ("failed", "it ended its worker process: report it", ""),
    ]
    assert outcomes[0].warnings == ("a lesion is lost",)
    assert Counter(told) == Counter(outcomes)
    lines = [record.getMessage() for record in caplog.records if record.name == "tumorvolume"]
    assert "said nothing" in lines
    assert any(line.endswith("\nValueError") for line in lines)
    assert SECRET not in caplog.text + cluster.said
    assert list(tmp_path.iterdir()) == []


def test_a_stage_error_ends_the_run(cluster, tmp_path):
    with pytest.raises(StageError, match="the disk is full"):
        run_studies(cluster, tmp_path, ("raise", "StageError"), *[("sleep", 0.1)] * 5)


@pytest.mark.parametrize(("jobs", "bound"), [(None, 4), (1, 1)])
def test_a_bounded_number_of_studies_is_under_way(cluster, tmp_path, jobs, bound):
    """Two a worker, so that none waits; the first go on when no more have come for a while."""
    go, seen = tmp_path / "go", []
    with looking(cluster) as under_way:

        def wait_and_see():
            wait_for(lambda: len(under_way()) >= bound)
            for _ in range(20):
                seen.append(len(under_way()))
                time.sleep(0.02)
            go.touch()

        with meanwhile(wait_and_see):
            run_studies(cluster, tmp_path, *[("wait for", go)] * 40, n_workers=jobs)
    assert max(seen) == bound


@contextmanager
def looking(cluster: Cluster) -> Iterator[Callable[[], list[str]]]:
    """Yield what returns the names of the tasks that the workers have at the moment."""
    with distributed.Client(scheduler_file=cluster.address, set_as_default=False) as client:
        yield lambda: [str(key) for keys in client.processing().values() for key in keys]


@contextmanager
def meanwhile(do: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread beside the body; what it raises is raised at the end."""
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(do)
        yield
        done.result()


def test_the_dashboard_shows_each_study_by_its_hash(cluster, tmp_path):
    """Dask calls a task by the part of its key that it takes for a name: that is the hash."""
    go, names = tmp_path / "go", set()
    hashes = {"0123456789", "abcdefabcd", "1e69b8790d12"}
    with looking(cluster) as under_way:

        def note_names():
            wait_for(lambda: len(under_way()) == len(hashes))
            names.update(map(dask_utils.key_split, under_way()))
            go.touch()

        with meanwhile(note_names):
            jobs = [Job(each, "", ("wait for", go)) for each in sorted(hashes)]
            engine.run_studies(behave, jobs, Engine(dask=cluster.address), notes=tmp_path)
    assert names == hashes


# --- killed workers ---------------------------------------------------------------------------


def test_a_study_that_kills_three_workers_is_failed_and_no_other(cluster, tmp_path):
    always, once, notes = folders(tmp_path, "always", "once", "notes")
    outcomes = run_studies(
        cluster,
        notes,
        ("sleep", 0.2),
        ("die", (always, 99)),
        ("die", (once, 1)),
        *[("sleep", 0.2)] * 5,
    )
    assert [outcome.status for outcome in outcomes] == ["written", "failed", *["written"] * 6]
    assert outcomes[1].reason == KILLER
    assert len(list(always.iterdir())) == 3
    assert list(notes.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_workers_handle_memory_as_those_of_the_pool_do(cluster, tmp_path):
    """Dask has them give back what they free at once: studies took twice as long."""
    [outcome] = run_studies(cluster, tmp_path, ("status", ""))
    [status] = outcome.warnings
    if "THP_enabled" not in status:
        pytest.skip("this system has no huge pages")
    assert "THP_enabled:\t0" in status


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_a_worker_with_a_limit_gives_back_what_it_keeps_and_idle_threads_are_said(
    scheduler, tmp_path, caplog
):
    """Dask pauses it from 80 % on for good, also where all of that is free."""
    limited = ["--scheduler-file", scheduler[0].address, "--nthreads", "2", "--no-dashboard"]
    limited += ["--memory-limit", "700MB", "--local-directory", str(tmp_path)]
    builders = str(ROOT / "tests/builders")
    with running(
        {"limited": ["worker", *limited]}, tmp_path, scheduler[0].logs, PYTHONPATH=builders
    ):
        studies = ("fill", 400), ("sleep", 1.5), ("status", "")
        *_, outcome = run_studies(scheduler[0], None, *studies)
    [status] = outcome.warnings
    held = re.search(r"VmRSS:\s*(\d+) kB", status)
    assert held is not None
    assert int(held[1]) < 350_000
    assert [line for line in caplog.messages if "threads" in line] == [
        "dask workers on 127.0.0.1 have several threads, and do one study at a time: start more "
        "workers, with --nthreads 1"
    ]


@pytest.fixture(scope="module")
def project_zip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zip")
    studies = {f"{seed:010x}": study_images(seed) for seed in range(8)}
    return write_zip(folder / "p.zip", studies)


@pytest.fixture(scope="module")
def of_pool(project_zip) -> bytes:
    """What the pool makes of the project."""
    output = project_zip.with_name("pool.h5")
    assert preprocessing.main([str(project_zip), "-o", str(output), "-j", "2", *GRID]) == 0
    return output.read_bytes()


def test_a_worker_killed_in_the_middle_of_a_run_costs_nothing(
    cluster, project_zip, of_pool, tmp_path
):
    [victim, *_] = run_studies(cluster, tmp_path, ("pid", ""), ("pid", ""))
    output = tmp_path / "out.h5"
    command = [str(project_zip), "-o", str(output), "--dask", cluster.address, *GRID]
    with start(preprocessing, command, tmp_path) as run:
        wait_for(lambda: list(tmp_path.glob("out.h5.parts/*.begun.tmp")))
        os.kill(int(victim.warnings[0]), signal.SIGKILL)
        said, _ = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, said
    assert output.read_bytes() == of_pool
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def start(script, command: Sequence[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, script.__file__, *command],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


# --- a cluster of the run's own ---------------------------------------------------------------


@pytest.mark.parametrize(("signal_number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_local_cluster_ends_and_the_run_goes_on_later(
    signal_number, status, project_zip, tmp_path
):
    command = [str(project_zip), "-o", "out.h5", "--dask", "local", "-j", "1"]
    with start(preprocessing, command, tmp_path) as run:
        wait_for(lambda: list(tmp_path.glob("out.h5.parts/*.h5")))
        # As a terminal does: the workers get it, too.
        os.killpg(run.pid, signal_number)
        said, _ = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == status
    word = "interrupted" if status == 130 else "terminated"
    # A study that was finished in time may have told of its loss.
    *warnings, line = said.splitlines()
    assert all(re.match(r"warning: [0-9a-f]{10}: ", warning) for warning in warnings), said
    assert re.match(rf"error: {word}: finished studies are kept", line)
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5.parts"]
    wait_for(lambda: not members(run.pid))
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parts/*.h5")}
    assert 1 <= len(finished) < 8
    assert preprocessing.main([str(project_zip), "-o", str(tmp_path / "out.h5"), "-j", "2"]) == 0


def members(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_a_local_cluster_gives_the_bytes_of_the_pool_and_says_nothing_of_its_own(
    project_zip, of_pool, tmp_path
):
    command = [str(project_zip), "-o", "out.h5", "--dask", "local", "-j", "2", "-q", *GRID]
    with start(preprocessing, command, tmp_path) as run:
        said, _ = run.communicate(timeout=PATIENCE_S)
    assert said == "8 studies: 8 written, 0 unchanged, 0 skipped, 0 failed -> out.h5\n"
    assert (tmp_path / "out.h5").read_bytes() == of_pool
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


# --- what a user hears ------------------------------------------------------------------------


def one_error(capfd) -> str:
    out, err = capfd.readouterr()
    assert out == ""
    [line] = err.splitlines()
    return line


@pytest.fixture
def mute_address() -> Iterator[str]:
    """Where something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "127.0.0.1", "mute"])
def test_no_scheduler_is_one_clear_line_in_bounded_time(
    address, mute_address, project_zip, tmp_path
):
    address = mute_address if address == "mute" else address
    command = [str(project_zip), "-o", "out.h5", "--dask", address]
    # A process of its own: the interpreter's end is part of it.
    quickly = (
        "import sys; from common.run import dask; import preprocessing; "
        "dask.CONNECT_S = 1; sys.exit(preprocessing.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", quickly, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"error: --dask {address}: no scheduler answers there: check the address, and that it "
        "runs\n"
    )


def test_without_the_package_arguments_are_wrong(project_zip, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    command = [str(project_zip), "-o", str(tmp_path / "out.h5"), "--dask", "local"]
    with pytest.raises(SystemExit, match="2"):
        preprocessing.main(command)
    assert capfd.readouterr().err.endswith(
        'error: argument --dask: needs the package distributed: pip install "dask[distributed]"\n'
    )


def test_workers_with_other_software_are_refused(cluster, tmp_path, monkeypatch):
    others = dict(dask.environment()) | {"deflate": "0.1"}
    monkeypatch.setattr(dask, "environment", lambda: others)
    with pytest.raises(
        StageError, match=r"the dask worker on .* has deflate .*, not 0\.1: give all"
    ):
        run_studies(cluster, tmp_path, ("warn", "x"))


def test_workers_that_do_not_share_the_files_are_told(cluster, tmp_path):
    with pytest.raises(StageError, match="does not see the folder elsewhere: --dask needs"):
        run_studies(cluster, tmp_path / "elsewhere", ("warn", "x"))


@pytest.fixture
def scheduler(tmp_path_factory) -> Iterator[tuple[Cluster, subprocess.Popen]]:
    """A scheduler without workers."""
    folder = tmp_path_factory.mktemp("scheduler")
    address = folder / "scheduler.json"
    command = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    command += ["--scheduler-file", str(address)]
    with running({"scheduler": command}, folder, folder) as processes:
        wait_for(address.exists)
        yield Cluster(str(address), folder), processes["scheduler"]


def test_a_scheduler_without_workers_is_not_waited_for_for_ever(scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr(dask, "NO_WORKER_S", 2)
    with pytest.raises(StageError, match="no worker has been connected"):
        run_studies(scheduler[0], tmp_path, ("warn", "x"))


def test_a_scheduler_that_dies_ends_the_run(scheduler, tmp_path, monkeypatch):
    monkeypatch.setattr(dask, "CONNECT_S", 2)
    empty, process = scheduler
    with (
        at_line("no worker is connected to the dask scheduler: waiting for one", process.kill),
        pytest.raises(StageError, match="the dask scheduler does not answer any more"),
    ):
        run_studies(empty, tmp_path, ("warn", "x"))


def test_a_scheduler_that_dies_in_the_middle_leaves_what_is_finished(
    scheduler, project_zip, of_pool, tmp_path, capfd
):
    lonely, process = scheduler
    worker = ["worker", "--scheduler-file", lonely.address, "--no-dashboard", "--nthreads", "1"]
    command = [str(project_zip), "-o", str(tmp_path / "out.h5"), *GRID, "-q"]

    def kill_when_the_next_has_ended():
        wait_for(lambda: len(list(tmp_path.glob("out.h5.parts/*.h5"))) > 1)
        time.sleep(0.2)
        process.kill()
        process.wait()

    with running({"worker": worker}, lonely.logs, lonely.logs):
        dying = [*command, "--dask", lonely.address, "-j", "2"]
        with at_line(": written", kill_when_the_next_has_ended):
            assert preprocessing.main(dying) == 1
    assert one_error(capfd) == (
        "error: the dask scheduler does not answer any more: start it, and run again; finished "
        "studies are kept"
    )
    assert list(tmp_path.glob("out.h5.parts/*.h5"))
    assert preprocessing.main([*command, "-j", "1"]) == 0
    assert (tmp_path / "out.h5").read_bytes() == of_pool


def test_an_interrupted_run_leaves_the_cluster_to_others(
    cluster, project_zip, of_pool, tmp_path, capfd
):
    command = [str(project_zip), "-o", str(tmp_path / "out.h5"), *GRID, "-q"]
    command += ["--dask", cluster.address]
    interrupt = functools.partial(os.kill, os.getpid(), signal.SIGINT)
    with at_line(": written", interrupt):
        assert preprocessing.main(command) == 130
    assert one_error(capfd).startswith("error: interrupted: finished studies are kept")
    assert preprocessing.main(command) == 0
    assert (tmp_path / "out.h5").read_bytes() == of_pool
