import json

import numpy as np
import pytest

from longctx.config.base import build
from longctx.config.data import DataConfig
from longctx.data import open_stage_data
from longctx.data.chat import rendered
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
    with pytest.raises(UserError, match="rewrites earlier turns"):
        _open(folder, forgetful, tmp_path)
