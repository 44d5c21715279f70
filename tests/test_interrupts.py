"""Ctrl-C and SIGTERM at random instants of every verb that works for long: status, words, processes, files.

`pytest -m slow tests/test_interrupts.py` takes 20 instants of each.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.interrupted import Command, Outcome
from tests.train.made import TOKENIZER, write_documents

VERBS = ("data", "train", "eval", "lora-extract", "lora-merge")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents (few, and 5 MB of them), a base, a tuned model and an adapter between them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from longctx.config.lora import ExtractConfig
    from longctx.lora.extract import extract

    folder = tmp_path_factory.mktemp("material")
    write_documents(folder / "few")
    (folder / "many").mkdir()
    text = " ".join(path.read_text() for path in sorted((folder / "few").iterdir()))
    for number in range(8):
        (folder / "many" / f"{number}.txt").write_text((text * 30)[number : number + 600_000])
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    extract(ExtractConfig(base=str(folder / "base"), tuned=str(folder / "tuned"), out=str(folder / "adapter"), rank=8))
    return folder


def words(verb: str, material: Path, where: Path) -> list[str]:
    text, model = ["data=text"], f"model.path={material / 'base'}"
    if verb == "data":
        return [verb, "model=tiny", *text, f"data.path={material / 'many'}", "workers=2", f"cache={where / 'cache'}"]
    if verb == "train":
        return [
            verb, model, *text, f"data.path={material / 'few'}", "launch.nproc=2", f"run_dir={where / 'run'}",
            "~curriculum.stages.s2048", "~curriculum.stages.s8192", "curriculum.scratch=true",
            "+curriculum.stages.s512={seq_len: 512, theta: 20000, steps: 4, batch: 2}",
            "checkpoint.every=1", "checkpoint.spare_gib=0", "evaluate.heldout_sequences=2",
        ]  # fmt: skip
    if verb == "eval":
        return [
            verb, model, *text, f"data.path={material / 'few'}", "source=text", f"out={where / 'out'}",
            f"cache={where / 'cache'}", "needle.lengths=[384,512]", "needle.per_cell=2", "loss_windows=8",
        ]  # fmt: skip
    if verb == "lora-extract":
        return [verb, f"base={material / 'base'}", f"tuned={material / 'tuned'}", f"out={where / 'out'}"]
    return [verb, f"target={material / 'base'}", f"adapter={material / 'adapter'}", f"out={where / 'out'}"]


def check_interrupted(outcome: Outcome, at: str) -> None:
    lines = outcome.said.strip().splitlines()
    assert outcome.status == 130, (at, outcome)
    assert [line for line in lines if "interrupted" in line] == lines[-1:], (at, outcome)
    assert lines[-1].startswith("longctx: interrupted"), (at, outcome)
    assert not [line for line in lines if "Traceback" in line or "Error" in line or "Exception" in line], (at, outcome)
    assert (outcome.left, outcome.partial) == ([], []), (at, outcome)


def interrupt(verb: str, material: Path, folder: Path, instants: int, seed: int) -> int:
    """How many of the instants fell before its end; the undisturbed command's time gives their range."""
    began = time.monotonic()
    whole = Command(folder / "whole", words(verb, material, folder / "whole"))
    outcome = whole.outcome()
    assert (outcome.status, outcome.left, outcome.partial) == (0, [], []), outcome
    length, rng, met = time.monotonic() - began, random.Random(f"{verb} {seed}"), 0
    for number in range(instants):
        where, after = folder / str(number), rng.uniform(0.0, length)
        life = Command(where, words(verb, material, where))
        life.send(signal.SIGINT, after)
        if rng.random() < 0.3:
            life.send(signal.SIGINT, rng.uniform(0, 0.1))
        outcome = life.outcome()
        if outcome.status == 0 and not outcome.left:
            continue
        check_interrupted(outcome, f"{verb} after {after:.2f} of {length:.2f} s")
        met += 1
    return met
