"""Lock, parts, resuming, keeping, replacing: with studies that are one line of text."""

import csv
import errno
import fcntl
import functools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import (
    IncompleteStudy,
    StageError,
    StudyError,
    Unreachable,
    UnreachableStudy,
    WorkerKilled,
    blaming,
)
from common.run import engine
from common.run import output as outputs
from common.run.engine import Engine
from common.run.output import exclusive, write_beside, writing_part
from common.run.stage import Stage, present_content, run_stage
from common.run.worker import Cause, Job, Outcome, Written

pytestmark = pytest.mark.timeout(120)


def work(job: Job):
    """Write the payload as the study's part, and note the attempt beside it."""
    attempts = job.part.parent.parent / "attempts"
    with open(attempts, "a") as stream:
        stream.write(f"{job.hash}\n")
    if job.work == "fails":
        raise StudyError("no weight: give one")
    if job.work == "incomplete":
        raise IncompleteStudy("no mask")
    if job.work == "out of reach":
        raise UnreachableStudy("a file cannot be read (Input/output error)")
    if job.work == "too large":
        raise MemoryError
    if job.work == "mount is gone":
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
    if isinstance(job.work, OSError):
        raise_while_writing(job)
    with writing_part(job.part) as temporary:
        temporary.write_text(f"{job.hash} {job.work}\n")
    return Written(["a lesion is lost"] if job.work == "lossy" else [])


def raise_while_writing(job: Job):
    with writing_part(job.part) as temporary:
        temporary.write_text("half")
        raise job.work


def assemble(path, sources):
    """Write the lines of all studies, each taken from the file that holds it."""
    lines = []
    for study_hash, source in sorted(sources.items()):
        lines += [line for line in source.read_text().splitlines() if line.split()[0] == study_hash]
    path.write_text("\n".join([*lines, ""]))


def studies(**payloads) -> list[Job]:
    return [Job(name, f"of {payload} " * 9, payload) for name, payload in payloads.items()]


def run(output, plan, finished, worker, assembling, n_workers):
    """Run a stage on an output that holds `finished`; None: that is not known."""
    told = Stage(output, plan, worker, assembling, lambda path: finished)
    return run_stage(told, Engine(n_workers))


class Folder:
    """Where a stage runs night after night."""

    def __init__(self, path: Path):
        self.output = path / "out.txt"
        self.attempts = path / "attempts"
        self.known: dict[str, str] = {}

    def run(self, plan, allow_shrink=False, **options):
        self.attempts.write_text("")
        with exclusive(self.output):
            told = Stage(self.output, plan, work, assemble, lambda path: self.known, **options)
            outcomes = run_stage(told, Engine(2), allow_shrink=allow_shrink)
        made = {study.hash: study.fingerprint for study in plan}
        held = [line.split()[0] for line in self.output.read_text().split("\n") if line]
        done = {o.hash for o in outcomes if o.status in ("written", "unchanged")}
        self.known = {h: made[h] if h in done else self.known[h] for h in held}
        return [outcome.status for outcome in outcomes]

    @property
    def attempted(self) -> list[str]:
        return sorted(self.attempts.read_text().split())

    @property
    def left(self) -> list[str]:
        return sorted(p.name for p in self.output.parent.iterdir() if p != self.attempts)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


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


def text_of(records: list[logging.LogRecord]) -> str:
    return "\n".join(record.getMessage() for record in records)


# --- what is computed, what is kept -----------------------------------------------------------


def test_the_output_holds_every_study_and_nothing_else_is_left(folder):
    assert folder.run(studies(b="two", a="one")) == ["written", "written"]
    assert folder.output.read_text() == "a one\nb two\n"
    assert folder.left == ["out.txt"]


def test_only_new_and_changed_studies_are_computed(folder):
    folder.run(studies(a="1", b="1", c="1"))
    assert folder.run(studies(a="1", b="2", d="1")) == ["unchanged", "written", "written"]
    assert folder.attempted == ["b", "d"]
    assert folder.output.read_text() == "a 1\nb 2\nd 1\n"


