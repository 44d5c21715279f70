"""The needle grid counts correctly: an oracle finds every needle, a blind model none."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from longctx.assets import tiny_model
from longctx.config.eval import NeedleConfig
from longctx.data.haystack import NeedleWriter, token_haystack
from longctx.data.needle_keys import split_of
from longctx.eval import needle
from longctx.eval.grid import from_json
from longctx.eval.picture import Panel, draw

CONFIG = NeedleConfig(lengths=(384, 512), per_cell=2, seeds=(1, 2))


@pytest.fixture(scope="module")
def writer():
    from transformers import AutoTokenizer

    return NeedleWriter(AutoTokenizer.from_pretrained(tiny_model()))


@pytest.fixture(scope="module")
def haystack(writer):
    text = "def area(width, height):\n    return width * height\n\n\n" * 50
    return token_haystack(writer.tokens(text), writer.newline_after)


def _oracle(tokens, where):
    return torch.nn.functional.one_hot(tokens[where + 1], 512).float()


def test_an_oracle_finds_every_needle_and_a_blind_model_none(writer, haystack):
    found = needle.grid(_oracle, CONFIG, writer, haystack, label="oracle")
    assert found.pooled() == 1.0
    assert found.asked.sum() == 2 * 2 * 5 * 2
    blind = needle.grid(lambda t, w: torch.zeros(len(w), 512), CONFIG, writer, haystack, label="blind")
    assert blind.pooled() == 0.0


def test_ranks_share_the_prompts_without_overlap(writer, haystack):
    parts = [needle.grid(_oracle, CONFIG, writer, haystack, label="", rank=r, world=3) for r in range(3)]
    assert sum(part.asked.sum() for part in parts) == 40
    assert all(part.asked.sum() > 0 for part in parts)


def test_one_wrong_token_of_an_answer_is_a_miss(writer, haystack):
    def half(tokens, where):
        scores = _oracle(tokens, where)
        scores[1::2] = 0  # the second token of every answer
        return scores

    assert needle.grid(half, CONFIG, writer, haystack, label="").pooled() == 0.0


def test_prompts_are_exact_in_length_fresh_in_keys_and_the_same_every_time(writer, haystack):
    first = list(needle.prompts(CONFIG, writer, haystack))
    again = list(needle.prompts(CONFIG, writer, haystack))
    for a, b in zip(first, again, strict=True):
        assert (a.document.tokens == b.document.tokens).all()
        assert len(a.document.tokens) == CONFIG.lengths[a.length]
        assert all(split_of(answer.key) == "eval" for answer in a.document.answers)
    keys = [answer.key for prompt in first for answer in prompt.document.answers]
    assert len(set(keys)) > 0.95 * len(keys)


def test_single_hides_one_needle_per_haystack(writer, haystack):
    single = replace(CONFIG, single=True)
    assert needle.haystacks(single) == 5 * needle.haystacks(CONFIG)
    assert all(len(p.document.answers) == 1 for p in needle.prompts(single, writer, haystack))


def test_ctrl_c_drops_the_prompts_that_have_not_begun(writer, haystack):
    many, begun, struck = replace(CONFIG, per_cell=20), [], threading.Event()

    def slow(tokens, where):
        begun.append(len(tokens))
        if len(begun) > 1:
            struck.wait()
            time.sleep(0.05)
        return _oracle(tokens, where)

    def strike():
        struck.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        needle.grid(slow, many, writer, haystack, label="", workers=1, tick=strike)
    assert len(begun) < needle.haystacks(many)


def test_grid_survives_json_and_is_drawn(writer, haystack, tmp_path):
    found = needle.grid(_oracle, CONFIG, writer, haystack, label="oracle")
    back = from_json(found.to_json())
    np.testing.assert_array_equal(back.cells, found.cells)
    draw([Panel(found, "costs $5", window=384)], tmp_path / "grid.png")  # a dollar begins no formula
    assert (tmp_path / "grid.png").stat().st_size > 5000
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_used_in_the_dtype_of_the_weights():
    from longctx.eval.predict import load_plain

    model = load_plain(tiny_model())
    assert next(model.parameters()).device.type == "cuda"
    assert str(model.dtype) == f"torch.{json.loads((tiny_model() / 'config.json').read_text())['dtype']}"
