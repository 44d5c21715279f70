"""Everything `longctx train` can be told.

Identity keys (model, data, curriculum, optim, seed) make a run what it is; the others may change each time a run is
continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from longctx.config.after_training import AfterTrainingConfig
from longctx.config.base import Count, Length, Text, schema
from longctx.config.curriculum import CurriculumConfig
from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig
from longctx.errors import nearest
from longctx.signals import REQUEUES

IDENTITY = ("model", "data", "curriculum", "optim", "seed")
ESTIMATES = ("memory", "disk")  # what a run may start with though it does not fit


def _not_below(config: object, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name}={getattr(config, name)} must be {least} or more")


@schema
class ParallelConfig:
    """How the ranks share the work: cp ranks hold one sequence, world / cp groups hold different ones."""

    cp: int | Literal["auto", "all"] = (
        "auto"  #: ranks per sequence; auto: stage by stage, by seq_len_per_rank; all: every rank
    )
    cp_by_stage: dict[str, int] = field(default_factory=dict)  #: cp of single stages by name: {s1048k: 8}
    seq_len_per_rank: Length = 8192  #: tokens of a sequence that one rank holds at most, under cp=auto
    #: auto: flat_ring inside a node, double_ring over several
    schedule: Literal["auto", "flat_ring", "double_ring", "allgather_ring", "ulysses_ring"] = "auto"
    nodes: int | Literal["auto"] = "auto"  #: nodes that one sequence spans
    ulysses: int | Literal["auto"] = "auto"  #: ranks that trade tokens for heads in ulysses_ring; auto: all of a node

    def __post_init__(self) -> None:
        _not_below(self, 1, "seq_len_per_rank")


@schema
class EngineConfig:
    """Who owns the weights and the optimizer: `ddp` replicates them, `deepspeed` shards them (ZeRO)."""

    name: Literal["ddp", "deepspeed"] = "ddp"  #: set by engine=ddp and engine=deepspeed
    zero: Literal[0, 1, 2, 3] = 0  #: ZeRO stage. 1: optimizer states are sharded; 2: and gradients; 3: and parameters
    offload_optimizer: bool = False  #: keep optimizer states in host memory
    #: the share of the optimizer states that offload_optimizer keeps there; the rest stays on the device (ddp)
    offload_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    offload_parameters: bool = False  #: keep parameters in host memory (zero=3)
    hpz_partition_size: int = 1  #: hpZ: ranks that keep a second copy of the parameters (zero=3, many nodes)
    device: Literal["auto", "cpu", "cuda"] = "auto"  #: where ranks compute; auto: a GPU each where there are some
    micro_batch: int | Literal["auto"] = "auto"  #: sequences per forward; auto: as many as micro_batch_tokens allows
    micro_batch_tokens: Count = 8192  #: tokens of one forward on one rank
    timeout_seconds: float = 1800.0  #: how long a collective may wait for a rank


@schema
class OptimConfig:
    """AdamW, weight decay on matrices only. The learning rate belongs to each stage of the curriculum."""

    beta1: float = 0.9  #: decay of the first moment
    beta2: float = 0.95  #: decay of the second moment
    eps: float = 1e-8  #: added to the root of the second moment
    weight_decay: float = 0.0  #: of matrices, per unit of learning rate
    max_grad_norm: float = 1.0  #: largest global gradient norm; 0 switches clipping off
    z_loss: float = 0.0  #: factor of lse^2 that is added to the loss
    #: patterns of parameters not trained: ['*embed_tokens*','*norm*']. auto: what the run's adapter does not carry (the
    #: input embeddings, unless they are tied); [] trains everything
    freeze: list[str] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more and below 1")
        _not_below(self, 0, "eps", "weight_decay", "max_grad_norm", "z_loss")


@schema
class LoggingConfig:
    """What is shown; metrics.jsonl is always written and is the truth."""

    display: Literal["auto", "rich", "plain", "none"] = "auto"  #: auto: bars on a terminal, lines elsewhere
    every_steps: int = 10  #: steps between plain lines
    wandb: Literal["offline", "online", "disabled"] = "disabled"  #: offline: RUN/wandb, which `wandb sync` uploads
    project: str = "longctx"  #: wandb's project
    peak_tflops: float | None = None  #: dense peak of one device, for MFU; null: from the table of known GPUs


@schema
class CheckpointConfig:
    """When to save: every so many steps, every so many minutes, and always at the end of a stage."""

    every_steps: int = 0  #: steps between checkpoints; 0: by the clock and at stage ends only
    every_minutes: float = 10.0  #: minutes between checkpoints; 0: off
    keep: int = 2  #: checkpoints kept
    #: training goes on while a thread writes a copy of weights and moments; auto: where host memory holds the copy
    background: bool | Literal["auto"] = "auto"
    spare_gib: float = 0.25  #: GiB of disk that must stay free after a save

    def __post_init__(self) -> None:
        _not_below(self, 0, "every_steps", "every_minutes", "keep", "spare_gib")


@schema
class GuardsConfig:
    """What stops or skips a step."""

    spike_factor: float | None = None  #: skip a step whose loss exceeds this multiple of the recent median
    spike_median_steps: int = 50  #: steps of that median
    max_skipped_steps: int = 10  #: so many skipped steps in a row are no spike: the run ends
    stall_seconds: float = 1800.0  #: name the rank that makes no progress for this long, and stop

    def __post_init__(self) -> None:
        _not_below(self, 1, "spike_median_steps", "max_skipped_steps")
        _not_below(self, 0, "stall_seconds")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"spike_factor={self.spike_factor} must be above 1: it multiplies the recent median")


@schema
class ProfileConfig:
    """torch.profiler's trace of chosen steps, in RUN/profile."""

    steps: list[int] | None = None  #: [10,12] records global steps 10 and 11


