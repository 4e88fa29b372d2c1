"""SIGINT and SIGTERM as an exception, but not in the middle of what must not be left half done.

An exception that a signal handler raises can come between any two steps. In the forking of
worker processes it is swallowed, and leaves locks held that the next fork waits for; in a
destructor it is swallowed, too. So it is held back there, and raised again where it was lost.
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


class Interrupted(BaseException):
    """The run has been asked to end.

    Attributes
    ----------
    signal_number : int
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def interruptible(run: Callable[[], int], when_interrupted: Callable[[int], int]) -> int:
    """Return what `run` returns, or, after a first SIGINT or SIGTERM, `when_interrupted(signal)`.

    `run` is left by `Interrupted`. Further signals do nothing: it is ending already then, and must
    not be kept from tidying up.
    """
    global _held, _pending
    _held, _pending = False, None
    parent = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        global _pending
        if os.getpid() != parent:
            # A worker that was forked a moment ago.
            os._exit(128 + number)
        first, _pending = _pending is None, number if _pending is None else _pending
        if first and not _held:
            raise Interrupted(number)

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number, handler in previous.items():
            # A shell has background jobs ignore Ctrl-C.
            if handler is not signal.SIG_IGN:
                signal.signal(number, end)
        status = run()
        # What comes now comes too late.
        _held = True
        return status
    except Interrupted as error:
        return when_interrupted(error.signal_number)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Hold signals back in the body; yield what raises `Interrupted` if one has come."""
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
        raise Interrupted(_pending)
