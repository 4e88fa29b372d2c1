"""What the four scripts share: options, checks of their paths, exit status and closing line."""

import argparse
import difflib
import importlib.util
import logging
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import StageError, counted
from common.hashing import fingerprint
from common.run import console
from common.run.atomic import behind_links
from common.run.engine import Engine
from common.run.failures import failures_file
from common.run.lock import lock_file
from common.run.machine import available_cpus, refuse_little_address_space
from common.run.output import parts_folder
from common.run.signals import interruptible
from common.run.store import why_not_a_store
from common.run.worker import (
    NOT_ENOUGH_MEMORY,
    Outcome,
    traceback_without_text,
    unexpected,
)
from common.version import SOFTWARE

logger = logging.getLogger("tumorvolume")

DONE = 0
FATAL = 1
WRONG_ARGUMENTS = 2
SOME_FAILED = 3
INTERRUPTED = 130
TERMINATED = 143


# --- options ---------------------------------------------------------------------------------


def make_parser(description: str, examples: str) -> argparse.ArgumentParser:
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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of an option's choices, as argparse does, and name the nearest."""
        choices = list(action.choices or [value])
        if value not in choices:
            nearest = difflib.get_close_matches(value, choices, n=1)
            hint = f": did you mean {nearest[0]}?" if nearest else ""
            listed = ", ".join(map(repr, choices))
            refusal = f"invalid choice: {value!r} (choose from {listed}){hint}"
            raise argparse.ArgumentError(action, refusal)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of description and examples, with room for the longer options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def add_run_options(parser: argparse.ArgumentParser, *, cluster: bool = True) -> None:
    """Add the options that every script has; `cluster` for those whose work may go to one."""
    run = parser.add_argument_group("running")
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
            type=refuse_without_dask,
            metavar="ADDRESS",
            help="let the workers of a dask.distributed scheduler do the work: tcp://HOST:PORT, or "
            "its scheduler file; they share files and software with this machine, and --jobs then "
            'is the most studies under way at once; "local" starts --jobs workers here',
        )
    else:
        parser.set_defaults(dask=None)
    run.add_argument("--force", action="store_true", help="start afresh: reuse nothing")
    run.add_argument(
        "--allow-shrink",
        action="store_true",
        help="replace an output that would lose more than a tenth of its studies, and more than "
        "one, because they are no longer in the input",
    )
    run.add_argument(
        "--no-lock",
        dest="lock",
        action="store_false",
        help="for file systems without locks: signs of life in OUTPUT.lock alone keep another run "
        "away",
    )
    run.add_argument("-v", "--verbose", action="count", default=0, help="say more; -vv still more")
    run.add_argument("-q", "--quiet", action="store_true", help="errors only")
    run.add_argument(
        "--log-file", type=Path, metavar="FILE", help="append the log, with times, to FILE"
    )
    run.add_argument("--debug", action="store_true", help="show tracebacks")
    run.add_argument("--version", action="version", version=SOFTWARE)


def add_compression_option(
    group: argparse._ArgumentGroup,
    compressions: Sequence[str],
    missing_packages: Mapping[str, str],
    meaning: str,
) -> None:
    """Add the option of how the HDF5 file is compressed, the first of some by default.

    Parameters
    ----------
    group
        Of the parser.
    compressions : sequence of str
    missing_packages : dict of compression to package
        Of those that can't be had as the software is installed.
    meaning : str
        What the help says of them.
    """

    def compression(text: str) -> str:
        if package := missing_packages.get(text):
            raise argparse.ArgumentTypeError(
                f"{text} needs the package {package}: pip install {package}"
            )
        return text

    group.add_argument(
        "--compression",
        type=compression,
        choices=compressions,
        default=compressions[0],
        help=meaning,
    )


def add_store_option(group: argparse._ArgumentGroup) -> None:
    """Add the option of an output that grows by what is new."""
    group.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="keep a file a study in DIR, and make the output an index of links to them: one "
        "study more writes that study and the index, not all; keep both together",
    )


def engine(options: argparse.Namespace) -> Engine:
    """Return who does the work, by --jobs and --dask."""
    return Engine(options.jobs, options.dask)


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


def refuse_without_dask(text: str) -> str:
    """Return the address of a scheduler as it is; refuse it where no package can talk to one."""
    if importlib.util.find_spec("distributed") is None:
        raise argparse.ArgumentTypeError(
            'needs the package distributed: pip install "dask[distributed]"'
        )
    return text


