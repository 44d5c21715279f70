"""`longctx eval`: one model's needle grid, held-out loss and loss by position.

On the GPU where there is one. Under torchrun every rank loads the model and answers its share of the prompts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from longctx import console
from longctx.config.eval import EvalConfig
from longctx.data.check import check_name, check_sources
from longctx.data.tokenizer import check_tokenizer_of
from longctx.errors import UserError
from longctx.eval import loss, needle
from longctx.eval.ground import Ground, open_ground
from longctx.eval.picture import Panel, draw
from longctx.eval.predict import grid_of, load_plain
from longctx.model.family import check_config
from longctx.model.load import read_config
from longctx.rope import rope_of
from longctx.storage.model import check_model


def run(config: EvalConfig) -> int:
    """Examine the model; numbers on standard output, picture and JSON in `out` where one is given."""
    path = config.model.path
    if path is None:
        raise UserError("model.path is missing; an evaluation takes a trained model (configs/eval.yaml)")
    _check(config, path)
    hf = read_config(path)
    check_config(hf, path)
    window = rope_of(hf.to_dict(), path).window
    with _joined() as (rank, world):
        ground = _ground(config, path)
        model = load_plain(path)
        with console.progress() as bar:
            task = bar.add_task("needles", total=-(-needle.haystacks(config.needle) // world))
            part = grid_of(
                model, config.needle, ground,
                label=Path(path).name, rank=rank, world=world, tick=lambda: bar.advance(task),
            )  # fmt: skip
        grid = needle.combine(part)
        result: dict[str, Any] = {"model": path, "needle": grid.to_json(), "loss": {}, "loss_by_position": {}}
        for length in config.loss_lengths:
            losses = _losses(model, loss.held_out_rows(ground, length, config.loss_windows), rank, world)
            edges, means = loss.by_position(losses, config.bins)
            result["loss"][length] = float(losses.mean())
            result["loss_by_position"][length] = {int(e): float(m) for e, m in zip(edges, means, strict=True)}
    if rank == 0:
        _write(config, result, Panel(grid, path, window=window))
    return 0


def _check(config: EvalConfig, path: str) -> None:
    """Refuse in a second what would fail after tokenizing or loading."""
    vocabulary = check_model(path).get("vocab_size")
    check_tokenizer_of(config.model, vocab_size=vocabulary)
    check_name(config.data, config.source, "source")
    check_sources(config.data, [config.source], Path(config.cache))


@contextmanager
def _joined() -> Iterator[tuple[int, int]]:
    """(rank, world). Under torchrun the ranks take different prompts; over gloo, for they exchange only counts."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=1))  # a rank with a longer prompt is waited for
    try:
        if dist.get_rank() != 0:
            console.silence()
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _ground(config: EvalConfig, path: str) -> Ground:
    """The held-out documents; one rank of a node tokenizes them, the others read."""
    import torch.distributed as dist

    def opened() -> Ground:
        return open_ground(config.data, config.source, config.model.tokenizer or path, Path(config.cache))

    if not dist.is_initialized():
        return opened()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    made = opened() if first else None
    dist.barrier()
    return made if made is not None else opened()


def _losses(model: Any, rows: np.ndarray, rank: int, world: int) -> np.ndarray:
    """token_losses of all rows, each computed by one rank."""
    import torch
    import torch.distributed as dist

    found = np.zeros((len(rows), rows.shape[1] - 1), np.float32)
    found[rank::world] = loss.token_losses(model, rows[rank::world])
    if world > 1:
        dist.all_reduce(torch.from_numpy(found))
    return found


def _write(config: EvalConfig, result: dict[str, Any], panel: Panel) -> None:
    if config.out is not None:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "needle.json").write_text(json.dumps(result, indent=1))
        draw([panel], out / "needle.png", columns=1)
    if config.format == "json":
        console.emit_json(result)
    else:
        console.emit(_table(result))


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
