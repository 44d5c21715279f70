"""The stages that one start of a run has to train, of all in its curriculum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.train.runfolder import is_finished

if TYPE_CHECKING:
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage


def last_due(config: TrainConfig, stages: Sequence[Stage]) -> int:
    """The index in the curriculum of the last stage that this start trains: that of launch.until, or the last."""
    until = [stage.index for stage in stages if stage.name == config.launch.until]
    return max(until or [stage.index for stage in stages], default=-1)


def due(config: TrainConfig, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that this start has to train: the others need not divide over its ranks, nor fit them.

    A finished one was trained on the ranks of an earlier start, and one behind launch.until awaits those of a later.
    """
    last = last_due(config, stages)
    return [s for s in stages if s.index <= last and not is_finished(Path(config.folder), s.name)]
