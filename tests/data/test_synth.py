import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.base import build
from longctx.config.data import SynthTask
from longctx.data.haystack import NeedleWriter, token_haystack
from longctx.data.needle_keys import draw_keys, split_of
from longctx.data.synth import make_task
from longctx.errors import UserError

from .conftest import make_tokenizer, text_haystack

TASKS = [
    SynthTask(),
    SynthTask(kind="needles", count=4, questions=2),
    SynthTask(kind="chained", links=3),
    SynthTask(kind="table", count=6, questions=3),
    SynthTask(kind="variables", count=2, links=3),
    SynthTask(kind="copy"),
]


def _make(task, length, seed, straw, writer, keys="train"):
    return make_task(task, length, np.random.default_rng(seed), straw, keys=keys, tokenizer=writer)


def test_a_tokenizer_that_pads_and_truncates_writes_the_same_needles(writer):
    """Tokenizers that were saved after a fine-tune often do, and calling one sets both."""
    saved = make_tokenizer()
    saved.backend_tokenizer.enable_padding(length=32, pad_id=2, pad_token="<pad>")
    saved.backend_tokenizer.enable_truncation(8)
    padded = NeedleWriter(saved)
    assert padded.newline.tolist() == writer.newline.tolist()
    question = ("\nWhat is the pass key of 123456? The pass key of 123456 is ", "654321", ".")
    tokens, *span = padded.marked(*question)
    expected, *place = writer.marked(*question)
    assert tokens.tolist() == expected.tolist()
    assert span == place


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_length_is_exact_and_answers_are_where_they_say(task, straw, writer, tokenizer):
    for length in (300, 301, 512, 1777):
        document = _make(task, length, length, straw, writer)
        assert document.tokens.shape == document.weights.shape == (length,)
        assert document.tokens.dtype == np.int32
        assert document.weights.dtype == np.float32
        assert document.tokens[0] == tokenizer.bos_token_id
        assert document.weights[0] == 0
        for answer in document.answers:
            text = tokenizer.decode(document.tokens[answer.start : answer.end])
            if task.kind == "copy":
                size = answer.start - 1
                repeated = np.resize(document.tokens[1 : 1 + size], length - 1)
                assert np.array_equal(document.tokens[1:], repeated)
            else:
                assert text == answer.text
        assert document.answers[-1].end == length


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_same_seed_same_document_and_another_seed_another(task, straw, writer):
    first, again, other = (_make(task, 400, seed, straw, writer) for seed in (1, 1, 2))
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(120, 900))
def test_the_needle_answers_its_question(seed, length, straw, writer, tokenizer):
    text = tokenizer.decode(_make(TASKS[1], length, seed, straw, writer).tokens)
    needles = dict(re.findall(r"(?:^|<s>)The pass key of (\d{6}) is (\d{6})\.$", text, re.M))
    asked = re.findall(r"^What is the pass key of (\d{6})\? (\d{6})", text, re.M)
    assert len(needles) == 4
    assert len(asked) == 2
    assert all(needles[key] == value for key, value in asked)


def test_chain_table_and_variables_can_be_solved_from_the_text(straw, writer, tokenizer):
    text = tokenizer.decode(_make(TASKS[2], 600, 5, straw, writer).tokens)
    links = dict(re.findall(r"The pass key of (\d{6}) is (\d{6})", text))
    key, answer = re.findall(r"from (\d{6}) ends at (\d{6})", text)[0]
    for _ in range(3):
        key = links[key]
    assert key == answer

    text = tokenizer.decode(_make(TASKS[3], 600, 5, straw, writer).tokens)
    rows = dict(re.findall(r"(?:^|<s>)(\d{6}): (\d{6})$", text, re.M))
    asked = re.findall(r"In the table, (\d{6}) has the value (\d{6})", text)
    assert len(rows) == 6
    assert [rows[key] for key, _ in asked] == [value for _, value in asked]

    text = tokenizer.decode(_make(TASKS[4], 900, 5, straw, writer).tokens)
    origin = dict(re.findall(r"VAR (\d{6}) = (?:VAR )?(\d{6})\.", text))
    value, names = re.findall(r"hold (\d{6}) are ([\d ]+)", text)[0]

    def held(name):
        while name in origin:
            name = origin[name]
        return name

    assert sorted(names.split()) == sorted(name for name in origin if held(name) == value)


def test_needles_stand_at_the_stated_depths_on_their_own_lines(straw, writer, tokenizer):
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    task = SynthTask(kind="needles", count=5, depths=depths)
    document = _make(task, 4096, 3, straw, writer)
    body = document.answers[0].start
    for start, depth in zip(document.needles, depths, strict=True):
        assert abs(start / body - depth) < 0.06
        assert start == 1 or tokenizer.decode(document.tokens[:start]).endswith("\n")


def test_a_haystack_without_lines_still_gets_its_needle_on_a_line(writer, tokenizer):
    straw = token_haystack(writer.tokens("word " * 50))
    for depth in (0.0, 0.3, 1.0):
        document = _make(SynthTask(depths=(depth,)), 256, 1, straw, writer)
        assert len(document.tokens) == 256
        assert re.search(r"(^|\n|<s>)The pass key of \d{6} is \d{6}\.\n", tokenizer.decode(document.tokens))


