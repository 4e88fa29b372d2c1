"""Processes run to their end, and what they took."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Run:
    """One finished process: seconds passed, seconds of processor, peak memory [GB]."""

    seconds: float
    cpu_seconds: float
    peak_gb: float


def print_machine(*peers: str) -> None:
    """Print the processor, and the versions of Python and of packages that are compared with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    said = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in said.items()}
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("avx512f", "avx2", "sse4_2") if flag in flags), "")
    model = fields.get("model name") or platform.processor() or platform.machine()
    print(f"{model} ({os.cpu_count()} cores{', ' + widest if widest else ''})")
    versions = (f"{name} {metadata.version(name)}" for name in ("numpy", *peers))
    print(", ".join([f"Python {platform.python_version()}", *versions]))


def run_python(script: Path, *arguments: object) -> Run:
    """Run a script with one BLAS thread; the peak is that of its largest process."""
    command = [sys.executable, str(script), *map(str, arguments)]
    return run(command)


def run(command: Sequence[str]) -> Run:
    """Run a command; ends this process where that fails."""
    start = time.perf_counter()
    environment = {**os.environ, **ONE_THREAD}
    # As it is by default: modules are compiled once, not at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with status {process.returncode}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def median(runs: Sequence[Run]) -> Run:
    """Return medians of the times, and the highest peak."""
    return Run(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.cpu_seconds for run in runs),
        max(run.peak_gb for run in runs),
    )


def print_comparison(plain: Run, ours: Run, script: str, way: str) -> None:
    """Print both ways in a table, and by how much ours is faster."""
    print_runs({way: plain, script: ours})
    ratios = plain.seconds / ours.seconds, plain.cpu_seconds / ours.cpu_seconds
    print(f"| ratio | {ratios[0]:.1f} | {ratios[1]:.1f} | |")


def print_runs(runs: Mapping[str, Run]) -> None:
    """Print a table of named runs."""
    print("| way | time | processor | peak memory |")
    print("|---|---|---|---|")
    for name, result in runs.items():
        times = f"{result.seconds:.2f} s | {result.cpu_seconds:.2f} s"
        print(f"| {name} | {times} | {result.peak_gb:.2f} GB |")
