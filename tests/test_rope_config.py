"""The rope section of a config.json beside transformers: every spelling is read alike or refused, and read back as
written.

The oracle is plain transformers: the configuration class, the model built from it, and a forward of four tokens.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from longctx.errors import UserError
from longctx.model.architectures import ARCHITECTURES
from longctx.model.rotary import torch_power
from longctx.rope import Rope, attention_factor, inv_freq
from longctx.rope.config import new_keys, old_keys, rope_of, rope_to_carry, with_rope

Found = tuple[np.ndarray, float, int]
NUMBERS = {
    "vocab_size": 16, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
EIGHT = {"factor": 8.0, "original_max_position_embeddings": 512}
PAIRS = {"llama": 8, "mistral": 8, "qwen2": 8, "qwen3": 64, "gemma": 128}


def transformers_reads(config: dict[str, Any]) -> Found | str:
    """(inv_freq, attention scaling, max_position_embeddings) of the model that runs, or why none does."""
    try:
        loaded = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
        model = AutoModelForCausalLM.from_config(loaded, attn_implementation="eager")
        rotary = model.model.rotary_emb
        start = rotary.inv_freq.clone().numpy()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=False).logits
    except Exception as error:  # every way in which transformers fails counts
        return f"{type(error).__name__}: {error}"
    return (
        (start, rotary.attention_scaling, loaded.max_position_embeddings) if logits.isfinite().all() else "not finite"
    )


def we_read(config: dict[str, Any]) -> Rope | str:
    try:
        return rope_of(config, "m/config.json")
    except UserError as error:
        return str(error)


def ours(rope: Rope) -> Found:
    frequencies = inv_freq(rope.parameters, rope.head_dim, window=rope.window, dtype=np.float32, power=torch_power)
    return frequencies, attention_factor(rope.parameters, window=rope.window), rope.window


def served(parameters: dict[str, Any], window: int) -> int:
    """The documented window: yarn's original length times its factor where that is longer."""
    if parameters["rope_type"] == "yarn" and parameters.get("factor") is not None:
        return max(window, int(parameters["original_max_position_embeddings"] * parameters["factor"]))
    return window


# Where transformers builds something and we refuse: it reads a rope per layer as none, a boolean as a number, one
# factor as many; computes with zeros, negative numbers and a theta of at most 1; and has no use for the factor of a
# longrope, quoted or not, where an attention_factor is given.
STRICTER = (
    r"rope_parameters differ by layer",
    r"rope_theta=(true|false|[01]|0\.5|-.*) is not a number above 1",
    r"factor=(true|false|0|0\.0|-.*|\"1.0\"|\"4\") is not a positive number",
    r"(beta_fast|beta_slow|mscale|mscale_all_dim)=(true|-.*|\".*\") is not a positive number",
    r"(short|long)_factor has 1 numbers",
    r"partial_rotary_factor=(true|0|0\.0|2\.0|-.*) .* above 0 and at most 1",
    r"head_dim=(true|0) is not a positive integer",
)


def compare(config: dict[str, Any]) -> Rope | None:
    """Assert that both refuse, or that both have the same rope; the rope that is read."""
    theirs, mine = transformers_reads(config), we_read(config)
    if isinstance(mine, str):
        assert mine.endswith("(m/config.json)")
        assert "\n" not in mine
        allowed = isinstance(theirs, str) or any(re.search(pattern, mine) for pattern in STRICTER)
        assert allowed, f"{config}: we refuse ({mine}), transformers reads {theirs}"
        return None
    assert not isinstance(theirs, str), f"{config}: we read {mine}, transformers fails ({theirs})"
    frequencies, scaling, window = ours(mine)
    assert np.array_equal(frequencies, theirs[0]), f"{config}: {frequencies} is not {theirs[0]}"
    assert scaling == pytest.approx(theirs[1], rel=1e-12), config
    assert window == served(dict(mine.parameters), theirs[2]), config
    return mine


def rotary_of(config: dict[str, Any]) -> Found:
    """What transformers computes for a config.json, without a model around it."""
    family = config["model_type"]
    loaded = CONFIG_MAPPING[family].from_dict(copy.deepcopy(config))
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = next(value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))(config=loaded)
    return rotary.inv_freq.numpy(), rotary.attention_scaling, loaded.max_position_embeddings


