"""`longctx bench step`: compare one training step of longctx with plain transformers, in alternating new processes.

Each process builds the same random model, warms up (longctx.bench.step_worker), then takes timed steps: forward,
backward, gradient norm, AdamW. On a GPU transformers with liger-kernel takes part where that is installed. Memory is
the peak resident set of the process, interpreter and libraries included; on a GPU, the peak of allocated bytes.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from statistics import median
from typing import Any

from longctx.config.bench_step import BenchStepConfig, Contestant
from longctx.console import emit, emit_json, say
from longctx.errors import RunFailed, UserError

_NO_FIGURES = ("out_of_memory", "failed")
_OPTIONAL = ("model_tflops", "mfu", "share_in_products_and_attention", "seconds_by_kind", "idle_seconds", "slowest")


def run(config: BenchStepConfig) -> int:
    """Measure every side in turn and print the table or the JSON document; returns 1 if none gives figures.

    Our own side comes first, and a library beside it that fails is an answer: it does not take our figures with it.
    """
    results: dict[Contestant, list[dict[str, Any]]] = {name: [] for name in contestants(config)}
    for pair in range(config.pairs):
        for contestant, runs in results.items():
            runs.append(result := measure(contestant, config))
            figures = (
                result.get("out_of_memory")
                or result.get("failed")
                or (
                    f"{result['tokens_per_second']:.1f} tokens/s, {result['model_tflops']:.3g} TFLOP/s, "
                    f"peak {result['peak_gib']:.2f} GiB"
                )
            )
            say(f"pair {pair + 1}/{config.pairs} {contestant}: {figures}")
    report = summary(results, config)
    if config.format == "json":
        emit_json(report)
    else:
        emit(_table(report))
    return int(not any(_measured(report[contestant]) for contestant in results))


def contestants(config: BenchStepConfig) -> list[Contestant]:
    """The sides that take part; liger-kernel's operators run on a GPU only."""
    import torch

    with_liger = torch.cuda.is_available() and find_spec("liger_kernel") is not None
    if config.only == "liger" and not with_liger:
        raise UserError(
            "only=liger needs a GPU and the package liger-kernel, which are not both here; pip install liger-kernel on "
            "a machine with a GPU, or take only=longctx or only=transformers (configs/bench_step.yaml)"
        )
    if config.only:
        return [config.only]
    liger: list[Contestant] = ["liger"] if with_liger else []
    return ["longctx", "transformers", *liger]


def measure(contestant: Contestant, config: BenchStepConfig) -> dict[str, Any]:
    """Run one step in a new process; returns seconds, cpu_seconds, tokens_per_second, peak_gib, loss and device.

    A side that does not fit the device gives out_of_memory (torch's words) and device instead, and another library that
    fails gives failed (the last line of its error). Raises RunFailed where our own side fails.
    """
    request = json.dumps({"kind": contestant, **dataclasses.asdict(config)})
    command = [sys.executable, "-m", "longctx.bench.step_worker", request]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode and contestant != "longctx":
        return {"failed": next(iter(reversed(done.stderr.strip().splitlines())), f"status {done.returncode}")}
    if done.returncode:
        raise RunFailed(
            f"bench step's {contestant} process ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def summary(results: Mapping[Contestant, list[dict[str, Any]]], config: BenchStepConfig) -> dict[str, Any]:
    """Return the medians of each side and our ratios to the others; cpu_time_ratio suits a busy machine."""
    report: dict[str, Any] = {"seq_len": config.seq_len, "pairs": config.pairs, "threads": config.threads}
    for contestant, runs in results.items():
        report.setdefault("device", runs[0].get("device"))
        if lost := next(({key: run[key]} for run in runs for key in _NO_FIGURES if key in run), None):
            report[contestant] = lost
            continue
        report[contestant] = {
            "tokens_per_second": median(run["tokens_per_second"] for run in runs),
            "peak_gib": median(run["peak_gib"] for run in runs),
            "seconds": [run["seconds"] for run in runs],
            "cpu_seconds": [run["cpu_seconds"] for run in runs],
            "loss": runs[0]["loss"],
            **{name: runs[0][name] for name in _OPTIONAL if runs[0].get(name) is not None},
        }
    fitting = [contestant for contestant in results if _measured(report[contestant])]
    if "longctx" not in fitting:
        return report
    ours = report["longctx"]
    others: list[tuple[Contestant, str]] = [("transformers", ""), ("liger", "_liger")]
    for other, suffix in others:
        if other in fitting:
            theirs = report[other]
            report[f"speed_ratio{suffix}"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
            report[f"cpu_time_ratio{suffix}"] = min(theirs["cpu_seconds"]) / min(ours["cpu_seconds"])
            report[f"memory_ratio{suffix}"] = ours["peak_gib"] / theirs["peak_gib"]
    return report


def _measured(side: Mapping[str, Any]) -> bool:
    return not any(key in side for key in _NO_FIGURES)


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['seq_len']} tokens, {report['device']}, {report['threads']} threads"]
    for contestant in ("transformers", "liger", "longctx"):
        if contestant in report:
            side = report[contestant]
            if not _measured(side):
                lines.append(f"{contestant:13} {'out of memory' if 'out_of_memory' in side else side['failed']}")
                continue
            share = side.get("share_in_products_and_attention")
            lines.append(
                f"{contestant:13} {side['tokens_per_second']:9.1f} tokens/s {side['peak_gib']:7.2f} GiB "
                f"{side['model_tflops']:8.3g} TFLOP/s"
                + (f", {share:.0%} of it in products and attention" if share is not None else "")
            )
    for other, suffix in (("transformers", ""), ("liger", "_liger")):
        if f"speed_ratio{suffix}" in report:
            speed, memory = report[f"speed_ratio{suffix}"], report[f"memory_ratio{suffix}"]
            lines.append(f"longctx / {other:13} {speed:9.2f}x {memory:11.2f}x")
    return "\n".join(lines)
