"""bench longest: the search, trials of a tiny model under a memory limit, stored trials, and the plan beside them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.bench import longest
from longctx.bench.longest import Trials, measured, run_trial, search
from longctx.bench.longest_plan import Prediction, predict, training_config
from longctx.cli import main
from longctx.config.base import build
from longctx.config.bench_longest import BenchLongestConfig
from longctx.config.compose import compose
from longctx.config.groups import config_dir, header
from longctx.config.plan import PlanConfig
from longctx.decide import Machines, planned_kernel, with_blocks
from longctx.errors import RunFailed
from longctx.planner.remedies import GIB, DeviceLimits
from longctx.planner.run import planned
from longctx.shape import shape_of_model
from longctx.train.runfolder import to_dict

# Wide and shallow: memory grows with the length, and attention costs next to nothing.
WIDE = {"layers": 1, "hidden": 256, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64, "vocab": 64}


def config(**changes: Any) -> BenchLongestConfig:
    values = {"model": {"init": WIDE, "dtype": "float32"}, "engine": {"name": "ddp"}, "multiple": 256, "threads": 1}
    return build(BenchLongestConfig, {**values, **changes}, origin="test")


@settings(max_examples=300)
@given(
    st.integers(0, 400),
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(1, 300),
    st.sampled_from([0.001, 0.02, 0.3]),
)
def test_the_search_ends_between_a_length_that_fits_and_one_that_does_not(limit, start, multiple, most, precision):
    """limit: the longest length that fits, in units of the search's multiple; a fraction lies between two multiples."""
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        assert length not in tried[:-1], "a length was tried twice"
        return length <= limit * multiple

    low, high = search(fits, start * multiple, multiple=multiple, most=most * multiple, precision=precision)
    assert all(multiple <= length <= most * multiple and length % multiple == 0 for length in tried)
    if limit == 0:
        assert (low, high) == (None, multiple)
    elif low == most * multiple:
        assert limit >= most
    else:
        assert low is not None
        assert high is not None
        assert low <= limit * multiple < high
        assert high - low <= max(multiple, precision * low)
    assert len(tried) <= 60


@pytest.mark.slow  # two real processes of some seconds each
def test_a_limit_is_found_and_holds(tmp_path):
    """The length that was found runs, the next one does not, and the report lists the memory by phase."""
    made = config(memory_gib=0.6, start=16384, multiple=16384, out=str(tmp_path))
    prediction = predict(made, "cpu")
    report = measured(made, prediction, Trials(made, prediction))
    low, high = report["longest"], report["shortest_failed"]
    assert low is not None, report
    assert high == low + 16384
    best = report["best"]
    assert best["peak_gib"] <= 0.6
    assert best["memory_gib"]["backward"] > best["memory_gib"]["engine"] >= 0
    failed = next(trial for trial in report["trials"] if trial["seq_len"] == high)
    assert "the step: " in failed["why"]
    assert "llocate" in failed["why"]
    assert report["plan"]["total_gib"] == pytest.approx(prediction.memory(low).total / GIB)

    again = Trials(made, prediction)  # a search that was interrupted goes on where it was
    assert measured(made, prediction, again) == report
    other = dataclasses.replace(made, memory_gib=0.7)
    assert Trials(other, predict(other, "cpu")).done == {}


def test_trials_of_another_card_are_not_taken_for_this_ones(tmp_path):
    made = config(out=str(tmp_path))
    small, large = (
        Prediction(made, "cuda", DeviceLimits(Machines(1, 1), "cuda", "cudnn", size * GIB, 128 * GIB))
        for size in (79, 139)
    )
    trials = Trials(made, small)
    trials.done[1024] = {"seq_len": 1024, "fits": False, "why": "made"}
    trials.write(None, None)
    assert list(Trials(made, small).done) == [1024]
    assert Trials(made, large).done == {}


@pytest.mark.slow  # a real process
def test_a_trial_runs_with_the_commands_own_settings():
    memory = {"keep_attention": False, "offload_activations": True}
    engine = {"offload_optimizer": True, "offload_ratio": 0.5}
    made = config(model={"init": WIDE, "dtype": "bfloat16", "memory": memory}, engine=engine, optim={"freeze": []})
    trial = run_trial(made, "cpu", 2048)
    assert trial["fits"], trial
    assert trial["memory_gib"]["backward"] > 0


