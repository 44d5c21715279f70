"""A stage that does not fit the memory is refused before a rank starts, with settings that do make it fit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from longctx.config.base import build
from longctx.config.train import TrainConfig
from longctx.decide import Machines
from longctx.errors import UserError
from longctx.planner.memory import stage_memory, trained_weights
from longctx.planner.remedies import DeviceLimits, check_memory, lower, needs, remedies
from longctx.run.training import train_run
from longctx.shape import shape_of_model
from longctx.train import machine
from longctx.train.runfolder import with_dtype
from longctx.train.train import resolve_stages

from .made import config

GIB = 2**30
LLAMA_8B = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 128256, "window": 8192,
            "theta": 500000}  # fmt: skip
HUGE = {**LLAMA_8B, "layers": 640}  # 2.2 TiB in float32 with its optimizer


def values(seq_len: int, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "x", "model": {"init": LLAMA_8B, "tokenizer": "none", "dtype": "bfloat16"},
        "data": {"sources": {"text": {"kind": "text", "path": "docs"}}, "mixes": {"default": {"text": 1.0}}},
        "curriculum": {"lr": {"peak": 1e-3}, "scratch": True,
                       "stages": {"short": {"seq_len": 8192, "theta": 5e5, "steps": 2, "batch": 8},
                                  "long": {"seq_len": seq_len, "theta": 5e5, "steps": 2, "batch": 8}}},
        "after_training": {"lora": {"enabled": False}},
    }  # fmt: skip
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = {**made[key], **value} if both else value
    return made


def changed(made: dict[str, Any], way: str) -> dict[str, Any]:
    """The config with the overrides of a remedy, as a user would type them."""
    for word in way.split():
        key, value = word.split("=")
        *path, last = key.split(".") if key != "engine" else ["engine", "name"]
        inner = made
        for name in path:
            inner[name] = inner = dict(inner.get(name, {}))
        inner[last] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    return made


def room(world: int, device: str, gib: float, host: float | None = None) -> DeviceLimits:
    kernel = "cudnn" if device == "cuda" else "torch_cpu"
    return DeviceLimits(Machines(world, min(world, 8)), device, kernel, gib * GIB, host and host * GIB)


CASES = [
    (262144, {}, room(8, "cuda", 79, 2000)),
    (1048576, {"engine": {"name": "deepspeed", "zero": 3}}, room(8, "cuda", 79, 2000)),
    (524288, {"model": {"memory": {"keep_matmuls": 32}}, "engine": {"name": "deepspeed", "zero": 3}},
     room(8, "cuda", 79, 2000)),
    (262144, {"model": {"memory": {"activation_checkpointing": False}}, "engine": {"name": "deepspeed", "zero": 3}},
     room(8, "cuda", 79, 2000)),
    (32768, {}, room(1, "cuda", 139, 2000)),
    (65536, {}, room(8, "cpu", 64)),
    (131072, {"engine": {"name": "deepspeed", "zero": 3}, "parallel": {"seq_len_per_rank": 2**17}}, room(8, "cpu", 64)),
]  # fmt: skip


@pytest.mark.parametrize(("seq_len", "changes", "here"), CASES)
def test_what_is_advised_does_fit(seq_len, changes, here):
    def parts(made: dict[str, Any]) -> tuple[Any, ...]:
        built = with_dtype(build(TrainConfig, made, origin="test"))
        return resolve_stages(built), shape_of_model(built.model), built

    made = values(seq_len, **changes)
    with pytest.raises(UserError, match=r"stage (short|long) of [\d,]+ tokens needs about [\d.e+]+ GiB") as refused:
        check_memory(*parts(made), here)
    assert "accept=[memory]" in str(refused.value)
    ways = remedies(*parts(made), here)
    assert 1 <= len(ways) <= 3
    tried = 0
    for way in ways:
        assert way in str(refused.value)
        if "=" in way and not way.startswith("'"):
            check_memory(*parts(changed(values(seq_len, **changes), way)), here)
            tried += 1
        elif more := re.match(r"(\d+) times as many nodes", way):
            machines = Machines(here.machines.world * int(more[1]), here.machines.ranks_per_node)
            check_memory(
                *parts(made), DeviceLimits(machines, here.device, here.kernel, here.device_bytes, here.host_bytes)
            )
    assert tried


@pytest.mark.parametrize(
    ("ffn", "vocab", "smaller"),
    [(1024, 2**20, "model.memory.loss_chunk=128"), (65536, 512, "model.memory.ffn_block=512")],
)
def test_block_sizes_left_to_the_device_can_be_lowered(ffn: int, vocab: int, smaller: str):
    """On a GPU ffn_block=auto is 8192 and loss_chunk=auto 4096: a smaller one is named where it holds the most."""
    wide = {"layers": 1, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": ffn, "vocab": vocab, "window": 64}
    model = {"init": wide, "tokenizer": "none"}
    built = with_dtype(build(TrainConfig, values(65536, model=model), origin="test"))
    stages, shape = resolve_stages(built), shape_of_model(built.model)
    named = [text for text, _ in lower(stages[-1], shape, built, room(1, "cuda", 79), limit=99)]
    assert smaller in named


def test_a_share_of_the_optimizer_on_the_host_can_become_all_of_it():
    """DeepSpeed takes no share, so a remedy with it sets the ratio too."""
    made = values(65536, engine={"offload_optimizer": True, "offload_ratio": 0.25})
    built = with_dtype(build(TrainConfig, made, origin="test"))
    stages, shape, limits = resolve_stages(built), shape_of_model(built.model), room(8, "cuda", 79)
    named = [text for text, _ in lower(stages[-1], shape, built, limits, limit=99)]
    assert "engine.offload_optimizer=true engine.offload_ratio=1" in named
    assert any(text.startswith("engine=deepspeed engine.offload_ratio=1 engine.zero=3") for text in named)
    ways = [way for way in remedies(stages, shape, built, limits) if "engine" in way]
    assert ways
    for way in ways:
        fitting = with_dtype(build(TrainConfig, changed(dict(made), way), origin="test"))
        check_memory(resolve_stages(fitting), shape, fitting, limits)


def test_host_memory_bounds_what_is_offloaded():
    made = values(1048576, engine={"name": "deepspeed", "zero": 3}, model={"memory": {"offload_activations": True}})
    built = with_dtype(build(TrainConfig, made, origin="test"))
    stages, shape = resolve_stages(built), shape_of_model(built.model)
    check_memory(stages, shape, built, room(8, "cuda", 79, 2000))
    with pytest.raises(UserError, match=r"stage long .* on each node beside its devices \(what is offloaded\)"):
        check_memory(stages, shape, built, room(8, "cuda", 79, 200))


def test_a_run_that_does_not_fit_is_refused_before_it_exists(tmp_path: Path, documents: Path) -> None:
    model = {"init": HUGE, "tokenizer": "none"}
    huge = config(tmp_path / "run", documents, model=model, launch={"nproc": 2}, accept=["disk"])
    with pytest.raises(UserError, match=r"(?s)stage s64 of 64 tokens needs about .* GiB on each rank \(optimizer"):
        train_run(huge)
    assert not (tmp_path / "run").exists()
    accepted = with_dtype(config(tmp_path / "run", documents, model=model, accept=["memory"]))
    machine.check_machine(accepted, resolve_stages(accepted), 2, 2)  # nothing is said


def test_a_stage_behind_the_end_of_a_start_gets_a_line_and_asks_for_the_room_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which says what other processes hold of a GPU. accept=[memory] leaves the line out, too."""
    made = with_dtype(build(TrainConfig, values(1048576, launch={"until": "short"}), origin="test"))
    asked: list[Machines] = []
    monkeypatch.setattr(machine, "room_here", lambda own, *_: asked.append(own) or room(own.world, "cpu", 250))
    short, long = resolve_stages(made)
    machine.check_machine(made, [short], 1, 1, later=[long])
    said = " ".join(capsys.readouterr().err.split())
    assert "behind launch.until=short, which ends this start: stage long of 1,048,576 tokens needs about" in said
    assert len(asked) == 1
    machine.check_machine(dataclasses.replace(made, accept=["memory"]), [short], 1, 1, later=[long])
    assert not capsys.readouterr().err


