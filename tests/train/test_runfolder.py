"""Settings that may differ when a run continues: content counts, not spelling; a run without a step has no identity."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from longctx.config.train import TrainConfig
from longctx.distributed.ranks import Ranks
from longctx.errors import UserError
from longctx.run.training import train_run
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import identity, metrics, runfolder
from longctx.train.train import settled
from tests.dist.ranks import run_ranks

from .made import config
from .test_run import stop_after


@pytest.fixture(autouse=True)
def own_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def trained(made: TrainConfig) -> None:
    """A run with its first checkpoint."""
    run = runfolder.prepare(made)
    mark = run / "stages/s64/checkpoints/step00000002/manifest.json"
    mark.parent.mkdir(parents=True)
    mark.write_text("{}")


def test_resolved_config_reads_back_equal_and_where_it_lies(tmp_path: Path) -> None:
    made = runfolder.with_dtype(config(tmp_path / "run", tmp_path / "docs"))
    runfolder.prepare(made)
    again = runfolder.read(tmp_path / "run" / "config.yaml")
    assert again == made
    assert again.model.dtype == "float32"
    assert runfolder.fingerprint(again) == runfolder.fingerprint(made)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert runfolder.read(tmp_path / "moved" / "config.yaml") == replace(made, run_dir=str(tmp_path / "moved"))


def test_free_keys_may_change(tmp_path: Path) -> None:
    made = config(tmp_path / "run", tmp_path / "docs")
    trained(made)
    moved = replace(made, launch=replace(made.launch, nproc=4), parallel=replace(made.parallel, cp=2))
    moved = replace(moved, model=replace(made.model, memory=replace(made.model.memory, ffn_block=64)))
    runfolder.prepare(moved)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["launch"]["nproc"] == 4


def test_a_key_that_an_earlier_version_lacked_had_its_default(tmp_path: Path) -> None:
    made = config(tmp_path / "run", tmp_path / "docs")
    trained(made)
    stored = tmp_path / "run" / "config.yaml"
    before = yaml.safe_load(stored.read_text())
    del before["curriculum"]["keep_window"], before["optim"]["z_loss"], before["evaluate"]
    stored.write_text(yaml.safe_dump(before))
    runfolder.prepare(made)
    stored.write_text(yaml.safe_dump(before))
    with pytest.raises(UserError, match=r"curriculum\.keep_window was False, now True"):
        runfolder.prepare(replace(made, curriculum=replace(made.curriculum, keep_window=True)))


def test_identity_change_is_refused_and_named(tmp_path: Path) -> None:
    trained(config(tmp_path / "run", tmp_path / "docs"))
    other = config(tmp_path / "run", tmp_path / "docs", seed=6, optim={"max_grad_norm": 0.5})
    with pytest.raises(UserError) as raised:
        runfolder.prepare(other)
    assert "seed was 5, now 6" in str(raised.value)
    assert "optim.max_grad_norm was 1.0, now 0.5" in str(raised.value)
    assert "'accept=[optim.max_grad_norm,seed]'" in str(raised.value)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 5


STAGE = {"seq_len": 64, "theta": 10000, "steps": 5, "batch": 4}
MORE = {"s64": STAGE, "s128": {**STAGE, "seq_len": 128}, "s256": {**STAGE, "seq_len": 256}}


@pytest.mark.parametrize(
    ("change", "words", "accept"),
    [
        ({"curriculum": {"stages": MORE}}, "curriculum.stages.s256 is new", "curriculum"),
        ({"curriculum": {"stages": {"s64": STAGE}}}, "curriculum.stages.s128 is gone", "curriculum"),
        (
            {"optim": {"max_grad_norm": 0.5, "eps": 1e-9}, "seed": 6},
            "optim.max_grad_norm was 1.0, now 0.5",
            "optim,seed",
        ),
        ({"data": {"heldout": 0.5}}, "data.heldout was 0.05, now 0.5", "data.heldout"),
    ],
    ids=["stage added", "stage gone", "many in a group", "one"],
)
def test_a_refusal_names_the_shortest_accept(tmp_path: Path, change: dict[str, Any], words: str, accept: str) -> None:
    trained(config(tmp_path / "run", tmp_path / "docs"))
    with pytest.raises(UserError) as raised:
        runfolder.prepare(config(tmp_path / "run", tmp_path / "docs", **change))
    assert words in str(raised.value)
    assert f"'accept=[{accept}]'" in str(raised.value)
    runfolder.prepare(config(tmp_path / "run", tmp_path / "docs", **change, accept=accept.split(",")))


def test_other_frozen_parameters_are_refused_without_a_way_that_fails_later(tmp_path: Path) -> None:
    """The checkpoint is of the parameters that were trained, so that `accept` would only put the refusal off."""
    trained(config(tmp_path / "run", tmp_path / "docs", optim={"freeze": []}))
    with pytest.raises(
        UserError, match=r"optim\.freeze was \[\], now .* new name=\.\.\., or put optim\.freeze back"
    ) as raised:
        runfolder.prepare(config(tmp_path / "run", tmp_path / "docs", optim={"freeze": ["*norm*"], "eps": 1e-9}))
    assert "accept=" not in str(raised.value)


def test_a_meant_change_is_accepted(tmp_path: Path) -> None:
    trained(config(tmp_path / "run", tmp_path / "docs"))
    longer = {"stages": {"s64": {**STAGE, "steps": 9}}}
    meant = config(tmp_path / "run", tmp_path / "docs", curriculum=longer, accept=["curriculum.stages"])
    runfolder.prepare(meant)
    with pytest.raises(UserError, match=r"curriculum\.stages\.s64\.steps"):
        runfolder.prepare(config(tmp_path / "run", tmp_path / "docs"))


def test_a_run_without_a_step_has_no_identity(tmp_path: Path, documents: Path) -> None:
    """A refused command writes no config, and a config without a step is replaced."""
    run = tmp_path / "run"
    with pytest.raises(UserError, match="nowhere does not exist"):
        train_run(config(run, tmp_path / "nowhere"))
    assert not (run / "config.yaml").exists()
    runfolder.prepare(config(run, documents))
    (run / runfolder.WANDB_ID).write_text("of another")
    assert train_run(config(run, documents, seed=9, curriculum={"stages": {"s64": {**STAGE, "steps": 1}}})) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 9
    assert not (run / runfolder.WANDB_ID).exists()


def test_a_held_folder_keeps_its_config(tmp_path: Path, documents: Path) -> None:
    """A second start with another config, before the first one's first step."""
    made = config(tmp_path / "run", documents, launch={"nproc": 2})
    with runfolder.held(runfolder.prepare(made)), pytest.raises(UserError, match="is being written by process"):
        train_run(replace(made, seed=6))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 5


