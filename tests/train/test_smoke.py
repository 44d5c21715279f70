"""`smoke=true`: every length is tried for two steps first, and the run that follows is the run without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longctx.curriculum import LearningRate
from longctx.decide import Decision
from longctx.errors import RunFailed
from longctx.run import smoke
from longctx.run.smoke import smoke_config
from longctx.run.train import run as whole_run
from longctx.train.train import resolve_stages

from .made import config, losses


def decision(cp: int, dp: int, per_group: int, per_forward: int) -> Decision:
    return Decision(cp, dp, 1, "flat_ring", 1, per_group, per_forward)


@pytest.mark.parametrize(
    ("decided", "batch"),
    [(decision(1, 4, 1, 1), 4), (decision(2, 2, 8, 1), 4), (decision(1, 2, 8, 3), 12), (decision(8, 1, 16, 2), 4)],
    ids=["one each", "accumulates twice", "two whole micro-batches", "one group"],
)
def test_a_stage_is_tried_with_the_run_s_micro_batch_and_an_accumulation(tmp_path: Path, decided: Decision, batch: int):
    lr = {"peak": 3.0e-3, "warmup_steps": 100, "kind": "cosine", "final": 1e-5}
    stages = {"s64": {"seq_len": 64, "theta": 1e4, "tokens": 1e6, "batch_tokens": 4096, "lr": lr}}
    made = config(tmp_path / "run", tmp_path, curriculum={"stages": stages, "only": ["s64"]}, accept=["disk"])
    own = smoke_config(made, tmp_path / "run/smoke", list(zip(resolve_stages(made), [decided], strict=True)))
    (stage,) = resolve_stages(own)
    assert (stage.steps, stage.batch) == (2, batch)
    assert stage.batch % (decided.dp * decided.per_forward) == 0 or decided.per_forward > decided.per_group
    assert stage.lr == LearningRate(3.0e-3, 3.0e-3, 0, "constant", 0, 2)
    assert own.parallel.cp_by_stage == {"s64": decided.cp}
    assert own.cache == str(tmp_path / "run/data")  # the run's own tokens
    assert not own.smoke
    assert not own.after_training.lora.enabled


def test_a_curriculum_that_trains_can_be_tried(tmp_path: Path):
    """A rate that goes on from the stage before, and a theta file that also names a stage that is not run."""
    stages = {
        "s64": {"seq_len": 64, "steps": 5, "batch": 4, "lr": {"peak": 2e-3, "kind": "cosine"}},
        "s128": {"seq_len": 128, "steps": 5, "batch": 4, "lr": {"kind": "continue"}},
        "s256": {"seq_len": 256, "theta": 9e4, "steps": 5, "batch": 4, "lr": {"peak": 1e-3}},
    }
    found = tmp_path / "found.yaml"
    found.write_text("stages: {s64: {theta: 20000}, s128: {theta: 40000}, s256: {theta: 90000}}")
    curriculum = {"lr": {}, "stages": stages, "only": ["s64", "s128"], "theta_file": str(found)}
    made = config(tmp_path / "run", tmp_path, curriculum=curriculum)
    planned = resolve_stages(made)
    own = smoke_config(made, tmp_path / "run/smoke", [(stage, decision(1, 1, 4, 1)) for stage in planned])
    tried = resolve_stages(own)
    assert [(stage.name, stage.theta, stage.steps) for stage in tried] == [("s64", 2e4, 2), ("s128", 4e4, 2)]
    assert [stage.lr for stage in tried] == [LearningRate(2e-3, 2e-3, 0, "constant", 0, 2)] * 2


def test_the_run_after_its_smoke_is_the_run_without(tmp_path: Path, documents: Path, undisturbed: Path, capsys):
    made = config(tmp_path / "run", documents, smoke=True)
    assert whole_run(made) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("smoke: ")]
    assert [line.split(":")[1].split(",")[0].strip() for line in said] == ["s64", "s128"]
    assert not (tmp_path / "run/smoke").exists()
    assert losses(tmp_path / "run") == losses(undisturbed)

    (tmp_path / "run/latest.json").unlink()  # as a kill may leave the first checkpoint
    assert whole_run(made) == 0  # finished: its lengths are not tried again
    assert "its lengths have been tried" in capsys.readouterr().err


def test_what_fails_at_the_longest_fails_before_the_first_step_of_the_run(tmp_path: Path, documents: Path, monkeypatch):
    from longctx.train.replicated import ReplicatedEngine

    norm = ReplicatedEngine.grad_norm
    calls: list[torch.Tensor] = []

    def third_is_nan(engine: ReplicatedEngine) -> torch.Tensor:
        calls.append(norm(engine))
        return calls[-1] * torch.nan if len(calls) == 3 else calls[-1]

    monkeypatch.setattr(ReplicatedEngine, "grad_norm", third_is_nan)
    with pytest.raises(RunFailed, match="gradient norm=nan"):
        whole_run(config(tmp_path / "run", documents, smoke=True))
    assert len(calls) == 3  # two steps of s64 and one of s128
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_last_step_without_loss_is_shown_too(tmp_path: Path, capsys) -> None:
    """Of conversations whose replies alone carry loss, a batch may have none; what passed must not fail in its line."""
    row = {"stage": "s64", "seq_len": 64, "cp": 1, "dp": 1, "seconds": {"step": 1.0}, "step_tokens": 64,
           "memory_gib": 1.0, "loss": None}  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    smoke._show(tmp_path)
    assert "1.00 GiB a rank, no token with loss" in capsys.readouterr().err
