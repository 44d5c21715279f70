"""The architectures that longctx trains, and the checks that refuse all others.

longctx computes the loss and the decoder layer itself instead of calling transformers' forward, so an architecture is
supported only once tests/model compares its loss and every gradient with transformers'. Sliding windows and
soft-capping would need another attention; they are refused with the layer's number and never silently made full.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from longctx.storage.model import check_family

# model_type of config.json -> the children of a layer's attention other than q_proj, k_proj, v_proj and o_proj.
ARCHITECTURES: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "mistral": frozenset(),
    "qwen2": frozenset(),
    "qwen3": frozenset({"q_norm", "k_norm"}),
    "gemma": frozenset(),
}

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def causal_lm_of(model: nn.Module) -> Any:
    """The transformers causal LM inside `model`, which peft may wrap."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def backbone_of(model: nn.Module) -> Any:
    """The decoder of `model` without its head: embeddings, layers and final norm."""
    return causal_lm_of(model).model


def check_config(config: Any, source: str) -> None:
    """Raise UserError when the config describes a model that longctx cannot train exactly.

    config: a transformers configuration. source: the path or id, for the message.
    """
    check_family(config.to_dict(), source)


def check_layers(model: nn.Module) -> None:
    """Raise RuntimeError unless every decoder layer has the parts that its architecture had when it was tested."""
    base = backbone_of(model)
    extra = ARCHITECTURES[base.config.model_type]
    for index, layer in enumerate(cast(list[Any], base.layers)):
        parts = {name for name, _ in layer.named_children()}
        projections = {name for name, _ in layer.self_attn.named_children()}
        if parts != _LAYER_PARTS or projections != _PROJECTIONS | extra:
            raise RuntimeError(
                f"layer {index} of {type(base).__name__} is made of {sorted(parts | projections)}, not of what this "
                "version of longctx knows; use the transformers version pinned in launch/"
            )
