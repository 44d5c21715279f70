"""Peak rates of devices, for MFU; longctx.shape has the floating point operations of a step."""

from __future__ import annotations

# Dense bf16 peak of one device, FLOP/s: vendors' data sheets, without sparsity.
PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str | None, override_tflops: float | None, dtype: str) -> float | None:
    """Peak of one device in FLOP/s for products of `dtype`; None when it is not known (MFU is then left out)."""
    if override_tflops is not None:
        return override_tflops * 1e12
    if dtype != "bfloat16":
        return None
    for name, peak in PEAK.items():
        if device_name and all(word in device_name for word in name.split()):
            return peak
    return None
