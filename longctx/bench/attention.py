"""`longctx bench attention`: compare ring attention with the device's own attention.

On a CPU, a ring of two ranks with one thread each alternates with one process of two threads that runs torch SDPA on
the same cores. On a GPU (attention_virtual.py), virtual ranks in one process are compared with the bare kernel. Both
report the share of the matrix rate that is measured in the same run. Causal attention counts 2 S^2 Hq D flop forward
and 2.5 times as much backward. attention_rings.py compares the ring with that of the package ring_flash_attn.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from longctx.bench import attention_rings
from longctx.bench.attention_case import AttentionCase, matrix_rate
from longctx.bench.attention_virtual import measure
from longctx.bench.attention_virtual import table as virtual_table
from longctx.config.bench import BenchAttentionConfig
from longctx.console import emit, emit_json, say
from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.bench.workers import Serve


def run(config: BenchAttentionConfig) -> int:
    """Measure on the device the config names and print the table or the JSON document."""
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but this torch sees no CUDA device; leave device=auto or set device=cpu")
    if config.beside == "ring_flash_attn":
        document = attention_rings.measure(config)
    elif config.device != "cpu" and torch.cuda.is_available():
        document = measure(config, "cuda")
    elif config.backends:
        raise UserError(
            f"backends={config.backends} chooses among a GPU's kernels, and the ring on a CPU has one; leave backends "
            "out, or add beside=ring_flash_attn (configs/bench_attention.yaml)"
        )
    else:
        document = measure_cpu(config)
    document = {"host": host(), **document}
    if config.out:
        import json

        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "attention.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if config.format == "json":
        emit_json(document)
    else:
        emit(_table(document))
    return 0


def host() -> dict[str, Any]:
    """Describe the machine and the versions on which the figures were measured."""
    import os

    import torch

    return {
        "machine": _cpu_name(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def measure_cpu(config: BenchAttentionConfig) -> dict[str, Any]:
    """Measure a ring of `ranks` x 1 thread and SDPA with `ranks` threads in turn; returns medians and ratios."""
    from longctx.bench.workers import WorkerGroup

    dtype = "float32" if config.dtype == "auto" else config.dtype
    problems = [
        AttentionCase(length, config.batch, config.heads, config.kv_heads, config.head_dim, dtype)
        for length in config.lengths
    ]
    rows: list[dict[str, Any]] = []
    with (
        WorkerGroup(1, config.ranks, prepare_sdpa, None) as alone,
        WorkerGroup(config.ranks, 1, prepare_ring, None) as ring,
    ):
        rate = max(alone.ask("matrix")[0] for _ in range(3))
        for problem in problems:
            say(f"{problem.length} tokens: {config.repeats} turns each ...")
            samples: dict[str, list[float]] = {"ring": [], "sdpa": []}
            for turn in range(config.repeats + 1):
                for name, team in (("ring", ring), ("sdpa", alone)):
                    seconds = max(team.ask(problem))
                    if turn:  # the first turn warms caches and allocators
                        samples[name].append(seconds)
            rows.append(_row(problem, samples, rate))
    return {"device": "cpu", "ranks": config.ranks, "matrix_gflops": round(rate / 1e9, 1), "rows": rows}


def _row(problem: AttentionCase, samples: dict[str, list[float]], rate: float) -> dict[str, Any]:
    seconds = {name: median(values) for name, values in samples.items()}
    return {
        "length": problem.length,
        "heads": problem.heads,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "dtype": problem.dtype,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "samples": {name: [round(value, 4) for value in values] for name, values in samples.items()},
        "gflops": {name: round(problem.flop / value / 1e9, 1) for name, value in seconds.items()},
        "share_of_matrix_rate": {name: round(problem.flop / value / rate, 3) for name, value in seconds.items()},
        "ratio": round(seconds["sdpa"] / seconds["ring"], 3),
    }


def prepare_sdpa(rank: int, world: int, port: int, settings: Any) -> Serve:
    """Make a worker's function that times torch SDPA, forward and backward, or measures the matrix rate."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def serve(order: AttentionCase | str) -> float:
        if isinstance(order, str):
            return matrix_rate(torch.device("cpu"), torch.float32, 2048)
        q, k, v = _inputs(order, order.length)
        grad = torch.randn_like(q)
        start = time.perf_counter()
        out = sdpa(q, k, v, is_causal=True, enable_gqa=order.heads != order.kv_heads)
        out.backward(grad)
        return time.perf_counter() - start

    return serve


def prepare_ring(rank: int, world: int, port: int, settings: Any) -> Serve:
    """Make a worker's function that times one rank of the ring, from a common start to the end of its backward."""
    import torch
    import torch.distributed as dist

    from longctx import ContextParallel, context_attention
    from longctx.distributed import ranks as worlds

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    worlds.start("cpu")
    cp = ContextParallel.from_world(nodes=1, schedule="flat_ring")

    def serve(order: AttentionCase) -> float:
        layout = cp.layout(seq_len=order.length, documents=None, kind="zigzag")
        q, k, v = _inputs(order, order.length // world)
        grad = torch.randn_like(q)
        dist.barrier()
        start = time.perf_counter()
        out = cast(torch.Tensor, context_attention(q, k, v, layout))
        out.backward(grad)
        return time.perf_counter() - start

    return serve


def _inputs(problem: AttentionCase, tokens: int) -> list[Any]:
    import torch

    shapes = [problem.heads, problem.kv_heads, problem.kv_heads]
    dtype = getattr(torch, problem.dtype)
    return [
        torch.randn(problem.batch, heads, tokens, problem.head_dim, dtype=dtype, requires_grad=True) for heads in shapes
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _table(document: dict[str, Any]) -> Any:
    from rich.table import Table

    if document.get("beside") == "ring_flash_attn":
        return attention_rings.table(document)
    if document["device"] != "cpu":
        return virtual_table(document)
    from rich.box import SIMPLE

    at, ranks = document["host"], document["ranks"]
    title = (
        f"causal attention, forward + backward: {ranks} ranks x 1 thread against SDPA x {ranks} threads,\n"
        f"{at['machine']}, torch {at['torch']}, matrix rate {document['matrix_gflops']:.0f} GFLOP/s"
    )
    made = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("tokens", "heads", "ring s", "SDPA s", "ring GFLOP/s", "SDPA", "ring/SDPA", "of matrix"):
        made.add_column(column, justify="right", no_wrap=True)
    for row in document["rows"]:
        made.add_row(
            f"{row['length']}",
            f"{row['heads']}/{row['kv_heads']} x {row['head_dim']}",
            f"{row['seconds']['ring']:.3f}",
            f"{row['seconds']['sdpa']:.3f}",
            f"{row['gflops']['ring']:.0f}",
            f"{row['gflops']['sdpa']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['share_of_matrix_rate']['ring']:.0%}",
        )
    return made
