"""Small material for the training tests: documents, sequences packed from them, and configs of tiny runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config.base import build
from longctx.config.train import TrainConfig
from longctx.train import metrics

TOKENIZER = str(Path(__file__).parents[2] / "longctx" / "assets" / "tiny")
VOCAB = 512
WORDS = "ring attention passes every block of keys and values around the ranks until each query has seen them all"


@dataclass(frozen=True)
class Local:
    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


class MadeData:
    """Stands in for data.StageData: random documents of uneven lengths, packed; answers weigh more than the
    rest.

    mute: sequences whose tokens carry no loss at all.
    """

    def __init__(self, seq_len: int, count: int, seed: int = 0, mute: tuple[int, ...] = ()) -> None:
        self.seq_len = seq_len
        rng = np.random.default_rng(seed)
        self.tokens_of, self.weights_of, self.bounds_of = [], [], []
        for index in range(count):
            cuts = np.sort(rng.choice(np.arange(1, seq_len), size=1 + index % 4, replace=False))
            bounds = np.concatenate([[0], cuts, [seq_len]])
            weights = rng.choice([0.0, 1.0, 2.5], size=seq_len, p=[0.2, 0.6, 0.2]).astype(np.float32)
            weights[bounds[:-1]] = 0.0
            self.tokens_of.append(rng.integers(0, VOCAB, seq_len).astype(np.int64))
            self.weights_of.append(weights * (index not in mute))
            self.bounds_of.append(bounds)

    def __len__(self) -> int:
        return len(self.tokens_of)

    def boundaries(self, index: int) -> np.ndarray:
        return self.bounds_of[index]

    def documents(self, index: int) -> tuple[str, ...]:
        return tuple(f"made:{index}.{part}" for part in range(len(self.bounds_of[index]) - 1))

    def local(self, index: int, positions: np.ndarray) -> Local:
        following = np.minimum(positions + 1, self.seq_len - 1)
        inside = positions + 1 < self.seq_len
        labels = np.where(inside, self.tokens_of[index][following], -100)
        weights = np.where(inside, self.weights_of[index][following], 0.0).astype(np.float32)
        return Local(self.tokens_of[index][positions], labels, weights)


def write_documents(folder: Path, count: int = 40) -> Path:
    """A folder of small text files, a few hundred tokens each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    words = WORDS.split()
    for number in range(count):
        text = " ".join(str(rng.choice(words)) + (f" {rng.integers(99)}" if rng.random() < 0.2 else "")
                        for _ in range(int(rng.integers(30, 200))))  # fmt: skip
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def config(folder: Path, documents: Path, **changes: Any) -> TrainConfig:
    """A run of two stages on a model of two small layers; `changes` replace whole top-level keys or merge
    dicts.
    """
    values: dict[str, Any] = {
        "name": folder.name, "run_dir": str(folder), "seed": 5,
        "model": {"init": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": VOCAB,
                           "window": 64},
                  "tokenizer": TOKENIZER},
        "data": {"sources": {"text": {"kind": "text", "path": str(documents)}},
                 "mixes": {"default": {"text": 1.0}}},
        "curriculum": {"lr": {"peak": 3.0e-3}, "scratch": True, "stages": {
            "s64": {"seq_len": 64, "theta": 10000, "steps": 5, "batch": 4},
            "s128": {"seq_len": 128, "theta": 40000, "steps": 4, "batch": 2}}},
        "logging": {"display": "none"}, "checkpoint": {"every_steps": 2, "every_minutes": 0, "spare_gib": 0.0},
        "evaluate": {"heldout_sequences": 2}, "guards": {"stall_seconds": 0},
        "after_training": {"lora": {"enabled": False}},
    }  # fmt: skip
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    return build(TrainConfig, values, origin="tests")


def losses(run: Path) -> list[float]:
    """The losses in a run's metrics, step by step."""
    return [line["loss"] for line in metrics.read(run / "metrics.jsonl")]
