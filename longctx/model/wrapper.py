"""The module that an engine trains: it takes input ids and returns the sum of weighted token losses.

Head and loss run inside its forward, where ZeRO-3 has gathered the weights, and in chunks, so the logits are never
stored. The caller shifts the labels before it shards the sequence, and divides the loss by the global weight.

Shapes: B batch, S this rank's tokens, E hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longctx.attention import ContextParallel, Layout
from longctx.config.model import MemoryConfig
from longctx.decide import blocks_of
from longctx.distributed.transport import SingleRankTransport
from longctx.model.architectures import backbone_of, causal_lm_of
from longctx.model.fused import Operators
from longctx.model.layer import prepare_layers, set_operators, set_save_policies
from longctx.model.loss import IGNORED, token_losses
from longctx.model.offload import HostStore
from longctx.model.operators import check_installed, choose
from longctx.topology import split

UNTRACED = "longctx's layers recompute and communicate, which torch.compile cannot trace"


class LossOutput(NamedTuple):
    """The loss of this rank's tokens.

    loss_sum: sum of w x (nll + z lse^2) over the labelled tokens, connected to the graph even without any. The other
    fields are detached. tokens: number of labelled tokens. weight_sum: sum of their w. nll_sum: sum of w x nll. z_sum:
    sum of w x z lse^2. per_token [B, S], on request: nll, and 0 without a label. logits [n, V], on request.
    """

    loss_sum: Tensor
    tokens: Tensor
    weight_sum: Tensor
    nll_sum: Tensor
    z_sum: Tensor
    per_token: Tensor | None = None
    logits: Tensor | None = None


class LossModel(nn.Module):
    """A Hugging Face causal LM, or peft's wrapper around one, with its loss, prepared for long sequences.

    z_loss: factor of lse^2, which is added to each token's nll (PaLM 2204.02311, section 5).

    `longctx.prepare` makes it from plain arguments, `longctx.shard_batch` makes what its forward takes.

    >>> import longctx, torch
    >>> from transformers import AutoModelForCausalLM
    >>> model = longctx.prepare(AutoModelForCausalLM.from_pretrained(MODEL))
    >>> layout = longctx.ContextParallel.from_world().layout(seq_len=256)
    >>> out = model(**longctx.shard_batch(torch.arange(256)[None], layout, reduction="sum"))
    >>> int(out.tokens), float(out.weight_sum), out.loss_sum.requires_grad
    (255, 255.0, True)
    """

    def __init__(self, model: nn.Module, memory: MemoryConfig, *, z_loss: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.memory = memory
        self.z_loss = z_loss
        self._store = HostStore() if memory.offload_activations else None
        check_installed(memory.fused)
        prepare_layers(model)
        self._chosen: tuple[torch.device, torch.dtype, Operators] | None = None
        self.register_state_dict_post_hook(_drop_aliases)
        self.register_load_state_dict_pre_hook(_fill_aliases)

    def get_input_embeddings(self) -> nn.Module:
        return causal_lm_of(self.model).get_input_embeddings()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute layers, as `prepare` does by default; Trainer calls it under gradient_checkpointing=True."""
        self.memory = replace(self.memory, activation_checkpointing=True)

    gradient_checkpointing_enable = activation_checkpointing_enable

    @torch.compiler.disable(reason=UNTRACED)
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        layout: Layout | None = None,
        *,
        targets: np.ndarray | None = None,
        per_token: bool = False,
        logits_at: Tensor | None = None,
    ) -> LossOutput:
        """Compute the loss of this rank's tokens.

        input_ids, labels and weights are [B, S], positions [B, S] or [S]. labels are shifted already (labels[i] follows
        input_ids[i]), with -100 for tokens without a label. weights=None gives every label the weight 1. layout: this
        rank's attention layout, or None for one process and one document. targets: indices into B * S of the tokens
        with a label, in order, on the host, which waits without them until a GPU has come to the loss (transformers'
        Trainer takes every parameter with "label" in its name for an input that an evaluation must have). logits_at:
        indices into B * S whose logits [n, V] are returned, for evaluation.
        """
        head = causal_lm_of(self.model).get_output_embeddings()
        hidden = self.hidden(input_ids, positions, layout).flatten(0, 1)
        flat = labels.flatten()
        given = torch.ones_like(flat, dtype=torch.float32) if weights is None else weights.flatten()
        given = torch.where(flat == IGNORED, 0.0, given)
        chunk = blocks_of(self.memory, flat.device.type).loss_chunk
        losses = token_losses(
            hidden,
            head,
            flat,
            given,
            chunk=chunk,
            z_loss=self.z_loss,
            labelled=targets,
            operators=self._operators(flat.device),
            even=weights is None,
        )
        return LossOutput(
            loss_sum=losses.total,
            tokens=(flat != IGNORED).sum(),
            weight_sum=given.sum(dtype=torch.float64),
            nll_sum=(losses.nll.double() * given.double()).sum(),
            z_sum=losses.z_total,
            per_token=losses.nll.view(labels.shape) if per_token else None,
            logits=None if logits_at is None else head(hidden[logits_at]).detach(),
        )

    @torch.compiler.disable(reason=UNTRACED)
    def hidden(self, input_ids: Tensor, positions: Tensor, layout: Layout | None = None) -> Tensor:
        """Compute the last hidden states [B, S, E], after the final norm."""
        if positions.dim() == 1:
            positions = positions.expand(input_ids.shape[0], -1)
        base = backbone_of(self.model)
        self._operators(input_ids.device)
        block = blocks_of(self.memory, input_ids.device.type).ffn_block
        set_save_policies(self.model, self.memory, block=block, tokens=input_ids.numel(), store=self._store)
        layout = layout or _alone().layout(input_ids.shape[1])
        layout.check_batch(input_ids.device, training=self.training)
        # transformers passes a 4-D mask through and our layers ignore it; an empty one keeps it from building S x S.
        mask = input_ids.new_empty(1, 1, 0, 0, dtype=torch.bool)
        # Stated, because a config.json may ask for a tuple, or for every layer's hidden states, which would stay alive.
        stated = {"use_cache": False, "return_dict": True, "output_hidden_states": False, "output_attentions": False}
        out = base(input_ids=input_ids, position_ids=positions, attention_mask=mask, layout=layout, **stated)
        return out.last_hidden_state

    def _operators(self, device: torch.device) -> Operators:
        """Whose operators do the element-wise work; chosen by the first pass on a device in a dtype."""
        base = backbone_of(self.model)
        dtype = next(base.parameters()).dtype
        if self._chosen is None or self._chosen[:2] != (device, dtype):
            self._chosen = device, dtype, choose(self.memory.fused, base, device)
            set_operators(self.model, self._chosen[2])
        return self._chosen[2]


def _aliases(module: nn.Module) -> dict[str, str]:
    """The second names of shared parameters, such as a tied head's weight, and the first name of each."""
    first = {id(weight): name for name, weight in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(weight)] for name, weight in every if first[id(weight)] != name}


def _drop_aliases(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Leave a shared parameter's second names out of a state dict; safetensors, and so Trainer, takes only one."""
    for name in _aliases(module):
        state.pop(prefix + name, None)


def _fill_aliases(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _aliases(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


@cache
def _alone() -> ContextParallel:
    """A ContextParallel of this rank alone, for sequences that are not sharded; it has no communicators to close."""
    return ContextParallel(SingleRankTransport(), split(1, 1))