def test_with_nothing_new_the_output_is_not_touched(folder):
    folder.run(studies(a="1", b="1"))
    before = folder.output.stat()
    assert folder.run(studies(a="1", b="1")) == ["unchanged", "unchanged"]
    after = folder.output.stat()
    assert folder.attempted == []
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("payload", ["fails", "incomplete"])
def test_an_old_output_is_not_replaced_by_an_empty_one(folder, payload):
    folder.run(studies(a="1"))
    with pytest.raises(StageError, match="left as it was"):
        folder.run(studies(a=payload))
    assert folder.output.read_text() == "a 1\n"


@pytest.mark.parametrize("payload", ["fails", "incomplete"])
def test_what_is_no_output_of_ours_is_not_replaced_by_an_empty_one(folder, payload):
    folder.output.write_text("old")
    folder.known = None
    with pytest.raises(StageError, match="left as it was"):
        folder.run(studies(a=payload))
    assert folder.output.read_text() == "old"


def test_a_reader_that_was_killed_says_nothing_against_the_old_output(tmp_path):
    def killed(path):
        raise WorkerKilled("the worker process was killed (signal 9)")

    (tmp_path / "out").touch()
    with pytest.raises(WorkerKilled):
        present_content(tmp_path / "out", killed, force=False)


def test_an_empty_output_stays_one_while_nothing_succeeds(folder):
    for _ in range(2):
        assert folder.run(studies(a="fails")) == ["failed"]
        assert folder.output.read_text().strip() == ""


def test_a_study_that_fails_now_drops_out_and_is_named(folder, logged):
    folder.run(studies(a="1", b="1"))
    folder.run(studies(a="fails", b="1"))
    assert folder.output.read_text() == "b 1\n"
    assert "failed or is incomplete now and stays out: a" in text_of(logged)


def test_a_vanished_study_stays_out_and_is_named(folder, logged):
    folder.run(studies(a="1", b="1"))
    logged.clear()
    folder.run(studies(b="1"))
    assert folder.output.read_text() == "b 1\n"
    [line] = [record.getMessage() for record in logged if record.levelname == "WARNING"]
    assert line == "1 study of the old output is no longer in the input and stays out: a"


def test_a_study_whose_file_beside_is_gone_is_computed_again(folder, tmp_path):
    beside = tmp_path / "picture"
    plan = [Job("a", "1", "x", beside=(beside,))]
    folder.run(plan)
    assert folder.run(plan) == ["written"]
    beside.touch()
    assert folder.run(plan) == ["unchanged"]


def test_a_failed_and_a_skipped_study_stay_out_and_are_tried_again(folder):
    for _ in range(2):
        assert folder.run(studies(a="fails", b="1", c="incomplete"))[::2] == ["failed", "skipped"]
        assert folder.attempted[0] == "a"
        assert folder.attempted[-1] == "c"
        assert folder.output.read_text() == "b 1\n"


# --- what can't be looked at, and what would be lost -------------------------------------------


def held(folder: Folder) -> str:
    return "".join(line[0] for line in folder.output.read_text().splitlines())


def test_what_is_out_of_reach_stays_as_it_was_and_is_told(folder, logged):
    folder.run(studies(a="1", b="1"))
    plan = studies(a="out of reach", b="2", c="out of reach")
    assert folder.run(plan, made_alike={"a", "b"}) == ["failed", "written", "failed"]
    assert folder.output.read_text() == "a 1\nb 2\n"
    said = [record.getMessage() for record in logged if record.levelname == "ERROR"]
    assert sorted(said) == [
        "a: a file cannot be read (Input/output error); its earlier result stays in the output",
        "c: a file cannot be read (Input/output error)",
    ]


def test_studies_that_could_not_be_planned_stay_too_and_come_first(folder):
    folder.run(studies(a="1", b="1"))
    listed = [
        Outcome("a", "failed", "no", cause=Cause.REACH),
        Outcome("b", "failed", "no"),
        Outcome("c", "skipped", "no files", cause=Cause.REACH),
    ]
    statuses = folder.run(studies(d="1"), listed=listed, made_alike={"a", "b"})
    assert statuses == ["failed", "failed", "skipped", "written"]
    assert folder.output.read_text() == "a 1\nd 1\n"


def test_with_nothing_else_new_what_is_out_of_reach_leaves_the_output_untouched(folder):
    folder.run(studies(a="1", b="1"))
    before = folder.output.stat()
    plan = studies(a="out of reach", b="1")
    assert folder.run(plan, made_alike={"a", "b"}) == ["failed", "unchanged"]
    assert folder.output.stat().st_ino == before.st_ino


