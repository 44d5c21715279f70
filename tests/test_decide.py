"""plan and train decide by one function: random configurations, and the cases in which they once differed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longctx.config.base import build
from longctx.config.model import KernelName, MemoryConfig
from longctx.config.plan import PlanConfig
from longctx.config.train import TrainConfig
from longctx.decide import (
    BLOCKS,
    CUDA_KERNELS,
    Blocks,
    Machines,
    assumed_kernels,
    blocks_of,
    choose_kernel,
    decide,
    decide_all,
    tokens_per_rank,
    with_blocks,
)
from longctx.errors import UserError
from longctx.planner.estimate import estimate_all, links_of
from longctx.planner.memory import need
from longctx.planner.run import document
from longctx.shape import shape_of_model
from longctx.train.runfolder import with_dtype
from longctx.train.train import resolve_stages

HEADS = [(8, 8), (8, 2), (6, 3), (4, 1)]


def values(heads: tuple[int, int] = (8, 2), **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "x",
        "model": {"init": {"layers": 2, "hidden": 32 * heads[0], "heads": heads[0], "kv_heads": heads[1], "ffn": 64,
                           "vocab": 64, "window": 64}, "tokenizer": "none"},
        "data": {"sources": {"text": {"kind": "text", "path": "docs"}}, "mixes": {"default": {"text": 1.0}}},
        "curriculum": {"lr": {"peak": 1e-3}, "scratch": True,
                       "stages": {"a": {"seq_len": 4096, "theta": 10000, "steps": 2, "batch": 8}}},
        "after_training": {"lora": {"enabled": False}},
    }  # fmt: skip
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = {**made[key], **value} if both else value
    return made


def planned(made: dict[str, Any], nodes: int, ranks: int) -> Any:
    """The values that `longctx plan` shows for stage a, or the text of its refusal."""
    try:
        hardware = {"device": "cpu", "tflops": {"float32": 0.1}}
        config = build(PlanConfig, {**made, "nodes": nodes, "ranks": ranks, "hardware": hardware}, origin="test")
        config = with_dtype(config)  # type: ignore[assignment]
        estimates = estimate_all(resolve_stages(config), shape_of_model(config.model), config)
        shown = document(config, shape_of_model(config.model), estimates)["stages"]["a"]
        return {key: shown[key] for key in ("cp", "dp", "nodes", "schedule", "ulysses", "per_forward")}
    except UserError as error:
        return str(error)


def trained(made: dict[str, Any], nodes: int, ranks: int) -> Any:
    """The values with which a rank of a training run opens stage a, or the text of the refusal before it starts."""
    try:
        config = with_dtype(build(TrainConfig, made, origin="test"))
        stages = resolve_stages(config)
        shape = shape_of_model(config.model)
        machines, heads = Machines(nodes * ranks, ranks), (shape.heads, shape.kv_heads)
        decide_all(stages, config.parallel, config.engine, machines, heads, config.model.dtype)
        found = decide(stages[0], config.parallel, config.engine, machines, heads)
        return {key: getattr(found, key) for key in ("cp", "dp", "nodes", "schedule", "ulysses", "per_forward")}
    except UserError as error:
        return str(error)


AUTO = st.just("auto")
PARALLEL = st.fixed_dictionaries({
    "cp": AUTO | st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    "seq_len_per_rank": st.sampled_from([1, 512, 1024, 8192]),
    "schedule": AUTO | st.sampled_from(["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"]),
    "nodes": AUTO | st.sampled_from([1, 2, 3]),
    "ulysses": AUTO | st.sampled_from([1, 2, 3, 4]),
})  # fmt: skip
ENGINE = st.fixed_dictionaries({
    "name": st.sampled_from(["ddp", "deepspeed"]), "zero": st.sampled_from([0, 2, 3]),
    "micro_batch": AUTO | st.sampled_from([1, 2, 3]), "micro_batch_tokens": st.sampled_from([1024, 8192]),
})  # fmt: skip


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(
    PARALLEL, ENGINE, st.sampled_from(HEADS), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4, 6, 8]),
    st.sampled_from([1, 4, 6, 8, 12, 24, 48]), st.sampled_from([768, 3072, 4096]),
)  # fmt: skip
def test_plan_and_train_agree(parallel, engine, heads, nodes, ranks, batch, seq_len):
    stages = {"a": {"seq_len": seq_len, "theta": 10000, "steps": 2, "batch": batch}}
    made = values(heads, parallel=parallel, engine=engine, curriculum={"stages": stages})
    plan, train = planned(made, nodes, ranks), trained(made, nodes, ranks)
    assert plan == train
    COUNTED.append(isinstance(plan, dict))


COUNTED: list[bool] = []


def test_the_random_configurations_were_of_both_kinds():
    if COUNTED:  # only after the test above, not alone
        assert len(COUNTED) >= 200
        assert 0.1 < sum(COUNTED) / len(COUNTED) < 0.9


def test_gradients_are_not_added_up_in_bfloat16():
    """DeepSpeed would do that under ZeRO-2 with an offloaded optimizer; one micro-batch a step needs no sum."""

    def decided(zero, dtype="bfloat16", micro_batch=1):
        stages = {"a": {"seq_len": 512, "theta": 10000, "steps": 2, "batch": 4}}
        engine = {"name": "deepspeed", "zero": zero, "offload_optimizer": True, "micro_batch": micro_batch}
        config = build(PlanConfig, values(engine=engine, curriculum={"stages": stages}), origin="test")
        return decide_all(resolve_stages(config), config.parallel, config.engine, Machines(1, 1), (8, 2), dtype)

    with pytest.raises(UserError, match=r"stage a takes 4 sequences a step in micro-batches of 1.*engine.zero=3"):
        decided(2)
    assert [decided(3), decided(2, "float32"), decided(2, micro_batch=4)]


def test_twelve_ranks_on_nodes_of_eight_are_planned_as_twelve():
    made = values(parallel={"cp": 12}, curriculum={"stages": {"a": {"seq_len": 3072, "theta": 1e4, "steps": 1,
                                                                    "batch": 2}}})  # fmt: skip
    found = planned(made, 3, 8)
    assert (found["cp"], found["nodes"], found["schedule"]) == (12, 1, "flat_ring")
    config = build(PlanConfig, made, origin="test")
    stage = resolve_stages(config)[0]
    machines = Machines(24, 8)
    decision = decide(stage, config.parallel, config.engine, machines, (8, 2))
    assert decision.topology.size == 12
    inner, _ = links_of(decision, machines, config.hardware)
    assert inner.bandwidth == config.hardware.outer_gbytes * 1e9  # the ring crosses to another machine


def test_block_sizes_follow_the_device_unless_they_are_given():
    """Every figure and golden loss of this project was made with the CPU's sizes."""
    auto = MemoryConfig()
    assert blocks_of(auto, "cpu") == (2048, 512)
    assert blocks_of(auto, "cuda") == (8192, 4096)
    assert blocks_of(MemoryConfig(ffn_block=0, loss_chunk=7), "cuda") == (0, 7)
    assert blocks_of(MemoryConfig(loss_chunk=7), "cuda") == (8192, 7)
    config = build(TrainConfig, values(), origin="test")
    decided = with_blocks(config.model, "cuda").memory
    assert (decided.ffn_block, decided.loss_chunk) == (8192, 4096)
    assert blocks_of(decided, "cpu") == (8192, 4096)  # numbers stay what they are


