"""Rules to the integer, supported lengths, frequencies equal to transformers' own in a saved model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.errors import UserError
from longctx.rope import (
    RULES,
    ExplicitTheta,
    Rope,
    apply,
    attention_factor,
    critical_dimension,
    dims_beyond,
    inv_freq,
    make_rule,
    read_rope,
    supported_length,
    wavelengths,
)
from longctx.rope.config import rope_of

LLAMA3 = Rope({"rope_type": "default", "rope_theta": 500000}, 128, 8192)


def theta_by(name: str, rope: Rope, length: int) -> int:
    return make_rule(name, {}).to_hf(rope, length)["rope_theta"]


def test_dynamic_ntk_chain_gives_the_published_thetas():
    rope, found = LLAMA3, []
    for length in (65536, 262144, 524288):
        parameters = make_rule("dynamic-ntk", {"factor": 4.0}).to_hf(rope, length)
        rope = Rope(parameters, 128, length)
        found.append(rope.theta)
    assert found == [15296098, 207112184, 1062356830]
    at_262k = Rope({"rope_type": "default", "rope_theta": 207112184}, 128, 262144)
    assert theta_by("dynamic-ntk", at_262k, 1048576) == 2804339835


@pytest.mark.parametrize(
    ("length", "scaling_law", "ntk"),
    [
        (65536, 22443169, 4134231),
        (262144, 283461213, 16904847),
        (524288, 1007391702, 34183734),
        (1048576, 3580165449, 69123823),
    ],
)
def test_scaling_law_and_plain_ntk(length: int, scaling_law: int, ntk: int):
    assert theta_by("scaling-law", LLAMA3, length) == scaling_law
    assert theta_by("ntk", LLAMA3, length) == ntk


def test_scaling_law_at_4194k_within_rounding():
    assert abs(theta_by("scaling-law", LLAMA3, 2**22) - 45218125210) <= 1


@pytest.mark.parametrize(
    ("theta", "expected"),
    [
        (500000, 18438),
        (4134231, 56262),
        (15296098, 138114),
        (16904847, 194367),
        (34183734, 203848),
        (69123823, 517574),
        (207112184, 754858),
        (1062356830, None),
        (2804339835, None),
        (3580165449, None),
    ],
)
def test_supported_length(theta: int, expected: int | None):
    frequencies = inv_freq({"rope_theta": theta}, 128, window=8192)
    assert supported_length(frequencies, 2**20) == expected


def test_yarn_with_equal_bounds_has_transformers_frequencies():
    """As in Kimi K2's config.json; the ramp lies between two neighbouring pairs."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = apply(make_rule("yarn", {"beta_slow": 1, "beta_fast": 1}), LLAMA3, 131072)
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=dict(made)
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert np.allclose(inv_freq(made, 128, window=131072), theirs.numpy(), rtol=1e-6)


def test_supported_length_limit_is_inclusive():
    frequencies = inv_freq({"rope_theta": 500000}, 128, window=8192)
    assert supported_length(frequencies, 18438) == 18438
    assert supported_length(frequencies, 18437) is None


@settings(max_examples=30)
@given(st.floats(3.0, 1e6), st.sampled_from([8, 16, 32, 64]))
def test_supported_length_agrees_with_the_plain_sum(theta: float, dim: int):
    frequencies = inv_freq({"rope_theta": theta}, dim, window=512)
    sums = np.cos(np.outer(np.arange(5001), frequencies)).sum(axis=1)
    negative = np.flatnonzero(sums < 0)
    near_zero = np.flatnonzero(np.abs(sums) < 1e-9)
    if near_zero.size == 0:
        assert supported_length(frequencies, 5000) == (int(negative[0]) if negative.size else None)


def test_critical_dimension_of_llama3_is_70():
    assert critical_dimension(500000, 8192, 128) == 70
    assert dims_beyond(LLAMA3.frequencies(), 8192) == 128 - 70


def test_ntk_stretches_the_slowest_pair_by_exactly_s():
    rule = RULES["ntk"]()
    before = wavelengths(LLAMA3.frequencies())
    after = wavelengths(inv_freq(rule.to_hf(LLAMA3, 65536), 128, window=65536))
    assert after[-1] / before[-1] == pytest.approx(8, rel=1e-6)
    assert after[0] == pytest.approx(before[0])


def test_linear_divides_every_frequency_by_s_and_composes():
    once = make_rule("linear", {}).to_hf(LLAMA3, 32768)
    twice = make_rule("linear", {}).to_hf(Rope(once, 128, 32768), 65536)
    assert (once["factor"], twice["factor"]) == (4.0, 8.0)
    assert np.allclose(inv_freq(twice, 128, window=65536) * 8, LLAMA3.frequencies(), rtol=1e-12)