@pytest.fixture
def stopped(tmp_path: Path, documents: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, documents and a run of them that was stopped after four steps."""
    shutil.copytree(undisturbed / "stages/s64/model", tmp_path / "here/base")
    shutil.copytree(documents, tmp_path / "here/docs")
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        assert train_run(run_of(tmp_path / "here")) == SAVED_AND_REQUEUE
    return tmp_path / "here"


def run_of(folder: Path, **changes: Any) -> TrainConfig:
    model = {"init": None, "path": str(folder / "base"), "tokenizer": None}
    return config(folder / "run", folder / "docs", model=model, **changes)


def test_a_moved_run_with_moved_inputs_goes_on(
    tmp_path: Path, documents: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run, model and documents copied elsewhere with new times, the paths spelled relative and over a link."""
    shutil.copytree(stopped, tmp_path / "there", copy_function=shutil.copyfile)
    shutil.rmtree(stopped)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert train_run(run_of(Path("./link"))) == 0
    run = tmp_path / "there/run"
    assert [line["step"] for line in metrics.read(run / "metrics.jsonl")] == list(range(1, 10))
    assert not stopped.exists()
    whole = run_of(tmp_path / "there")
    assert train_run(replace(whole, run_dir=str(tmp_path / "whole"))) == 0
    losses = [[line["loss"] for line in metrics.read(at / "metrics.jsonl")] for at in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]


CUTS = pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.95], ids=["empty", "30 %", "60 %", "95 %"])


