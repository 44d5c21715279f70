"""The quickstart: the run's folder has every file that the documentation promises, and they load."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.started import longctx


def test_the_summary_has_every_figure(quickstart):
    summary = json.loads((quickstart.folder / "summary.json").read_text())
    for name in ("base", "theta_only", "control", "extended", "sibling", "merged", "unseen"):
        assert set(summary["needle"][name]) >= {"512", "2048"}
    assert summary["needle"]["base"]["512"] > 0.9
    assert summary["needle"]["base"]["2048"] <= 0.2
    assert summary["theta"] == {"s2048": 154243, "s8192": 2379094}
    assert list(summary["loss_by_stage"]) == ["base", "s2048", "s8192"]
    assert all(math.isfinite(value) for losses in summary["loss"].values() for value in losses.values())
    assert summary["adapter"]["rank"] > 0
    assert summary["adapter"]["bytes"] > 0
    assert set(summary["behaviour"]) == {"base", "sibling", "merged", "extended"}
    assert summary["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("stage", "theta"), [("s2048", 154243), ("s8192", 2379094)])
def test_exports_load_in_plain_transformers_with_theta_and_window(quickstart, stage, theta):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = quickstart.folder / "stages" / stage / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == theta
    assert model.config.max_position_embeddings == int(stage[1:])
    expected = 1.0 / theta ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    assert torch.allclose(model.model.rotary_emb.inv_freq, expected, rtol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("pass key 123456")["input_ids"], skip_special_tokens=True) == "pass key 123456"


def test_the_adapter_loads_in_peft_and_carries_theta(quickstart):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from longctx.assets import tiny_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    adapted = PeftModel.from_pretrained(base, str(quickstart.folder / "adapter"))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    merged = json.loads((quickstart.folder / "merged" / "config.json").read_text())
    assert merged["rope_theta"] == 2379094
    assert merged["max_position_embeddings"] == 8192


def test_the_same_command_again_does_nothing_twice(quickstart):
    folder = quickstart.folder
    before = (folder / "metrics.jsonl").read_text()
    grid = (folder / "eval" / "extended.json").stat().st_mtime_ns
    done = longctx("train", "experiment=quickstart", f"run_dir={folder}", *quickstart.overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "metrics.jsonl").read_text() == before
    assert (folder / "eval" / "extended.json").stat().st_mtime_ns == grid
    assert str(folder / "eval" / "needle.png") in done.stderr.splitlines()[-1]
    assert "merged into a sibling" in done.stderr
    assert (folder / "eval" / "needle.png").stat().st_size > 20_000


def test_a_changed_identity_is_refused_with_the_key(quickstart):
    done = longctx("train", "experiment=quickstart", f"run_dir={quickstart.folder}", *quickstart.overrides, "seed=7")
    assert done.returncode == 2
    assert "seed was 0, now 7" in done.stderr
    assert "Traceback" not in done.stderr
