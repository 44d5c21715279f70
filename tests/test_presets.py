"""The presets for real models: `plan` marks no stage of them, with the command in the header of the file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import longctx
from longctx import cli
from longctx.assets import config_folder, known_models
from longctx.config.compose import load
from longctx.config.groups import config_dir, header
from longctx.config.words import parse
from longctx.curriculum.select import selected
from longctx.data.stage_opening import choose_mix
from longctx.errors import UserError
from longctx.theta.inputs import starting_rope, target_stages
from longctx.theta.search import job_of
from longctx.train.checks import read_after_training
from longctx.verbs import VERBS
from tests.test_docs import COMMANDS, PAGES, PLACEHOLDERS, mentioned

FILES = {path.stem: path for path in sorted((config_dir() / "experiment").glob("*.yaml"))}
PLANNED = [name for name, path in FILES.items() if "longctx plan" in "\n".join(header(path))]


def test_the_presets_are_there():
    assert set(PLANNED) == {"llama3_8b_262k_8gpu", "llama3_8b_1048k", "llama3_70b_1048k", "qwen3_8b_1m", "ultralong"}


@pytest.mark.parametrize("name", PLANNED)
def test_a_preset_plans_as_its_header_says(name, capsys):
    text = " ".join(header(FILES[name]))
    machines, gib, hours = re.findall(r"`longctx plan` \((.*?)\): at most ([\d.]+) GiB a GPU, ([\d.]+) hours", text)[0]
    words = ["plan", f"experiment={name}", *machines.split()]
    assert cli.main([*words, "format=json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    stages = list(plan["stages"].values())
    assert all(stage["fits"] for stage in stages)
    assert max(stage["memory"]["total"] for stage in stages) / 2**30 == pytest.approx(float(gib), abs=0.06)
    assert plan["hours"] == pytest.approx(float(hours), abs=0.06)
    assert cli.main(words) == 0
    assert "!" not in capsys.readouterr().out


@pytest.mark.parametrize("name", PLANNED)
def test_a_preset_is_a_whole_training_command(name):
    config = load(VERBS["train"], [f"experiment={name}"])
    assert config.model.path in known_models()
    mixes = {stage.mix or config.curriculum.mix for stage in config.curriculum.stages.values()}
    assert mixes <= set(config.data.mixes)


def test_a_known_model_s_config_is_read_by_transformers(tmp_path: Path, monkeypatch):
    """The packaged config.json of each hub id loads as its architecture, with its window."""
    from transformers import AutoConfig

    for name in known_models():
        folder = Path(config_folder(name))
        stated = json.loads((folder / "config.json").read_text())
        read = AutoConfig.from_pretrained(folder)
        assert read.num_hidden_layers == stated["num_hidden_layers"]
        assert read.max_position_embeddings == stated["max_position_embeddings"]
        assert read.rope_parameters["rope_theta"] == stated["rope_theta"]
    assert config_folder("some/model") == "some/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / known_models()[0]).mkdir(parents=True)
    assert config_folder(known_models()[0]) == known_models()[0]  # a folder of that name here goes first


@pytest.mark.parametrize("name", known_models())
def test_a_known_model_needs_no_network_where_config_json_is_enough(name, capsys, monkeypatch, tmp_path: Path):
    """Every verb and function that reads nothing else of a model takes the packaged file; a search reads the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))  # an empty one; HF_HUB_OFFLINE is set
    assert cli.main(["theta", f"model.path={name}", "to=1M"]) == 0
    assert cli.main(["plan", f"model.path={name}", "curriculum=8k_to_1048k", "curriculum.only=[s1048k]"]) == 0
    assert cli.main(["lora", "info", f"plan={name}"]) == 0
    rope, _ = longctx.rope_for(name, window="1M")
    (stage,) = longctx.load_curriculum("8k_to_1048k", model=name, only=["s1048k"], rule="dynamic-ntk")
    assert stage.theta == rope["rope_theta"]
    capsys.readouterr()
    assert cli.main(["theta", f"model.path={name}", "search=true", "data=stdlib"]) == 2
    assert "it is not in the cache" in capsys.readouterr().err


PRINTED = sorted({*COMMANDS, *(tuple(words) for page in PAGES for words in mentioned(page))})
TRAINED = [words for words in PRINTED if words[0] == "train" and "--help" not in words]
SEARCHES = [words for words in PRINTED if words[0] == "theta" and "search=true" in words]


def test_a_printed_training_command_finds_its_mixes_and_sources():
    """Each stage's, and those of what follows training."""
    assert len(TRAINED) > 20
    for _, *words in TRAINED:
        line = parse(words)
        named = any(word.startswith(("model", "experiment=")) for word in words)
        if PLACEHOLDERS & set(words) or line.multirun or not named:
            continue
        config = load(VERBS["train"], line.overrides)
        for name, stage in selected(config.curriculum, "configs/curriculum").items():
            choose_mix(config.data, stage.mix or config.curriculum.mix, name)
        read_after_training(config)


@pytest.mark.parametrize("words", [words for words in SEARCHES if "model=tiny" in words], ids=" ".join)
def test_a_printed_search_for_theta_passes_its_checks(words, tmp_path: Path):
    config = load(VERBS["theta"], [*words[1:], f"run_dir={tmp_path}"])
    rope = starting_rope(config)
    assert job_of(config, rope, target_stages(config, rope)[0]).stage.seq_len == 8192
    trained = replace(config, trials=replace(config.trials, adapt_steps=1))
    if "default" not in config.data.mixes:
        with pytest.raises(UserError, match=r"mix=default is not one of data\.mixes"):
            job_of(trained, rope, target_stages(config, rope)[0])