def test_what_is_out_of_reach_and_was_made_otherwise_ends_the_run(folder):
    folder.run(studies(a="1", b="1"))
    plan = studies(a="out of reach", b="2")
    with pytest.raises(StageError, match=r"can't be looked at, and it holds .* \(a\)"):
        folder.run(plan)
    assert folder.output.read_text() == "a 1\nb 1\n"
    assert folder.run(plan, allow_shrink=True) == ["failed", "written"]
    assert folder.output.read_text() == "b 2\n"


MANY = "abcdefghijklmnopqrstu"


@pytest.mark.parametrize(
    ("n_before", "left", "is_refused"),
    [(21, 20, False), (21, 19, False), (21, 18, True), (3, 2, False), (3, 1, True), (1, 1, False)],
)
def test_an_output_that_would_lose_more_than_a_tenth_is_left(folder, n_before, left, is_refused):
    folder.run(studies(**dict.fromkeys(MANY[:n_before], "1")))
    plan = studies(**dict.fromkeys(MANY[:left], "1"))
    if is_refused:
        named = ", ".join(MANY[left:n_before])
        with pytest.raises(StageError, match=rf"would lose .* \({named}\).*--allow-shrink"):
            folder.run(plan)
        assert folder.attempted == []
        assert held(folder) == MANY[:n_before]
        folder.run(plan, allow_shrink=True)
    else:
        folder.run(plan)
    assert held(folder) == MANY[:left]


def test_studies_that_are_other_shards_now_leave_unasked(folder, logged):
    folder.run(studies(**dict.fromkeys(MANY, "1")))
    plan = studies(**dict.fromkeys(MANY[:3], "1"))
    with pytest.raises(StageError, match=r"would lose 3 of its 21 studies \(d, e, f\)"):
        folder.run(plan, elsewhere=set(MANY[6:]))
    folder.run(plan, elsewhere=set(MANY[3:]))
    assert held(folder) == MANY[:3]
    assert "no longer in the input" not in text_of(logged)
    folder.run([], elsewhere=set(MANY))
    assert held(folder) == ""


def test_what_was_refused_for_its_content_stays_out_however_much_it_is(folder):
    folder.run(studies(a="1", b="1", c="1"))
    plan = studies(a="1", b="fails", c="incomplete")
    assert folder.run(plan) == ["unchanged", "failed", "skipped"]
    assert held(folder) == "a"


def test_studies_that_took_their_worker_along_do_not_empty_the_output(folder):
    folder.run(studies(a="1", b="1", c="1"))
    with pytest.raises(StageError, match=r"would lose 2 of its 3 studies \(b, c\)"):
        folder.run(studies(a="1", b="too large", c="too large"))
    assert held(folder) == "abc"


def test_force_does_not_keep_from_seeing_what_would_be_lost(folder):
    folder.run(studies(a="1", b="1", c="1"))
    with exclusive(folder.output, force=True), pytest.raises(StageError, match="would lose 2"):
        run_stage(
            Stage(folder.output, studies(a="1"), work, assemble, lambda path: folder.known),
            Engine(1),
            force=True,
        )
    assert held(folder) == "abc"


def test_a_mount_that_is_gone_is_no_fault_of_a_study(folder):
    folder.run(studies(a="1", b="1"))
    with pytest.raises(Unreachable, match="Transport endpoint is not connected"):
        folder.run(studies(a="mount is gone", b="2"))
    assert folder.output.read_text() == "a 1\nb 1\n"


def test_an_old_output_that_cannot_be_looked_at_is_not_taken_for_absent(folder, monkeypatch):
    folder.run(studies(a="1"))
    stat = os.stat

    def fail(path, *arguments, **options):
        if path == folder.output:
            raise OSError(errno.EIO, "Input/output error")
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(StageError, match="cannot be looked at"):
        folder.run(studies(a="2"))


def interrupted(folder: Folder, plan: list[Job]) -> Path:
    """Run a stage that ends before its parts are assembled, and return their folder."""

    def stop(path, sources):
        raise StageError("interrupted")

    with pytest.raises(StageError, match="interrupted"), exclusive(folder.output):
        run(folder.output, plan, {}, work, stop, 1)
    return folder.output.with_name("out.txt.parts")


