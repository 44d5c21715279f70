"""The command line beyond a single run: help, the composed config, sweeps, tab completion, paths."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from longctx import cli
from longctx.completion import complete
from longctx.config.base import build
from longctx.config.compose import compose, load, resolve
from longctx.config.groups import defaults_of, groups
from longctx.config.help import as_yaml, field_docs
from longctx.config.keys import known_keys, step_into, variants
from longctx.config.words import Overrides
from longctx.errors import UserError, refused_by_system
from longctx.verbs import VERBS
from tests import warm
from tests.started import longctx

GIVEN = {
    "eval": ["model.path=m"],
    "report": ["run=r"],
    "plan": ["model=tiny"],
    "train": ["model=tiny"],
    "submit": ["model=tiny"],
    "lora extract": ["base=b", "tuned=t", "out=o"],
    "import": ["gguf=g", "out=o"],
    "lora merge": ["target=t", "adapter=a", "out=o"],
    "theta": ["to=1M", "from=8k", "rule=yarn"],
}


def _help(capsys, *words: str) -> str:
    assert cli.main([*words, "--help"]) == 0
    return capsys.readouterr().out


# --- --cfg


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_cfg_prints_the_whole_config_and_the_verb_reads_it_again(verb, capsys):
    words = GIVEN.get(verb, [])
    assert cli.main([*verb.split(), *words, "--cfg", "job"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    schema, config = resolve(VERBS[verb].schema), load(VERBS[verb], words)
    assert list(printed) == known_keys(schema)
    assert build(schema, printed, origin="--cfg") == config


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_no_help_begins_in_the_middle_of_a_sentence(verb, capsys):
    assert not _help(capsys, *verb.split()).splitlines()[2][:1].islower()


@pytest.mark.parametrize("words", [["lora"], ["lora", "--help"], ["bench", "-h"]])
def test_a_word_that_only_begins_verbs_lists_them(words, capsys):
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told and VERBS[name].help in told for name in VERBS if name.startswith(words[0] + " "))


def test_cfg_shows_overrides_defaults_and_resolved_values(capsys):
    assert cli.main(["train", "experiment=quickstart", "rope=yarn", "data=text", "data.path=books", "--cfg"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["sources"]["text"]["path"] == "books"
    assert printed["curriculum"]["rule"] == {"name": "yarn", "start": "original", "beta_fast": None, "beta_slow": None}
    assert printed["curriculum"]["layout"] == "zigzag"
    assert as_yaml(load(VERBS["theta"], GIVEN["theta"])).splitlines()[3] == "from: 8192"


# --- --help


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_names_every_key_and_offers_only_what_is_accepted(verb, capsys):
    root, schema = VERBS[verb].root, resolve(VERBS[verb].schema)
    text = _help(capsys, *verb.split())
    for key in known_keys(schema):
        assert re.search(rf"^  {key} \(", text, re.M), key
    known = Overrides(root, schema)
    offered = re.findall(r"^  ([\w@.]+) {2,}(.*)$", text.partition("Keys (")[0].partition("Groups (")[2], re.M)
    assert [group for group, _ in offered] == list(defaults_of(root))
    for group, choices in offered:
        for choice in choices.replace("[", "").replace("]", "").split(", "):
            assert known.checked(f"{group}={choice}") == [f"{group}={choice}"]


@pytest.mark.parametrize("verb", ["train", "plan", "theta", "eval", "bench theta"])
def test_every_key_of_every_section_is_shown_and_accepted(verb, capsys):
    schema = resolve(VERBS[verb].schema)
    known = Overrides(VERBS[verb].root, schema)
    text = _help(capsys, *verb.split(), *known_keys(schema))
    shown = set(re.findall(r"^  ([a-z][\w.]*) \(", text, re.M)) | set(re.findall(r"^  ([a-z]\w+\.NAME)$", text, re.M))
    for key in shown:
        assert known.checked(f"{key.replace('.NAME', '.some')}=1")
    for section in known_keys(schema):
        if variants(step_into(schema, section)):
            assert f"{section}=yarn" in text
            continue
        for key in [f"{section}.{key}" for key in known_keys(schema, [section])] or [section]:
            assert any(item == key or item.startswith(f"{key}.") for item in shown), key


def test_help_shows_types_defaults_docs_and_the_values_of_the_command(capsys):
    text = _help(capsys, "train", "engine=deepspeed", "engine")
    assert re.search(r"engine\.zero \(0\|1\|2\|3\) = 2\s+ZeRO stage", text)
    assert re.search(r"engine\.micro_batch_tokens \(count\) = 8192\s+tokens of one forward", text)
    assert "deepspeed  DeepSpeed ZeRO through accelerate" in text
    assert re.search(
        r"curriculum\.rule=yarn \(\{start: original, beta_fast: null", _help(capsys, "train", "curriculum")
    )


def test_help_shows_ones_own_groups(tmp_path, capsys):
    for group in ("curriculum", "mood"):
        (tmp_path / group).mkdir()
    (tmp_path / "curriculum" / "mine.yaml").write_text("# Two stages for our books.\nstages: {}\n")
    (tmp_path / "mood" / "calm.yaml").write_text(
        "# @package _global_\n# Slow and steady.\noptim: {max_grad_norm: 0.1}\n"
    )
    text = _help(capsys, "train", "--config-dir", str(tmp_path))
    assert re.search(r"^  curriculum .*\bmine\b", text, re.M)
    assert re.search(r"^  mood +calm$", text, re.M)
    assert "mine  " in _help(capsys, "train", "--config-dir", str(tmp_path), "curriculum")
    assert "calm  Slow and steady." in _help(capsys, "train", "--config-dir", str(tmp_path), "mood")
    assert load(VERBS["train"], ["model=tiny", "mood=calm"], [tmp_path]).optim.max_grad_norm == 0.1


def test_docs_are_read_from_the_fields_and_those_above_them():
    docs = field_docs(resolve(VERBS["data stats"].schema))
    assert docs["png"].startswith("file for the picture")
    assert docs["cache"].startswith("folder of the shards")  # its own, not TrainConfig's
    assert docs["accept"].startswith("start although it would be refused")  # of the class it builds on
    assert field_docs(resolve(VERBS["lora extract"].schema))["memory_mib"].endswith("again on every pass")


# --- -m


def test_a_sweep_runs_every_combination_names_the_failed_one_and_returns_the_worst_status(tmp_path):
    sweep = ["theta", "-m", "model=tiny", "to=4096,64", "rule=yarn", "png=out/t.png", "format=json"]
    done = longctx(*sweep, cwd=tmp_path)
    assert done.returncode == 2
    runs = json.loads(done.stdout)["runs"]
    assert [run["values"] for run in runs] == ["to=4096", "to=64"]
    assert [run["status"] for run in runs] == [0, 2]
    assert runs[0]["result"]["stages"][0]["rope_parameters"]["rope_type"] == "yarn"
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["t-to-4096.png"]
    assert "to=64: refused (status 2)" in done.stderr
    assert "to=64 is shorter than the window of 512" in done.stderr


def test_runs_of_a_sweep_have_folders_of_their_own_and_one_tokenization(monkeypatch, capfd):
    started: list[list[str]] = []
    monkeypatch.setattr("longctx.sweep._one", lambda command, capture: (started.append(list(command)), (0, ""))[1])
    assert (
        cli.main(["train", "-m", "model=tiny", "name=x", "curriculum.lr.peak=2e-5,4e-5", "engine=ddp,deepspeed"]) == 0
    )
    configs = [load(VERBS["train"], command[command.index("train") + 1 :]) for command in started]
    assert [config.folder for config in configs] == [
        f"runs/x/peak-{peak}_engine-{engine}" for peak in ("2e-05", "4e-05") for engine in ("ddp", "deepspeed")
    ]
    assert {config.cache for config in configs} == {"runs/x/data"}
    assert [(config.curriculum.lr.peak, config.engine.name) for config in configs][1] == (2e-5, "deepspeed")
    table = capfd.readouterr().out
    assert all(
        f"peak={peak} engine={engine}" in table for peak in ("2e-05", "4e-05") for engine in ("ddp", "deepspeed")
    )


def test_the_table_of_a_sweep_shows_each_runs_last_loss_where_a_run_has_trained(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    runs = [tmp_path / f"seed-{seed}" for seed in (1, 2)]
    runs[0].mkdir()
    losses = [9.0, *(float(step) for step in range(10))]  # the first is older than the last ten
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps({"loss": loss}) + "\n" for loss in losses))
    monkeypatch.setattr("longctx.sweep._one", lambda command, capture: (0, ""))

    def table(verb: str) -> list[list[str]]:
        assert cli.main([verb, "-m", "model=tiny", f"run_dir={tmp_path}", "seed=1,2"]) == 0
        return [re.split(" {2,}", line.strip()) for line in capfd.readouterr().out.splitlines()]

    head, first, second = table("train")
    assert head == ["values", "outcome", "seconds", "last loss", "result in"]
    assert first == ["seed=1", "done", "0.0", "4.5000", str(runs[0])]
    assert second[:3] == ["seed=2", "done", "0.0"]
    assert "last loss" not in table("data")[0]  # which trains nothing, in a folder that has a loss


def test_a_combination_without_a_curriculum_is_refused_before_the_first_run(monkeypatch, capsys):
    monkeypatch.setattr("longctx.sweep._one", lambda command, capture: pytest.fail("a run was started"))
    assert cli.main(["train", "-m", "model=tiny", "rope=yarn", "curriculum.lr.peak=6e-4,1e-5"]) == 2
    said = capsys.readouterr().err
    assert "curriculum.lr.peak=1e-05: curriculum.stages.s2048.lr.final=2e-05 must be at most the peak 1e-05" in said


@pytest.mark.parametrize(
    ("statuses", "worst", "begun"),
    [([0, 1, 2], 1, 3), ([0, 2, 0], 2, 3), ([0, 75], 75, 2), ([130], 130, 1), ([-9, 0, 0], 1, 3)],
)
def test_a_failed_run_does_not_stop_a_sweep_and_an_interrupted_one_does(statuses, worst, begun, monkeypatch, capfd):
    left = list(statuses)
    monkeypatch.setattr("longctx.sweep._one", lambda command, capture: (left.pop(0), ""))
    assert cli.main(["plan", "-m", "model=tiny", "nodes=1,2,4"]) == worst
    assert begun == len(statuses) - len(left)
    assert capfd.readouterr().out.count("not started") == 3 - begun


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["a/c", "a/d"], ["c", "d"]),
        (["runs/a/stages/s1/model", "runs/b/stages/s1/model"], ["a-stages-s1-model", "b-stages-s1-model"]),
        (["/x/model", "model", "other"], ["x-model", "model", "other"]),
    ],
    ids=["last", "exports of two runs", "of two depths"],
)
def test_paths_that_end_alike_are_told_apart_by_their_folders(paths: list[str], shown: list[str], monkeypatch, capfd):
    started: list[list[str]] = []
    monkeypatch.setattr("longctx.sweep._one", lambda command, capture: (started.append(list(command)), (0, ""))[1])
    words = ["model=tiny", "name=x", f"data.path={','.join(paths)}", "seed=1,2"]
    assert cli.main(["train", "-m", *words]) == 0
    configs = [load(VERBS["train"], command[command.index("train") + 1 :]) for command in started]
    assert [config.folder for config in configs] == [
        f"runs/x/path-{path}_seed-{seed}" for path in shown for seed in (1, 2)
    ]
    assert [config.data.path for config in configs[::2]] == paths


def test_runs_that_would_share_a_folder_are_refused():
    with pytest.raises(UserError, match="two runs of the sweep would share"):
        cli._dispatch(["train", "-m", "model=tiny", "name=x", "data.path=a/c,a/c"], own=False)


# --- tab completion


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("longctx tr", ["train"]),
        ("longctx da", ["data"]),
        ("longctx data s", ["seed=", "smoke=", "stats", "synth"]),
        ("longctx bench h", ["hierarchy"]),
        ("longctx train engine=", ["engine=ddp", "engine=deepspeed"]),
        ("longctx train check", ["checkpoint."]),
        ("longctx train curriculum", ["curriculum.", "curriculum="]),
        ("longctx train curriculum.stages.", ["curriculum.stages.s2048.", "curriculum.stages.s8192."]),
        ("longctx train curriculum=lwm_1m '~curriculum.stages.s", []),
        (
            "longctx train curriculum=lwm_1m curriculum.stages.s1",
            ["curriculum.stages.s128k.", "curriculum.stages.s1M."],
        ),
        ("longctx train rope=y", ["rope=yarn", "rope=yarn-paper"]),
        ("longctx train engine.offload_p", ["engine.offload_parameters="]),
        (
            "longctx train engine.offload_parameters=",
            ["engine.offload_parameters=false", "engine.offload_parameters=true"],
        ),
        ("longctx theta fr", ["from="]),
        ("longctx completion z", ["zsh"]),
        ("longctx train --c", ["--cfg", "--config-dir"]),
        ("longctx nothing x", []),
    ],
)
def test_completions(line, answers):
    assert complete(line) == answers


def test_every_choice_and_every_key_completes():
    for group, choices in groups().items():
        if group in defaults_of("plan"):
            assert complete(f"longctx plan {group}=") == [f"{group}={choice}" for choice in choices]
    for key in known_keys(resolve(VERBS["train"].schema)):
        assert any(answer.rstrip(".=") == key for answer in complete(f"longctx train {key}"))


def test_bash_completes_at_its_prompt(tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    (tmp_path / "mine").mkdir()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, "PS1": "$ ", "TERM": "dumb"})
    try:
        os.write(terminal, b". ./complete.sh; echo rea''dy\n")
        assert b"ready" in _until(terminal, b"ready")
        for typed, wanted in (
            (b"longctx train engine=dee\t", b"engine=deepspeed "),
            (b"curriculum.stages.s81\t", b"curriculum.stages.s8192."),
            (b"lay\t", b"layout="),
        ):
            os.write(terminal, typed)
            assert wanted.removeprefix(b"engine=dee") in _until(terminal, wanted[-6:])
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def _until(terminal: int, wanted: bytes, seconds: float = 30) -> bytes:
    read, end = b"", time.monotonic() + seconds
    while wanted not in read and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            read += os.read(terminal, 4096)
    return read


def test_the_completion_process_answers_without_torch_and_hydra():
    code = (
        "import sys; from longctx.completion import complete; complete('longctx train en'); print(sorted(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"'torch'", "'hydra'", "'omegaconf'", "'transformers'"} & set(re.findall(r"'\w+'", loaded))


# --- format=json

NOISY = """
import os, sys
import longctx.doctor
run = longctx.doctor.run
def noisy(config):
    print("a library's word")
    os.write(1, b"and one from C\\n")
    return run(config)
