"""bench step: the report of a process, the kinds of kernels, and the comparison."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from longctx.bench import step_worker
from longctx.bench.device_time import by_kind, kind_of
from longctx.bench.step import _table, contestants, summary
from longctx.config.base import build
from longctx.config.bench_step import BenchStepConfig

SMALL = {"seq_len": 64, "threads": 1,
         "model": {"layers": 1, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 64}}  # fmt: skip


def measured(capsys, kind: str) -> dict:
    config = build(BenchStepConfig, SMALL, origin="test")
    step_worker.main(json.dumps({"kind": kind, **dataclasses.asdict(config)}))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_both_sides_take_the_same_step(capsys):
    ours, theirs = measured(capsys, "longctx"), measured(capsys, "transformers")
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for side in (ours, theirs):
        assert side["tokens_per_second"] == pytest.approx(64 / side["seconds"])
        assert side["model_tflops"] > 0
        assert side["mfu"] is None  # a CPU's peak is in no table
        assert side["peak_gib"] > 0


def test_ratios_are_to_each_of_the_others():
    config = build(BenchStepConfig, SMALL, origin="test")
    assert contestants(config) == ["longctx", "transformers"]  # no GPU here, so no liger-kernel
    assert contestants(dataclasses.replace(config, only="longctx")) == ["longctx"]

    def side(speed: float, gib: float) -> dict:
        return {"tokens_per_second": speed, "peak_gib": gib, "seconds": 1.0, "cpu_seconds": 1.0, "loss": 2.0,
                "device": "card", "model_tflops": speed, "share_in_products_and_attention": 0.9}  # fmt: skip

    report = summary({"transformers": [side(100, 8)], "liger": [side(120, 4)], "longctx": [side(150, 2)]}, config)
    assert (report["speed_ratio"], report["memory_ratio"]) == (1.5, 0.25)
    assert (report["speed_ratio_liger"], report["memory_ratio_liger"]) == (1.25, 0.5)
    assert "longctx / liger" in _table(report)
    assert "90% of it in products and attention" in _table(report)
    full = {"out_of_memory": "CUDA out of memory.", "device": "card"}
    report = summary({"transformers": [full], "liger": [side(120, 4)], "longctx": [side(150, 2)]}, config)
    assert "speed_ratio" not in report
    assert report["speed_ratio_liger"] == 1.25
    assert "transformers  out of memory" in _table(report)
    assert "speed_ratio_liger" not in summary({"liger": [side(120, 4)], "longctx": [full]}, config)
    broken = {"failed": "ImportError: no kernel for this card"}
    report = summary({"longctx": [side(150, 2)], "transformers": [side(100, 8)], "liger": [broken]}, config)
    assert (report["device"], report["speed_ratio"], "speed_ratio_liger" in report) == ("card", 1.5, False)
    assert "liger         ImportError: no kernel for this card" in _table(report)


def test_a_side_that_does_not_fit_is_an_answer(monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")

    monkeypatch.setattr(step_worker, "measured", full)
    assert measured(capsys, "transformers")["out_of_memory"] == "CUDA out of memory. Tried to allocate 20 GiB."


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensor", "attention"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute", "products"),
        ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<...>>", "rest"),
        ("_rms_norm_forward_kernel", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, kind):
    assert kind_of(kernel) == kind


def test_seconds_add_up_by_kind():
    found = by_kind([("nvjet_a", 2e6), ("flash_fwd", 1e6), ("copy", 5e5), ("nvjet_b", 1e6)])
    assert found == {"products": 3.0, "attention": 1.0, "rest": 0.5}
