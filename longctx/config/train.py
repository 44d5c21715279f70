"""Config schema of `longctx train`.

Identity keys (model, data, curriculum, optim, seed) make a run what it is; the others may change each time a run is
continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from longctx.config.after_training import AfterTrainingConfig
from longctx.config.base import (
    AboveZero,
    Count,
    Epsilon,
    Length,
    MachineCount,
    Minutes,
    NotNegative,
    PerMachine,
    Positive,
    RunName,
    Seconds,
    Seed,
    Share,
    ShareAboveZero,
    ZeroOrMore,
    schema,
)
from longctx.config.curriculum import CurriculumConfig
from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig
from longctx.errors import nearest
from longctx.signals import REQUEUES

Decay = Annotated[Share, Field(lt=1)]
IDENTITY = ("model", "data", "curriculum", "optim", "seed")
ESTIMATES = ("memory", "disk")  # what a run may start with though it does not fit


@schema
class ParallelConfig:
    """How the ranks share the work: cp ranks hold one sequence, world / cp groups hold different ones."""

    #: ranks per sequence; auto: stage by stage, by seq_len_per_rank; all: every rank
    cp: Positive | Literal["auto", "all"] = "auto"
    cp_by_stage: dict[str, Positive] = field(default_factory=dict)  #: cp of single stages by name: {s1048k: 8}
    seq_len_per_rank: Length = 8192  #: tokens of a sequence that one rank holds at most, under cp=auto
    #: schedule of attention; auto: flat_ring inside a node, double_ring over several
    schedule: Literal["auto", "flat_ring", "double_ring", "allgather_ring", "ulysses_ring"] = "auto"
    nodes: MachineCount | Literal["auto"] = "auto"  #: nodes that one sequence spans
    #: ranks that trade tokens for heads in ulysses_ring; auto: all of a node
    ulysses: PerMachine | Literal["auto"] = "auto"


@schema
class EngineConfig:
    """Who owns the weights and the optimizer: `ddp` replicates them, `deepspeed` shards them (ZeRO)."""

    #: engine: replication or DeepSpeed's ZeRO; set by engine=ddp and engine=deepspeed
    name: Literal["ddp", "deepspeed"] = "ddp"
    zero: Literal[0, 1, 2, 3] = 0  #: ZeRO stage. 1: optimizer states are sharded; 2: and gradients; 3: and parameters
    offload_optimizer: bool = False  #: keep optimizer states in host memory
    #: the share of the optimizer states that offload_optimizer keeps there; the rest stays on the device (ddp)
    offload_ratio: ShareAboveZero = 1.0
    offload_parameters: bool = False  #: keep parameters in host memory (zero=3)
    hpz_partition_size: Positive = 1  #: hpZ: ranks that keep a second copy of the parameters (zero=3, many nodes)
    device: Literal["auto", "cpu", "cuda"] = "auto"  #: where ranks compute; auto: a GPU each where there are some
    #: sequences per forward; auto: as many as micro_batch_tokens allows
    micro_batch: Positive | Literal["auto"] = "auto"
    micro_batch_tokens: Count = 8192  #: tokens of one forward on one rank
    timeout_seconds: Seconds = 1800.0  #: how long a collective may wait for a rank


@schema
class OptimConfig:
    """AdamW, weight decay on matrices only. The learning rate belongs to each stage of the curriculum."""

    beta1: Decay = 0.9  #: decay of the first moment
    beta2: Decay = 0.95  #: decay of the second moment
    eps: Epsilon = 1e-8  #: added to the root of the second moment
    #: decay of matrices, per unit of learning rate: a step multiplies them by 1 - rate x weight_decay, which no rate of
    #: the curriculum may take below 0
    weight_decay: ZeroOrMore = 0.0
    max_grad_norm: ZeroOrMore = 1.0  #: largest global gradient norm; 0 switches clipping off
    z_loss: ZeroOrMore = 0.0  #: factor of lse^2 that is added to the trained loss; the reported one leaves it out
    #: patterns of parameters not trained: ['*embed_tokens*','*norm*']. auto: what the run's adapter does not carry (the
    #: input embeddings, unless they are tied); [] trains everything
    freeze: list[str] | Literal["auto"] = "auto"


@schema
class LoggingConfig:
    """What is shown; metrics.jsonl is always written and is the truth."""

    #: display of progress; auto: bars on a terminal, lines elsewhere
    display: Literal["auto", "rich", "plain", "none"] = "auto"
    every_steps: Positive = 10  #: steps between lines of display=plain
    #: mode of wandb; offline: RUN/wandb, which `wandb sync` uploads
    wandb: Literal["offline", "online", "disabled"] = "disabled"
    project: str = "longctx"  #: wandb's project
    peak_tflops: AboveZero | None = None  #: dense peak of one device, for MFU; null: from the table of known GPUs


@schema
class CheckpointConfig:
    """When to save: every so many steps, every so many minutes, and always at the end of a stage."""

    every_steps: NotNegative = 0  #: steps between checkpoints; 0: by the clock and at stage ends only
    every_minutes: ZeroOrMore = 10.0  #: minutes between checkpoints; 0: off
    keep: Positive = 2  #: checkpoints kept
    #: training goes on while a thread writes a copy of weights and moments; auto: where host memory holds the copy
    background: bool | Literal["auto"] = "auto"
    spare_gib: ZeroOrMore = 0.25  #: GiB of disk that must stay free after a save


@schema
class GuardsConfig:
    """What stops or skips a step."""

    #: skip a step whose loss exceeds this multiple of the recent median; null: none is skipped
    spike_factor: Annotated[AboveZero, Field(gt=1)] | None = None
    spike_median_steps: Positive = 50  #: steps of the recent median that spike_factor multiplies
    max_skipped_steps: Positive = 10  #: so many skipped steps in a row are no spike: the run ends
    #: name the rank that makes no progress for this long, and stop; 0: wait for ever
    stall_seconds: Annotated[ZeroOrMore, Field(le=1e6)] = 1800.0


@schema
class ProfileConfig:
    """torch.profiler's trace of chosen steps, in RUN/profile."""

    #: [10,12] records global steps 10 and 11, counted from 0: the lines of steps 11 and 12 in metrics.jsonl
    steps: list[NotNegative] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and (len(self.steps) != 2 or self.steps[0] >= self.steps[1]):
            raise ValueError(f"steps={self.steps} must be two steps, first and end, such as 'profile.steps=[10,12]'")


