"""Config schema of `longctx submit`: that of `longctx train`, and the Slurm job that it becomes."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated

from pydantic import Field

from longctx.config.base import MachineCount, NotNegative, PerMachine, Positive, Text, schema
from longctx.config.hardware import HardwareConfig
from longctx.config.train import LaunchConfig, TrainConfig

# The options of sbatch that a job has from other keys: an option given twice has one value only.
_OWN = {
    "time": "launch.time", "t": "launch.time", "nodes": "launch.nodes", "N": "launch.nodes",
    "ntasks": "launch.ranks_per_node", "n": "launch.ranks_per_node", "ntasks-per-node": "launch.ranks_per_node",
    "cpus-per-task": "launch.cpus_per_task", "c": "launch.cpus_per_task", "gres": "launch.gres",
    "gpus-per-node": "launch.gpus_per_node", "signal": "launch.lead_seconds", "job-name": "name", "J": "name",
    "account": "launch.account", "A": "launch.account", "partition": "launch.partition", "p": "launch.partition",
    "qos": "launch.qos", "q": "launch.qos", "constraint": "launch.constraint", "C": "launch.constraint",
    "output": "run_dir", "o": "run_dir",
}  # fmt: skip


def seconds_of(time: str) -> int | None:
    """The seconds of a time limit as sbatch reads it; None for no limit. Raises ValueError for anything else.

    Without days a single number is minutes, and two are minutes and seconds; behind days (`D-`) the first is hours.
    """
    if time.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not found:
        raise ValueError(
            f"time={time} is not a time limit of Slurm; write minutes, HH:MM:SS, D-HH or D-HH:MM:SS, such as 24:00:00"
        )
    if found[1]:
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups()[:4])
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    first, second, third = found.groups()[4:]
    if third:
        return (int(first) * 60 + int(second)) * 60 + int(third)
    return int(first) * 60 + int(second or 0)


@schema
class SlurmConfig(LaunchConfig):
    """A Slurm job: its nodes, its limits, and what its script sets before the ranks start."""

    nodes: MachineCount = 1  #: machines of the job
    #: GPUs of a machine, a rank on each; 0: none, and ranks_per_node says how many ranks
    gpus_per_node: Annotated[NotNegative, Field(le=4096)] = 8
    ranks_per_node: PerMachine | None = None  #: ranks of a machine; null: one per GPU
    cpus_per_task: PerMachine = 8  #: cores of each rank
    gres: Text | None = None  #: in place of --gpus-per-node, where a cluster names its GPUs: gpu:h100:8
    account: Text | None = None  #: Slurm's --account
    partition: Text | None = None  #: Slurm's --partition
    qos: Text | None = None  #: Slurm's --qos
    constraint: Text | None = None  #: Slurm's --constraint
    #: time limit, as sbatch takes it (minutes, HH:MM:SS, D-HH:MM:SS); a run that needs longer is queued again
    time: Text = "24:00:00"
    #: seconds before the time limit at which Slurm asks the run to save
    lead_seconds: Annotated[Positive, Field(le=65535)] = 600
    container: Text | None = None  #: image in which the ranks run (srun --container-image, by pyxis)
    mounts: list[Text] = field(default_factory=list)  #: mounts of the container, HOST:CONTAINER
    setup: list[Text] = field(default_factory=list)  #: lines of shell before the ranks start: ['module load cuda']
    environment: dict[str, Text] = field(default_factory=dict)  #: variables of the ranks: NCCL's, the fabric's, HF_HOME
    sbatch: list[Text] = field(default_factory=list)  #: further options of sbatch: ['--exclusive']
    rank_logs: bool = True  #: a log file for each rank, besides the job's
    per_stage: bool = False  #: a job for each stage, which waits for the one before
    nodes_by_stage: dict[str, MachineCount] = field(default_factory=dict)  #: machines of single stages: {s1048k: 64}

    def __post_init__(self) -> None:
        if not self.gpus_per_node and self.ranks_per_node is None:
            raise ValueError("gpus_per_node=0 leaves the number of ranks open; give ranks_per_node")
        if self.mounts and self.container is None:
            raise ValueError("mounts belong to a container; give its image as container=IMAGE")
        if self.nodes_by_stage and not self.per_stage:
            raise ValueError("nodes_by_stage needs a job for each stage; set per_stage=true")
        if self.per_stage and self.until is not None:
            raise ValueError(
                "per_stage=true makes a job that ends after each stage, so until says nothing; leave one of them out "
                "(curriculum.only=[...] names the stages)"
            )
        limit = seconds_of(self.time)
        if limit is not None and limit <= self.lead_seconds:
            raise ValueError(
                f"time={self.time} is {limit} s, and lead_seconds={self.lead_seconds} before its end the run is asked "
                "to save: it would be asked at once, without a step; give it more time, or a smaller lead_seconds"
            )
        self._check_words()

    def _check_words(self) -> None:
        """Refuse options and variables that a script cannot hold, or that other keys give."""
        for option in self.sbatch:
            found = re.match(r"--?([A-Za-z][A-Za-z-]*)", option)
            if not found or "\n" in option:
                raise ValueError(f"sbatch: {option!r} is not an option of sbatch; they begin with --, as --exclusive")
            name = found[1] if option.startswith("--") else found[1][0]
            if name in _OWN:
                raise ValueError(f"sbatch: {option} is given by {_OWN[name]}; set that key instead")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment: {name!r} is not the name of a variable; take letters, digits and _")

    @property
    def ranks(self) -> int:
        """Ranks of a machine."""
        return self.ranks_per_node or self.gpus_per_node


@schema
class SubmitConfig(TrainConfig):
    """The root of configs/submit.yaml: everything a training command says, and its job."""

    launch: SlurmConfig = field(default_factory=SlurmConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)  #: the GPUs for which memory is checked
    dry_run: bool = False  #: print the script and submit nothing
