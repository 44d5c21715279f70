"""Draws two pictures of an adapter: its spectra, and the share of each module's difference that it keeps.

No other module of this package imports matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longctx.lora.describe import AdapterInfo, ModuleInfo, layer_of
from longctx.lora.modules import leaf_of
from longctx.storage.files import save_figure

_INK, _GRID = "#23262b", "#d9dce1"


def draw(info: AdapterInfo, folder: Path) -> list[str]:
    """Write spectra.png and, when shares are known, shares.png into `folder`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    by_leaf: dict[str, list[ModuleInfo]] = {}
    for item in info.modules:
        by_leaf.setdefault(leaf_of(item.module), []).append(item)
    style: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _INK,
        "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.6, "axes.axisbelow": True,
    }  # fmt: skip
    with pyplot.rc_context(style):
        written = [_spectra(pyplot, by_leaf, folder / "spectra.png")]
        if any(item.share is not None and layer_of(item.module) is not None for item in info.modules):
            written.append(_shares(pyplot, by_leaf, folder / "shares.png"))
    return written


def _spectra(pyplot: Any, by_leaf: dict[str, list[ModuleInfo]], path: Path) -> str:
    """Draw the spectra: one panel per projection, one line per layer, dark for the first and light for the last."""
    columns = min(4, len(by_leaf))
    rows = -(-len(by_leaf) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(2.6 * columns, 2.2 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    last = max((layer_of(item.module) or 0 for items in by_leaf.values() for item in items), default=0)
    shades = pyplot.get_cmap("viridis")
    for axis, (leaf, items) in zip(axes.flat, sorted(by_leaf.items()), strict=False):
        for item in items:
            values = [value for value in item.spectrum if value > 0]
            shade = shades(0.9 * (layer_of(item.module) or 0) / max(1, last))
            axis.semilogy(range(1, len(values) + 1), values, color=shade, linewidth=1.0)
        axis.set_title(leaf, fontsize=9, color=_INK)
    for axis in list(axes.flat)[len(by_leaf) :]:
        axis.set_visible(False)
    for axis in list(axes.flat)[len(by_leaf) - columns : len(by_leaf)]:  # the last of each column
        axis.tick_params(labelbottom=True)
    figure.supxlabel("component", fontsize=9)
    figure.supylabel("singular value of the difference", fontsize=9)
    if last:
        scale = pyplot.cm.ScalarMappable(pyplot.Normalize(0, last / 0.9), shades)
        bar = figure.colorbar(scale, ax=axes, label="layer", shrink=0.7, boundaries=range(last + 2))
        bar.ax.tick_params(length=0)
    save_figure(figure, path, dpi=200)
    pyplot.close(figure)
    return str(path)


def _shares(pyplot: Any, by_leaf: dict[str, list[ModuleInfo]], path: Path) -> str:
    """Draw the kept shares of the squared norm, with a row per projection and a column per layer."""
    in_layers = {leaf: items for leaf, items in sorted(by_leaf.items()) if layer_of(items[0].module) is not None}
    outside = {leaf: items for leaf, items in sorted(by_leaf.items()) if leaf not in in_layers}
    last = max((layer_of(item.module) or 0 for items in in_layers.values() for item in items), default=0)
    grid = [[float("nan")] * (last + 1) for _ in in_layers]
    for row, items in zip(grid, in_layers.values(), strict=True):
        for item in items:
            if item.share is not None:
                row[layer_of(item.module) or 0] = item.share
    figure, axis = pyplot.subplots(
        figsize=(max(4.5, 0.28 * (last + 1) + 2.5), 0.36 * len(grid) + 1.4), layout="constrained"
    )
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axis.grid(False)
    axis.set_yticks(range(len(grid)), list(in_layers))
    axis.set_xlabel("layer")
    others = ", ".join(f"{leaf} {items[0].share:.3f}" for leaf, items in outside.items() if items[0].share is not None)
    axis.set_title("share of the squared norm kept" + (f"  ({others})" if others else ""), fontsize=9, color=_INK)
    figure.colorbar(image, ax=axis, shrink=0.9)
    save_figure(figure, path, dpi=200)
    pyplot.close(figure)
    return str(path)
