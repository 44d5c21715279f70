"""The evidence of a run: needle grids and held-out loss of every model that belongs in the proof.

Each subject is one Hugging Face folder as anyone would load it; its grid and its losses are written to
RUN/eval/NAME.json as soon as they are known, so a second start only fills what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longctx.config.eval import NeedleConfig
from longctx.config.hooks import EvidenceHook
from longctx.eval import loss, needle
from longctx.eval.grid import Grid, from_json
from longctx.eval.ground import Ground
from longctx.eval.predict import load_plain, one_process
from longctx.eval.run import held_out_rows


@dataclass(frozen=True)
class Subject:
    """A model to be examined. rope, window: replace what its config.json says (theta changed, nothing trained).

    needle: its phrasing where it is not the trained one; grid, losses: what is measured.
    """

    name: str
    folder: Path
    title: str
    rope: dict[str, Any] | None = None
    window: int | None = None
    needle: NeedleConfig | None = None
    grid: bool = True
    losses: bool = True


@dataclass(frozen=True)
class Finding:
    """A subject's grid where one was asked for, and its mean held-out loss per window length (nats per token)."""

    subject: Subject
    grid: Grid | None
    losses: dict[int, float]


def examine(
    subject: Subject, hook: EvidenceHook, ground: Ground, out: Path, tick: Callable[[], None] = lambda: None
) -> Finding:
    """The subject's grid and losses, from `out`/NAME.json where they stand already."""
    stored = out / f"{subject.name}.json"
    if stored.exists():
        values = json.loads(stored.read_text())
        grid = from_json(values["grid"]) if values["grid"] else None
        return Finding(subject, grid, {int(k): v for k, v in values["losses"].items()})
    model = load_plain(subject.folder, subject.rope, subject.window)
    config = subject.needle or hook.needle
    grid = None
    if subject.grid:
        grid = needle.grid(one_process(model), config, ground.writer, ground.haystack, label=subject.name, tick=tick)
    losses = held_out(model, hook, ground) if subject.losses else {}
    out.mkdir(parents=True, exist_ok=True)
    beside = stored.with_suffix(".part")
    beside.write_text(json.dumps({"grid": grid and grid.to_json(), "losses": losses}, indent=1))
    beside.replace(stored)
    return Finding(subject, grid, losses)


def forwards(subject: Subject, hook: EvidenceHook, out: Path) -> int:
    """How often `examine` will tick."""
    done = (out / f"{subject.name}.json").exists() or not subject.grid
    return 0 if done else needle.haystacks(subject.needle or hook.needle)


def held_out(model: Any, hook: EvidenceHook, ground: Ground) -> dict[int, float]:
    """Mean loss on the same windows of held-out text for every model."""
    return {
        length: float(loss.token_losses(model, held_out_rows(ground, length, hook.heldout_windows)).mean())
        for length in hook.heldout_lengths
    }


def behaviour(subjects: Sequence[Subject], hook: EvidenceHook, ground: Ground, out: Path) -> None:
    """behaviour.json: each subject's loss on held-out text of the kind the sibling was tuned on, at short length."""
    stored = out / "behaviour.json"
    if stored.exists():
        return
    found = {}
    for subject in subjects:
        model = load_plain(subject.folder, subject.rope, subject.window)
        rows = held_out_rows(ground, hook.heldout_lengths[0], hook.heldout_windows)
        found[subject.name] = float(loss.token_losses(model, rows).mean())
    stored.write_text(json.dumps(found, indent=1))


def unseen_phrasing(hook: EvidenceHook) -> NeedleConfig | None:
    """The grid's settings with the phrasing that training never saw."""
    if hook.unseen is None:
        return None
    return replace(hook.needle, needle=hook.unseen.needle, question=hook.unseen.question)