def cut(file: Path, left: float) -> None:
    """What an interrupted copy or a full disk leaves of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content))])


@CUTS
@pytest.mark.parametrize("name", ["config.yaml", "inputs.json"])
def test_a_record_that_is_cut_short_is_refused_by_its_name(tmp_path: Path, name: str, left: float) -> None:
    made = config(tmp_path / "run", tmp_path / "docs", optim={"freeze": "auto"}, model={"dtype": "auto"})
    trained(settled(made))
    cut(tmp_path / "run" / name, left)
    with pytest.raises(
        UserError, match=rf"run/{name}, .* is (empty|damaged or cut short|cut short \(it lacks .*\)); put"
    ):
        runfolder.prepare(settled(made))


@CUTS
def test_a_stage_whose_record_is_cut_short_is_finished_again(
    tmp_path: Path, documents: Path, undisturbed: Path, left: float, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    mark = tmp_path / "run/stages/s128/finished.json"
    before = mark.read_text()
    cut(mark, left)
    assert train_run(config(tmp_path / "run", documents)) == 0
    assert mark.read_text() == before
    said = " ".join(capsys.readouterr().err.split())
    assert "s128/finished.json, the record of a finished stage, is " in said
    assert said.count("; the stage's end is done again") == 1


def test_other_weights_under_the_same_path_are_refused(stopped: Path) -> None:
    file = stopped / "base/model.safetensors"
    weights = load_file(file)
    before = file.stat()
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_mtime_ns != before.st_mtime_ns
    with pytest.raises(UserError, match=r"model.path holds other files than at the start \(model.safetensors\)"):
        train_run(run_of(stopped))
    runfolder.prepare(settled(run_of(stopped, accept=["model"])))


def test_other_documents_under_the_same_path_are_refused_or_meant(stopped: Path) -> None:
    (stopped / "docs/999.txt").write_text("a document that came later " * 20)
    with pytest.raises(UserError, match=r"data.sources.text gives other documents.*'accept=\[data\]'"):
        train_run(run_of(stopped))
    assert train_run(run_of(stopped, accept=["data"])) == 0


def test_a_theta_file_is_known_by_its_content(tmp_path: Path) -> None:
    for name, theta in (("a", 20000), ("b", 20000), ("c", 30000)):
        (tmp_path / f"{name}.yaml").write_text(f"stages: {{s64: {{theta: {theta}}}}}\n")

    def run(file: str) -> TrainConfig:
        stages = {"stages": {"s64": STAGE}, "theta_file": str(tmp_path / file)}
        return config(tmp_path / "run", tmp_path / "docs", curriculum=stages)

    trained(run("a.yaml"))
    runfolder.prepare(run("b.yaml"))
    with pytest.raises(UserError, match=r"curriculum.theta_file holds other files than at the start"):
        runfolder.prepare(run("c.yaml"))


@pytest.mark.parametrize("record", ["hashes.json", "made_from.json"])
def test_weights_that_are_newer_than_their_folders_record_are_read(
    tmp_path: Path, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may have replaced them; a copy without its times has the same ones, and its record holds."""
    from longctx import fingerprint
    from longctx.fingerprint import WEIGHTS, content_hashes, folder_fingerprint, tensor_hashes

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    folder = tmp_path / "model"
    folder.mkdir()
    weights, noted = folder / "model.safetensors", folder / record
    save_file({"weight": torch.zeros(4)}, weights)
    hashes = {"key": "x", "weights": content_hashes(folder, WEIGHTS)}
    noted.write_text(json.dumps(hashes if record == "made_from.json" else tensor_hashes(weights)))
    first = folder_fingerprint(folder)

    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / record, ns=(0, 0))
    assert folder_fingerprint(copy) == first
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "_is_record_of", lambda record, folder: pytest.fail("read again"))
        assert folder_fingerprint(copy) == first

    content = noted.read_text()
    noted.write_text(content[:20])  # newer than the weights, and tells nothing of them
    cut_short = folder_fingerprint(folder)
    save_file({"weight": torch.ones(4)}, weights)
    os.utime(weights, ns=(0, 0))
    assert folder_fingerprint(folder) != cut_short
    noted.write_text(content)

    for later, value in enumerate((1.0, 2.0), 1):
        save_file({"weight": torch.full((4,), value)}, weights)
        os.utime(weights, ns=(0, noted.stat().st_mtime_ns + later))
        changed = folder_fingerprint(folder)
        assert changed != first
        first = changed

    elsewhere = tmp_path / "elsewhere.safetensors"
    save_file({"weight": torch.full((4,), 3.0)}, elsewhere)
    os.utime(elsewhere, ns=(0, 0))
    elsewhere.replace(weights)  # mv, cp -p and tar keep the time of a file that is older than the record
    assert folder_fingerprint(folder) != first


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longctx import fingerprint

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"abc")
    first = fingerprint.file_hashes([file])[file]
    with monkeypatch.context() as patched:
        patched.setattr(fingerprint, "file_sha256", lambda path: pytest.fail("read again"))
        assert fingerprint.file_hashes([file])[file] == first
    when = file.stat().st_mtime_ns
    file.write_bytes(b"abd")
    os.utime(file, ns=(when, when))
    assert fingerprint.file_hashes([file])[file] != first


