"""The presets for real models: `plan` marks no stage of them, with the command in the header of the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longctx import cli
from longctx.assets import known_config, known_models
from longctx.config.compose import load
from longctx.config.groups import config_dir, header
from longctx.verbs import VERBS

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
        folder = known_config(name)
        assert folder is not None
        stated = json.loads((folder / "config.json").read_text())
        read = AutoConfig.from_pretrained(folder)
        assert read.num_hidden_layers == stated["num_hidden_layers"]
        assert read.max_position_embeddings == stated["max_position_embeddings"]
        assert read.rope_parameters["rope_theta"] == stated["rope_theta"]
    assert known_config("some/model") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / known_models()[0]).mkdir(parents=True)
    assert known_config(known_models()[0]) is None  # a folder of that name here goes first
