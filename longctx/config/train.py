"""Everything `longctx train` can be told.

Identity keys (model, data, curriculum, optim, seed) make a run what it is; the free ones (parallel, engine,
logging, checkpoint, guards, profile, launch, hooks, evaluate) may change each time a run is continued.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from longctx.config.base import Length, Text, schema
from longctx.config.curriculum import CurriculumConfig
from longctx.config.data import DataConfig
from longctx.config.hooks import HooksConfig
from longctx.config.model import ModelConfig


def _not_below(config: object, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name}={getattr(config, name)} must be {least} or more")


@schema
class ParallelConfig:
    """How the ranks share the work: cp ranks hold one sequence, world / cp groups hold different ones."""

    cp: int | Literal["auto"] = "auto"
    stages: dict[str, int] = field(default_factory=dict)
    tokens_per_rank: Length = 8192
    schedule: Literal["auto", "flat_ring", "double_ring", "allgather_ring", "ulysses_ring"] = "auto"
    nodes: int | Literal["auto"] = "auto"
    ulysses: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        _not_below(self, 1, "tokens_per_rank")


@schema
class EngineConfig:
    """Who owns the weights and the optimizer: `ddp` replicates them, `deepspeed` shards them (ZeRO)."""

    name: Literal["ddp", "deepspeed"] = "ddp"
    zero: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    secondary_partition: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch: int | Literal["auto"] = "auto"
    micro_batch_tokens: Length = 8192
    timeout_seconds: float = 1800.0


@schema
class OptimConfig:
    """AdamW; the learning rate belongs to each stage of the curriculum.

    freeze: patterns of parameter names that are not trained. `auto`: what the run's adapter does not carry (the input
    embeddings, by default), so that the adapter carries all that is trained; nothing where no adapter is made.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    z_loss: float = 0.0
    freeze: list[str] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more and below 1")
        _not_below(self, 0, "eps", "weight_decay", "clip", "z_loss")


@schema
class LoggingConfig:
    """What is shown; metrics.jsonl is always written and is the truth."""

    display: Literal["auto", "rich", "plain", "none"] = "auto"
    every: int = 10
    wandb: Literal["offline", "online", "disabled"] = "disabled"
    project: str = "longctx"
    peak_tflops: float | None = None


@schema
class CheckpointConfig:
    """When to save: every so many steps, every so many minutes, and always at the end of a stage."""

    every: int = 0
    minutes: float = 10.0
    keep: int = 2
    spare_gib: float = 0.25

    def __post_init__(self) -> None:
        _not_below(self, 0, "every", "minutes", "keep", "spare_gib")


@schema
class GuardsConfig:
    """What stops or skips a step. spike: skip when the loss exceeds this multiple of the median of the last
    spike_window steps; spike_steps skips in a row, for a spike or for want of a token that carries loss, end the run.
    """

    spike: float | None = None
    spike_window: int = 50
    spike_steps: int = 10
    stall_seconds: float = 1800.0

    def __post_init__(self) -> None:
        _not_below(self, 1, "spike_window", "spike_steps")
        _not_below(self, 0, "stall_seconds")
        if self.spike is not None and self.spike <= 1:
            raise ValueError(f"spike={self.spike} must be above 1: it multiplies the recent median")


@schema
class ProfileConfig:
    """steps=[10,12] records global steps 10 and 11 with torch.profiler into RUN/profile."""

    steps: list[int] | None = None


@schema
class LaunchConfig:
    """Ranks that `longctx train` starts itself; ignored under torchrun and srun."""

    nproc: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None:
            _not_below(self, 1, "threads")


@schema
class EvaluateConfig:
    """Held-out loss at the end of each stage, over this many sequences of the stage's own kind."""

    heldout_sequences: int = 8

    def __post_init__(self) -> None:
        _not_below(self, 0, "heldout_sequences")


@schema
class TrainConfig:
    """The root of configs/train.yaml. cache: folder of tokenized documents (none: RUN/data).

    accept: identity keys whose change is meant when a run is continued; memory: start a stage that seems not to fit.
    """

    name: Text
    seed: int = 0
    run_dir: str = ""
    cache: str = ""
    model: ModelConfig
    data: DataConfig
    curriculum: CurriculumConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    hooks: HooksConfig = field(default_factory=HooksConfig)
    accept: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.model.path is None and (self.hooks.sibling or self.hooks.evidence):
            raise ValueError(
                "hooks.sibling and hooks.evidence compare with the base, and a model drawn with model.init has none; "
                "use hooks=none"
            )

    @property
    def folder(self) -> str:
        """The run's folder."""
        return self.run_dir or f"runs/{self.name}"
