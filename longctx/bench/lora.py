"""`longctx bench lora`: compare LoRA extraction with mergekit-extract-lora, as whole processes with imports.

Both get the same pair of models (lora_pair), rank and number of threads; mergekit keeps its defaults. Wall time and
peak memory of each process come from wait4. The residuals of both adapters are compared with the exact optimum of
every matrix, and two runs of longctx with each other, byte by byte.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from longctx.bench.lora_pair import make_pair
from longctx.config.lora import BenchLoraConfig
from longctx.console import emit_json, say
from longctx.errors import RunFailed, UserError
from longctx.host_memory import process_bytes
from longctx.versions import installed

_PERIOD = 0.01  # seconds between two looks at a child's memory


@dataclass(frozen=True)
class ProcessFigures:
    """Figures of one program.

    seconds: wall times, imports included. imports: wall seconds of the imports alone. peak_mib: peak memory of the
    process. residual_excess: see _excess.
    """

    seconds: list[float]
    imports: float
    peak_mib: float
    residual_excess: float | None = None

    @property
    def work(self) -> float:
        return median(self.seconds) - self.imports


def run(config: BenchLoraConfig) -> int:
    """Measure and print; writes the figures to config.out when given."""
    if config.mergekit is not None and not (os.path.isfile(config.mergekit) and os.access(config.mergekit, os.X_OK)):
        raise UserError(
            f"mergekit={config.mergekit} is not an executable; give the path of mergekit-extract-lora in the "
            "environment it is installed in, or leave it out to measure longctx alone (configs/bench_lora.yaml)"
        )
    if config.folder is not None:
        return _run_in(config, Path(config.folder))
    with tempfile.TemporaryDirectory(prefix="longctx-bench-lora-") as folder:
        return _run_in(config, Path(folder))


def _run_in(config: BenchLoraConfig, folder: Path) -> int:
    base, tuned = _pair(config, folder, config.layers)
    with tempfile.TemporaryDirectory(dir=folder, prefix="out-") as scratch:
        figures = _measure(config, base, tuned, Path(scratch))
        if config.shallow is not None:
            shallow = _pair(config, folder, config.shallow)
            few = _ours(config, *shallow, Path(scratch) / "shallow", runs=1)
            figures["peak_mib_by_layers"] = {
                str(config.shallow): few.peak_mib,
                str(config.layers): figures["ours"]["peak_mib"],
            }
    if config.out is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if config.format == "json":
        emit_json(figures)
    else:
        _print(figures)
    return 0


def _measure(config: BenchLoraConfig, base: Path, tuned: Path, scratch: Path) -> dict[str, Any]:
    ours = _ours(config, base, tuned, scratch / "ours", runs=config.repeats)
    figures: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {config.threads} threads",
        "versions": _versions(),
        "pair": {"layers": config.layers, "hidden": config.hidden, "vocab": config.vocab},
        "rank": config.rank,
    }
    adapters = {"ours": scratch / "ours-0"}
    theirs = None
    if config.mergekit is not None:
        theirs = _mergekit(config, base, tuned, scratch / "mergekit")
        adapters["mergekit"] = scratch / "mergekit"
    excess = _excess(base, tuned, adapters, config.rank) if config.exact else {}
    figures["ours"] = {**asdict(ours), "work": ours.work, "residual_excess": excess.get("ours")}
    if config.repeats > 1:
        figures["same_bytes"] = _same_bytes(scratch / "ours-0", scratch / "ours-1")
    if theirs is not None:
        figures["mergekit"] = {
            **asdict(theirs),
            "work": theirs.work,
            "residual_excess": excess.get("mergekit"),
        }
        figures["faster"] = median(theirs.seconds) / median(ours.seconds)
        figures["faster_without_imports"] = theirs.work / ours.work
    return figures


def _pair(config: BenchLoraConfig, folder: Path, layers: int) -> tuple[Path, Path]:
    place = folder / f"pair-{layers}x{config.hidden}-{config.vocab}-{config.delta_rank}"
    if not place.exists():
        say(f"making a pair of {layers} layers x {config.hidden} in {place}")
        making = place.with_name(place.name + ".partial")
        shutil.rmtree(making, ignore_errors=True)  # left by a killed process
        make_pair(making, layers=layers, hidden=config.hidden, vocab=config.vocab, delta_rank=config.delta_rank)
        making.rename(place)
    return place / "base", place / "tuned"


def _ours(config: BenchLoraConfig, base: Path, tuned: Path, out: Path, *, runs: int) -> ProcessFigures:
    start = [sys.executable, "-m", "longctx"]
    seconds, peak = [], 0.0
    for number in range(runs):
        words = [f"base={base}", f"tuned={tuned}", f"out={out}-{number}", f"rank={config.rank}"]
        took, used = _child([*start, "lora", "extract", *words, f"workers={config.threads}"], config.threads)
        say(f"ours: {took:.2f} s, {used:.0f} MiB")
        seconds.append(took)
        peak = max(peak, used)
    code = "import longctx.cli, longctx.config.compose, hydra, omegaconf, longctx.lora.commands"
    imports, _ = _child([sys.executable, "-c", code], config.threads)
    return ProcessFigures(seconds, imports, peak)


def _mergekit(config: BenchLoraConfig, base: Path, tuned: Path, out: Path) -> ProcessFigures:
    assert config.mergekit is not None
    words = ["--model", str(tuned), "--base-model", str(base), "--out-path", str(out)]
    took, peak = _child([config.mergekit, *words, "--max-rank", str(config.rank)], config.threads)
    say(f"mergekit: {took:.2f} s, {peak:.0f} MiB")
    python = Path(config.mergekit).parent / "python"
    imports, _ = _child([str(python), "-c", "import mergekit.scripts.extract_lora"], config.threads)
    return ProcessFigures([took], imports, peak)


def _child(words: list[str], threads: int) -> tuple[float, float]:
    """Run a process; returns wall seconds and peak MiB. Raises RunFailed with its last output when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)
        peak = 0.0
        while child.poll() is None:  # its rusage, once it has ended, would count this process's peak too
            peak = max(peak, process_bytes("VmHWM", child.pid))
            time.sleep(_PERIOD)
        seconds = time.perf_counter() - began
        if child.returncode != 0:
            output.seek(0)
            raise RunFailed(f"{' '.join(words)} failed:\n{output.read().decode(errors='replace')[-2000:]}")
    return seconds, peak / 2**20


