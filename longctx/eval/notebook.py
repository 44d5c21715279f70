"""Measure a needle grid of a model in memory, for notebooks and scripts that have no config file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from longctx.config.base import build
from longctx.config.eval import NeedleConfig, default_name
from longctx.errors import UserError
from longctx.eval.grid import Grid

if TYPE_CHECKING:
    from longctx.data.haystack import NeedleWriter


@dataclass(frozen=True)
class NeedleGrid:
    """The share of needles found per depth and context length.

    grid: the counts. window: the model's window in tokens from its config, or None.

    >>> import longctx
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    >>> grid = longctx.needle_grid(model, tokenizer, lengths=[384], depths=[0.0, 0.5], text=TEXT, per_cell=1)
    >>> grid.depths, grid.to_dict()["asked"], grid.draw(OUT + "/needles.png").name
    ((0.0, 0.5), [[1], [1]], 'needles.png')
    """

    grid: Grid
    window: int | None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Context lengths in tokens."""
        return self.grid.lengths

    @property
    def depths(self) -> tuple[float, ...]:
        """Depths of the needles: 0 is the start of the text, 1 its end."""
        return self.grid.depths

    @property
    def accuracies(self) -> list[list[float]]:
        """The share found in each cell, between 0 and 1, as [depth][length]."""
        return self.grid.cells.T.tolist()

    @property
    def pooled(self) -> float:
        """The mean of the shares of all cells."""
        return self.grid.pooled()

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON.

        The keys are model, window, lengths, depths, accuracies, pooled, and the counts found and asked as
        [depth][length].
        """
        return {
            "model": self.grid.label,
            "window": self.window,
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "accuracies": self.accuracies,
            "pooled": self.pooled,
            "found": self.grid.hits.sum(0).T.tolist(),
            "asked": self.grid.asked.sum(0).T.tolist(),
        }

    def draw(self, path: str | Path, title: str | None = None) -> Path:
        """Write the grid as a PNG; lengths beyond the model's window are hatched. Returns the path."""
        from longctx.eval.picture import Panel, draw

        draw([Panel(self.grid, title or self.grid.label, self.window)], Path(path), columns=1)
        return Path(path)


def needle_grid(
    model: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int | str] = (512, 1024, 2048, 4096, 8192),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    text: str | Sequence[str] | None = None,
    per_cell: int = 10,
    seed: int = 0,
    single: bool = False,
) -> NeedleGrid:
    """Hide six-digit pass keys in a text and count how many a model recalls, per depth and context length.

    model: any causal language model of transformers or peft, prepared or not, on any device; the training mode of each
    of its modules is restored at the end.
    tokenizer: its fast tokenizer. lengths: tokens of a prompt, question included; 8192, "64k" and "1M" are accepted.
    depths: 0 is the text's start, 1 its end. text: one string or several in which the needles are hidden; None uses
    the Python standard library of this machine. per_cell: needles per cell. seed: selects the needles. single: put one
    needle into a prompt instead of one at every depth.

    An answer counts as found when greedy decoding would write all its digits (the pass-key test of arXiv 2305.16300,
    with several keys as in RULER, 2404.06654). A prompt takes one forward pass without a key-value cache; logits are
    computed at the answers only. A prompt begins with the tokenizer's bos where it has one. A guess succeeds with
    probability 1e-6. Returns a `NeedleGrid`.

    Raises UserError (a ValueError) when the text is shorter than the longest length, when a length cannot hold its
    needles, and when the tokenizer is not a fast one or gives ids that the model does not have.

    >>> import longctx
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    >>> grid = longctx.needle_grid(model, tokenizer, lengths=[384, "1k"], text=TEXT, per_cell=2)
    >>> grid.lengths, grid.window, grid.pooled < 1  # the model reads 512 tokens, not 1,024
    ((384, 1024), 512, True)
    """
    from longctx.data.haystack import NeedleWriter, token_haystack
    from longctx.eval import needle
    from longctx.eval.evaluate import window_of
    from longctx.eval.predict import one_process
    from longctx.model import LossModel

    if isinstance(model, LossModel):
        model = cast(Any, model.model)
    values = {"lengths": lengths, "depths": depths, "seeds": (seed,)}
    config = build(NeedleConfig, {**values, "per_cell": per_cell, "single": single}, origin="needle_grid")
    writer = NeedleWriter(tokenizer)
    tokens = _tokens(text, writer, max(config.lengths))
    largest, rows = max(int(tokens.max()), int(writer.ordinary.max())), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(f"the tokenizer gives ids up to {largest}, and the model has {rows}; give the model's own one")
    haystack = token_haystack(tokens, writer.newline_after)
    needle.check_lengths(config, writer, haystack)
    label = default_name(getattr(model.config, "name_or_path", "")) or type(model).__name__
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        workers = None if next(model.parameters()).device.type == "cpu" else 1
        grid = needle.grid(one_process(model), config, writer, haystack, label=label, workers=workers)
    finally:
        for module, mode in modes:
            module.training = mode
    return NeedleGrid(grid, window_of(model))


def _tokens(text: str | Sequence[str] | None, writer: NeedleWriter, longest: int) -> np.ndarray:
    """Tokenize the haystack, int32 [T]. Raises UserError when it has fewer than `longest` tokens."""
    if text is None:
        parts = _library(writer, 4 * longest)
    else:
        parts = [writer.tokens(part) for part in ([text] if isinstance(text, str) else text)]
    tokens = np.concatenate([np.empty(0, np.int32), *parts])
    if len(tokens) < longest:
        raise UserError(
            f"lengths reach {longest:,} tokens and text has only {len(tokens):,}, so it would repeat itself inside a "
            "prompt; give more text or shorter lengths"
        )
    return tokens


def _library(writer: NeedleWriter, wanted: int) -> list[np.ndarray]:
    """Tokenize files of the Python standard library, one array each, until they have `wanted` tokens in all."""
    from longctx.data.stdlib import stdlib_files

    parts: list[np.ndarray] = []
    for path, _ in stdlib_files():
        parts.append(writer.tokens(path.read_text(encoding="utf-8", errors="ignore")))
        if sum(map(len, parts)) >= wanted:
            break
    return parts
