"""One device and its links, as `longctx plan` times them."""

from __future__ import annotations

from typing import Literal

from longctx.config.base import Text, schema


@schema
class RatesConfig:
    """Dense peak TFLOP/s of matrix products in each dtype, as torch runs them by default (float32 without TF32)."""

    bfloat16: float = 989.0
    float32: float = 67.0
    float64: float = 67.0

    def __post_init__(self) -> None:
        for name in ("bfloat16", "float32", "float64"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")


@schema
class HardwareConfig:
    """One device and its links. utilization: the share of `tflops` that training reaches; memory_gib: what torch
    reports as the device's memory; memory_gbytes: GB/s of that memory; inner_gbytes, outer_gbytes: GB/s of one
    device's link inside a node and between nodes; latency_us: microseconds a message needs beyond its bytes.
    """

    name: Text = "device"
    device: Literal["cuda", "cpu"] = "cuda"
    tflops: RatesConfig = RatesConfig()
    utilization: float = 0.45
    memory_gib: float = 79.0
    memory_gbytes: float = 3350.0
    inner_gbytes: float = 450.0
    outer_gbytes: float = 50.0
    latency_us: float = 10.0

    def __post_init__(self) -> None:
        for name in ("memory_gib", "memory_gbytes", "inner_gbytes", "outer_gbytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization} must lie above 0 and not above 1")
        if self.latency_us < 0:
            raise ValueError(f"latency_us={self.latency_us} must be 0 or more")

    def rate(self, dtype: str) -> float:
        """FLOP/s that training reaches in products of this dtype."""
        return getattr(self.tflops, dtype) * 1e12 * self.utilization
