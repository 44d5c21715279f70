"""`longctx bench longest`: find the longest sequence of a full training step that one device takes.

Every trial is a new process (longctx.bench.longest_trial) that takes one step as training does. A trial that runs out
of memory is an answer: of the device's allocator, of the host (MemoryError), or killed by the kernel. The search begins
where the plan expects the limit. Trials are kept in out=FOLDER, so that an interrupted search goes on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longctx import dtype as dtypes
from longctx.bench.longest_plan import Prediction, predict
from longctx.config.bench_longest import BenchLongestConfig
from longctx.console import emit, emit_json, say
from longctx.decide import with_blocks
from longctx.errors import RunFailed, out_of_memory
from longctx.fingerprint import fingerprint_of
from longctx.host_memory import free_memory, host_memory, killed_for_memory
from longctx.planner.remedies import GIB
from longctx.processes import module_command
from longctx.storage.files import write_json

SPARE = 0.02  # share of the host's memory at which a trial is ended before the kernel chooses a process to kill
STEP_UP = 1.25


def run(config: BenchLongestConfig) -> int:
    """Search and print the table or the JSON document; returns 0, or 1 if no length fits."""
    from longctx.train.machine import device_type

    device = device_type(config.engine)
    model, _ = dtypes.resolve(config.model)
    config = dataclasses.replace(config, model=with_blocks(model, device))
    prediction = predict(config, device)
    report = measured(config, prediction, Trials(config, prediction))
    if config.format == "json":
        emit_json(report)
    else:
        emit(_table(report))
    return 0 if report["longest"] is not None else 1


def measured(config: BenchLongestConfig, prediction: Prediction, trials: Trials) -> dict[str, Any]:
    """Search from the planned length on; returns the report that longest.json holds."""
    start = config.start or prediction.longest or config.multiple
    low, high = search(trials.fits, start, multiple=config.multiple, most=config.most, precision=config.precision)
    return trials.write(low, high)


def search(
    fits: Callable[[int], bool], start: int, *, multiple: int, most: int, precision: float
) -> tuple[int | None, int | None]:
    """Find the longest length that fits, and the shortest one that was seen to fail (None: none was).

    Lengths are multiples of `multiple` up to `most`. The search ends where both are neighbours, or within `precision`.
    """

    def rounded(length: float) -> int:
        return min(max(multiple, round(length / multiple) * multiple), most // multiple * multiple)

    low = high = None
    at = rounded(start)
    while True:
        if fits(at):
            low = at
        else:
            high = at
        if high == multiple or low == most // multiple * multiple:
            return low, high
        if high is None:
            at = max(rounded(STEP_UP * at), rounded(at + multiple))
        elif low is None:
            at = min(rounded(high / STEP_UP), rounded(high - multiple))
        elif high - low <= max(multiple, precision * low):
            return low, high
        else:
            at = low + max(1, (high - low) // multiple // 2) * multiple


class Trials:
    """The trials of one search, kept in FOLDER/longest.json; those of other settings are dropped."""

    def __init__(self, config: BenchLongestConfig, prediction: Prediction) -> None:
        self.config, self.prediction = config, prediction
        self.file = Path(config.out) / "longest.json"
        free = ("out", "format", "start", "most", "precision", "trial_minutes")
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
        limits = prediction.limits  # of another GPU or host, which takes other lengths
        memory = [round((size or 0) / GIB) for size in (limits.device_bytes, limits.host_bytes)]
        self.key = fingerprint_of({**settings, "device": prediction.device, "memory": memory})
        self.done: dict[int, dict[str, Any]] = {}
        if self.file.exists():
            before = json.loads(self.file.read_text(encoding="utf-8"))
            if before["key"] == self.key:
                self.done = {trial["seq_len"]: trial for trial in before["trials"]}
                say(f"{self.file} holds {len(self.done)} trials of these settings; they are not repeated")

    def fits(self, seq_len: int) -> bool:
        """Whether a step of this length runs; the trial is run unless it is known."""
        if seq_len not in self.done:
            trial = run_trial(self.config, self.prediction.device, seq_len)
            self.done[seq_len] = {"seq_len": seq_len, **trial}
            self.write(None, None)
            say(f"{seq_len:>12,} tokens: {_in_words(trial)}")
        return bool(self.done[seq_len]["fits"])

    def write(self, low: int | None, high: int | None) -> dict[str, Any]:
        """Write longest.json and return it; low, high: the search's result, once it has one."""
        best = self.done.get(low or 0)
        report: dict[str, Any] = {
            "key": self.key, "device": self.prediction.device, "longest": low, "shortest_failed": high,
            "planned_longest": self.prediction.longest,
            "trials": [self.done[length] for length in sorted(self.done)],
        }  # fmt: skip
        if best is not None:
            plan = self.prediction.at(best["seq_len"])
            total = plan["total_gib"]
            report |= {"best": best, "plan": plan, "memory_error": total / best["peak_gib"] - 1}
            report["length_error"] = (self.prediction.longest or 0) / best["seq_len"] - 1
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, report)
        return report


