"""SIGINT and SIGTERM as an exception, but not in the middle of what must not be left half done.

An exception that a signal handler raises can come between any two steps. In the forking of
worker processes it is swallowed, and leaves locks held that the next fork waits for.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_held = False
_pending: int | None = None
_ending = False


class Interrupted(BaseException):
    """The run has been asked to end.

    Attributes
    ----------
    signal_number : int
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interrupted` at the first SIGINT or SIGTERM in the body; further ones do nothing.

    The run is ending already then, and must not be kept from tidying up.
    """
    global _held, _pending, _ending
    _held, _pending, _ending = False, None, False
    parent = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        global _pending
        if os.getpid() != parent:
            # A worker that was forked a moment ago.
            os._exit(128 + number)
        if _held:
            _pending = number
        else:
            _end(number)

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in previous.items():
        # A shell has background jobs ignore Ctrl-C.
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Hold signals back in the body; yield what raises `Interrupted` if one has come since."""
    global _held
    outermost, _held = not _held, True
    try:
        yield _raise_pending
    finally:
        if outermost:
            _held = False
    if outermost:
        _raise_pending()


def _raise_pending() -> None:
    if _pending is not None:
        _end(_pending)


def _end(number: int) -> None:
    global _ending
    if not _ending:
        _ending = True
        raise Interrupted(number)
