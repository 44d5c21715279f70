"""Kernels compute equal blocks, and each says why it cannot be used; asking for it by name is then an error."""

from __future__ import annotations

import logging

import pytest
import torch

from longctx.attention.kernels import KERNELS, Problem, choose, explain, problem_of
from longctx.attention.merge import merge_

CPU = Problem("cpu", torch.float32, 64, 8, 2)
H100 = Problem("cuda", torch.bfloat16, 128, 32, 8, (9, 0))


def block(kernel, dtype, causal, device="cpu", sq=96, sk=96, heads=(4, 2), dim=16):
    """out, lse, dq, dk, dv of one block whose out and lse are 'global': the block merged with another one."""
    make = torch.Generator().manual_seed(3)
    q, dout = (torch.randn(2, heads[0], sq, dim, generator=make, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, heads[1], sk, dim, generator=make, dtype=torch.float64) for _ in range(2))
    k2, v2 = (torch.randn(2, heads[1], 40, dim, generator=make, dtype=torch.float64) for _ in range(2))
    oracle = KERNELS["reference"].forward
    out, lse = oracle(q, k, v, causal=causal, scale=0.3)
    merge_(out, lse, *oracle(q, k2, v2, causal=False, scale=0.3))
    cast = [x.to(device, dtype) for x in (dout, q, k, v, out)]
    kept = lse.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    mine, sums = kernel.forward(*cast[1:4], causal=causal, scale=0.3)
    gradients = kernel.backward(*cast, kept, causal=causal, scale=0.3)
    return [x.cpu().double() for x in (mine, sums, *gradients)]


@pytest.mark.parametrize(("sq", "sk", "causal"), [(96, 96, True), (96, 33, False), (5, 96, False), (1, 1, True)])
def test_the_cpu_kernel_equals_the_reference(sq, sk, causal):
    got = block(KERNELS["torch_cpu"], torch.float64, causal, sq=sq, sk=sk)
    want = block(KERNELS["reference"], torch.float64, causal, sq=sq, sk=sk)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-11


def test_the_reference_takes_long_rows_in_blocks(monkeypatch):
    whole = block(KERNELS["reference"], torch.float64, True)
    monkeypatch.setattr("longctx.attention.reference.ROWS", 7)
    for a, b in zip(block(KERNELS["reference"], torch.float64, True), whole, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_merging_is_stable_for_any_difference_of_lse():
    for gap in (-1e4, -50.0, 0.0, 50.0, 1e4):
        out, lse = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1)
        merge_(out, lse, torch.full((1, 1, 1, 4), 3.0), torch.full((1, 1, 1), gap))
        weight = 1 / (1 + 2.718281828459045 ** -min(max(gap, -700), 700))
        assert torch.allclose(out, torch.full_like(out, 1 + 2 * weight))
        assert torch.isfinite(lse).all()


def test_reasons_are_given_and_the_choice_is_logged_once(caplog):
    reasons = explain(CPU)
    assert reasons["torch_cpu"] == reasons["reference"] == []
    assert any("needs CUDA" in reason for reason in reasons["cudnn"])
    assert any("not installed" in reason for reason in reasons["flash_attn_3"])
    choose.cache_clear()
    with caplog.at_level(logging.INFO, "longctx.attention"):
        assert choose(CPU).name == choose(CPU).name == "torch_cpu"
    assert len(caplog.records) == 1


def test_a_gpu_has_kernels_without_extra_packages():
    reasons = explain(H100)
    assert reasons["torch_flash"] == []
    assert explain(Problem("cuda", torch.bfloat16, 128, 32, 8, (7, 5)))["torch_flash"] != []
    assert "fp16 or bf16" in explain(Problem("cuda", torch.float32, 128, 32, 8, (9, 0)))["torch_flash"][0]
    assert "head dimension" in explain(Problem("cuda", torch.bfloat16, 100, 32, 8, (9, 0)))["torch_flash"][0]


def test_forcing_what_cannot_serve_is_an_error_with_reasons():
    with pytest.raises(ValueError, match="kernel='cudnn' cannot serve: needs CUDA tensors, got cpu"):
        choose(CPU, "cudnn")
    with pytest.raises(ValueError, match="kernel='magic' is not one of"):
        choose(CPU, "magic")
    assert choose(CPU, "reference").name == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [n for n in KERNELS if n not in ("torch_cpu", "reference")])
@pytest.mark.parametrize("causal", [True, False])
def test_gpu_kernels_err_no_more_than_bf16_must(name, causal):
    q = torch.empty(1, 4, 8, 64, dtype=torch.bfloat16, device="cuda")
    if reasons := KERNELS[name].unsupported_reasons(problem_of(q, q[:, :2])):
        pytest.skip("; ".join(reasons))
    shape = {"sq": 256, "sk": 256, "dim": 64}
    want = block(KERNELS["reference"], torch.float64, causal, **shape)
    plain = block(KERNELS["reference"], torch.bfloat16, causal, device="cuda", **shape)
    got = block(KERNELS[name], torch.bfloat16, causal, device="cuda", **shape)
    for a, b, c in zip(got, want, plain, strict=True):
        assert (a - b).square().mean() <= 2.0 * (c - b).square().mean() + 1e-10
