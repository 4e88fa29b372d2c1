"""Commands in a child process with 2 GB more memory and a time limit a case, and how they end."""

import json
import os
import re
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2 << 30
"""What the child may take besides what the tests before it have loaded."""

PATIENCE_S = 120
"""Of what never ends; a busy machine takes long."""


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes
    ----------
    status : int
        Exit status; -1 where the process was killed, -2 where an exception came out.
    said : str
        What was said on stdout and stderr.
    verdict : object
        What a case found out about its result.
    """

    status: int
    said: str
    verdict: Any = None

    @property
    def errors(self) -> list[str]:
        """Lines that tell of an error."""
        return [line for line in self.said.splitlines() if "error: " in line]


def is_clear(line: str) -> bool:
    """Tell whether an error line says what is wrong and what to do, and is no surprise."""
    surprise = re.search(r"unexpected|Traceback|\bNone\b|\bnan\b|not enough memory", line)
    return not surprise and re.fullmatch(r"(.*\.py: )?error: .+: .+", line) is not None


def confined(command: Callable[[], int], patience_s: int = PATIENCE_S) -> Ending:
    """Run one command in a confined process."""
    return next(endings([lambda: (command(), None)], patience_s))


def endings(
    cases: Sequence[Callable[[], tuple[int, Any]]], patience_s: int = PATIENCE_S
) -> Iterator[Ending]:
    """Run cases one after the other in a confined process, in a new one where one is killed."""
    todo = list(cases)
    while todo:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            _run(todo, sender, patience_s)
        os.close(sender)
        for line in _lines(receiver, child, patience_s):
            del todo[0]
            yield Ending(*json.loads(line))
        os.close(receiver)
        _, wait_status = os.waitpid(child, 0)
        if todo:
            del todo[0]
            yield Ending(-1, f"killed, wait status {wait_status}")


def _lines(receiver: int, child: int, patience_s: int) -> Iterator[bytes]:
    """Yield what the child reports; kill it where it hangs, for C code can't be interrupted."""
    pending = b""
    while True:
        if not select.select([receiver], [], [], patience_s + 5)[0]:
            os.kill(child, signal.SIGKILL)
        block = os.read(receiver, 1 << 16)
        if not block:
            return
        *complete, pending = (pending + block).split(b"\n")
        yield from complete


def _run(cases: Sequence[Callable[[], tuple[int, Any]]], sender: int, patience_s: int) -> None:
    most = _address_space_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    said = os.memfd_create("said")
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", closefd=False) for fd in (1, 2))
    try:
        for case in cases:
            os.ftruncate(said, 0)
            os.lseek(said, 0, os.SEEK_SET)
            signal.signal(signal.SIGALRM, _slow)
            signal.alarm(patience_s)
            verdict = None
            try:
                status, verdict = case()
            except SystemExit as exit_:
                status = exit_.code
            except BaseException as error:
                status = -2
                print(f"raised {type(error).__name__}: {error}")
            signal.alarm(0)
            sys.stdout.flush()
            sys.stderr.flush()
            os.lseek(said, 0, os.SEEK_SET)
            text = os.read(said, 1 << 20).decode(errors="replace")
            os.write(sender, json.dumps([status, text, verdict]).encode() + b"\n")
    finally:
        os._exit(0)


def _address_space_bytes() -> int:
    """Return what this process has mapped; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Slow(BaseException):
    pass


def _slow(*signalled: object) -> None:
    raise _Slow
