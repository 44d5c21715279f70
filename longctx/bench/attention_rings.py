"""`longctx bench attention beside=ring_flash_attn`: longctx's flat ring beside the package's zigzag ring.

Both rings take turns on the same ranks, with the same tensors and the same kernel, forward and backward: over gloo with
one thread per rank on a CPU, over NCCL on GPUs. More ranks than GPUs share a GPU as launch/one_gpu.sh lets them; their
times then compare the two rings and say nothing of a cluster. Before the turns one pass of each is compared, and what
it sends is counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, cast

from longctx.bench.attention_case import AttentionCase
from longctx.config.bench import BenchAttentionConfig
from longctx.console import say
from longctx.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longctx.bench.workers import Serve
    from longctx.distributed.ranks import Ranks

Side = Literal["longctx", "ring_flash_attn"]
SIDES: tuple[Side, ...] = ("ring_flash_attn", "longctx")
RESULTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Request:
    """A timed pass of one side, or (side None) one untimed pass of each, compared and counted."""

    side: Side | None
    case: AttentionCase
    kernel: str


def measure(config: BenchAttentionConfig) -> dict[str, Any]:
    """Measure every length with every kernel; returns seconds, rates, traffic and differences of the two rings."""
    import torch

    from longctx.bench.workers import WorkerGroup

    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    check(config)
    kernels = kernel_names(config, device)
    rows: list[dict[str, Any]] = []
    with WorkerGroup(config.ranks, 1, prepare, device) as ranks:
        for length in config.lengths:
            case = AttentionCase(length, config.batch, config.heads, config.kv_heads, config.head_dim, "bfloat16")
            for kernel in kernels:
                say(f"{length} tokens, {kernel}: {config.repeats} turns each ...")
                compared = ranks.ask(Request(None, case, kernel))
                samples: dict[Side, list[tuple[float, float]]] = {side: [] for side in SIDES}
                for turn in range(config.repeats + 1):
                    for side in SIDES:
                        taken = ranks.ask(Request(side, case, kernel))
                        if turn:  # the first turn warms allocators and connections
                            wall, cpu = zip(*taken, strict=True)
                            samples[side].append((max(wall), sum(cpu) / len(cpu)))
                rows.append(row(case, kernel, compared, samples))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "devices": torch.cuda.device_count() if device == "cuda" else 0,
        "beside": "ring_flash_attn",
        "ranks": config.ranks,
        "rows": rows,
    }


def check(config: BenchAttentionConfig) -> None:
    """Raise UserError for what the package cannot do: its absence, fp32, lengths that 2 x ranks does not divide."""
    from longctx.bench.ring_flash import missing

    if reason := missing():
        raise UserError(f"beside=ring_flash_attn: {reason}")
    if config.dtype == "float32":
        raise UserError(
            "dtype=float32 with beside=ring_flash_attn: its float32 sums would be the kernel's own buffers, which the "
            "next call overwrites, so that its gradients would be wrong; leave dtype=auto (bfloat16)"
        )
    if config.ranks < 2:
        raise UserError(f"ranks={config.ranks} with beside=ring_flash_attn: a ring needs two ranks or more")


def kernel_names(config: BenchAttentionConfig, device: str) -> list[str]:
    """The kernels that are asked for, or flash-attn 2, which the package is made for, and the first of the order."""
    import torch

    from longctx.bench.attention_virtual import backends

    able = [kernel.name for kernel in backends(config, torch.device(device), torch.bfloat16)[0]]
    return able if config.backends else [name for name in able if name in ("flash_attn_2", able[0])]


def row(
    case: AttentionCase, kernel: str, compared: Sequence[dict[str, Any]], samples: dict[Side, list[tuple[float, float]]]
) -> dict[str, Any]:
    """The figures of one length and kernel.

    compared: the ranks' answers in rank order. samples: of each turn the seconds of the slowest rank, and the mean of
    the processor seconds of a rank, which other work on the machine does not lengthen.
    """
    walls = {side: [wall for wall, _ in turns] for side, turns in samples.items()}
    seconds = {side: median(values) for side, values in walls.items()}
    return {
        "length": case.length,
        "backend": kernel,
        "seconds": seconds,
        "samples": walls,
        "cpu_seconds": {side: median(cpu for _, cpu in turns) for side, turns in samples.items()},
        "gflops": {side: round(case.flop / value / 1e9, 1) for side, value in seconds.items()},
        "ratio": round(seconds["ring_flash_attn"] / seconds["longctx"], 3),
        "difference": {name: difference([one["difference"][name] for one in compared]) for name in RESULTS},
        "sent": {side: max((one["sent"][side] for one in compared), key=lambda sent: sent["bytes"]) for side in SIDES},
    }


def difference(parts: Sequence[tuple[float, float, float, int]]) -> dict[str, float]:
    """RMS and largest difference of the two rings, divided by the RMS of the package's result.

    parts: of each rank the sum of squared differences, the sum of squares, the largest difference, and the count.
    """
    squared, squares, _, count = (sum(values) for values in zip(*parts, strict=True))
    return {"rms": (squared / squares) ** 0.5, "largest": max(part[2] for part in parts) / (squares / count) ** 0.5}


def prepare(rank: int, world: int, port: int, device: str) -> Serve:
    """Make a worker's function: one rank of both rings."""
    import torch

    from longctx.distributed import ranks as worlds

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if device == "cuda" and world > torch.cuda.device_count():
        os.environ.update(worlds.shared_gpu(rank))
    both = BothRings(worlds.start(device))

    def serve(request: Request) -> Any:
        if request.side is None:
            return both.compare(request)
        return both.timed(request)

    return serve


