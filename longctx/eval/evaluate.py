"""Evaluate one model: needle grid, loss on held-out text and loss by position, measured once and stored as JSON.

The verb `eval` and the work after training call `evaluate` for one model at a time. A stored result is reused while
its fingerprint (model, rope, tasks, text) matches, so a killed evaluation continues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longctx import console
from longctx.config.eval import NeedleConfig
from longctx.distributed.ranks import Ranks, alone
from longctx.errors import UserError
from longctx.eval import loss, needle
from longctx.eval.grid import Grid, from_json
from longctx.eval.heldout_text import HeldoutText
from longctx.eval.predict import grid_of, load_plain
from longctx.eval.stored_results import load_result, store_result
from longctx.fingerprint import fingerprint_of, folder_fingerprint
from longctx.rope import rope_of

Tick = Callable[[], None]


@dataclass(frozen=True)
class EvalTarget:
    """A model to evaluate: a Hugging Face folder or hub id.

    name: the name of its result's file. title: the title of its panel in the picture. rope, window: rope_parameters
    and max_position_embeddings that replace those of config.json; they change theta without training.
    """

    name: str
    path: str
    title: str
    rope: dict[str, Any] | None = None
    window: int | None = None


@dataclass(frozen=True)
class EvalTasks:
    """The measurements to make of each model.

    needle: the needle grid; None measures none. loss_lengths: sequence lengths in tokens for the loss on held-out
    text. loss_sequences: sequences per length.
    """

    needle: NeedleConfig | None
    loss_lengths: tuple[int, ...]
    loss_sequences: int

    @property
    def longest(self) -> int:
        """The length in tokens of the longest sequence that is read."""
        return max((*(self.needle.lengths if self.needle else ()), *self.loss_lengths), default=0)


@dataclass(frozen=True)
class EvalResult:
    """The measurements of one target.

    window: the model's, in tokens (from the target or config.json). losses: {length: nats per token}. by_position:
    {length: {last position of a bucket: nats per token}}, see loss.by_position.
    """

    target: EvalTarget
    window: int | None
    grid: Grid | None
    losses: dict[int, float]
    by_position: dict[int, dict[int, float]] = field(default_factory=dict)

    def beyond(self, length: int) -> bool:
        """Tell whether a sequence of `length` tokens is longer than the model's window."""
        return self.window is not None and length > self.window


def evaluate(
    target: EvalTarget, tasks: EvalTasks, heldout: HeldoutText, out: Path | None, ranks: Ranks | None = None,
    tick: Tick = lambda: None,
) -> EvalResult:  # fmt: skip
    """Return the target's result: from out/NAME.json when its fingerprint matches, otherwise measured and stored there.

    out: None stores nothing. ranks: each rank answers a share of the prompts and sequences, and all return the whole
    result. tick: called after each haystack and held-out sequence of this rank, for a progress bar.
    """
    ranks = ranks or alone()
    key = fingerprint(target, tasks, heldout)
    stored = out / f"{target.name}.json" if out else None
    values = ranks.broadcast(load_result(stored, key) if ranks.first and stored else None)
    if values is None:
        model = load_plain(target.path, target.rope, target.window, ranks.device)
        values = _measure(model, target, tasks, heldout, ranks, tick)
        if ranks.first and stored:
            store_result(stored, key, values)
    return EvalResult(
        target,
        target.window or values["window"],  # the one that was asked for, where a yarn rope would serve a longer one
        from_json(values["grid"]) if values["grid"] else None,
        {int(k): v for k, v in values["losses"].items()},
        {int(k): {int(end): v for end, v in means.items()} for k, means in values["loss_by_position"].items()},
    )


def count_forwards(target: EvalTarget, tasks: EvalTasks, heldout: HeldoutText, out: Path | None, world: int = 1) -> int:
    """Return how often `evaluate` calls `tick` on one rank; prints a line when a stored result does not match."""
    stored = out / f"{target.name}.json" if out else None
    matches = stored is not None and load_result(stored, fingerprint(target, tasks, heldout)) is not None
    if stored is not None and stored.exists() and not matches:
        console.say(
            f"{stored} belongs to another model, other needles or other text, or is damaged; measuring it again"
        )
    if matches:
        return 0
    haystacks = needle.haystacks(tasks.needle) if tasks.needle else 0
    return -(-haystacks // world) + len(tasks.loss_lengths) * -(-tasks.loss_sequences // world)


def fingerprint(target: EvalTarget, tasks: EvalTasks, heldout: HeldoutText) -> str:
    """Return the fingerprint of everything that a target's result depends on."""
    return fingerprint_of(
        {
            "model": folder_fingerprint(target.path),
            "rope": target.rope,
            "window": target.window,
            "ground": heldout.key,
            "needle": asdict(tasks.needle) if tasks.needle else None,
            "losses": [tasks.loss_lengths, tasks.loss_sequences],
            "format": 2,  # of the stored file
        }
    )


def check_text(heldout: HeldoutText, tasks: EvalTasks, source: str) -> None:
    """Raise UserError when the held-out text is shorter than a sequence or a length cannot hold its needles."""
    if tasks.longest > heldout.tokens:
        raise UserError(
            f"lengths reach {tasks.longest:,} tokens and source={source} holds out only {heldout.tokens:,}, so the "
            "text would repeat itself inside a sequence; add documents, raise data.heldout, or lower needle.lengths "
            "and loss_lengths (configs/eval.yaml)"
        )
    if tasks.needle is not None:
        try:
            needle.check_lengths(tasks.needle, heldout.writer, heldout.haystack)
        except UserError as error:
            raise UserError(f"needle.{error} (configs/eval.yaml)") from None


def window_of(model: Any) -> int | None:
    """Return the window in tokens from a loaded model's config, or None when the config has none."""
    values = model.config.to_dict()
    try:
        return rope_of(values, "the model's config").window
    except UserError:  # no rotary embedding
        return values.get("max_position_embeddings") or values.get("n_positions")


def _measure(
    model: Any, target: EvalTarget, tasks: EvalTasks, heldout: HeldoutText, ranks: Ranks, tick: Tick
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "window": target.window or window_of(model),
        "grid": None,
        "losses": {},
        "loss_by_position": {},
    }
    if tasks.needle is not None:
        part = grid_of(model, tasks.needle, heldout, label=target.name, rank=ranks.rank, world=ranks.world, tick=tick)
        values["grid"] = needle.combine(part, ranks).to_json()
    for length in tasks.loss_lengths:
        losses = _losses(model, loss.held_out_rows(heldout, length, tasks.loss_sequences), ranks, tick)
        values["losses"][length] = float(losses.mean())
        values["loss_by_position"][length] = loss.by_position(losses)
    return values


def _losses(model: Any, rows: np.ndarray, ranks: Ranks, tick: Tick) -> np.ndarray:
    """Return the token losses of all rows; each rank computes a share of the rows."""
    if ranks.world == 1:
        return loss.token_losses(model, rows, tick=tick)
    import torch
    import torch.distributed as dist

    found = np.zeros((len(rows), rows.shape[1] - 1), np.float32)
    found[ranks.rank :: ranks.world] = loss.token_losses(model, rows[ranks.rank :: ranks.world], tick=tick)
    dist.all_reduce(torch.from_numpy(found), group=ranks.control)
    return found
