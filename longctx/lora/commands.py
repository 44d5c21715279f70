"""The verbs lora extract and lora merge, with progress on standard error and the result as text or JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from longctx.config.lora import ExtractConfig, MergeConfig
from longctx.console import emit_json, say, warn
from longctx.lora.extract import ExtractResult, extract
from longctx.lora.folder import ONE_WEIGHT
from longctx.lora.merge import MergeResult, merge
from longctx.lora.modules import leaf_of
from longctx.lora.sizes import megabytes
from longctx.rope.config import describe_rope


def run_extract(config: ExtractConfig) -> int:
    """Run `longctx lora extract`; returns the exit status."""
    began = time.perf_counter()
    result = extract(config, _ticker("extracting"))
    seconds = time.perf_counter() - began
    if config.format == "json":
        emit_json({**asdict(result), "seconds": round(seconds, 3)})
        return 0
    _print_extract(result, seconds)
    return 0


def run_merge(config: MergeConfig) -> int:
    """Run `longctx lora merge`; returns the exit status."""
    began = time.perf_counter()
    result = merge(config, _ticker("merging"))
    seconds = time.perf_counter() - began
    if config.format == "json":
        emit_json({**asdict(result), "seconds": round(seconds, 3)})
        return 0
    _print_merge(result, seconds)
    return 0


def _print_extract(result: ExtractResult, seconds: float) -> None:
    factors = [row for row in result.rows if row.carried == "factors" and row.norm > 0]
    print(f"{result.out}: rank {result.rank}, {len(factors)} modules, {megabytes(result.bytes)}, {seconds:.1f} s")
    print(f"  {'projection':<14} {'modules':>7} {'rank':>9} {'share kept':>16} {'relative residual':>19}")
    leaves: dict[str, list[Any]] = {}
    for row in sorted(factors, key=lambda row: row.tensor):
        leaves.setdefault(leaf_of(row.tensor), []).append(row)
    for leaf, rows in sorted(leaves.items()):
        ranks, shares = [row.rank for row in rows], [row.share for row in rows]
        residuals = [row.residual for row in rows]
        print(
            f"  {leaf:<14} {len(rows):>7} {_span(ranks, 'd'):>9} {_span(shares, '.3f'):>16} "
            f"{_span(residuals, '.3f'):>19}"
        )
    exact = sum(row.carried == "exact" and row.norm > 0 for row in result.rows)
    print(
        f"  share of the squared norm kept: {result.share['factors']:.4f} of these, "
        f"{result.share['everything']:.4f} of all that changed"
    )
    print(
        f"  {exact} norms and biases carried exactly; sign and residual checked from the file: "
        f"{len(result.checked)} tensors"
    )
    if result.one_weight:
        print(f"  {ONE_WEIGHT}")
    if result.extension.changed:
        print(f"  window {result.extension.base_window} -> {result.extension.window}, "
              f"{describe_rope(result.extension.base_rope_parameters)} -> "
              f"{describe_rope(result.extension.rope_parameters)}")  # fmt: skip
    if (held := result.losses) is not None:
        print(
            f"  loss on {held.tokens} tokens of held-out text: base {held.base:.4f}, tuned {held.tuned:.4f}, base + "
            f"adapter {held.merged:.4f}"
        )
    if result.not_carried:
        print(f"  changed and not carried: {_first([row.tensor for row in result.not_carried], 8)}")
    unsure = [row.tensor for row in result.rows if not row.converged]
    if unsure:
        warn(f"not converged, raise power_max or memory_mib: {', '.join(unsure[:8])}")


def _print_merge(result: MergeResult, seconds: float) -> None:
    left = len(result.untouched)
    print(f"{result.out}: {len(result.applied)} changes, {left} tensor{'s' * (left != 1)} untouched, {seconds:.1f} s")
    print(f"  reads {result.window} tokens, {describe_rope(result.rope)}")
    hows: dict[str, int] = {}
    for item in result.applied:
        how = item.rsplit("(", 1)[1].rstrip(")")
        hows[how] = hows.get(how, 0) + 1
    print("  applied: " + ", ".join(f"{count} {how}" for how, count in hows.items()))
    if result.untouched:
        print(f"  untouched: {_first(result.untouched, 3)}")
    for note in result.notes:
        print(f"  note: {note}")
    for item in result.skipped:
        warn(f"skipped {item}")


def _first(names: Sequence[str], count: int) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - count} more (format=json lists all)" if len(names) > count else ""
    return f"{', '.join(names[:count])}{more}"


def _span(values: list[Any], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}-{high}"


def _ticker(title: str) -> Callable[[int, int, str], None]:
    """Make a progress function that prints a line to standard error every two seconds."""
    last = time.monotonic()

    def tick(done: int, total: int, name: str) -> None:
        nonlocal last
        if time.monotonic() - last > 2 or (done == total and total > 2000):
            last = time.monotonic()
            say(f"{title} {done}/{total}  {name}")

    return tick