class BothRings:
    """One rank of both rings. Shapes: q, out, dout [B, n, Hq, D], k and v [B, n, Hkv, D], as the package has them."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.made = ranks, {}

    def timed(self, request: Request) -> tuple[float, float]:
        """Seconds, and this process's processor seconds, from a common start to the end of this rank's backward."""
        inputs = self.inputs(request.case)
        self.wait()
        self.ranks.sum([0.0])
        start, cpu = time.perf_counter(), time.process_time()
        self.forward_backward(cast(Side, request.side), request.kernel, request.case.length, inputs)
        self.wait()
        return time.perf_counter() - start, time.process_time() - cpu

    def compare(self, request: Request) -> dict[str, Any]:
        """Run one pass of each side: differences of this rank's results, and the bytes and tensors it sent."""
        from longctx.bench.ring_flash import counted

        results, sent = {}, {}
        for side in SIDES:
            with counted() as traffic:
                results[side] = self.forward_backward(
                    side, request.kernel, request.case.length, self.inputs(request.case)
                )
            sent[side] = {"bytes": traffic.bytes, "tensors": len(traffic.sent)}
        differences = {}
        for name, a, b in zip(RESULTS, results["longctx"], results["ring_flash_attn"], strict=True):
            apart, package = (a.float() - b.float()), b.float()
            squared, squares = (x.square().sum().item() for x in (apart, package))
            differences[name] = (squared, squares, apart.abs().max().item(), package.numel())
        return {"difference": differences, "sent": sent}

    def inputs(self, case: AttentionCase) -> list[Tensor]:
        """This rank's q, k, v and gradient of out, the same at every call."""
        import torch

        device = self.ranks.device
        make = torch.Generator(device).manual_seed(1 + self.ranks.rank)
        tokens, dtype = case.length // self.ranks.world, getattr(torch, case.dtype)
        return [
            torch.randn((case.batch, tokens, heads, case.head_dim), generator=make, device=device, dtype=dtype)
            for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
        ]

    def forward_backward(self, side: Side, kernel: str, length: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """out, dq, dk and dv of one side."""
        *leaves, dout = inputs
        q, k, v = (x.detach().requires_grad_() for x in leaves)
        ring = self.ring(side, kernel)
        if side == "longctx":
            from longctx.attention import context_attention

            layout = ring.layout(seq_len=length)
            out = cast("torch.Tensor", context_attention(*(x.transpose(1, 2) for x in (q, k, v)), layout=layout))
            out = out.transpose(1, 2)
        else:
            out = ring(q, k, v, causal=True)
        out.backward(dout)
        return [cast("torch.Tensor", x) for x in (out.detach(), q.grad, k.grad, v.grad)]

    def ring(self, side: Side, kernel: str) -> Any:
        """A ContextParallel, or the package's function; each is made once per kernel."""
        if (side, kernel) not in self.made:
            from longctx.attention import ContextParallel
            from longctx.attention.kernels import KERNELS
            from longctx.bench.ring_flash import zigzag

            ours = side == "longctx"
            self.made[side, kernel] = ContextParallel.from_world(kernel=kernel) if ours else zigzag(KERNELS[kernel])
        return self.made[side, kernel]

    def wait(self) -> None:
        if self.ranks.device.type == "cuda":
            import torch

            torch.cuda.synchronize()


def table(document: dict[str, Any]) -> Any:
    """Make the table with one row per length and kernel, longctx's figure before the package's.

    apart: the largest RMS difference of out, dq, dk and dv, divided by the RMS.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    at, ranks, gpus = document["host"], document["ranks"], document["devices"]
    where = at["machine"] if not gpus else f"{min(gpus, ranks)} x {document['device']}"
    title = (
        f"causal attention, forward + backward, bfloat16: {ranks} ranks on {where}, torch {at['torch']},\n"
        "longctx's flat ring / the zigzag ring of ring_flash_attn over the same kernel"
    )
    made = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("tokens", "kernel", "seconds", "CPU seconds", "speed", "MiB sent", "apart"):
        made.add_column(column, justify="left" if column == "kernel" else "right", no_wrap=True)
    for one in document["rows"]:
        sent = {side: one["sent"][side]["bytes"] / 2**20 for side in SIDES}
        made.add_row(
            f"{one['length']}",
            one["backend"],
            _pair(one["seconds"], ".3f"),
            _pair(one["cpu_seconds"], ".3f"),
            f"{one['ratio']:.2f} x",
            _pair(sent, ".0f"),
            f"{max(part['rms'] for part in one['difference'].values()):.1e}",
        )
    return made


def _pair(values: Mapping[Any, float], form: str) -> str:
    return f"{values['longctx']:{form}} / {values['ring_flash_attn']:{form}}"
