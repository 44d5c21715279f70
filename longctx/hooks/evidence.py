"""The evidence of a run: needle grids and held-out loss of every model that belongs in the proof.

Each subject is one Hugging Face folder as anyone would load it; its grid and its losses are written to
RUN/eval/NAME.json as soon as they are known, so a second start only fills what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.config.eval import NeedleConfig
from longctx.config.hooks import EvidenceHook
from longctx.eval import loss, needle
from longctx.eval.grid import Grid, from_json
from longctx.eval.predict import one_process

if TYPE_CHECKING:
    from longctx.config.data import DataConfig
    from longctx.data.writer import Haystack, Writer


@dataclass(frozen=True)
class Subject:
    """A model to be examined. rope, window: replace what its config.json says (theta changed, nothing trained).

    needle: its phrasing where it is not the trained one; losses: whether held-out loss is measured too.
    """

    name: str
    folder: Path
    title: str
    note: str = ""
    rope: dict[str, Any] | None = None
    window: int | None = None
    needle: NeedleConfig | None = None
    losses: bool = True


@dataclass(frozen=True)
class Finding:
    """A subject's grid, and its mean held-out loss per window length (nats per token)."""

    subject: Subject
    grid: Grid
    losses: dict[int, float]


@dataclass(frozen=True)
class Ground:
    """What all subjects are examined on: the held-out documents and a writer for the shared tokenizer."""

    writer: Writer
    haystack: Haystack


def open_ground(data: DataConfig, source: str, tokenizer: Path | str, cache: Path) -> Ground:
    """Held-out documents of a source as haystack."""
    from transformers import AutoTokenizer

    from longctx.data.opening import open_source
    from longctx.data.writer import Writer, corpus_haystack

    made = AutoTokenizer.from_pretrained(tokenizer)
    writer = Writer(made)
    corpus = open_source(source, data, made, cache, split="heldout")
    return Ground(writer, corpus_haystack(corpus, writer))


def examine(
    subject: Subject, hook: EvidenceHook, ground: Ground, out: Path, tick: Callable[[], None] = lambda: None
) -> Finding:
    """The subject's grid and losses, from `out`/NAME.json where they stand already."""
    stored = out / f"{subject.name}.json"
    if stored.exists():
        values = json.loads(stored.read_text())
        return Finding(subject, from_json(values["grid"]), {int(k): v for k, v in values["losses"].items()})
    model = load(subject)
    config = subject.needle or hook.needle
    grid = needle.grid(one_process(model), config, ground.writer, ground.haystack, label=subject.name, tick=tick)
    losses = held_out(model, hook, ground) if subject.losses else {}
    out.mkdir(parents=True, exist_ok=True)
    beside = stored.with_suffix(".part")
    beside.write_text(json.dumps({"grid": grid.to_json(), "losses": losses}, indent=1))
    beside.replace(stored)
    return Finding(subject, grid, losses)


def forwards(subject: Subject, hook: EvidenceHook, out: Path) -> int:
    """How often `examine` will tick."""
    return 0 if (out / f"{subject.name}.json").exists() else needle.haystacks(subject.needle or hook.needle)


def held_out(model: Any, hook: EvidenceHook, ground: Ground) -> dict[int, float]:
    """Mean loss on the same windows of held-out text for every model."""
    import numpy as np

    found = {}
    for length in hook.heldout_lengths:
        rng = np.random.default_rng([7, length])
        rows = np.stack([ground.haystack(rng, length) for _ in range(hook.heldout_windows)])
        found[length] = float(loss.token_losses(model, rows.astype(np.int64)).mean())
    return found


def load(subject: Subject) -> Any:
    """The model as plain transformers loads it, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(subject.folder)
    if subject.rope is not None:
        config.rope_parameters = dict(subject.rope)
        config.max_position_embeddings = subject.window
    model = AutoModelForCausalLM.from_pretrained(
        subject.folder, config=config, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval()


def unseen_phrasing(hook: EvidenceHook) -> NeedleConfig | None:
    """The grid's settings with the phrasing that training never saw."""
    if hook.unseen is None:
        return None
    return replace(hook.needle, needle=hook.unseen.needle, question=hook.unseen.question)