def test_parts_of_an_interrupted_run_are_used_if_their_input_is_the_same(folder, logged):
    plan = studies(a="1", b="1", c="1")
    parts = interrupted(folder, plan)
    for part in parts.iterdir():
        part.write_text(f"{part.name[0]} from before\n")
    [of_c] = parts.glob("c.*")
    of_c.rename(f"{of_c}.77.tmp")
    (parts / "c.0123456789abcdef.txt").write_text("c of other options\n")
    (parts / "assembled.tmp.txt").write_text("half")
    folder.run(plan)
    assert folder.attempted == ["c"]
    assert folder.output.read_text() == "a from before\nb from before\nc 1\n"
    assert folder.left == ["out.txt"]
    assert "resuming: 2 studies are finished already" in text_of(logged)


def test_force_throws_parts_away(folder):
    parts = interrupted(folder, studies(a="1"))
    assert len(list(parts.iterdir())) == 1
    with exclusive(folder.output, force=True):
        assert not parts.exists()


def test_litter_of_killed_workers_makes_room_at_once(folder):
    parts = folder.output.with_name("out.txt.parts")
    parts.mkdir()
    for name in ("a.12.txt.77.tmp", "assembled.tmp.txt", "b.34.txt"):
        (parts / name).write_text("x")
    with exclusive(folder.output):
        assert [path.name for path in parts.iterdir()] == ["b.34.txt"]


# --- what is said -----------------------------------------------------------------------------


def test_outcomes_are_logged_by_hash(folder, logged):
    folder.run(studies(a="fails", b="lossy", c="incomplete"))
    said = sorted((r.levelname, r.getMessage()) for r in logged if r.levelno >= 30)
    assert said == [
        ("ERROR", "a: no weight: give one"),
        ("WARNING", "b: a lesion is lost"),
        ("WARNING", "c: skipped, no mask"),
    ]


def test_a_skip_that_is_known_is_told_quietly_unless_its_reason_is_new(folder, logged):
    plan = studies(a="incomplete", b="1")
    folder.run(plan, known_skips={"a": "no mask"})
    assert "WARNING" not in {record.levelname for record in logged}
    logged.clear()
    folder.run(plan, known_skips={"a": "no CT"})
    assert "WARNING" in {record.levelname for record in logged}


def test_failures_are_listed_while_there_are_any(folder, tmp_path):
    listed = tmp_path / "out_failed.csv"
    for _ in range(2):
        folder.run(studies(a="fails", b="1"), name="preprocessing")
        with open(listed, newline="") as stream:
            assert list(csv.DictReader(stream)) == [
                {"hash": "a", "stage": "preprocessing", "reason": "no weight: give one"}
            ]
    folder.run(studies(a="1", b="1"), name="preprocessing")
    assert not listed.exists()


def test_default_jobs_follow_the_largest_study_to_compute(folder, logged, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "default_jobs", lambda needed: asked.append(needed) or 1)
    plan = [Job("a", "1", "x", memory=7), Job("b", "1", "x", memory=3_000_000_000)]
    for finished, jobs in (({}, None), ({"b": "1"}, None), ({}, 2)):
        with exclusive(folder.output):
            run(folder.output, plan, finished, work, assemble, jobs)
    assert asked == [3_000_000_000, 7]
    assert "1 worker processes; the largest study takes about 3.0 GB" in text_of(logged)


# --- replacing --------------------------------------------------------------------------------


def refuse(path, sources):
    path.write_text("half")
    raise StageError("a source is damaged")


def crash(path, sources):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def fill(path, sources, number):
    path.write_text("half")
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("assembling", "reason"),
    [
        (refuse, "a source is damaged"),
        (crash, "the worker process was killed"),
        (functools.partial(fill, number=errno.ENOSPC), "out.txt cannot be written: the disk is"),
        (functools.partial(fill, number=errno.EDQUOT), "the disk quota is used up: make room"),
        (functools.partial(fill, number=errno.EFBIG), "the file-size limit is reached: raise it"),
        (functools.partial(fill, number=errno.EROFS), "the file system is read-only"),
        (functools.partial(fill, number=errno.EIO), "the disk fails"),
    ],
)
def test_a_failed_assembly_leaves_the_old_output_and_the_parts(assembling, reason, folder):
    folder.run(studies(a="1"))
    with pytest.raises(StageError, match=reason), exclusive(folder.output):
        run(folder.output, studies(a="2"), {}, work, assembling, 1)
    assert folder.output.read_text() == "a 1\n"
    assert folder.left == ["out.txt", "out.txt.parts"]
    assert len(list((folder.output.parent / "out.txt.parts").iterdir())) == 1
    folder.run(studies(a="2"))
    assert folder.attempted == []
    assert folder.output.read_text() == "a 2\n"


