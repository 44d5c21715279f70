"""`prepare` and `shard_batch`: a transformers model and its batches in anybody's training loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from longctx.errors import UserError
from longctx.library.arguments import check_model

if TYPE_CHECKING:
    from torch import Tensor

    from longctx.attention import Layout
    from longctx.model import LossModel


def prepare(
    model: Any,
    *,
    activation_checkpointing: bool = True,
    keep_attention: bool = True,
    keep_matmuls: int = 0,
    ffn_block: int | Literal["auto"] = "auto",
    loss_chunk: int | Literal["auto"] = "auto",
    offload_activations: bool = False,
    fused: Literal["auto", "off", "liger"] = "auto",
    z_loss: float = 0.0,
) -> LossModel:
    """Make a transformers model ready for long sequences: exact attention over ranks, and a loss in little memory.

    model: a causal LM of transformers (llama, mistral, qwen2, qwen3, gemma; peft's wrapper around one too). Weights,
    parameter names and plain forward stay: `generate` and `save_pretrained` work as before, on the model itself and on
    `prepared.model`. The result is an nn.Module for any training loop (`LossModel` says what its forward takes,
    `shard_batch` makes it): a plain loop, DistributedDataParallel, accelerate, transformers' Trainer, each also under
    torch.autocast (Trainer's bf16).

    activation_checkpointing: recompute a layer in the backward pass from its input and its attention output; False
    keeps everything. keep_attention: False recomputes a layer from its input alone. keep_matmuls: last layers that also
    keep their matrix products. ffn_block: tokens that go through the feed-forward at once; 0 is all. loss_chunk: tokens
    whose logits exist at once. "auto" takes 2048 and 512 on a CPU, 8192 and 4096 on a GPU. offload_activations: keep
    saved tensors in host memory. fused: on a GPU, liger-kernel's operators where they are installed and agree with
    torch's; "off" takes torch's. z_loss: factor of lse^2 (PaLM, arXiv 2204.02311). Only z_loss changes a result, and
    fused its rounding; docs/memory.md has the bytes. Blockwise feed-forward: arXiv 2310.01889.

    A weight with a tensor `main_grad` of its shape (Megatron-LM's fp32 accumulator) has its gradient added there.

    Raises UserError for a family that longctx does not train, sliding windows, soft-capping and quantized weights, for
    peft's virtual tokens, layers that accelerate has spread over devices, and options that contradict each other.

    >>> import longctx, torch
    >>> from transformers import AutoModelForCausalLM
    >>> model = longctx.prepare(AutoModelForCausalLM.from_pretrained(MODEL))
    >>> layout = longctx.ContextParallel.from_world().layout(seq_len=256)
    >>> batch = longctx.shard_batch(torch.arange(256)[None], layout)
    >>> model(**batch).loss_sum.backward()
    """
    from longctx.config.base import build
    from longctx.config.model import MemoryConfig
    from longctx.model.wrapper import LossModel
    from longctx.rope.checks import is_number

    check_model(model, "prepare")
    _check_reached(model)
    if not is_number(z_loss) or not 0 <= z_loss <= 1e15:
        raise UserError(f"prepare: z_loss={z_loss!r} is not a number from 0 to 1e15, such as 1e-4")
    values = {
        "activation_checkpointing": activation_checkpointing,
        "keep_attention": keep_attention,
        "keep_matmuls": keep_matmuls,
        "ffn_block": ffn_block,
        "loss_chunk": loss_chunk,
        "offload_activations": offload_activations,
        "fused": fused,
    }
    return LossModel(model, build(MemoryConfig, values, origin="prepare"), z_loss=z_loss)


def shard_batch(
    input_ids: Tensor,
    layout: Layout,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    reduction: Literal["sum", "mean"] = "mean",
) -> dict[str, Any]:
    """Cut whole sequences to this rank's part of a layout: what a prepared model's forward takes.

    input_ids [B, S] whole sequences, the same on every rank of the layout. labels [B, S]: what transformers takes,
    labels[i] for input_ids[i] and -100 where nothing is predicted; None predicts every token. weights [B, S]: of the
    labels. Labels and weights are shifted by one here, before they are cut, and never across two documents.

    reduction: with "mean" the weights are scaled so that `loss_sum`, averaged over the ranks of the layout, is the mean
    loss of the batch's labels; that is what DistributedDataParallel, accelerate and Trainer do with gradients. With
    "sum" they stay as they are.

    Returns input_ids, labels, weights [B, n], positions [n] and the layout, for n tokens of this rank, padding
    included. Raises UserError for shapes that differ, a length that is not the layout's, and a batch without a label.

    >>> import longctx, torch
    >>> layout = longctx.ContextParallel.from_world().layout(seq_len=4)
    >>> batch = longctx.shard_batch(torch.tensor([[5, 6, 7, 8]]), layout)
    >>> batch["labels"].tolist(), batch["positions"].tolist()
    ([[6, 7, 8, -100]], [0, 1, 2, 3])
    """
    import torch

    from longctx.attention import Layout

    if not isinstance(layout, Layout):
        raise UserError(
            f"shard_batch: layout is a {type(layout).__name__}; pass what ContextParallel.from_world().layout(seq_len) "
            "returns"
        )
    _check_batch({"input_ids": input_ids, "labels": labels, "weights": weights}, layout.seq_len)
    labels = (input_ids if labels is None else labels).long()
    given = torch.ones(input_ids.shape, dtype=torch.float64, device=input_ids.device) if weights is None else weights
    if reduction not in ("sum", "mean"):
        raise UserError(f"shard_batch: reduction={reduction!r} is not sum or mean")
    last = layout.boundaries[1:].to(input_ids.device) - 1  # the token after a document's last is another document's
    shifted, moved = labels.roll(-1, 1), given.double().roll(-1, 1)
    shifted[:, last] = -100
    moved = moved.masked_fill(shifted == -100, 0.0)
    total = moved.sum().item()
    if not math.isfinite(total):
        raise UserError(f"shard_batch: the weights of the labels sum to {total}; give finite weights")
    if not total > 0:
        raise UserError(
            "shard_batch: no token of the batch has a label with a weight above 0, so there is no loss; leave such "
            "batches out"
        )
    if reduction == "mean":
        moved = moved * (layout.cp.size / total)
    return {
        "input_ids": layout.shard(input_ids, dim=1, fill=0),
        "positions": layout.positions.to(input_ids.device),
        "labels": layout.shard(shifted, dim=1),
        "weights": layout.shard(moved, dim=1),
        "layout": layout.of_batch(input_ids),
    }


def _check_reached(model: Any) -> None:
    """Raise UserError for a model that a prepared forward would not compute as it stands.

    model.to(bfloat16) rounds every buffer, transformers' rotary frequencies too: each is then off by up to 0.4 %,
    hundreds of radians at position 100,000, and the saved model is served with the exact ones.
    """
    import torch

    from longctx.model.architectures import backbone_of

    adapter: Any = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise UserError(
            f"prepare: model has peft's {getattr(adapter.peft_type, 'value', adapter.peft_type)}, whose virtual tokens "
            "belong to no rank's part of a sequence; train it without them, or with an adapter of its weights (LoRA)"
        )
    base = backbone_of(model)
    if (rounded := base.rotary_emb.inv_freq.dtype) not in (torch.float32, torch.float64):
        raise UserError(
            f"prepare: the model's rotary frequencies have been rounded to {rounded}, as model.to({rounded}) does to "
            "every buffer; load the model with dtype= instead, or make them anew with longctx.set_rope(model, "
            "model.config.rope_parameters, model.config.max_position_embeddings)"
        )
    for index, layer in enumerate(base.layers):
        if "forward" in vars(layer):
            raise UserError(
                f"prepare: layer {index} has a forward of its own, as accelerate's device_map gives it, and longctx's "
                "would never run; load the model without device_map and move it to one device with model.to(...)"
            )


def _check_batch(batch: dict[str, Any], seq_len: int) -> None:
    """Raise UserError unless all are tensors [batch, seq_len] of one shape; labels and weights may be None."""
    import torch

    for name, x in batch.items():
        if x is None and name != "input_ids":
            continue
        if not isinstance(x, torch.Tensor):
            raise UserError(
                f"shard_batch: {name} is a {type(x).__name__}; give a tensor [batch, {seq_len}], such as "
                "torch.tensor([ids])"
            )
        if x.dim() != 2 or x.shape != batch["input_ids"].shape or x.shape[1] != seq_len:
            raise UserError(
                f"shard_batch: {name} has shape {tuple(x.shape)}, and it must be [batch, {seq_len}], whole "
                "sequences of the layout's length and the same for input_ids, labels and weights"
            )
