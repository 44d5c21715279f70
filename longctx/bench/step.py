"""`longctx bench step`: compare one training step of longctx with plain transformers, in alternating new processes.

Each process builds the same random model, takes a short step (so that optimizer states exist), then a timed step:
forward, backward, gradient norm, AdamW. Memory is the peak resident set of the process (on a GPU, the peak of
allocated bytes); it includes the interpreter and the libraries on both sides.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from statistics import median
from typing import Any

from longctx.config.bench_step import BenchStepConfig, Contestant
from longctx.console import emit, emit_json, say
from longctx.errors import RunFailed


def run(config: BenchStepConfig) -> int:
    contestants: list[Contestant] = [config.only] if config.only else ["transformers", "longctx"]
    results: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in contestants}
    for pair in range(config.pairs):
        for contestant in contestants:
            result = measure(contestant, config)
            results[contestant].append(result)
            say(
                f"pair {pair + 1}/{config.pairs} {contestant}: {result['tokens_per_second']:.1f} tokens/s, "
                f"peak {result['peak_gib']:.2f} GiB"
            )
    report = summary(results, config)
    if config.format == "json":
        emit_json(report)
    else:
        emit(_table(report))
    return 0


def measure(contestant: Contestant, config: BenchStepConfig) -> dict[str, Any]:
    """Run one step in a new process; returns seconds, cpu_seconds, tokens_per_second, peak_gib, loss and device."""
    request = json.dumps({"kind": contestant, **dataclasses.asdict(config)})
    command = [sys.executable, "-m", "longctx.bench.step_worker", request]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(
            f"bench step's {contestant} process ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def summary(results: dict[str, list[dict[str, Any]]], config: BenchStepConfig) -> dict[str, Any]:
    """Return the medians of each side and their ratios; cpu_time_ratio, of the best runs, suits a busy machine."""
    report: dict[str, Any] = {"tokens": config.seq_len, "pairs": config.pairs, "threads": config.threads}
    for contestant, runs in results.items():
        report["device"] = runs[0]["device"]
        report[contestant] = {
            "tokens_per_second": median(run["tokens_per_second"] for run in runs),
            "peak_gib": median(run["peak_gib"] for run in runs),
            "seconds": [run["seconds"] for run in runs],
            "cpu_seconds": [run["cpu_seconds"] for run in runs],
            "loss": runs[0]["loss"],
        }
    if len(results) == 2:
        ours, theirs = report["longctx"], report["transformers"]
        report["speed_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
        report["cpu_time_ratio"] = min(theirs["cpu_seconds"]) / min(ours["cpu_seconds"])
        report["memory_ratio"] = ours["peak_gib"] / theirs["peak_gib"]
    return report


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['tokens']} tokens, {report['device']}, {report['threads']} threads"]
    for contestant in ("transformers", "longctx"):
        if contestant in report:
            side = report[contestant]
            lines.append(f"{contestant:13} {side['tokens_per_second']:9.1f} tokens/s {side['peak_gib']:7.2f} GiB")
    if "speed_ratio" in report:
        lines.append(f"ours / theirs {report['speed_ratio']:9.2f}x         {report['memory_ratio']:8.2f}x")
    return "\n".join(lines)
