"""What happens around training that training itself need not know: adapter, merged sibling, evidence, report.

Training calls `left_out`, `after_stage`'s callable and `after_training` by name; the latter two work from exported
folders alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage


def left_out(config: TrainConfig) -> list[str]:
    """Patterns of the parameters that the run's adapter does not carry; none where no adapter is made."""
    from longctx.hooks.adapter import left_out

    return left_out(config)


def after_stage(config: TrainConfig) -> Callable[[Stage, Path, Path], None] | None:
    """evaluate(stage, model folder, results folder) for the end of each stage; None when nothing is asked."""
    if not (config.hooks.lora.enabled and config.hooks.lora.per_stage and config.model.path):
        return None

    def adapter(stage: Stage, model: Path, out: Path) -> None:
        from longctx.hooks.adapter import extract_adapter

        extract_adapter(config, model, out.parent / "adapter")

    return adapter


def after_training(config: TrainConfig, folder: Path) -> int:
    """Adapter, side runs, merged sibling, grids, picture and summary, each once; the exit status."""
    from longctx.hooks.pipeline import run_hooks

    return run_hooks(config, folder)
