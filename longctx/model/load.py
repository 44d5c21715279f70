"""Loads a Hugging Face model for training from a folder or hub id, or initialises one at random from a shape.

Models that longctx cannot train exactly are refused before any weight is read.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

from longctx import dtype as dtypes
from longctx.config.model import InitConfig, ModelConfig
from longctx.errors import UserError
from longctx.model.architectures import check_config
from longctx.model.norms import prepare_norms
from longctx.model.placement import Place, placed_as_drawn, placed_as_loaded
from longctx.storage import hub
from longctx.storage import model as storage


def load(path: str, *, dtype: str = "auto", attention: str = "longctx", place: Place | None = None) -> Any:
    """Load the causal LM at `path`: a local folder, or a hub id when no such folder exists.

    dtype: float32, bfloat16 or float64, or auto for the dtype that the folder names (longctx.dtype). attention:
    "longctx", or transformers' "sdpa" or "eager". place: called with each parameter before the next one is loaded
    (longctx.model.placement), and the model stays where `place` puts the parameters; without it, on the CPU.
    Raises UserError for a missing path, an architecture that is not supported, sliding-window or soft-capped layers,
    and a checkpoint that lacks weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    storage.check_model(path)
    config = read_config(path)
    check_config(config, path)
    if dtype == "auto":
        dtype, _ = dtypes.found(path)
    _register(attention)
    placing = placed_as_loaded(place, config) if place else nullcontext()
    # transformers reports a file it cannot fetch as OSError
    with placing, hub.fetching(path, "model.path", OSError):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            output_loading_info=True,
        )
    model, info = loaded
    _check_loaded(info, path)
    if dtype == "float64":
        prepare_norms(model)
    if place is not None:
        for parameter in model.parameters():
            place(parameter)
    return model


def read_config(path: str) -> Any:
    """Read the transformers configuration of a folder or hub id, and nothing else."""
    from transformers import AutoConfig

    _, file = storage.read_config(path)
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises many types of errors for a damaged config.json
        raise UserError(
            f"model.path={path}: transformers cannot read its config.json ({_reason(error)}); mend the value it names, "
            f"or fetch the folder again ({file})"
        ) from None


def check_builds(config: Any, path: str) -> None:
    """Raise UserError for values from which transformers' model class cannot be made, such as an unknown activation.

    The model is made without memory (on torch's meta device), and the global random state does not change.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    except Exception as error:
        raise UserError(
            f"model.path={path}: transformers makes no model from its config.json ({_reason(error)}); mend the value "
            f"it names, or fetch the folder again ({path}/config.json)"
        ) from None


def _reason(error: Exception) -> str:
    """An error of transformers in one line; the last line of a validator's error has its reason."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}" if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1]}"


def init_from(spec: InitConfig, *, dtype: str = "auto", attention: str = "longctx", place: Place | None = None) -> Any:
    """Make a model of `spec`'s shape with random weights from its seed; the global random state does not change.

    dtype: auto means float32. place: called with each parameter before the next one is drawn; the weights are the same
    with it and without it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _register(attention)
    config = config_of(spec)
    dtype = "float32" if dtype == "auto" else dtype
    with torch.random.fork_rng(devices=[]), placed_as_drawn(place) if place else nullcontext():
        torch.manual_seed(spec.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    if dtype == "float64":
        prepare_norms(model)
    return model


def config_of(spec: InitConfig) -> Any:
    """The transformers configuration of a shape."""
    from transformers import CONFIG_MAPPING

    shape: dict[str, Any] = {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "intermediate_size": spec.ffn,
        "vocab_size": spec.vocab,
        "head_dim": spec.head_dim or spec.hidden // spec.heads,
        "max_position_embeddings": spec.window,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.theta},
        "tie_word_embeddings": spec.tie_embeddings,
        "rms_norm_eps": spec.norm_eps,
    }
    if spec.family == "mistral":
        shape["sliding_window"] = None
    try:
        config = CONFIG_MAPPING[spec.family](**shape)
    except Exception as error:  # a validator's, of which some releases have more than others
        raise UserError(
            f"model.init: transformers makes no {spec.family} model of this shape ({_reason(error)}); change the value "
            "it names, or take another family (configs/model)"
        ) from None
    check_config(config, f"init.family={spec.family}")
    return config


def model_of(config: ModelConfig, place: Place | None = None) -> Any:
    """Load or initialise the model of a ModelConfig in its rotary precision; place: see `load` and `init_from`."""
    from longctx.model.rotary import set_rope
    from longctx.rope import rope_of_model

    if config.init is not None:
        model = init_from(config.init, dtype=config.dtype, attention=config.attention, place=place)
    else:
        model = load(str(config.path), dtype=config.dtype, attention=config.attention, place=place)
    if config.rotary == "float64":
        rope = rope_of_model(config)
        set_rope(model, rope.parameters, rope.window, precision="float64")
    return model


def _register(attention: str) -> None:
    if attention == "longctx":
        from transformers import AttentionInterface

        from longctx.attention.interface import register

        register(AttentionInterface.register)


def _check_loaded(info: dict[str, Any], path: str) -> None:
    wrong = {kind: sorted(info.get(kind) or []) for kind in ("missing_keys", "mismatched_keys", "error_msgs")}
    wrong = {kind: names for kind, names in wrong.items() if names}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise UserError(
            f"model.path={path}: {len(names)} weights are {kind.removesuffix('_keys')} in its safetensors, the first "
            f"{names[0]}; the folder is incomplete or belongs to another config.json ({path})"
        )
