"""One device and its links, as `longctx plan` times them."""

from __future__ import annotations

from typing import Literal

from longctx.config.base import AboveZero, ShareAboveZero, Text, ZeroOrMore, schema


@schema
class RatesConfig:
    """Dense peak TFLOP/s of matrix products in each dtype, as torch runs them by default (float32 without TF32)."""

    bfloat16: AboveZero = 989.0  #: TFLOP/s of matrix products in bfloat16
    float32: AboveZero = 67.0  #: TFLOP/s of matrix products in float32
    float64: AboveZero = 67.0  #: TFLOP/s of matrix products in float64


@schema
class HardwareConfig:
    """One device and its links."""

    name: Text = "device"  #: name of the device in tables
    device: Literal["cuda", "cpu"] = "cuda"  #: device that ranks compute on
    capability: AboveZero = 9.0  #: compute capability of a GPU, which some attention kernels need
    tflops: RatesConfig = RatesConfig()
    utilization: ShareAboveZero = 0.45  #: the share of `tflops` that training reaches
    memory_gib: AboveZero = 79.0  #: GiB of the device's memory, as torch reports it
    memory_gbytes: AboveZero = 3350.0  #: GB/s of the device's memory
    inner_gbytes: AboveZero = 450.0  #: GB/s of one device's link inside a node
    outer_gbytes: AboveZero = 50.0  #: GB/s of one device's link between nodes
    latency_us: ZeroOrMore = 10.0  #: microseconds a message needs beyond its bytes

    def rate(self, dtype: str) -> float:
        """FLOP/s that training reaches in products of this dtype."""
        return getattr(self.tflops, dtype) * 1e12 * self.utilization
