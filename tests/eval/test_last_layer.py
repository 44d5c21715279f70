"""Logits at answers with the last layer's attention there alone, beside those of the whole forward pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from longctx.eval.last_layer import only_at
from longctx.eval.predict import load_plain, one_process
from longctx.model import init_from
from longctx.storage.model import FAMILIES
from tests.model.conftest import tiny

WHERE = [torch.tensor([3, 40, 41, 63]), torch.tensor([9]), torch.tensor([0, 63])]


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [*((family, {}, None) for family in FAMILIES), ("mistral", {}, 16), ("llama", {"layers": 1}, None)],
)
def test_answers_are_those_of_the_whole_model(tmp_path: Path, family: str, changes: dict, window: int | None) -> None:
    made = init_from(tiny(family, **changes), dtype="float64", attention="sdpa")
    if window:
        made.config.sliding_window = window
    made.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64", attn_implementation="sdpa")
    model = load_plain(tmp_path, dtype="float64")
    predict = one_process(model)
    prompts = torch.randint(0, model.config.vocab_size, (len(WHERE), 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = [plain(input_ids=ids[None]).logits[0, where] for ids, where in zip(prompts, WHERE, strict=True)]
        with ThreadPoolExecutor(3) as pool:  # prompts of several threads do not mix
            found = list(pool.map(predict, prompts, WHERE))
        torch.testing.assert_close(model(input_ids=prompts[:1]).logits[0, WHERE[0]], expected[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)  # predict returns float32


def test_the_last_layer_attends_at_the_answers_only(tmp_path: Path) -> None:
    init_from(tiny("llama"), dtype="float32").save_pretrained(tmp_path)
    model = load_plain(tmp_path)
    ids = torch.zeros(1, 256, dtype=torch.long)
    flops = []
    for where in (None, torch.tensor([255])):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            if where is None:
                model(input_ids=ids)
            else:
                with only_at(where):
                    model(input_ids=ids)
        flops.append(sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op)))
    assert flops[1] == pytest.approx(flops[0] * (0.5 + 0.5 / 256), rel=1e-9)
