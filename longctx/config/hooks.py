"""What happens after training: the adapter, the merged sibling, and the evidence with its controls.

All of it runs from exported folders, once each; a piece that stands in the run's folder and was made from the same
models and settings is not made again, so that the same command continues here too.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from longctx.config.base import Length, Text, schema
from longctx.config.curriculum import StageConfig
from longctx.config.eval import NeedleConfig


@schema
class LoraHook:
    """The adapter of tuned minus base, by longctx.lora. per_stage: one after every stage as well.

    profile: `full` carries norms too; embeddings: None decides by tying, as lora-extract does.
    """

    enabled: bool = True
    per_stage: bool = False
    rank: int = 32
    profile: Literal["full", "serving"] = "full"
    embeddings: bool | None = None


@schema
class SideRun:
    """Another training from the same base, in RUN/side/NAME, with one stage of its own."""

    stage: StageConfig


@schema
class SiblingHook:
    """A different fine-tune of the same base, into which the adapter is merged: a folder, or made by a run.

    behaviour: the source of text whose held-out loss says what the sibling is good at.
    """

    path: Text | None = None
    run: SideRun | None = None
    behaviour: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.run is None):
            raise ValueError("a sibling is either a folder (path=...) or made by a run (run.stage=...), not both")


@schema
class Phrasing:
    """A needle and its question as training never wrote them."""

    needle: str = "Remember: {key} opens vault {value}."
    question: str = "Which vault does {key} open? {key} opens vault {value}."


@schema
class EvidenceHook:
    """The needle grids, their controls, and loss on held-out text.

    control: a side run that spends the same tokens at the base's window and theta. unseen: another phrasing.
    heldout_lengths, heldout_windows: windows of held-out text for the loss of base and every stage.
    source: whose held-out documents are the haystack and the text.
    """

    needle: NeedleConfig = field(default_factory=NeedleConfig)
    theta_only: bool = True
    control: SideRun | None = None
    unseen: Phrasing | None = field(default_factory=Phrasing)
    heldout_lengths: tuple[Length, ...] = (512,)
    heldout_windows: int = 64
    source: str = "stdlib"


@schema
class HooksConfig:
    """lora: on by default; sibling and evidence: where asked for."""

    lora: LoraHook = field(default_factory=LoraHook)
    sibling: SiblingHook | None = None
    evidence: EvidenceHook | None = None

    def __post_init__(self) -> None:
        if self.sibling is not None and not self.lora.enabled:
            raise ValueError("a sibling is what the adapter is merged into; set lora.enabled=true, or sibling=null")
