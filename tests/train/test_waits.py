"""A step waits for its device only once, where it reads the loss and the gradient's norm together.

The steps run on the meta device, whose tensors have no values: each operator that needs one on the host (`item`,
`nonzero`, `bool(x)`, a boolean index, a copy to the CPU) raises there, and on a GPU it waits.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from longctx.config.model import InitConfig, MemoryConfig
from longctx.config.train import EngineConfig, GuardsConfig, OptimConfig
from longctx.distributed.ranks import Ranks
from longctx.model import LossModel, init_from, set_rope
from longctx.train import engine as engines
from longctx.train.batch import micro_batch
from longctx.train.guards import Guards
from longctx.train.heartbeat import Progress
from longctx.train.open_stage import open_context_parallel
from longctx.train.step import Stepper, Timer

from .made import VOCAB, MadeData
from .parity import flat

META = torch.device("meta")


class Reads(TorchFunctionMode):
    """Answers `tolist` of a meta tensor with ones, and counts these reads."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist and args[0].is_meta:
            self.count += 1
            return [1.0] * args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _adamw_for_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused AdamW, one kernel without a read, has no meta version."""
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: plain(groups, **{**options, "fused": False}))


def taken(spec: InitConfig, memory: MemoryConfig, *, precision: Any = "float32", rope: Any = None) -> int:
    """The reads of a step of two micro-batches, packed documents with unlabelled tokens among them."""
    ranks = Ranks(0, 1, 0, 1, META)
    context, _ = open_context_parallel(flat(1, 1), ranks, None)
    hf = init_from(spec, dtype="bfloat16")
    set_rope(hf, rope or {"rope_type": "default", "rope_theta": 10000.0}, 64, precision=precision)
    model = LossModel(hf, memory, z_loss=1e-4)
    engine = engines.build(EngineConfig(), OptimConfig(freeze=[]), model, ranks)
    stepper = Stepper(engine, ranks, Guards(GuardsConfig(), Path("."), ranks, []), Progress(), 1)
    data = MadeData(64, 2, seed=3)
    window = [micro_batch(data, [index], context, "zigzag", tail=True) for index in range(2)]
    with Reads() as reads:
        report = stepper.take(window, 1e-3, step=0, timer=Timer(META))
    assert report is not None
    assert (report.grad_norm, report.skipped) == (1.0, False)
    return reads.count


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
            "factor": 1.0, "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.usefixtures("_adamw_for_meta")
@pytest.mark.parametrize(
    ("family", "memory", "options"),
    [
        ("llama", MemoryConfig(), {}),
        ("llama", MemoryConfig(ffn_block=16, loss_chunk=8, keep_matmuls=1), {"precision": "float64"}),
        ("llama", MemoryConfig(activation_checkpointing=False), {"rope": LONGROPE}),
        ("gemma", MemoryConfig(), {}),
        ("qwen3", MemoryConfig(ffn_block=0), {}),
    ],
)
def test_a_step_reads_its_device_once(family: str, memory: MemoryConfig, options: dict[str, Any]) -> None:
    spec = InitConfig(family=family, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=VOCAB, window=64)  # type: ignore[arg-type]
    assert taken(spec, memory, **options) == 1


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (torch.Tensor.item, "item.. cannot be called on meta"), (bool, "item.. cannot be called on meta"),
        (torch.Tensor.nonzero, "torch.nonzero.. raises"), (torch.Tensor.cpu, "copy out of meta"),
    ],
)  # fmt: skip
def test_the_meta_device_answers_no_read(read: Any, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        read(torch.ones((), device=META))


def test_without_the_batchs_indices_the_loss_has_to_look_for_labels() -> None:
    """For this reason a batch carries them; a caller's own batch may leave them out."""
    model = LossModel(init_from(InitConfig(layers=1, hidden=16, heads=2, kv_heads=1, ffn=24, vocab=32)), MemoryConfig())
    ids = torch.arange(16)[None]
    labels = torch.where(ids % 3 == 0, -100, ids)
    forward = partial(model, ids, torch.arange(16), labels)
    looked = forward()
    given = forward(targets=np.flatnonzero(labels.flatten() != -100))
    assert torch.equal(looked.loss_sum, given.loss_sum)
    with pytest.raises(RuntimeError, match=r"torch.nonzero.. raises"):
        model.to(META)(ids.to(META), torch.arange(16, device=META), labels.to(META))