def assemble_sound(path, sources):
    """As `assemble`, but a damaged source is said to be so."""
    for study_hash, source in sorted(sources.items()):
        with blaming(source):
            if not source.read_text().startswith(study_hash):
                raise StageError(f"{source}: is damaged")
    assemble(path, sources)


def test_a_damaged_part_is_made_anew_and_the_others_are_used(folder, logged):
    plan = studies(a="1", b="fails", c="1")
    parts = interrupted(folder, plan)
    [of_a] = parts.glob("a.*")
    of_a.write_text("?")
    folder.attempts.write_text("")
    with exclusive(folder.output):
        outcomes = run(folder.output, plan, {}, work, assemble_sound, 1)
    assert [outcome.status for outcome in outcomes] == ["written", "failed", "written"]
    assert folder.output.read_text() == "a 1\nc 1\n"
    # The study that fails is tried once, as ever.
    assert folder.attempted == ["a", "b"]
    assert "a: its finished part is damaged and is made anew" in text_of(logged)


def test_a_part_that_is_damaged_whenever_it_is_made_ends_the_run(folder):
    def never_sound(path, sources):
        with blaming(sources["a"]):
            raise StageError("is damaged")

    with pytest.raises(StageError, match="is damaged"), exclusive(folder.output):
        run(folder.output, studies(a="1"), {}, work, never_sound, 1)
    assert folder.attempted == ["a", "a"]


def test_two_runs_without_locks_do_not_write_into_one_file(folder):
    """Both reported success, the first with the second's bytes in its output."""
    names = []

    def note(path, sources):
        path.write_text("x")
        raise StageError(path.name)

    for _ in range(2):
        with pytest.raises(StageError) as raised:
            run(folder.output, studies(a="1"), {}, work, note, 1)
        names.append(str(raised.value))
    # One process, one name: of what tells them apart there are both.
    assert set(names) == {f"assembled.{socket.gethostname()}.{os.getpid()}.tmp.txt"}


def test_parts_that_another_run_takes_away_are_said_to_be(folder):
    def take_away(path, sources):
        assemble(path, sources)
        shutil.rmtree(path.parent)

    folder.run(studies(a="1"))
    with pytest.raises(StageError, match="another run on the same output has taken"):
        run(folder.output, studies(a="2"), {}, work, take_away, 1)
    assert folder.output.read_text() == "a 1\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_a_part_that_cannot_be_written_ends_the_run_and_leaves_no_half(number, folder):
    error = OSError(number, os.strerror(number))
    with pytest.raises(StageError, match="cannot be written"):
        folder.run(studies(a=error))
    assert folder.left == []


def test_what_goes_before_the_replacement_sees_the_complete_new_output(folder):
    seen = []
    folder.run(studies(a="1"), write_beside=lambda path, outcomes: seen.append(path.read_text()))
    folder.run(studies(a="1"), write_beside=lambda path, outcomes: seen.append(path.read_text()))
    assert seen == ["a 1\n", "a 1\n"]


def test_a_linked_output_stays_a_link_and_its_parts_go_to_its_disk(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "scratch").mkdir()
    link = tmp_path / "home" / "out.txt"
    link.symlink_to(tmp_path / "scratch" / "real.txt")
    assert outputs.parts_folder(link) == tmp_path / "scratch" / "real.txt.parts"
    with exclusive(link):
        run(link, studies(a="1"), {}, work, assemble, 1)
    assert link.is_symlink()
    assert (tmp_path / "scratch" / "real.txt").read_text() == "a 1\n"
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == [
        "attempts",
        "real.txt",
    ]


def test_something_else_of_the_parts_name_is_left_alone(folder):
    folder.output.with_name("out.txt.parts").write_text("mine")
    with pytest.raises(StageError, match="something else has its name"):
        folder.run(studies(a="1"))
    assert folder.output.with_name("out.txt.parts").read_text() == "mine"


