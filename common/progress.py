"""How far a run has come: a bar on a terminal, sparse plain lines elsewhere, as for cron."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.worker import Outcome

logger = logging.getLogger("tumorvolume")

PROGRESS = logging.WARNING - 5
"""Level of progress lines: shown by default, not with --quiet."""

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
            logger.log(PROGRESS, "%d of %d studies done, %d failed", done, total, failed)

    return advance
