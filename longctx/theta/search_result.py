"""The result of a theta search: its values, the stage override file, and the text on the screen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx import console
from longctx.storage.files import only_writer, write_text
from longctx.theta.trials import Trial


@dataclass(frozen=True)
class SearchResult:
    """The result of a search of one stage.

    rule: the trial at the rule's theta. best: the trial with the lowest score. edge: see BestTheta. trials: all trials
    by ascending theta.
    """

    stage: str
    seq_len: int
    rule: Trial
    best: Trial
    edge: str | None
    trials: list[Trial]


def write_override(path: Path, result: SearchResult, rule: str, model: str) -> None:
    """Add the chosen theta to the stage override file, with its rule, its length and the model's fingerprint.

    Entries of other stages are kept, but for those that were found for another model.
    """
    import yaml

    with only_writer(path.with_name(f".{path.name}.lock"), f"waiting for another search that writes {path}"):
        known: dict[str, Any] = {}
        if path.exists():
            known = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages") or {}
        made_for = {name: entry.get("model", model) for name, entry in known.items() if isinstance(entry, dict)}
        others = [name for name, other in made_for.items() if other != model]
        if others:
            console.warn(f"{path}: {', '.join(others)} left out, whose theta was found for another model")
        known = {name: entry for name, entry in known.items() if name not in others}
        known[result.stage] = {"theta": result.best.theta, "rule": rule, "seq_len": result.seq_len, "model": model}
        lines = [
            "# Written by `longctx theta search=true`; read with curriculum.theta_file=THIS_FILE.",
            "stages:",
        ]
        lines += [f"  {name}: {json.dumps(values)}" for name, values in known.items()]
        write_text(path, "\n".join(lines) + "\n")


def print_result(result: SearchResult, *, override: Path, png: Path, bracket: float, as_json: bool) -> None:
    """Print the result on standard output, with a warning when the best theta lies on an edge."""
    rule, best = result.rule, result.best
    if result.edge:
        console.warn(
            f"the best theta, {best.theta:,}, lies on the {result.edge} edge of what was tried, so a better one may "
            f"lie beyond; run again with trials.bracket={bracket**2:g} or more trials.attempts: trials already made "
            "are kept"
        )
    if as_json:
        console.emit_json({**asdict(result), "file": str(override), "png": str(png)})
        return
    needles = ""
    if best.needle_loss is not None:
        needles = f", needle answers {best.needle_loss:.4f} instead of {rule.needle_loss:.4f}"
    console.emit(
        f"{result.stage} ({result.seq_len:,} tokens): theta {best.theta:,} instead of the rule's "
        f"{rule.theta:,}: last-quarter loss {best.last_quarter_loss:.4f} instead of "
        f"{rule.last_quarter_loss:.4f}{needles}\ncurve: {png}\nuse it: longctx train curriculum=... "
        f"curriculum.theta_file={override}"
    )