def test_the_plan_beside_it_is_that_of_plan():
    made = config()
    prediction = Prediction(made, "cpu", DeviceLimits(Machines(1, 1), "cpu", "torch_cpu", 1.0 * GIB))
    values = to_dict(training_config(made, 4096))
    document = planned(build(PlanConfig, {**values, "ranks": 1, "hardware": {"device": "cpu"}}, origin="test"))
    assert document["stages"]["longest"]["memory"]["total"] == prediction.memory(4096).total
    longest_planned = prediction.longest
    assert longest_planned is not None
    limits = prediction.limits
    assert limits.holds(prediction.memory(longest_planned))
    assert not limits.holds(prediction.memory(longest_planned + 256))


def on_an_h200(**changes: Any) -> Prediction:
    """The command's own settings on one GPU of 139 GiB beside 128 GiB of host memory."""
    values = compose("bench_longest", [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])
    made = build(BenchLongestConfig, values, origin="test")
    made = dataclasses.replace(made, model=with_blocks(made.model, "cuda"))
    kernel = planned_kernel("cuda", made.model, shape_of_model(made.model))
    return Prediction(made, "cuda", DeviceLimits(Machines(1, 1), "cuda", kernel, 139 * GIB, 128 * GIB))


def test_the_commands_of_the_header_compose():
    lines = header(config_dir() / "bench_longest.yaml")
    commands = [line.split("(")[0].split()[3:] for line in lines if line.startswith("  longctx bench longest")]
    assert len(commands) == 3, lines
    for words in commands:
        build(BenchLongestConfig, compose("bench_longest", words), origin="test")


def test_an_8b_model_takes_262144_tokens_on_one_h200_by_the_plan():
    """Every weight is trained; each of the three settings is needed for it."""
    prediction = on_an_h200()
    memory = prediction.memory(262144)
    assert prediction.limits.holds(memory)
    assert memory.host > 100e9
    assert prediction.longest is not None
    assert prediction.longest >= 262144
    assert prediction.config.optim.freeze == []
    for lacking in (
        {"model__memory__keep_attention": True},
        {"model__memory__offload_activations": False},
        {"engine__offload_optimizer": False, "engine__offload_ratio": 1.0},
        {"engine__offload_ratio": 1.0},
        {"engine__name": "deepspeed", "engine__zero": 3, "engine__offload_ratio": 1.0},
    ):
        other = on_an_h200(**lacking)
        assert not other.limits.holds(other.memory(262144)), lacking


def ended(monkeypatch: pytest.MonkeyPatch, code: str) -> Any:
    """The result of a trial whose process runs `code`."""
    import sys

    monkeypatch.setattr(longest, "module_command", lambda *words: ([sys.executable, "-c", code], None))
    return run_trial(config(), "cpu", 256)


def test_how_a_trial_ends_without_memory(monkeypatch):
    kill = "import os; os.kill(os.getpid(), 9)"
    counts = iter([4, 5])
    monkeypatch.setattr(longest, "killed_for_memory", lambda: next(counts))
    assert "the kernel killed" in ended(monkeypatch, kill)["why"]
    monkeypatch.setattr(longest, "killed_for_memory", lambda: 4)
    with pytest.raises(RunFailed, match="status -9"):  # somebody else's signal
        ended(monkeypatch, kill)
    said = "import sys, os; print('what():  std::bad_alloc', file=sys.stderr, flush=True); os.abort()"
    assert "bad_alloc" in ended(monkeypatch, said)["why"]
    with pytest.raises(RunFailed, match="ZeroDivisionError"):
        ended(monkeypatch, "1 / 0")
    monkeypatch.setattr(longest, "free_memory", lambda: 0.0)
    assert "was left" in ended(monkeypatch, "import time; time.sleep(60)")["why"]


def test_the_verb_says_that_no_length_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(longest, "run_trial", lambda *_: {"fits": False, "why": "loading the model: no memory"})
    words = [f"out={tmp_path}", "format=json", "memory_gib=0.5", "model.init.layers=1", "model.dtype=float32",
             "engine.offload_ratio=1", "engine.offload_optimizer=false", "model.init.vocab=512"]  # fmt: skip
    assert main(["bench", "longest", *words]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["longest"], document["shortest_failed"]) == (None, 1024)
    assert main(["bench", "longest", *words[:1], *words[2:]]) == 1
    assert "no length fits: 1,024 tokens does not fit, loading the model" in capsys.readouterr().out
