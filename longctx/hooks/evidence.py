"""The evidence of a run: needle grids and held-out loss of every model that belongs in the proof.

Each subject is one Hugging Face folder as anyone would load it; its grid and its losses are written to
RUN/eval/NAME.json as soon as they are known, so a second start only fills what is missing. Each file carries a
key of the model, the questions and the text; where one of them changed, the subject is examined again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longctx import console
from longctx.config.eval import NeedleConfig
from longctx.config.hooks import EvidenceHook
from longctx.eval import loss, needle
from longctx.eval.grid import Grid, from_json
from longctx.eval.ground import Ground
from longctx.eval.kept import keep, standing
from longctx.eval.predict import grid_of, load_plain
from longctx.identity import identity, key_of


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
    stored, key = out / f"{subject.name}.json", _key(subject, hook, ground)
    values = standing(stored, key)
    if values is not None:
        grid = from_json(values["grid"]) if values["grid"] else None
        return Finding(subject, grid, {int(k): v for k, v in values["losses"].items()})
    model = load_plain(subject.folder, subject.rope, subject.window)
    config = subject.needle or hook.needle
    grid = None
    if subject.grid:
        grid = grid_of(model, config, ground, label=subject.name, tick=tick)
    losses = held_out(model, hook, ground) if subject.losses else {}
    keep(stored, key, {"grid": grid and grid.to_json(), "losses": losses})
    return Finding(subject, grid, losses)


def forwards(subject: Subject, hook: EvidenceHook, ground: Ground, out: Path) -> int:
    """How often `examine` will tick; says so where findings that stand no longer hold."""
    stored = out / f"{subject.name}.json"
    stands = standing(stored, _key(subject, hook, ground)) is not None
    if stored.exists() and not stands:
        console.say(f"{stored} is of another model, other needles or other text; measuring it again")
    return 0 if stands or not subject.grid else needle.haystacks(subject.needle or hook.needle)


def _key(subject: Subject, hook: EvidenceHook, ground: Ground) -> str:
    """Everything a subject's numbers follow from."""
    return key_of(
        {
            "model": identity(subject.folder),
            "rope": subject.rope,
            "window": subject.window,
            "ground": ground.key,
            "needle": asdict(subject.needle or hook.needle) if subject.grid else None,
            "losses": [hook.heldout_lengths, hook.heldout_windows] if subject.losses else None,
        }
    )


def held_out(model: Any, hook: EvidenceHook, ground: Ground) -> dict[int, float]:
    """Mean loss on the same windows of held-out text for every model."""
    return {
        length: float(loss.token_losses(model, loss.held_out_rows(ground, length, hook.heldout_windows)).mean())
        for length in hook.heldout_lengths
    }


def behaviour(subjects: Sequence[Subject], hook: EvidenceHook, ground: Ground, out: Path) -> None:
    """Each subject's loss on held-out text of the kind the sibling was tuned on, at short length (behaviour.json)."""
    stored, length = out / "behaviour.json", hook.heldout_lengths[0]
    names = {subject.name: identity(subject.folder) for subject in subjects}
    key = key_of({"models": names, "ground": ground.key, "windows": [length, hook.heldout_windows]})
    if standing(stored, key) is not None:
        return
    rows = loss.held_out_rows(ground, length, hook.heldout_windows)
    found = {}
    for subject in subjects:
        model = load_plain(subject.folder, subject.rope, subject.window)
        found[subject.name] = float(loss.token_losses(model, rows).mean())
    keep(stored, key, {"losses": found})


def unseen_phrasing(hook: EvidenceHook) -> NeedleConfig | None:
    """The grid's settings with the phrasing that training never saw."""
    if hook.unseen is None:
        return None
    return replace(hook.needle, needle=hook.unseen.needle, question=hook.unseen.question)
