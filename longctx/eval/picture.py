"""The needle grids as one picture: a panel each, red to green, context length across, depth down, numbers in
the cells, so that nobody has to trust a colour. A dashed line marks the window the model was trained at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longctx.durable import save_figure
from longctx.eval.grid import Grid


@dataclass(frozen=True)
class Panel:
    """One grid with its title, and the trained window in tokens (None: no mark)."""

    grid: Grid
    title: str
    window: int | None = None


def draw(panels: Sequence[Panel], path: Path, *, title: str = "", columns: int = 3) -> None:
    """Write the panels to a PNG, `columns` in a row, proofs first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = 1.2 + 0.72 * max(len(panel.grid.lengths) for panel in panels)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, 3.75 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def _panel(axis: object, panel: Panel) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    grid = panel.grid
    cells = grid.cells.T  # [depths, lengths]
    axis.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        # Yellow needs dark letters, the deep ends white ones.
        colour = "white" if value < 0.15 or value > 0.9 else "black"
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(len(grid.lengths)), [_short(length) for length in grid.lengths])
    axis.set_yticks(range(len(grid.depths)), [f"{100 * depth:.0f} %" for depth in grid.depths])
    axis.set_xlabel("context length (tokens)")
    axis.set_ylabel("depth of the needle")
    title = textwrap.fill(panel.title, 34)
    axis.set_title(f"{title}\n{100 * grid.pooled():.1f} % found", fontsize=10)
    if panel.window in grid.lengths and panel.window != grid.lengths[-1]:
        axis.axvline(grid.lengths.index(panel.window) + 0.5, color="black", linestyle="--", linewidth=1.2)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
