"""The package ring_flash_attn on real ranks: the same tokens, results and gradients as longctx's ring, and more bytes.

Its kernel needs a GPU, so longctx's kernels answer the two functions of flash-attn 2 that it calls. Ring, merging and
zigzag bookkeeping are the package's own.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from longctx.attention.kernels import KERNELS
from longctx.bench import ring_flash
from longctx.layout import SequenceLayout
from tests.dist.ranks import run_ranks
from tests.dist.ring_flash import Heads, Sent, check_bfloat16, check_parity, check_sent

pytestmark = pytest.mark.skipif(ring_flash.missing() is not None, reason="the extra dev brings ring-flash-attn")

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
HEADS = [Heads(8, 8, "torch_cpu"), Heads(8, 2, "torch_cpu"), Heads(8, 1, "reference")]


def sent(world: int) -> list[Sent]:
    """The rows for `world` ranks in the documentation's table of bytes beside the package."""
    found = re.findall(r"^\| (\d) x (\d) \| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", DOCS.read_text(), re.M)
    rows = []
    for nodes, ranks, ring, forward, backward, total, tensors, between in found:
        if int(nodes) * int(ranks) == world:
            rows.append(Sent(int(nodes), ring, int(forward), int(backward), int(tensors), int(between)))
            assert int(total) == int(forward) + int(backward)
    return rows


@pytest.mark.parametrize("world", [2, 4])
def test_both_rings_equal_dense_attention(world: int, tmp_path: Path) -> None:
    failures = run_ranks(world, check_parity, HEADS, tmp_path / "store", timeout=120)
    assert not failures, failures


def test_in_bfloat16_longctx_errs_no_more_than_the_package(tmp_path: Path) -> None:
    failures = run_ranks(2, check_bfloat16, [1024], tmp_path / "store", timeout=120)
    assert not failures, failures


@pytest.mark.parametrize(("world", "rows"), [(2, 2), (4, 3), (8, 4)])
def test_the_documented_bytes_are_sent(world: int, rows: int, tmp_path: Path) -> None:
    assert len(sent(world)) == rows
    failures = run_ranks(world, check_sent, sent(world), tmp_path / "store", timeout=120)
    assert not failures, failures


def chunks(tokens: np.ndarray, count: int, *taken: int) -> np.ndarray:
    return np.concatenate([np.split(tokens, count)[number] for number in taken])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_layouts_that_hold_the_same_tokens(world: int) -> None:
    """The package's functions expect these tokens; docs/attention.md names the layouts."""
    tokens, documents = np.arange(64), np.array([0, 32, 64])
    for rank in range(world):
        zigzag, whole = chunks(tokens, 2 * world, rank, 2 * world - 1 - rank), chunks(tokens, world, rank)
        for boundaries in (None, documents):
            layouts = [SequenceLayout(64, world, kind=kind, boundaries=boundaries) for kind in ("zigzag", "contiguous")]
            assert layouts[0].indices(rank).tolist() == zigzag.tolist()  # zigzag_ring_flash_attn_func
            assert layouts[1].indices(rank).tolist() == whole.tolist()  # ring_flash_attn_func, llama3_flash_attn_...


def test_the_package_calls_flash_attn_2_itself_where_that_is_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = ring_flash._interface(KERNELS["reference"])
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, ring_flash.INTERFACE, interface)
    called = {name: ring_flash.zigzag(KERNELS[name]).__globals__ for name in ("flash_attn_2", "reference")}
    assert called["flash_attn_2"]["_flash_attn_forward"] is interface._flash_attn_forward
    assert called["reference"]["_flash_attn_forward"] is not interface._flash_attn_forward
    assert sys.modules[ring_flash.INTERFACE] is interface


def test_the_package_itself_cannot_be_imported_beside_this_transformers() -> None:
    """If this fails, the package has become importable, and docs/attention.md and ring_flash.py can say so."""
    interface = ring_flash._interface(KERNELS["reference"])
    interface.__dict__.update(_flash_attn_varlen_forward=None, _flash_attn_varlen_backward=None)
    modules = {"flash_attn": ModuleType("flash_attn"), ring_flash.INTERFACE: interface}
    try:
        with (
            ring_flash._importable(modules),
            pytest.raises(ImportError, match="is_flash_attn_greater_or_equal_2_10.*modeling_flash_attention_utils"),
        ):
            import_module(ring_flash.PACKAGE)
    finally:
        for name in [name for name in sys.modules if name.startswith(ring_flash.PACKAGE)]:
            del sys.modules[name]
