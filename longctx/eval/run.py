"""`longctx eval`: one model's needle grid, held-out loss and loss by position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from longctx import console
from longctx.config.eval import EvalConfig
from longctx.errors import UserError
from longctx.eval import loss, needle
from longctx.eval.ground import Ground, open_ground
from longctx.eval.picture import Panel, draw
from longctx.eval.predict import load_plain, one_process
from longctx.model.family import check_config
from longctx.model.load import read_config


def run(config: EvalConfig) -> int:
    """Examine the model; numbers on standard output, picture and JSON in `out` where one is given."""
    path = config.model.path
    if path is None:
        raise UserError("model.path is missing; an evaluation takes a trained model (configs/eval.yaml)")
    check_config(read_config(path), path)
    model = load_plain(path)
    ground = open_ground(config.data, config.source, config.model.tokenizer or path, Path(config.cache))
    with console.progress() as bar:
        task = bar.add_task("needles", total=needle.haystacks(config.needle))
        grid = needle.grid(
            one_process(model), config.needle, ground.writer, ground.haystack,
            label=Path(path).name, tick=lambda: bar.advance(task),
        )  # fmt: skip
    result: dict[str, Any] = {"model": path, "needle": grid.to_json(), "loss": {}, "loss_by_position": {}}
    for length in config.loss_lengths:
        losses = loss.token_losses(model, held_out_rows(ground, length, config.loss_windows))
        edges, means = loss.by_position(losses, config.bins)
        result["loss"][length] = float(losses.mean())
        result["loss_by_position"][length] = {int(e): float(m) for e, m in zip(edges, means, strict=True)}
    if config.out is not None:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "needle.json").write_text(json.dumps(result, indent=1))
        draw(
            [Panel(grid, path, window=int(model.config.max_position_embeddings))],
            out / "needle.png",
            columns=1,
        )
    if config.format == "json":
        console.emit_json(result)
    else:
        console.emit(_table(result))
    return 0


def held_out_rows(ground: Ground, length: int, count: int) -> np.ndarray:
    """The same `count` windows [count, length] of held-out text for every model."""
    rng = np.random.default_rng([7, length])
    return np.stack([ground.haystack(rng, length) for _ in range(count)]).astype(np.int64)


def _table(result: dict[str, Any]) -> object:
    from rich.table import Table

    grid = result["needle"]
    table = Table(title=f"{result['model']}: {100 * grid['pooled']:.1f} % of the needles found")
    table.add_column("length", justify="right")
    table.add_column("found", justify="right")
    for length, found in grid["by_length"].items():
        table.add_row(f"{length:,}", f"{100 * found:.1f} %")
    for length, value in result["loss"].items():
        table.add_row(f"loss at {length:,}", f"{value:.4f}")
    return table