def test_a_small_run_is_far_from_being_refused(tmp_path: Path) -> None:
    small = with_dtype(config(tmp_path / "run", tmp_path / "docs"))
    stages, shape = resolve_stages(small), shape_of_model(small.model)
    here = machine.room_here(Machines(2, 2), "cpu", "torch_cpu")
    assert 0.25 * GIB < here.device_bytes <= machine.host_memory() / 2
    assert max(memory.total for memory in needs(stages, shape, small, here)) < 0.05 * GIB


def test_frozen_weights_have_no_optimizer() -> None:
    from longctx.config.model import InitConfig
    from longctx.model import init_from
    from longctx.train.parameters import freeze, trainable

    for tied in (False, True):
        spec = InitConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64, tie_embeddings=tied)
        shape = shape_of_model(build(TrainConfig, values(8192, model={"init": vars(spec)}), origin="test").model)
        for patterns in ([], ["*embed_tokens*"], ["*embed_tokens*", "*lm_head*"] if not tied else [], ["*.layers.1.*"]):
            from longctx.config.model import MemoryConfig
            from longctx.model import LossModel

            model = LossModel(init_from(spec), MemoryConfig())
            freeze(model, patterns)
            count = sum(parameter.numel() for _, parameter in trainable(model))
            assert trained_weights(shape, patterns) == count
            memory = stage_memory(
                shape, MemoryConfig(), tokens=8, dtype="float32", zero=0, world=1, ring=0.0, trained=count
            )
            assert (memory.optimizer, memory.gradients) == (8 * count, 4 * count)
