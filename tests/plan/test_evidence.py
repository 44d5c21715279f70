"""The planned memory of evidence beside what a forward pass holds, and the refusal before training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longctx.cli import main
from longctx.config.after_training import EvidenceSettings
from longctx.config.base import build
from longctx.config.model import InitConfig
from longctx.errors import UserError
from longctx.eval.last_layer import attention_name
from longctx.eval.loss import token_losses
from longctx.eval.predict import one_process
from longctx.model import init_from
from longctx.planner.evidence import check_evidence_memory, forward_bytes, largest, needs_of
from longctx.shape import shape_of_init
from longctx.train import machine
from tests.train.made import TOKENIZER
from tests.watch import Storages

GIB = 2.0**30
TOKENS = 2048


def model_and_shape(family: str, ffn: int, dtype: str, vocab: int = 512) -> tuple[Any, Any]:
    spec = InitConfig(family=family, layers=3, hidden=128, heads=8, kv_heads=2, head_dim=32, ffn=ffn, vocab=vocab,
                      window=TOKENS)  # fmt: skip
    model = init_from(spec, dtype=dtype)
    model.set_attn_implementation(attention_name())
    return model.eval(), shape_of_init(spec)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "ffn"), [("llama", 512), ("llama", 64), ("qwen3", 512), ("gemma", 1024)])
def test_a_needles_forward_holds_what_is_planned(family: str, ffn: int, dtype: str):
    """At 64 the rotation of the queries is the most, at the others the feed-forward network."""
    model, shape = model_and_shape(family, ffn, dtype)
    with Storages() as held:
        one_process(model)(torch.zeros(TOKENS, dtype=torch.long), torch.arange(8))
    assert forward_bytes(shape, TOKENS, 4 if dtype == "float32" else 2) == pytest.approx(held.peak, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loss_holds_what_is_planned_where_the_vocabulary_is_large(dtype: str):
    """log-softmax is inside one operator of cross-entropy, whose temporaries the count does not see."""
    model, shape = model_and_shape("llama", 256, dtype, vocab=16384)
    rows = np.zeros((1, TOKENS), np.int64)
    with Storages() as held:
        token_losses(model, rows)
    unseen = (TOKENS - 1) * 16384 * 4
    planned = forward_bytes(shape, TOKENS, 4 if dtype == "float32" else 2, losses=True)
    assert planned == pytest.approx(held.peak + unseen, rel=0.03)


def evidence(**changes: Any) -> EvidenceSettings:
    return build(EvidenceSettings, {"needle": {"lengths": [8192, 131072, 1048576]}, **changes}, origin="test")


LLAMA_8B = shape_of_init(InitConfig(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, window=8192))


def test_a_length_that_does_not_fit_is_refused_with_lengths_that_do():
    asked = evidence(heldout_lengths=[512, 1048576])
    needs = needs_of(asked, LLAMA_8B, "bfloat16", "cuda", 16)
    with pytest.raises(UserError) as error:
        check_evidence_memory(needs, 79 * GIB, "cuda")
    said = str(error.value)
    assert said.startswith("after_training.evidence.needle.lengths asks for 1,048,576 tokens, which need about 131 GiB")
    assert "on the one GPU" in said
    assert "accept=[memory] starts it" in said
    lengths = dict(re.findall(r"'after_training\.evidence\.([\w.]+)=\[([\d,]+)\]'", said))
    assert lengths == {"needle.lengths": "8192,131072", "heldout_lengths": "512"}
    fits = evidence(needle={"lengths": [8192, 131072]}, heldout_lengths=[512])
    check_evidence_memory(needs_of(fits, LLAMA_8B, "bfloat16", "cuda", 16), 79 * GIB, "cuda")
    with pytest.raises(UserError, match=r"What would fit: after_training\.evidence=null"):
        check_evidence_memory(needs, 10 * GIB, "cuda")


def test_the_cores_of_a_machine_read_a_haystack_each():
    one, many = (largest(needs_of(evidence(), LLAMA_8B, "bfloat16", "cpu", cores)) for cores in (1, 8))
    assert (many.at_once, many.forward) == (8, 8 * one.forward)
    assert one.weights == 4 * LLAMA_8B.parameters  # float32
    few = evidence(needle={"lengths": [512], "per_cell": 1, "seeds": [1]})
    assert largest(needs_of(few, LLAMA_8B, "bfloat16", "cpu", 64)).at_once == 1


def command(tmp_path: Path, *words: str) -> list[str]:
    (tmp_path / "text").mkdir()
    return [f"model.path={TOKENIZER}", "data=text", f"data.path={tmp_path / 'text'}", "curriculum=tiny_16x",
            "curriculum.mix=default", "after_training=proof", "after_training.evidence.control=null",
            "after_training.sibling=null", "after_training.evidence.source=text", *words]  # fmt: skip


def test_training_refuses_evidence_that_does_not_fit_before_it_reads_a_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "host_memory", lambda: 2 * GIB)
    words = command(tmp_path, "after_training.evidence.needle.lengths=[512,1048576]", f"run_dir={tmp_path / 'run'}")
    (tmp_path / "text" / "a.txt").write_text("some text\n" * 10000)
    for more in (["launch.nproc=2"], []):
        assert main(["train", *words, *more]) == 2
        assert "after_training.evidence.needle.lengths asks for 1,048,576 tokens" in capsys.readouterr().err
    assert not list(tmp_path.rglob("meta.json"))


def test_a_plan_shows_the_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = command(tmp_path, "after_training.evidence.needle.lengths=[512,1048576]", "hardware=cpu", "ranks=2")
    assert main(["plan", *words, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["evidence"]
    assert (found["key"], found["tokens"], found["fits"]) == ("needle.lengths", 1048576, True)
    assert main(["plan", *words, "hardware.memory_gib=1"]) == 0
    assert re.search(r"evidence after training, on one node: [\d.]+ GiB! for 1,048,576 tokens", capsys.readouterr().out)