def test_a_file_beside_is_replaced_only_when_its_text_is_new(tmp_path):
    path = tmp_path / "list.csv"
    write_beside(path, "a\r\nä\n")
    assert path.read_bytes() == "a\r\nä\n".encode()
    before = path.stat()
    write_beside(path, "a\r\nä\n")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_beside(path, "b")
    assert path.read_text() == "b"
    assert os.listdir(tmp_path) == ["list.csv"]


def test_a_killed_writer_of_a_file_beside_leaves_one_hidden_file_that_the_next_one_takes(tmp_path):
    path = tmp_path / "list.csv"
    code = (
        "import os, sys; from pathlib import Path; from common.run import output\n"
        "with output.writing_beside(Path(sys.argv[1])) as new: new.write_text('half'); os._exit(9)"
    )
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", code, path], cwd=Path(__file__).parents[2], check=False
        )
    assert os.listdir(tmp_path) == [".list.tmp.csv"]
    write_beside(path, "whole")
    assert os.listdir(tmp_path) == ["list.csv"]


def write_picture(job: Job):
    """Write a file beside the output; "stuck" stays in the middle of it, "full" waits for that."""
    picture = job.part.parent.parent / "pictures" / f"{job.hash}.nii.gz"
    if job.work == "full":
        while not list(picture.parent.glob(".*")):
            time.sleep(0.001)
        raise StageError("out.txt cannot be written: the disk is full")
    with (
        writing_part(job.part, job.beside) as temporary,
        outputs.writing_beside(picture) as half,
    ):
        half.write_text(job.work)
        if job.work == "dies":
            os.kill(os.getppid(), signal.SIGKILL)
        if job.work in ("stuck", "dies"):
            time.sleep(60)
        temporary.write_text(f"{job.hash} {job.work}\n")
    return []


def picture_studies(folder: Folder, **payloads) -> list[Job]:
    pictures = folder.output.with_name("pictures")
    pictures.mkdir(exist_ok=True)
    return [
        Job(name, f"{payload}" * 16, payload, beside=(pictures / f"{name}.nii.gz",))
        for name, payload in payloads.items()
    ]


def run_pictures(folder: Folder, plan: list[Job]):
    with exclusive(folder.output):
        run(folder.output, plan, {}, write_picture, assemble, 2)


def test_a_run_that_ends_early_leaves_no_half_file_beside_of_the_worker_it_ended(folder):
    plan = picture_studies(folder, a="stuck", b="full")
    with pytest.raises(StageError, match="the disk is full"):
        run_pictures(folder, plan)
    assert folder.left == ["pictures"]
    assert os.listdir(folder.output.with_name("pictures")) == []


def test_pictures_of_a_study_that_is_another_shards_now_stay(folder):
    pictures = folder.output.with_name("pictures")
    pictures.mkdir()
    for name in "bc":
        (pictures / name).touch()
    folder.run(studies(a="1", b="1", c="1"))
    beside = {"beside_of": lambda name: [pictures / name], "elsewhere": {"b"}}
    folder.run(studies(a="1"), **beside)
    assert os.listdir(pictures) == ["b"]


def test_half_files_of_killed_workers_go_though_their_studies_are_no_longer_there(folder):
    pictures = folder.output.with_name("pictures")
    child = os.fork()
    if not child:
        try:
            run_pictures(folder, picture_studies(folder, a="dies", b="stuck"))
        finally:
            # Whatever happens, the child must not go on as a second pytest.
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert ".a.nii.tmp.gz" in os.listdir(pictures)
    mine = pictures / ".mine"
    mine.touch()
    run_pictures(folder, picture_studies(folder, c="1"))
    assert folder.output.read_text() == "c 1\n"
    assert sorted(os.listdir(pictures)) == [".mine", "c.nii.gz"]
    assert folder.left == ["out.txt", "pictures"]


def test_files_beside_that_another_run_has_replaced_are_made_again(folder):
    """One night with other options, stopped, and the old output was kept with the new pictures."""
    finished = {"a": "1" * 16, "b": "1" * 16}
    one, two = (picture_studies(folder, a=payload, b=payload) for payload in "12")
    picture = one[0].beside[0]
    run_pictures(folder, one)

    def interrupted(path, sources):
        raise StageError("interrupted")

    for plan in (two, picture_studies(folder, a="3", b="3"), two):
        with pytest.raises(StageError, match="interrupted"), exclusive(folder.output):
            run(folder.output, plan, finished, write_picture, interrupted, 2)
        assert picture.read_text() == plan[0].work
    with exclusive(folder.output):
        run(folder.output, one, finished, write_picture, assemble, 2)
    assert picture.read_text() == "1"
    assert folder.output.read_text() == "a 1\nb 1\n"
    assert folder.left == ["out.txt", "pictures"]


