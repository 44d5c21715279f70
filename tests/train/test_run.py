"""Whole runs in this process: their files, and the same result after stopping and continuing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from longctx.config.train import TrainConfig
from longctx.errors import RunFailed, UserError
from longctx.run.training import train_run
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import loop, metrics

from .made import TOKENIZER, config, losses


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "stages/s128/model/model.safetensors")


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """A SIGTERM that arrives while step `steps` is being done."""
    done = loop._advance

    def advance(state: Any, *arguments: Any) -> None:
        done(state, *arguments)
        if state.step == steps:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "_advance", advance)


def test_what_a_run_leaves(undisturbed: Path) -> None:
    lines = metrics.read(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["stage"] for line in lines] == ["s64"] * 5 + ["s128"] * 4
    assert lines[-1]["tokens"] == 5 * 4 * 64 + 4 * 2 * 128
    assert lines[4]["cursor"] == 20
    assert [line["theta"] for line in lines[4:6]] == [10000, 40000]
    split = lines[-1]["seconds"]
    assert {"step", "data", "forward", "backward", "reduce", "optimizer"} <= split.keys()
    assert sum(value for key, value in split.items() if key != "step") <= split["step"] * 1.01
    for name, seq_len, theta in (("s64", 64, 10000), ("s128", 128, 40000)):
        shape = json.loads((undisturbed / f"stages/{name}/model/config.json").read_text())
        assert shape["max_position_embeddings"] == seq_len
        assert shape["rope_parameters"]["rope_theta"] == theta
        mark = json.loads((undisturbed / f"stages/{name}/finished.json").read_text())
        assert mark["heldout_loss"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_runs_config_names_the_block_sizes_it_trained_with(undisturbed: Path) -> None:
    memory = yaml.safe_load((undisturbed / "config.yaml").read_text())["model"]["memory"]
    assert (memory["ffn_block"], memory["loss_chunk"]) == (2048, 512)


def test_the_export_is_a_transformers_model(undisturbed: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = undisturbed / "stages/s128/model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("a ring passes keys", return_tensors="pt").input_ids
    assert torch.isfinite(model(tokens, labels=tokens).loss)
    assert model.model.rotary_emb.inv_freq[1].item() == pytest.approx(40000 ** (-2 / 8))


def test_a_closed_terminal_saves_too(tmp_path: Path) -> None:
    """In a process of its own: the handler takes away standard output and error."""
    code = (
        "import signal, sys; from longctx.signals import StopRequest; stop = StopRequest(); "
        "signal.raise_signal(signal.SIGHUP); print('nowhere'); sys.exit(75 if stop.name == 'SIGHUP' else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, b"", b"")


@pytest.mark.parametrize("steps", [1, 5, 7])
def test_stopped_and_continued_is_bit_identical(
    tmp_path: Path, documents: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """The step in which the signal comes is finished, and no further step begins."""
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(patched, steps)
        assert train_run(config(run, documents)) == SAVED_AND_REQUEUE
    assert len(losses(run)) == steps
    assert train_run(config(run, documents)) == 0
    assert losses(run) == losses(undisturbed)
    assert all(value.equal(weights(run)[name]) for name, value in weights(undisturbed).items())


def test_a_crash_without_warning_repeats_the_lost_steps(
    tmp_path: Path, documents: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        done = loop._log

        def crash(job: Any, *arguments: Any) -> None:
            done(job, *arguments)
            if job.state.step == 4:
                raise RunFailed("the machine is gone")

        patched.setattr(loop, "_log", crash)
        with pytest.raises(RunFailed, match="gone"):
            train_run(config(run, documents))
    assert len(losses(run)) == 4  # saved at step 2: steps 3 and 4 are done again, and stand there once
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss"')  # half a line, as a kill leaves it
    assert train_run(config(run, documents)) == 0
    assert losses(run) == losses(undisturbed)
    assert all(value.equal(weights(run)[name]) for name, value in weights(undisturbed).items())


def test_a_finished_run_says_so_and_does_nothing_again(
    undisturbed: Path, documents: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (undisturbed / "stages/s128/model/model.safetensors").stat().st_mtime_ns
    assert train_run(config(undisturbed, documents)) == 0
    assert (undisturbed / "stages/s128/model/model.safetensors").stat().st_mtime_ns == before
    assert len(losses(undisturbed)) == 9
    assert "tokens done; every stage is trained)" in capfd.readouterr().err


STAGES = {
    "s64": {"seq_len": 64, "theta": 10000, "steps": 5, "batch": 4},
    "s128": {"seq_len": 128, "theta": 40000, "steps": 4, "batch": 2},
}


def stages(**changed: dict[str, Any]) -> dict[str, Any]:
    return {"accept": ["curriculum"], "curriculum": {"stages": {**STAGES, **changed}}}


def test_a_stage_added_at_the_end_is_trained_and_nothing_else(
    tmp_path: Path, documents: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    assert train_run(config(run, documents)) == 0
    more = stages(s256={"seq_len": 256, "theta": 90000, "steps": 2, "batch": 1})
    assert train_run(config(run, documents, **more)) == 0
    assert losses(run)[:9] == losses(undisturbed)
    assert [line["stage"] for line in metrics.read(run / "metrics.jsonl")[9:]] == ["s256", "s256"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (stages(s128={**STAGES["s128"], "steps": 9}), "curriculum.stages.s128 was planned with.*steps=4.*steps=9"),
        (stages(s128={**STAGES["s128"], "batch": 4}), "batch=2.*batch=4.*read twice"),
        (stages(s96={**STAGES["s64"], "seq_len": 96}), "stopped in stage s128, and s96 before it was never trained"),
        ({"accept": ["curriculum"], "curriculum": {"stages": {"s64": STAGES["s64"]}}}, "s128, which the curriculum no"),
    ],
    ids=["longer", "batch", "inserted", "gone"],
)
def test_a_curriculum_changed_under_a_run_is_refused_or_meant(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        assert train_run(config(run, documents)) == SAVED_AND_REQUEUE
    changed = {**changed, "curriculum": {"lr": {"peak": 3.0e-3}, **changed["curriculum"]}}
    order = sorted(changed["curriculum"]["stages"].items(), key=lambda item: item[1]["seq_len"])
    changed["curriculum"]["stages"] = dict(order)
    with pytest.raises(UserError, match=message):
        train_run(config(run, documents, **changed))


def test_a_run_belongs_to_one_process(tmp_path: Path, documents: Path) -> None:
    """The lock of another process; it is released when that process ends in any way."""
    made = config(tmp_path / "run", documents)
    code = (
        "import sys, time; from pathlib import Path; from longctx.train.runfolder import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "SLURM_JOB_ID": "41"},
    )  # fmt: skip
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=rf"being written by process {other.pid} on \S+ of Slurm job 41;.*delete \S+/\.lock"
        ):
            train_run(made)
    finally:
        other.kill()
        other.wait()
    assert train_run(config(tmp_path / "run", documents, curriculum=one_stage(1), accept=["curriculum"])) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_work_after_training_is_left_at_once_and_asks_to_be_requeued(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "import signal; from longctx import signals; signals.catch(requeue=True); signals.all_saved('all is done')\n"
        f"signal.raise_signal({int(number)}); print('not reached')"
    )
    note = tmp_path / "requeue"
    environment = {**os.environ, "LONGCTX_STATUS": str(note)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (75, b"")
    assert done.stderr.decode() == f"longctx: {number.name}: all is done; the same command continues the run\n"
    assert note.read_text() == "75 requeue\n"


@pytest.mark.parametrize("confirms", [True, False])
def test_a_signal_during_long_work_is_confirmed_before_the_run_saves(confirms: bool) -> None:
    """By the rank alone: the process that only starts the ranks (confirms=False) leaves it to them."""
    code = (
        "import signal, time; from longctx import signals; signals.catch(requeue=True); stop = signals.stop_request()\n"
        f"stop.unsaved(confirms={confirms}); signal.raise_signal(15); end = time.monotonic() + 1.5 * signals.PATIENCE\n"
        "while time.monotonic() < end: pass\n"
        "stop.saved('saved at step 3')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 75
    confirmed = ["longctx: SIGTERM: the run saves after the work at hand"] if confirms else []
    assert done.stderr.splitlines() == [
        *confirmed, "longctx: SIGTERM: saved at step 3; the same command continues the run"
    ]  # fmt: skip


@pytest.mark.parametrize(("restarts", "note"), [("0", "75 requeue\n"), ("7", "75 requeue\n"), ("8", "75\n")])
def test_a_run_is_requeued_launch_requeues_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str, note: str
) -> None:
    from longctx import signals

    monkeypatch.setenv("LONGCTX_STATUS", str(tmp_path / "status"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert signals.note_status(75)
    assert (tmp_path / "status").read_text() == note
    assert ("launch.requeues=8" in signals.continuing()) == (restarts == "8")


def test_a_status_that_cannot_be_noted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from longctx import signals

    monkeypatch.setenv("LONGCTX_STATUS", str(tmp_path / "gone" / "status"))
    assert not signals.note_status(75)
    said = capfd.readouterr().err
    assert said.startswith("longctx: warning: LONGCTX_STATUS=")
    assert said.count("\n") == 1


def test_a_profile_window_may_span_stages(tmp_path: Path, documents: Path) -> None:
    assert train_run(config(tmp_path / "run", documents, profile={"steps": [4, 6]})) == 0
    assert (tmp_path / "run/profile/step4-6.json").stat().st_size > 1000


def test_accumulation_and_rows_do_not_matter(tmp_path: Path, documents: Path, undisturbed: Path) -> None:
    assert train_run(config(tmp_path / "run", documents, engine={"micro_batch": 1})) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=1e-5)


def test_a_nan_stops_before_the_optimizer(tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longctx.train.replicated import ReplicatedEngine

    monkeypatch.setattr(ReplicatedEngine, "grad_norm", lambda engine: torch.tensor(torch.nan, dtype=torch.float64))
    monkeypatch.setattr(ReplicatedEngine, "step", lambda engine, lr, norm: pytest.fail("the step was taken"))
    with pytest.raises(RunFailed, match=r"gradient norm=nan.*step 0"):
        train_run(config(tmp_path / "run", documents))
    written = json.loads((tmp_path / "run/failures/step00000000.json").read_text())
    assert written["ranks"][0]["documents"][0].startswith("text:")


def test_skipped_steps_are_counted_over_a_stop(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is a spike; the fourth in a row ends the run, also where the third is another process's first."""
    from longctx.train import guards

    monkeypatch.setattr(guards, "MINIMUM_HISTORY", 0)
    monkeypatch.setattr(guards, "median", lambda losses: 0.0)
    asked = config(tmp_path / "run", documents, guards={"spike_factor": 2.0, "max_skipped_steps": 4})
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        assert train_run(asked) == SAVED_AND_REQUEUE
    with pytest.raises(RunFailed, match="for 4 steps: this is no spike"):
        train_run(asked)
    assert len(losses(tmp_path / "run")) == 3


