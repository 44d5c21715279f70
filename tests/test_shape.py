"""A decoder's numbers beside the model that transformers builds from the same config.json."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from longctx.errors import UserError
from longctx.lora.modules import layout
from longctx.lora.sizes import shapes_of
from longctx.model.architectures import ARCHITECTURES
from longctx.rope.config import PARTIAL, rope_of
from longctx.shape import DEFAULTS, shape_of

NUMBERS = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {},
    {"head_dim": 8},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"num_key_value_heads": None},
    {"head_dim": None},
    {"num_attention_heads": "16"},
]


def built(config: dict[str, Any]) -> Any:
    """transformers' model without storage, or None where it builds none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
    except Exception:  # every way in which transformers refuses counts
        return None


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_shape_numbers_are_those_of_the_model_that_transformers_builds(family: str):
    for variant in VARIANTS:
        config = {"model_type": family, **NUMBERS, **variant}
        model = built(config)
        if model is None:
            with pytest.raises(UserError, match=r"\(m/config\.json\)"):
                shape_of(config, "m/config.json")
            continue
        shape, attention = shape_of(config, "m/config.json"), model.model.layers[0].self_attn
        assert shape.parameters == sum(p.numel() for p in model.parameters()), config
        assert shape.head_dim == attention.head_dim, config
        children = [*attention.named_children(), *model.model.layers[0].mlp.named_children()]
        found = {name: tuple(child.weight.shape) for name, child in children if name.endswith("_proj")}
        assert shape.projections == found, config
        assert shape.tied == (model.lm_head.weight is model.model.embed_tokens.weight), config
        assert shape == shape_of(model.config.to_dict(), "m/config.json")


def test_shape_defaults_are_those_of_transformers():
    assert set(DEFAULTS) == set(ARCHITECTURES)
    for family, known in DEFAULTS.items():
        ours = CONFIG_MAPPING[family].from_dict({"hidden_size": 80, "num_attention_heads": 10})
        kv_heads = known.kv_heads or ours.num_attention_heads
        found = (ours.max_position_embeddings, ours.num_key_value_heads, ours.tie_word_embeddings)
        assert found == (known.window, kv_heads, known.tied), family
        config = {"model_type": family, "hidden_size": 80, "num_attention_heads": 10}
        assert rope_of(config, "m").head_dim == (getattr(ours, "head_dim", None) or 8), family


def test_families_that_turn_part_of_a_head_are_those_of_transformers():
    """The modeling files say which; their configuration classes say how much where config.json does not."""
    import transformers.models

    pattern = r"def compute_default_rope_parameters\(.*?return inv_freq"
    turning = set()
    for file in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        body = re.search(pattern, file.read_text(), re.DOTALL)
        if body and "partial_rotary_factor" in body[0]:
            turning.add(file.parent.name)
    assert set(PARTIAL) <= turning
    for family, share in PARTIAL.items():
        name = (
            family
            if family in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[family](), "rope_parameters")
            else f"{family}_text"
        )
        parameters = CONFIG_MAPPING[name]().rope_parameters
        assert parameters.get("partial_rotary_factor", 1.0) == share, family


def test_a_lora_layout_and_its_sizes_have_the_same_numbers(tmp_path: Path):
    """qwen3 and gemma have heads of their own size where config.json is silent, and gemma's tables are one."""
    for family, head_dim, tied in (("qwen3", 128, False), ("gemma", 256, True), ("llama", 4, False)):
        config = {"model_type": family, **NUMBERS}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert layout(config)["head_dim"] == head_dim
        sizes = {name: (rows, columns) for name, rows, columns, _ in shapes_of(str(tmp_path))}
        assert sizes["q_proj"] == (16 * head_dim, 64)
        assert ("lm_head" in sizes) == (not tied)


def test_the_lse_of_float64_takes_eight_bytes():
    shape = shape_of({"model_type": "llama", **NUMBERS}, "m")
    assert shape.footprint(8).kept == 8 * (64 + 64) + 8 * 16
    assert shape.footprint(2).kept == 2 * (64 + 64) + 4 * 16


def test_shape_mistakes_are_named():
    config = {"model_type": "llama", **NUMBERS}
    for changes, message in (
        ({"intermediate_size": None}, "intermediate_size=null is not a positive integer"),
        ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention_heads=16"),
        ({"num_key_value_heads": 3}, "num_attention_heads=16 is not a multiple of num_key_value_heads=3"),
    ):
        with pytest.raises(UserError, match=message):
            shape_of({**config, **changes}, "m/config.json")
    config.pop("vocab_size")
    with pytest.raises(UserError, match=r"vocab_size is missing; .* \(m/config\.json\)"):
        shape_of(config, "m/config.json")


def test_shape_and_rope_are_read_without_torch_and_transformers():
    code = (
        "import sys, longctx.shape, longctx.rope.config\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
