"""One timed training step for `longctx bench step`, in a process of its own; prints one JSON line.

Each measurement needs a new process, because a process's peak memory cannot be reset.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longctx.config.base import build
from longctx.config.bench_step import BenchStepConfig
from longctx.model import LossModel, init_from
from longctx.model.host import return_freed_memory

_WARM_UP = 256


def main(request: str) -> None:
    values = json.loads(request)
    kind = values.pop("kind")
    config = build(BenchStepConfig, values, origin="bench step")
    torch.set_num_threads(config.threads)
    return_freed_memory()  # on both sides
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, loss = ours(config, device) if kind == "longctx" else theirs(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    step(model, optimizer, loss, tokens(config, _WARM_UP, device))
    ids = tokens(config, config.seq_len, device)
    start, busy = time.perf_counter(), time.process_time()
    value = step(model, optimizer, loss, ids)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": busy,
                "tokens_per_second": config.seq_len / seconds,
                "peak_gib": peak_bytes(device) / 2**30,
                "loss": value,
                "device": device_name(device),
            }
        )
    )


def ours(config: BenchStepConfig, device: torch.device) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = init_from(config.model, dtype=config.dtype).to(device)
    trained = LossModel(model, config.memory)

    def loss(ids: Tensor) -> Tensor:
        labels = torch.cat([ids[:, 1:], ids.new_full((1, 1), -100)], dim=1)
        positions = torch.arange(ids.shape[1], device=device)
        return trained(ids, positions, labels).loss_sum / (ids.shape[1] - 1)

    return trained, loss


def theirs(config: BenchStepConfig, device: torch.device) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model: Any = init_from(config.model, dtype=config.dtype, attention="sdpa").to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model, lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    value = loss(ids)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.item()


def tokens(config: BenchStepConfig, count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(config.model.vocab, (1, count), generator=generator).to(device)


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


if __name__ == "__main__":
    main(sys.argv[1])