WRITTEN = [
    {"rope_type": "default", "rope_theta": 15296098},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **EIGHT},
    {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
]


def check_round_trip(config: dict[str, Any], rope: dict[str, Any], head_dim: int) -> None:
    """transformers 5, we, and a reader of the older keys alone find the rope that was written over another."""
    before = copy.deepcopy(config)
    written = json.loads(json.dumps(with_rope(config, rope, 4096)))
    assert config == before
    expected, scaling, _ = ours(Rope(rope, head_dim, 4096))
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    newer = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    for file in (written, older, newer):
        found = rotary_of(file)
        assert np.array_equal(found[0], expected), (config, rope, file)
        assert (found[1], found[2]) == (pytest.approx(scaling, rel=1e-12), 4096)
        again = rope_of(file, "m/config.json")
        assert (dict(again.parameters), again.window) == (rope, 4096)


# --- every kind, under every key, in every family
# ---------------------------------------------------------------------------------------


def sections(family: str) -> list[dict[str, Any]]:
    pairs = PAIRS[family]
    short, long = [1.0 + 0.01 * i for i in range(pairs)], [1.0 + 0.5 * i for i in range(pairs)]
    return [
        {"type": "default"},
        {"type": "linear", "factor": 4.0},
        {"type": "dynamic", "factor": 2.0},
        {"type": "yarn", **EIGHT},
        {"type": "yarn", "factor": 8},
        {"type": "yarn", **EIGHT, "factor": None, "beta_fast": 16, "beta_slow": None, "truncate": False},
        {"type": "yarn", **EIGHT, "attention_factor": 1.25},
        {"type": "yarn", **EIGHT, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"type": "llama3", **EIGHT, "low_freq_factor": 1, "high_freq_factor": 4},
        {"type": "longrope", **EIGHT, "short_factor": short, "long_factor": long},
        {"type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": 512},
        {"type": "proportional", "partial_rotary_factor": 0.5},
    ]


