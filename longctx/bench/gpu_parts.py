"""The parts of `launch/gpu_check.sh`: commands, and how their figures are read and held against floors and peers."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from longctx.bench import gpu_smollm2
from longctx.bench.gpu_rows import ROOT, Part, Row

# Llama-3-8B's shape with 4 layers, the step of docs/benchmarks.md.
EIGHT_B = [
    "model.layers=4", "model.hidden=4096", "model.heads=32", "model.kv_heads=8", "model.ffn=14336",
    "model.vocab=128256", "model.theta=500000", "model.window=8192", "dtype=bfloat16", "memory.ffn_block=auto",
]  # fmt: skip


def missing(part: Part) -> str:
    """The reason why a part cannot run here, or an empty text."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    lacking = [name for name in part.needs if find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else part.lacks()


# --- gates


def _pytest(place: str, chosen: str = "", workers: int = 1) -> Callable[[Path], list[str]]:
    """The GPU tests of a file; chosen: by pytest's -k; workers: processes, where pytest-xdist is installed."""

    def command(folder: Path) -> list[str]:
        options = ["-m", "gpu", "-vv", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={folder / 'junit.xml'}"]
        options += ["-n", str(workers)] if workers > 1 and find_spec("xdist") else []
        return [sys.executable, "-m", "pytest", str(ROOT / place), *options, *(["-k", chosen] if chosen else [])]

    return command


def _read_pytest(part: str) -> Callable[[Path], list[Row]]:
    def read(folder: Path) -> list[Row]:
        if not (folder / "junit.xml").exists():  # pytest writes it at its end
            return [_unfinished(part, (folder / "output.txt").read_text(encoding="utf-8", errors="replace"))]
        cases = list(ElementTree.parse(folder / "junit.xml").iter("testcase"))
        bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        skips = [node.get("message", "") for case in cases if (node := case.find("skipped")) is not None]
        good = len(cases) - len(bad) - len(skips)
        if skips and not good and not bad:
            return [Row(part, "tests passed", skipped="; ".join(sorted(set(skips)))[:300])]
        names = ", ".join(str(case.get("name")) for case in bad[:6])
        reasons = "; ".join(sorted(set(skips)))[:300]
        note = f"failed: {names}" if bad else (f"{len(skips)} skipped: {reasons}" if skips else "")
        return [
            Row(part, "tests passed", f"{good} of {len(cases)}", floor="all", holds=bool(good) and not bad, note=note)
        ]

    return read


def _unfinished(part: str, output: str) -> Row:
    """What a pytest that was ended had said by then, in its verbose lines."""
    ends: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    for line in output.splitlines():
        if found := _ALONE.match(line) or _WORKER.match(line):
            ends[found["end"]].append(found["name"])
    bad = ", ".join([*ends["FAILED"], *ends["ERROR"]][:6])
    note = f"ended before all had run; {len(ends['SKIPPED'])} skipped" + (f"; failed: {bad}" if bad else "")
    return Row(part, "tests passed", f"{len(ends['PASSED'])}", floor="all", holds=False, note=note)


# pytest's lines of a test: "FILE::NAME PASSED [ 10%]", and of a worker's: "[gw0] [ 10%] PASSED FILE::NAME".
_ALONE = re.compile(r"\S+?::(?P<name>.+) (?P<end>PASSED|FAILED|ERROR|SKIPPED)\b")
_WORKER = re.compile(r"\[gw\d+\] \[ *\d+%\] (?P<end>PASSED|FAILED|ERROR|SKIPPED) \S+?::(?P<name>.+?) *$")


def _quickstart(folder: Path) -> list[str]:
    run = folder / "run"
    words = ["experiment=quickstart", f"run_dir={run}", "launch.nproc=1", "logging=local", "engine.device=cuda",
             "model.dtype=bfloat16"]  # fmt: skip
    train = [sys.executable, "-m", "longctx", "train", *words]
    check = [sys.executable, str(ROOT / "tests" / "check_quickstart.py"), str(run)]
    remove, gates = shlex.join(["rm", "-rf", str(run)]), shlex.quote(str(folder / "gates.txt"))
    return ["bash", "-c", f"{remove}; {shlex.join(train)}; {shlex.join(check)} | tee {gates}"]


def _read_quickstart(folder: Path) -> list[Row]:
    said = [
        text.removeprefix("quickstart: ") for text in (folder / "gates.txt").read_text(encoding="utf-8").splitlines()
    ]
    holds = said == ["all gates hold"]
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    found = summary["needle_pooled"]["extended"]
    return [
        Row("quickstart", "needles found, 512 to 8,192 tokens", 100.0 * found, "%", "95 %, and the CPU's other bars",
            "98 % on a CPU", holds, note="" if holds else "; ".join(said[:4])),
    ]  # fmt: skip


# --- benchmarks


def _attention(folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "longctx", "bench", "attention", "lengths=[16k,64k]", "heads=32", "kv_heads=8",
        "head_dim=128", "virtual_ranks=[1,4,8]", "repeats=3", f"out={folder}", "format=json",
    ]  # fmt: skip


def _read_attention(folder: Path) -> list[Row]:
    document = json.loads((folder / "attention.json").read_text(encoding="utf-8"))
    rows = [Row("attention", "bf16 product 8192^3", document["matrix_gflops"] / 1e3, "TFLOP/s")]
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for row in document["rows"]:
        key = (row["length"], row["virtual_ranks"])
        if row["virtual_ranks"] == 0:
            name = f"{row['backend']} alone, {row['length']:,} tokens"
            rows.append(Row("attention", name, row["gflops"] / 1e3, "TFLOP/s"))
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    for (length, ranks), row in sorted(best.items()):
        if ranks in (4, 8):
            floor = 0.93 if length >= 65536 else 0.85
            name = f"{ranks} virtual ranks, {length:,} tokens ({row['backend']})"
            share = row["of_kernel"]
            idle = max(0.0, 1 - row["busy_seconds"] / row["seconds"])
            rows.append(Row("attention", name, share, "of the bare kernel", f"{floor}", holds=share >= floor,
                            note=f"the GPU waits for the host {idle:.0%} of the time"))  # fmt: skip
    return rows + _read_packed(document["packed"])


def _read_packed(found: list[dict[str, Any]]) -> list[Row]:
    """The fastest backend's packed cases: speed beside its own varlen call, and the first call of new lengths."""
    rows: list[Row] = []
    for length, count in sorted({(row["length"], row["documents"]) for row in found}):
        row = min((r for r in found if (r["length"], r["documents"]) == (length, count)), key=lambda r: r["seconds"])
        floor = 0.85 if count <= 64 else 0.7
        name = f"{count} documents in {length:,} tokens ({row['backend']})"
        judged = length >= 65536
        rows.append(Row("attention", name, row["of_kernel"], "of the varlen kernel", f"{floor}" if judged else "",
                        holds=row["of_kernel"] >= floor if judged else None,
                        note=f"{row['gflops'] / 1e3:.3g} TFLOP/s"))  # fmt: skip
        first = row["first_over_steady"]
        rows.append(Row("attention", f"{name}, first call of new lengths", first, "x a repeated one",
                        "1.2" if judged else "", holds=first <= 1.2 if judged else None))  # fmt: skip
    return rows


def _rings(folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "longctx", "bench", "attention", "beside=ring_flash_attn", "ranks=4",
        "lengths=[16k,64k]", "heads=32", "kv_heads=8", "head_dim=128", "repeats=3", f"out={folder}", "format=json",
    ]  # fmt: skip


def _read_rings(folder: Path) -> list[Row]:
    document = json.loads((folder / "attention.json").read_text(encoding="utf-8"))
    rows: list[Row] = []
    for found in document["rows"]:
        name = f"{document['ranks']} NCCL ranks, {found['length']:,} tokens ({found['backend']})"
        theirs, judged = found["gflops"]["ring_flash_attn"] / 1e3, found["length"] >= 65536
        parts = found["difference"]
        worst = max(parts, key=lambda name: parts[name]["rms"] if parts[name]["rms"] >= 0 else float("inf"))  # NaN
        ours, package = (found["sent"][side]["bytes"] / 2**20 for side in ("longctx", "ring_flash_attn"))
        rows += [
            Row("rings", f"speed beside ring_flash_attn, {name}", found["ratio"], "x", "1" if judged else "",
                f"{theirs:.4g} TFLOP/s", found["ratio"] >= 1 if judged else None,
                note=f"a rank sends {ours:.0f} MiB, theirs {package:.0f} MiB"),
            Row("rings", f"difference from ring_flash_attn, {name}", parts[worst]["rms"], "of the RMS", "at most 0.02",
                holds=parts[worst]["rms"] <= 0.02, note=f"{worst}; largest {parts[worst]['largest']:.2g}"),
        ]  # fmt: skip
    return rows


def _step(length: int, only: str = "", fused: str = "auto") -> Callable[[Path], list[str]]:
    def command(folder: Path) -> list[str]:
        words = [sys.executable, "-m", "longctx", "bench", "step", f"seq_len={length}", "pairs=1", "format=json"]
        words += [*EIGHT_B, f"memory.fused={fused}", *([f"only={only}"] if only else [])]
        figures = shlex.quote(str(folder / "step.json"))
        return ["bash", "-c", f"set -o pipefail; {shlex.join(words)} 2>&1 >{figures} | cat"]

    return command


def _read_step(part: str, length: int, *, judged: bool = False) -> Callable[[Path], list[Row]]:
    """judged: the figures are held against the floors."""

    def read(folder: Path) -> list[Row]:
        report = json.loads((folder / "step.json").read_text(encoding="utf-8"))
        ours = report["longctx"]
        if "out_of_memory" in ours:
            return [Row(part, f"8B shape x 4 layers, {length:,} tokens", holds=False, note=ours["out_of_memory"])]
        large = "H200" in report["device"]
        rows = [
            Row(part, f"model flop, 8B shape x 4 layers, {length:,} tokens", ours["model_tflops"], "TFLOP/s",
                "520" if judged and large else "", holds=ours["model_tflops"] >= 520 if judged and large else None,
                note=f"MFU {ours['mfu']:.0%}" if ours.get("mfu") else ""),
            Row(part, "time in products and attention", ours["share_in_products_and_attention"], "of the step",
                "0.93" if judged else "",
                holds=ours["share_in_products_and_attention"] >= 0.93 if judged else None,
                note=", ".join(f"{name} {value:.3f} s" for name, value in ours["seconds_by_kind"].items())
                + f", idle {ours['idle_seconds']:.3f} s"),
            Row(part, "peak memory", ours["peak_gib"], "GiB"),
        ]  # fmt: skip
        for other, suffix in (("liger", "_liger"), ("transformers", "")):
            if other in report:
                theirs = report[other]
                if words := theirs.get("out_of_memory") or theirs.get("failed"):
                    ended = "it runs out of memory" if "out_of_memory" in theirs else "it fails"
                    rows.append(Row(part, f"speed beside {other}", ended, note=words))
                    continue
                peer = f"{theirs['model_tflops']:.4g} TFLOP/s, {theirs['peak_gib']:.4g} GiB"
                speed, memory = report[f"speed_ratio{suffix}"], report[f"memory_ratio{suffix}"]
                bar = judged and other == "liger"
                rows.append(Row(part, f"speed beside {other}", speed, "x", "1.15" if bar else "", peer,
                                speed >= 1.15 if bar else None))  # fmt: skip
                rows.append(Row(part, f"memory beside {other}", memory, "x", "at most 0.9" if bar else "", peer,
                                memory <= 0.9 if bar else None))  # fmt: skip
        return rows

    return read


def _longest(folder: Path) -> list[str]:
    words = [f"out={folder}", "multiple=16k", "precision=0.07", "format=json"]
    return [sys.executable, "-m", "longctx", "bench", "longest", *words]


def _read_longest(folder: Path) -> list[Row]:
    report = json.loads((folder / "longest.json").read_text(encoding="utf-8"))
    figure = "longest full step, Llama-3-8B's shape, optimizer in part and every layer's input on the host"
    best, longest = report.get("best"), report["longest"] or 0
    rows = [Row("longest", figure, longest, "tokens", "262,144", holds=longest >= 262144)]
    if best is None:
        why = report["trials"][0]["why"] if report["trials"] else "nothing was tried"
        return [rows[0]._replace(note=f"{report['trials'][0]['seq_len']:,} tokens: {why}" if report["trials"] else why)]
    error, plan = report["memory_error"], report["plan"]
    where = ", ".join(f"{name} {size:.3g}" for name, size in best["memory_gib"].items())
    return [
        rows[0]._replace(note=f"the plan says {report['planned_longest'] or 0:,}"),
        Row("longest", "its step", best["seconds"], "s", note=f"{longest / best['seconds']:.4g} tokens/s"),
        Row("longest", "its memory on the device", best["peak_gib"], "GiB", note=f"by phase: {where}"),
        Row("longest", "its memory on the host", best["host_gib"], "GiB", note=f"by the plan {plan['host_gib']:.4g}"),
        Row("longest", "the plan's memory beside it", 100 * error, "%", "within 10 %", holds=abs(error) <= 0.1,
            note=f"{plan['total_gib']:.4g} GiB"),
    ]  # fmt: skip


def _million(folder: Path) -> list[str]:
    return [sys.executable, "-m", "longctx.bench.gpu_million", str(folder / "million.json")]


def _read_million(folder: Path) -> list[Row]:
    found = json.loads((folder / "million.json").read_text(encoding="utf-8"))
    return [
        Row("million", f"forward and backward, {found['tokens']:,} tokens, 32 heads x 128", found["seconds"], "s",
            note=f"{found['tflops']:.3g} TFLOP/s, {found['peak_gib']:.3g} GiB, kernel {found['kernel']}"),
        Row("million", "largest error of a sampled row", found["error"], "of its RMS", "at most 0.02",
            holds=found["error"] <= 0.02, note=", ".join(f"{k} {v:.2g}" for k, v in found["errors"].items())),
    ]  # fmt: skip


PARTS = (
    Part("kernels", "tests", "every kernel against fp64", 150, 20,
         _pytest("tests/gpu/test_kernels.py", "not flash_attn_4", workers=2), _read_pytest("kernels"), ("pytest",)),
    Part("fa4", "tests", "flash-attn 4 against fp64, two shapes and the ring (it compiles a kernel for each)", 240, 60,
         _pytest("tests/gpu/test_kernels.py", "flash_attn_4 and (2-8-2-96 or 1-8-1-128 or ring)"),
         _read_pytest("fa4"), ("pytest", "flash_attn")),
    Part("fa4_all", "long", "flash-attn 4 against fp64, every shape (by name only, minutes=15)", 900, 400,
         _pytest("tests/gpu/test_kernels.py", "flash_attn_4"), _read_pytest("fa4_all"), ("pytest", "flash_attn")),
    Part("fused", "tests", "liger-kernel's operators, and products that add in fp32", 120, 30,
         _pytest("tests/gpu/test_fused.py"), _read_pytest("fused"), ("pytest",)),
    Part("offload", "tests", "optimizer states and activations in host memory", 90, 20,
         _pytest("tests/gpu/test_offload.py"), _read_pytest("offload"), ("pytest",)),
    Part("nccl", "tests", "NCCL with several ranks on one GPU", 200, 40,
         _pytest("tests/gpu/test_nccl.py", workers=4), _read_pytest("nccl"), ("pytest", "deepspeed")),
    Part("runs", "tests", "whole runs, a kill, refusals", 200, 40,
         _pytest("tests/gpu/test_runs.py", workers=4), _read_pytest("runs"), ("pytest", "datasets", "deepspeed")),
    Part("quickstart", "tests", "the whole quickstart on one rank, with the needle bars of the CPU", 200, 60,
         _quickstart, _read_quickstart, ("datasets",)),
    Part("attention", "bench", "the executor beside the bare kernels, packed documents", 300, 30,
         _attention, _read_attention),
    Part("step", "bench", "a step of 65,536 tokens beside transformers and liger-kernel", 240, 130,
         _step(65536), _read_step("step", 65536, judged=True)),
    Part("rings", "bench", "the ring beside ring_flash_attn's zigzag on 4 NCCL ranks, same kernel", 200, 60,
         _rings, _read_rings, ("ring_flash_attn",)),
    Part("step_torch", "bench", "ours with torch's operators (memory.fused=off)", 120, 60,
         _step(65536, "longctx", "off"), _read_step("step_torch", 65536)),
    Part("step16k", "bench", "the same at 16,384 tokens", 150, 90, _step(16384), _read_step("step16k", 16384)),
    Part("step128k", "bench", "ours at 131,072 tokens", 120, 75,
         _step(131072, "longctx"), _read_step("step128k", 131072)),
    Part("million", "bench", "one layer's attention at 1,048,576 tokens", 150, 100, _million, _read_million),
    Part("smollm2", "long", "a real model from 8,192 to 65,536 tokens (by name only, minutes=8)",
         420, 120, gpu_smollm2.command, gpu_smollm2.read, ("datasets",), gpu_smollm2.lacks),
    Part("longest", "long", "the longest full step of an 8B model that the machine takes (by name only, minutes=60)",
         3600, 600, _longest, _read_longest),
)  # fmt: skip
