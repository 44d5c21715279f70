"""What every rank of a theta search gets: the resolved settings of one stage, and the files that the search writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig
from longctx.config.theta import ThetaConfig
from longctx.curriculum import Stage
from longctx.fingerprint import folder_fingerprint


@dataclass(frozen=True)
class SearchJob:
    """The settings of one search; `floor` is the lowest theta allowed, that of the stage before or of the model."""

    config: ThetaConfig
    model: ModelConfig
    data: DataConfig
    stage: Stage
    floor: int

    @cached_property
    def model_fingerprint(self) -> str:
        """The fingerprint of the model's files, which are read once."""
        return folder_fingerprint(str(self.model.path))

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
