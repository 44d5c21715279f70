"""The evidence of a run: needle grids and held-out losses of the models that it compares.

Each model is a Hugging Face folder as anyone would load it; its result is kept in RUN/eval/NAME.json and measured
again only where the model, the questions or the text have changed (longctx.eval.evaluate).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longctx import console
from longctx.config.after_training import EvidenceSettings
from longctx.config.eval import NeedleConfig
from longctx.config.train import TrainConfig
from longctx.eval import loss
from longctx.eval.conversations import answer_loss, open_heldout_chat
from longctx.eval.evaluate import EvalTarget, EvalTasks
from longctx.eval.heldout_text import open_heldout_text
from longctx.eval.predict import load_plain
from longctx.eval.stored_results import load_result, store_result
from longctx.fingerprint import fingerprint_of, folder_fingerprint
from longctx.train.preflight import cache_folder


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


def source_losses(
    name: str, source: str, targets: Sequence[EvalTarget], config: TrainConfig, settings: EvidenceSettings,
    tokenizer: Path, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Return each model's loss on a source's held-out text, in nats per token; it is kept in out/NAME.json.

    The rows have the shortest of heldout_lengths. Of conversations the assistant's tokens count, and each is read by
    itself.
    """
    length, count = min(settings.heldout_lengths), settings.heldout_sequences
    cache = cache_folder(config)
    measure: Callable[[Any], float]
    if config.data.sources[source].kind == "chat":
        chat = open_heldout_chat(config.data, source, tokenizer, cache, longest=length, tokens=length * count)
        ground, measure = chat.key, partial(answer_loss, conversations=chat.conversations)
    else:
        heldout = open_heldout_text(config.data, source, tokenizer, cache)
        rows = loss.held_out_rows(heldout, length, count)
        ground, measure = heldout.key, lambda model: float(loss.token_losses(model, rows).mean())
    models = {target.name: [folder_fingerprint(target.path), target.rope, target.window] for target in targets}
    key = fingerprint_of({"models": models, "ground": ground, "windows": [length, count]})
    stored = load_result(out / f"{name}.json", key)
    if stored is None:
        console.say(f"after training: loss on {source} of {', '.join(target.name for target in targets)}")
        found = {target.name: measure(load_plain(target.path, target.rope, target.window)) for target in targets}
        stored = {"losses": found}
        store_result(out / f"{name}.json", key, stored)
    return stored["losses"]


def unseen_phrasing(settings: EvidenceSettings) -> NeedleConfig | None:
    """The needle settings with the phrasing that training never saw; None where the config has none."""
    if settings.unseen is None:
        return None
    return replace(settings.needle, needle=settings.unseen.needle, question=settings.unseen.question)
