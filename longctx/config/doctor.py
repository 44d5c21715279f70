"""What `longctx doctor` can be told: the shape of attention it judges kernels for."""

from __future__ import annotations

from longctx.config.base import Format, schema


@schema
class DoctorConfig:
    """The root of configs/doctor.yaml."""

    head_dim: int = 128  #: width of a head
    heads: int = 32  #: query heads
    kv_heads: int = 8  #: key and value heads
    format: Format = "text"  #: of what is printed

    def __post_init__(self) -> None:
        for name in ("head_dim", "heads", "kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
