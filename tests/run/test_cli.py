"""What a user of any script meets: options, lines, statuses; never a traceback."""

import argparse
import importlib
import itertools
import logging
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import StageError
from common.run import cli
from common.run.console import PROGRESS
from common.run.signals import uninterrupted
from common.run.worker import Outcome

ROOT = Path(__file__).parents[2]
SCRIPTS = ("createproject", "preprocessing", "mergeh5", "project_2d")

pytestmark = pytest.mark.timeout(120)


def parser() -> argparse.ArgumentParser:
    made = cli.make_parser("Does it.", "  python script.py")
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--spacing", nargs=3)
    cli.add_run_options(made)
    return made


def options(tmp_path, *more: str) -> argparse.Namespace:
    return parser().parse_args(["-o", str(tmp_path / "out.h5"), *more])


def outcomes(**counts: int) -> list[Outcome]:
    return [
        Outcome(f"{status}{number}", status)
        for status, count in counts.items()
        for number in range(count)
    ]


def script(code: str, *arguments: str, **settings) -> subprocess.CompletedProcess:
    """Run a few lines as a script that has `cli`, in a shell's conditions."""
    return subprocess.run(
        [sys.executable, "-c", HEAD + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )


HEAD = """
import sys, logging, os
from pathlib import Path
from common.errors import StageError
from common.run import cli
from common.run.worker import Outcome
parser = cli.make_parser("Does it.", "  python script.py")
parser.add_argument("-o", "--output", type=Path, default=Path("out.h5"))
cli.add_run_options(parser)
options = parser.parse_args()
log = logging.getLogger("tumorvolume")
"""


# --- Windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_where_there_is_no_fcntl_one_line_says_what_to_do(script):
    without = (
        "import runpy, sys; sys.modules['fcntl'] = None; sys.argv = ['x', '--help'];"
        f"runpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "error: tumorvolume runs on Linux and macOS; on Windows use WSL (wsl --install)\n"
    )


# --- the end of a run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "line", "status"),
    [
        (
            {"written": 9, "unchanged": 1, "skipped": 1, "failed": 1},
            "12 studies: 9 written, 1 unchanged, 1 skipped, 1 failed -> out.h5",
            3,
        ),
        ({"skipped": 2}, "2 studies: 0 written, 0 unchanged, 2 skipped, 0 failed -> out.h5", 0),
        ({"written": 1}, "1 study: 1 written, 0 unchanged, 0 skipped, 0 failed -> out.h5", 0),
        ({}, "0 studies: 0 written, 0 unchanged, 0 skipped, 0 failed -> out.h5", 0),
    ],
)
def test_the_closing_line_and_the_status(counts, line, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = parser().parse_args(["-o", "out.h5"])
    assert cli.run(given, lambda: outcomes(**counts)) == status
    assert capsys.readouterr() == (line + "\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StageError("p.zip: no study in it"), "error: p.zip: no study in it"),
        (MemoryError(), "error: not enough memory: use fewer --jobs"),
        (OSError(5, "Input/output error", "a.h5"), "error: Input/output error: a.h5"),
        (
            ValueError("Doe^Jane"),
            "error: unexpected ValueError: run again with --debug and report it",
        ),
        (
            RecursionError(),
            "error: unexpected RecursionError: run again with --debug and report it",
        ),
    ],
)
def test_a_fatal_error_is_one_line_and_status_1(error, line, tmp_path, capsys):
    def fail():
        raise error

    assert cli.run(options(tmp_path), fail) == 1
    assert capsys.readouterr() == ("", line + "\n")


def test_a_traceback_is_shown_to_those_who_ask(tmp_path, capsys):
    def fail():
        raise ZeroDivisionError

    assert cli.run(options(tmp_path, "--debug"), fail) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sent", "word", "status"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
)
def test_a_signal_ends_a_run_with_one_line(sent, word, status, tmp_path, capsys):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def wait():
        try:
            os.kill(os.getpid(), sent)
            time.sleep(60)
        finally:
            # The second, of an impatient user, comes while the run is tidying up.
            os.kill(os.getpid(), sent)

    assert cli.run(options(tmp_path), wait) == status
    assert capsys.readouterr() == (
        "",
        f"error: {word}: finished studies are kept, the same command goes on from there\n",
    )
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_signal_waits_for_the_end_of_what_must_not_be_interrupted(tmp_path, capsys):
    done = []

    def stage():
        with uninterrupted() as raise_interruption:
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                done.append("inner")
            done.append("outer")
            raise_interruption()
        done.append("never")

    assert cli.run(options(tmp_path), stage) == 143
    assert done == ["inner", "outer"]


