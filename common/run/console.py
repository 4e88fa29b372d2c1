"""What a run says: its closing line, its log, how far it has come; and nothing else."""

import argparse
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from common.errors import counted
from common.run.worker import Outcome

logger = logging.getLogger("tumorvolume")


PROGRESS = logging.WARNING - 5
"""Level of progress lines: shown by default, not with --quiet."""


# --- stdout ----------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print a line to stdout; a reader that has closed it (``| head``) has seen enough."""
    try:
        print(_encodable(line, sys.stdout), flush=True)
    except OSError:
        # Else the interpreter tries once more at its end, and complains.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _encodable(text: str, stream: Any) -> str:
    """Return a text as a stream can show it: names of files may have what its encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say("  ".join(padded).rstrip())


def open_standard_streams() -> None:
    """Open those that the shell has closed: a file opened in their place would get their text."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


# --- the log, on stderr and in a file --------------------------------------------------------


def set_up_logging(options: argparse.Namespace) -> None:
    """Have the log go to stderr, and to --log-file, from the level that the options ask for.

    Raises
    ------
    OSError
        The log file can't be written.
    """
    level = PROGRESS - 10 * options.verbose
    if options.quiet:
        level = logging.ERROR
    if options.debug:
        level = logging.DEBUG
    # A log that can't be written, on a full disk say, is no reason to stop or to print a traceback.
    logging.raiseExceptions = False
    # What libraries log may quote the values of headers, too.
    logging.lastResort = None
    logging.getLogger("nibabel.global").handlers.clear()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    console = _BarFriendlyHandler()
    console.setFormatter(_LineFormatter())
    console.setLevel(level)
    logger.addHandler(console)
    if options.log_file is not None:
        file = logging.FileHandler(options.log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        file.setLevel(min(level, logging.INFO))
        logger.addHandler(file)


class _BarFriendlyHandler(logging.Handler):
    """Writes lines to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None and sys.stderr.isatty():
                # Of no use elsewhere.
                import tqdm

                tqdm.tqdm.write(self.format(record), file=sys.stderr)
            elif sys.stderr is not None:
                print(_encodable(self.format(record), sys.stderr), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)


class _LineFormatter(logging.Formatter):
    """One line: ``error: ...``, ``warning: ...``, or the message alone."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.ERROR:
            return f"error: {text}"
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def quiet_python() -> Iterator[None]:
    """Keep from stderr what Python and its libraries write there by themselves.

    Warnings, and errors of destructors and threads, may quote the values of headers.
    """
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda error: None
    threading.excepthook = lambda error: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook, threading.excepthook = hooks


class StepTimes:
    """Seconds spent in the named steps of one study."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, step: str) -> None:
        """Add the time since the last call to `step`."""
        now = time.perf_counter()
        self._seconds[step] = self._seconds.get(step, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{step} {seconds:.2f} s" for step, seconds in self._seconds.items())


# --- progress --------------------------------------------------------------------------------

_EVERY_S = 60.0


@contextmanager
def progress(total: int) -> Iterator[Callable[[Outcome], None]]:
    """Yield what to call with each outcome: a bar on a terminal, sparse plain lines elsewhere."""
    if sys.stderr is not None and sys.stderr.isatty():
        # Of no use elsewhere.
        import tqdm

        tqdm.tqdm.monitor_interval = 0
        with tqdm.tqdm(total=total, unit="study", disable=total == 0) as bar:
            yield lambda outcome: bar.update()
    else:
        yield _plain_lines(total)


def _plain_lines(total: int) -> Callable[[Outcome], None]:
    done, failed, last = 0, 0, time.monotonic()

    def advance(outcome: Outcome) -> None:
        nonlocal done, failed, last
        done += 1
        failed += outcome.status == "failed"
        if done < total and time.monotonic() - last >= _EVERY_S:
            last = time.monotonic()
            logger.log(PROGRESS, "%d of %s done, %d failed", done, counted(total), failed)

    return advance
