"""`longctx bench hierarchy`: compare the schedules over slow links, on the virtual cluster.

Every schedule runs in turn on M nodes x W ranks in network namespaces, first without limits, then with every rank's
link limited to a rate. The results are compared with the link model's prediction, which uses only the run without
limits, the rate and the schedule. The counted bytes are compared with their formulas.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from longctx.bench import cluster
from longctx.config.bench import BenchHierarchyConfig
from longctx.console import emit, emit_json, say
from longctx.errors import UserError
from longctx.planner.simulate import evenly, simulate
from longctx.planner.volume import busiest
from longctx.schedule import RankSchedule, Sizes, build
from longctx.topology import Level, Link, Topology

# A full frame carries 1448 bytes of data in the 1514 that tc counts (Ethernet, IP, TCP with timestamps).
PAYLOAD_SHARE = 1448 / 1514


def run(config: BenchHierarchyConfig) -> int:
    """Measure and predict; prints the table or the JSON document, and writes the JSON and the picture to `out`."""
    _check_groups(config)
    cluster.require()
    measured = _measure(config)
    document = evaluate(config, measured)
    folder = Path(config.out) if config.out else None
    if folder is not None:
        from longctx.bench.hierarchy_picture import picture

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hierarchy.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        picture(document, folder / "hierarchy.png")
        say(f"wrote {folder / 'hierarchy.json'} and {folder / 'hierarchy.png'}")
    if config.format == "json":
        emit_json(document)
    else:
        emit(table(document))
    return 0


def _ulysses(config: BenchHierarchyConfig) -> int:
    return config.ulysses or config.ranks


def _check_groups(config: BenchHierarchyConfig) -> None:
    h = _ulysses(config)
    if "ulysses_ring" in config.schedules and (config.ranks % h or config.heads % h):
        raise UserError(
            f"ulysses={h} must divide ranks={config.ranks} and heads={config.heads}; name another or leave "
            "ulysses_ring out of schedules (configs/bench_hierarchy.yaml)"
        )


def _measure(config: BenchHierarchyConfig) -> dict[str, Any]:
    """Start the ranks, print their progress, and return the samples that rank 0 writes."""
    spec = {
        "nodes": config.nodes,
        "seq_len": config.seq_len,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "schedules": list(config.schedules),
        "ulysses": _ulysses(config),
        "rates": (["none"] if config.unlimited else []) + [config.rate],
        "repeats": config.repeats,
        "flat_repeats": min(config.repeats, config.flat_repeats or config.repeats),
        "backward": config.backward,
    }
    say(f"starting {config.nodes} x {config.ranks} ranks; links of {config.rate} ...")
    with tempfile.TemporaryDirectory(prefix="longctx-hierarchy-") as scratch:
        order, result = Path(scratch) / "spec.json", Path(scratch) / "result.json"
        order.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "longctx.bench.hierarchy_rank", str(order), str(result)]
        cluster.run(config.nodes, config.ranks, command, timeout=config.timeout_seconds, heard=_progress)
        return json.loads(result.read_text(encoding="utf-8"))


def _progress(line: str) -> None:
    try:
        told = json.loads(line)
    except ValueError:
        say(line)
        return
    passes = ", ".join(f"{name} {told[name]:.3f} s" for name in ("forward", "forward_backward") if name in told)
    say(f"  {told['rate']:>8} {told['schedule']:<15} {passes}")


def evaluate(config: BenchHierarchyConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """Compute medians, ratios to the flat ring, predictions and their errors, and byte counts with formulas."""
    passes = ["forward", "forward_backward"] if config.backward else ["forward"]
    document: dict[str, Any] = {"setting": _setting(config)}
    for rate, name in ((config.rate, "seconds"), ("none", "unlimited")):
        samples = measured["seconds"].get(rate, {})
        document[name] = {
            schedule: {p: round(median(sample[p] for sample in taken), 4) for p in passes}
            for schedule, taken in samples.items()
        }
        document["samples" if name == "seconds" else "unlimited_samples"] = samples
        document["ratios" if name == "seconds" else "unlimited_ratios"] = _ratios(document[name], passes)
    document.update(_bytes(config, measured["bytes"], passes))
    document["link_bytes"] = {
        schedule: max(taken[-1]) for schedule, taken in measured["links"].get(config.rate, {}).items()
    }
    if config.unlimited:
        document["predicted"] = {
            schedule: predict(config, schedule, document["unlimited"][schedule]) for schedule in config.schedules
        }
        document["prediction_error"] = {
            schedule: {
                p: round(document["predicted"][schedule][p] / document["seconds"][schedule][p] - 1, 3) for p in passes
            }
            for schedule in config.schedules
        }
    return document


def _setting(config: BenchHierarchyConfig) -> dict[str, Any]:
    import os

    import torch

    names = ("nodes", "ranks", "rate", "seq_len", "heads", "kv_heads", "head_dim", "repeats")
    extra = {
        "ulysses": _ulysses(config),
        "dtype": "float32",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return {name: getattr(config, name) for name in names} | extra


def _ratios(seconds: dict[str, dict[str, float]], passes: list[str]) -> dict[str, dict[str, float]]:
    """Return how many times faster each schedule is than the flat ring."""
    if "flat_ring" not in seconds:
        return {}
    flat = seconds["flat_ring"]
    return {name: {p: round(flat[p] / values[p], 3) for p in passes} for name, values in seconds.items()}


def _bytes(config: BenchHierarchyConfig, counted: dict[str, Any], passes: list[str]) -> dict[str, Any]:
    """Return the busiest rank's bytes per level over the whole run, counted and by formula, and whether they agree."""
    sizes, topology = sizes_of(config), Topology(config.nodes, config.ranks)
    whole = passes[-1]
    bytes_, formula = {}, {}
    for schedule, per_rank in counted.items():
        bytes_[schedule] = {level: max(rank[whole][level] for rank in per_rank) for level in ("inner", "outer")}
        h = _ulysses(config)
        parts = [
            busiest(schedule, topology, sizes, backward=b, ulysses=h)
            for b in ([False, True] if config.backward else [False])
        ]
        formula[schedule] = {level: sum(part[level] for part in parts) for level in ("inner", "outer")}
    return {"bytes": bytes_, "bytes_formula": formula, "bytes_equal": bytes_ == formula}


