"""Checks a finished quickstart's summary: its shape, and the gates of correctness. Times are not checked.

Usage: python tests/check_quickstart.py runs/quickstart
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

LENGTHS = [512, 1024, 2048, 4096, 8192]


def check(run: Path) -> list[str]:
    """The failed checks, one line each; empty for a good run."""
    summary = json.loads((run / "summary.json").read_text())
    wrong: list[str] = []

    def expect(holds: bool, what: str) -> None:
        if not holds:
            wrong.append(what)

    needle, pooled = summary["needle"], summary["needle_pooled"]
    for name in ("base", "theta_only", "control", "extended", "sibling", "merged", "unseen"):
        expect(sorted(map(int, needle.get(name, {}))) == LENGTHS, f"needle.{name} has not the lengths {LENGTHS}")
        expect(len(summary["needle_by_seed"].get(name, {})) == 3, f"needle_by_seed.{name} has not three seeds")
    if wrong:
        return wrong
    base = {int(length): found for length, found in needle["base"].items()}
    expect(summary["needles_per_cell_and_seed"] >= 10, "fewer than 10 needles a cell")
    expect(base[512] >= 0.98, f"the base finds {base[512]:.3f} at 512, not 0.98")
    for length in (2048, 4096, 8192):
        expect(base[length] <= 0.2, f"the base finds {base[length]:.3f} at {length}, so nothing is proven there")
    expect(pooled["extended"] >= 0.95, f"extended finds {pooled['extended']:.3f} pooled, not 0.95")
    worst = min(needle["extended"].values())
    expect(worst >= 0.9, f"extended finds {worst:.3f} at its worst length, not 0.90")
    expect(pooled["merged"] >= 0.9, f"the merged sibling finds {pooled['merged']:.3f} pooled, not 0.90")
    loss = {name: values["512"] for name, values in summary["loss"].items()}
    expect(all(math.isfinite(value) for value in loss.values()), "a loss is not finite")
    expect(
        loss["extended"] <= 1.03 * loss["base"],
        f"held-out loss at 512: {loss['extended']:.4f} after {loss['base']:.4f}",
    )
    expect(summary["adapter"]["bytes"] > 0, "no adapter")
    expect(summary["theta"] == {"s2048": 154243, "s8192": 2379094}, f"theta by stage is {summary['theta']}")
    expect((run / "eval" / "needle.png").stat().st_size > 20_000, "no picture")
    for stage in ("s2048", "s8192"):
        config = json.loads((run / "stages" / stage / "model" / "config.json").read_text())
        expect(
            config["max_position_embeddings"] == summary["seq_len"][stage],
            f"{stage}: the export's window is wrong",
        )
        expect(config["rope_theta"] == summary["theta"][stage], f"{stage}: the export's theta is wrong")
    return wrong


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]))
    for line in problems:
        print(f"quickstart: {line}")
    print(f"quickstart: {'failed' if problems else 'all gates hold'}")
    sys.exit(bool(problems))
