"""Config schema of `longctx bench peak`, which measures the matrix rate of a device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longctx.config.base import AsDtype, Format, PerMachine, Positive, Width, schema


@schema
class BenchPeakConfig:
    """The matrix rate this device reaches, for MFU where the data sheet is not known."""

    #: dtype of the matrices; auto: bfloat16 on a GPU, float32 on a CPU
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float64"], AsDtype] = "auto"
    #: edges of square matrices; null: 512, 1024 and 2048 on a CPU, up to 16384 on a GPU
    sizes: Annotated[list[Width], Field(min_length=1)] | None = None
    repeats: Positive = 5  #: timed products per size, after one that is not
    threads: PerMachine | None = None  #: CPU threads; null: torch's own choice
    format: Format = "text"  #: format of what is printed