def sizes_of(config: BenchHierarchyConfig) -> Sizes:
    """Return the sizes of a rank's tensors; transfers are fp32 in both passes."""
    tokens = config.seq_len // (config.nodes * config.ranks)
    return Sizes(tokens, config.heads, config.kv_heads, config.head_dim, wire_bytes=4, grad_bytes=4)


def schedules_of(config: BenchHierarchyConfig, schedule: str, backward: bool) -> list[RankSchedule]:
    """Build the schedules of all ranks."""
    topology = Topology(config.nodes, config.ranks)
    ranks = range(topology.size)
    return [build(schedule, topology, rank, backward=backward, ulysses=_ulysses(config)) for rank in ranks]


def predict(config: BenchHierarchyConfig, schedule: str, unlimited: dict[str, float]) -> dict[str, float]:
    """Predict the seconds of each pass over limited links.

    The simulation spreads the time of the unlimited run evenly over the KV blocks as computation, and adds the link
    time that this does not hide. The unlimited time includes computation on shared cores, merging, copies and calls.
    """
    sizes = sizes_of(config)
    blocks = config.nodes * config.ranks // (_ulysses(config) if schedule == "ulysses_ring" else 1)
    outer = Link(config.bytes_per_second * PAYLOAD_SHARE)
    links: dict[Level, Link | None] = {"inner": None, "outer": outer if config.nodes > 1 else None}
    ahead = simulate(schedules_of(config, schedule, False), sizes, evenly(unlimited["forward"] / blocks), links)
    times = {"forward": round(ahead.seconds, 4)}
    if config.backward:
        spent = unlimited["forward_backward"] - unlimited["forward"]
        schedules = schedules_of(config, schedule, True)
        back = simulate(schedules, sizes, evenly(spent / blocks), links, starts=ahead.finished)
        times["forward_backward"] = round(back.seconds, 4)
    return times


def table(document: dict[str, Any]) -> Any:
    """Make the table of the results, 80 columns wide."""
    from rich.box import SIMPLE
    from rich.table import Table

    s = document["setting"]
    title = (
        f"{s['nodes']} nodes x {s['ranks']} ranks, {s['rate']} per rank's link, {s['seq_len']} tokens,\n"
        f"{s['heads']}/{s['kv_heads']} heads x {s['head_dim']}, fp32, {s['cores']} cores, torch {s['torch']}"
    )
    made = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("schedule", "pass", "seconds", "x flat", "predicted", "no limit", "x flat"):
        made.add_column(column, justify="left" if column in ("schedule", "pass") else "right", no_wrap=True)
    for schedule, values in document["seconds"].items():
        for p, seconds in values.items():
            made.add_row(*_cells(document, schedule, p, seconds))
    made.caption = "\n".join(_byte_lines(document))
    made.caption_justify = "left"
    return made


def _cells(document: dict[str, Any], schedule: str, p: str, seconds: float) -> list[str]:
    def pick(key: str, pattern: str) -> str:
        value = document.get(key, {}).get(schedule, {}).get(p)
        return "" if value is None else pattern.format(value)

    return [
        schedule,
        "fwd" if p == "forward" else "fwd+bwd",
        f"{seconds:.3f}",
        pick("ratios", "{:.2f}"),
        pick("predicted", "{:.3f} ") + pick("prediction_error", "({:+.0%})"),
        pick("unlimited", "{:.3f}"),
        pick("unlimited_ratios", "{:.2f}"),
    ]


def _byte_lines(document: dict[str, Any]) -> list[str]:
    """Return lines with the busiest rank's bytes of all passes, and whether they equal the formulas."""
    lines = ["MB sent by the busiest rank, inside its node / between nodes:"]
    for schedule, sent in document["bytes"].items():
        wanted = document["bytes_formula"][schedule]
        verdict = (
            "= formula" if sent == wanted else f"formula {wanted['inner'] / 1e6:.2f} / {wanted['outer'] / 1e6:.2f}"
        )
        lines.append(f"  {schedule}: {sent['inner'] / 1e6:.2f} / {sent['outer'] / 1e6:.2f}, {verdict}")
    return lines