def test_a_batch_without_a_label_is_skipped_and_a_run_without_any_is_refused(tmp_path: Path) -> None:
    """First a few of the conversations have an assistant's turn, one conversation a step; then none has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = "ring attention passes every block of keys and values around the ranks " * 4

    def run(name: str, roles: list[str]) -> TrainConfig:
        rows = [[{"role": "user", "content": words}, {"role": role, "content": words}] for role in roles]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        chat = {"kind": "chat", "path": str(tmp_path / f"{name}.jsonl"), "loss": "assistant"}
        model = {"tokenizer": str(tmp_path / "tokenizer")}
        steps = {"s64": {"seq_len": 64, "theta": 10000, "steps": 12, "batch": 1}}
        return config(
            tmp_path / name / "run", tmp_path, model=model, curriculum={"stages": steps},
            data={"sources": {"chat": chat}, "mixes": {"default": {"chat": 1.0}}, "heldout": 0.0},
            evaluate={"heldout_sequences": 0},
        )  # fmt: skip

    assert train_run(run("some", ["assistant", "critic", "critic"] * 8)) == 0
    lines = metrics.read(tmp_path / "some/run/metrics.jsonl")
    mute = [line for line in lines if line["weight"] == 0]
    assert 0 < len(mute) < 12
    assert all(line["skipped"] and line["loss"] is None for line in mute)
    assert all(line["loss"] > 0 for line in lines if line["weight"] > 0)
    with pytest.raises(UserError, match="no token of its 12 sequences carries loss"):
        train_run(run("none", ["critic"] * 24))


def test_the_reported_loss_leaves_out_the_z_loss(tmp_path: Path, documents: Path) -> None:
    """Of the first step, whose weights are those of a run without it; the gradient holds both parts."""

    def first(z_loss: float) -> dict[str, Any]:
        run = tmp_path / f"z{z_loss}"
        changes = {"curriculum": one_stage(1), "optim": {"z_loss": z_loss}, "evaluate": {"heldout_sequences": 0}}
        assert train_run(config(run, documents, **changes)) == 0
        return metrics.read(run / "metrics.jsonl")[0]

    plain, trained = first(0.0), first(0.1)
    assert trained["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert trained["z_loss"] > 1.0
    assert plain["z_loss"] is None
    assert trained["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-3)


def test_wandb_mirrors_metrics(tmp_path: Path, documents: Path) -> None:
    """The keys in the offline run's own file, and one run id over two starts."""
    pytest.importorskip("wandb")
    logged = {"display": "none", "wandb": "offline"}
    made = config(tmp_path / "run", documents, logging=logged, curriculum=one_stage(3))
    assert train_run(made) == 0
    files = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    end = time.monotonic() + 60
    while not (rows := wandb_rows(files[0])) and time.monotonic() < end:
        time.sleep(0.1)  # wandb's own process writes blocks of 32 KiB, and the last one when it closes the file
    first = metrics.read(tmp_path / "run/metrics.jsonl")[0]
    assert rows[0]["train/loss"] == pytest.approx(first["loss"])
    assert rows[0]["train/loss_by_stage/s64"] == pytest.approx(first["loss"])
    wanted = {"train/lr", "train/grad_norm", "speed/tokens_per_second", "memory/high_water_gib", "rope/theta",
              "data/tokens", "speed/seconds_forward"}  # fmt: skip
    assert wanted <= rows[0].keys()
    assert any("eval/heldout_loss" in row for row in rows)


