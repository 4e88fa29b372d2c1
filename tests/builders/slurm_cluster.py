"""A Slurm of one node, of this machine's own programs, in a folder: its daemons end with it."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
START_S = 20

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
KillWait=2
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={host} Default=YES PriorityTier=1
PartitionName=first Nodes={host} PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str:
    """Return why there can be no Slurm here; empty where there can."""
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=PATH) is None]
    return f"Slurm is not installed: no {', '.join(missing)}" if missing else ""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of users of a cluster, whose state is in a folder.

    Raises
    ------
    RuntimeError
        It does not start here.
    """
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    place = {"folder": folder, "host": host, "user": getpass.getuser(), "ports": free_ports()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**place))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
    for name in [name for name in environment if name.startswith("SBATCH_")]:
        del environment[name]
    try:
        for daemon in DAEMONS:
            subprocess.run([daemon], env=environment, check=True, capture_output=True)
        await_node(environment)
        yield environment
    finally:
        for daemon in reversed(DAEMONS):
            end(folder / f"{daemon}.pid")


def free_ports() -> list[int]:
    """Return two ports that no one listens on now."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in (one, other)]


def await_node(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        told = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
        )
        if "idle" in told.stdout:
            return
        time.sleep(0.1)
    raise RuntimeError(f"no idle node: {told.stdout} {told.stderr}")


def end(pid_file: Path) -> None:
    """End a daemon by the file that holds its process id, with the jobs that it runs."""
    with suppress(OSError, ValueError):
        process = int(pid_file.read_text())
        os.kill(process, signal.SIGTERM)
        for _ in range(100):
            os.kill(process, 0)
            time.sleep(0.05)


def state_of(job: str, environment: dict[str, str]) -> dict[str, str]:
    """Return what Slurm tells of a job, by name."""
    told = subprocess.run(
        ["scontrol", "show", "job", "-o", job], env=environment, capture_output=True, text=True
    )
    return dict(word.partition("=")[::2] for word in told.stdout.split())


def await_end(job: str, environment: dict[str, str], patience_s: float = 400) -> dict[str, str]:
    """Return what Slurm tells of a job that has ended."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        told = state_of(job, environment)
        if told.get("JobState") not in ("PENDING", "RUNNING", "COMPLETING"):
            return told
        time.sleep(0.1)
    raise RuntimeError(f"job {job} does not end: {told}")
