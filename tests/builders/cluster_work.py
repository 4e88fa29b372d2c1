"""What the workers of a dask cluster do in tests; they load this module, and little else."""

import logging
import os
import signal
import time
import warnings
from pathlib import Path

from common.errors import IncompleteStudy, StageError, StudyError
from common.run.worker import Written

SECRET = "Doe^Jane"
STAYING: list[bytes] = []

ERRORS = {
    "StudyError": StudyError("no weight: give one", "private text"),
    "IncompleteStudy": IncompleteStudy("no mask"),
    "StageError": StageError("the disk is full"),
    "ValueError": ValueError(SECRET),
    "SystemExit": SystemExit(SECRET),
}


def behave(job):
    """Do as the job says: a kind of behaviour, and its argument."""
    kind, argument = job.work
    if kind == "warn":
        return Written((argument,))
    if kind == "sleep":
        time.sleep(argument)
    elif kind == "wait for":
        while not argument.exists():
            time.sleep(0.02)
    elif kind == "raise":
        raise ERRORS[argument]
    elif kind == "say":
        print(SECRET, flush=True)
        os.write(2, SECRET.encode())
        warnings.warn(SECRET, stacklevel=1)
        logging.getLogger("pydicom").warning(SECRET)
        logging.getLogger("tumorvolume").info("said nothing")
    elif kind == "die":
        die(*argument)
    elif kind == "pid":
        return Written((str(os.getpid()),))
    elif kind == "fill":
        # The C library keeps what is free between what is not.
        pieces = [(b"x" * 1_000_000, b"x" * 2000) for _ in range(argument)]
        STAYING.extend(small for _, small in pieces)
        del pieces
    elif kind == "status":
        return Written((Path("/proc/self/status").read_text(),))
    return Written()


def die(folder: Path, times: int) -> None:
    """Kill this process as often as told, and note each time in a folder."""
    deaths = len(list(folder.iterdir()))
    if deaths < times:
        (folder / f"{deaths}").touch()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
