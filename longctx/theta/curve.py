"""Draw a search: both losses over theta, with marks at the rule's theta and the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longctx.storage.files import save_figure
from longctx.theta.trials import Trial


def draw_curve(trials: Sequence[Trial], *, rule: int, best: int, length: int, path: Path) -> None:
    """Write a PNG of the losses over theta, with a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(trials, key=lambda trial: trial.theta)
    thetas = [trial.theta for trial in ordered]
    figure, left = plt.subplots(figsize=(8, 5.2), layout="constrained")
    left.plot(
        thetas,
        [trial.last_quarter_loss for trial in ordered],
        "o-",
        color="tab:blue",
        label=f"text, last quarter of {length:,} tokens",
    )
    left.set_xscale("log")
    left.set_xlabel("theta")
    left.set_ylabel("loss on held-out text (nats per token)", color="tab:blue")
    left.axvline(rule, color="0.45", linestyle="--", label=f"rule {rule:,}")
    left.axvline(best, color="tab:green", label=f"chosen {best:,}")
    handles, labels = left.get_legend_handles_labels()
    needles = [trial.needle_loss for trial in ordered if trial.needle_loss is not None]
    if len(needles) == len(thetas):
        right = left.twinx()
        right.plot(thetas, needles, "s-", color="tab:orange", label="needle answers")
        right.set_ylabel("loss on needle answers (nats per token)", color="tab:orange")
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    figure.legend(handles, labels, fontsize=9, loc="outside lower center", ncols=2)
    left.grid(alpha=0.2)
    left.set_title(f"Which theta reads {length:,} tokens best")
    save_figure(figure, path, dpi=130)
    plt.close(figure)
