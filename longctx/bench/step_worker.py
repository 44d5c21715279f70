"""Timed training steps for `longctx bench step`, in a process of its own; prints one JSON line.

Each measurement needs a new process, because a process's peak memory cannot be reset. On a CPU one step is timed after
a short one that makes the optimizer's states. On a GPU the model is drawn on the device, steps of the timed length come
first (they build plans and fill the allocator), several steps are timed with the device idle before and after, and one
more runs under the profiler.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longctx.bench.device_time import measure
from longctx.config.base import build
from longctx.config.bench_step import BenchStepConfig
from longctx.errors import first_line, out_of_memory
from longctx.host_memory import peak_resident
from longctx.model import LossModel, init_from
from longctx.model.host import return_freed_memory
from longctx.shape import shape_of_init
from longctx.train.flops import peak_flops

Loss = Callable[[Tensor], Tensor]
_WARM_UP = 256  # tokens of the first step on a CPU


def main(request: str) -> None:
    values = json.loads(request)
    kind = values.pop("kind")
    config = build(BenchStepConfig, values, origin="bench step")
    torch.set_num_threads(config.threads)
    return_freed_memory()  # on both sides
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = measured(kind, config, device)
    except Exception as error:
        if not out_of_memory(error):
            raise
        # An answer: a side that keeps more may not fit where another does.
        result = {"out_of_memory": first_line(error)}
    print(json.dumps({**result, "device": device_name(device)}))


def measured(kind: str, config: BenchStepConfig, device: torch.device) -> dict[str, Any]:
    model, loss = ours(config, device) if kind == "longctx" else theirs(config, device, liger=kind == "liger")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    taken = on_gpu if device.type == "cuda" else on_cpu
    return taken(config, device, lambda ids: step(model, optimizer, loss, ids))


def on_cpu(config: BenchStepConfig, device: torch.device, take: Callable[[Tensor], float]) -> dict[str, Any]:
    """Time one step after a short one."""
    take(tokens(config, _WARM_UP, device))
    ids = tokens(config, config.seq_len, device)
    start, busy = time.perf_counter(), time.process_time()
    value = take(ids)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {
        **figures(config, seconds, None),
        "cpu_seconds": busy,
        "peak_gib": peak_bytes(device) / 2**30,
        "loss": value,
    }


def on_gpu(config: BenchStepConfig, device: torch.device, take: Callable[[Tensor], float]) -> dict[str, Any]:
    """Time `config.steps` steps after two of the same length, and profile one more."""
    ids = tokens(config, config.seq_len, device)
    for _ in range(2):
        take(ids)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    taken, value, busy = [], 0.0, time.process_time()
    for _ in range(config.steps):
        start = time.perf_counter()
        value = take(ids)  # reads the loss, so the host waits for the step
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    busy, peak = (time.process_time() - busy) / config.steps, peak_bytes(device)
    seconds = median(taken)
    result = figures(config, seconds, torch.cuda.get_device_name(device))
    spent = measure(lambda: take(ids), seconds)
    return {**result, "samples": taken, "cpu_seconds": busy, "peak_gib": peak / 2**30, "loss": value, **spent}


def figures(config: BenchStepConfig, seconds: float, device: str | None) -> dict[str, Any]:
    """Seconds, tokens per second, model TFLOP/s (recomputation not counted) and their share of the device's peak."""
    pairs = config.seq_len * (config.seq_len + 1) / 2
    rate = shape_of_init(config.model).flops().model(config.seq_len, pairs) / seconds
    peak = peak_flops(device, None, config.dtype)
    return {
        "seconds": seconds,
        "tokens_per_second": config.seq_len / seconds,
        "model_tflops": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
    }


def ours(config: BenchStepConfig, device: torch.device) -> tuple[nn.Module, Loss]:
    trained = LossModel(drawn(config, device, "longctx"), config.memory)

    def loss(ids: Tensor) -> Tensor:
        labels = torch.cat([ids[:, 1:], ids.new_full((1, 1), -100)], dim=1)
        positions = torch.arange(ids.shape[1], device=device)
        # As a training batch does: without the places of its labels, the loss would wait for the device to find them.
        return trained(ids, positions, labels, targets=np.arange(ids.shape[1] - 1)).loss_sum / (ids.shape[1] - 1)

    return trained, loss


def theirs(config: BenchStepConfig, device: torch.device, *, liger: bool) -> tuple[nn.Module, Loss]:
    """Plain transformers with SDPA and gradient checkpointing; liger: with liger-kernel's operators and loss."""
    model = drawn(config, device, "sdpa")
    if liger:
        from liger_kernel.transformers.monkey_patch import (  # type: ignore[import-not-found]
            _apply_liger_kernel_to_instance,
        )

        _apply_liger_kernel_to_instance(model=model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def drawn(config: BenchStepConfig, device: torch.device, attention: str) -> Any:
    """The model, drawn on a GPU itself: two billion weights take a second there and a minute on the host."""
    with device if device.type == "cuda" else nullcontext():
        return init_from(config.model, dtype=config.dtype, attention=attention).to(device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, ids: Tensor) -> float:
    value = loss(ids)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=ids.is_cuda)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.item()


def tokens(config: BenchStepConfig, count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(config.model.vocab, (1, count), generator=generator).to(device)


def peak_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


if __name__ == "__main__":
    main(sys.argv[1])
