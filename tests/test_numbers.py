"""Every number that a config takes: its range belongs to the schema, so that any verb refuses a wrong one at once."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args, get_origin

import pytest

from longctx import cli
from longctx.config.base import build
from longctx.config.compose import load, resolve
from longctx.config.help import as_dict
from longctx.config.keys import alias, hints_of, members, variants
from longctx.errors import UserError
from longctx.rope import RULES
from longctx.verbs import VERBS
from tests.test_config_keys import SECTIONS

# Command lines that together have every section that holds a number.
STAGE = "{seq_len: 512, steps: 1, batch: 1, theta: 20000}"
FULL = [
    "experiment=quickstart",
    "curriculum.made_for={head_dim: 64, theta: 10000, window: 512}",
    "data.sources.drawn={kind: synth, haystack: stdlib, task: {kind: needles, count: 2}}",
    "data.mixes.drawn={drawn: {weight: 1.0, length: {fixed: {length: 512}}}}",
    "parallel.cp_by_stage={s2048: 1}",
    f"after_training.sibling={{run: {{stage: {STAGE}}}}}",
]
LINES: list[tuple[str, Any]] = [
    ("train", FULL),
    ("plan", ["model=tiny_init"]),
    ("submit", ["model=tiny", "launch.nodes_by_stage={s2048: 1}", "launch.per_stage=true"]),
    ("eval", ["models={a: {path: a}}"]),
    ("lora extract", ["base=b", "tuned=t", "out=o"]),
    ("lora merge", ["target=t", "adapter=a", "out=o"]),
    ("theta", ["to=1M", "from=8k", "head_dim=128", "theta=500000"]),
    *[("theta", {"rule": {"name": rule}}) for rule in RULES],
    *[(verb, []) for verb in VERBS if verb.startswith("bench") or verb in ("doctor", "preflight", "lora info")],
    *[("data", ["model=tiny"]), ("data stats", ["model=tiny"]), ("data synth", ["model=tiny"])],
]
NEVER = [math.nan, math.inf, -math.inf, True, False, "", "abc", "1e400", [], 1e99, -1e99, 10**40]
SIGNED = {"MergeConfig.scale"}  # an adapter may be taken away


@dataclasses.dataclass(frozen=True)
class Key:
    """A key that takes numbers: how a verb names it, and its field in the schemas."""

    line: int
    path: tuple[str, ...]
    field: str
    kind: Any

    @property
    def listed(self) -> bool:
        """Whether it takes a list of them."""
        return any(get_origin(member) in (list, tuple) for member in members(self.kind))

    @property
    def whole(self) -> bool:
        return not any(member is float for member in _leaves(self.kind))

    def refusal(self, value: Any) -> str:
        """What is said of a value; the empty text where it is taken."""
        values = section = dict(composed(self.line))
        for part in self.path[:-1]:
            section[part] = section = dict(section[part])
        section[self.path[-1]] = [value] if self.listed and not isinstance(value, list) else value
        try:
            build(resolve(VERBS[LINES[self.line][0]].schema), values, origin="the file")
        except UserError as error:
            return str(error)
        return ""


def _leaves(kind: Any) -> Iterator[Any]:
    """The types of the values that a key takes, alone or in a list."""
    for member in members(kind):
        if get_origin(member) in (list, tuple):
            yield from _leaves(get_args(member)[0])
        elif member in (int, float):
            yield member


def _keys(line: int, kind: Any, values: Any, path: tuple[str, ...], field: str) -> Iterator[Key]:
    if next(_leaves(kind), None) and not variants(kind):
        yield Key(line, path, field, kind)
    for member in members(kind):
        if not isinstance(values, dict) or (variants(kind) and values.get("name") != getattr(member, "name", None)):
            continue
        if get_origin(member) is dict:
            for name, item in values.items():
                yield from _keys(line, get_args(member)[1], item, (*path, name), field)
        elif dataclasses.is_dataclass(member):
            for inside in dataclasses.fields(member):
                name, here = alias(inside), f"{member.__name__}.{inside.name}"
                yield from _keys(line, hints_of(member)[inside.name], values.get(name), (*path, name), here)


@cache
def composed(line: int) -> dict[str, Any]:
    """Every key of a command line's config with its value. Keys in place of words change the verb's first line."""
    verb, words = LINES[line]
    if isinstance(words, list):
        return as_dict(load(VERBS[verb], words))
    first = next(index for index, (name, _) in enumerate(LINES) if name == verb)
    return as_dict(build(resolve(VERBS[verb].schema), {**composed(first), **words}, origin="the file"))


@pytest.fixture(scope="module")
def numbers() -> list[Key]:
    """The keys that take numbers, each field of the schemas once."""
    found = [
        key for line, (verb, _) in enumerate(LINES)
        for key in _keys(line, resolve(VERBS[verb].schema), composed(line), (), "")
    ]  # fmt: skip
    return list({key.field: key for key in reversed(found)}.values())


def test_the_walk_reaches_every_number_of_every_schema(numbers: list[Key]):
    fields = {
        f"{section.__name__}.{name}"
        for section in SECTIONS
        for name, hint in hints_of(section).items()
        if get_origin(hint) is not dict and next(_leaves(hint), None)
    }
    assert fields - {key.field for key in numbers} == set()
    assert len(numbers) > 200


def test_no_key_takes_what_is_no_number_and_each_refusal_names_key_and_value(numbers: list[Key]):
    wrong = []
    for key in numbers:
        where = ".".join(key.path)
        for value in [item for item in NEVER if not (key.listed and item == [])]:
            said = key.refusal(value)
            begins = re.match(rf"{re.escape(where)}(\.0)?={re.escape(repr(value))} ", said)
            if not begins or "\n" in said or not said.endswith("(the file)"):
                wrong.append((where, value, said))
    assert wrong == []


def test_no_key_takes_a_negative_number(numbers: list[Key]):
    taken = [key.field for key in numbers if not key.refusal(-1)]
    assert set(taken) == SIGNED


def test_whole_numbers_are_whole(numbers: list[Key]):
    assert [key.field for key in numbers if key.whole and not key.refusal(0.5)] == []


def test_zero_is_taken_only_where_it_means_something(numbers: list[Key]):
    taken = {key.field.partition(".")[2] for key in numbers if not key.refusal(0)}
    off = {"every_steps", "every_minutes", "max_grad_norm", "stall_seconds", "heldout_sequences", "min_len"}
    none_of_it = {
        "adapt_steps", "answer_weight", "attempts", "budget_gib", "ffn_block", "heldout", "keep_matmuls", "kills",
        "kills_in_saves", "latency_us", "max_bad", "needle_weight", "needles", "other_weight", "requeues", "rounds",
        "scale", "sigterms", "spare_gib", "warmup_steps", "weight_decay", "z_loss",
    }  # fmt: skip
    a_value = {"seed", "seeds", "depths", "beta1", "beta2", "final", "min_drop", "min_share"}
    assert taken == off | none_of_it | a_value


def test_what_large_runs_need_is_taken():
    words = [
        "model=tiny_init", "model.init.layers=126", "model.init.hidden=16384", "model.init.heads=128",
        "model.init.kv_heads=8", "model.init.ffn=53248", "model.init.vocab=256000", "model.init.window=8k",
        "curriculum.stages.s2048={seq_len: 4M, theta: 4e12, tokens: 40T, batch_tokens: 64M, lr: {peak: 1e-5}}",
        "parallel.cp=16384", "parallel.nodes=2048", "nodes=4096", "ranks=8", "seed=20261127235959",
        "engine.timeout_seconds=86400", "launch.meeting_minutes=1440", "guards.stall_seconds=86400",
    ]  # fmt: skip
    config = load(VERBS["plan"], words)
    assert config.curriculum.stages["s2048"].tokens == 40 * 10**12
    assert config.curriculum.stages["s2048"].seq_len == 2**22


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.weight_decay=1667"], "curriculum.lr.peak=0.0006: each step multiplies the matrices by 1 - rate x"),
        (["optim.weight_decay=101", "curriculum.stages.s8192.lr.peak=0.01"], "curriculum.stages.s8192.lr.peak=0.01: "),
        (
            ["optim.weight_decay=1001", "experiment=quickstart", "after_training.sibling.run.stage.lr.peak=0.001"],
            "after_training.sibling.run.stage.lr.peak=0.001: ",
        ),
    ],
)
def test_a_decay_that_would_turn_the_weights_signs_is_refused(words: list[str], said: str):
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        load(VERBS["train"], ["model=tiny", *words])
    assert str(refused.value).startswith(f"{words[0]} is too much for ")
    assert "or less (0.1 is customary)" in str(refused.value)


def test_a_decay_up_to_all_of_a_weight_is_taken():
    assert load(VERBS["train"], ["model=tiny", "optim.weight_decay=1666"]).optim.weight_decay == 1666
    unused = ["curriculum.stages.s8192.lr.peak=0.01", "curriculum.only=[s2048]"]
    assert load(VERBS["train"], ["model=tiny", "optim.weight_decay=101", *unused])


@pytest.mark.parametrize("verb", ["train", "plan", "submit", "data"])
def test_every_verb_with_stages_says_it_in_the_same_words(verb: str, capsys: pytest.CaptureFixture[str]):
    for word, said in (
        ("curriculum.stages.s2048.seq_len=0", "curriculum.stages.s2048.seq_len=0 must be 2 or more"),
        ("engine.micro_batch=0", "engine.micro_batch=0 must be 1 or more"),
    ):
        assert cli.main([*verb.split(), "model=tiny", word, "--cfg"]) == 2
        assert capsys.readouterr().err.startswith(f"longctx: {said}")