def test_a_plan_counts_the_blocks_of_its_hardware():
    """The logits of one chunk in fp32, the head's gradient, and the last hidden states with theirs."""
    config = with_dtype(build(TrainConfig, values(), origin="test"))
    stage, shape = resolve_stages(config)[0], shape_of_model(config.model)
    decision = decide(stage, config.parallel, config.engine, Machines(1, 1), (8, 2))
    for device, kernel in (("cpu", "torch_cpu"), ("cuda", "cudnn")):
        memory = need(stage, shape, config, decision, world=1, kernel=kernel, device=device)
        tokens = tokens_per_rank(stage, decision.cp) * decision.per_forward
        ends = shape.hidden * (3 * tokens + shape.vocab) * 4
        assert memory.loss == min(tokens, BLOCKS[device].loss_chunk) * shape.vocab * 4 + ends
    assert isinstance(BLOCKS["cpu"], Blocks)


@pytest.mark.parametrize("budget", [0.0, 1e-3, 2e-3, 1.0])
def test_layers_that_keep_products_are_counted_as_training_keeps_them(budget):
    made = values(model={"memory": {"keep_matmuls": "auto", "budget_gib": budget}})
    config = with_dtype(build(TrainConfig, made, origin="test"))
    shape, stage = shape_of_model(config.model), resolve_stages(config)[0]
    machines = Machines(1, 1)
    decision = decide(stage, config.parallel, config.engine, machines, (8, 2))
    memory = need(stage, shape, config, decision, world=1, kernel="torch_cpu", device="cpu")
    assert memory.saved == 4096 * decision.per_forward * _trained_bytes(config, 4096 * decision.per_forward)


