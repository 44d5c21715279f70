"""Saved tensors in host memory: whose memory is used again, and when, and blocks of exact size."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longctx.config.model import MemoryConfig
from longctx.model import LossModel, host, init_from
from longctx.model.host import HostMemory
from longctx.model.offload import HostStore
from tests.model.conftest import gradients, sequence, tiny


def blocks(model: LossModel) -> dict[int, int]:
    """The model's blocks of host memory: bytes by address."""
    assert model._store is not None
    assert model._store._memory is not None
    return {address: block.numel() for address, block in model._store._memory._blocks.items()}


@pytest.mark.parametrize("attention", [True, False])
def test_a_step_takes_over_the_memory_of_the_one_before(attention: bool) -> None:
    model = LossModel(init_from(tiny()), MemoryConfig(offload_activations=True, keep_attention=attention))
    held = []
    for tokens in (96, 96, 64, 96, 128):
        ids, positions, labels = sequence(tokens)
        model(ids, positions, labels).loss_sum.backward()
        with torch.no_grad():  # an evaluation in between saves nothing
            model(ids, positions, labels)
        held.append(blocks(model))
    assert held[0] == held[1] == held[2] == held[3]
    inputs = [96 * 32 * 4] * 2
    kept = [96 * 4 * 16 * 4, 96 * 4 * 4] * 2 if attention else []  # attention output and lse of two layers
    assert sorted(held[0].values()) == sorted(inputs + kept)
    longer = sorted(size * 128 // 96 for size in inputs + kept)  # what is too small goes, what is larger stays in use
    assert all(0 <= size - least < least for size, least in zip(sorted(held[4].values()), longer, strict=True))


def test_a_tensor_without_elements_takes_no_memory() -> None:
    """Nor does the store take its device, a CPU beside a model on a GPU, for that of the tensors to come."""
    store = HostStore()
    with store.layer(first=True):
        empty = torch.empty(0, requires_grad=True) ** 2
        assert store._memory is None
        full = torch.ones(4, requires_grad=True)
        (full**2).sum().backward()
    assert len(store._order) == 1
    (grad,) = torch.autograd.grad(empty.sum(), [empty])
    assert grad.numel() == 0
    assert full.grad is not None
    assert full.grad.tolist() == [2.0] * 4


def test_a_forward_pass_leaves_alone_what_another_backward_needs() -> None:
    """Two forward passes, then one backward through both."""
    found = []
    for offload in (False, True):
        model = LossModel(init_from(tiny()), MemoryConfig(offload_activations=offload))
        outs = [model(*sequence(64, seed=seed)).loss_sum for seed in (1, 2)]
        (outs[0] + 2 * outs[1]).backward()
        found.append(gradients(model.model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_pass_without_a_backward_gives_its_memory_back() -> None:
    model = LossModel(init_from(tiny()), MemoryConfig(offload_activations=True))
    for _ in range(3):
        model(*sequence(64))
        gc.collect()
    held = blocks(model)
    model(*sequence(64)).loss_sum.backward()
    assert blocks(model) == held


def test_a_freed_tensor_and_one_at_its_address_are_two() -> None:
    """As kept products are within a layer: on a CPU each is freed as soon as it has been copied."""
    store, room = HostStore(), bytearray(4000)
    with store.layer(first=True):
        first = torch.frombuffer(room, dtype=torch.float32).fill_(1.0)
        saved, address = store.put(first), first.data_ptr()
        del first
        second = torch.frombuffer(room, dtype=torch.float32).fill_(2.0)
        assert second.data_ptr() == address
        views = [saved, store.put(second), store.put(second[10:])]
    assert [float(store.get(view).mean()) for view in views] == [1.0, 2.0, 2.0]
    assert len(store._order) == 2, "views of one storage share a copy"


def test_products_and_attention_are_offloaded_without_a_bit_changed() -> None:
    """Several times, because it takes a freed address to be given away again to mistake one tensor for another."""
    wanted = None
    for offload in (False, True, True, True):
        memory = MemoryConfig(offload_activations=offload, keep_matmuls=2, ffn_block=24)
        model = LossModel(init_from(tiny()), memory)
        for _ in range(3):
            model(*sequence(96)).loss_sum.backward()
        found = gradients(model.model)
        wanted = wanted or found
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def mapped() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def test_blocks_have_the_size_that_was_asked_for_and_go_with_their_owner() -> None:
    """Not the next power of two, as torch's own allocator of pinned memory takes."""
    before = mapped()
    memory = HostMemory(torch.device("cpu"))
    first, second = memory.zeros((33 << 20) // 4, torch.float32), memory.bytes(33 << 20)
    assert 66 << 20 <= mapped() - before < 80 << 20
    assert first.dtype == torch.float32
    assert not first.any()
    memory.free([second, memory.zeros(0, torch.float32)])  # which torch places at address 0
    del second
    assert mapped() - before < 50 << 20
    del memory
    first += 1  # a tensor outlives the owner
    assert float(first.sum()) == first.numel()
    del first
    gc.collect()
    assert mapped() - before < 16 << 20


def test_host_memory_that_is_not_there_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes of host memory"):
        HostMemory(torch.device("cpu")).bytes(1 << 60)


def test_an_error_that_cuda_keeps_of_a_refused_block_is_taken_by_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on without the block would find it at the next kernel."""
    kernels: list[str] = []

    def launched(*_: object, device: str) -> None:
        kernels.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(host, "_runtime", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    monkeypatch.setattr(torch, "zeros", launched)
    with pytest.raises(MemoryError, match=r"CUDA cannot lock 4,096 bytes .*ulimit -l"):
        HostMemory(torch.device("cuda")).bytes(4096)
    assert kernels == ["cuda"]