def test_a_signal_that_is_lost_in_a_destructor_still_ends_the_run(tmp_path, capsys):
    class Lossy:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)

    def stage():
        Lossy()
        with uninterrupted():
            pass
        return []

    assert cli.run(options(tmp_path), stage) == 130
    assert capsys.readouterr().err.startswith("error: interrupted: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_packages_are_loaded_is_no_traceback(name, tmp_path):
    (tmp_path / "numpy.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('loading').touch()\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, ROOT / f"{name}.py", "--version"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    ) as loading:
        deadline = time.monotonic() + 60
        while not (tmp_path / "loading").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        loading.send_signal(signal.SIGINT)
        assert loading.communicate(timeout=30)[1] == ""
    assert loading.returncode == -signal.SIGINT


def test_a_signal_that_the_shell_ignores_is_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run = cli.run(options(tmp_path), lambda: os.kill(os.getpid(), signal.SIGINT) or [])
    finally:
        signal.signal(signal.SIGINT, before)
    assert run == 0


# --- streams ----------------------------------------------------------------------------------


def levels(tmp_path, capsys, *more: str) -> list[str]:
    logger = logging.getLogger("tumorvolume")

    def say():
        for level in (logging.DEBUG, logging.INFO, PROGRESS, logging.WARNING, logging.ERROR):
            logger.log(level, "%d", level)
        return []

    cli.run(options(tmp_path, *more), say)
    return capsys.readouterr().err.split("\n")[:-1]


def test_verbosity(tmp_path, capsys):
    default = ["25", "warning: 30", "error: 40"]
    assert levels(tmp_path, capsys) == default
    assert levels(tmp_path, capsys, "-q") == ["error: 40"]
    assert levels(tmp_path, capsys, "-v") == ["20", *default]
    assert levels(tmp_path, capsys, "-vv") == ["10", "20", *default]


def test_a_log_file_has_times_and_grows(tmp_path, capsys):
    path = tmp_path / "log"
    for _ in range(2):
        levels(tmp_path, capsys, "-q", "--log-file", str(path))
    lines = path.read_text().splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["20", "25", "30", "40"] * 2
    assert lines[2][:4].isdigit()
    assert " WARNING 30" in lines[2]


def test_a_log_file_that_cannot_be_written_is_status_2_before_any_work(tmp_path, capsys):
    given = options(tmp_path, "--log-file", str(tmp_path / "missing" / "log"))
    assert cli.run(given, lambda: pytest.fail("work began")) == 2
    assert capsys.readouterr() == (
        "",
        f"error: --log-file {tmp_path}/missing/log: No such file or directory\n",
    )


@pytest.mark.parametrize("other", ["in.h5", "out.h5"])
def test_input_and_output_are_no_log_file(tmp_path, capsys, other):
    (tmp_path / "in.h5").write_bytes(b"precious")
    given = options(tmp_path, "--log-file", str(tmp_path / other))
    with pytest.raises(SystemExit) as ended:
        cli.check_paths(parser(), given, [tmp_path / "in.h5"])
    assert ended.value.code == 2
    assert "is another file of this run" in capsys.readouterr().err
    assert (tmp_path / "in.h5").read_bytes() == b"precious"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr", "log"])
def test_a_full_disk_under_log_or_streams_does_not_stop_a_run(stream):
    code = "sys.exit(cli.run(options, lambda: log.warning('x') or [Outcome('a', 'failed')]))"
    given = ["--log-file", "/dev/full"] if stream == "log" else []
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if stream != "log":
            streams[stream] = full
        run = subprocess.run(
            [sys.executable, "-c", HEAD + code, *given], cwd=ROOT, text=True, check=False, **streams
        )
    assert run.returncode == 3
    assert "Traceback" not in (run.stderr or "")
    if stream == "log":
        assert run.stderr == "warning: x\n"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_reader_that_has_gone_away_does_not_stop_a_run(closed):
    """As in ``script.py | head -0``."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, closed: writer}
    code = "sys.exit(cli.run(options, lambda: log.warning('x') or [Outcome('a', 'failed')]))"
    run = subprocess.run([sys.executable, "-c", HEAD + code], cwd=ROOT, check=False, **streams)
    os.close(writer)
    assert run.returncode == 3
    assert b"Traceback" not in (run.stderr or b"")
    assert b"BrokenPipe" not in (run.stderr or b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_do_not_stop_a_run(closed, tmp_path):
    """Nor does what would be written to them go to files that were opened in their place."""
    code = tmp_path / "script.py"
    code.write_text(
        HEAD
        + "from common.run.engine import Engine, run_studies\n"
        + "from common.run.worker import Job, Written\n"
        + "def work(job):\n"
        + "    with open(job.work, 'w') as stream:\n"
        + "        os.write(1, b'x'); os.write(2, b'x'); stream.write('whole')\n"
        + "    return Written()\n"
        + "def stage():\n"
        + "    log.warning('x')\n"
        + "    work(Job('', '', 'whole'))\n"
        + "    return run_studies(work, [Job('a', '', 'part')], Engine(1))\n"
        + "sys.exit(cli.run(options, stage))\n"
    )
    run = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" "{code}" {closed}'],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert (tmp_path / "whole").read_text() == (tmp_path / "part").read_text() == "whole"


def test_what_libraries_say_does_not_reach_the_user():
    run = script(
        "import warnings, nibabel, pydicom\n"
        "def stage():\n"
        "    warnings.warn('Doe^Jane')\n"
        "    for name in ('pydicom', 'nibabel.global', 'highdicom', 'PIL', 'any'):\n"
        "        logging.getLogger(name).error('Doe^Jane')\n"
        "    return []\n"
        "sys.exit(cli.run(options, stage))"
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_warnings_are_as_they_were_after_a_run(tmp_path):
    filters = list(warnings.filters)
    cli.run(options(tmp_path), list)
    assert warnings.filters == filters


# --- options ----------------------------------------------------------------------------------


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--spacin", "unknown option --spacin: did you mean --spacing?"),
        ("--ouput", "unknown option --ouput: did you mean --output?"),
        ("--log_file=x", "unknown option --log_file: did you mean --log-file?"),
        ("--zzzzzz", "unknown option --zzzzzz: see --help"),
        ("-x", "unknown option -x: see --help"),
        ("-spacing", "unknown option -spacing: did you mean --spacing?"),
    ],
)
def test_a_mistyped_option_names_the_nearest(word, message, capsys):
    assert refusal(capsys, word, "2") == message


@pytest.mark.parametrize(
    ("word", "hint"),
    [("gzp", ": did you mean gzip?"), ("LZF", ""), ("zst", ""), ("nne", ": did you")],
)
def test_a_mistyped_choice_names_the_nearest(word, hint, capsys):
    target = parser()
    target.add_argument("--compression", choices=("gzip", "lzf", "none"))
    with pytest.raises(SystemExit):
        target.parse_args(["-o", "x", "--compression", word])
    told = capsys.readouterr().err
    assert f"invalid choice: '{word}' (choose from " in told
    assert hint in told
    assert bool(hint) == ("did you mean" in told)


def test_values_after_short_options_and_below_zero_are_no_unknown_options():
    target = parser()
    target.add_argument("--range", nargs=2, type=float)
    read = target.parse_args(["-ox", "-j2", "-vv", "--range", "-1000", "-.5"])
    assert (read.output, read.jobs, read.verbose, read.range) == (Path("x"), 2, 2, [-1000, -0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-j", "0"), "'0' is not a whole number of at least 1"),
        (("-j", "two"), "'two' is not a whole number of at least 1"),
        (("--shard", "0/3"), "'0/3' is not I/N with 1 <= I <= N"),
        (("--shard", "4/3"), "'4/3' is not I/N"),
        (("--shard", "3"), "'3' is not I/N"),
        (("--shard", "1/3/5"), "'1/3/5' is not I/N"),
        (("--shard", "-1/3"), "expected one argument"),
    ],
)
def test_run_options_out_of_range_are_refused(arguments, message, capsys):
    assert message in refusal(capsys, "-o", "x", *arguments)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1,5", ""])
def test_numbers_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
        cli.finite_float(text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help_version_and_the_run_options(name, capsys):
    main = importlib.import_module(name).main
    texts = []
    for arguments, status in ((["--help"], 0), (["--version"], 0), ([], 2)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
        texts.append(capsys.readouterr().out)
    assert texts[1:] == [f"{cli.SOFTWARE}\n", ""]
    for option in (
        *("--jobs", "--shard", "--no-lock", "--force"),
        *("--verbose", "--quiet", "--log-file", "--debug"),
    ):
        assert option in texts[0]
    assert ("--dask" in texts[0]) == (name != "mergeh5")
    assert "examples:" in texts[0]


SLOW_TO_LOAD = [
    "pydicom",
    "gdcm",
    "scipy",
    "nibabel",
    "nilearn",
    "skimage",
    "jinja2",
    "PIL",
    "dask",
    "distributed",
    "tqdm",
]


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("arguments", [["--help"], ["--shap"], ["nowhere", "-o", "out"]])
def test_help_and_wrong_arguments_do_not_wait_for_what_is_slow_to_load(name, arguments, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}\n"
        f"try: {name}.main({arguments!r})\n"
        "except SystemExit as end: status = end.code\n"
        f"slow = sorted(set({SLOW_TO_LOAD!r}) & set(sys.modules))\n"
        "print(status, slow, file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.stderr.splitlines()[-1] == f"{0 if arguments == ['--help'] else 2} []"


# --- shards and paths -------------------------------------------------------------------------


HASHES = [f"{number:010x}" for number in range(500)]


def shards(hashes: Sequence[str], n_shards: int) -> list[set[str]]:
    return [cli.of_shard(hashes, (index, n_shards)) for index in range(1, n_shards + 1)]


@pytest.mark.parametrize("n_studies", [0, 1, 7, 100, 500])
@pytest.mark.parametrize("n_shards", [1, 2, 3, 7, 100])
def test_shards_are_disjoint_complete_and_even(n_studies, n_shards):
    hashes = HASHES[:n_studies]
    parts = shards(hashes, n_shards)
    assert sorted(itertools.chain(*parts)) == hashes
    mean = n_studies / n_shards
    assert max(map(len, parts)) <= max(math.ceil(mean), 1.05 * mean)
    assert parts == shards(hashes[::-1], n_shards)


def test_hardly_a_study_changes_its_shard_when_another_comes():
    before = shards(HASHES, 5)
    moved = [
        sum(
            len(old - new)
            for old, new in zip(before, shards([*HASHES, f"{n:010x}"], 5), strict=True)
        )
        for n in range(500, 520)
    ]
    assert sum(moved) <= 20


def test_paths_that_cannot_be_are_refused(tmp_path, capsys):
    (tmp_path / "in.h5").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.h5").symlink_to(tmp_path / "in.h5")
    (tmp_path / "dangling.h5").symlink_to(tmp_path / "missing" / "x.h5")
    for inputs, output, message in (
        (["none.h5"], "out.h5", "does not exist"),
        (["in.h5"], "in.h5", "is an input"),
        (["in.h5"], "link.h5", "is an input"),
        (["in.h5"], "folder", "is a folder"),
        (["in.h5"], "missing/out.h5", "does not exist: make it first"),
        (["in.h5"], "dangling.h5", "does not exist: make it first"),
    ):
        given = argparse.Namespace(output=tmp_path / output, log_file=None)
        with pytest.raises(SystemExit) as ended:
            cli.check_paths(parser(), given, [tmp_path / name for name in inputs])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    cli.check_paths(parser(), options(tmp_path), [tmp_path / "in.h5"])
