"""What every rank of a theta search gets: the resolved settings of one stage, and the files that the search writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig
from longctx.config.theta import ThetaConfig
from longctx.curriculum import Stage


@dataclass(frozen=True)
class SearchJob:
    """The settings of one search; `floor` is the lowest theta allowed, that of the stage before or of the model."""

    config: ThetaConfig
    model: ModelConfig
    data: DataConfig
    stage: Stage
    floor: int

    @property
    def folder(self) -> Path:
        return Path(self.config.folder)

    @property
    def png(self) -> Path:
        return Path(self.config.png) if self.config.png else self.folder / f"search-{self.stage.name}.png"

    @property
    def override(self) -> Path:
        """The stage override file."""
        return self.folder / "theta.yaml"