def test_answers_together_weigh_the_stated_multiple_of_all_others(straw, writer):
    for task in TASKS[:5]:
        document = _make(task, 700, 1, straw, writer)
        mask = np.zeros(700, bool)
        for answer in document.answers:
            mask[answer.start : answer.end] = True
        assert document.weights[mask].sum() == pytest.approx(2 * document.weights[~mask].sum(), rel=1e-5)
    only = _make(SynthTask(other_weight=0.0), 300, 1, straw, writer)
    assert only.weights.sum() == only.answers[0].end - only.answers[0].start
    plain = _make(SynthTask(kind="copy"), 300, 1, straw, writer)
    assert np.array_equal(plain.weights, np.r_[0, np.ones(299)])


def test_training_and_evaluation_keys_never_meet():
    rng = np.random.default_rng(0)
    train = set(draw_keys(rng, 20_000, "train"))
    evaluation = set(draw_keys(rng, 5_000, "eval"))
    assert not train & evaluation
    for key in list(train)[:100] + list(evaluation)[:100]:
        digest = hashlib.sha256(key.encode()).hexdigest()
        assert (int(digest[:16], 16) % 10 == 0) == (key in evaluation) == (split_of(key) == "eval")
    share = sum(split_of(f"{n:06d}") == "eval" for n in range(0, 1_000_000, 50)) / 20_000
    assert share == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("task", TASKS[:5], ids=lambda task: task.kind)
@pytest.mark.parametrize("keys", ["train", "eval"])
def test_every_key_in_a_document_is_on_the_side_asked_for(task, keys, straw, writer, tokenizer):
    for seed in range(20):
        document = _make(task, 900, seed, straw, writer, keys)
        text = tokenizer.decode(document.tokens)
        names = re.findall(r"pass key of (\d{6})|^(\d{6}):|VAR (\d{6})|from (\d{6})|hold (\d{6})", text, re.M)
        found = {name for groups in names for name in groups if name}
        assert found
        assert {split_of(name) for name in found} == {keys}


def test_own_phrasing_and_a_tokenizer_that_joins_space_and_digits(straw):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([f"is {n}" for n in range(10**5, 10**5 + 3000)], trainer)
    writer = NeedleWriter(PreTrainedTokenizerFast(tokenizer_object=backend))
    task = SynthTask(needle="Vault {value} opens for {key}!", question="{key} opens vault {value}, she said.")
    document = make_task(
        task,
        200,
        np.random.default_rng(0),
        text_haystack(["one line\nand two\n"], writer),
        keys="eval",
        tokenizer=writer,
    )
    text = writer.tokenizer.decode(document.tokens)
    value, key = re.findall(r"Vault (\d{6}) opens for (\d{6})!", text)[0]
    assert text.endswith(f"{key} opens vault {value}, she said.")
    answer = document.answers[0]
    assert writer.tokenizer.decode(document.tokens[answer.start : answer.end]).strip() == value
    assert writer.bos is None


def test_digits_are_those_from_0_to_9(straw):
    """A power of two counts as a digit in Unicode, and a tokenizer without any digit has nothing to copy."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def writer_of(*words: str) -> NeedleWriter:
        backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(("\n", *words))}))
        return NeedleWriter(PreTrainedTokenizerFast(tokenizer_object=backend))

    assert writer_of("7", "\u00b2", "a", "0").digits.tolist() == [1, 4]
    task = SynthTask(kind="copy", symbols="digits")
    with pytest.raises(UserError, match="symbols=digits copies tokens made of digits, and the tokenizer has none"):
        make_task(task, 40, np.random.default_rng(0), straw, keys="train", tokenizer=writer_of("\u00b2", "a"))


def test_what_cannot_be_made_is_refused(straw, writer):
    with pytest.raises(UserError, match=r"needs .* tokens, and length=20"):
        _make(SynthTask(), 20, 0, straw, writer)
    with pytest.raises(UserError, match="does not fit twice"):
        _make(SynthTask(kind="copy", segment=200), 300, 0, straw, writer)
    with pytest.raises(ValueError, match=r"must hold \{key\} once"):
        SynthTask(needle="no field")
    with pytest.raises(UserError, match=r"depths\.0=1\.5 must be at most 1 "):
        build(SynthTask, {"depths": [1.5]}, origin="test")
    with pytest.raises(ValueError, match="asks for more"):
        SynthTask(kind="needles", count=2, questions=3)
    with pytest.raises(UserError, match="fast tokenizer"):
        NeedleWriter(object())


def test_thousands_of_short_documents_a_second(straw, writer):
    import time

    rng = np.random.default_rng(0)
    begin = time.process_time()
    for _ in range(300):
        make_task(SynthTask(), 512, rng, straw, keys="train", tokenizer=writer)
    assert 300 / (time.process_time() - begin) > 500  # thousands when the machine is idle


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_document_has_no_mark_where_the_data_have_none(task, straw, tokenizer):
    document = _make(task, 400, 1, straw, NeedleWriter(tokenizer, bos=False))
    assert tokenizer.bos_token_id not in document.tokens
    assert document.tokens.shape == (400,)
    assert document.weights[0] == 0
    for answer in document.answers:
        said = document.tokens[answer.start : answer.end]
        if task.kind == "copy":
            assert np.array_equal(said, np.resize(document.tokens[: answer.start], len(said)))
        else:
            assert tokenizer.decode(said) == answer.text
    assert document.answers[-1].end == 400


def test_without_bos_the_document_begins_with_the_haystack(straw):
    writer = NeedleWriter(make_tokenizer(bos=False))
    document = make_task(
        SynthTask(depths=(0.5,)),
        200,
        np.random.default_rng(0),
        token_haystack(writer.tokens("a b\n")),
        keys="train",
        tokenizer=writer,
    )
    assert document.tokens[0] in writer.tokens("a b\n")
