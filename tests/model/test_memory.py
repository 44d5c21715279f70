"""Memory in use at one time: no logits, no scores, attention run once per layer, and the bytes per token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longctx.config.model import InitConfig, MemoryConfig
from longctx.model import LossModel, init_from
from longctx.shape import shape_of
from tests.model.conftest import sequence, tiny
from tests.watch import Watch

TOKENS = 512


def step(model: LossModel, tokens: int = TOKENS) -> None:
    ids, positions, labels = sequence(tokens)
    model(ids, positions, labels).loss_sum.backward()


def test_no_tensor_of_tokens_by_vocabulary_or_by_tokens():
    model = LossModel(init_from(tiny(vocab=700, ffn=64)), MemoryConfig(ffn_block=64, loss_chunk=32))
    with Watch() as watch:
        step(model)
    widest = max(TOKENS * 64, 700 * 32, 32 * 700)  # q at 4 heads x 16, the head's weight, a chunk's logits
    assert watch.largest <= widest
    assert widest * 8 <= TOKENS * TOKENS < TOKENS * 700

    plain = init_from(tiny(vocab=700, ffn=64), attention="eager")
    ids, _, _ = sequence(TOKENS)
    with Watch() as watch:
        plain(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert watch.largest >= TOKENS * 700  # the guard does see logits where they exist


def test_a_block_smaller_than_the_batch_has_rows_takes_one_token_of_each():
    model = LossModel(init_from(tiny(layers=1)), MemoryConfig(ffn_block=4))
    seen: list[int] = []
    act: torch.nn.Module = model.model.model.layers[0].mlp.act_fn
    act.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[:2].numel()))
    model(*sequence(10, batch=6))
    assert seen == [6] * 10


@pytest.mark.parametrize(
    "memory", [MemoryConfig(), MemoryConfig(keep_matmuls=1), MemoryConfig(offload_activations=True)]
)
def test_attention_forward_runs_once_per_layer(memory):
    model = LossModel(init_from(tiny(layers=3)), memory)
    with Watch() as watch:
        step(model, 128)
    assert watch.calls["longctx.context_attention.default"] == 3
    assert watch.calls["longctx.context_attention_backward.default"] == 3


@pytest.mark.parametrize("offload", [False, True])
def test_full_recomputation_repeats_attention_and_no_product_twice(offload):
    """Attention runs twice; products run as often as under selective recomputation, in blocks too."""
    counts = []
    for keep in (True, False):
        memory = MemoryConfig(keep_attention=keep, offload_activations=offload, ffn_block=64, loss_chunk=TOKENS)
        model = LossModel(init_from(tiny(layers=3)), memory)
        with Watch() as watch:
            step(model)
        counts.append(watch.calls)
    assert counts[0]["aten.mm.default"] == counts[1]["aten.mm.default"]
    assert counts[1]["longctx.context_attention.default"] == 2 * counts[0]["longctx.context_attention.default"] == 6
    assert counts[1]["longctx.context_attention_backward.default"] == 3


def test_matrix_products_are_repeated_only_where_they_are_not_kept():
    """Per layer q, k, v, o, gate, up, down: 7 forward and 14 backward; 6 are repeated (down never is)."""
    counts = []
    for kept in (0, 2):
        model = LossModel(init_from(tiny()), MemoryConfig(keep_matmuls=kept, loss_chunk=TOKENS, ffn_block=0))
        with Watch() as watch:
            step(model)
        counts.append(watch.calls["aten.mm.default"] + watch.calls["aten.mm.out"])
    layers, head = 2, 2  # of the head: the logits and the hidden states' gradient; its weight's is an addmm
    assert counts[0] == layers * (7 + 14 + 6) + head
    assert counts[1] == layers * (7 + 14 + 1) + head


def peak_bytes(function: Callable[[], None]) -> int:
    """The allocator's high-water mark during `function`, above what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        function()
    events = []
    stack = list(made.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields))
    events.sort(key=lambda pair: pair[0])
    before = events[0][1].total_allocated - events[0][1].alloc_size
    return max(fields.total_allocated for _, fields in events) - before


@pytest.mark.parametrize(("keep", "attention"), [(0, True), (2, True), (0, False)])
def test_bytes_per_token_are_the_formula_within_15_percent(keep, attention):
    spec = InitConfig(layers=3, hidden=64, heads=4, kv_heads=2, ffn=172, vocab=256)
    memory = MemoryConfig(ffn_block=128, loss_chunk=64, keep_matmuls=keep, keep_attention=attention)
    model = LossModel(init_from(spec), memory)
    step(model, 128)
    peaks = {}
    for tokens in (1536, 3072):
        model.zero_grad(set_to_none=True)
        peaks[tokens] = peak_bytes(lambda count=tokens: step(model, count))
    measured = (peaks[3072] - peaks[1536]) / 1536
    expected = shape_of(model.model.config.to_dict(), "model").footprint(4)
    expected = expected.per_token(keep, keep_attention=attention)
    assert measured == pytest.approx(expected, rel=0.15)


def test_the_auto_dial_keeps_what_the_budget_allows():
    model = init_from(tiny(layers=4))
    cost = shape_of(model.config.to_dict(), "model").footprint(4)
    room = TOKENS * (cost.layers * cost.kept + cost.ends + 2.5 * cost.products) / 2**30
    trained = LossModel(model, MemoryConfig(keep_matmuls="auto", budget_gib=room))
    step(trained)
    keeps = [layer.save_policy.products for layer in model.model.layers]
    assert keeps == [False, False, True, True]
    assert cost.fitting(TOKENS, 0.0) == 0
    assert cost.fitting(TOKENS, 1e12) == 4


def test_a_second_backward_pass_is_told_that_saved_outputs_are_used() -> None:
    """retain_graph keeps the graph, not what the first pass has replayed."""
    ids, positions, _ = sequence(16)
    total = LossModel(init_from(tiny()), MemoryConfig(keep_matmuls=1)).hidden(ids, positions).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used already; backward ran twice"):
        total.backward()