@schema
class LaunchConfig:
    """How ranks are started; nproc is ignored under torchrun and srun, which bring their own ranks."""

    nproc: PerMachine = 1  #: ranks on this machine that `longctx train` starts itself
    threads: PerMachine | None = None  #: CPU threads per rank; null: the cores shared out
    meeting_minutes: Minutes = 10.0  #: minutes that ranks of several nodes wait for each other at the start
    until: str | None = None  #: end after this stage, with status 0; the same command without it goes on
    requeues: NotNegative = REQUEUES  #: times that the launch scripts start a run again after a save on a signal


@schema
class EvaluateConfig:
    """Held-out loss at the end of each stage."""

    #: held-out sequences at a stage's end, of the stage's own kind; 0: none
    heldout_sequences: Annotated[NotNegative, Field(le=100_000)] = 8


@schema
class TrainConfig:
    """The root of configs/train.yaml."""

    name: RunName  #: the run's folder is runs/NAME
    seed: Seed = 0  #: random seed of documents, their order, and new weights
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
        self._check_decay()
        if self.model.path is None and (self.after_training.sibling or self.after_training.evidence):
            raise ValueError(
                "after_training.sibling and after_training.evidence compare with the base, and a model drawn with "
                "model.init has none; use after_training=none"
            )

    def _check_decay(self) -> None:
        """Raise ValueError where the decay of a step at a stage's peak would turn the weights' signs."""
        only = self.curriculum.only or self.curriculum.stages
        stages = {f"curriculum.stages.{name}": stage for name, stage in self.curriculum.stages.items() if name in only}
        for key, side in self.after_training.side_runs.values():
            stages[f"after_training.{key}.stage"] = side.stage
        for where, stage in stages.items():
            own = stage.lr.peak is not None
            peak = stage.lr.peak if own else self.curriculum.lr.peak
            if peak is not None and peak * self.optim.weight_decay > 1:
                raise ValueError(
                    f"optim.weight_decay={self.optim.weight_decay:g} is too much for "
                    f"{where if own else 'curriculum'}.lr.peak={peak:g}: each step multiplies the matrices by 1 - rate "
                    f"x weight_decay, which must not fall below 0; take weight_decay={int(1 / peak)} or less (0.1 is "
                    "customary)"
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
