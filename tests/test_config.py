"""Settings: units, unknown keys, wrong types and choices give one paragraph naming value, rule and remedy."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest
from pydantic import TypeAdapter

from longctx import cli
from longctx.config.base import Count, Length, build, parse_count, parse_length, schema
from longctx.config.compose import compose, resolve
from longctx.config.curriculum import CurriculumConfig
from longctx.config.groups import config_dir, groups
from longctx.config.keys import known_keys, members, step_into
from longctx.config.renamed import RENAMED
from longctx.config.train import TrainConfig
from longctx.errors import UserError, nearest
from longctx.processes import check_crowd, warn_if_crowded
from longctx.rope import RULES, DynamicNtk
from longctx.verbs import VERBS

TINY = ["model=tiny", "data=tiny", "curriculum=tiny_16x"]


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
    assert "stages.s1.tokn is not a known key; did you mean stages.s1.tokens? (a.yaml)" in _refusal(
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
            "modle is not a known key; did you mean model?",
        ),
        (
            ["train", "experiment=quickstart", "curriculum.stages.s2048.tokn=1"],
            "did you mean curriculum.stages.s2048.tokens?",
        ),
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
            ["train", "experiment=quickstart", "parallel.cp=4096", "launch.nproc=4096"],
            "launch.nproc=4096 would start 4096 processes on ",
        ),
        (["train", "-x"], "-x is not an option"),
        (["train", "experiment"], "write key=value"),
        (["bench", "atention"], "did you mean 'attention'"),
        (["lora", "merge", "target=a", "adapter=b", "out=c", "rope=kep"], "did you mean rope=keep"),
        (["train", "--config-dir", "/nowhere"], "/nowhere is not a folder"),
        (["train", "engine=fsdp"], "instead: engine=deepspeed engine.zero=3"),
        (["train", *TINY, "engine.device=gpu"], "instead: device=cuda"),
        (["train", *TINY, "model.dtype=fp16"], "instead: bfloat16, which has float32's range"),
        (["train", "engine=null"], "engine=null is not a choice; known: ddp, deepspeed"),
        (["train", "learning_rate=1"], "learning_rate is not a known key; longctx calls it curriculum.lr.peak"),
        (["train", *TINY, "needle.lengths=[512]"], "did you mean after_training.evidence.needle.lengths?"),
        (["train", *TINY, "optim.warmup_steps=5"], "did you mean curriculum.lr.warmup_steps?"),
        (["train", *TINY, "zero=2"], "zero is not a known key; did you mean engine.zero?"),
        (["train", *TINY, "accept=[memry]"], "accept=[memry] accepts nothing: did you mean accept=[memory]?"),
        (["plan", *TINY, "accept=[logging]"], "accept=[logging] accepts nothing: known: memory, disk, and the keys"),
        (["train", "~optm"], "optm is not a known key; did you mean optim"),
        (["train", "name.x=1"], "name has no keys inside it"),
        (["train", "+optim.momentum=1"], "optim.momentum is not a known key"),
        (["train", *TINY, "optim=3"], "optim=3 is not a choice; known: adamw"),
        (["train", *TINY, "curriculum.lr=3"], "curriculum.lr=3 stands for a whole section; give its keys"),
        (["train", *TINY, "accept=curriculum"], "write 'accept=[curriculum]'"),
        (["train", *TINY, "parallel.cp=x"], "parallel.cp='x' is not a whole number or 'auto'"),
        (["train", *TINY, "curriculum.stages.s204.batch=3"], "or did you mean curriculum.stages.s2048?"),
        (["train", *TINY, "rope=ynar"], "'ynar' is not a rule; did you mean 'yarn'?"),
        (
            ["train", *TINY, "rope=yarn", "curriculum.rule.alpha=1"],
            "curriculum.rule.alpha=1 does not belong to rule 'yarn'",
        ),
        (["train", *TINY, "curriculum.rule.factor=0.5"], "curriculum.rule.factor=0.5 must be 1 or more"),
        (
            ["train", *TINY, "data=text", "data.path=docs", "data.sources.text.rows=100k"],
            "data.sources.text.rows belongs to a dataset of the hub (kind=hub), not to files (kind=text)",
        ),
        (
            ["train", *TINY, "data=text", "data.path=docs", "data.sources.text.name=OWNER/DATASET"],
            "data.sources.text.name=OWNER/DATASET is a dataset of the hub, which needs kind=hub",
        ),
        (
            ["train", *TINY, "data=pg19", "data.sources.books.split='train[:10%]'"],
            "split=train[:10%] is a part of a split, and a dataset's files are read whole",
        ),
        (["train", "model.init.layers=0"], "model.init.layers=0 must be 1 or more"),
        (["train", "model.path=${nothing}"], "model.path has no value"),
        (["train"], "model.path is missing; give it as model.path=..."),
        *[
            (
                [verb, *TINY[: 3 * (verb == "train")], f"name={name}"],
                f"name={name!r} is not a name below runs/",
            )
            for verb, name in (("train", "../evil"), ("train", "a/../../evil"), ("train", "/tmp/evil"), ("theta", "."))
        ],
        (["data", "stat"], "'data stat' is not a verb; did you mean 'data stats'? data alone takes key=value"),
        (["data", "check", "model=tiny"], "'data check' is not a verb; data alone takes key=value, and has stats"),
        (["train", "=3"], "'=3' is not an override; write key=value"),
        (["train", *TINY, "accept=[nonsense]"], "accept=[nonsense] accepts nothing: known: memory, disk"),
        (["train", "name=[a"], "cannot be read: close every bracket and quote"),
        (["eval", "models={a: mo,del, b: x/y}"], """'models={a: "mo,del", b: x/y}'"""),
        (["train", "accept=[a (b),c]"], """'accept=["a (b)",c]'"""),
        (["eval", "models=[A, {name: t, path: my (new)/A}]"], """'models=[{key: "text"},...]'"""),
        (["train", *TINY, "seed=1,2"], "-m runs one after another: longctx VERB -m seed=1,2"),
        (["train", "hydra.run.dir=x"], "would set Hydra itself"),
        (["train", "hydra/launcher=joblib"], "would set Hydra itself"),
        (["train", "--cfg=hydra"], "there is no config but the verb's own"),
        (["train", "-cn", "other"], "every verb has its own root config"),
        (["train", "--help", "optm"], "optm is not a known key; did you mean optim?"),
        (["train", "-m", *TINY], "-m has nothing to sweep"),
        (["train", "-m", *TINY, "optim.max_grad_norm=1,big"], "optim.max_grad_norm='big' is not a number"),
        (["bench", "longest", "model=tiny"], "model=tiny: this command has no choices of model; give its keys"),
        (["bench", "longest", "engine=deepspeed"], "engine=deepspeed: this command has no choices of engine"),
        (["bench", "faults", "steps=11"], "steps=11 must be a multiple of 2"),
        (["train", *TINY, "data.heldout=1"], "data.heldout=1 must be below 1"),
        (["completion", "bsh"], "did you mean 'bash'?"),
        (["bench", "theta", "rules=[yarn,ynar]"], "'ynar' is not a rule; did you mean 'yarn'?"),
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


@pytest.mark.parametrize("topic", ["rope", "curriculum.rule"])
def test_help_of_the_rules_opens_with_the_key_and_lists_every_rule(topic, capsys):
    assert cli.main(["train", "--help", topic]) == 0
    out = capsys.readouterr().out
    assert out.startswith("curriculum.rule: rule of the stages that name neither theta nor rule")
    assert "curriculum.rule=longrope" in out


def test_a_folder_of_the_users_own_configs_adds_choices(tmp_path):
    (tmp_path / "curriculum").mkdir()
    (tmp_path / "curriculum" / "mine.yaml").write_text("stages: {s1k: {seq_len: 1024, theta: 1e5, tokens: 1e6}}\n")
    assert "mine" in groups([tmp_path])["curriculum"]
    values = compose("train", ["experiment=quickstart", "curriculum=mine"], [tmp_path])
    assert values["curriculum"]["stages"]["s1k"]["seq_len"] == 1024


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["--help"], {"torch", "transformers", "pydantic", "hydra", "omegaconf", "rich", "numpy", "yaml"}),
        (["trian"], {"torch", "transformers", "pydantic", "hydra", "omegaconf", "rich", "numpy", "yaml"}),
        (["train", "--help"], {"torch", "transformers", "rich"}),
        (["train", "modle.path=x"], {"torch", "transformers", "rich"}),
        (["theta", "model=tiny", "to=4096"], {"torch", "transformers", "matplotlib"}),
    ],
)
def test_answers_import_nothing_they_do_not_need(words, heavy):
    code = f"import sys, longctx.cli; longctx.cli.main({words}); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_mistake_in_a_file_of_ones_own_names_the_file(tmp_path, capsys):
    (tmp_path / "curriculum").mkdir()
    (tmp_path / "curriculum" / "mine.yaml").write_text("stages: {s1k: {seq_len: 1024\nrule: [\n")
    (tmp_path / "curriculum" / "old.yaml").write_text("defaults: [_gone]\nstages: {}\n")
    assert cli.main(["train", *TINY[:2], "--config-dir", str(tmp_path), "curriculum=mine"]) == 2
    assert f"{tmp_path}/curriculum/mine.yaml, line 2 is not valid YAML" in capsys.readouterr().err
    assert cli.main(["train", *TINY[:2], "--config-dir", str(tmp_path), "curriculum=old"]) == 2
    assert "curriculum=_gone is not a choice" in capsys.readouterr().err


def _knows(kind, key):
    for part in key.split("."):
        kind = step_into(kind, part)
    return kind is not None


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_names_the_new_one(old, capsys):
    """Each entry is right (the new key exists and the old one does not), and the refusal names the new key."""
    new, old = (key.replace("*", "mine") for key in (RENAMED[old], old))
    verbs = [verb for verb in VERBS.values() if _knows(resolve(verb.schema), new)]
    assert verbs
    assert not any(_knows(resolve(verb.schema), old) for verb in verbs)
    words = TINY if verbs[0].name in ("train", "plan") else []
    assert cli.main([*verbs[0].name.split(), *words, f"{old}=1"]) == 2
    assert f"{old} is now `{new}`" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["lora extract", "data stats", "bench lora"])
def test_a_verb_of_two_words_takes_a_hyphen_too(verb, capsys):
    said = [
        (cli.main([*words, "nonsense=1"]), capsys.readouterr().err)
        for words in (verb.split(), [verb.replace(" ", "-")])
    ]
    assert said[0] == said[1]
    assert said[0][0] == 2
    assert "nonsense is not a known key" in said[0][1]


def test_an_old_key_in_a_file_names_the_new_one():
    with pytest.raises(UserError, match=r"optim\.clip is now `optim\.max_grad_norm` \(a file\)"):
        build(TrainConfig, {**compose("train", TINY), "optim": {"clip": 1}}, origin="a file")
    with pytest.raises(UserError, match="hooks is now `after_training`"):
        build(TrainConfig, {**compose("train", TINY), "hooks": {"lora": {"rank": 8}}}, origin="a file")


def _keys_with(kind, word, path=()):
    for member in members(kind):
        if get_origin(member) is Literal and word in get_args(member):
            yield ".".join(path), kind
        inside = get_args(member)[1:] if get_origin(member) is dict else ()
        for item in inside:
            yield from _keys_with(item, word, (*path, "NAME"))
        if dataclasses.is_dataclass(member):
            for key in known_keys(member):
                yield from _keys_with(step_into(member, key), word, (*path, key))


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_key_that_takes_a_dtype_knows_its_short_name(verb):
    schema = resolve(VERBS[verb].schema)
    for word, short in (("bfloat16", "bf16"), ("float32", "fp32"), ("float64", "fp64"), ("float16", "half")):
        for key, kind in _keys_with(schema, word):
            assert TypeAdapter(kind).validate_python(short) == word, key


def test_rules_are_tagged_unions_that_replace_each_other():
    def rule(*words):
        return build(CurriculumConfig, compose("train", [*TINY, *words])["curriculum"], origin="test").rule

    assert rule() == DynamicNtk(factor=4)
    for words in (["rope=yarn"], ["curriculum.rule=yarn"], ["curriculum.rule={name: yarn}"]):
        assert rule(*words) == RULES["yarn"]()
    assert rule("rope=yarn", "rope.beta_fast=16", "curriculum.rule.start=previous") == RULES["yarn"](
        beta_fast=16, start="previous"
    )
    assert rule("rope={name: linear, factor: 4}") == RULES["linear"](factor=4)
    assert rule("rope=yarn_paper") == RULES["yarn-paper"]()
    stages = build(
        CurriculumConfig,
        compose("train", ["model=tiny", "curriculum=8k_to_1048k", "curriculum.stages.s64k.rule=yarn"])["curriculum"],
        origin="test",
    ).stages
    assert stages["s64k"].rule == RULES["yarn"]()
    assert stages["s32k"].rule is None


def test_more_ranks_than_cores_warn(monkeypatch, capsys):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    warn_if_crowded("launch.nproc", 2)
    assert not capsys.readouterr().err
    warn_if_crowded("launch.nproc", 7)
    assert "launch.nproc=7 processes share 2 cores" in capsys.readouterr().err
    check_crowd("launch.nproc", 16)
    with pytest.raises(UserError, match=r"launch.nproc=17 would start 17 processes on 2 cores, and at most 8 share"):
        check_crowd("launch.nproc", 17)
