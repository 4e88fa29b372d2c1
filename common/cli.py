"""What the four scripts share: options, logging, exit status and the closing line."""

import argparse
import difflib
import importlib.util
import logging
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common import console
from common.errors import StageError
from common.hashing import fingerprint
from common.interruption import interruptible
from common.machine import available_cpus
from common.worker import Outcome, traceback_without_text

VERSION = "1.1.0"
SOFTWARE = f"tumorvolume {VERSION}"

DONE = 0
FATAL = 1
WRONG_ARGUMENTS = 2
SOME_FAILED = 3
INTERRUPTED = 130
TERMINATED = 143

logger = logging.getLogger("tumorvolume")


# --- options ---------------------------------------------------------------------------------


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help is the script's docstring with examples at its end."""
    return _Parser(
        description=description,
        epilog="examples:\n" + examples.strip("\n"),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    """Names the nearest option where one is mistyped, before anything else is complained of."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known = list(self._option_string_actions)
        for word in sys.argv[1:] if args is None else args:
            option = word.partition("=")[0]
            if option == "--":
                break
            # Values may follow a short option at once, and a number may be below zero.
            short = re.match(r"-[^-\d.]", option)
            if (option.startswith("--") and option not in known) or (
                short and short[0] not in known
            ):
                nearest = difflib.get_close_matches(f"--{option.lstrip('-')}", known, n=1)
                hint = f": did you mean {nearest[0]}?" if nearest else ": see --help"
                self.error(f"unknown option {option}{hint}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message)
        if choice:
            choices = re.findall(r"[^\s,']+", choice[2])
            nearest = difflib.get_close_matches(choice[1], choices, n=1)
            message += f": did you mean {nearest[0]}?" if nearest else ""
        super().error(message)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of description and examples, with room for the longer options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def add_run_options(target: argparse.ArgumentParser, *, cluster: bool = True) -> None:
    """Add the options that every script has; `cluster` for those whose work may go to one."""
    run = target.add_argument_group("running")
    run.add_argument(
        "-j",
        "--jobs",
        type=positive_int,
        metavar="N",
        help="worker processes (default: the CPUs this process may use, "
        f"{available_cpus()} here, fewer where memory would not suffice)",
    )
    run.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="do only the I-th of N disjoint parts of the studies, for job arrays",
    )
    if cluster:
        run.add_argument(
            "--dask",
            type=dask_address,
            metavar="ADDRESS",
            help="let the workers of a dask.distributed scheduler do the work: tcp://HOST:PORT, or "
            "its scheduler file; they share files and software with this machine, and --jobs then "
            'is the most studies under way at once; "local" starts --jobs workers here',
        )
    run.add_argument("--force", action="store_true", help="start afresh: reuse nothing")
    run.add_argument(
        "--no-lock",
        dest="lock",
        action="store_false",
        help="for file systems without locks: you see to it that no other run writes the output",
    )
    run.add_argument("-v", "--verbose", action="count", default=0, help="say more; -vv still more")
    run.add_argument("-q", "--quiet", action="store_true", help="errors only")
    run.add_argument(
        "--log-file", type=Path, metavar="FILE", help="append the log, with times, to FILE"
    )
    run.add_argument("--debug", action="store_true", help="show tracebacks")
    run.add_argument("--version", action="version", version=SOFTWARE)


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def finite_float(text: str) -> float:
    """Parse a number that is neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def regex(text: str) -> str:
    """Parse a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression: {error}"
        ) from error
    return text


def shard(text: str) -> tuple[int, int]:
    """Parse ``I/N`` with 1 <= I <= N."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N")
    return int(first), int(last)


def dask_address(text: str) -> str:
    """Parse the address of a scheduler: is there the package to talk to it?"""
    if importlib.util.find_spec("distributed") is None:
        raise argparse.ArgumentTypeError(
            'needs the package distributed: pip install "dask[distributed]"'
        )
    return text


def in_shard(study_hash: str, part: tuple[int, int]) -> bool:
    """Tell whether a study belongs to the I-th of N parts; its hash alone decides."""
    index, count = part
    return int(fingerprint(study_hash), 16) % count == index - 1


# --- running ---------------------------------------------------------------------------------


Closing = Callable[[Sequence[Outcome], Path], str]


def run(
    options: argparse.Namespace,
    stage: Callable[[], Sequence[Outcome]],
    closing: Closing | None = None,
) -> int:
    """Run a stage, print its closing line (`closing_line` by default), return the exit status."""
    console.open_standard_streams()
    try:
        console.set_up_logging(options)
    except OSError as error:
        print(f"error: --log-file {options.log_file}: {error.strerror}", file=sys.stderr)
        return WRONG_ARGUMENTS
    with console.quiet_python():
        return interruptible(lambda: _run(options, stage, closing or closing_line), _interrupted)


def _interrupted(signal_number: int) -> int:
    terminated = signal_number == signal.SIGTERM
    logger.error(
        "%s: finished studies are kept, the same command goes on from there",
        "terminated" if terminated else "interrupted",
    )
    return TERMINATED if terminated else INTERRUPTED


def _run(
    options: argparse.Namespace, stage: Callable[[], Sequence[Outcome]], closing: Closing
) -> int:
    try:
        outcomes = stage()
    except Exception as error:
        logger.error("%s", _explain(error))
        if options.debug:
            logger.debug("%s", traceback_without_text(error))
        return FATAL
    console.say(closing(outcomes, options.output))
    return SOME_FAILED if any(o.status == "failed" for o in outcomes) else DONE


def _explain(error: Exception) -> str:
    if isinstance(error, StageError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory: use fewer --jobs"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'a file'}"
    return f"unexpected {type(error).__name__}: run again with --debug and report it"


def closing_line(outcomes: Sequence[Outcome], output: Path) -> str:
    """Return ``12 studies: 9 written, 1 unchanged, 1 skipped, 1 failed -> out.h5``."""
    counts = Counter(outcome.status for outcome in outcomes)
    listed = ", ".join(
        f"{counts[status]} {status}" for status in ("written", "unchanged", "skipped", "failed")
    )
    return f"{len(outcomes)} studies: {listed} -> {output}"
