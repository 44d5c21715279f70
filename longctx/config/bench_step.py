"""Config schema of `longctx bench step`, which compares one training step with plain transformers."""

from __future__ import annotations

from typing import Literal

from longctx.config.base import Format, PerMachine, Positive, Window, schema
from longctx.config.model import Dtype, InitConfig, MemoryConfig

Contestant = Literal["longctx", "transformers", "liger"]

_SHAPE = InitConfig(layers=8, hidden=512, heads=8, kv_heads=2, ffn=1376, vocab=32000, window=16384)


@schema
class BenchStepConfig:
    """One training step beside plain transformers (on a GPU also with liger-kernel), in fresh processes."""

    seq_len: Window = 16384  #: tokens of the sequence; 65536 fits in 8 GiB with only=longctx
    pairs: Positive = 3  #: alternated runs of both; the medians are compared
    threads: PerMachine = 2  #: CPU threads of each process
    only: Contestant | None = None  #: measure one side alone
    steps: Positive = 3  #: GPU: timed steps of each process, after two that are not
    model: InitConfig = _SHAPE
    dtype: Dtype = "float32"  #: dtype of weights and products
    memory: MemoryConfig = MemoryConfig()
    format: Format = "text"  #: format of what is printed
