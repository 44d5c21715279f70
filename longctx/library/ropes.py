"""`rope_for` and `set_rope`: the rotary embedding that a window asks for, and a model that has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from longctx.errors import UserError
from longctx.library.arguments import check_model, length_of, plain, rope_from


def rope_for(
    config_or_path: Any, *, window: int | str, rule: str | float = "dynamic-ntk", **parameters: Any
) -> tuple[dict[str, Any], int]:
    """Compute the rotary embedding with which a model reads `window` tokens.

    config_or_path: a folder or hub id in Hugging Face format, the content of a config.json, a transformers
    configuration, or a model. window: tokens; 65536, "64k" and "1M" are understood. rule: a published rule (linear,
    ntk, dynamic-ntk, scaling-law, by-parts, yarn, yarn-paper, llama3, longrope), or a number, which is the theta
    itself. parameters: the rule's own, such as factor=4 for dynamic-ntk.

    Returns (rope_parameters as transformers writes them, window in tokens). docs/theta.md names each rule's paper; the
    default is stage-to-stage dynamic NTK, which gives Gradient AI's published thetas to the integer. Reads config.json
    and nothing else, and needs no torch.

    Raises UserError (a ValueError) for a model without one rotary embedding, a window below the model's own, and a
    rule that is unknown, lacks the parameter, or cannot start from this model's rope_type.

    >>> import longctx
    >>> llama3 = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0,
    ...           "max_position_embeddings": 8192}
    >>> longctx.rope_for(llama3, window="64k")
    ({'rope_type': 'default', 'rope_theta': 15296098}, 65536)
    """
    from longctx.rope import ExplicitTheta, apply, check_theta, make_rule
    from longctx.rope.checks import is_number

    rope, length = rope_from(config_or_path, "rope_for"), length_of(window, "rope_for")
    if length < rope.window:
        raise UserError(
            f"rope_for: window={length} is shorter than the model's window of {rope.window}, and rules only stretch; "
            f"give {rope.window} or more ({rope.source})"
        )
    if isinstance(rule, str):
        chosen: Any = make_rule(rule.replace("_", "-"), parameters)
    else:
        if not is_number(rule) or rule <= 1 or parameters:
            extra = f", and {', '.join(parameters)} belong to rules" if parameters else ""
            raise UserError(f"rope_for: rule={rule!r} as a number is the theta and must be above 1{extra}")
        chosen = ExplicitTheta(theta=rule)
    made = apply(chosen, rope, length)
    check_theta(made["rope_theta"], "rope_for", rope.source)
    return made, length


def set_rope(
    model: Any, rope: Mapping[str, Any], window: int | str, *, precision: Literal["float32", "float64"] = "float32"
) -> None:
    """Give a transformers model another rotary embedding and window, in place.

    model: a causal LM of transformers (peft's wrapper around one too), or a `LossModel`. rope: rope_parameters, such as
    `rope_for` returns. window: tokens. precision: of the angles; float32 is what transformers and vLLM serve with,
    float64 is exact at positions beyond 2^20. The configuration is changed and the rotary module rebuilt, since
    transformers reads it only in its constructor; `save_pretrained` then writes both.

    Raises UserError for a family that longctx does not train, a rope that changes with the length of a sequence
    (dynamic), values that transformers cannot compute with, and a window that is no length.

    >>> import longctx
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained(MODEL)
    >>> longctx.set_rope(model, *longctx.rope_for(model, window=2048))
    >>> model.config.max_position_embeddings, model.config.rope_parameters["rope_theta"]
    (2048, 154243)
    """
    from longctx.model.rotary import set_rope as rebuild

    model = plain(model)
    length = length_of(window, "set_rope")
    if precision not in ("float32", "float64"):
        raise UserError(f"set_rope: precision={precision!r} is not float32 or float64")
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        raise UserError(
            f"set_rope: rope={rope!r} is not a mapping with rope_theta; pass what rope_for returns, such as "
            "set_rope(model, *rope_for(model, window=65536))"
        )
    check_model(model, "set_rope")
    rebuild(model, rope, length, precision=precision)
