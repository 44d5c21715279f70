"""What `longctx doctor` can be told: the shape of attention it judges kernels for."""

from __future__ import annotations

from longctx.config.base import Format, schema


@schema
class DoctorConfig:
    """The root of configs/doctor.yaml."""

    head_dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    format: Format = "text"
