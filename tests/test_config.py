"""The door: units, unknown keys, wrong types and choices give one paragraph naming value, rule and remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

from longctx import cli
from longctx.config.base import Count, Length, build, parse_count, parse_length, schema
from longctx.config.compose import compose
from longctx.config.groups import config_dir, groups
from longctx.errors import UserError, nearest
from longctx.verbs import VERBS


@pytest.mark.parametrize(
    ("text", "value"),
    [("64k", 65536), ("65k", 65536), ("262k", 262144), ("524k", 524288), ("1048k", 2**20), ("4194k", 2**22),
     ("1M", 2**20), ("8192", 8192), (8192.0, 8192), ("8_192", 8192), ("1.5k", 1536)],
)  # fmt: skip
def test_lengths_are_powers_of_two(text, value):
    assert parse_length(text) == value


@pytest.mark.parametrize(("text", "value"), [("100M", 10**8), ("1e8", 10**8), (1e8, 10**8), ("2B", 2 * 10**9)])
def test_counts_are_powers_of_ten(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["abc", "64kb", "1.0001k", True, 1.5])
def test_a_length_that_is_none_says_so(text):
    with pytest.raises(ValueError, match=r"length|whole"):
        parse_length(text)


@schema
class Inner:
    tokens: Count = 1


@schema
class Outer:
    stages: dict[str, Inner]
    seq_len: Length = 8


def _refusal(values):
    with pytest.raises(UserError) as caught:
        build(Outer, values, origin="a.yaml")
    return str(caught.value)


def test_an_unknown_key_names_its_place_and_the_nearest():
    assert "stages.s1.tokn is not a known key; did you mean 'tokens'? (a.yaml)" in _refusal(
        {"stages": {"s1": {"tokn": 3}}}
    )


def test_a_missing_key_says_how_to_give_it():
    assert "stages is missing; give it as stages=..." in _refusal({})


def test_a_wrong_unit_shows_value_and_rule():
    message = _refusal({"stages": {}, "seq_len": "abc"})
    assert "seq_len='abc'" in message
    assert "write 8192, 64k or 1M" in message


def test_nearest_finds_what_was_meant():
    assert nearest("tokn", ["tokens", "theta"]) == "tokens"
    assert nearest("zzz", ["tokens"]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "experiment=quikstart"], "did you mean experiment=quickstart"),
        (
            ["train", "experiment=quickstart", "modle.path=x"],
            "modle is not a known key; did you mean 'model'",
        ),
        (["train", "experiment=quickstart", "curriculum.stages.s2048.tokn=1"], "did you mean 'tokens'"),
        (["train", "experiment=quickstart", "launch.nproc=three"], "launch.nproc='three'"),
        (
            ["train", "experiment=quickstart", "~curriculum.stages.s204"],
            "did you mean curriculum.stages.s2048",
        ),
        (
            ["train", "experiment=quickstart", "model=path", "model.path=/nowhere/x"],
            "/nowhere/x does not exist",
        ),
        (["train", "experiment=quickstart", "curriculum.mix=none"], "mix=none is not one of data.mixes"),
        (
            ["train", "experiment=quickstart", "curriculum.stages.s2048.seq_len=2050", "parallel.cp=2"],
            "seq_len=2050 is not divisible",
        ),
        (["train", "-x"], "-x is not an option"),
        (["train", "experiment"], "write key=value"),
        (["bench", "atention"], "did you mean 'attention'"),
        (["lora-merge", "target=a", "adapter=b", "out=c", "rope=kep"], "did you mean rope=keep"),
        (["train", "--config-dir", "/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_mistakes_cost_one_paragraph_and_status_2(words, said, capsys):
    assert cli.main(words) == 2
    spoken = capsys.readouterr().err
    assert said in spoken
    assert "Traceback" not in spoken


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_a_root_config_and_help(verb, capsys):
    assert (config_dir() / f"{VERBS[verb].root}.yaml").exists()
    assert cli.main([*verb.split(), "--help"]) == 0
    assert VERBS[verb].help in capsys.readouterr().out


def test_a_folder_of_the_users_own_configs_adds_choices(tmp_path):
    (tmp_path / "curriculum").mkdir()
    (tmp_path / "curriculum" / "mine.yaml").write_text("stages: {s1k: {seq_len: 1024, theta: 1e5, tokens: 1e6}}\n")
    assert "mine" in groups([tmp_path])["curriculum"]
    values = compose("train", ["experiment=quickstart", "curriculum=mine"], [tmp_path])
    assert values["curriculum"]["stages"]["s1k"]["seq_len"] == 1024


def test_help_and_import_are_light():
    code = "import sys, longctx, longctx.cli; longctx.cli.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
