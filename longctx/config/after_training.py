"""What happens after training: the adapter, the merged sibling, and the evidence with its controls.

All of it runs from exported folders, once each; a piece that is in the run's folder and was made from the same
models and settings is not made again, so that the same command continues here too.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from longctx.config.base import Given, Positive, Samples, Window, schema
from longctx.config.curriculum import StageConfig
from longctx.config.data import check_template
from longctx.config.eval import NeedleConfig


@schema
class AdapterSettings:
    """The adapter, tuned minus base, in PEFT's format (RUN/adapter)."""

    enabled: bool = True  #: whether an adapter is made
    per_stage: bool = False  #: also make an adapter after every stage
    rank: Positive = 32  #: rank of the LoRA factors
    #: tensors carried; serving: layers only, no lm_head, embeddings or norms
    profile: Literal["full", "serving"] = "full"
    #: whether the adapter carries the embeddings; null: in profile full when they are tied to the output layer
    embeddings: bool | None = None


@schema
class SideRun:
    """Another training from the same base, in RUN/side/NAME, with one stage of its own."""

    stage: StageConfig


@schema
class SiblingSettings:
    """A different fine-tune of the same base, into which the adapter is merged: a folder, or made by a run."""

    path: Given | None = None  #: the folder of a fine-tune that exists
    run: SideRun | None = None
    behaviour: str | None = None  #: the source whose held-out loss shows what the sibling was tuned for

    def __post_init__(self) -> None:
        if (self.path is None) == (self.run is None):
            raise ValueError("a sibling is either a folder (path=...) or made by a run (run.stage=...), not both")


@schema
class Phrasing:
    """A needle and its question as training never wrote them."""

    needle: str = "Remember: {key} opens vault {value}."  #: phrasing of the needle, with {key} and {value}
    #: phrasing of the question, with {key} and {value}
    question: str = "Which vault does {key} open? {key} opens vault {value}."

    def __post_init__(self) -> None:
        check_template("needle", self.needle)
        check_template("question", self.question)


@schema
class EvidenceSettings:
    """The needle grids, their controls, and loss on held-out text."""

    needle: NeedleConfig = field(default_factory=NeedleConfig)
    theta_only: bool = True  #: also evaluate the base with the last theta and no training
    control: SideRun | None = None  #: a side run that spends the same tokens at the base's window and theta
    unseen: Phrasing | None = field(default_factory=Phrasing)  #: also ask in a phrasing that training never saw
    heldout_lengths: tuple[Window, ...] = (512,)  #: windows of held-out text, for the loss of base and every stage
    heldout_sequences: Samples = 64  #: held-out sequences per length
    source: str = "stdlib"  #: source whose held-out documents are the haystack and the text
    beside: tuple[str, ...] = ()  #: further sources whose held-out loss shows what extending costs there, such as chat

    def __post_init__(self) -> None:
        if self.beside and not self.heldout_lengths:
            raise ValueError("heldout_lengths=[] must name at least one where beside names sources")


@schema
class AfterTrainingConfig:
    """What is made after training: the adapter by default, sibling and evidence where asked for."""

    lora: AdapterSettings = field(default_factory=AdapterSettings)
    sibling: SiblingSettings | None = None
    evidence: EvidenceSettings | None = None

    def __post_init__(self) -> None:
        if self.sibling is not None and not self.lora.enabled:
            raise ValueError("a sibling is what the adapter is merged into; set lora.enabled=true, or sibling=null")
        if self.evidence and not self.evidence.heldout_lengths and self.sibling and self.sibling.behaviour:
            raise ValueError("sibling.behaviour is a loss on held-out text; give evidence.heldout_lengths one length")

    @property
    def side_runs(self) -> dict[str, tuple[str, SideRun]]:
        """The side runs that are asked for: {name: (the key below after_training, the side run)}."""
        sides = {
            "sibling": ("sibling.run", self.sibling.run if self.sibling else None),
            "control": ("evidence.control", self.evidence.control if self.evidence else None),
        }
        return {name: (key, side) for name, (key, side) in sides.items() if side is not None}
