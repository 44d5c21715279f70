"""The proof in one picture: who was asked, and what they found, in the order of the argument."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from longctx.eval.picture import Panel, draw
from longctx.hooks.evidence import Finding

# Above: the model and its controls. Below: what the adapter does to a sibling, and the harder question.
ORDER = ("base", "theta_only", "control", "extended", "sibling", "merged", "unseen")


def draw_proof(findings: Mapping[str, Finding], path: Path, *, trained: int, base: int) -> None:
    """A panel per finding. trained, base: windows in tokens, for the dashed marks."""
    short = {"base", "control", "sibling"}  # models whose window is still the base's
    panels = [
        Panel(
            grid, findings[name].subject.title, window=base if name in short else trained
        )
        for name in ORDER
        if name in findings and (grid := findings[name].grid) is not None
    ]  # fmt: skip
    draw(panels, path, title="Needle in a haystack: six-digit values found, in percent", columns=4)
