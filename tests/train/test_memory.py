"""Out of memory on a rank: one paragraph with the memory by the plan and settings that lower it."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from longctx import cli
from longctx.distributed.ranks import Ranks
from longctx.errors import OutOfMemory, RunFailed
from longctx.run import launch
from longctx.run.launch import _who_kills
from longctx.train import exhausted
from longctx.train.runfolder import with_dtype
from longctx.train.train import resolve_stages, train

from .made import VOCAB, config

WIDE = {"layers": 1, "hidden": 2048, "heads": 16, "kv_heads": 1, "ffn": 64, "vocab": VOCAB, "window": 64}
GIB = 2**30


@contextmanager
def address_space(more: float) -> Iterator[None]:
    """Limit this process to `more` GiB of address space beyond its present size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + int(more * GIB), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def one_stage(seq_len: int) -> dict:
    stages = {"long": {"seq_len": seq_len, "theta": 10000, "steps": 1, "batch": 1}}
    return {"lr": {"peak": 1e-3}, "scratch": True, "stages": stages}


def test_a_step_that_does_not_fit_says_what_held_the_memory(tmp_path: Path, documents: Path) -> None:
    """2^20 tokens of 2,048 numbers take 8 GiB where the embedding puts them."""
    made = config(tmp_path / "run", documents, model={"init": WIDE}, curriculum=one_stage(2**20), accept=["memory"])
    with address_space(5), pytest.raises(OutOfMemory) as raised:
        train(made)
    text = str(raised.value)
    assert re.search(r"ran out of memory while training stage long \(.*you tried to allocate 8589934592 bytes", text)
    assert "By the plan a rank holds" in text
    assert "activations saved for the backward pass" in text
    remedies = text.split("These lower it: ")[1].split(". `longctx plan`")[0].split("; ")
    assert len(remedies) == 3, remedies
    held = float(re.findall(r"a rank holds ([\d.]+) GiB", text)[0])
    assert all(float(size) < held for item in remedies for size in re.findall(r"\(([\d.]+) GiB\)", item))
    assert "\n" not in text


def test_a_model_that_does_not_fit_is_said_while_it_is_loaded(tmp_path: Path, documents: Path) -> None:
    huge = {**WIDE, "ffn": 2**21}
    made = config(
        tmp_path / "run", documents, model={"init": huge}, curriculum=one_stage(64), accept=["disk", "memory"]
    )
    with (
        address_space(2),
        pytest.raises(RunFailed, match=r"out of memory while loading the model for stage long .*opt"),
    ):
        train(made)


def test_remedies_are_the_planners_and_divide(tmp_path: Path, documents: Path) -> None:
    """On GPUs sharding, offload and more ranks are offered, except settings that the run has already."""
    model = {"init": {**WIDE, "layers": 30}, "dtype": "bfloat16"}
    made = config(tmp_path / "run", documents, model=model, curriculum=one_stage(4096), parallel={"cp": 2})
    ranks = Ranks(1, 2, 1, 2, torch.device("cuda"))
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79 GiB"
    )
    text = exhausted.explain(error, made, resolve_stages(made)[0], ranks, "training")
    assert text.startswith("rank 1 ran out of memory while training stage long (CUDA out of memory. Tried to allocate")
    assert "engine=deepspeed engine.zero=3 engine.offload_optimizer=true (" in text
    assert " engine.offload_optimizer=true (" in text.replace("zero=3 engine.offload_optimizer", "")
    assert "parallel.cp" not in text


def test_a_stage_is_explained_where_another_one_has_a_cp_of_its_own(tmp_path: Path, documents: Path) -> None:
    made = with_dtype(config(tmp_path / "run", documents, parallel={"cp_by_stage": {"s128": 1}}))
    ranks = Ranks(1, 2, 1, 2, torch.device("cpu"))
    text = exhausted.explain(MemoryError("no room"), made, resolve_stages(made)[0], ranks, "training")
    assert text.startswith("rank 1 ran out of memory while training stage s64 (no room). By the plan a rank holds")


def test_other_verbs_say_it_in_one_paragraph_too(capsys: pytest.CaptureFixture[str]) -> None:
    with address_space(1):
        assert cli.main(["bench", "peak", "sizes=[65536]"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("longctx: out of memory (")
    assert "you tried to allocate" in said
    assert said.count("\n") == 1


def test_a_rank_that_the_kernel_kills_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's count of kills before and after: one more, the same, and a kernel without the count."""
    for before, after, words in ((4, 5, "had no memory left"), (5, 5, "if `dmesg` names it"), (None, None, "dmesg")):
        monkeypatch.setattr(launch, "killed_for_memory", lambda now=after: now)
        assert words in _who_kills(before)
    monkeypatch.undo()
    assert isinstance(launch.killed_for_memory(), int) == ("oom_kill " in Path("/proc/vmstat").read_text())
