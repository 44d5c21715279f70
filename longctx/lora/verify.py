"""Verifies a written adapter: reads its files back, applies them, and on request measures losses on a text.

The residuals in the records come from the factors in memory. Here the finished folder is opened as lora merge opens it,
added to the base and compared with the tuned model, so a wrong sign, scale or order of files is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longctx.errors import RunFailed, UserError
from longctx.lora.adapter import Adapter
from longctx.lora.changes import TensorChange
from longctx.lora.difference import Difference
from longctx.lora.folder import TensorRecord
from longctx.lora.modules import leaf_of
from longctx.lora.tensors import Scratch, StoredTensors, squared_norm
from longctx.signals import beside, temporary

if TYPE_CHECKING:
    from longctx.config.lora import ExtractConfig

# Tolerance for the rounding of sums; a wrong sign gives an error of about 2, a missing scale one of about 1.
_SLACK = 2e-3


@dataclass(frozen=True)
class HeldOutLosses:
    """The mean losses per token on a held-out text of `tokens` tokens."""

    base: float
    tuned: float
    merged: float
    tokens: int


def read_back(folder: Path, base: StoredTensors, tuned: StoredTensors, rows: list[TensorRecord]) -> list[str]:
    """Apply the adapter in `folder` to one tensor of each projection and kind; returns the names of the tensors.

    Raises RunFailed when base + adapter is not as near to tuned as the records say.
    """
    sample: dict[str, TensorRecord] = {}
    for row in sorted(rows, key=lambda row: (len(row.shape), torch.Size(row.shape).numel())):
        if row.carried != "no" and row.norm > 0:
            sample.setdefault(leaf_of(row.tensor), row)
    scratch = Scratch()
    with Adapter(str(folder)) as adapter:
        for row in sample.values():
            residual = _relative_residual(adapter, base, tuned, row, scratch)
            if abs(residual - row.residual) > _SLACK:
                raise RunFailed(
                    f"{row.tensor}: base + adapter, read back from the file, is {residual:.4f} of the difference away "
                    f"from tuned where {row.residual:.4f} was expected; the adapter is wrong and was removed. Please "
                    "report this"
                )
    return [row.tensor for row in sample.values()]


def _relative_residual(
    adapter: Adapter, base: StoredTensors, tuned: StoredTensors, row: TensorRecord, scratch: Scratch
) -> float:
    """Compute ||tuned - (base + adapter)|| / ||tuned - base|| of one tensor."""
    entry = base.entries[row.tensor]
    module = row.tensor.removesuffix(".weight")
    source = adapter.pairs[module] if row.carried == "factors" else row.tensor
    apply = TensorChange(row.tensor, row.carried, adapter, source, 1.0, entry.rows).load()
    # The adapter is added to base - tuned; the remainder should be as small as the record says.
    negative = Difference(
        tuned,
        base,
        row.tensor,
        dtype=torch.float32,
        device=torch.device("cpu"),
        budget=0,
        scratch=scratch,
        hashed=False,
    )
    left_over = 0.0
    for start, block in negative.blocks():
        apply(block.view(-1) if len(entry.shape) == 1 else block, start)
        left_over += squared_norm(block)
    return left_over**0.5 / row.norm


def held_out_losses(config: ExtractConfig, folder: Path) -> HeldOutLosses:
    """Measure the losses of base, tuned and base + adapter (a temporary merge) on config.text."""
    from longctx.config.lora import MergeConfig
    from longctx.lora.merge import merge

    assert config.text is not None
    ids = _tokens(config)
    with temporary(beside(folder.with_name("verify"))) as merged:
        merge(MergeConfig(target=config.base, adapter=[str(folder)], out=str(merged)))
        losses = [_loss(path, ids, config.text_seq_len) for path in (config.base, config.tuned, str(merged))]
    return HeldOutLosses(*losses, tokens=len(ids))


def _tokens(config: ExtractConfig) -> list[int]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        text = Path(str(config.text)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text={config.text} cannot be read: {error} (configs/lora_extract.yaml)") from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(config.tuned)
    except (OSError, ValueError) as error:
        raise UserError(f"verify=loss needs the tokenizer in tuned={config.tuned}: {error}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: config.text_tokens]
    if len(ids) < 2:
        raise UserError(f"text={config.text} has {len(ids)} tokens; a loss needs at least 2")
    return ids


def _loss(path: str, ids: list[int], length: int) -> float:
    """The mean loss per predicted token of the model at `path`, on parts of `length` tokens."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids), length):
            part = torch.tensor([ids[start : start + length]])
            if part.shape[1] > 1:
                total += float(model(input_ids=part, labels=part).loss) * (part.shape[1] - 1)
                count += part.shape[1] - 1
    return total / count
