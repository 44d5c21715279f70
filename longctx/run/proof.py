"""One picture of all needle grids of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from longctx.eval.evaluate import EvalResult
from longctx.eval.picture import Curve, Panel, draw
from longctx.eval.tables import longest_curve

# Upper row: the base, its controls and the extended model. Lower row: the sibling without and with the adapter, and the
# unseen phrasing.
ORDER = ("base", "theta_only", "control", "extended", "sibling", "merged", "unseen")


def draw_proof(results: Mapping[str, EvalResult], path: Path) -> None:
    """Draw one panel for each result that has a grid, and loss by position where it goes beyond the base's window."""
    chosen = [results[name] for name in ORDER if name in results]
    panels = [Panel(result.grid, result.target.title, result.window) for result in chosen if result.grid is not None]
    curves = [Curve(result.target.title, curve, result.window) for result in chosen if (curve := longest_curve(result))]
    window = results["base"].window
    if window is not None and max((max(curve.losses) for curve in curves), default=0) <= window:
        curves = []
    title = "Needle in a haystack: six-digit values found, in percent"
    draw(panels, path, title=title, columns=4, curves=curves)