def test_paper_ramp_as_longrope_has_the_papers_frequencies():
    scale, window = 8, 8192
    plain = LLAMA3.frequencies()
    rotations = window / (2 * math.pi / plain)
    gamma = np.clip((rotations - 1) / (32 - 1), 0, 1)
    expected = (1 - gamma) * plain / scale + gamma * plain
    for name, factor in (("by-parts", 1.0), ("yarn-paper", 0.1 * math.log(8) + 1)):
        parameters = make_rule(name, {}).to_hf(LLAMA3, window * scale)
        for length in (None, 100, 65536):
            got = inv_freq(parameters, 128, window=65536, length=length)
            assert np.allclose(got, expected, rtol=1e-12)
        assert attention_factor(parameters, window=65536) == pytest.approx(factor)


def test_the_two_yarns_differ():
    paper = inv_freq(make_rule("yarn-paper", {}).to_hf(LLAMA3, 65536), 128, window=65536)
    hf = inv_freq(make_rule("yarn", {}).to_hf(LLAMA3, 65536), 128, window=65536)
    assert np.abs(paper / hf - 1).max() > 0.05
    assert np.allclose(paper[[0, -1]], hf[[0, -1]])


def test_yarn_on_a_yarn_model_raises_the_factor_from_its_original_length():
    yarn = Rope(make_rule("yarn", {}).to_hf(LLAMA3, 32768), 128, 32768)
    again = make_rule("yarn", {}).to_hf(yarn, 131072)
    assert (again["factor"], again["original_max_position_embeddings"]) == (16.0, 8192)


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({"beta_fast": 16.0, "beta_slow": 2.0}, {"beta_fast": 16.0, "beta_slow": 2.0}),
        ({"truncate": False}, {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}),
        ({"attention_factor": 1.0}, {"attention_factor": 1.0}),
        ({"attention_factor": 0.1 * math.log(4) + 1}, {"attention_factor": None}),  # the formula's, for the old factor
    ],
)
def test_yarn_on_a_yarn_model_keeps_its_own_ramp_and_scale(own: dict, kept: dict):
    scaled = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 8192, **own}
    again = make_rule("yarn", {}).to_hf(Rope(scaled, 128, 32768), 131072)
    assert {key: again.get(key) for key in kept} == kept
    assert again["factor"] == 16.0
    assert make_rule("yarn", {"beta_fast": 64}).to_hf(Rope(scaled, 128, 32768), 131072)["beta_fast"] == 64


def test_longrope_wants_one_factor_per_pair():
    rule = make_rule("longrope", {"long_factor": [2.0] * 64})
    assert rule.to_hf(LLAMA3, 65536)["short_factor"] == [2.0] * 64
    with pytest.raises(UserError, match=r"^rule=longrope: long_factor has 3 numbers, .* pair, 64 .*'rule="):
        make_rule("longrope", {"long_factor": [1.0, 2.0, 3.0]}).to_hf(LLAMA3, 65536)
    with pytest.raises(UserError, match=r"^x\.rule=longrope: long_factor has 0 numbers, .*'rope=\{name: "):
        apply(make_rule("longrope", {}), LLAMA3, 65536, "x.rule")


@pytest.mark.parametrize(
    ("kind", "extra", "rule", "able"),
    [
        ("llama3", {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}, "yarn-paper", "ntk, dynamic-ntk"),
        ("longrope", {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64}, "ntk", "an explicit theta"),
        ("proportional", {"partial_rotary_factor": 0.5}, "dynamic-ntk", "an explicit theta"),
    ],
)
def test_rope_type_that_a_rule_cannot_extend(kind: str, extra: dict, rule: str, able: str):
    rope = Rope({"rope_type": kind, "rope_theta": 5e5, **extra}, 128, 8192, "m/config.json")
    with pytest.raises(UserError) as caught:
        apply(make_rule(rule, {}), rope, 65536, "curriculum.stages.s64k.rule")
    text = str(caught.value)
    assert f"rope_type={kind!r} cannot be extended by rule {rule!r}" in text
    assert able in text
    assert "(m/config.json)" in text
    assert apply(ExplicitTheta(theta=1e6), rope, 65536)["rope_theta"] == 1e6


