"""`longctx.needle_grid` on models in memory: right counts, any family, the model left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import longctx
from longctx.assets import tiny_model
from longctx.config.eval import NeedleConfig
from longctx.data.haystack import NeedleWriter, token_haystack
from longctx.errors import UserError
from longctx.eval.needle import prompts

TEXT = "def area(width, height):\n    return width * height\n\n\nclass Shape:\n    sides = 4\n\n" * 40


@pytest.fixture(scope="module")
def llama() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_model())


@pytest.fixture(scope="module")
def qwen(llama: Any) -> Qwen2ForCausalLM:
    """The shipped Llama as a Qwen2: the same weights and projection biases of zero."""
    shape = {k: v for k, v in llama.config.to_dict().items() if k not in ("model_type", "architectures", "head_dim")}
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    state = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    model.load_state_dict({**state, **llama.state_dict()})
    return model


def test_another_family_is_asked_and_left_as_it_was(qwen: Any, tokenizer: Any, tmp_path: Any):
    qwen.train()
    found = longctx.needle_grid(qwen, tokenizer, lengths=(384, "1k"), text=TEXT, per_cell=2, seed=3)
    assert qwen.training
    assert np.shape(found.accuracies) == (5, 2)
    within, beyond = np.mean(found.accuracies, axis=0)
    assert within >= 0.9 > 0.3 >= beyond  # the model is trained at 512 tokens
    assert found.pooled == pytest.approx((within + beyond) / 2)
    values = found.to_dict()
    assert (values["window"], values["lengths"], values["asked"]) == (512, [384, 1024], [[2, 2]] * 5)
    assert np.divide(values["found"], values["asked"]).tolist() == found.accuracies
    assert found.draw(tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_an_answer_counts_exactly_when_greedy_decoding_writes_it(llama: Any, tokenizer: Any):
    asked = NeedleConfig(lengths=(640,), depths=(0.0, 0.3, 0.6, 1.0), per_cell=4, seeds=(3,), single=True)
    writer = NeedleWriter(tokenizer)
    haystack = token_haystack(writer.tokens(TEXT), writer.newline_after)
    written = np.zeros(4, int)
    for prompt in prompts(asked, writer, haystack):
        (answer,), tokens = prompt.document.answers, torch.from_numpy(prompt.document.tokens.astype(np.int64))
        count = answer.end - answer.start
        said = llama.generate(tokens[None, : answer.start], max_new_tokens=count, do_sample=False, pad_token_id=1)
        written[prompt.depth_index[0]] += bool((said[0, answer.start :] == tokens[answer.start : answer.end]).all())
    found = longctx.needle_grid(
        llama, tokenizer, lengths=(640,), depths=asked.depths, text=TEXT, per_cell=4, seed=3, single=True
    )
    assert 0 < written.sum() < 16  # some are found, some are not
    assert [row[0] for row in found.to_dict()["found"]] == written.tolist()


def test_a_model_without_rotary_embeddings_or_wrapped_by_peft_is_asked_too(llama: Any, tokenizer: Any):
    from peft import LoraConfig, get_peft_model

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=512, n_embd=32, n_layer=1, n_head=2))
    few: dict[str, Any] = {"lengths": (384,), "text": [TEXT, TEXT], "per_cell": 1}
    assert longctx.needle_grid(gpt2, tokenizer, **few).to_dict()["found"] == [[0]] * 5  # it guesses at random
    assert longctx.needle_grid(gpt2, tokenizer, **few).window == 512
    plain = longctx.needle_grid(llama, tokenizer, **few)
    wrapped = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))  # a change of zero
    assert longctx.needle_grid(wrapped, tokenizer, **few).accuracies == plain.accuracies
    wrapped.unload()


def test_the_standard_library_serves_where_no_text_is_given(tokenizer: Any, qwen: Any):
    found = longctx.needle_grid(qwen, tokenizer, lengths=(512,), depths=(0.5,), per_cell=1)
    assert found.to_dict()["asked"] == [[1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "short"}, "text has only"),
        ({"lengths": (40,)}, "a needles task with 5 lines and 5 questions needs"),
        ({"depths": (0.0, 2.0)}, "depths"),
        ({"lengths": ()}, "at least one"),
        ({"lengths": ("8q",)}, "is not a length; write 8192, 64k or 1M"),
    ],
)
def test_a_mistake_is_a_value_error_in_words(llama: Any, tokenizer: Any, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as refusal:
        longctx.needle_grid(llama, tokenizer, **{"lengths": (384,), "text": TEXT, **changes})
    assert isinstance(refusal.value, UserError)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any):
    small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=512, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="ids up to 511, and the model has 100"):
        longctx.needle_grid(small, tokenizer, lengths=(384,), text=TEXT)
