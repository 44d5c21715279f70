"""Config schema of `longctx doctor`: the shape of attention it judges kernels for."""

from __future__ import annotations

from longctx.config.base import Format, Width, schema


@schema
class DoctorConfig:
    """The root of configs/doctor.yaml."""

    head_dim: Width = 128  #: width of a head
    heads: Width = 32  #: query heads
    kv_heads: Width = 8  #: key and value heads
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