def run_trial(config: BenchLongestConfig, device: str, seq_len: int) -> dict[str, Any]:
    """Take one step of this length in a new process; returns its figures, or why it did not fit.

    Raises RunFailed for an end that is not for lack of memory.
    """
    with tempfile.TemporaryDirectory(prefix="longctx-longest-") as folder:
        result, errors = Path(folder) / "result.json", Path(folder) / "errors.txt"
        request = {"config": dataclasses.asdict(config), "seq_len": seq_len, "device": device, "result": str(result)}
        (Path(folder) / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command, environment = module_command("longctx.bench.longest_trial", f"{folder}/request.json")
        killed_before = killed_for_memory()
        with errors.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
            free = free_memory()
            ended_for, least = _follow(process, 60 * config.trial_minutes)
        said = errors.read_text(errors="replace", encoding="utf-8")
        if ended_for:
            return {"fits": False, "why": ended_for}
        if process.returncode == 0:
            return {**json.loads(result.read_text(encoding="utf-8")), "host_gib": max(0.0, free - least) / GIB}
    if process.returncode == -signal.SIGKILL and (killed_before is None or (killed_for_memory() or 0) > killed_before):
        return {"fits": False, "why": "host memory: the kernel killed the trial"}
    if out_of_memory(RuntimeError(said)):  # an allocation failed where Python could not see it
        line = next(line for line in reversed(said.splitlines()) if out_of_memory(RuntimeError(line)))
        return {"fits": False, "why": "host memory: " + line.strip()[:200]}
    raise RunFailed(
        f"bench longest: the trial of {seq_len:,} tokens ended with status {process.returncode}:\n{said[-2000:]}"
    )


def _follow(process: subprocess.Popen[bytes], seconds: float) -> tuple[str, float]:
    """Wait for a trial; returns why it was ended from here, or an empty text, and the least free memory of the host.

    Raises RunFailed after `seconds`.
    """
    end, spare, least = time.monotonic() + seconds, SPARE * host_memory(), math.inf
    try:
        while True:
            try:
                process.wait(0.1)
                return "", least
            except subprocess.TimeoutExpired:
                pass
            least = min(least, free_memory())
            if least < spare:
                return f"host memory: less than {SPARE:.0%} of it was left", least
            if time.monotonic() > end:
                raise RunFailed(
                    f"bench longest: a trial took longer than trial_minutes={seconds / 60:g}; give it more, or take a "
                    "smaller model or most=LENGTH (configs/bench_longest.yaml)"
                )
    finally:
        process.kill()
        process.wait()


def _in_words(trial: dict[str, Any]) -> str:
    if not trial["fits"]:
        return f"does not fit, {trial['why']}"
    return f"{trial['seconds']:.3g} s, peak {trial['peak_gib']:.2f} GiB"


def _table(report: dict[str, Any]) -> str:
    """The result as plain lines."""
    failed = next((t for t in report["trials"] if t["seq_len"] == report["shortest_failed"]), None)
    if report["longest"] is None:
        why = f": {failed['seq_len']:,} tokens {_in_words(failed)}" if failed else ""
        return f"no length fits{why}"
    best, plan = report["best"], report["plan"]
    lines = [
        f"longest step: {best['seq_len']:,} tokens in {best['seconds']:.3g} s on {best['device_name']}",
        f"next tried: {failed['seq_len']:,} tokens {_in_words(failed)}" if failed else "longer ones were not tried",
        f"peak {best['peak_gib']:.2f} GiB, by the plan {plan['total_gib']:.2f} ({report['memory_error']:+.1%}); the "
        f"plan's longest {report['planned_longest'] or 0:,} ({report['length_error']:+.1%})",
        "measured GiB: " + _parts(best["memory_gib"]),
        "planned GiB: " + _parts(plan["parts_gib"]),
    ]
    if report["device"] != "cpu":
        lines.append(f"host: {best['host_gib']:.2f} GiB, by the plan {plan['host_gib']:.2f}")
    return "\n".join(lines)


def _parts(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
