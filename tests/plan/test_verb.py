"""`longctx plan` as a user calls it: stages as JSON and table, a drawn schedule, and mistakes explained."""

import json

import pytest

from longctx import console
from longctx.cli import main
from longctx.config.hardware import HardwareConfig
from longctx.planner.estimate import Links, Speed, quickest, time_attention
from longctx.planner.memory import attention_buffers
from longctx.planner.run import _figures
from longctx.schedule import SCHEDULES, Sizes
from longctx.topology import Link, Topology

LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return f"model.path={tmp_path}"


def plan(capsys, *words):
    status = main(["plan", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_stage_of_a_curriculum_is_estimated(capsys, model):
    words = (
        model,
        "model.dtype=bfloat16",
        "curriculum=8k_to_1048k",
        "engine=deepspeed",
        "engine.zero=3",
        "nodes=4",
    )
    status, out, _ = plan(capsys, *words, "format=json")
    assert status == 0
    document = json.loads(out)
    assert document["parameters"] == 8_030_261_248
    stages = document["stages"]
    assert list(stages)[-1] == "s1048k"
    last = stages["s1048k"]
    assert (last["cp"], last["dp"], last["tokens_per_rank"]) == (32, 1, 32768)
    # Four sequences of 2^20 tokens. A weight costs 6 flop per token, one of a layer 2 more where it is recomputed, as
    # all are but down_proj's; a pair of tokens 4 flop per layer, head and dimension forward and 10 backward, half of
    # them masked.
    table, down, tokens, pairs = 128256 * 4096, 32 * 4096 * 14336, 4 * 2**20, 4 * 2**40 / 2
    flop = (6 * (8_030_261_248 - table) + 2 * (8_030_261_248 - 2 * table - down)) * tokens + 14 * 32 * 4096 * pairs
    assert last["flop_per_step"] == pytest.approx(flop, rel=1e-4)
    # 40 % of 32 H100, whose links keep up. Published for an 8B model on 8 H100: 380 s for one such sequence.
    assert last["seconds_per_step"] == pytest.approx(337.06, rel=1e-3)
    assert last["link_seconds_per_step"] == 0
    assert all(stage["fits"] for stage in stages.values())
    assert document["hours"] == pytest.approx(sum(stage["hours"] for stage in stages.values()))
    status, out, _ = plan(capsys, *words)
    assert status == 0
    assert "s1048k" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_a_last_micro_batch_with_fewer_sequences_is_counted_as_it_is(capsys, model):
    """Three sequences in forward passes of two: the work of three, and of two passes where weights are gathered."""
    words = ("curriculum=8k_to_1048k", "curriculum.only=[s8k]", "curriculum.stages.s8k.batch_tokens=24576", "ranks=1")
    found = {}
    for tokens in (8192, 16384):
        status, out, _ = plan(capsys, model, *words, f"engine.micro_batch_tokens={tokens}", "format=json")
        assert status == 0
        found[tokens] = json.loads(out)["stages"]["s8k"]
    assert [found[tokens]["micro_steps"] for tokens in (8192, 16384)] == [3, 2]
    for key in ("flop_per_step", "seconds_per_step"):
        assert found[16384][key] == pytest.approx(found[8192][key])


def test_weights_over_a_slow_link_are_counted_once(capsys, model):
    words = ("curriculum=8k_to_1048k", "curriculum.only=[s8k]", "engine=deepspeed", "engine.zero=3", "ranks=2")
    status, out, _ = plan(capsys, model, *words, "model.dtype=bfloat16", "hardware.inner_gbytes=1", "format=json")
    assert status == 0
    document = json.loads(out)
    stage, hardware = document["stages"]["s8k"], document["hardware"]
    assert stage["cp"] == 1  # attention sends nothing
    computing = stage["flop_per_step"] / (2 * hardware["tflops"]["bfloat16"] * 1e12 * hardware["utilization"])
    # three gathers of bf16 weights and one reduction of fp32 gradients per micro-step, half of them from the other rank
    moved = 8_030_261_248 * stage["micro_steps"] * (3 * 2 + 4) / 2 / 1e9
    assert moved > computing
    assert stage["link_seconds_per_step"] == pytest.approx(moved - computing)
    assert stage["seconds_per_step"] == pytest.approx(moved)


def test_a_stage_that_does_not_fit_is_marked(capsys, model):
    status, out, _ = plan(capsys, model, "curriculum=8k_to_1048k", "ranks=8", "hardware=l40s")
    assert "attention kernel cudnn" in out, "flash-attention 3 is built for Hopper"
    assert status == 0
    assert "! more than 92% of 44 GiB" in out


def test_a_drawn_schedule_and_its_svg(capsys, tmp_path):
    svg = tmp_path / "ring.svg"
    status, out, _ = plan(
        capsys,
        "show=schedule",
        "nodes=2",
        "ranks=2",
        "draw.schedule=double_ring",
        f"draw.svg={svg}",
        "draw.width=60",
    )
    assert status == 0
    assert out.startswith("double_ring, backward, 2 nodes x 2 ranks")
    assert sum(line.startswith("  rank") for line in out.splitlines()) == 4
    assert svg.read_text().startswith("<svg")


def test_the_schedule_of_a_stage(capsys, model):
    words = (model, "curriculum=8k_to_1048k", "nodes=2", "show=schedule", "draw.stage=s64k", "format=json")
    status, out, _ = plan(capsys, *words)
    assert status == 0
    assert json.loads(out)["spans"]


def test_the_length_to_draw_without_a_stage_does_not_refuse_a_stage(capsys, model):
    """draw.seq_len, 65,536 where nothing is said, cannot be shared by six ranks; the stage's 49,152 tokens can."""
    words = (model, "curriculum=8k_to_1048k", "ranks=6", "parallel.cp=6", "curriculum.only=[s64k]")
    length = [f"curriculum.stages.s64k.{word}" for word in ("seq_len=49152", "batch=6", "batch_tokens=null")]
    status, _, err = plan(capsys, *words, *length, "show=schedule", "draw.stage=s64k", "format=json")
    assert status == 0, err


@pytest.mark.parametrize(("dtype", "size", "rate"), [("bfloat16", 2, 50e12), ("float32", 4, 5e12)])
def test_a_stage_is_drawn_as_it_is_trained(capsys, model, dtype, size, rate):
    """In the rate and the bytes of its dtype, and with all sequences of a forward pass."""
    status, out, _ = plan(
        capsys, model, "curriculum=8k_to_1048k", "ranks=4", "parallel.cp=4", "engine.micro_batch=2",
        f"model.dtype={dtype}", "hardware.device=cpu", "hardware.latency_us=0", "hardware.inner_gbytes=100",
        "hardware.utilization=0.5", "hardware.tflops.bfloat16=100", "hardware.tflops.float32=10", "show=schedule",
        "draw.stage=s64k", "format=json",
    )  # fmt: skip
    assert status == 0
    spans, tokens = json.loads(out)["spans"], 2**16
    computing = sum(span["end"] - span["start"] for span in spans if (span["kind"], span["rank"]) == ("compute", 0))
    flop = 2.5 * 4 * 2 * 32 * 128 * tokens**2 / 2  # five products instead of two, of two sequences, half masked
    assert computing == pytest.approx(flop / 4 / rate)
    kv = next(span for span in spans if span["payload"] == "kv")
    assert kv["end"] - kv["start"] == pytest.approx(2 * 2 * tokens / 4 * 8 * 128 * size / 100e9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show=schedule", "nodes=3", "draw.seq_len=64k"], "draw.seq_len=65536 is not divisible by"),
        (
            ["show=schedule", "draw.schedule=ulysses_ring", "draw.ulysses=3"],
            "draw.ulysses=3 must divide ranks=8",
        ),
        (["show=schedule", "draw.stage=s1", "curriculum=8k_to_1048k"], "draw.stage=s1 is no stage"),
        (["hardware.utilization=2"], "hardware.utilization=2 must be at most 1"),
        (["ranks=0"], "ranks=0 must be 1 or more"),
    ],
)
def test_mistakes_are_explained(capsys, model, words, message):
    status, _, errors = plan(capsys, model, *words)
    assert status == 2
    assert message in errors


def test_a_missing_model_is_named(capsys, tmp_path):
    assert plan(capsys, f"model.path={tmp_path}/none")[2].count("does not exist") == 1
    assert "model.path is missing" in plan(capsys)[2]


def test_buffers_do_not_grow_with_nodes_beyond_four(monkeypatch):
    """For this reason the planner simulates at most four nodes; a longer sequence does need larger buffers."""
    sizes = Sizes(512, 8, 8, 128)
    short = {name: attention_buffers(name, Topology(8, 2), sizes, 2, "cudnn") for name in SCHEDULES}
    monkeypatch.setattr("longctx.planner.memory.NODES_SIMULATED", 8)
    attention_buffers.cache_clear()
    whole = {name: attention_buffers(name, Topology(8, 2), sizes, 2, "cudnn") for name in SCHEDULES}
    attention_buffers.cache_clear()
    assert short == whole
    assert short["flat_ring"] < short["ulysses_ring"] < short["double_ring"]


def links(outer_gbytes: float) -> Links:
    return Link(450e9, 1e-5), Link(outer_gbytes * 1e9, 1e-5)


def test_the_planner_takes_the_hierarchy_when_the_network_is_slow():
    sizes = Sizes(1024, 32, 32, 128)
    speed, slow = Speed.of(HardwareConfig(), "bfloat16", "cudnn"), links(1.0)
    flat = time_attention("flat_ring", Topology(4, 8), sizes, speed, slow, 1)
    best = quickest(Topology(4, 8), sizes, speed, slow)
    assert best.schedule != "flat_ring"
    assert best.computing + best.exposed < 0.5 * (flat.computing + flat.exposed)
    long = Sizes(65536, 32, 8, 128)
    assert quickest(Topology(4, 8), long, speed, links(50.0)).schedule == "flat_ring"


def test_full_recomputation_attends_twice_and_waits_for_links_twice():
    sizes, speed = Sizes(1024, 32, 8, 128), Speed.of(HardwareConfig(), "bfloat16", "cudnn")
    topology, slow = Topology(2, 4), links(1.0)
    once, twice = (time_attention("double_ring", topology, sizes, speed, slow, 1, times) for times in (1, 2))
    assert twice.computing == pytest.approx(once.computing * (2 + 2.5) / (1 + 2.5))
    assert once.exposed < twice.exposed < 2 * once.exposed


@pytest.mark.parametrize("schedule", ["flat_ring", "double_ring", "ulysses_ring"])
def test_four_nodes_stand_for_more(schedule, monkeypatch):
    sizes, speed, slow = Sizes(512, 8, 8, 128), Speed(4e14), links(2.0)
    topology = Topology(8, 2)
    short = time_attention(schedule, topology, sizes, speed, slow, 2)
    monkeypatch.setattr("longctx.planner.estimate.NODES_SIMULATED", 8)
    time_attention.cache_clear()
    whole = time_attention(schedule, topology, sizes, speed, slow, 2)
    time_attention.cache_clear()
    assert short.computing == pytest.approx(whole.computing)
    assert short.exposed == pytest.approx(whole.exposed, rel=0.15)


def test_long_steps_and_hours_are_written_out():
    assert [_figures(value, 3) for value in (0.0577, 42.4, 1117.6, 3704)] == ["0.0577", "42.4", "1,118", "3,704"]


@pytest.mark.parametrize("verb", ["plan", "theta"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "phi3"}, "is a 'phi3' model, and longctx trains llama, mistral"),
        ({"model_type": "mistral", "sliding_window": 128}, "layer 0 attends to a window of 128 tokens"),
        ({"model_type": "llama"}, ""),
    ],
)
def test_a_model_that_training_refuses_is_calculated_with_a_warning(verb, changed, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, **changed}))
    console._remarked.clear()
    assert main([verb, f"model.path={tmp_path}", "curriculum=8k_to_1048k", "format=json"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert ("`longctx train` refuses the model: model.path=" in said) == bool(words)