def one_stage(steps: int) -> dict[str, Any]:
    return {"stages": {"s64": {"seq_len": 64, "theta": 10000, "steps": steps, "batch": 4}}}


def wandb_rows(file: Path) -> list[dict[str, Any]]:
    """The history of an offline run: a LevelDB log (blocks of 32 KiB, records of checksum, length, type)
    of protobufs.
    """
    from wandb.proto import wandb_internal_pb2

    content, at, rows, whole = file.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"engine": {"name": "ddp", "zero": 2}}, "engine.zero=2 is not something engine=ddp can do"),
    ({"engine": {"name": "deepspeed"}}, "engine.zero=0 shards nothing"),
    ({"engine": {"offload_parameters": True}}, "needs engine=deepspeed"),
    ({"engine": {"offload_ratio": 0.5}}, "engine.offload_ratio=0.5 is a share of what engine.offload_optimizer=true"),
    ({"engine": {"name": "deepspeed", "zero": 2, "offload_parameters": True}}, "needs engine.zero=3"),
    ({"engine": {"micro_batch": 3}}, "engine.micro_batch=3 does not divide the 4 sequences"),
    ({"engine": {"device": "cuda"}}, "shows no CUDA device"),
    ({"parallel": {"cp": 3}, "launch": {"nproc": 2}}, "parallel.cp=3 does not divide the 2 ranks"),
    ({"parallel": {"cp_by_stage": {"s65": 1}}}, "parallel.cp_by_stage.s65 is no stage"),
    (
        {"engine": {"name": "deepspeed", "zero": 3, "hpz_partition_size": 3}, "launch": {"nproc": 4}},
        "engine.hpz_partition_size=3 does not divide the 4 ranks; 2 fits",
    ),
    ({"launch": {"nproc": 0}}, "launch.nproc=0 must be 1 or more"),
    ({"profile": {"steps": [4, 2]}}, r"profile.steps=\[4, 2\] must be two steps"),
    ({"optim": {"freeze": ["*nothing*"]}}, "matches no parameter"),
    (
        {"parallel": {"cp_by_stage": {"s64": 3}}, "launch": {"nproc": 2}},
        "parallel.cp_by_stage.s64=3 does not divide the 2 ranks",
    ),
    (
        {"parallel": {"cp": 2, "ulysses": 2, "schedule": "flat_ring"}, "launch": {"nproc": 2}},
        "parallel.ulysses=2 with parallel.schedule=flat_ring: only ulysses_ring",
    ),
    ({"parallel": {"cp": 2, "ulysses": 4}, "launch": {"nproc": 2}}, "parallel.ulysses=4 does not divide the 2 ranks"),
    ({"parallel": {"cp": 2, "nodes": 3}, "launch": {"nproc": 2}}, "parallel.nodes=3 does not divide the 2 ranks"),
    (
        {"parallel": {"cp": 8, "schedule": "ulysses_ring"}, "launch": {"nproc": 8}},
        "parallel.ulysses=8 cannot share out 4 query and 2 kv heads",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[text[:24] for _, text in MISTAKES])
def test_mistakes_are_refused_in_one_paragraph(
    tmp_path: Path, documents: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        train_run(config(tmp_path / "run", documents, **change))
    assert "\n" not in str(raised.value)
