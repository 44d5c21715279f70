"""Compare ring attention on virtual ranks of one process with the bare kernel, which leaves out the network.

N virtual ranks are threads that take turns on one device and pass blocks to each other in memory. Together they do the
work of one causal call, so the time of that call divided by theirs shows the cost of cutting, merging and copying.
Packed documents are compared in the same way with the kernel's own varlen call. The benchmark is made for a GPU; tests
run it on a CPU with torch's CPU kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

from longctx.bench.attention_case import AttentionCase, matrix_rate
from longctx.bench.device_time import profiled
from longctx.config.bench import BenchAttentionConfig
from longctx.console import say
from longctx.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longctx.attention.kernels import Kernel


def measure(config: BenchAttentionConfig, device_name: str) -> dict[str, Any]:
    """Measure each backend, length and number of virtual ranks.

    Returns seconds, rate, and the shares of the matrix rate and of the bare kernel's speed.
    """
    import torch

    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    wanted = config.dtype if config.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    rate = matrix_rate(device, getattr(torch, wanted), 8192 if on_gpu else 1024)
    rows: list[dict[str, Any]] = []
    packed: list[dict[str, Any]] = []
    kernels, refused = backends(config, device, getattr(torch, wanted))
    for name, reasons in refused.items():
        say(f"{name} cannot serve: {'; '.join(reasons)}")
    for length in config.lengths:
        problem = AttentionCase(length, config.batch, config.heads, config.kv_heads, config.head_dim, wanted)
        for kernel in kernels:
            say(f"{length} tokens, {kernel.name} ...")
            alone = _median(_single(problem, kernel, device), config.repeats, device)
            rows.append(_row(problem, kernel.name, 0, alone, alone, rate))
            for ranks in config.virtual_ranks:
                work = _virtual(problem, kernel, device, ranks)
                seconds = _median(work, config.repeats, device)
                busy = _busy(work) if on_gpu else None
                rows.append(_row(problem, kernel.name, ranks, seconds, alone, rate, busy))
            if kernel.varlen is not None:
                packed += [_packed(problem, kernel, device, count, config.repeats) for count in config.documents]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu (virtual ranks)",
        "cuda": torch.version.cuda if on_gpu else None,
        "dtype": wanted,
        "matrix_gflops": round(rate / 1e9, 1),
        "refused": refused,
        "rows": rows,
        "packed": packed,
    }


def backends(
    config: BenchAttentionConfig, device: torch.device, dtype: torch.dtype
) -> tuple[list[Kernel], dict[str, list[str]]]:
    """Return the kernels to measure, and the reasons why each of the others cannot serve."""
    from longctx.attention import kernels

    capability = (0, 0)
    if device.type == "cuda":
        import torch

        capability = torch.cuda.get_device_capability(device)
    shape = (config.head_dim, config.heads, config.kv_heads, capability)
    reasons = kernels.explain(kernels.Problem(device.type, dtype, *shape), tried=True)
    for name in config.backends:
        if name not in reasons:
            raise UserError(f"backends: {name!r} is not a kernel; known: {', '.join(reasons)}")
        if reasons[name]:
            raise UserError(f"backends: {name} cannot serve: {'; '.join(reasons[name])}")
    names = config.backends or [name for name, why in reasons.items() if not why and name != "reference"]
    if not names:
        lines = [f"{name}: {'; '.join(why)}" for name, why in reasons.items() if why]
        raise UserError(f"no kernel can serve {dtype} on {device}: " + " | ".join(lines))
    return [kernels.KERNELS[name] for name in names], {name: why for name, why in reasons.items() if why}


def _row(
    problem: AttentionCase, kernel: str, ranks: int, seconds: float, alone: float, rate: float,
    busy: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """busy: the seconds for which the device computes in another run; the rest of `seconds` it waits for the host."""
    return {
        "backend": kernel,
        "length": problem.length,
        "virtual_ranks": ranks,  # 0: the bare kernel
        "seconds": seconds,
        "gflops": round(problem.flop / seconds / 1e9, 1),
        "share_of_matrix_rate": round(problem.flop / seconds / rate, 3),
        "of_kernel": round(alone / seconds, 3),
        "busy_seconds": busy,
    }


def _busy(work: Callable[[], None]) -> float:
    """The seconds that the device computes in one run of `work`."""
    return sum(microseconds for _, microseconds in profiled(work)) / 1e6


def _median(work: Callable[[], None], repeats: int, device: torch.device, warm_up: int = 2) -> float:
    """Return the median seconds of `work` after warm-up runs; the device is idle before and after each run."""
    import torch

    taken = []
    for turn in range(repeats + warm_up):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= warm_up:
            taken.append(time.perf_counter() - start)
    return median(taken)


def _tensors(problem: AttentionCase, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """Make random q, k, v and gradient of out for `tokens` tokens, tokens before heads as projections leave them."""
    import torch

    counts = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    dtype = getattr(torch, problem.dtype)
    return tuple(
        torch.randn(problem.batch, tokens, heads, problem.head_dim, device=device, dtype=dtype).transpose(1, 2)
        for heads in counts
    )


def _single(problem: AttentionCase, kernel: Kernel, device: torch.device) -> Callable[[], None]:
    """Make a function that calls the kernel once, causal, forward and backward."""
    q, k, v, grad = _tensors(problem, problem.length, device)
    scale = problem.head_dim**-0.5

    def work() -> None:
        out, lse = kernel.forward(q, k, v, causal=True, scale=scale)
        kernel.backward(grad, q, k, v, out, lse, causal=True, scale=scale)

    return work


def _virtual(
    problem: AttentionCase, kernel: Kernel, device: torch.device, ranks: int, boundaries: Any = None
) -> Callable[[], None]:
    """Make a function that does the same work with `ranks` virtual ranks of a flat ring, which take turns.

    boundaries: cu_seqlens of packed documents; None: one document.
    """
    import torch

    from longctx.attention.buffers import BufferPool
    from longctx.attention.executor import ScheduleExecutor
    from longctx.attention.rectangles import RectangleKernels
    from longctx.attention.transfers import TransferQueue
    from longctx.distributed.counters import ByteCounter
    from longctx.distributed.thread_transport import ThreadTransport, ThreadWorld
    from longctx.distributed.transport import SingleRankTransport, Transport
    from longctx.layout import SequenceLayout
    from longctx.schedule import build
    from longctx.topology import Topology

    if problem.length % (2 * ranks):
        raise UserError(f"lengths: {problem.length} is not divisible by 2 x virtual_ranks = {2 * ranks}")
    layout, topology = SequenceLayout(problem.length, ranks, boundaries=boundaries), Topology(1, ranks)
    passes = [
        [build("flat_ring", topology, r, backward=b, work=layout.work) for r in range(ranks)] for b in (False, True)
    ]
    inputs = [_tensors(problem, problem.length // ranks, device) for _ in range(ranks)]
    pools = [BufferPool() for _ in range(ranks)]
    kernels = [RectangleKernels(kernel.name, recurring=boundaries is None) for _ in range(ranks)]
    scale = problem.head_dim**-0.5

    def rank_work(transport: Transport) -> None:
        rank = transport.rank
        q, k, v, grad = inputs[rank]
        ahead, back = (
            ScheduleExecutor(
                schedules[rank], layout, TransferQueue(transport, ByteCounter(), "bench"), kernels[rank], pools[rank],
                scale,
            )
            for schedules in passes
        )  # fmt: skip
        out, lse = ahead.forward(q, k, v)
        back.backward(grad, q, k, v, out, lse, torch.float32)

    world = ThreadWorld(ranks, serial=True)

    def work() -> None:
        if ranks == 1:
            rank_work(SingleRankTransport())
        else:
            local: Callable[[ThreadTransport], None] = rank_work
            world.run(local)

    return work


def _packed(problem: AttentionCase, kernel: Kernel, device: torch.device, count: int, repeats: int) -> dict[str, Any]:
    """Time `count` packed documents of uneven lengths: one rank's attention, and the kernel's varlen call alone.

    first_over_steady: the first call on lengths never seen before, divided by the median of repeated calls.
    """
    import numpy as np
    import torch

    from longctx.attention.kernel import Lengths

    draw = np.random.default_rng(count)

    def bounds() -> Any:
        cuts = draw.choice(np.arange(1, problem.length), size=count - 1, replace=False)
        return np.r_[0, np.sort(cuts), problem.length].astype(np.int64)

    boundaries = bounds()
    sizes = np.diff(boundaries)
    cu = torch.from_numpy(boundaries.astype(np.int32)).to(device)
    bound = -(-int(sizes.max()) // 128) * 128
    lengths, varlen = Lengths(cu, cu, bound, bound), kernel.varlen
    assert varlen is not None
    q, k, v, grad = (x[0].transpose(0, 1).contiguous() for x in _tensors(problem, problem.length, device))
    options = {"causal": True, "scale": problem.head_dim**-0.5}

    def bare() -> None:
        out, lse = varlen.forward(q, k, v, lengths, **options)
        varlen.backward(grad, q, k, v, out, lse, lengths, **options)

    alone = _median(bare, repeats, device)
    steady = _median(_virtual(problem, kernel, device, 1, boundaries), repeats, device)
    new = [_median(_virtual(problem, kernel, device, 1, bounds()), 1, device, warm_up=0) for _ in range(repeats + 2)]
    flop = 7.0 * problem.heads * problem.head_dim * float((sizes * (sizes + 1)).sum())
    return {
        "backend": kernel.name,
        "length": problem.length,
        "documents": count,
        "seconds": steady,
        "gflops": round(flop / steady / 1e9, 1),
        "of_kernel": round(alone / steady, 3),
        "first_over_steady": round(median(new[2:]) / steady, 3),
    }


def table(document: dict[str, Any]) -> Any:
    """Make the table with one row per backend, length and number of ranks."""
    from rich.table import Table

    title = (
        f"causal attention, forward + backward, {document['device']}, {document['dtype']}, "
        f"torch {document['host']['torch']}, matrix rate {document['matrix_gflops'] / 1e3:.3g} TFLOP/s"
    )
    made = Table(title=title, title_justify="left")
    for column in ("backend", "tokens", "virtual ranks", "ms", "TFLOP/s", "of matrix rate", "of the kernel"):
        made.add_column(column, justify="left" if column == "backend" else "right")
    for row in document["rows"]:
        made.add_row(
            row["backend"],
            str(row["length"]),
            str(row["virtual_ranks"] or "kernel alone"),
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['gflops'] / 1e3:.3g}",
            f"{row['share_of_matrix_rate']:.0%}",
            f"{row['of_kernel']:.0%}",
        )
    for row in document["packed"]:
        made.add_row(
            row["backend"],
            str(row["length"]),
            f"{row['documents']} documents",
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['gflops'] / 1e3:.3g}",
            "",
            f"{row['of_kernel']:.0%}, first {row['first_over_steady']:.2f}x",
        )
    return made