def tell_paths(job: Job):
    with writing_part(job.part, job.beside) as temporary:
        temporary.write_text(f"{job.hash} x\n")
    return Written([str(path) for path in (job.part, *job.beside)])


def test_workers_are_given_absolute_paths(folder, tmp_path, monkeypatch):
    """Those of a cluster are in another folder."""
    monkeypatch.chdir(tmp_path)
    output = Path("out.txt")
    with exclusive(output):
        plan = [Job("a", "1", "x", beside=(Path("a.png"),))]
        [outcome] = run(output, plan, {}, tell_paths, assemble, 1)
    assert outcome.warnings == [
        f"{tmp_path}/out.txt.parts/a.1.txt",
        f"{tmp_path}/a.png",
    ]


@pytest.mark.parametrize("text", ["", "[", "{}", "[1, null, [2]]", '["../out.txt", "\\u0000"]'])
def test_a_damaged_list_of_half_files_removes_nothing(text, folder):
    folder.run(studies(a="1"))
    parts = folder.output.with_name("out.txt.parts")
    parts.mkdir()
    (parts / "beside.tmp").write_text(text)
    assert folder.run(studies(a="1")) == ["unchanged"]
    assert folder.output.read_text() == "a 1\n"
    assert folder.left == ["out.txt"]


def test_a_half_file_beside_goes_though_its_text_is_as_before_or_no_study_failed(folder, tmp_path):
    listed = tmp_path / "out_failed.csv"
    half = tmp_path / ".out_failed.tmp.csv"
    for payload in ("fails", "fails", "1"):
        half.write_text("half")
        folder.run(studies(a=payload, b="1"), name="preprocessing")
        assert not half.exists()
    assert not listed.exists()


# --- the lock ---------------------------------------------------------------------------------


def test_a_second_holder_is_refused_and_the_first_named(folder):
    with exclusive(folder.output):
        with pytest.raises(
            StageError, match=rf"another run writes this output \(process {os.getpid()} on "
        ):
            exclusive(folder.output).__enter__()
        with pytest.raises(StageError, match="another run writes this output"):
            exclusive(folder.output, lock=False).__enter__()
        assert folder.left == ["out.txt.lock"]
    assert folder.left == []


def test_a_linked_name_of_the_output_has_the_same_lock(folder, tmp_path):
    (tmp_path / "link.txt").symlink_to(folder.output)
    with exclusive(folder.output), pytest.raises(StageError, match="another run writes"):
        exclusive(tmp_path / "link.txt").__enter__()


def test_the_lock_is_free_after_an_error(folder):
    with pytest.raises(ZeroDivisionError), exclusive(folder.output):
        raise ZeroDivisionError
    with exclusive(folder.output):
        pass


def test_a_lock_file_that_its_last_holder_removes_meanwhile_is_made_again(folder, monkeypatch):
    lock, flock, calls = folder.output.with_name("out.txt.lock"), fcntl.flock, []

    def removed_first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            lock.unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with exclusive(folder.output):
        assert len(calls) == 2
        assert lock.exists()


def test_a_new_output_is_a_success_though_nothing_can_be_removed_after_it(folder, monkeypatch):
    """Status 1 said that the output is as it was, and it was new."""
    unlink = os.unlink

    def fail_on_lock_and_temporary(path, **options):
        if str(path).endswith((".lock", ".tmp.txt")):
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", fail_on_lock_and_temporary)
    assert folder.run(studies(a="1")) == ["written"]
    assert folder.output.read_text() == "a 1\n"
    monkeypatch.undo()
    assert folder.run(studies(a="1", b="1")) == ["unchanged", "written"]
    assert folder.left == ["out.txt"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(StageError, match="cannot be created"):
        exclusive(tmp_path / "missing" / "out.txt").__enter__()


def test_a_full_disk_does_not_keep_the_lock_from_being_held(folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with exclusive(folder.output), pytest.raises(StageError, match="unknown process"):
        exclusive(folder.output).__enter__()