def _trained_bytes(config: TrainConfig, tokens: int) -> float:
    """Bytes per token that a real model's layers keep, told to keep by training's own plan."""
    from longctx.model.layer import prepare_layers, set_save_policies
    from longctx.model.load import init_from

    assert config.model.init is not None
    model = init_from(config.model.init)
    prepare_layers(model)
    set_save_policies(model, config.model.memory, block=0, tokens=tokens, store=None)
    keeping = sum(layer.save_policy.products for layer in model.model.layers)
    cost = shape_of_model(config.model).footprint(4)
    return cost.layers * cost.kept + keeping * cost.products


def test_the_chosen_kernel_is_fast_or_asked_for():
    h100 = assumed_kernels("cuda", "bfloat16", 128)
    assert choose_kernel("cuda", "bfloat16", h100, "auto") == "flash_attn_3"
    packages = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
    no_packages = {**h100, **{name: ["not installed"] for name in packages}}
    assert choose_kernel("cuda", "bfloat16", no_packages, "auto") == "cudnn"
    assert choose_kernel("cuda", "bfloat16", h100, "torch_flash") == "torch_flash"
    for capability, chosen in ((8.0, "cudnn"), (8.9, "cudnn"), (10.0, "flash_attn_4")):  # A100, L40S, B200
        other = assumed_kernels("cuda", "bfloat16", 128, capability)
        assert choose_kernel("cuda", "bfloat16", other, "auto") == chosen
        with pytest.raises(UserError, match=f"flash_attn_3 cannot serve .* capability {capability:g}"):
            choose_kernel("cuda", "bfloat16", other, "flash_attn_3")
    assert choose_kernel("cpu", "float64", assumed_kernels("cpu", "float64", 32), "auto") == "torch_cpu"
    for dtype, head_dim, reason in (
        ("float32", 128, "needs fp16 or bf16, got float32"),
        ("float64", 128, "needs fp16 or bf16, got float64"),
        ("bfloat16", 36, "a multiple of 8 up to 256, got 36"),
        ("bfloat16", 320, "a multiple of 8 up to 256, got 320"),
    ):
        serving = assumed_kernels("cuda", dtype, head_dim)
        with pytest.raises(UserError, match=reason):
            choose_kernel("cuda", dtype, serving, "auto")
        assert choose_kernel("cuda", dtype, serving, "reference") == "reference"
    with pytest.raises(UserError, match=r"model.attention_kernel=cudnn cannot serve .* take one of auto, torch_cpu"):
        choose_kernel("cpu", "bfloat16", assumed_kernels("cpu", "bfloat16", 128), "cudnn")


def test_the_names_of_kernels_are_those_that_exist():
    from typing import get_args

    from longctx.attention.kernels import KERNELS, Problem, explain, torch

    assert get_args(KernelName) == tuple(KERNELS) == (*CUDA_KERNELS, "torch_cpu", "reference")
    for dtype in ("float32", "bfloat16"):  # made-up devices are judged as real ones are
        real = explain(Problem("cpu", getattr(torch, dtype), 64, 8, 2))
        made = assumed_kernels("cpu", dtype, 64)
        assert {name for name, why in real.items() if not why} == {name for name, why in made.items() if not why}
    gpu = explain(Problem("cuda", torch.float32, 64, 8, 2, (9, 0)))
    assert [name for name, why in gpu.items() if not why] == ["reference"]


def test_float32_on_a_gpu_is_refused_by_plan_as_by_train(tmp_path, capsys):
    from longctx.cli import main

    (tmp_path / "config.json").write_text(json.dumps({
        "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 512, "vocab_size": 1000, "rope_theta": 1e4, "max_position_embeddings": 512,
        "dtype": "float32"}))  # fmt: skip
    words = ["plan", f"model.path={tmp_path}", "curriculum=tiny_16x", "ranks=1"]
    assert main(words) == 2
    assert "no fast attention kernel serves it on a GPU" in capsys.readouterr().err
    seconds = {}
    for name, more in (("slow", ["model.attention_kernel=reference"]), ("fast", ["model.dtype=bf16"])):
        assert main([*words, *more, "format=json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        seconds[name] = shown["stages"]["s8192"]["seconds_per_step"]
        assert (shown["dtype"], shown["kernel"] == "reference") == (
            ("float32", True) if name == "slow" else ("bfloat16", False)
        )
    assert seconds["slow"] > 5 * seconds["fast"]
