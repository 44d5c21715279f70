"""The main job with shortened stages: everything a user is promised lies in the run's folder and loads."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.started import SHORT, longctx


def test_the_summary_has_every_figure(quickstart):
    summary = json.loads((quickstart / "summary.json").read_text())
    for name in ("base", "theta_only", "control", "extended", "sibling", "merged", "unseen"):
        assert set(summary["needle"][name]) == {"512", "2048"}
    assert summary["needle"]["base"]["512"] > 0.9
    assert summary["needle"]["base"]["2048"] <= 0.2
    assert summary["theta"] == {"s2048": 154243, "s8192": 2379094}
    assert list(summary["loss_by_stage"]) == ["base", "s2048", "s8192"]
    assert all(math.isfinite(value) for losses in summary["loss"].values() for value in losses.values())
    assert summary["adapter"]["rank"] > 0
    assert summary["adapter"]["bytes"] > 0
    assert set(summary["behaviour"]) == {"base", "sibling", "merged", "extended"}
    assert summary["versions"]["torch"] == torch.__version__


def test_the_last_words_say_what_happened_and_where_the_picture_is(quickstart):
    spoken = (quickstart.parent / "stderr.txt").read_text()
    assert str(quickstart / "eval" / "needle.png") in spoken.splitlines()[-1]
    assert "merged into a sibling" in spoken
    assert "Traceback" not in spoken
    assert (quickstart / "eval" / "needle.png").stat().st_size > 20_000


@pytest.mark.parametrize(("stage", "theta"), [("s2048", 154243), ("s8192", 2379094)])
def test_exports_load_in_plain_transformers_with_theta_and_window(quickstart, stage, theta):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = quickstart / "stages" / stage / "model"
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
    adapted = PeftModel.from_pretrained(base, str(quickstart / "adapter"))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    merged = json.loads((quickstart / "merged" / "config.json").read_text())
    assert merged["rope_theta"] == 2379094
    assert merged["max_position_embeddings"] == 8192


def test_the_same_command_again_does_nothing_twice(quickstart):
    before = (quickstart / "metrics.jsonl").read_text()
    grid = (quickstart / "eval" / "extended.json").stat().st_mtime_ns
    done = longctx("train", "experiment=quickstart", f"run_dir={quickstart}", *SHORT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (quickstart / "metrics.jsonl").read_text() == before
    assert (quickstart / "eval" / "extended.json").stat().st_mtime_ns == grid


def test_a_changed_identity_is_refused_with_the_key(quickstart):
    done = longctx("train", "experiment=quickstart", f"run_dir={quickstart}", *SHORT, "seed=7")
    assert done.returncode == 2
    assert "seed was 0, now 7" in done.stderr
    assert "Traceback" not in done.stderr
