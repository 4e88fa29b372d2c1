"""What this process may use of the machine: CPUs and memory, its control groups included."""

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from common.errors import StageError

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

_UNLIMITED = 1 << 60
"""Limits from here on are version 1's way to say "none" [bytes]."""


LEAST_ADDRESS_SPACE = 400_000_000
"""What a process must be let address [bytes]: with less OpenBLAS tries for ever to get its own."""


def refuse_little_address_space() -> None:
    """Refuse a limit (``ulimit -v``) that leaves no room for the libraries.

    Raises
    ------
    StageError
        It does.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY and most < LEAST_ADDRESS_SPACE:
        raise StageError(
            f"this process may address {most / 1e6:.0f} MB, which is too little: let it have "
            f"{LEAST_ADDRESS_SPACE / 1e6:.0f} MB and what its studies take (ulimit -v)"
        )


def default_jobs(bytes_per_study: int) -> int:
    """Return how many studies to work on at once.

    Parameters
    ----------
    bytes_per_study : int
        What the worker of the largest study takes at most [bytes]; 0 where unknown.

    Returns
    -------
    int
        The CPUs, or as many as memory suffices for where that is fewer; at least 1.
    """
    cpus, memory = available_cpus(), available_memory()
    if memory is None or bytes_per_study <= 0:
        return cpus
    return max(1, min(cpus, memory // bytes_per_study))


def available_cpus(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return the number of CPUs that this process may use: its affinity, or a container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", proc, cgroups):
        quota = _first_words(group / "cpu.max") or [
            *_first_words(group / "cpu.cfs_quota_us"),
            *_first_words(group / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
            cpus = min(cpus, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, cpus)


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Return the memory that this process may still take without swapping [bytes].

    The least of what the kernel says of the machine (MemAvailable) and what the memory limits of
    its control groups, versions 2 and 1, leave. None where nothing is known.
    """
    found = [_room(group) for group in _groups("memory", proc, cgroups)]
    machine = _table(proc / "meminfo").get("MemAvailable:")
    known = [room for room in (*found, machine and machine * 1024) if room is not None]
    return min(known, default=None)


def _room(group: Path) -> int | None:
    """Return what a control group's limit leaves; file cache gives way, so it counts as free."""
    statistics = _table(group / "memory.stat")
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        words = [*_first_words(group / limit), *_first_words(group / usage)]
        if len(words) == 2 and words[0].isdigit() and int(words[0]) < _UNLIMITED:
            return max(0, int(words[0]) - int(words[1]) + statistics.get(cache, 0))
    return None


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield this process's control groups of a controller, from its own up to the root.

    A container may see its own group as the root although its path reads otherwise.
    """
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controller if controllers else cgroups
        inner = root / path.strip("/")
        yield from (group for group in (inner, *inner.parents) if group.is_relative_to(root))


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in _lines(path))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _first_words(path: Path) -> list[str]:
    return next((line.split() for line in _lines(path)), [])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
