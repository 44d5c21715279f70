"""What lies in host memory beside a card: page-locked blocks, optimizer states and saved activations."""

from __future__ import annotations

import pytest
import torch

from longctx.bench.longest import run_trial
from longctx.config.base import build
from longctx.config.bench_longest import BenchLongestConfig
from longctx.config.model import InitConfig, MemoryConfig
from longctx.model import LossModel, init_from
from longctx.model.host import HostMemory
from longctx.train.offloaded import Offloaded, OffloadedAdamW
from tests.gpu.card import CARD, DTYPE, DTYPE_NAME, KIND, ON_CUDA, needs_cuda, wait

SPEC = InitConfig(layers=12, hidden=1024, heads=16, kv_heads=4, ffn=2048, vocab=4096, window=8192)
TOKENS = 16384
if not ON_CUDA:
    SPEC, TOKENS = InitConfig(layers=2, hidden=64, heads=4, kv_heads=2, ffn=96, vocab=512, window=64), 512


@needs_cuda
def test_blocks_are_page_locked_until_they_are_freed() -> None:
    memory = HostMemory(CARD)
    block, other = memory.zeros(5 << 20, torch.float32), memory.bytes(4097)
    assert block.is_pinned()
    assert other.is_pinned()
    there = torch.randn(5 << 20, device=CARD)
    block.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert block.equal(there.cpu())
    memory.free([other])
    assert not other.is_pinned()
    del memory
    assert not block.is_pinned()
    assert block.equal(there.cpu())


@needs_cuda
def test_a_refused_block_leaves_no_error_to_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save goes on without its copy; CUDA refuses here because the pages are locked already."""
    memory = HostMemory(CARD)
    block = memory.bytes(4096)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "frombuffer", lambda *_, **__: block)
        with pytest.raises(MemoryError, match="CUDA cannot lock 4,096 bytes"):
            memory.bytes(4096)
    assert float((torch.ones(1, device=CARD) + 1).sum()) == 2.0


@pytest.mark.parametrize("narrow", [True, False])
def test_states_on_the_host_are_updated_to_the_bits_of_states_on_the_card(narrow: bool) -> None:
    """narrow: the trained weight is bfloat16 and its master on the host."""
    torch.manual_seed(1)
    size, memory = (5 << 20) + 37, HostMemory(CARD)
    first = torch.randn(size, device=CARD)
    theirs = torch.nn.Parameter(first.clone())
    plain = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    weight = first.to(DTYPE) if narrow else first.clone()
    master = memory.zeros(size, torch.float32).copy_(first) if narrow else weight
    gradient = torch.zeros(size, device=CARD)
    ours = OffloadedAdamW([Offloaded(weight, master, gradient, 0.1)], memory, (0.9, 0.95), 1e-8, piece=1 << 20)
    for _ in range(3):
        gradient.normal_()
        theirs.grad = gradient.clone()
        plain.step()
        ours.step(0.1)
    wait()
    assert master.to(CARD).equal(theirs.data)
    assert weight.equal(theirs.data.to(weight.dtype))
    for kind in ("exp_avg", "exp_avg_sq"):
        assert ours.state[master][kind].to(CARD).equal(plain.state[theirs][kind])


def test_what_is_offloaded_and_recomputed_gives_the_same_gradients_in_less_memory() -> None:
    """Twice each, so that the second step takes over the blocks of the first."""
    base = init_from(SPEC, dtype=DTYPE_NAME).to(CARD)
    ids = torch.randint(SPEC.vocab, (1, TOKENS), generator=torch.Generator().manual_seed(1)).to(CARD)
    found, peaks = [], []
    for offload, keep in ((False, True), (True, True), (True, False)):
        model = LossModel(base, MemoryConfig(offload_activations=offload, keep_attention=keep))
        for _ in range(2):
            base.zero_grad(set_to_none=True)
            if ON_CUDA:
                torch.cuda.reset_peak_memory_stats()
            model(ids, torch.arange(TOKENS, device=CARD), ids.roll(-1, 1)).loss_sum.backward()
        wait()
        peaks.append(torch.cuda.max_memory_allocated() if ON_CUDA else 0)
        # To the host: on the device they would count in the next one's peak.
        found.append([parameter.grad.float().cpu() for parameter in base.parameters() if parameter.grad is not None])
    assert not ON_CUDA or max(peaks[1:]) < 0.75 * peaks[0]
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 0.02  # a card adds up in an order of its own


def test_a_trial_of_the_longest_step_runs_with_the_commands_own_settings() -> None:
    """A small model, half of its optimizer and every layer's input on the host."""
    values = {
        "model": {"init": SPEC, "dtype": DTYPE_NAME, "memory": {"keep_attention": False, "offload_activations": True}},
        "engine": {"offload_optimizer": True, "offload_ratio": 0.5},
        "optim": {"freeze": []},
    }
    trial = run_trial(build(BenchLongestConfig, values, origin="test"), KIND, TOKENS)
    assert trial["fits"], trial
    assert trial["host_gib"] > 0