def test_theta_rules_keep_llama3_scaling_and_fix_dynamic():
    scaled = {
        "factor": 8.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    }
    llama31 = Rope({"rope_type": "llama3", "rope_theta": 500000, **scaled}, 128, 131072)
    made = apply(make_rule("ntk", {}), llama31, 1048576)
    assert made == {"rope_type": "llama3", "rope_theta": 4134231, **scaled}
    yarn = apply(make_rule("yarn", {"beta_fast": 4}), llama31, 1048576)  # Nemotron UltraLong's factor for a million
    assert yarn == {
        "rope_type": "yarn", "rope_theta": 500000, "factor": 128.0, "original_max_position_embeddings": 8192,
        "beta_fast": 4, "beta_slow": 1.0,
    }  # fmt: skip
    dynamic = Rope({"rope_type": "dynamic", "rope_theta": 10000, "factor": 2.0}, 128, 4096)
    assert apply(make_rule("ntk", {}), dynamic, 8192) == {"rope_type": "default", "rope_theta": 20221}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("dynamc-ntk", {}, "rule='dynamc-ntk' is not a rule; did you mean 'dynamic-ntk'?"),
        ("ntk", {"factor": 4}, "rule.factor=4 does not belong to rule 'ntk'; it takes no parameters"),
        ("yarn", {"alpha": 1}, "rule.alpha=1 does not belong to rule 'yarn'; it takes beta_fast, beta_slow"),
        ("dynamic-ntk", {"factor": 0.5}, "rule.factor=0.5 must be 1 or more"),
        ("yarn", {"beta_slow": 2, "beta_fast": 1}, "beta_slow=2 must be at most beta_fast=1"),
        ("by-parts", {"alpha": 2, "beta": 2}, "alpha=2 must be below beta=2"),
    ],
)
def test_rule_mistakes(name: str, values: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        make_rule(name, values)


# --- reading config.json
# ---------------------------------------------------------------------------------------

SHAPE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}


def test_old_and_new_config_styles_read_alike(tmp_path: Path):
    old = {**SHAPE, "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {**SHAPE, "rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_rope(tmp_path).parameters == rope_of(new, "x").parameters
    assert rope_of(new, "x").head_dim == 128


def test_yarn_models_serve_original_times_factor():
    config = {**SHAPE, "max_position_embeddings": 32768, "rope_theta": 1e6}
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    rope = rope_of(config, "x")
    assert rope.window == 131072
    assert "already yarn" in (rope.note() or "")


QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 32768, "use_sliding_window": False, "tie_word_embeddings": False,
}  # fmt: skip
SERVED = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 1000000.0, "rope_scaling": {"type": "yarn", **SERVED}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, **SERVED}},
    ],
)
def test_both_styles_of_a_yarn_model_begin_at_the_same_rope(tmp_path: Path, written: dict):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, **written}))
    rope = read_rope(tmp_path)
    expected = (128, {"rope_type": "yarn", "rope_theta": 1000000.0, **SERVED}, 131072)
    assert (rope.head_dim, rope.parameters, rope.window) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2", "n_embd": 768}, "model_type='gpt2' has no rotary position embedding"),
        (
            {
                **SHAPE,
                "rope_parameters": {"full": {"rope_type": "default"}, "sliding": {"rope_type": "default"}},
            },
            "rope_parameters differ by layer",
        ),
        (
            {**SHAPE, "rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
            "rope_type='su' is not one longctx knows",
        ),
        (
            {"rope_theta": 1e4, "hidden_size": 64, "num_attention_heads": 4},
            "max_position_embeddings is missing",
        ),
    ],
)
def test_configs_that_cannot_be_extended(config: dict, message: str):
    with pytest.raises(UserError, match=message):
        rope_of(config, "somewhere/config.json")


def test_a_missing_model_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_rope(tmp_path / "nowhere")


# --- beside transformers
# ---------------------------------------------------------------------------------------


def _ropes() -> list[tuple[dict, int]]:
    """rope_parameters of every type, several thetas, and every rule's own output."""
    found: list[tuple[dict, int]] = []
    for theta in (10000, 500000, 15296098, 207112184, 3580165449, 45218125210):
        base = {"rope_theta": theta}
        original = {"original_max_position_embeddings": 512}
        found += [
            ({"rope_type": "default", **base}, 512),
            ({"rope_type": "linear", "factor": 3.0, **base}, 1536),
            ({"rope_type": "dynamic", "factor": 4.0, **base}, 512),
            ({"rope_type": "yarn", "factor": 8.0, **base, **original}, 4096),
            (
                {"rope_type": "yarn", "factor": 8.0, "truncate": False, "beta_fast": 16, **base, **original},
                4096,
            ),
            (
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    **base,
                    **original,
                },
                4096,
            ),
            ({"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0, **base}, 1024),
            (
                {
                    "rope_type": "longrope",
                    "short_factor": [1.0 + 0.01 * i for i in range(16)],
                    "long_factor": [1.0 + 0.7 * i for i in range(16)],
                    "factor": 8.0,
                    **base,
                    **original,
                },
                4096,
            ),
        ]
    start = Rope({"rope_type": "default", "rope_theta": 10000}, 32, 512)
    for name in RULES:
        values = {"long_factor": [1.5] * 16} if name == "longrope" else {}
        found.append((make_rule(name, values).to_hf(start, 8192), 8192))
    return found


def _ulps(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32).astype(np.int64)).max())


