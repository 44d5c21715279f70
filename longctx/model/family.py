"""Which models the trainer understands, and why it refuses the others.

The loss and the decoder layer are computed here rather than by transformers' forward, so a family counts as
supported only once tests/model holds its loss and every gradient against transformers'. Sliding windows and
soft-capping would need another attention; they are refused with the layer named, never silently made full.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from longctx.errors import UserError

# model_type of config.json -> the decoder layer's attention children besides q, k, v, o.
FAMILIES: dict[str, frozenset[str]] = {
    "llama": frozenset(),
    "mistral": frozenset(),
    "qwen2": frozenset(),
    "qwen3": frozenset({"q_norm", "k_norm"}),
    "gemma": frozenset(),
}

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def causal_lm_of(model: nn.Module) -> Any:
    """The transformers causal LM inside `model`, which may be wrapped by peft."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def backbone_of(model: nn.Module) -> Any:
    """Embeddings, layers and final norm, without the head."""
    return causal_lm_of(model).model


def check_config(config: Any, source: str) -> None:
    """Raise UserError when the config describes a model longctx cannot train exactly.

    config: a transformers configuration. source: the path or id, for the message.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        rotary = getattr(config, "rope_parameters", None) is not None
        reason = (
            "its decoder layer and loss have not been checked against transformers'"
            if rotary
            else "it has no rotary position embedding, so there is no theta to change"
        )
        raise UserError(
            f"model.path={source} is a {kind!r} model, and longctx trains {', '.join(FAMILIES)}: {reason}; "
            "choose "
            f"a model of one of these families ({source}/config.json)"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise UserError(
                f"model.path={source} has {name}={getattr(config, name)}, and the attention has no "
                "soft-capping; "
                f"every layer would differ from the model that was trained ({source}/config.json)"
            )
    layer = sliding_layer(config)
    if layer is not None:
        raise UserError(
            f"model.path={source}: layer {layer} attends to a window of {config.sliding_window} tokens, "
            "which "
            "context-parallel attention would silently make full; use a model with full attention, or set "
            f"sliding_window to null there if full attention is what you mean to train ({source}/config.json)"
        )


def sliding_layer(config: Any) -> int | None:
    """The first layer with a sliding window, or None."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return next((index for index, kind in enumerate(kinds) if kind != "full_attention"), None)
    uses = getattr(config, "use_sliding_window", True)
    return 0 if uses and getattr(config, "sliding_window", None) is not None else None


def check_layers(model: nn.Module) -> None:
    """Assert that every decoder layer is built as its family's was when it was checked."""
    base = backbone_of(model)
    extra = FAMILIES[base.config.model_type]
    for index, layer in enumerate(cast(list[Any], base.layers)):
        parts = {name for name, _ in layer.named_children()}
        projections = {name for name, _ in layer.self_attn.named_children()}
        if parts != _LAYER_PARTS or projections != _PROJECTIONS | extra:
            raise RuntimeError(
                f"layer {index} of {type(base).__name__} is made of {sorted(parts | projections)}, not of "
                "what this "
                "version of longctx knows; use the transformers version pinned in launch/"
            )
