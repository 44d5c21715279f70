"""summary.json with the results of a run, and the closing lines on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longctx import console
from longctx.config.train import TrainConfig
from longctx.eval.evaluate import EvalResult
from longctx.eval.grid import percent
from longctx.eval.tables import longest_curve
from longctx.lora.adapter import Adapter
from longctx.lora.sizes import megabytes
from longctx.storage.files import write_text
from longctx.versions import installed

LIBRARIES = (
    "longctx",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "safetensors",
    "hydra-core",
)


def write_summary(
    config: TrainConfig,
    folder: Path,
    stages: list[dict[str, Any]],
    results: Mapping[str, EvalResult],
    elsewhere: Mapping[str, Mapping[str, float]],
    seconds: float,
) -> dict[str, Any]:
    """Write RUN/summary.json and return it. elsewhere: {source: {model: loss}} on other text.

    needle: {model: {length: share of needles found over all depths and seeds}}.
    needle_pooled, needle_by_seed: the same over all lengths.
    loss: {model: {length: nats per token}} on the same held-out sequences; loss_by_position: {model: {last position of
    a bucket: nats per token}} in the longest of them.
    changes: {extended: rows, merged: rows} of text, before and after: the losses of the base and the extended model,
    and of the sibling without and with the adapter.
    seconds: of each stage, and of the steps after training.
    """
    grids = {name: found.grid for name, found in results.items() if found.grid is not None}
    summary: dict[str, Any] = {
        "name": config.name,
        "needle": {name: grid.by_length() for name, grid in grids.items()},
        "needle_pooled": {name: grid.pooled() for name, grid in grids.items()},
        "needle_by_seed": {name: grid.by_seed() for name, grid in grids.items()},
        "needles_per_cell_and_seed": int(min(grid.asked.min() for grid in grids.values())),
        "loss": {name: found.losses for name, found in results.items() if found.losses},
        "loss_by_position": {name: curve for name, found in results.items() if (curve := longest_curve(found))},
        "loss_elsewhere": elsewhere,
        "changes": _changes(config, results, elsewhere),
        "window": {name: found.window for name, found in results.items()},
        "loss_by_stage": _by_stage(results, stages),
        "theta": {stage["stage"]: stage["theta"] for stage in stages},
        "seq_len": {stage["stage"]: stage["seq_len"] for stage in stages},
        "tokens": {stage["stage"]: stage["tokens"] for stage in stages},
        "seconds": {
            **{stage["stage"]: round(stage["seconds"], 1) for stage in stages},
            "after_training": round(seconds, 1),
        },
        "adapter": _adapter(folder / "adapter", config),
        "frozen": config.optim.freeze,
        "versions": {name: found for name in LIBRARIES if (found := installed(name))},
    }
    if config.after_training.sibling is not None and config.after_training.sibling.behaviour is not None:
        summary["behaviour"] = elsewhere[config.after_training.sibling.behaviour]
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def print_closing_lines(summary: Mapping[str, Any], picture: Path) -> None:
    """Write the closing lines to the screen."""
    pooled, needle = summary["needle_pooled"], summary["needle"]
    words = _grid_words(needle["base"], needle["extended"], pooled["extended"])
    if "merged" in pooled:
        size, window = megabytes(summary["adapter"]["bytes"]), summary["window"]["sibling"]
        words.append(
            f"The difference, kept as a rank-{summary['adapter']['rank']} adapter of {size} and merged into a "
            f"sibling with a window of {window:,} tokens, takes it from {_percent(pooled['sibling'])} to "
            f"{_percent(pooled['merged'])}."
        )
    controls = [
        f"{_percent(pooled[name])} {text}"
        for name, text in (("theta_only", "with theta changed and nothing trained"),
                           ("control", "with as many tokens trained at the old window"),
                           ("unseen", "with a phrasing that training never saw"))
        if name in pooled
    ]  # fmt: skip
    if controls:
        words.append("Controls: " + "; ".join(controls) + ".")
    words += [sentence for name in summary["changes"] if (sentence := _change_words(name, summary["changes"][name]))]
    words.append(f"The picture: {picture}   The numbers: {picture.parent.parent / 'summary.json'}")
    console.say("")
    for line in words:
        console.say(line)


def _grid_words(base: Mapping[int, float], extended: Mapping[int, float], pooled: float) -> list[str]:
    """What the base finds at its shortest and longest length, and the extended model over all and at the longest."""
    short, long = min(base), max(extended)
    words = [f"The base finds {_percent(base[short])} of the needles at {short:,} tokens"]
    words.append(f"Extended, the same model finds {_percent(pooled)}")
    if short != long:
        words[0] += f" and {_percent(base[long])} at {long:,}"
        words[1] += f" over all lengths and {_percent(extended[long])} at {long:,} tokens"
    return [f"{sentence}." for sentence in words]


def _change_words(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence with every loss before and after; a rise is a cost."""
    who = {"extended": "extended", "merged": "sibling with the adapter"}[name]
    parts = [
        f"{row['text']} {row['before']:.3f} -> {row['after']:.3f} ({row['after'] / row['before'] - 1:+.1%})"
        for row in rows
    ]
    return f"Loss before and after, {who} (a rise is what it costs): {'; '.join(parts)}." if parts else ""


def _changes(
    config: TrainConfig, results: Mapping[str, EvalResult], elsewhere: Mapping[str, Mapping[str, float]]
) -> dict[str, list[dict[str, Any]]]:
    settings = config.after_training.evidence
    assert settings is not None
    found = {}
    for after, before in (("extended", "base"), ("merged", "sibling")):
        if after not in results or before not in results:
            continue
        old, new = results[before].losses, results[after].losses
        rows = {
            f"{settings.source}, {length:,} tokens": (old[length], new[length]) for length in sorted({*old} & {*new})
        }
        for source, losses in elsewhere.items():
            whole = config.data.sources[source].kind == "chat"
            what = "whole conversations" if whole else f"{min(settings.heldout_lengths):,} tokens"
            rows[f"{source}, {what}"] = (losses[before], losses[after])
        found[after] = [{"text": text, "before": first, "after": then} for text, (first, then) in rows.items()]
    return found


def _percent(share: float) -> str:
    return f"{percent(share, 0)} %"


def _by_stage(results: Mapping[str, EvalResult], stages: list[dict[str, Any]]) -> dict[str, Any]:
    names = {"base": "base", **{s["stage"]: f"stage_{s['stage']}" for s in stages[:-1]}}
    names[stages[-1]["stage"]] = "extended"
    return {stage: results[name].losses for stage, name in names.items() if name in results}


def _adapter(folder: Path, config: TrainConfig) -> dict[str, Any]:
    if not folder.exists():
        return {}
    with Adapter(str(folder)) as adapter:
        size, rank, extension = adapter.bytes, adapter.config["r"], adapter.extension
    assert extension is not None, "longctx's own adapters have a longctx.json"
    profile, share = config.after_training.lora.profile, extension["share"]["everything"]
    return {"rank": rank, "bytes": size, "profile": profile, "share": share}