def _excess(base: Path, tuned: Path, adapters: dict[str, Path], rank: int) -> dict[str, float]:
    """Return, per adapter, how far the residual of the worst matrix exceeds the exact optimum (0.005 is 0.5 %)."""
    import torch

    from longctx.lora.adapter import Adapter
    from longctx.lora.tensors import StoredTensors

    worst = dict.fromkeys(adapters, 0.0)
    with StoredTensors(str(base), what="base") as first, StoredTensors(str(tuned), what="tuned") as second:
        opened = {name: Adapter(str(path)) for name, path in adapters.items()}
        for module in opened["ours"].pairs:
            name = f"{module}.weight"
            difference = second.read(name).float() - first.read(name).float()
            if rank >= min(difference.shape):  # the optimum is the difference itself, of which nothing is left over
                continue
            wide = (difference if difference.shape[0] >= difference.shape[1] else difference.T).double()
            squares = torch.linalg.eigvalsh(wide.T @ wide)
            best = float((squares.sum() - squares[-rank:].sum()).clamp_min(0).sqrt())
            del wide
            for who, adapter in opened.items():
                # mergekit keeps lm_head whole by default, so it has no factors there.
                if (pair := adapter.pairs.get(module)) is None:
                    continue
                left, right = adapter.factors(pair)
                left_over = float(torch.linalg.vector_norm(difference - pair.scale * left @ right))
                worst[who] = max(worst[who], left_over / best - 1)
        for adapter in opened.values():
            adapter.close()
    return worst


def _same_bytes(first: Path, second: Path) -> bool:
    names = ("adapter_model.safetensors", "adapter_config.json", "longctx.json", "norm_deltas.safetensors")
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: installed(name) or "" for name in ("torch", "numpy")}}


def _print(figures: dict[str, Any]) -> None:
    pair, versions = figures["pair"], figures["versions"]
    print(
        f"Llama of {pair['layers']} layers x {pair['hidden']}, vocabulary {pair['vocab']}, bf16, "
        f"rank {figures['rank']}; {figures['machine']}, torch {versions['torch']}"
    )
    print(f"  {'':<10} {'whole':>8} {'imports':>8} {'work':>8} {'peak MiB':>9}  worst residual over optimum")
    for who in ("ours", "mergekit"):
        if who in figures:
            item = figures[who]
            over = "-" if item["residual_excess"] is None else f"{item['residual_excess']:+.3%}"
            took = (median(item["seconds"]), item["imports"], item["work"])
            times = " ".join(f"{value:>7.2f}s" for value in took)
            print(f"  {who:<10} {times} {item['peak_mib']:>9.0f}  {over}")
    if "faster" in figures:
        without = figures["faster_without_imports"]
        print(f"  {figures['faster']:.1f}x faster, {without:.1f}x without either side's imports")
    else:
        print("  mergekit was not given, so ours ran alone: mergekit=PATH/TO/mergekit-extract-lora compares")
    if "same_bytes" in figures:
        print(f"  two runs of ours: {'the same bytes' if figures['same_bytes'] else 'DIFFERENT BYTES'}")
    if "peak_mib_by_layers" in figures:
        depths = figures["peak_mib_by_layers"].items()
        print("  peak by depth: " + ", ".join(f"{layers} layers {peak:.0f} MiB" for layers, peak in depths))
