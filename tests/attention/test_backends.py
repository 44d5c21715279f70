"""The GPU backends as far as a CPU shows them: the signatures of this torch's operators, the arguments that the
flash-attn packages get, and which packages count as installed.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from longctx.attention import kernel as kernel_types
from longctx.attention import kernels, reference, torch_kernels
from longctx.attention.kernel import Lengths, Problem, missing_package
from longctx.attention.kernels import KERNELS
from tests.attention.packed_kernel import PackedKernel

H100 = Problem("cuda", torch.bfloat16, 128, 32, 8, (9, 0))


def tensors(device, dtype, tokens=(6, 6), heads=(4, 2), packed=False):
    make = torch.Generator().manual_seed(2)
    shapes = [(1, heads[0], tokens[0], 16), (1, heads[1], tokens[1], 16), (1, heads[1], tokens[1], 16)]
    found = [torch.randn(shape, generator=make, dtype=torch.float64).to(device, dtype) for shape in shapes]
    return [x[0].transpose(0, 1) for x in found] if packed else found


@pytest.mark.parametrize("name", ["cudnn", "torch_flash"])
def test_torchs_operators_have_the_signatures_that_are_called(name):
    """On meta tensors: a missing or misplaced argument fails in the dispatcher, without a GPU."""
    kernel = KERNELS[name]
    q, k, v = tensors("meta", torch.bfloat16)
    out, lse = kernel.forward(q, k, v, causal=True, scale=0.3)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    found = kernel.backward(out, q, k, v, out, lse, causal=True, scale=0.3)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
    if kernel.varlen is None:
        return
    q, k, v = tensors("meta", torch.bfloat16, packed=True)
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    at = Lengths(cu, cu, 128, 128)
    out, lse = kernel.varlen.forward(q, k, v, at, causal=True, scale=0.3)
    assert out.shape == q.shape
    assert lse.shape == (4, 6)
    found = kernel.varlen.backward(out, q, k, v, out, lse, at, causal=True, scale=0.3)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


# Stand-ins with the packages' own parameter lists (flash-attn 4.0.0b36, 3 of the repository's hopper folder, 2.8):
# they compute with the reference, so an argument in the wrong place gives wrong numbers.


def _forward(q, k, v, scale, causal, cu_q=None, cu_k=None, max_q=None, max_k=None):
    if cu_q is not None:
        return PackedKernel().forward(q, k, v, Lengths(cu_q, cu_k, max_q, max_k), causal=causal, scale=scale)
    out, lse = reference.forward(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, scale=scale)
    return out.transpose(1, 2), lse


def _backward(dout, q, k, v, out, lse, scale, causal, cu_q=None, cu_k=None, max_q=None, max_k=None):
    if cu_q is not None:
        at = Lengths(cu_q, cu_k, max_q, max_k)
        return PackedKernel().backward(dout, q, k, v, out, lse, at, causal=causal, scale=scale)
    given = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
    return [x.transpose(1, 2) for x in reference.backward(*given, lse, causal=causal, scale=scale)]


def _write(targets, found):
    for target, part in zip(targets, found, strict=True):
        assert target.is_contiguous()
        target.copy_(part)


def flash_attn_4():
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, return_lse=False,
    ):  # fmt: skip
        assert return_lse
        at = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *_forward(q, k, v, softmax_scale, causal, *at), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, deterministic=False,
    ):  # fmt: skip
        at = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return tuple(_backward(dout, q, k, v, out, lse, softmax_scale, causal, *at))

    return {"flash_attn.cute.interface": locals()}


def flash_attn_3():
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        at = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *_forward(q, k, v, softmax_scale, causal, *at), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert sequed_q is sequed_k is None
        at = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _write((dq, dk, dv), _backward(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, *at))

    return {"flash_attn_interface": locals()}


def flash_attn_2():
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        return *_forward(q, k, v, softmax_scale, causal), None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        at = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *_forward(q, k, v, softmax_scale, causal, *at), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, deterministic) == (0.0, -1, -1, 0.0, False)
        _write((dq, dk, dv), _backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal))

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, deterministic) == (0.0, -1, -1, 0.0, False)
        at = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _write((dq, dk, dv), _backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, *at))

    return {"flash_attn.flash_attn_interface": locals()}


@pytest.mark.parametrize("package", [flash_attn_2, flash_attn_3, flash_attn_4])
def test_the_packages_get_their_arguments_where_they_expect_them(package, monkeypatch):
    for name, names in package().items():
        module = types.ModuleType(name)
        module.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, module)
        for parent in (name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    kernel = KERNELS[package.__name__]
    q, k, v = tensors("cpu", torch.float64)
    dout = torch.randn_like(q)
    want, sums = reference.forward(q, k, v, causal=True, scale=0.3)
    out, lse = kernel.forward(q, k, v, causal=True, scale=0.3)
    assert torch.equal(out, want)
    assert torch.equal(lse, sums)
    gradients = reference.backward(dout, q, k, v, want, sums, causal=True, scale=0.3)
    for a, b in zip(kernel.backward(dout, q, k, v, out, lse, causal=True, scale=0.3), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-14)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    at = Lengths(cu, cu, 128, 128)
    packed = [x[0].transpose(0, 1) for x in (q, k, v, dout)]
    oracle = PackedKernel()
    want, sums = oracle.forward(*packed[:3], at, causal=True, scale=0.3)
    out, lse = kernel.varlen.forward(*packed[:3], at, causal=True, scale=0.3)
    assert torch.equal(out, want)
    assert torch.equal(lse, sums)
    gradients = oracle.backward(packed[3], *packed[:3], want, sums, at, causal=True, scale=0.3)
    found = kernel.varlen.backward(packed[3], *packed[:3], out, lse, at, causal=True, scale=0.3)
    for a, b in zip(found, gradients, strict=True):
        assert torch.equal(a, b)


def test_a_namespace_is_not_an_installed_package(tmp_path, monkeypatch):
    """flash-attn-4 alone makes a folder flash_attn without an __init__.py, which is not flash-attn 2."""
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "interface.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    kernel_types._import_error.cache_clear()
    assert missing_package("flash_attn", run=True) == "the package flash_attn is not installed"
    assert missing_package("flash_attn.cute.interface", run=True) is None
    assert missing_package("flash_attn.cute.nothing", run=False) is not None
    reasons = kernels.explain(H100)
    assert reasons["flash_attn_4"] == []
    assert "the package flash_attn is not installed" in reasons["flash_attn_2"]
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    (folder / "interface.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    kernel_types._import_error.cache_clear()
    (reason,) = kernels.explain(H100)["flash_attn_4"]
    assert reason == (
        "the package flash_attn.cute.interface is installed and cannot be imported (libcudart.so.12: cannot open "
        "shared object file)"
    )
    kernel_types._import_error.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)


def test_heads_wider_than_a_card_can_differentiate_are_refused():
    for name, capability, dim, words in (
        ("torch_flash", (8, 9), 256, "above 192"), ("flash_attn_2", (8, 6), 256, "above 192"),
        ("flash_attn_4", (10, 0), 192, "on Blackwell"),
    ):  # fmt: skip
        reasons = KERNELS[name].unsupported_reasons(Problem("cuda", torch.bfloat16, dim, 8, 8, capability))
        assert any(words in reason for reason in reasons), reasons
    assert kernels.explain(Problem("cuda", torch.bfloat16, 256, 8, 8, (9, 0)))["torch_flash"] == []


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cudnns_backward_of_large_tensors_is_made_in_pieces(monkeypatch, kv_heads):
    """No piece has as many elements as the limit, and fits in memory without gaps; torch's CPU kernel stands in."""
    make = torch.Generator().manual_seed(3)
    q, dout = (torch.randn(2, 40, 4, 16, generator=make).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, 40, kv_heads, 16, generator=make).transpose(1, 2) for _ in range(2))
    out, lse = KERNELS["torch_cpu"].forward(q, k, v, causal=True, scale=0.25)
    largest: list[int] = []

    def once(*tensors, **options):
        largest.append(max(torch_kernels._span(x) for x in tensors))
        assert all(torch_kernels._span(x) == x.numel() for x in tensors[:5])
        return KERNELS["torch_cpu"].backward(*tensors, **options)

    monkeypatch.setattr(torch_kernels, "_cudnn_backward_once", once)
    whole = KERNELS["cudnn"].backward(dout, q, k, v, out, lse, causal=True, scale=0.25)
    assert len(largest) == 1
    for limit, calls in ((q.numel(), 2 * kv_heads), (2 * 40 * 16 + 1, 2 * max(kv_heads, 2)), (2 * 40 * 16, 2 * 4)):
        largest.clear()
        monkeypatch.setattr(torch_kernels, "CUDNN_SPAN", limit)
        parts = KERNELS["cudnn"].backward(dout, q, k, v, out, lse, causal=True, scale=0.25)
        assert len(largest) == calls
        assert max(largest) < limit
        for a, b, x in zip(parts, whole, (q, k, v), strict=True):
            assert a.stride() == x.stride()
            assert torch.allclose(a, b, rtol=0, atol=2e-6)
