"""The device's time in one training step by kind of kernel: matrix products, attention and the rest.

Products and attention are the floor of a step: everything else is what a better implementation could spare. Kinds are
told by the names of the kernels, as torch.profiler gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

# Attention comes first: its kernels' names contain words of products (cutlass, wgmma) as well.
ATTENTION = ("flash", "fmha", "sdpa", "attention", "attn")
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "gemv", "splitk", "wgmma")


def kind_of(kernel: str) -> str:
    """attention, products or rest."""
    name = kernel.lower()
    if any(word in name for word in ATTENTION):
        return "attention"
    return "products" if any(word in name for word in PRODUCTS) else "rest"


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The seconds of each kind; kernels: (name, microseconds)."""
    found = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for name, microseconds in kernels:
        found[kind_of(name)] += microseconds / 1e6
    return found


def profiled(work: Callable[[], Any]) -> list[tuple[str, float]]:
    """Run `work` once under the profiler; returns the kernels that the device ran: (name, microseconds)."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return [
        (event.name, event.time_range.elapsed_us())
        for event in profile.events() or []
        if event.device_type == cuda and not getattr(event, "is_user_annotation", False)  # it spans kernels
    ]


def measure(work: Callable[[], Any], wall_seconds: float) -> dict[str, Any]:
    """Run `work` once under the profiler; returns seconds by kind, the idle rest of `wall_seconds`, and the slowest.

    wall_seconds: the time of the same work without the profiler, which slows the host.
    """
    kernels = profiled(work)
    seconds = by_kind(kernels)
    busy = sum(seconds.values())
    slowest: dict[str, float] = {}
    for name, microseconds in kernels:
        slowest[name] = slowest.get(name, 0.0) + microseconds / 1e6
    top = sorted(slowest.items(), key=lambda entry: -entry[1])[:24]
    return {
        "seconds_by_kind": {name: round(value, 4) for name, value in seconds.items()},
        "idle_seconds": round(max(0.0, wall_seconds - busy), 4),
        "share_in_products_and_attention": round(
            (seconds["products"] + seconds["attention"]) / max(wall_seconds, busy), 3
        ),
        "kernels": len(kernels),
        "slowest": [{"kernel": name[:200], "seconds": round(value, 4)} for name, value in top],
    }