def test_finished_stages_are_not_trained_again_where_their_checkpoints_were_left_out(
    tmp_path: Path, documents: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    for folder in run.glob("stages/*/checkpoints"):
        shutil.rmtree(folder)
    before = (run / "metrics.jsonl").read_bytes()
    assert train_run(config(run, documents)) == 0
    assert "every stage is trained; no checkpoint is there any more" in capfd.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(run / "stages/s128/model")  # what was trained is lost: nothing can be exported
    with pytest.raises(UserError, match=r"latest.json names stages/s128/checkpoints/step00000009, which is not there"):
        train_run(config(run, documents))
    (run / "latest.json").write_text("{")
    with pytest.raises(UserError, match=r"latest\.json names a checkpoint, which is not there"):
        train_run(config(run, documents))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_model_that_was_removed_is_exported_again(tmp_path: Path, documents: Path, undisturbed: Path) -> None:
    run = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(run / "stages/s128/model")
    assert train_run(config(run, documents)) == 0
    weights = [load_file(folder / "stages/s128/model/model.safetensors") for folder in (run, undisturbed)]
    assert all(weights[0][name].equal(value) for name, value in weights[1].items())


def test_a_refused_start_leaves_the_record_as_it_was(tmp_path: Path, documents: Path, undisturbed: Path) -> None:
    """Longer stages, and accepted changes where nothing is left to train: the same command as before goes on."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    before = [(run / name).read_bytes() for name in ("config.yaml", "inputs.json")]
    longer = {"stages": {"s64": {**STAGE, "steps": 5}, "s128": {**STAGE, "seq_len": 128, "theta": 40000, "steps": 40}}}
    for changes, message in (
        ({"curriculum": longer}, "s128 was planned with"),
        ({"curriculum": longer, "accept": ["curriculum"]}, "s128 was planned with"),
        ({"seed": 9, "accept": ["seed"]}, "is trained, so this would change nothing: seed was 5, now 9"),
    ):
        with pytest.raises(UserError, match=message):
            train_run(config(run, documents, **changes))
        assert [(run / name).read_bytes() for name in ("config.yaml", "inputs.json")] == before
    assert train_run(config(run, documents)) == 0


def test_what_a_living_process_writes_below_a_run_stays(tmp_path: Path) -> None:
    """`longctx data` writes shards there while a run begins; a killed process's files go, also if its pid is back."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as ended:
        ended.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        theirs, dead, older = (
            tmp_path / f"data/shards/.{name}.partial-{pid}"
            for name, pid in (("books", living.pid), ("books", ended.pid), ("step00000012", os.getpid()))
        )
        for folder in (theirs, dead, older):
            folder.mkdir(parents=True)
        os.utime(older, (1e9, 1e9))
        with runfolder.held(tmp_path):
            assert [folder.exists() for folder in (theirs, dead, older)] == [True, False, False]
        living.communicate(b"\n")


def check_different_nodes(rank: int, world: int, case: str) -> None:
    """Each rank is a node of its own, as far as the check of files goes."""
    ranks = Ranks(rank, world, 0, 1, torch.device("cpu"))
    files = {"model.path": {"config.json": "a", "model.safetensors": "b"}, "model.tokenizer": {"": "org/m@1"}}
    identity.check_nodes(ranks, files)
    identity.check_nodes(ranks, files if rank == 0 else None)  # the second rank of a node
    if rank == 1:
        files[case] = {
            "model.path": {"config.json": "a", "model.safetensors": "c"},
            "model.tokenizer": {"": "org/m@2"},
        }[case]
    named = {"model.path": "model.safetensors", "model.tokenizer": "org/m@2, org/m@1"}[case]
    with pytest.raises(UserError, match=rf"rank 1 has other files than rank 0 under {case} \({named}\)"):
        identity.check_nodes(ranks, files)


def test_nodes_that_read_other_files_are_refused(tmp_path: Path) -> None:
    """Their ranks would train models of different weights, whose gradients are averaged."""
    failures = run_ranks(2, check_different_nodes, ["model.path", "model.tokenizer"], tmp_path / "store")
    assert not failures, failures
