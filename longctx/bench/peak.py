"""`longctx bench peak`: measure this device's matrix rate, the denominator of MFU when no table has the device.

It times square products of several sizes; the best median is the peak. The rate depends on the device's current
clocks, unlike a data sheet.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from longctx.config.bench_peak import BenchPeakConfig
from longctx.console import emit, emit_json


def run(config: BenchPeakConfig) -> int:
    report = measure_peak(config)
    if config.format == "json":
        emit_json(report)
        return 0
    lines = [f"{size:>7} {rate / 1e12:9.3f} TFLOP/s" for size, rate in report["flops_per_second"].items()]
    lines.append(f"peak {report['peak'] / 1e12:.3f} TFLOP/s, {report['dtype']}, {report['device']}")
    lines.append(f"for MFU: logging.peak_tflops={report['peak'] / 1e12:.3f}")
    emit("\n".join(lines))
    return 0


def measure_peak(config: BenchPeakConfig) -> dict[str, Any]:
    """Measure the FLOP/s of each matrix size; returns these, the best as `peak`, the device and the dtype."""
    import torch

    from longctx.bench.step_worker import device_name

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    on_gpu = device.type == "cuda"
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
    sizes = config.sizes or ([4096, 8192, 16384] if on_gpu else [512, 1024, 2048])
    rates = {}
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
        seconds = [_seconds(a, b) for _ in range(config.repeats + 1)][1:]
        rates[str(size)] = 2 * size**3 / median(seconds)
    return {
        "device": device_name(device),
        "dtype": name,
        "threads": None if on_gpu else torch.get_num_threads(),
        "flops_per_second": rates,
        "peak": max(rates.values()),
    }


def _seconds(a: Any, b: Any) -> float:
    import torch

    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start
