"""Draw the histogram of document lengths of each source, with the sequence lengths of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from longctx.storage.files import save_figure

# People with red-green colour blindness can tell these apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#8c564b", "#56b4e9")


def draw_lengths(lengths: Mapping[str, np.ndarray], seq_lens: Mapping[str, int], path: Path) -> None:
    """Draw one panel per source: share of tokens by document length (log scale), and a dashed line per stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: values for name, values in lengths.items() if len(values)}
    top = max([int(values.max()) for values in shown.values()] + list(seq_lens.values()))
    edges = 2.0 ** np.arange(4, np.ceil(np.log2(top)) + 0.51, 0.5)
    figure = Figure(figsize=(8, 0.9 + 2.1 * max(len(shown), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(len(shown), 1), 1, sharex=True, squeeze=False)[:, 0]
    for number, (name, values) in enumerate(shown.items()):
        axis = axes[number]
        weights = values / values.sum(dtype=np.int64)
        axis.hist(values, bins=edges, weights=weights, color=_COLOURS[number % len(_COLOURS)], rwidth=0.92)
        axis.set_ylabel("share of tokens")
        axis.set_title(f"{name}: {len(values):,} documents, {values.sum(dtype=np.int64):,} tokens", loc="left", size=10)
        axis.spines[["top", "right"]].set_visible(False)
        for stage, seq_len in seq_lens.items():
            axis.axvline(seq_len, color="#444444", linewidth=0.9, linestyle="--")
            if number == 0:
                axis.annotate(stage, (seq_len, 1), xycoords=("data", "axes fraction"), xytext=(3, -3),
                              textcoords="offset points", size=8, va="top", color="#444444")  # fmt: skip
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xlim(edges[0], edges[-1])
    exponents = range(4, int(np.log2(edges[-1])) + 1, 2)
    axes[-1].set_xticks([2.0**e for e in exponents], [_short(2**e) for e in exponents])
    axes[-1].set_xlabel("tokens of a document")
    save_figure(figure, path, dpi=130)


def _short(length: int) -> str:
    if length >= 2**20:
        return f"{length >> 20}M"
    return f"{length >> 10}k" if length >= 2**10 else str(length)
