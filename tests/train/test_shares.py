"""Under ZeRO-3 no rank ever holds the whole model, neither while loading or drawing nor later; numbers are right."""

from __future__ import annotations

import ctypes
import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config.model import InitConfig, MemoryConfig
from longctx.config.train import EngineConfig, OptimConfig
from longctx.distributed.ranks import Ranks
from longctx.model import LossModel, init_from, load
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import engine as engines
from longctx.train import metrics
from longctx.train.parameters import full_shape
from longctx.train.train import train
from tests.dist.ranks import run_ranks

from .lives import live
from .made import TOKENIZER, VOCAB, config, write_documents
from .test_worlds import newest, part, same

ZERO3 = EngineConfig(name="deepspeed", zero=3, device="cpu")
SMALL = InitConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=VOCAB, window=64, seed=7)
LARGE = InitConfig(layers=6, hidden=768, heads=8, kv_heads=8, ffn=2560, vocab=VOCAB, window=64)  # 200 MB in fp32

M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Case:
    """A model drawn from `spec`, or loaded from `folder`, which holds it."""

    spec: InitConfig
    folder: str | None = None
    dtype: str = "float32"

    def made(self, place: Any = None) -> Any:
        if self.folder is None:
            return init_from(self.spec, dtype=self.dtype, place=place)
        return load(self.folder, dtype=self.dtype, place=place)


def ranks_of(rank: int, world: int) -> Ranks:
    return Ranks(rank, world, rank, world, torch.device("cpu"))


def told(failures: dict[Any, list[str]]) -> str:
    return "\n".join(f"{case}: {text[0]}" for case, text in failures.items())


def check_numbers(rank: int, world: int, case: Case) -> None:
    """Assert that a sharded model has the names, ties, flags, buffers and, bit for bit, numbers of an unsharded one."""
    import deepspeed

    place = engines.placer(ZERO3, OptimConfig(), case.dtype, ranks_of(rank, world))
    whole, state = case.made(), torch.get_rng_state()
    model = case.made(place)
    assert torch.get_rng_state().equal(state)
    ours, theirs = (dict(made.named_parameters(remove_duplicate=False)) for made in (model, whole))
    assert list(ours) == list(theirs)
    assert len(list(model.parameters())) == len(list(whole.parameters()))
    for name, parameter in ours.items():
        assert parameter.numel() == 0, f"{name} is whole"
        assert full_shape(parameter) == theirs[name].shape, name
        assert parameter.requires_grad, name
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.dtype == theirs[name].dtype, name
            assert parameter.equal(theirs[name]), name
    for (name, buffer), (_, wanted) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        assert buffer.dtype == wanted.dtype, name
        assert buffer.equal(wanted), name


@pytest.mark.parametrize("world", [2, 3])
def test_a_model_in_shares_has_the_numbers_of_the_whole(tmp_path: Path, world: int) -> None:
    """Three ranks: shares that do not divide. Two tables in a tied model's folder are tied when they are equal."""
    specs = [replace(SMALL, family=family) for family in ("llama", "qwen2", "qwen3", "gemma", "mistral")]
    specs += [replace(SMALL, tie_embeddings=True)]
    cases = [Case(spec) for spec in specs] + [Case(SMALL, dtype="bfloat16")]
    for number, spec in enumerate(specs):
        folder = tmp_path / f"model{number}"
        init_from(spec).save_pretrained(folder, max_shard_size="50KB")
        cases.append(Case(spec, str(folder)))
    cases.append(Case(specs[0], str(tmp_path / "model0"), dtype="bfloat16"))
    for name in ("equal", "unequal"):
        cases.append(Case(SMALL, str(untied(tmp_path / name, equal=name == "equal"))))
    failures = run_ranks(world, check_numbers, cases, tmp_path / "store")
    assert not failures, told(failures)


def untied(folder: Path, *, equal: bool) -> Path:
    """A folder whose config ties the tables and whose safetensors hold both."""
    model = init_from(SMALL)
    if equal:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    return folder


class Peak:
    """The most anonymous memory this process had at once inside, beyond what it had before; pages of mapped files,
    which the system drops at will, are none of it, nor is what is freed between tensors that live on.
    """

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # every tensor gets pages of its own and gives them back
        self._done = threading.Event()
        self._before = self._most = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = self._most - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def check_memory(rank: int, world: int, case: Case) -> None:
    """Loading takes a share, a tensor and some slack; the engine then holds a share of the weights."""
    ranks = ranks_of(rank, world)
    place = engines.placer(ZERO3, OptimConfig(), case.dtype, ranks)
    init_from(SMALL, place=place)  # what is imported on the way takes memory too
    with Peak() as peak:
        model = LossModel(case.made(place), MemoryConfig())
    whole = sum(full_shape(p).numel() * p.element_size() for p in model.parameters())
    assert whole > 190e6
    assert peak.bytes < whole / world + 25e6, f"{peak.bytes / 1e6:.0f} MB to load a model of {whole / 1e6:.0f} MB"
    engine = engines.build(ZERO3, OptimConfig(), model, ranks)
    parameters: list[Any] = list(model.parameters())
    held = sum(p.numel() * p.element_size() + p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters)
    assert held == pytest.approx(whole / world, rel=0.02), f"{held / 1e6:.0f} of {whole / 1e6:.0f} MB"
    engine.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "large"
    init_from(LARGE).save_pretrained(folder, max_shard_size="60MB")
    return str(folder)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", ["drawn", "folder", "converted"])
def test_no_rank_ever_has_the_whole_model(tmp_path: Path, large: str, world: int, source: str) -> None:
    """converted: to another type than the folder's, which copies every tensor."""
    case = Case(LARGE) if source == "drawn" else Case(LARGE, large)
    if source == "converted":
        half = tmp_path / "half"
        init_from(LARGE, dtype="bfloat16").save_pretrained(half)
        case = Case(LARGE, str(half))
    failures = run_ranks(world, check_memory, [case], tmp_path / "store")
    assert not failures, told(failures)


@pytest.mark.slow
def test_a_run_from_a_folder_with_a_frozen_embedding(tmp_path: Path) -> None:
    """ZeRO-3 on two ranks, then on dp 2 x cp 2, against one process; each started in shares."""
    documents = write_documents(tmp_path / "docs")
    folder = tmp_path / "model"
    init_from(replace(SMALL, ffn=64, tie_embeddings=False)).save_pretrained(folder)
    changes = {"model": {"init": None, "path": str(folder), "tokenizer": TOKENIZER}, "optim": {"freeze": ["*embed*"]}}
    assert train(config(tmp_path / "alone", documents, **changes)) == 0
    run = tmp_path / "run"
    for world, cp, stop, status in ((2, 1, 3, SAVED_AND_REQUEUE), (4, 2, None, 0)):
        assert live(config(run, documents, **part(world, cp, 3), **changes), world, stop_after=stop) == status
    assert json.loads(next(newest(run).glob("state.json")).read_text())["written_by"]["loaded"] == "in shares"
    assert same(run, tmp_path / "alone")
    flop = [[floating(line) for line in metrics.read(of / "metrics.jsonl")] for of in (run, tmp_path / "alone")]
    assert flop[0] == pytest.approx(flop[1], rel=0.01)


def floating(line: dict[str, Any]) -> float:
    """The step's FLOP by a line of metrics, over all ranks."""
    return line["model_tflops"] * line["seconds"]["step"] * line["dp"] * line["cp"]
