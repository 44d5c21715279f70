"""Random runs beside an oracle that shares none of their code: a loop over plain transformers and torch's AdamW.

A run draws family, shape, stages, split, schedule, memory dials, optimizer settings and a continuation elsewhere; the
oracle reads the same packed sequences one at a time in fp64. Seeds are fixed: `pytest -m slow`, about a minute.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from longctx.config.train import TrainConfig
from longctx.data import open_stage_data
from longctx.model import init_from
from longctx.train import metrics

from .lives import live
from .made import TOKENIZER, VOCAB, config

LR = 3e-3


def drawn(rng: random.Random) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """The changes of a run's config, and its lives: ranks and parallel settings."""
    kv_heads, family = rng.choice([1, 2]), rng.choice(["llama", "mistral", "qwen2", "qwen3", "gemma"])
    heads, head_dim = kv_heads * rng.choice([1, 2]), rng.choice([8, 10, 24])
    shape = {
        "family": family, "layers": rng.choice([1, 2]), "hidden": heads * head_dim, "heads": heads,
        "kv_heads": kv_heads, "head_dim": head_dim, "ffn": 40, "vocab": VOCAB, "window": 32,
        "tie_embeddings": rng.random() < 0.5,
    }  # fmt: skip
    stages = {
        f"part{number}": {"seq_len": rng.choice(lengths), "theta": theta, "steps": 3, "batch": 4}
        for number, (lengths, theta) in enumerate([((33, 47, 64), 10_000), ((65, 97, 128), 40_000)])
    }
    memory = rng.choice(
        [
            {"activation_checkpointing": False},
            {"keep_attention": False},
            {"keep_matmuls": 1},
            {"offload_activations": True},
        ]
    )
    lives = []
    for _ in range(2):
        world = rng.choice([1, 2, 4])
        schedule = rng.choice(["flat_ring", "double_ring", "allgather_ring"])
        cp = rng.choice([c for c in (1, 2, 4) if world % c == 0])
        lives.append((world, {"cp": cp, "schedule": schedule, "nodes": rng.choice([1, cp])}))
    changes = {
        "model": {"init": shape, "dtype": "float64",
                  "memory": {**memory, "ffn_block": rng.choice([0, 3, 50]), "loss_chunk": rng.choice([1, 7, 50])}},
        "curriculum": {"lr": {"peak": LR}, "stages": stages, "layout": rng.choice(["zigzag", "contiguous"])},
        "optim": {"beta1": rng.choice([0.0, 0.9]), "weight_decay": rng.choice([0.1, 1.0]), "eps": 1e-6,
                  "max_grad_norm": rng.choice([0.0, 0.05]), "z_loss": rng.choice([0.0, 0.1]),
                  "freeze": rng.choice([[], [], ["*norm*"], ["*layers.0*"]])},
    }  # fmt: skip
    return changes, lives


def oracle(run: Path, made: TrainConfig) -> Iterator[tuple[float, float, dict[str, torch.Tensor]]]:
    """The trained loss, gradient norm and weights of each step."""
    assert made.model.init is not None
    model, optim = init_from(made.model.init, dtype="float64", attention="sdpa"), made.optim
    trained = {n: p for n, p in model.named_parameters() if not any(fnmatch(f"model.{n}", f) for f in optim.freeze)}
    matrices = [p for p in trained.values() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}]
    groups += [{"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0}]
    betas = (optim.beta1, optim.beta2)
    adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=betas, eps=optim.eps, foreach=False)
    for name, stage in made.curriculum.stages.items():
        model.model.rotary_emb = type(model.model.rotary_emb)(
            config=AutoConfig.from_pretrained(run / "stages" / name / "model")
        )
        assert stage.steps is not None
        assert stage.batch is not None
        data = open_stage_data(
            made.data, mix="default", seq_len=stage.seq_len, sequences=stage.steps * stage.batch, seed=made.seed,
            tokenizer=AutoTokenizer.from_pretrained(TOKENIZER), split="train", cache=run / "data", stage=name,
        )  # fmt: skip
        for step in range(stage.steps):
            parts = [summed(model, data.sequence(step * stage.batch + i), optim.z_loss) for i in range(stage.batch)]
            loss = torch.stack([total for total, _ in parts]).sum() / sum(weight for _, weight in parts)
            adam.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in trained.values()))
            if 0 < optim.max_grad_norm < norm:
                for parameter in trained.values():
                    parameter.grad.mul_(optim.max_grad_norm / (norm + 1e-6))
            adam.step()
            yield float(loss.detach()), norm, {n: p.detach() for n, p in model.named_parameters()}


def summed(model: Any, sequence: Any, z_loss: float) -> tuple[torch.Tensor, float]:
    """The sum of w x (nll + z lse^2) of a packed sequence, document by document, and the sum of w."""
    tokens, weights = torch.from_numpy(sequence.tokens).long(), torch.from_numpy(sequence.weights).double()
    total = torch.zeros((), dtype=torch.float64)
    for low, high in zip(sequence.boundaries[:-1].tolist(), sequence.boundaries[1:].tolist(), strict=True):
        if high - low > 1:
            logits = model(input_ids=tokens[None, low:high], use_cache=False).logits[0, :-1]
            lse = logits.logsumexp(-1)
            nll = lse - logits.gather(-1, tokens[low + 1 : high, None]).squeeze(-1)
            total = total + (weights[low + 1 : high] * (nll + z_loss * lse.square())).sum()
    return total, float(weights.sum())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_random_run_equals_a_plain_loop(tmp_path: Path, documents: Path, seed: int) -> None:
    changes, (first, second) = drawn(random.Random(f"run {seed}"))
    run = tmp_path / "run"
    made = config(run, documents, **changes)
    assert live(config(run, documents, **changes, parallel=first[1]), first[0], stop_after=2) == 75
    assert live(config(run, documents, **changes, parallel=second[1]), second[0]) == 0
    lines = metrics.read(run / "metrics.jsonl")
    wanted = list(oracle(run, made))
    for line, (loss, norm, _) in zip(lines, wanted, strict=True):
        where = f"{line['stage']} {line['stage_step']} of {changes}"
        assert line["loss"] + (line["z_loss"] or 0.0) == pytest.approx(loss, rel=1e-9), where
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-7), where
    exported = load_file(run / "stages" / "part1" / "model" / "model.safetensors")
    for name, weight in wanted[-1][2].items():
        assert float((exported[name] - weight).norm()) <= 1e-7 * float(weight.norm()), name
