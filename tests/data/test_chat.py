import hashlib
import json

import numpy as np
import pytest

from longctx.config.base import build
from longctx.config.data import DataConfig
from longctx.data import open_stage_data
from longctx.data.chat import rendered
from longctx.data.prepare import tokenizer_spec
from longctx.errors import UserError

from .conftest import make_tokenizer


def _conversation(number):
    return [
        {"role": "user", "content": f"question {number}?"},
        {"role": "assistant", "content": f"answer {number} " * 6},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "the end"},
    ]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "chat"
    path.mkdir()
    rows = [{"messages": _conversation(n)} for n in range(40)]
    rows += [{"messages": [{"role": "user"}]}, {"messages": "text"}, {"messages": []}]
    (path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def _open(folder, tokenizer, tmp_path, length="joined", **source):
    values = {
        "sources": {"chat": {"kind": "chat", "path": str(folder), **source}},
        "mixes": {"m": {"chat": {"weight": 1.0, "length": length}}},
        "max_bad": 0.1,
        "heldout": 0.0,
    }
    config = build(DataConfig, values, origin="test")
    return open_stage_data(
        config, mix="m", seq_len=256, sequences=6, tokenizer=tokenizer, seed=0, split="train",
        cache=tmp_path / "c", stage="s",
    )  # fmt: skip


def test_assistant_turns_are_marked_in_the_rendered_text(tokenizer):
    text, spans = rendered(_conversation(3), tokenizer)
    assert text == tokenizer.apply_chat_template(_conversation(3), tokenize=False)
    said = [text[a:b] for a, b in spans]
    assert len(said) == 2
    assert said[0].endswith("answer 3 " * 6 + "\n")
    assert "question" not in said[0]
    assert said[1].endswith("the end\n")


DATED = (
    "  {%- if strftime_now is defined %}{% set day = strftime_now(FORMAT) %}{% endif %}\n"
    "{% for m in messages %}<{{ m.role }}>{{ day if loop.first }} {{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("format", "said"),
    [
        ("'%d %b %Y'", "26 Jul 2024"),
        ("format='%A, %B %-d, %Y'", "Friday, July 26, 2024"),
        ("'%Y-%m-%d' + ' %H:%M'", "2024-07-26 00:00"),
    ],
)
def test_a_template_that_writes_the_day_writes_always_the_same(format, said):
    tokenizer, today = make_tokenizer(), make_tokenizer()
    today.chat_template = DATED.replace("FORMAT", format)
    tokenizer.chat_template = DATED.replace("strftime_now(FORMAT)", f"'{said}'")
    assert rendered(_conversation(1), today) == rendered(_conversation(1), tokenizer)


def test_shards_with_a_date_have_another_key_than_those_of_the_day(folder):
    """The keys of other templates are those of before."""
    tokenizer = make_tokenizer()
    data = build(
        DataConfig, {"sources": {"s": {"kind": "chat", "path": str(folder)}}, "mixes": {"m": {"s": 1.0}}}, origin="test"
    )

    def key_and_text() -> tuple[str, str]:
        spec = tokenizer_spec(tokenizer, data, data.sources["s"])
        text = f"{spec.json}|None|None|{tokenizer.chat_template}|2|{tokenizer.special_tokens_map}"
        return spec.fingerprint(), hashlib.sha256(text.encode()).hexdigest()

    key, of_before = key_and_text()
    assert key == of_before
    tokenizer.chat_template = DATED.replace("FORMAT", "'%d %b %Y'")
    key, of_before = key_and_text()
    assert key != of_before


def test_joined_conversations_train_on_the_assistant_only(folder, tokenizer, tmp_path, capsys):
    stage = _open(folder, tokenizer, tmp_path, loss="assistant")
    assert "3 broken" in capsys.readouterr().err
    assert stage.stats()["padding"] == 0
    spoken = silent = ""
    for index in range(6):
        sequence = stage.sequence(index)
        assert sequence.boundaries.tolist() == [0, 256]
        assert set(np.unique(sequence.weights)) == {0.0, 1.0}
        spoken += tokenizer.decode(sequence.tokens[sequence.weights == 1])
        silent += tokenizer.decode(sequence.tokens[sequence.weights == 0])
    assert "answer" in spoken
    assert "question" not in spoken
    assert "question" in silent
    assert "answer" not in silent


@pytest.mark.parametrize("role", ["bot", "Assistant"])
def test_conversations_without_an_assistant_are_refused_where_only_the_assistant_trains(tokenizer, tmp_path, role):
    path = tmp_path / "chat"
    path.mkdir()
    rows = [{"messages": [{"role": "user", "content": "why?"}, {"role": role, "content": f"so {n} " * 9}]}
            for n in range(40)]  # fmt: skip
    (path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(UserError, match=r"stages\.s: no token of its 6 .*sources\.chat\.loss=assistant") as raised:
        _open(path, tokenizer, tmp_path, loss="assistant")
    assert "\n" not in str(raised.value)
    assert _open(path, tokenizer, tmp_path, loss="all").weights(0, np.arange(256)).any()


STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, the user first') }}{% endif %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
)


def test_conversations_that_the_template_refuses_are_broken_records(folder, tmp_path, capsys):
    strict = make_tokenizer()
    strict.chat_template = STRICT
    rows = [{"messages": _conversation(n)} for n in range(40)]
    rows[7] = {"messages": _conversation(7)[1:]}
    rows[9] = {"messages": [{"role": "user", "content": "half a character \ud800"}]}
    (folder / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    stage = _open(folder, strict, tmp_path)
    said = capsys.readouterr().err
    assert "of 40 records 2 broken" in said
    assert "x.jsonl:8: roles must alternate" in said
    assert "x.jsonl:10: " in said
    assert sum(shard.meta["documents"] for shard in stage._corpora["chat"].shards) == 38


def test_a_system_prompt_that_may_not_stand_alone_is_no_mistake(tokenizer):
    """A template that requires a user turn is only asked for conversations that end with an assistant's turn."""
    wants = make_tokenizer()
    wants.chat_template = "{% if messages[-1]['role'] == 'system' %}{{ raise_exception('no user') }}{% endif %}" + (
        tokenizer.chat_template
    )
    talk = [{"role": "system", "content": "be short"}, *_conversation(1)]
    text, spans = rendered(talk, wants)
    assert text == tokenizer.apply_chat_template(talk, tokenize=False)
    assert [text[a:b].split("\n")[-2] for a, b in spans] == ["answer 1 " * 6, "the end"]


WITH_OWN_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|system|>\nYou are helpful\n{% endif %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("content", ["Hello", "a", "", "  spaced "])
def test_a_conversation_that_the_assistant_begins_marks_its_words_alone(content):
    """The template's own system prompt is no reply."""
    other = make_tokenizer()
    other.chat_template = WITH_OWN_SYSTEM
    talk = [{"role": "assistant", "content": content}, *_conversation(1)]
    text, spans = rendered(talk, other)
    assert [text[a:b] for a, b in spans] == [f"{content}<end>\n", f"{'answer 1 ' * 6}<end>\n", "the end<end>\n"]


def test_a_prompt_that_ends_with_more_than_a_finished_turn_shows_takes_nothing_off_the_reply():
    """Reasoning models' templates begin a reply with <think> and leave it out of the turns that are done."""
    thinks = make_tokenizer()
    thinks.chat_template = WITH_OWN_SYSTEM.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
    text, spans = rendered(_conversation(1), thinks)
    assert [text[a:b] for a, b in spans] == [f"{'answer 1 ' * 6}<end>\n", "the end<end>\n"]


def test_other_special_tokens_of_a_template_are_tokenized_anew(folder, tmp_path):
    """A template writes eos_token; the tokenizer.json is the same whatever its name stands for."""
    counts = []
    for mark in ("</s>", "<pad>"):
        other = make_tokenizer()
        other.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }}{% endfor %}"
        other.eos_token = mark
        tokens = _open(folder, other, tmp_path).sequence(0).tokens
        counts.append([int((tokens == id).sum()) for id in other.convert_tokens_to_ids(["</s>", "<pad>"])])
    assert counts[0][0] == counts[1][1] > 0
    assert counts[0][1] == counts[1][0] == 0


@pytest.mark.parametrize("trimmed", [False, True])
def test_every_token_of_a_reply_is_marked_its_indentation_too(tmp_path, trimmed):
    """Some tokenizers trim spaces off the offsets of their tokens, which leaves a token of spaces empty."""
    from tokenizers import processors

    indents = make_tokenizer()
    indents.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    reply = "def f():\n        return  1\n"
    rows = [{"messages": [{"role": "user", "content": "write it"}, {"role": "assistant", "content": reply}]}] * 9
    path = tmp_path / "chat"
    path.mkdir()
    (path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sequence = _open(path, indents, tmp_path, length="natural", loss="assistant").sequence(0)
    assert indents.decode(sequence.tokens[sequence.weights == 1]).startswith(f"<|assistant|>\n{reply}")


def test_answers_weigh_a_multiple_of_the_rest(folder, tokenizer, tmp_path):
    stage = _open(folder, tokenizer, tmp_path, length="natural", answer_weight=3.0)
    sequence = stage.sequence(0)
    a, b = sequence.boundaries[:2]
    weights = sequence.weights[a:b].copy()
    weights[0] = 1.0  # the first token counts in the conversation, but is not predicted
    heavy = weights > weights[0]
    assert weights[heavy].sum() == pytest.approx(3 * weights[~heavy].sum(), rel=1e-5)


def test_tokenizers_that_cannot_render_are_refused(folder, tokenizer, tmp_path):
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        _open(folder, bare, tmp_path)
    forgetful = make_tokenizer()
    forgetful.chat_template = "{% for m in messages[-2:] %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(UserError, match="leaves out message 1 of 4 once others follow"):
        _open(folder, forgetful, tmp_path)


THINKING = """{%- for m in messages %}
{%- set words = m['content'] %}
{%- if m['role'] == 'assistant' and not loop.last %}{% set words = words.split('</think>')[-1] %}{% endif %}
{%- if m['role'] == 'assistant' and loop.last and '</think>' not in words %}
{%- set words = '<think></think>' + words %}{% endif %}
{{- '<' + m['role'] + '>' + words + '\n' }}
{%- endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.mark.parametrize("thought", ["", "<think>hm</think>"])
def test_a_reply_that_the_template_shows_otherwise_later_is_context(folder, tokenizer, tmp_path, capsys, thought):
    """As Qwen3's template: it shows thoughts, and their absence, in the last turn only."""
    thinking = make_tokenizer()
    thinking.chat_template = THINKING
    messages = _conversation(3)
    messages[1]["content"] = thought + messages[1]["content"]
    text, spans = rendered(messages, thinking)
    assert text == thinking.apply_chat_template(messages, tokenize=False)
    assert "hm" not in text
    assert [text[a:b] for a, b in spans] == ["<think></think>the end\n"]
    sequence = _open(folder, thinking, tmp_path, length="natural", loss="assistant").sequence(0)
    assert "40 replies count as context" in capsys.readouterr().err
    _open(folder, thinking, tmp_path / "all", loss="all")
    assert "count as context" not in capsys.readouterr().err
    said = thinking.decode(sequence.tokens[sequence.weights == 1])
    assert "the end" in said
    assert "answer" not in said
