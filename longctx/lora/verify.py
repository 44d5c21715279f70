"""Proof that the adapter as written does what it says: files read back and applied, and, if asked, losses
on text.

The residuals in the table come from the factors in memory. Here the finished folder is opened the way lora-
merge opens it, added to the base and compared with the tuned model, so a wrong sign, scale or order of
files cannot pass.
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
from longctx.lora.tensors import Checkpoint, Scratch
from longctx.signals import beside, temporary

if TYPE_CHECKING:
    from longctx.config.lora import ExtractConfig

# Rounding of the sums; a wrong sign gives about 2, a missing scale about 1.
_SLACK = 2e-3


@dataclass(frozen=True)
class HeldOutLosses:
    """Mean loss per token on held-out text, at the base's window or less."""

    base: float
    tuned: float
    merged: float
    tokens: int


def read_back(folder: Path, base: Checkpoint, tuned: Checkpoint, rows: list[TensorRecord]) -> list[str]:
    """Apply the adapter in `folder` to one tensor of each kind and projection; returns the tensors' names.

    Raises RunFailed when base + adapter is not as near to tuned as the table says.
    """
    sample: dict[str, TensorRecord] = {}
    for row in sorted(rows, key=lambda row: (len(row.shape), torch.Size(row.shape).numel())):
        if row.carried != "no" and row.norm > 0:
            sample.setdefault(row.tensor.removesuffix(".weight").rsplit(".", 1)[-1], row)
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
    adapter: Adapter, base: Checkpoint, tuned: Checkpoint, row: TensorRecord, scratch: Scratch
) -> float:
    """||tuned - (base + adapter)|| / ||tuned - base|| of one tensor."""
    entry = base.entries[row.tensor]
    module = row.tensor.removesuffix(".weight")
    source = adapter.pairs[module] if row.carried == "factors" else row.tensor
    apply = TensorChange(row.tensor, row.carried, adapter, source, 1.0, entry.rows).load()
    # base - tuned, to which the adapter is added: what is left should be as small as the table says.
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
        left_over += float(torch.linalg.vector_norm(block).double() ** 2)
    return left_over**0.5 / row.norm


def held_out_losses(config: ExtractConfig, folder: Path) -> HeldOutLosses:
    """Losses of base, tuned and base + adapter (merged for the purpose and removed again) on config.text."""
    from longctx.config.lora import MergeConfig
    from longctx.lora.merge import merge

    assert config.text is not None
    ids = _tokens(config)
    with temporary(beside(folder.with_name("verify"))) as merged:
        merge(MergeConfig(target=config.base, adapter=[str(folder)], out=str(merged)))
        losses = [_loss(path, ids, config.text_window) for path in (config.base, config.tuned, str(merged))]
    return HeldOutLosses(*losses, tokens=len(ids))


def _tokens(config: ExtractConfig) -> list[int]:
    from transformers import AutoTokenizer

    try:
        text = Path(str(config.text)).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text={config.text} cannot be read: {error} (configs/lora_extract.yaml)") from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(config.tuned)
    except (OSError, ValueError) as error:
        raise UserError(f"verify=loss needs the tokenizer in tuned={config.tuned}: {error}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: config.text_tokens]
    if len(ids) < 2:
        raise UserError(f"text={config.text} has {len(ids)} tokens; a loss needs at least 2")
    return ids


def _loss(path: str, ids: list[int], window: int) -> float:
    """Mean loss per predicted token over windows of `window` tokens."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids), window):
            part = torch.tensor([ids[start : start + window]])
            if part.shape[1] > 1:
                total += float(model(input_ids=part, labels=part).loss) * (part.shape[1] - 1)
                count += part.shape[1] - 1
    return total / count
