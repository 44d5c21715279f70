"""Stages resolved to numbers: published curricula, overrides, schedules across stages, every refusal."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from longctx.config.base import build
from longctx.config.compose import compose
from longctx.config.curriculum import CurriculumConfig
from longctx.config.groups import config_dir
from longctx.curriculum import Advance, LearningRate, Stage, resolve
from longctx.errors import UserError

FILE = "configs/curriculum/test.yaml"


def config(stages: dict[str, dict[str, Any]], **values: Any) -> CurriculumConfig:
    full = {name: {"batch": 1, "steps": 10, **stage} for name, stage in stages.items()}
    return build(CurriculumConfig, {"lr": {"peak": 1e-3}, **values, "stages": full}, origin=FILE)


def stages_of(
    curriculum: CurriculumConfig,
    *,
    head_dim: int = 128,
    theta: float = 500000,
    window: int = 8192,
    **rope: Any,
) -> list[Stage]:
    parameters = {"rope_type": "default", "rope_theta": theta, **rope}
    return resolve(curriculum, head_dim=head_dim, rope=parameters, window=window, file=FILE)


def packaged(name: str, *overrides: str) -> CurriculumConfig:
    return build(CurriculumConfig, compose("theta", [f"curriculum={name}", *overrides])["curriculum"], origin=name)


def lengths(stages: list[Stage]) -> list[int]:
    return [stage.seq_len for stage in stages]


@pytest.mark.parametrize("stage", [{"seq_len": 4096}, {"seq_len": 8192}])
def test_a_stage_that_would_keep_a_rope_of_moving_frequencies_is_refused_before_anything_starts(stage: dict[str, Any]):
    """Both kinds: dynamic, and longrope with other factors for short sequences, kept from the model or by a rule."""
    curriculum = config({"short": stage}, keep_window=True)
    with pytest.raises(
        UserError, match=r"stages\.short: rope_type='dynamic'.*one fixed set.*give it a theta or a rule"
    ):
        stages_of(curriculum, rope_type="dynamic", factor=2.0)
    assert stages_of(config({"short": {**stage, "theta": 5e5}}, keep_window=True), rope_type="dynamic", factor=2.0)
    two = {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
    with pytest.raises(UserError, match=r"stages\.short: rope_type='longrope'.*equal factors"):
        stages_of(curriculum, rope_type="longrope", **two)
    with pytest.raises(UserError, match=r"stages\.long: rope_type='longrope'.*equal factors"):
        stages_of(config({"long": {"seq_len": 16384, "rule": {"name": "longrope", **two}}}))


def test_a_fine_tune_keeps_the_window_and_the_rope_of_its_model():
    """A short stage changes neither; a longer one after it extends as usual."""
    short, long = stages_of(
        config({"short": {"seq_len": 2048}, "long": {"seq_len": 16384, "theta": 4e6}}, keep_window=True)
    )
    assert (short.seq_len, short.window, short.theta, short.rule) == (2048, 8192, 500000, "theta")
    assert (long.window, long.start_window, long.theta) == (16384, 8192, 4e6)
    with pytest.raises(UserError, match="names neither theta nor rule"):
        stages_of(config({"long": {"seq_len": 16384}}, keep_window=True))
    with pytest.raises(UserError, match=r"shorter than the model's window of 8192.*curriculum\.keep_window=true"):
        stages_of(config({"short": {"seq_len": 2048, "theta": 500000}}))


@pytest.mark.parametrize(
    ("name", "thetas", "tokens", "batches", "steps"),
    [
        (
            "gradient_llama3_8b",
            [15296098, 207112184, 1062356830, 2804339835],
            [62914560, 100663296, 419430400, 838860800],
            [32, 16, 16, 16],
            [30, 24, 50, 50],
        ),
        (
            "gradient_llama3_70b",
            [15296098, 207112184, 1062356830, 3580165449],
            [83886080, 104857600, 209715200, 33554432],
            [64, 16, 16, 4],
            [20, 25, 25, 8],
        ),
    ],
)
def test_published_stages_exactly(name: str, thetas: list, tokens: list, batches: list, steps: list):
    stages = stages_of(packaged(name))
    assert lengths(stages) == [2**16, 2**18, 2**19, 2**20]
    assert [s.theta for s in stages] == thetas
    assert [s.tokens for s in stages] == tokens
    assert [s.batch for s in stages] == batches
    assert [s.steps for s in stages] == steps
    assert all(s.lr.at(step) == 2e-5 for s in stages for step in (0, s.steps - 1))


def test_every_packaged_curriculum_resolves():
    names = sorted(p.stem for p in (config_dir() / "curriculum").glob("*.yaml") if not p.stem.startswith("_"))
    assert {"8k_to_1048k", "prolong_512k", "lwm_1m", "qwen_1m", "to_4194k", "tiny_base"} <= set(names)
    for name in names:
        curriculum = packaged(name)
        base = curriculum.made_for
        shape = (base.head_dim, base.theta, base.window) if base else (32, 10000, 512)
        stages = stages_of(curriculum, head_dim=shape[0], theta=shape[1], window=shape[2])
        assert lengths(stages) == sorted(lengths(stages))
        for stage in stages:
            assert stage.tokens == stage.steps * stage.batch * stage.seq_len
            assert stage.rope["rope_theta"] == stage.theta


def test_tiny_128x_is_the_same_stretch_as_8k_to_1048k():
    tiny, large = packaged("tiny_128x"), packaged("8k_to_1048k")
    assert stages_of(tiny, head_dim=32, theta=10000, window=512)[-1].seq_len // 512 == 128
    assert stages_of(large)[-1].seq_len // 8192 == 128


def test_quickstart_thetas_are_stage_to_stage_dynamic_ntk():
    stages = stages_of(packaged("tiny_16x"), head_dim=32, theta=10000, window=512)
    assert [(s.seq_len, s.theta) for s in stages] == [(2048, 154243), (8192, 2379094)]
    assert [s.start_window for s in stages] == [512, 2048]


def test_overrides_from_the_command_line():
    changed = packaged(
        "8k_to_1048k",
        "curriculum.stages.s64k.tokens=1e8",
        "curriculum.stages.s64k.lr.peak=1e-5",
        "~curriculum.stages.s16k",
        "curriculum.stages.s32k.rule=ntk",
    )
    stages = {s.name: s for s in stages_of(changed)}
    assert "s16k" not in stages
    assert stages["s64k"].steps == 24  # 1e8 tokens are 23.8 batches of 4194304
    assert stages["s64k"].lr.peak == 1e-5
    assert stages["s32k"].theta == int(500000 * 4 ** (128 / 126))


def test_only_selects_and_a_stage_between_is_placed_by_its_name():
    assert lengths(stages_of(packaged("8k_to_1048k", "curriculum.only=[s256k,s64k]"))) == [65536, 262144]
    added = "+curriculum.stages.s24k={seq_len: 24k, tokens: 4M, batch: 1}"
    assert [s.name for s in stages_of(packaged("8k_to_1048k", added))][1:4] == ["s16k", "s24k", "s32k"]


def test_the_rope_group_changes_the_rule_of_every_stage():
    stages = stages_of(packaged("tiny_16x", "rope=yarn"), head_dim=32, theta=10000, window=512)
    assert [s.rope["factor"] for s in stages] == [4.0, 16.0]
    assert {s.rope["original_max_position_embeddings"] for s in stages} == {512}
    stages = stages_of(packaged("8k_to_1048k", "rope=dynamic_ntk", "curriculum.only=[s64k,s256k,s1048k]"))
    assert [s.theta for s in stages] == [15296098, 207112184, 2804339835]


def test_rule_may_start_from_the_original_or_the_previous_stage():
    two = {"s64k": {"seq_len": 65536}, "s256k": {"seq_len": 262144}}
    original = stages_of(config(two, rule={"name": "dynamic-ntk", "start": "original"}))
    assert original[1].theta == int(500000 * (4 * 32 - 3) ** (128 / 126))
    previous = stages_of(config(two, rule={"name": "ntk", "start": "previous"}))
    assert previous[1].theta == int(4134231 * 4 ** (128 / 126))


def test_a_constant_theta_is_the_models_own_rope():
    stages = stages_of(config({"s64k": {"seq_len": 65536, "theta": 500000}}))
    assert stages[0].rope == {"rope_type": "default", "rope_theta": 500000}


def test_a_scaled_model_keeps_its_scaling():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    stage = stages_of(config({"s1M": {"seq_len": 2**20}}, rule="ntk"), window=131072, **rope)[0]
    assert stage.rope == {**rope, "rope_theta": 4134231}


def test_scratch_lengths_may_repeat_and_lie_under_the_window():
    curriculum = config({"a": {"seq_len": 128}, "b": {"seq_len": 128}, "c": {"seq_len": 512}}, scratch=True)
    stages = stages_of(curriculum, head_dim=32, theta=10000, window=512)
    assert lengths(stages) == [128, 128, 512]
    assert {s.theta for s in stages} == {10000}


def test_theta_file_replaces_rules(tmp_path: Path):
    file = tmp_path / "theta.yaml"
    file.write_text("stages:\n  s8192: {theta: 1234567}\n")
    stages = stages_of(packaged("tiny_16x", f"curriculum.theta_file={file}"), head_dim=32, theta=10000, window=512)
    assert [s.theta for s in stages] == [154243, 1234567]


@pytest.mark.parametrize("rule", ["yarn", "linear", "llama3"])
def test_a_found_theta_is_trained_with_the_scaling_it_was_judged_with(tmp_path: Path, rule: str):
    file = tmp_path / "theta.yaml"
    file.write_text(f"stages:\n  s64k: {{theta: 1e6, rule: {rule}}}\n")  # YAML reads 1e6 as text
    two = {"s64k": {"seq_len": 65536}, "s256k": {"seq_len": 262144}}
    plain = stages_of(config(two, rule=rule))
    found = stages_of(config({"s64k": two["s64k"]}, rule=rule, theta_file=str(file)))
    assert found[0].rope == {**plain[0].rope, "rope_theta": 1000000}
    assert found[0].theta == 1000000
    assert found[0].rope["rope_type"] == rule == found[0].rule


def test_a_theta_found_under_another_scaling_is_refused(tmp_path: Path):
    file = tmp_path / "theta.yaml"
    file.write_text("stages: {s64k: {theta: 1000000, rule: yarn}}\n")
    with pytest.raises(UserError, match=r"searched under rule 'yarn' and the stage has rule 'ntk'.*theta\.yaml"):
        stages_of(config({"s64k": {"seq_len": 65536}}, rule="ntk", theta_file=str(file)))
    file.write_text("stages: {s64k: {theta: 90000000, rule: dynamic-ntk}}\n")  # neither scales anything but theta
    stages = stages_of(config({"s64k": {"seq_len": 65536}}, rule="ntk", theta_file=str(file)))
    assert stages[0].theta == 90000000
    file.write_text("stages: {s64k: {theta: 90000000}}\n")  # a stage that names no rule takes the model's own rope
    assert stages_of(config({"s64k": {"seq_len": 65536}}, theta_file=str(file)))[0].rope["rope_type"] == "default"


def test_the_mixes_of_8k_to_1048k_go_by_length_and_stand_in_every_preset():
    mixes = {stage.name: stage.mix for stage in stages_of(packaged("8k_to_1048k"))}
    assert [name for name, mix in mixes.items() if mix == "default"] == ["s8k", "s16k", "s32k"]
    assert [name for name, mix in mixes.items() if mix == "long"] == ["s64k", "s128k", "s256k", "s512k", "s1048k"]
    for preset in ("text", "stdlib", "chat"):
        assert set(mixes.values()) <= set(
            yaml.safe_load((config_dir() / "data" / f"{preset}.yaml").read_text())["mixes"]
        )


# --- learning rate and advance
# ---------------------------------------------------------------------------------


def test_continued_schedule_equals_one_stage_of_both():
    lr = {"peak": 1e-3, "final": 1e-5, "warmup_steps": 5, "kind": "cosine"}
    more = {"kind": "continue"}
    split = stages_of(
        config({
            "s64k": {"seq_len": 65536, "theta": 600000, "steps": 10, "lr": lr},
            "s128k": {"seq_len": 131072, "theta": 700000, "steps": 7, "lr": more},
            "s256k": {"seq_len": 262144, "theta": 800000, "steps": 3, "lr": more},
        })
    )  # fmt: skip
    whole = stages_of(config({"s64k": {"seq_len": 65536, "theta": 600000, "steps": 20, "lr": lr}}))[0]
    rates = [stage.lr.at(step) for stage in split for step in range(stage.steps)]
    assert rates == [whole.lr.at(step) for step in range(20)]
    assert rates[4] == 1e-3
    assert rates[5] == 1e-3
    assert rates[-1] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 14 / 15)) / 2)


@given(
    st.sampled_from(["constant", "cosine", "linear"]),
    st.integers(0, 20),
    st.integers(1, 100),
    st.floats(1e-6, 1e-2),
    st.floats(0, 1),
)
def test_rate_rises_to_the_peak_and_never_leaves_its_bounds(
    kind: str, warmup: int, more: int, peak: float, share: float
):
    rate = LearningRate(peak, peak * share, warmup, kind, 0, warmup + more)
    rates = [rate.at(step) for step in range(warmup + more)]
    assert all(0 < value <= peak * (1 + 1e-12) for value in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if kind != "constant":
        assert rates[warmup] == pytest.approx(peak)
        assert rate.at(warmup + more) == pytest.approx(peak * share, abs=peak * 1e-9)  # the step after the last


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_stage_of_one_step_trains_at_the_peak(kind: str):
    assert stages_of(config({"s64k": {"seq_len": 65536, "theta": 600000, "steps": 1, "lr": {"kind": kind}}}))[0].lr.at(
        0
    ) == pytest.approx(1e-3)


def test_advance_waits_for_a_flat_loss():
    rule = Advance(steps=4, min_drop=0.01, min_share=0.25)
    falling = [3.0 - 0.1 * i for i in range(12)]
    assert not rule.flattened(falling, 20)
    assert rule.flattened([*falling, *[1.8] * 8], 20)
    assert not rule.flattened([1.8] * 7, 20)  # two windows of 4 are not full yet
    assert not rule.flattened([1.8] * 8, 40)  # a quarter of 40 steps is not done
    assert rule.flattened([1.8] * 10, 40)


def test_advance_is_off_unless_enabled():
    on = {"enabled": True, "steps": 7}
    stages = stages_of(config({"s64k": {"seq_len": 65536}, "s128k": {"seq_len": 131072, "advance": on}}, rule="ntk"))
    assert stages[0].advance is None
    assert stages[1].advance == Advance(7, 0.002, 0.25)


# --- refusals
# ---------------------------------------------------------------------------------------------------

GOOD = {"s64k": {"seq_len": 65536}, "s256k": {"seq_len": 262144}}


@pytest.mark.parametrize(
    ("stages", "values", "message"),
    [
        (
            {"s64k": {"seq_len": 65536, "theta": 9e6}, "s256k": {"seq_len": 262144, "theta": 8e6}},
            {},
            "curriculum.stages.s256k: theta=8000000 is below the 9000000 it starts from; a theta must not fall",
        ),
        ({"s64k": {"seq_len": 65536, "theta": 10000}}, {}, "theta=10000 is below the 500000 it starts from"),
        ({"s64k": {"seq_len": 65536, "theta": 2**63}}, {}, "theta=9223372036854775808 must be below"),
        (
            {"s64k": {"seq_len": 65536}},
            {"rule": {"name": "dynamic-ntk", "factor": 1e15}},
            "curriculum.stages.s64k: theta=6.25e+21 is more than the 9.2e18 with which transformers can compute",
        ),
        (
            {"s64k": {"seq_len": 262144}, "s256k": {"seq_len": 65536}},
            {"rule": "ntk"},
            "curriculum.stages.s256k.seq_len=65536 does not come after 262144: the lengths of the stages must increase",
        ),
        (
            {"a": {"seq_len": 65536}, "b": {"seq_len": 65536}},
            {"rule": "ntk"},
            "curriculum.stages.b.seq_len=65536 does not come after 65536",
        ),
        (
            {"s4k": {"seq_len": 4096}},
            {"rule": "ntk"},
            "curriculum.stages.s4k.seq_len=4096 is shorter than the model's window of 8192; start at 8192 or longer, "
            "drop the stage ('~curriculum.stages.s4k'), take another curriculum=...",
        ),
        ({"s64k": {"seq_len": 65536}}, {}, "curriculum.stages.s64k names neither theta nor rule"),
        (
            {"s64k": {"seq_len": 65536, "theta": 9e6, "rule": "ntk"}},
            {},
            "curriculum.stages.s64k names both theta=9000000 and rule='ntk'; give exactly one",
        ),
        (GOOD, {"rule": "nkt"}, "rule='nkt' is not a rule; did you mean 'ntk'?"),
        (
            GOOD,
            {"rule": "ntk", "only": ["s65k"]},
            "curriculum.only names 's65k', which is no stage; did you mean",
        ),
        (GOOD, {"rule": "ntk", "only": []}, "curriculum.only=[] leaves no stage"),
        (
            {"s64k": {"seq_len": 65536, "batch": None, "batch_tokens": 100000}},
            {"rule": "ntk"},
            "batch_tokens=100000 is not a whole number of sequences of 65536 tokens; 131072 fits",
        ),
        ({"s64k": {"seq_len": 65536, "batch_tokens": 65536}}, {"rule": "ntk"}, "needs exactly one of batch"),
        (
            {"s64k": {"seq_len": 65536, "tokens": 100}},
            {"rule": "ntk"},
            "needs exactly one of tokens and steps",
        ),
        ({"s64k": {"seq_len": 65536, "steps": 0}}, {"rule": "ntk"}, "steps=0 must be 1 or more"),
        (
            {"s64k": {"seq_len": 65536, "lr": {"kind": "continue"}}},
            {"rule": "ntk"},
            "lr.kind=continue has no stage before it",
        ),
        (
            {"s64k": {"seq_len": 65536}, "s128k": {"seq_len": 131072, "lr": {"kind": "continue", "peak": 1e-5}}},
            {"rule": "ntk"},
            "s128k.lr.peak=1e-05 does not go with kind=continue, which goes on with the rate of s64k",
        ),
        (
            {"s64k": {"seq_len": 65536, "lr": {"peak": 0}}},
            {"rule": "ntk"},
            "lr.peak=0 must be above 0",
        ),
        (
            {"s64k": {"seq_len": 65536, "lr": {"final": 1, "kind": "linear"}}},
            {"rule": "ntk"},
            "lr.final=1.0 must be at most the peak",
        ),
        (
            {"s64k": {"seq_len": 65536, "lr": {"warmup_steps": 11}}},
            {"rule": "ntk"},
            "warmup_steps=11 must be at most the 10 steps",
        ),
        (GOOD, {"rule": "ntk", "theta_file": "/nowhere/t.yaml"}, "theta_file=/nowhere/t.yaml cannot be read"),
    ],
)
def test_refusals_name_place_value_rule_and_file(stages: dict, values: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        stages_of(config(stages, **values))
    assert FILE in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": {}}, "stages is empty"),
        ({"stages": {"../s64k": {"seq_len": 65536}}}, "stages.../s64k: '../s64k' cannot be the name of a folder"),
        ({"stages": {"a/b": {"seq_len": 65536}}}, "'a/b' cannot be the name of a folder"),
        (
            {"stages": {"s64k": {"seq_length": 65536}}},
            "stages.s64k.seq_length is not a known key; did you mean stages.s64k.seq_len",
        ),
        ({"stages": {"s64k": {"seq_len": "abc"}}}, "stages.s64k.seq_len='abc' is not a length"),
        (
            {"stages": {"s64k": {"seq_len": 4096, "lr": {"peek": 1}}}},
            "stages.s64k.lr.peek is not a known key; did you mean stages.s64k.lr.peak",
        ),
        (
            {"stages": {"s64k": {"seq_len": 4096}}, "advance": {"min_share": 2}},
            "advance.min_share=2 must be at most 1",
        ),
    ],
)
def test_mistakes_at_the_door(values: dict, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        build(CurriculumConfig, values, origin=FILE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages:\n  s81: {theta: 5}\n", "stage 's81' is not in the curriculum; did you mean 's8192'?"),
        ("stages: [1, 2]\n", "does not hold `stages: {NAME: {theta: NUMBER}}`"),
        ("stages: {s8192: {theta: 5", "does not hold `stages"),
        ("stages: {s8192: {theta: much}}", "stages.s8192.theta='much' is not a count"),
        ("stages: {s8192: {theta: 1}}", "stages.s8192.theta=1 must be above 1"),
        ("stages: {s8192: {theta: 1e6, seq_len: eight}}", "stages.s8192.seq_len='eight' is not a length"),
    ],
)
def test_a_wrong_theta_file(tmp_path: Path, content: str, message: str):
    file = tmp_path / "t.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        stages_of(packaged("tiny_16x", f"curriculum.theta_file={file}"), head_dim=32, theta=10000, window=512)
