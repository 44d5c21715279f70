"""What `longctx submit` can be told: everything `longctx train` can, and the Slurm job that it becomes."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field

from longctx.config.base import MachineCount, NotNegative, PerMachine, Positive, Text, schema
from longctx.config.hardware import HardwareConfig
from longctx.config.train import LaunchConfig, TrainConfig


@schema
class SlurmConfig(LaunchConfig):
    """A Slurm job: its nodes, its limits, and what its script sets before the ranks start."""

    nodes: MachineCount = 1  #: machines of the job
    gpus_per_node: Annotated[NotNegative, Field(le=4096)] = (
        8  #: GPUs of a machine, a rank on each; 0: none, and ranks_per_node says how many ranks
    )
    ranks_per_node: PerMachine | None = None  #: null: one per GPU
    cpus_per_task: PerMachine = 8  #: cores of each rank
    gres: Text | None = None  #: in place of --gpus-per-node, where a cluster names its GPUs: gpu:h100:8
    account: Text | None = None  #: --account
    partition: Text | None = None  #: --partition
    qos: Text | None = None  #: --qos
    constraint: Text | None = None  #: --constraint
    time: Text = "24:00:00"  #: time limit, as sbatch takes it; a run that needs longer is queued again
    lead_seconds: Positive = 600  #: seconds before the time limit at which Slurm asks the run to save
    container: Text | None = None  #: image in which the ranks run (srun --container-image, by pyxis)
    mounts: list[Text] = field(default_factory=list)  #: its mounts, HOST:CONTAINER
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
