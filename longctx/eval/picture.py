"""Draw evaluations as one picture: a needle grid per model and, below, the loss by position of all models.

In a grid, context length runs across and depth runs down. Cells are coloured from red to green and hold the numbers.
Lengths beyond the model's window are hatched and starred; a dashed line marks the window.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longctx.eval.grid import Grid, percent
from longctx.storage.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALE, HATCH = (1, 1, 1, 0.25), (0, 0, 0, 0.4)  # for the lengths beyond a window


@dataclass(frozen=True)
class Panel:
    """One grid with its title, and the model's window in tokens (None draws no mark)."""

    grid: Grid
    title: str
    window: int | None = None


@dataclass(frozen=True)
class Curve:
    """A model's loss by position, {last position of a bucket: nats per token}, and its window in tokens or None."""

    title: str
    losses: Mapping[int, float]
    window: int | None = None


def draw(
    panels: Sequence[Panel], path: Path, *, title: str = "", columns: int = 3, curves: Sequence[Curve] = ()
) -> None:
    """Write a PNG with the grids, `columns` in a row, and the curves in one panel below them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    width = max(3.2, 1.4 + 0.72 * max((len(panel.grid.lengths) for panel in panels), default=8))
    height = 1.75 + 0.4 * max((len(panel.grid.depths) for panel in panels), default=0)
    heights = [height] * rows + [3.8] * bool(curves)
    size = (max(width * columns, 7.5 if curves else 0.0), sum(heights) + 0.5)
    figure = plt.figure(figsize=size, layout="constrained")
    cells = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    axes = [figure.add_subplot(cells[number // columns, number % columns]) for number in range(len(panels))]
    for axis, panel in zip(axes, panels, strict=True):
        _grid(axis, panel, letters=int(7.5 * size[0] / columns))
    if curves:
        _curves(figure.add_subplot(cells[rows, :]), curves)
    notes = ["hatched and *: longer than the model's window"] * any(_beyond(panel) for panel in panels)
    if title:
        figure.suptitle(_plain(title), fontsize=12, fontweight="bold")
    if notes:
        figure.supxlabel("; ".join(notes), fontsize=9, color="0.35")
    save_figure(figure, path, dpi=110)
    plt.close(figure)


def _grid(axis: Axes, panel: Panel, letters: int) -> None:
    from matplotlib.patches import Rectangle

    grid = panel.grid
    cells = grid.cells.T  # [depths, lengths]
    axis.imshow(cells, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        # Yellow needs dark letters; deep red and deep green need white ones.
        colour = "white" if value < 0.15 or value > 0.9 else "black"
        shown = "-" if np.isnan(value) else percent(value, 0)
        axis.text(column, row, shown, ha="center", va="center", color=colour, fontsize=9, zorder=3)
    beyond = _beyond(panel)
    for column, length in enumerate(grid.lengths):
        if length in beyond:
            place = (column - 0.5, -0.5)
            axis.add_patch(
                Rectangle(place, 1, len(grid.depths), facecolor=PALE, edgecolor=HATCH, hatch="//", linewidth=0)
            )
    ticks = [_short(length) + "*" * (length in beyond) for length in grid.lengths]
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_yticks(range(len(grid.depths)), [f"{100 * depth:.0f} %" for depth in grid.depths])
    axis.set_xlabel("context length (tokens)")
    axis.set_ylabel("depth of the needle")
    title = textwrap.fill(panel.title, letters, break_on_hyphens=False)
    axis.set_title(_plain(f"{title}\n{percent(grid.pooled())} % found"), fontsize=10)
    within = sum(length not in beyond for length in grid.lengths)
    if beyond and within and sorted(grid.lengths) == list(grid.lengths):
        axis.axvline(within - 0.5, color="black", linestyle="--", linewidth=1.2)


def _beyond(panel: Panel) -> set[int]:
    """Return the lengths of a grid that are longer than the model's window."""
    return set() if panel.window is None else {length for length in panel.grid.lengths if length > panel.window}


def _curves(axis: Axes, curves: Sequence[Curve]) -> None:
    """Draw loss over position on a logarithmic axis; a dashed line of the model's colour marks its window."""
    windows: dict[int, list[Any]] = {}
    longest = max(max(curve.losses) for curve in curves)
    for number, curve in enumerate(curves):
        ends, colour = sorted(curve.losses), f"C{number % 10}"
        axis.plot(
            ends, [curve.losses[end] for end in ends], color=colour, marker="osD^v"[number // 10 % 5], markersize=4,
            label=_plain(curve.title) + (f" (window {_short(curve.window)})" if curve.window else ""),
        )  # fmt: skip
        if curve.window is not None and curve.window < longest:
            windows.setdefault(curve.window, []).append(colour)
    for window, colours in windows.items():
        # Models with the same window share one line, on which their dashes alternate.
        for turn, colour in enumerate(colours):
            dashes = (3 * turn, (3, 3 * max(1, 2 * len(colours) - 1)))
            axis.axvline(window, color=colour, linestyle=dashes, linewidth=1.3)
    ends = sorted({end for curve in curves for end in curve.losses})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ends, [_short(end) for end in ends])
    axis.minorticks_off()
    axis.set_xlabel("position in the text (tokens), end of the bucket")
    axis.set_ylabel("loss (nats per token)")
    axis.set_title("loss on held-out text by position; dashed: where a model's window ends", fontsize=10)
    axis.grid(alpha=0.3)
    below = (0.5, -0.16)  # where no curve is
    axis.legend(fontsize=9, ncols=min(3, len(curves)), frameon=False, loc="upper center", bbox_to_anchor=below)


def _plain(text: str) -> str:
    """Escape $, which begins a formula in matplotlib."""
    return text.replace("$", r"\$")


def _short(length: int) -> str:
    """Write a length for people: 8192 as 8k, 2^20 as 1M, 1000 as 1000."""
    for scale, unit in ((2**20, "M"), (2**10, "k")):
        if length % scale == 0:
            return f"{length // scale}{unit}"
    return str(length)
