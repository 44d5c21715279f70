"""bench attention beside=ring_flash_attn: both rings take turns on two gloo ranks; the table, the floors, refusals."""

from __future__ import annotations

import json
from statistics import median

import pytest

from longctx.bench import attention, attention_rings, gpu_check, gpu_parts, ring_flash
from longctx.bench.gpu_parts import PARTS
from longctx.cli import main
from longctx.config.bench import BenchAttentionConfig
from longctx.errors import UserError
from tests.dist.ranks import CONTEXT

WORDS = ["bench", "attention", "beside=ring_flash_attn"]
RINGS = next(part for part in PARTS if part.name == "rings")


@pytest.mark.skipif(ring_flash.missing() is not None, reason="the extra dev brings ring-flash-attn")
def test_two_rings_take_turns_on_the_same_ranks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("longctx.bench.workers.mp.get_context", lambda method: CONTEXT)
    small = ["lengths=[256]", "heads=4", "kv_heads=2", "head_dim=16", "repeats=2", "device=cpu", "documents=[]"]
    assert main([*WORDS, *small, f"out={tmp_path}"]) == 0
    assert "ring of ring_flash_attn over the same kernel" in capsys.readouterr().out
    document = json.loads((tmp_path / "attention.json").read_text())
    assert (document["device"], document["ranks"]) == ("cpu", 2)
    (row,) = document["rows"]
    assert (row["length"], row["backend"]) == (256, "torch_cpu")
    assert {side: len(turns) for side, turns in row["samples"].items()} == {"ring_flash_attn": 2, "longctx": 2}
    theirs, ours = (median(row["samples"][side]) for side in ("ring_flash_attn", "longctx"))
    assert row["ratio"] == pytest.approx(theirs / ours, rel=1e-2)
    assert all(row["cpu_seconds"][side] > 0 for side in row["samples"])
    block = 2 * 128 * 2 * 16 * 2  # k and v of a rank in bytes
    assert row["sent"] == {
        "ring_flash_attn": {"bytes": 6 * block, "tensors": 8},
        "longctx": {"bytes": 4 * block, "tensors": 3},
    }
    assert set(row["difference"]) == {"out", "dq", "dk", "dv"}
    for parts in row["difference"].values():
        assert parts["rms"] < 0.02  # bfloat16
        assert parts["rms"] <= parts["largest"]
    assert [held.holds for held in RINGS.read(tmp_path)] == [None, True]


@pytest.mark.skipif(ring_flash.missing() is not None, reason="the extra dev brings ring-flash-attn")
@pytest.mark.parametrize(
    ("word", "message"),
    [("dtype=float32", "its gradients would be wrong"), ("ranks=1", "a ring needs two ranks or more"),
     ("lengths=[1022]", "1022 is not divisible by 2 x ranks = 4"), ("backends=[cudnn]", "cudnn cannot serve")],
)  # fmt: skip
def test_what_the_package_cannot_do_is_refused_before_ranks_start(word, message, capsys):
    assert main([*WORDS, "device=cpu", word]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("longctx: ")


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ring_flash, "PACKAGE", "ring_flash_attn_of_nobody")
    with pytest.raises(UserError, match=r"beside=ring_flash_attn: .* is not installed; `pip install ring-flash-attn`"):
        attention.run(BenchAttentionConfig(beside="ring_flash_attn"))


def test_the_kernels_are_the_packages_own_and_the_fastest(monkeypatch):
    """On a Hopper with flash-attn 2 and cuDNN the comparison is made on both."""
    from longctx.attention.kernels import KERNELS

    found = [KERNELS[name] for name in ("cudnn", "flash_attn_2", "torch_flash")]
    monkeypatch.setattr("longctx.bench.attention_virtual.backends", lambda *_: (found, {}))
    assert attention_rings.kernel_names(BenchAttentionConfig(), "cuda") == ["cudnn", "flash_attn_2"]
    monkeypatch.setattr("longctx.bench.attention_virtual.backends", lambda *_: (found[2:], {}))
    assert attention_rings.kernel_names(BenchAttentionConfig(), "cuda") == ["torch_flash"]


def test_a_difference_is_a_share_of_the_whole_results_rms():
    found = attention_rings.difference([(4.0, 90.0, 2.0, 10), (0.0, 310.0, 0.0, 15)])
    assert found == {"rms": pytest.approx(0.1), "largest": pytest.approx(0.5)}


def figures(ratio: float, **rms: float) -> dict:
    sides = ("longctx", "ring_flash_attn")
    one = {
        "length": 65536, "backend": "cudnn", "ratio": ratio, "gflops": dict.fromkeys(sides, 3e5),
        "difference": {name: {"rms": rms.get(name, 0.003), "largest": 0.1} for name in ("out", "dq", "dk", "dv")},
        "sent": {side: {"bytes": 2**30, "tensors": 9} for side in sides},
    }  # fmt: skip
    return {"ranks": 4, "rows": [one, {**one, "length": 16384}]}


def test_gpu_check_holds_speed_and_results_against_the_package(tmp_path):
    held = {}
    for name, document in (
        ("good", figures(1.05)), ("slow", figures(0.98)), ("apart", figures(1.05, dk=0.03)),
        ("nan", figures(1.05, dv=float("nan"))),
    ):  # fmt: skip
        (tmp_path / "attention.json").write_text(json.dumps(document))
        rows = RINGS.read(tmp_path)
        held[name] = [row.holds for row in rows]
    assert held == {
        "good": [True, True, None, True], "slow": [False, True, None, True], "apart": [True, False, None, False],
        "nan": [True, False, None, False],
    }  # fmt: skip
    assert rows[1].note.startswith("dv; ")
    text = gpu_check.as_text("NVIDIA H200", {}, rows)
    assert "speed beside ring_flash_attn, 4 NCCL ranks, 65,536 tokens (cudnn)" in text
    assert "300 TFLOP/s" in text
    assert "a rank sends 1024 MiB, theirs 1024 MiB" in text


def test_gpu_check_skips_the_part_where_the_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_parts, "find_spec", lambda name: None)
    (row,) = gpu_check.run_part(RINGS, tmp_path, float("inf"))
    assert row.skipped == "not installed: ring_flash_attn"
    words = RINGS.command(tmp_path)
    assert words[1:5] == ["-m", "longctx", *WORDS[:2]]
    assert {"beside=ring_flash_attn", "ranks=4", "lengths=[16k,64k]"} <= set(words)