longctx.doctor.run = noisy
sys.argv = ["longctx", "doctor", *sys.argv[1:]]
from longctx.cli import main
sys.exit(main())
"""


def test_standard_output_is_the_document_alone():
    done = warm.python("-c", NOISY, "format=json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "a library's word\n" in done.stderr
    assert "and one from C\n" in done.stderr


# --- paths


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["import", "gguf=model.gguf"], "out"),
        (["lora", "extract", "base=base", "tuned=tuned"], "out"),
        (["lora", "merge", "target=base", "adapter=adapter"], "out"),
        (["lora", "info", "adapter=adapter"], "plots"),
        (["eval", "model.path=base"], "out"),
        (["data", "model=tiny"], "cache"),
        (["data", "stats", "model=tiny"], "png"),
        (["data", "synth"], "out"),
        (["theta", "model=tiny", "search=true"], "run_dir"),
        (["plan", "show=schedule"], "draw.svg"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_path_that_cannot_be_written_is_refused_before_any_work(words, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main([*words, f"{key}=file/result"]) == 2
    assert (
        f"{key}=file/result cannot be made: {tmp_path}/file is a file; choose another {key}=" in capsys.readouterr().err
    )


def test_thetas_are_printed_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    """Without a search only the picture is written, where png= says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    assert cli.main(["theta", "model=tiny", "to=4096"]) == 0
    assert cli.main(["theta", "model=tiny", "to=4096", "png=runs/x.png"]) == 2
    assert "png=runs/x.png cannot be made" in capsys.readouterr().err