def test_frequencies_equal_transformers_through_a_saved_and_reloaded_model(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    for index, (rope, window) in enumerate(_ropes()):
        config = LlamaConfig(
            vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=window, rope_parameters=dict(rope),
        )  # fmt: skip
        folder = tmp_path / str(index)
        LlamaForCausalLM(config).save_pretrained(folder)
        rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
        ours = inv_freq(rope, 32, window=window, dtype=np.float32)
        assert ours.dtype == np.float32
        assert _ulps(ours, rotary.inv_freq.numpy()) <= 1, rope
        assert rotary.attention_scaling == pytest.approx(attention_factor(rope, window=window), rel=1e-12)
        read = read_rope(folder)
        assert read.window == window
        assert np.array_equal(inv_freq(read.parameters, 32, window=window, dtype=np.float32), ours)
        if rope["rope_type"] in ("dynamic", "longrope"):  # these look at the sequence's own length
            with torch.no_grad():
                rotary(torch.zeros(1), torch.arange(1500)[None])
            grown = inv_freq(rope, 32, window=window, length=1500, dtype=np.float32)
            # torch forms dynamic's theta from a length tensor in float32; two more roundings.
            assert _ulps(grown, rotary.inv_freq.numpy()) <= (1 if rope["rope_type"] == "longrope" else 40)


def test_frequencies_survive_longctxs_own_export(tmp_path: Path):
    """Every rule's rope, exported from a model with another one and loaded by plain transformers."""
    from transformers import AutoModelForCausalLM

    from longctx.config.model import InitConfig, ModelConfig
    from longctx.model import init_from
    from longctx.model.export import export

    shape = InitConfig(layers=1, hidden=64, heads=2, kv_heads=1, ffn=8, vocab=8, window=512)
    model = init_from(shape, attention="sdpa")
    start = Rope({"rope_type": "default", "rope_theta": 10000}, 32, 512)
    for name in RULES:
        values = {"long_factor": [1.5] * 16} if name == "longrope" else {}
        rope = make_rule(name, values).to_hf(start, 8192)
        out = export(model.named_parameters(), ModelConfig(init=shape), None, tmp_path / name, rope=rope, window=8192)
        rotary = AutoModelForCausalLM.from_pretrained(out).model.rotary_emb
        assert _ulps(inv_freq(rope, 32, window=8192, dtype=np.float32), rotary.inv_freq.numpy()) <= 1, name
        assert read_rope(out).theta == rope["rope_theta"]
        old = {k: v for k, v in json.loads((out / "config.json").read_text()).items() if k != "rope_parameters"}
        assert np.array_equal(rope_of(old, "old style").frequencies(), read_rope(out).frequencies()), name


def test_every_rope_type_of_transformers_is_known():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from longctx.rope.frequencies import ROPE_TYPES

    assert set(ROPE_INIT_FUNCTIONS) | {"default"} <= set(ROPE_TYPES)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_frequencies_equal_transformers_bit_for_bit(dim: int):
    """Every rule at published thetas and every size of head, given torch's own power; ours alone is an ulp or two off.

    torch's SIMD power (17 pairs and more) errs by an ulp at times; its scalar power and ours do not.
    """
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from longctx.model.rotary import torch_power

    for theta in (10000, 500000, 15296098, 207112184, 1062356830, 2804339835, 3580165449):
        start = Rope({"rope_type": "default", "rope_theta": theta}, dim, 8192)
        ropes = [start.parameters, {"rope_type": "dynamic", "rope_theta": theta, "factor": 4.0}]
        for name in RULES:
            values = {"long_factor": [1.5] * (dim // 2)} if name == "longrope" else {}
            ropes.append(dict(make_rule(name, values).to_hf(start, 65536)))
        for rope in ropes:
            config = LlamaConfig(
                hidden_size=dim, num_attention_heads=1, head_dim=dim, max_position_embeddings=65536,
                rope_parameters=dict(rope),
            )  # fmt: skip
            theirs = LlamaRotaryEmbedding(config).inv_freq.numpy()
            given = inv_freq(rope, dim, window=65536, dtype=np.float32, power=torch_power)
            assert np.array_equal(given, theirs), rope
            assert _ulps(inv_freq(rope, dim, window=65536, dtype=np.float32), theirs) <= 4, rope
        exponents = torch.arange(0, dim, 2).float() / dim
        scalar = torch.cat([1.0 / (theta ** exponents[i : i + 1]) for i in range(dim // 2)]).numpy()
        assert np.array_equal(inv_freq({"rope_theta": theta}, dim, window=2048, dtype=np.float32), scalar)
