"""The evidence of a run: needle grids and held-out losses of the models that it compares.

Each model is a Hugging Face folder as anyone would load it; its result is kept in RUN/eval/NAME.json and measured
again only where the model, the questions or the text have changed (longctx.eval.evaluate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longctx.config.after_training import EvidenceSettings
from longctx.config.eval import NeedleConfig
from longctx.eval import loss
from longctx.eval.evaluate import EvalTarget, EvalTasks
from longctx.eval.heldout_text import HeldoutText
from longctx.eval.predict import load_plain
from longctx.eval.stored_results import load_result, store_result
from longctx.fingerprint import fingerprint_of, folder_fingerprint


@dataclass(frozen=True)
class Claim:
    """A model to be evaluated and its questions; unseen: asked in a phrasing that training never saw."""

    target: EvalTarget
    grid: bool = True
    losses: bool = True
    unseen: bool = False

    @property
    def name(self) -> str:
        return self.target.name

    def questions(self, settings: EvidenceSettings) -> EvalTasks:
        phrasing = unseen_phrasing(settings) if self.unseen else settings.needle
        lengths = settings.heldout_lengths if self.losses else ()
        return EvalTasks(phrasing if self.grid else None, lengths, settings.heldout_sequences)


def behaviour(targets: Sequence[EvalTarget], settings: EvidenceSettings, heldout: HeldoutText, out: Path) -> None:
    """Write behaviour.json: each model's loss on short held-out text of the kind that the sibling was tuned on."""
    stored, length = out / "behaviour.json", settings.heldout_lengths[0]
    names = {target.name: folder_fingerprint(target.path) for target in targets}
    key = fingerprint_of({"models": names, "ground": heldout.key, "windows": [length, settings.heldout_sequences]})
    if load_result(stored, key) is not None:
        return
    rows = loss.held_out_rows(heldout, length, settings.heldout_sequences)
    found = {}
    for target in targets:
        model = load_plain(target.path, target.rope, target.window)
        found[target.name] = float(loss.token_losses(model, rows).mean())
    store_result(stored, key, {"losses": found})


def unseen_phrasing(settings: EvidenceSettings) -> NeedleConfig | None:
    """The needle settings with the phrasing that training never saw; None where the config has none."""
    if settings.unseen is None:
        return None
    return replace(settings.needle, needle=settings.unseen.needle, question=settings.unseen.question)
