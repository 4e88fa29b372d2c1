"""The four scripts as they are interrupted: tiny inputs, what each leaves, runs in processes."""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest

import createproject
import mergeh5
import preprocessing
import project_2d

PATIENCE_S = 120
"""With a machine that has much else to do."""

N_STUDIES = 4
NO_STATUS = 99

Files = dict[str, bytes]
"""Contents by name, relative to a folder."""


@dataclass(frozen=True)
class Stage:
    """One script with the command line that is interrupted; paths are relative to a folder."""

    main: Callable[[Sequence[str]], int]
    inputs: tuple[str, ...]
    output: str
    options: tuple[str, ...]
    other_options: tuple[str, ...]
    jobs: tuple[str, ...] = ("-j", "2")

    @property
    def name(self) -> str:
        return self.main.__module__

    def command(self, *more: str) -> list[str]:
        return [*self.inputs, "-o", self.output, *self.options, *self.jobs, *more]


BESIDE = ("--measures", "out/m.csv", "--save-nifti", "out/nii", "--report", "out/r.html")
SMALL = ("--spacing", "4", "4", "5", "--shape", "10", "10")
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            createproject.main,
            ("raw",),
            "out/p.zip",
            ("--pet-units", "suv"),
            ("--pet-units", "suv", "--suv-type", "ibw"),
        ),
        Stage(
            preprocessing.main,
            ("p.zip",),
            "out/p.h5",
            (*SMALL, *BESIDE),
            (*SMALL, "--iso-threshold", "50"),
        ),
        Stage(
            mergeh5.main,
            ("a.h5", "b.h5"),
            "out/all.h5",
            ("--splits", "2", "--splits-dir", "out/folds"),
            ("--link",),
            jobs=(),
        ),
        Stage(
            project_2d.main,
            ("a.h5",),
            "out/mips.h5",
            ("--angles", "0", "180", "60", "--png", "out/png", "--gif", "out/gif"),
            ("--angles", "0", "180", "90"),
        ),
    )
}


def write_inputs(folder: Path) -> Path:
    """Write the input of every stage to a folder: tiny NIfTI studies, a zip, two 3D files."""
    rng = np.random.default_rng(7)
    affine = np.diag([4.0, 4.0, 5.0, 1.0])
    mask = np.zeros((10, 10, 8), np.uint8)
    mask[3:6, 3:6, 3:6] = 1
    for number in range(N_STUDIES):
        study = folder / "raw" / f"patient{number // 2}" / f"study{number}"
        study.mkdir(parents=True)
        for role, volume in (
            ("ct", rng.integers(-1000, 1000, mask.shape, np.int16)),
            ("pet", rng.random(mask.shape, np.float32) * 8 * (1 + mask)),
            ("mask", mask),
        ):
            nibabel.save(nibabel.Nifti1Image(volume, affine), study / f"{role}.nii.gz")
    chain = (
        (createproject.main, "raw -o p.zip --pet-units suv"),
        (preprocessing.main, "p.zip -o a.h5 --shard 1/2 " + " ".join(SMALL)),
        (preprocessing.main, "p.zip -o b.h5 --shard 2/2 " + " ".join(SMALL)),
    )
    for main, command in chain:
        assert finished(start(main, command.split(), folder)).status == 0
    return folder


def run_uninterrupted(inputs: Path) -> dict[str, tuple[Files, Files, float]]:
    """Return what each stage leaves if nothing happens, old options and new, and its time [s]."""
    found = {}
    for name, stage in STAGES.items():
        folder = prepared(inputs, inputs.parent / f"{inputs.name}_{name}")
        old = finished(start(stage.main, with_other_options(stage), folder))
        left_by_old = contents(folder / "out")
        began = time.monotonic()
        new = finished(start(stage.main, stage.command(), folder))
        duration_s = time.monotonic() - began
        assert (old.status, new.status) == (0, 0), old.stderr + new.stderr
        found[name] = (left_by_old, contents(folder / "out"), duration_s)
    return found


def with_other_options(stage: Stage) -> list[str]:
    return [*stage.inputs, "-o", stage.output, *stage.other_options, *stage.jobs]


def prepared(inputs: Path, folder: Path, old: Files | None = None) -> Path:
    """Make a folder that a stage can run in, with links to the inputs, and an old output."""
    (folder / "out").mkdir(parents=True)
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    restore(old or {}, folder / "out")
    return folder


def restore(files: Files, folder: Path) -> None:
    """Make a folder hold these files and nothing else."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder: Path) -> Files:
    """Every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def before_only(before: Files, new: Files) -> Files:
    """Return what a run leaves of the files that were there before."""
    return {name: content for name, content in before.items() if name not in new}


# --- running and killing ----------------------------------------------------------------------


@dataclass
class Run:
    """A script under way, or how it ended."""

    pid: int
    folder: Path
    status: int | None = None
    stdout: str = ""
    stderr: str = ""
    seconds: float = field(default_factory=time.monotonic)


def start(
    main: Callable[[Sequence[str]], int],
    command: Sequence[str],
    folder: Path,
    prepare: Callable[[], None] = lambda: None,
) -> Run:
    """Run a script in a forked process, the leader of its own group, with output to files."""
    texts = folder / "log"
    texts.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return Run(pid, folder)
    status = NO_STATUS
    try:
        os.setsid()
        os.chdir(folder)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"log/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        # As the scripts do.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        prepare()
        status = main(command)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stderr.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # Whatever happens, the child must not go on as a second pytest.
        os._exit(status)


def finished(run: Run, patience_s: float = PATIENCE_S) -> Run:
    """Wait for a run's end; negative status: the signal that ended it."""
    deadline = time.monotonic() + patience_s
    while True:
        pid, status = os.waitpid(run.pid, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > deadline:
            os.killpg(run.pid, signal.SIGKILL)
            os.waitpid(run.pid, 0)
            pytest.fail(f"no end in {patience_s} s\n" + (run.folder / "log/stderr").read_text())
        time.sleep(0.002)
    run.status = os.waitstatus_to_exitcode(status)
    run.seconds = time.monotonic() - run.seconds
    run.stdout = (run.folder / "log/stdout").read_text()
    run.stderr = (run.folder / "log/stderr").read_text()
    assert "Traceback" not in run.stderr, run.stderr
    return run


def members(group: int) -> list[int]:
    """The living processes of a group, workers after their parent."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(entry.name))
    return sorted(found)


def wait_for_orphans(group: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while members(group):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.01)


def n_to_compute(stderr: str) -> int:
    return int(re.search(r"(\d+) to compute", stderr)[1])


def finished_parts(folder: Path, stage: Stage) -> set[str]:
    parts = folder / f"{stage.output}.parts"
    return {p.name for p in parts.glob("*") if ".tmp" not in p.name} if parts.is_dir() else set()