WRITES = [
    ("train model=tiny", "run_dir"), ("train model=tiny", "cache"), ("submit model=tiny dry_run=true", "run_dir"),
    ("eval model.path=base", "out"), ("eval model.path=base", "cache"), ("import gguf=g", "out"),
    ("preflight", "folder"), ("plan show=schedule", "draw.svg"), ("theta model=tiny", "png"),
    ("theta model=tiny search=true", "run_dir"), ("lora extract base=a tuned=b", "out"),
    ("lora merge target=a adapter=b", "out"), ("lora info adapter=a", "plots"), ("data model=tiny", "cache"),
    ("data stats model=tiny", "png"), ("data synth", "out"), ("data synth", "cache"), ("bench faults", "out"),
    ("bench longest", "out"), ("bench attention", "out"), ("bench hierarchy", "out"),
    ("bench theta", "out"), ("bench lora", "out"), ("bench lora", "folder"), ("bench data", "out"),
]  # fmt: skip


HARD = ["/proc/x/y", "/proc/sys/x", "N" * 250, "deep/" + "N" * 250]


@pytest.mark.parametrize(
    ("words", "key", "place"),
    [*((*one, "/proc/x") for one in WRITES), *(("lora info adapter=a", "plots", place) for place in HARD)],
)
def test_a_path_that_the_system_refuses_is_refused_before_any_work(words, key, place, tmp_path, monkeypatch, capsys):
    """Root, whom permissions do not stop, included."""
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words.split(), f"{key}={place}"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"longctx: {key}={place} cannot be (made|written): [^\n]+; choose another {key}=\n", said), (
        said
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_gets_full_ends_a_verb_with_one_paragraph(small_disk, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("the words of a page, " * 20_000)
    words = ["data", "model=tiny", "data=text", f"data.path={tmp_path}/text", "format=json"]
    assert cli.main([*words, f"cache={small_disk}/cache"]) == 1
    assert "cannot be read or written: No space left on device; free some space" in capsys.readouterr().err
    assert cli.main([*words, f"cache={tmp_path}/cache"]) == 0
    capsys.readouterr()
    task = ["data", "synth", "count=8", "length=8k", "data=text", "haystack=text", f"data.path={tmp_path}/text"]
    assert cli.main([*task, f"cache={tmp_path}/cache", f"out={small_disk}/x.jsonl", "data.heldout=0.5"]) in (1, 2)
    assert not list(small_disk.glob("**/.*.partial-*"))


def test_a_key_of_the_same_section_is_named_before_one_elsewhere(capsys):
    assert cli.main(["train", "model=tiny", "checkpoint.steps=1"]) == 2
    assert "did you mean checkpoint.every_steps or profile.steps?" in capsys.readouterr().err


def test_empty_braces_empty_a_section_and_other_braces_add_to_it():
    def of(*words: str) -> dict[str, Any]:
        return compose("train", ["experiment=quickstart", *words])

    assert of("data.sources={}")["data"]["sources"] == {}
    added = ["data.sources={}", "data.sources.a={kind: text, path: A}", "data.sources={b: {kind: text, path: B}}"]
    assert list(of(*added)["data"]["sources"]) == ["a", "b"]
    assert of("model.memory={}")["model"]["memory"] == {}
    assert of("after_training.evidence={}")["after_training"]["evidence"] == {}
    assert cli.main(["train", "experiment=quickstart", "data.sources={}"]) == 2


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train", "model=tiny"], "run_dir"),
        (["eval", "model.path=base"], "out"),
        (["eval", "model.path=base"], "cache"),
        (["data", "model=tiny"], "cache"),
        (["data", "synth"], "cache"),
        (["lora", "info", "adapter=a"], "plots"),
        (["import", "gguf=g"], "out"),
        (["preflight"], "folder"),
        (["bench", "lora"], "folder"),
        (["bench", "attention"], "out"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_file_where_a_folder_is_made_is_refused_before_any_work(words, key, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main([*words, f"{key}={tmp_path}/file"]) == 2
    said = capsys.readouterr().err
    assert said == f"longctx: {key}={tmp_path}/file cannot be made: {tmp_path}/file is a file; choose another {key}=\n"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data", "stats", "model=tiny"], "png"),
        (["data", "synth"], "out"),
        (["bench", "data"], "out"),
        (["bench", "lora"], "out"),
        (["plan", "show=schedule"], "draw.svg"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_folder_where_a_file_is_written_is_refused_before_any_work(words, key, tmp_path, capsys):
    assert cli.main([*words, f"{key}={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"longctx: {key}={tmp_path} is a folder, and a file is written; name a file in it")


def test_a_picture_in_no_format_of_pictures_is_refused_before_any_work(tmp_path, capsys):
    assert cli.main(["data", "stats", "model=tiny", f"png={tmp_path}/lengths.docx"]) == 2
    assert "lengths.docx ends with no format of pictures; known: .png, .svg" in capsys.readouterr().err


def test_the_formats_of_pictures_are_those_that_can_be_written(tmp_path):
    from matplotlib.figure import Figure

    from longctx.storage.files import PICTURES, save_figure

    for suffix in PICTURES:
        save_figure(Figure(figsize=(1, 1)), tmp_path / f"picture{suffix}", dpi=10)
        assert (tmp_path / f"picture{suffix}").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["lora", "extract", "tuned=t", "out=o"], "base"),
        (["lora", "extract", "tuned=t", "base=b"], "out"),
        (["lora", "merge", "target=t", "out=o"], "adapter"),
        (["lora", "info"], "plan"),
        (["import", "out=o"], "gguf"),
        (["report"], "run"),
        (["train"], "model.path"),
        (["train", "model=tiny"], "name"),
        (["eval", "model.path=m"], "cache"),
        (["data", "synth"], "out"),
        (["data", "synth"], "cache"),
        (["preflight"], "folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_no_path_is_empty(words, key, capsys):
    """An empty path would be the current folder."""
    assert cli.main([*words, f"{key}="]) == 2
    assert re.match(rf"longctx: {key}(\.0)?='' is empty; give it a value \(", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lora merge target=t out=o adapter=[]", "adapter=[] is empty; give it a value"),
        ("lora merge target=t out=o adapter=a scale=[]", "scale=[] is empty; give it a value"),
        ("lora merge target=t out=o adapter=[a,a]", "adapter names a twice; name it once, scale=2"),
        ("lora merge target=t out=o adapter=a like=m window=4k", "like=m gives rope and window, and so do"),
        ("lora merge target=t out=o adapter=a like=m rope.theta=1e6", "like=m gives rope and window, and so do"),
        ("lora extract base=b tuned=t out=o device=tpu", "device='tpu' is not a device; write auto, cpu, cuda"),
        ("lora extract base=b tuned=t out=o text=x", "text=x is read with verify=loss only"),
        ("lora extract base=b tuned=t out=o verify=loss text=x text_tokens=1", "text_tokens=1 must be 2 or more"),
        ("bench data parts=[]", "parts=[] is empty; give it a value"),
        ("bench data seq_lens=[]", "seq_lens=[] is empty; give it a value"),
        ("bench attention lengths=[1026]", "lengths: 1026 is not divisible by 2 x ranks = 4; take 1024"),
        ("bench attention virtual_ranks=[]", "virtual_ranks=[] is empty; give it a value"),
        ("preflight mbytes=1e15", "mbytes=1000000000000000.0 must be at most 100000"),
        ("bench lora mergekit=.", "mergekit=. is not an executable"),
    ],
    ids=lambda value: value.partition("=")[0] if " " in value else value,
)  # fmt: skip
def test_what_means_nothing_is_refused_in_one_line(words, said, capsys):
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_device_that_is_not_here_is_refused_by_the_verbs_own_key(capsys):
    assert cli.main(["preflight", "device=cuda"]) == 2
    assert capsys.readouterr().err.startswith(
        "longctx: device=cuda, but this machine shows no CUDA device; use device="
    )
    for word in ("only=liger", "device=cuda"):
        assert cli.main(["bench", "step" if "only" in word else "attention", word]) == 2
        assert word in capsys.readouterr().err


def test_the_plan_of_a_run_elsewhere_needs_neither_of_its_folders(tmp_path, capsys):
    (tmp_path / "file").touch()
    words = ["plan", "show=schedule", f"run_dir={tmp_path}/file/run", f"cache={tmp_path}/file/x"]
    assert cli.main(words) == 0, capsys.readouterr().err


def test_a_library_in_rust_names_the_systems_error_in_its_text(tmp_path):
    with pytest.raises(SafetensorError) as refused:
        save_file({"x": torch.zeros(1)}, tmp_path / ("x" * 300))
    assert (
        refused_by_system(refused.value) == "a file cannot be read or written: File name too long; give a shorter name"
    )
    assert refused_by_system(ValueError("os error 36")) is None


def test_a_file_that_the_system_refuses_is_one_paragraph(tmp_path, capsys):
    name = tmp_path / ("x" * 300)
    assert cli.main(["theta", f"model.path={name}"]) == 1
    assert (
        f"longctx: {name} cannot be read or written: File name too long; give a shorter name" in capsys.readouterr().err
    )


@pytest.mark.parametrize("written", ["~/model", "'~/model'", '"~/model"'])
def test_a_path_may_begin_at_home(written, tmp_path, monkeypatch, capsys):
    """A shell expands ~/ behind out=, but not behind model.path=."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["theta", f"model.path={written}", "--cfg"]) == 0
    assert f"path: {tmp_path}/model\n" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["my models/llama 3", "models [v1]/x", "jürgen/日本語", "a(b)&c"])
def test_a_path_needs_quotes_of_the_shell_only(path, capsys):
    """Hydra's own grammar takes such text only in quotes of its own."""
    assert cli.main(["theta", f"model.path={path}", "--cfg"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] == path


def test_a_word_that_cannot_be_read_is_shown_as_it_was_typed(capsys):
    assert cli.main(["train", "model=tiny", "a b=c"]) == 2
    assert "'a b=c' cannot be read" in capsys.readouterr().err
