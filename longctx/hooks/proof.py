"""The proof in one picture: which models were asked, and what they found, in the order of the argument."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from longctx.eval.evaluate import EvalResult
from longctx.eval.picture import Panel, draw

# Above: the model and its controls. Below: what the adapter does to a sibling, and the harder question.
ORDER = ("base", "theta_only", "control", "extended", "sibling", "merged", "unseen")


def draw_proof(results: Mapping[str, EvalResult], path: Path) -> None:
    """Draw a panel per result that has a grid."""
    chosen = [results[name] for name in ORDER if name in results]
    panels = [Panel(result.grid, result.target.title, result.window) for result in chosen if result.grid is not None]
    draw(panels, path, title="Needle in a haystack: six-digit values found, in percent", columns=4)