def placed(section: dict[str, Any]) -> list[dict[str, Any]]:
    """The section in the new style, in the old one, beside the other one, and with an empty or null other one."""
    theta, plain = {"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 77.0}
    return [
        {"rope_parameters": {**section, **theta}},
        {"rope_parameters": {**section, **theta}, "rope_scaling": None, "rope_theta": 5e5},
        {"rope_parameters": section, "rope_scaling": {}, **theta},
        {"rope_scaling": section, **theta},
        {"rope_scaling": section, "rope_parameters": plain, **theta},
        {"rope_scaling": {**section, "rope_theta": 3e5}, "rope_parameters": None, **theta},
    ]


def spellings(family: str) -> list[dict[str, Any]]:
    found = []
    for section in sections(family):
        kind = section["type"]
        named = {key: value for key, value in section.items() if key != "type"}
        for spelled in (section, {"rope_type": kind, **named}, {"type": "su", "rope_type": kind, **named}):
            found += placed(spelled)
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rope_spellings_are_read_as_transformers_reads_them(family: str):
    every = spellings(family)
    assert len(every) >= 60
    for index, written in enumerate(every):
        if index % len(ARCHITECTURES) != sorted(ARCHITECTURES).index(family):
            continue
        config = {"model_type": family, "max_position_embeddings": 2048, **NUMBERS, **written}
        rope = compare(config)
        assert rope is not None, config
        check_round_trip(config, WRITTEN[index % len(WRITTEN)], rope.head_dim)


ODD: list[dict[str, Any]] = [
    {},
    {"rope_theta": None},
    {"rope_theta": "1000000"},
    {"rope_theta": 0},
    {"rope_theta": -5.0},
    {"rope_theta": True},
    {"rope_parameters": {"rope_theta": None, "rope_type": "default"}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_theta": "1e6", "rope_type": "default"}},
    {"rope_parameters": {"rope_type": None, "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": None, "type": "linear", "factor": 2.0, "rope_theta": 1e6}},
    {"rope_parameters": {"type": None, "rope_theta": 1e6}},
    {"rope_parameters": [1]},
    {"rope_parameters": "linear"},
    {"rope_theta": 1e6, "rope_scaling": "linear"},
    {"rope_theta": 1e6, "rope_scaling": {"type": "Linear", "factor": 2.0}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "su", "factor": 2.0}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "axial"}},
    {"rope_theta": 1e6, "rope_scaling": {"factor": 4.0}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear"}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": "4"}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": None}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 0}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": True}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 0.5}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "dynamic"}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **EIGHT, "original_max_position_embeddings": None}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **EIGHT, "original_max_position_embeddings": "512"}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **EIGHT, "original_max_position_embeddings": 512.0}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **EIGHT, "attention_factor": "1.0"}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **EIGHT, "beta_fast": "32"}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **EIGHT}, "original_max_position_embeddings": 256},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **EIGHT}, "original_max_position_embeddings": None},
    {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 8.0}, "original_max_position_embeddings": 256},
    {"rope_theta": 1e6, "original_max_position_embeddings": 256},
    {"rope_theta": 1e6, "rope_scaling": {"type": "llama3", **EIGHT}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "longrope", **EIGHT, "short_factor": [1.0] * 8}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "longrope", **EIGHT, "short_factor": [1.0] * 3, "long_factor": [2.0]}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "longrope", **EIGHT, "short_factor": [1.0], "long_factor": [2.0]}},
    {"rope_theta": 1e6, "rope_scaling": {"type": "longrope", **EIGHT, "short_factor": "1", "long_factor": [2.0]}},
    {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
    {"rope_theta": 1e6, "partial_rotary_factor": None},
    {"rope_theta": 1e6, "partial_rotary_factor": "0.5"},
    {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 1e6, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6, "partial_rotary_factor": None}},
    {"rope_parameters": {"rope_type": "yarn", **EIGHT, "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
    {"rope_theta": 1e6, "head_dim": None},
    {"rope_theta": 1e6, "head_dim": None, "rope_scaling": {"type": "yarn", **EIGHT}},
    {"rope_theta": 1e6, "head_dim": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_theta": 1e6, "head_dim": 32, "rope_scaling": {"type": "yarn", **EIGHT}},
    {"rope_theta": 1e6, "head_dim": "32"},
    {"rope_theta": 1e6, "head_dim": 0},
    {"rope_theta": 1e6, "head_dim": 15},
    {"rope_theta": 1e6, "max_position_embeddings": None},
    {"rope_theta": 1e6, "max_position_embeddings": "512"},
    {"rope_theta": 1e6, "max_position_embeddings": 512.0},
    {"rope_theta": 1e6, "max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_theta": 1e6, "max_position_embeddings": 512, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_odd_rope_values_are_read_as_transformers_reads_them_or_refused(family: str):
    for index, written in enumerate(ODD):
        config = {"model_type": family, **NUMBERS, **written}
        rope = compare(config)
        if rope is not None:
            check_round_trip(config, WRITTEN[index % len(WRITTEN)], rope.head_dim)


ABSENT = object()
POOL: dict[str, list[Any]] = {
    "rope_type": [ABSENT, "linear", "default", "yarn", None],
    "type": [ABSENT, "dynamic", "default", None],
    "rope_theta": [ABSENT, 500000, 1.5e7, None, "1e6"],
    "factor": [ABSENT, 1.0, 2, None, "4", 0],
    "original_max_position_embeddings": [ABSENT, 128, 1024, None],
    "partial_rotary_factor": [0.5, 1.0, 1, None],
    "attention_factor": [1, None],
    "high_freq_factor": [ABSENT, 8, None],
}
TOP = {
    **{key: POOL[key] for key in ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")},
    "head_dim": [16, 32, 128, None],
    "max_position_embeddings": [ABSENT, 512, 4096],
}


def changes(pool: dict[str, list[Any]]) -> st.SearchStrategy[list[tuple[str, Any]]]:
    """At most two keys set to another value, or taken out."""
    one = st.sampled_from(sorted(pool)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(pool[key])))
    return st.lists(one, max_size=2)


def changed(values: dict[str, Any], what: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in {**values, **dict(what)}.items() if value is not ABSENT}


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A family's config.json: sections that are right or changed a little, in one place or in both."""
    family = draw(st.sampled_from(sorted(ARCHITECTURES)))
    kinds = st.sampled_from(sections(family))
    section = kinds.flatmap(lambda values: changes(POOL).map(lambda what: changed(values, what)))
    config = {"model_type": family, **NUMBERS, "max_position_embeddings": 2048, "rope_theta": 1e6}
    for key in ("rope_parameters", "rope_scaling"):
        config[key] = draw(st.none() | section)
    return changed(config, draw(changes(TOP)))


@settings(max_examples=150)
@given(files(), st.sampled_from(WRITTEN))
def test_any_mixture_of_rope_keys_is_read_as_transformers_reads_it(config: dict[str, Any], rope: dict[str, Any]):
    read = compare(config)
    if read is not None:
        check_round_trip(config, rope, read.head_dim)


# --- other families, which adapters and theta meet
# ---------------------------------------------------------------------------------------

SHARED: dict[str, list[dict[str, Any]]] = {
    "phi": [{}, {"partial_rotary_factor": 0.25}],
    "stablelm": [{}, {"partial_rotary_factor": 1.0}, {"rope_theta": 1e6}],
    "gpt_neox": [{"rotary_pct": 1.0, "rotary_emb_base": 50000}, {}],
    "glm": [{"rope_theta": 1e4}],
}


@pytest.mark.parametrize("family", SHARED)
def test_families_that_turn_part_of_a_head_are_read_and_written_as_transformers_does(family: str):
    scaled = [None, {"type": "linear", "factor": 2.0}, {"type": "yarn", **EIGHT}]
    for written, section in itertools.product(SHARED[family], scaled):
        config = {"model_type": family, **NUMBERS, "max_position_embeddings": 2048, **written, "head_dim": 16}
        config |= {"rope_scaling": section} if section else {}
        rope, theirs = rope_of(config, "m/config.json"), rotary_of(config)
        assert np.array_equal(ours(rope)[0], theirs[0]), config
        assert rope.dim == 2 * len(theirs[0])
        for kept in (rope.parameters, {"rope_type": "yarn", "rope_theta": 3e5, **EIGHT, "partial_rotary_factor": 0.5}):
            found = with_rope(config, kept, 4096)
            expected = ours(Rope(kept, rope.head_dim, 4096))
            assert np.array_equal(rotary_of(found)[0], expected[0]), (config, kept)
            assert np.array_equal(ours(rope_of(found, "m/config.json"))[0], expected[0])


def test_phi3_prefers_its_own_original_length_and_has_one_when_the_file_has_none():
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = {
        "model_type": "phi3", **NUMBERS, "max_position_embeddings": 8192, "original_max_position_embeddings": 2048,
        "rope_scaling": {"type": "longrope", **factors},
    }  # fmt: skip
    for file in (config, {key: value for key, value in config.items() if key != "original_max_position_embeddings"}):
        rope, theirs = rope_of(file, "m/config.json"), rotary_of(file)
        assert rope.kind == "longrope"
        assert np.array_equal(ours(rope)[0], theirs[0])
        assert ours(rope)[1] == pytest.approx(theirs[1], rel=1e-12)
        written = with_rope(file, {**rope.parameters, "original_max_position_embeddings": 1024}, 16384)
        assert rotary_of(written)[1] == pytest.approx((1 + np.log(16) / np.log(1024)) ** 0.5)


LAYERS = {
    "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize("before", [{}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 1e6}])
def test_ropes_that_differ_by_layer_are_carried_word_for_word(family: str, before: dict[str, Any]):
    config = {"model_type": family, **NUMBERS, "max_position_embeddings": 512, **before}
    written = with_rope(config, LAYERS, 8192)
    read = CONFIG_MAPPING[family].from_dict(copy.deepcopy(written))
    for kind, rope in LAYERS.items():
        assert {key: read.rope_parameters[kind][key] for key in rope} == rope
    assert read.max_position_embeddings == 8192
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    read_older = rope_to_carry(older, "m")[0]["full_attention"]
    assert {key: read_older[key] for key in LAYERS["full_attention"]} == LAYERS["full_attention"]
    full = CONFIG_MAPPING[family].from_dict(older).rope_parameters["full_attention"]
    assert {key: full[key] for key in LAYERS["full_attention"]} == LAYERS["full_attention"]
    assert rope_to_carry(written, "m") == (LAYERS, 8192)
    with pytest.raises(UserError, match="rope_parameters differ by layer"):
        rope_of(written, "m/config.json")


def test_lines_to_paste_are_the_keys_that_are_written():
    for rope in WRITTEN:
        written = with_rope({}, rope, 4096)
        assert {**old_keys(rope, 4096), **new_keys(rope, 4096)} == written