@schema
class LaunchConfig:
    """How ranks are started; nproc is ignored under torchrun and srun, which bring their own ranks."""

    nproc: int = 1  #: ranks on this machine that `longctx train` starts itself
    threads: int | None = None  #: CPU threads per rank; null: the cores shared out
    meeting_minutes: float = 10.0  #: minutes that ranks of several nodes wait for each other at the start
    until: str | None = None  #: end after this stage, with status 0; the same command without it goes on
    requeues: int = REQUEUES  #: times that the launch scripts start a run again after a save on a signal

    def __post_init__(self) -> None:
        if self.threads is not None:
            _not_below(self, 1, "threads")
        _not_below(self, 0, "requeues")
        if not self.meeting_minutes > 0:
            raise ValueError(f"meeting_minutes={self.meeting_minutes} must be above 0")


@schema
class EvaluateConfig:
    """Held-out loss at the end of each stage."""

    heldout_sequences: int = 8  #: sequences of the stage's own kind; 0: none

    def __post_init__(self) -> None:
        _not_below(self, 0, "heldout_sequences")


@schema
class TrainConfig:
    """The root of configs/train.yaml."""

    name: Text  #: the run's folder is runs/NAME
    seed: int = 0  #: random seed of documents, their order, and new weights
    run_dir: str = ""  #: the run's folder, instead of runs/NAME
    cache: str = ""  #: folder of tokenized documents; empty: RUN/data
    model: ModelConfig
    data: DataConfig
    curriculum: CurriculumConfig  #: the stages; `rope=yarn` is short for curriculum.rule=yarn
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    after_training: AfterTrainingConfig = field(default_factory=AfterTrainingConfig)
    smoke: bool = False  #: first take two steps of every stage's length, in minutes, and throw them away
    #: start although it would be refused: [memory] and [disk] where a stage or its files do not fit by the estimate,
    #: [curriculum] or another key where its change is meant when a run is continued
    accept: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_accept(self.accept)
        if self.model.path is None and (self.after_training.sibling or self.after_training.evidence):
            raise ValueError(
                "after_training.sibling and after_training.evidence compare with the base, and a model drawn with "
                "model.init has none; use after_training=none"
            )

    @property
    def folder(self) -> str:
        """The run's folder."""
        return self.run_dir or f"runs/{self.name}"


def check_accept(accept: Sequence[str]) -> None:
    """Raise ValueError for an entry that accepts nothing, such as a misspelt one."""
    known = (*ESTIMATES, *IDENTITY)
    for entry in accept:
        if entry not in ESTIMATES and entry.partition(".")[0] not in IDENTITY:
            near = nearest(entry, known)
            hint = f"did you mean accept=[{near}]? " if near else ""
            raise ValueError(
                f"accept=[{entry}] accepts nothing: {hint}known: {', '.join(ESTIMATES)}, and the keys whose change a "
                f"continued run refuses ({', '.join(IDENTITY)} and those below them)"
            )
