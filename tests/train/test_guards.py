"""Losses that must not be trained on, ranks that stall, and what a step costs in FLOP."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from longctx.config.train import GuardsConfig
from longctx.distributed.ranks import Ranks
from longctx.errors import RunFailed
from longctx.shape import Flops, shape_of
from longctx.train.batch import MicroBatch
from longctx.train.flops import peak_flops
from longctx.train.guards import Guards
from longctx.train.heartbeat import Beat, verdict

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_nan_stops_and_names_the_documents(tmp_path: Path) -> None:
    guards = Guards(GuardsConfig(), tmp_path, ALONE, [])
    batch = MicroBatch({}, 1.0, 4, 1.0, lambda: ["book:3", "book:7"])
    guards.check_finite(1.0, 2.0, 1.0, [batch], 11)
    with pytest.raises(RunFailed, match=r"loss=nan at step 11 on rank 0.*step00000011.json"):
        guards.check_finite(math.nan, 2.0, math.nan, [batch], 11)
    written = json.loads((tmp_path / "failures/step00000011.json").read_text())
    assert written["ranks"] == [{"rank": 0, "finite": False, "documents": ["book:3", "book:7"]}]
    with pytest.raises(RunFailed, match="gradient norm=inf"):
        guards.check_finite(1.0, math.inf, 1.0, [batch], 12)


def test_a_spike_is_skipped_and_not_remembered() -> None:
    recent: list[float] = []
    guards = Guards(GuardsConfig(spike_factor=2.0, spike_median_steps=12), Path("."), ALONE, recent)
    assert not any(guards.is_spike(1.0 + 0.01 * i) for i in range(15))
    assert len(recent) == 12
    assert guards.is_spike(2.5)
    assert max(recent) < 2.0
    assert not guards.is_spike(1.9)


def test_a_loss_that_stays_high_ends_the_run() -> None:
    guards = Guards(GuardsConfig(spike_factor=2.0, max_skipped_steps=3), Path("."), ALONE, [1.0] * 20)
    assert guards.is_spike(5.0)
    assert not guards.is_spike(1.0)
    assert [guards.is_spike(5.0) for _ in range(2)] == [True, True]
    with pytest.raises(
        RunFailed, match=r"guards.spike_factor=2 times the recent median.*for 3 steps: this is no spike"
    ):
        guards.is_spike(5.0)


def test_batches_without_a_label_are_skipped_and_many_in_a_row_end_the_run() -> None:
    guards = Guards(GuardsConfig(max_skipped_steps=3), Path("."), ALONE, [])
    assert [guards.is_mute(weight, 0) for weight in (4.0, 0.0, 0.0, 1.0, 0.0, 0.0)] == [False, True, True] * 2
    with pytest.raises(RunFailed, match="no token carried loss in 3 steps in a row, up to step 6"):
        guards.is_mute(0.0, 6)


def test_the_counts_of_an_earlier_process_go_on() -> None:
    config = GuardsConfig(spike_factor=2.0, max_skipped_steps=3)
    with pytest.raises(RunFailed, match="for 3 steps: this is no spike"):
        Guards(config, Path("."), ALONE, [1.0] * 20, spikes=2).is_spike(5.0)
    with pytest.raises(RunFailed, match="no token carried loss in 3 steps in a row"):
        Guards(config, Path("."), ALONE, [], mute=2).is_mute(0.0, 9)


def test_without_the_guard_nothing_is_skipped() -> None:
    guards = Guards(GuardsConfig(), Path("."), ALONE, [])
    assert not any(guards.is_spike(loss) for loss in [1.0] * 20 + [100.0])


def test_the_stalled_rank_is_the_one_behind_or_silent() -> None:
    waiting = [Beat(r, 40, 10, "reduce", 70.0, 1.0) for r in (0, 1, 3)]
    behind = Beat(2, 37, 10, "data", 71.0, 1.0)
    assert verdict([*waiting, behind], 100.0) is None
    found = verdict([*waiting, behind], 60.0)
    assert found is not None
    assert found.culprit == 2
    assert found.words.startswith("rank 2 stalls at step 10: it has been in 'data' for 71 s")
    silent = Beat(2, 40, 10, "reduce", 70.0, 65.0)
    found = verdict([*waiting, silent], 60.0)
    assert found is not None
    assert found.culprit == 2
    assert "no longer answers" in found.words


def test_what_may_take_long_is_no_stall_unless_the_process_is_silent() -> None:
    waiting = [Beat(r, 3, 0, "start", 4000.0, 1.0) for r in (1, 2)]
    assert verdict([Beat(0, 2, 0, "start", 4000.0, 1.0), *waiting], 1800.0) is None
    found = verdict([Beat(0, 2, 0, "start", 4000.0, 1900.0), *waiting], 1800.0)
    assert found is not None
    assert found.culprit == 0


def test_flops_are_what_torch_counts_for_a_plain_model() -> None:
    """Matrix products of a forward and backward, by torch's own counter, attention's full square apart."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64, head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
    tokens = 16
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits.sum().backward()
    flops = shape_of(shape.to_dict(), "model").flops()
    assert counter.get_total_flops() == pytest.approx(flops.model(tokens, tokens * tokens), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({"activation_checkpointing": False}, 0),
        ({}, 2 * 32 * (32 + 2 * 16 + 32 + 2 * 48)),  # q, k and v, o, gate and up
        ({"keep_attention": False}, 2 * 32 * (32 + 2 * 16 + 32 + 2 * 48)),
        ({"keep_matmuls": 1}, 32 * (32 + 2 * 16 + 32 + 2 * 48) + 32 * 32),
        ({"keep_matmuls": 2}, 2 * 32 * 32),  # o alone
    ],
)
def test_repeated_products_are_what_torch_counts_in_a_step(settings: dict, again: int) -> None:
    """One forward and backward of two layers: counted by torch, but for attention, which the ring does in parts."""
    from torch.utils.flop_counter import FlopCounterMode

    import longctx
    from longctx.config.model import InitConfig, MemoryConfig
    from longctx.model import LossModel, init_from
    from longctx.shape import shape_of_init

    init, tokens = InitConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64, window=64), 64
    memory = MemoryConfig(**settings, ffn_block=16)
    model = LossModel(init_from(init), memory)
    layout = longctx.ContextParallel.from_world().layout(seq_len=tokens)
    batch = longctx.shard_batch(torch.zeros(1, tokens, dtype=torch.long), layout, reduction="sum")
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss_sum.backward()
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op).endswith("mm"))
    flops = shape_of_init(init).trained_flops(memory, 4, tokens)
    # Of the head torch counts two products of the tokens with a label, and not the in-place one of its own gradient.
    head = init.vocab * init.hidden
    assert counted - 4 * head * (tokens - 1) == flops.products(tokens) - 6 * head * tokens
    assert flops.repeated_weights == again


def test_hardware_flops_add_the_recomputation() -> None:
    flops = Flops(matmul_weights=100, pair=10, repeated_weights=80)
    assert flops.model(10, 55) == 6 * 100 * 10 + 12 * 10 * 55
    assert flops.hardware(10, 55) - flops.model(10, 55) == 2 * 80 * 10 + 2 * 10 * 55
    full = Flops(matmul_weights=100, pair=10, repeated_weights=80, full=True)
    assert full.model(10, 55) == flops.model(10, 55)
    assert full.hardware(10, 55) - flops.hardware(10, 55) == 4 * 10 * 55  # attention's forward once more


def test_peak_is_known_given_or_left_out() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", None, "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", None, "bfloat16") == 756e12
    assert peak_flops("Something new", None, "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", None, "float32") is None  # the table has bf16 peaks only
    assert peak_flops(None, 2.0, "float32") == 2e12
