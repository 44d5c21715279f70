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
from longctx.errors import UserError
from longctx.eval import loss, needle
from longctx.eval.conversations import answer_loss, open_heldout_chat
from longctx.eval.evaluate import EvalTarget, EvalTasks
from longctx.eval.heldout_text import HeldoutText, open_heldout_text
from longctx.eval.predict import load_plain
from longctx.eval.stored_results import load_result, store_result
from longctx.fingerprint import fingerprint_of, folder_fingerprint
from longctx.train.checks import cache_folder


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
    ground, measure = _open_source(source, config, settings, tokenizer)
    models = {target.name: [folder_fingerprint(target.path), target.rope, target.window] for target in targets}
    key = fingerprint_of({"models": models, "ground": ground, "windows": [length, count]})
    stored = load_result(out / f"{name}.json", key)
    if stored is None:
        console.say(f"after training: loss on {source} of {', '.join(target.name for target in targets)}")
        found = {target.name: measure(load_plain(target.path, target.rope, target.window)) for target in targets}
        stored = {"losses": found}
        store_result(out / f"{name}.json", key, stored)
    return stored["losses"]


def _open_source(
    source: str, config: TrainConfig, settings: EvidenceSettings, tokenizer: Path | str
) -> tuple[str, Callable[[Any], float]]:
    """The fingerprint of a source's held-out documents, and the function that gives a model's loss on them."""
    length, count, cache = min(settings.heldout_lengths), settings.heldout_sequences, cache_folder(config)
    if config.data.sources[source].kind == "chat":
        chat = open_heldout_chat(config.data, source, tokenizer, cache, longest=length, tokens=length * count)
        return chat.key, partial(answer_loss, conversations=chat.conversations)
    heldout = open_heldout_text(config.data, source, tokenizer, cache)
    remark_short_text(heldout, length, source)
    rows = loss.held_out_rows(heldout, length, count)
    return heldout.key, lambda model: float(loss.token_losses(model, rows).mean())


def remark_short_text(heldout: HeldoutText, longest: int, source: str) -> None:
    """Warn where the held-out text is shorter than a sequence. (`longctx eval` refuses that.)"""
    if longest > heldout.tokens:
        console.remark(
            f"source {source} holds out {heldout.tokens:,} tokens and sequences of {longest:,} are asked for, so the "
            "text repeats itself inside them; raise data.heldout or add documents"
        )


def check_evidence(config: TrainConfig, settings: EvidenceSettings, tokenizer: str) -> None:
    """Raise UserError where the needles or losses that are asked for cannot be drawn from the held-out documents."""
    heldout = open_heldout_text(config.data, settings.source, tokenizer, cache_folder(config))
    for name, asked in (("needle", settings.needle), ("unseen", unseen_phrasing(settings))):
        try:
            if asked is not None:
                needle.check_lengths(asked, heldout.writer, heldout.haystack)
        except UserError as error:
            raise UserError(f"after_training.evidence.{name}: {error} (configs/after_training)") from None
    for source in further_sources(config, settings):
        _open_source(source, config, settings, tokenizer)


def further_sources(config: TrainConfig, settings: EvidenceSettings) -> dict[str, str]:
    """The sources other than evidence.source whose held-out loss is measured, and the name of each result's file."""
    found = {source: f"beside_{source}" for source in settings.beside}
    sibling = config.after_training.sibling
    return {**found, sibling.behaviour: "behaviour"} if sibling is not None and sibling.behaviour is not None else found


def unseen_phrasing(settings: EvidenceSettings) -> NeedleConfig | None:
    """The needle settings with the phrasing that training never saw; None where the config has none."""
    if settings.unseen is None:
        return None
    return replace(settings.needle, needle=settings.unseen.needle, question=settings.unseen.question)
