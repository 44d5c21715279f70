"""Present the rows of `longctx theta`: tables for people, a JSON document, and a picture of wavelengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longctx.rope import RULES, THETA_ONLY, Rope, wavelengths
from longctx.rope.config import new_keys, old_keys
from longctx.storage.files import save_figure
from longctx.theta.table import Alternative, StageRow

if TYPE_CHECKING:
    from rich.table import Table


def document(rope: Rope, rows: Sequence[StageRow]) -> dict[str, Any]:
    """Return the JSON document: the model, the stages in order, and the last stage's config lines in both styles."""
    last = rows[-1]
    return {
        "model": {
            "source": rope.source,
            "head_dim": rope.head_dim,
            "window": rope.window,
            "rope_parameters": dict(rope.parameters),
            "note": rope.note(),
        },
        "stages": [asdict(row) for row in rows],
        "paste": {
            "transformers_5": new_keys(last.rope_parameters, last.window),
            "transformers_4": old_keys(last.rope_parameters, last.window),
        },
    }


def stage_table(rows: Sequence[StageRow]) -> Table:
    """Make the table with one line per stage."""
    table = _table("Stages", ("stage", "tokens", "rule", "theta", "supported", "dims", "bound"))
    for row in rows:
        table.add_row(
            row.name,
            f"{row.seq_len:,}",
            row.rule,
            f"{row.theta:.0f}",
            _supported(row.supported_length, row.checked_to, row.seq_len),
            f"{row.dims_beyond_before} -> {row.dims_beyond_window}",
            f"{row.published_bound:.1e}" if row.published_bound else "",
        )
    table.caption = (
        "supported: the distance at which theta fails (2405.14591), ! within the stage\n"
        f"dims: of {rows[0].dims}, those that never complete a turn within the stage, before -> after\n"
        "bound: that paper's smallest theta for the length, for context"
    )
    return table


def rule_tables(rows: Sequence[StageRow]) -> list[Table]:
    """Make the tables of every rule over the same stages: its theta, if it changes theta, and the supported length.

    A table has at most five stages, so that it fits into 80 columns.
    """
    made = []
    for at in range(0, len(rows), 5):
        part = rows[at : at + 5]
        table = _table("" if at else "The same stages by every rule", ("rule", *(row.name for row in part)))
        for name in RULES:
            if name in rows[0].rules:
                table.add_row(name, *[_alternative(name, row.rules[name], row.seq_len) for row in part])
        made.append(table)
    made[-1].caption = "theta where a rule changes it; below it the supported length (! in the stage)"
    return made


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    style = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0), "show_edge": False}
    table = Table(title=title or None, title_justify="left", caption_justify="left", **style)
    for name in columns:
        table.add_column(name, justify="left" if name in ("stage", "rule") else "right", no_wrap=True)
    return table


def paste_text(rows: Sequence[StageRow]) -> str:
    """Return the last stage's lines for config.json, in the styles of transformers 5 and 4."""
    last = rows[-1]
    new = json.dumps(new_keys(last.rope_parameters, last.window), indent=2)
    old = json.dumps(old_keys(last.rope_parameters, last.window), indent=2)
    return (
        f"config.json for {last.window:,} tokens, transformers 5:\n{new}\n\n"
        f"the same for transformers 4 and readers of its style:\n{old}"
    )


def _supported(length: int | None, checked_to: int, needed: int) -> str:
    if length is None:
        return f">{checked_to:,}"
    return f"{length:,}" if length >= needed else f"[red]{length:,} ![/red]"


def _alternative(name: str, found: Alternative, needed: int) -> str:
    if found.rope_parameters is None:
        return "-"
    supported = _supported(found.supported_length, found.checked_to, needed)
    return f"{found.theta:.0f}\n{supported}" if name in THETA_ONLY else supported


def picture(rope: Rope, rows: Sequence[StageRow], path: Path) -> None:
    """Write a PNG of the wavelength per dimension pair, before and after each stage, with the windows as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(rows)))
    before = wavelengths(rope.frequencies())
    pairs = np.arange(before.size)
    axes.plot(pairs, before, color="0.35", linestyle="--", linewidth=2, label=f"before: {_label(rope)}")
    axes.axhline(rope.window, color="0.35", linestyle=":", linewidth=1)
    axes.text(0.4, rope.window * 1.12, f"window {rope.window:,}", color="0.35", fontsize=9)
    for row, shade in zip(rows, shades, strict=True):
        after = Rope(row.rope_parameters, rope.head_dim, row.window)
        axes.plot(pairs, wavelengths(after.frequencies()), color=shade, label=f"{row.name}: {_label(after)}")
        axes.axhline(row.seq_len, color=shade, linestyle=":", linewidth=1)
        if row.seq_len != rope.window:
            axes.text(0.4, row.seq_len * 1.12, f"{row.seq_len:,}", color=shade, fontsize=9)
    axes.set_yscale("log")
    axes.set_xlabel("rotary pair i (dimensions 2i and 2i+1)")
    axes.set_ylabel("wavelength in tokens")
    axes.set_xlim(0, before.size - 1)
    axes.set_title("Wavelength per dimension; above its dotted line a pair never completes a turn")
    axes.legend(loc="lower right", fontsize=9)
    axes.grid(alpha=0.2)
    save_figure(figure, path, dpi=130)
    plt.close(figure)


def _label(rope: Rope) -> str:
    scaled = "" if rope.kind == "default" else f", {rope.kind}"
    factor = f" x{rope.parameters['factor']:g}" if scaled and rope.parameters.get("factor") else ""
    return f"theta {rope.theta:,.0f}{scaled}{factor}"
