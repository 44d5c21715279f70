"""Draw the results of `longctx bench hierarchy`: bars of measured seconds, with a mark at each prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {"forward": "#56B4E9", "forward_backward": "#0072B2"}


def picture(document: dict[str, Any], path: Path) -> None:
    """Draw horizontal bars, one group per schedule, and write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds: dict[str, dict[str, float]] = document["seconds"]
    setting, predicted, ratios = (
        document["setting"],
        document.get("predicted", {}),
        document.get("ratios", {}),
    )
    passes = list(next(iter(seconds.values())))
    height = 0.8 / len(passes)
    longest = max(value for values in seconds.values() for value in values.values())
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.75 * len(seconds)), layout="constrained")
    for i, (schedule, values) in enumerate(seconds.items()):
        for j, p in enumerate(passes):
            y = i + (j - (len(passes) - 1) / 2) * height
            axes.barh(y, values[p], height * 0.9, color=_COLOURS[p], label=p.replace("_", " + ") if i == 0 else None)
            note = f" {values[p]:.2f} s"
            if schedule in ratios and schedule != "flat_ring":
                note += f"  ({ratios[schedule][p]:.1f} x flat)"
            end = values[p]
            if schedule in predicted:
                mark = predicted[schedule][p]
                label = "predicted" if i == 0 and j == 0 else None
                axes.plot(
                    [mark, mark],
                    [y - height * 0.42, y + height * 0.42],
                    color="#D55E00",
                    linewidth=2.5,
                    label=label,
                )
                end = max(end, mark)
            axes.text(end + 0.005 * longest, y, note, va="center", fontsize=9)
    axes.set_yticks(range(len(seconds)), [name.replace("_", " ") for name in seconds])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.16)
    axes.set_xlabel("seconds (median)")
    axes.set_title(
        f"{setting['nodes']} nodes x {setting['ranks']} ranks, {setting['rate']} per link, "
        f"{setting['seq_len']} tokens, {setting['heads']} heads, {setting['kv_heads']} kv heads",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
