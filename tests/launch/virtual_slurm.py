"""A real Slurm of virtual nodes on this machine, without systemd and cgroups: its daemons, jobs, and their end.

Debian's slurm-wlm lets one machine run several slurmd, each a node with a name and an address in 127.0.0.0/8. Names
must resolve, because the first node's name is where ranks meet, so they stand in /etc/hosts while the cluster is up.
Several clusters may be up at once: names, ports and the numbers of jobs, from which ports follow, are a cluster's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from longctx.processes import alive

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")
HOSTS = Path("/etc/hosts")
MARK = "  # longctx tests, process "
CONF = """
ClusterName=longctx
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=0
JobRequeue=1
KillWait=20
FirstJobId={job}
MinJobAge=600
NodeName={nodes} NodeHostname={host} NodeAddr={addresses} Port={ports} CPUs=8 RealMemory=20000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why no virtual Slurm can run here, or None."""
    if os.getuid() != 0:
        return "needs root"
    lacking = [name for name in DAEMONS if daemon(name) is None]
    return f"needs {', '.join(lacking)}: apt-get install --no-install-recommends slurm-wlm munge" if lacking else None


def daemon(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class VirtualSlurm:
    """A cluster of `nodes` nodes of 8 cores; a context manager."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder, self.prefix = folder, f"lcx{os.getpid()}n"
        self.names = [f"{self.prefix}{number}" for number in range(1, nodes + 1)]
        self.environment = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def __enter__(self) -> VirtualSlurm:
        folder, count = self.folder, len(self.names)
        for name in ("", "state", *(f"spool-{name}" for name in self.names)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        _set_hosts([f"127.0.0.{11 + index} {name}{MARK}{os.getpid()}" for index, name in enumerate(self.names)])
        first = _free_ports(count + 1)
        conf = CONF.format(
            host=socket.gethostname().split(".")[0], dir=folder, job=1000 * (os.getpid() % 10000) + 1, control=first,
            ports=f"[{first + 1}-{first + count}]", nodes=f"{self.prefix}[1-{count}]",
            addresses=f"127.0.0.[11-{10 + count}]",
        )  # fmt: skip
        (folder / "slurm.conf").write_text(conf)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        own = ("key-file", "key"), ("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed")
        self._start("munged", "--force", *(f"--{option}={folder}/munge.{end}" for option, end in own))
        self._start("slurmctld", "-c", "-f", f"{folder}/slurm.conf")
        for name in self.names:
            self._start("slurmd", "-N", name, "-f", f"{folder}/slurm.conf")
        until(lambda: self("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split() == self.names, 30)
        return self

    def __exit__(self, *_: object) -> None:
        self("scancel", "--full", "--user", "root")
        until(lambda: not self("squeue", "-h"), 30, must=False)
        files = [*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munge.pid"]
        for pid in [int(file.read_text()) for file in files if file.exists() and file.read_text().strip()]:
            os.kill(pid, signal.SIGTERM)
            until(lambda pid=pid: not alive(pid), 10, must=False)
        _set_hosts([])

    def __call__(self, *command: str, check: bool = False) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(
        self, words: Sequence[str], log: Path, *options: str, environment: dict[str, str] | None = None,
        script: Path = SCRIPT,
    ) -> SlurmJob:  # fmt: skip
        """Submit the launch script with these words of a command line, and these options of sbatch."""
        values = {**self.environment, **(environment or {})}
        given = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}", *options]
        done = subprocess.run(
            ["sbatch", *given, str(script), *words], env=values, capture_output=True, text=True, cwd=log.parent,
            check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return SlurmJob(self, done.stdout.strip().split(";")[0], log)

    def _start(self, name: str, *words: str) -> None:
        command = daemon(name)
        assert command is not None
        subprocess.run([command, *words], env=self.environment, check=True, timeout=60)


class SlurmJob:
    """A job of the launch script."""

    def __init__(self, slurm: VirtualSlurm, number: str, log: Path) -> None:
        self.slurm, self.number, self.log = slurm, number, log

    def facts(self) -> dict[str, str]:
        """JobState, ExitCode, Restarts, NodeList and so on, as scontrol shows them."""
        shown = self.slurm("scontrol", "-o", "show", "job", self.number)
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def ended(self, seconds: float = 240) -> int:
        """Wait for the job's end, and return the script's exit status."""
        self.wait(lambda: self.state in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"), seconds)
        status, number = self.facts()["ExitCode"].split(":")
        return int(status) or 128 * bool(int(number)) + int(number)

    def wait(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        assert until(condition, seconds, must=False), (self.facts(), self.said)

    def step_runs(self) -> bool:
        return f"{self.number}.0" in self.slurm("squeue", "-h", "-s", "-j", self.number, "-o", "%i").split()

    def runs_rank(self, rank: int) -> bool:
        """Whether the process of a task of the job's step is there."""
        return self._pid(rank) is not None

    def pid_of_rank(self, rank: int) -> int:
        """The pid of a task of the job's step."""
        found = self._pid(rank)
        assert found is not None, f"no task is rank {rank} of job {self.number}"
        return found

    def _pid(self, rank: int) -> int | None:
        job = self.facts()["JobId"]  # a task of an array has one of its own
        wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                names = set(path.read_text(errors="replace").split("\0"))
                command = (path.parent / "cmdline").read_text()
            except OSError:
                continue
            if wanted <= names and "longctx.run" in command and "srun" not in command:
                return int(path.parent.name)
        return None

    def continue_now(self, *changes: str) -> None:
        """Wait until the job is back in the queue, change it, and start it without Slurm's pause of two minutes."""
        self.wait(lambda: self.state in ("PENDING", "REQUEUED"))
        time.sleep(1.0)  # the daemons still clear the old start away
        self.wait(lambda: self.state == "PENDING")
        self.slurm("scontrol", "update", f"jobid={self.number}", *changes, "StartTime=now", check=True)
        self.wait(lambda: self.state != "PENDING")


def until(condition: Callable[[], bool], seconds: float, *, must: bool = True) -> bool:
    """Wait until the condition holds, and return whether it does; must: else fail."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            assert not must, "the virtual Slurm did not come up"
            return False
        time.sleep(0.1)
    return True


def _set_hosts(lines: Sequence[str]) -> None:
    """Give /etc/hosts these lines of ours, and none of processes that have ended.

    The file may be a mount, so it is written in place.
    """

    def others(line: str) -> bool:
        _, mark, pid = line.partition(MARK)
        return not mark or (pid != str(os.getpid()) and alive(int(pid)))

    kept = [line for line in HOSTS.read_text().splitlines() if others(line)]
    HOSTS.write_text("\n".join([*kept, *lines]) + "\n")


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    for first in range(16800, 30000, count):
        try:
            for port in range(first, first + count):
                socket.create_server(("", port)).close()
        except OSError:
            continue
        return first
    raise OSError("no free ports")