def of_shard(hashes: Iterable[str], part: tuple[int, int]) -> set[str]:
    """Return which studies of all belong to the I-th of N parts.

    A study's hash chooses its part; where that is full, the next with room takes it. A part is full
    a twentieth above the mean: so all take about as long, and of many studies hardly one changes
    its part, and is computed again, when others come or go.
    """
    index, count = part
    studies = sorted(set(hashes))
    if count == 1:
        return set(studies)
    most = max(-(-len(studies) // count), len(studies) * 21 // (20 * count))
    parts: list[set[str]] = [set() for _ in range(count)]
    for study_hash in studies:
        chosen = int(fingerprint(study_hash), 16) % count
        while len(parts[chosen]) == most:
            chosen = (chosen + 1) % count
        parts[chosen].add(study_hash)
    return parts[index - 1]


# --- paths that the options name -------------------------------------------------------------


@contextmanager
def checking(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End with status 2 where a path can't even be looked at."""
    try:
        yield
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}: check the path and its permissions")


def check_files(parser: argparse.ArgumentParser, inputs: Sequence[Path]) -> None:
    """End with status 2 where an input is missing, or a device or pipe, which may never end."""
    _check_exist(parser, inputs)
    for path in inputs:
        if not (path.is_file() or path.is_dir()):
            parser.error(f"input {path} is a device or pipe: give a file")


def _check_exist(parser: argparse.ArgumentParser, inputs: Sequence[Path]) -> None:
    for path in inputs:
        if not path.exists():
            parser.error(f"input {path} does not exist")


def check_paths(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    inputs: Sequence[Path],
    secrets: Sequence[Path] = (),
) -> None:
    """As `check_files`; and where the output or the log can't be or is an input.

    Secrets may come through a pipe.
    """
    check_files(parser, inputs)
    _check_exist(parser, secrets)
    inputs = [*inputs, *secrets]
    output: Path = options.output
    for path in inputs:
        if output.exists() and output.samefile(path):
            parser.error(f"output {output} is an input: choose another name")
    if output.is_dir():
        parser.error(f"output {output} is a folder: give a file name")
    if output.exists() and not output.is_file():
        parser.error(f"output {output} is a device or pipe: give a file name")
    if not output.resolve().parent.is_dir():
        parser.error(
            f"folder {output.resolve().parent} of the output does not exist: make it first"
        )
    for path in inputs:
        _check_is_none_of(parser, path, _own_files(output))
    check_log_file(parser, options, [*inputs, output])


def check_log_file(
    parser: argparse.ArgumentParser, options: argparse.Namespace, others: Sequence[Path]
) -> None:
    """End with status 2 where the log would go into another file of this run."""
    if options.log_file is not None:
        own = _own_files(options.output) if options.output is not None else []
        _check_is_none_of(parser, options.log_file, [*others, *own])


def check_side_output(
    parser: argparse.ArgumentParser, path: Path, options: argparse.Namespace, inputs: Sequence[Path]
) -> None:
    """End with status 2 where a file beside the output can't be written or is another one."""
    _check_is_none_of(parser, path, [*inputs, options.output, *_own_files(options.output)])
    if options.log_file is not None:
        _check_is_none_of(parser, path, [options.log_file])
    if path.exists() and not path.is_file():
        parser.error(f"{path} is a folder, device or pipe: give a file name")
    if not path.parent.is_dir():
        parser.error(f"folder {path.parent} of {path.name} does not exist: make it first")
    beside = path.parent.resolve() == options.output.parent.resolve()
    # The output's own folder is tried by the stage.
    if not beside and not os.access(path.parent, os.W_OK):
        parser.error(
            f"folder {path.parent} of {path.name} can't be written to: see its permissions"
        )


def _own_files(output: Path) -> list[Path]:
    """Return what a stage writes and removes beside its output unasked."""
    return [lock_file(output), failures_file(output)]


def _check_is_none_of(parser: argparse.ArgumentParser, path: Path, others: Sequence[Path]) -> None:
    for other in others:
        if path.resolve() == other.resolve() or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            parser.error(f"{path} is another file of this run: choose another name")


def check_store(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with status 2 where the folder for --store can't be the output's."""
    if options.store is None:
        return
    options.store = behind_links(options.store)
    check_folder(parser, options.store, options)
    if fault := why_not_a_store(options.store, options.output):
        parser.error(f"--store {options.store}: {fault}")


def check_folder(parser: argparse.ArgumentParser, path: Path, options: argparse.Namespace) -> None:
    """End with status 2 where a folder for results is a file, or can't be made or written to."""
    parts = parts_folder(options.output)
    path = path.resolve()
    if path == options.output.resolve() or parts in (path, *path.parents):
        parser.error(f"folder {path} is the output, or in {parts.name}: choose another name")
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        parser.error(f"{there} is not a folder")
    # The output's own folder is tried by the stage.
    beside = options.output.resolve().parent in (there, *there.parents)
    if not beside and not os.access(there, os.W_OK | os.X_OK):
        parser.error(f"folder {there} can't be written to: see its permissions")


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
        refuse_little_address_space()
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
        return NOT_ENOUGH_MEMORY
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename or 'a file'}"
    return unexpected(error)


def closing_line(outcomes: Sequence[Outcome], output: Path) -> str:
    """Return ``12 studies: 9 written, 1 unchanged, 1 skipped, 1 failed -> out.h5``."""
    counts = Counter(outcome.status for outcome in outcomes)
    listed = ", ".join(
        f"{counts[status]} {status}" for status in ("written", "unchanged", "skipped", "failed")
    )
    return f"{counted(len(outcomes))}: {listed} -> {output}"
