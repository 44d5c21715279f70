"""Fragments of any shape, and checkpoints that are damaged, cut short, or meet a full disk."""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.distributed.ranks import Ranks
from longctx.errors import RunFailed, UserError
from longctx.run.training import train_run
from longctx.train import checkpoint, checkpoint_files, fragments, runfolder
from longctx.train.checkpoint import Checkpoints, State
from longctx.train.fragments import Fragment, FragmentReader

from .made import config

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


class TwoTensors:
    """The parts of an engine that a checkpoint needs."""

    def __init__(self, value: float = 0.0) -> None:
        self.tensors = {"a": torch.full((3, 5), value), "b": torch.full((7,), value)}

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self.tensors.items()}

    def fragments(self) -> Iterator[Fragment]:
        for name, tensor in self.tensors.items():
            yield Fragment("weight", name, 0, tensor.flatten())

    def restore(self, reader: FragmentReader) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(reader.read("weight", name, 0, tensor.numel()).view_as(tensor))


def saved(run: Path, steps: int) -> Checkpoints:
    checkpoints = Checkpoints(run, ALONE, keep=2, spare_gib=0.0)
    for step in range(1, steps + 1):
        assert checkpoints.save(TwoTensors(float(step)), State(step=step), "s64") is not None  # type: ignore[arg-type]
    return checkpoints


@settings(max_examples=25)
@given(data=st.data(), size=st.integers(1, 60))
def test_any_range_is_read_from_any_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int
) -> None:
    folder = tmp_path_factory.mktemp("fragments")
    whole = torch.arange(size, dtype=torch.float32)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    files = {}
    for number, (low, high) in enumerate(pairwise(cuts)):
        name = f"rank{number}.safetensors"
        index = fragments.write(folder / name, iter([Fragment("weight", "w", low, whole[low:high])]), {})
        files[name] = {"fragments": index}
    start = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(1, size - start))
    with FragmentReader(folder, {"parameters": {"w": [size]}, "files": files}) as reader:
        assert torch.equal(reader.read("weight", "w", start, count), whole[start : start + count])
        with pytest.raises(KeyError, match="elements"):
            reader.read("weight", "w", start, size - start + 1)


def test_the_newest_are_kept_and_the_pointer_follows(tmp_path: Path) -> None:
    saved(tmp_path, 4)
    names = sorted(path.name for path in (tmp_path / "stages/s64/checkpoints").iterdir())
    assert names == ["step00000003", "step00000004"]
    assert json.loads((tmp_path / "latest.json").read_text())["checkpoint"].endswith("step00000004")


def test_a_checkpoint_that_a_kill_left_without_its_pointer_is_the_last(tmp_path: Path) -> None:
    assert runfolder.where(tmp_path) == "no checkpoint was written yet"
    assert runfolder.saved_in(tmp_path) == "nothing was trained"
    saved(tmp_path, 1)
    pointer = (tmp_path / "latest.json").read_text()
    checkpoints = saved(tmp_path, 2)
    (tmp_path / "latest.json").write_text(pointer)
    state = checkpoints.load(TwoTensors())  # type: ignore[arg-type]
    assert state is not None
    assert state.step == 2
    assert runfolder.where(tmp_path) == "the checkpoint of step 2 is saved, the same command continues the run"
    assert runfolder.saved_in(tmp_path) == "saved at step 2"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path, 3)
    folder = tmp_path / "stages/s64/checkpoints/step00000003"
    file = folder / ("manifest.json" if damage == "manifest" else "rank00000.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
        file.write_bytes(bytes(content))
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(content[:-20]))
    engine = TwoTensors()
    state = checkpoints.load(engine)  # type: ignore[arg-type]
    assert state is not None
    assert state.step == 2
    assert engine.tensors["a"].eq(2.0).all()
    said = " ".join(capsys.readouterr().err.split())
    assert "step00000003" in said
    assert file.name in said


def test_a_file_that_the_disk_cannot_read_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, read = saved(tmp_path, 2), checkpoint_files.file_sha256

    def failing(path: Path) -> str:
        if path.match("step00000002/rank*"):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoint_files, "file_sha256", failing)
    state = checkpoints.load(TwoTensors())  # type: ignore[arg-type]
    assert state is not None
    assert state.step == 1
    assert "rank00000.safetensors cannot be read (Input/output error)" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_checkpoint_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    """Continued from before it, the run has two that are intact again after its next save."""
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2, spare_gib=0.0)
    for step in (2, 4, 6):
        checkpoints.save(TwoTensors(), State(step=step), "s64")  # type: ignore[arg-type]
    (tmp_path / "stages/s64/checkpoints/step00000006/rank00000.safetensors").write_bytes(b"")
    again = Checkpoints(tmp_path, ALONE, keep=2, spare_gib=0.0)
    assert (again.load(TwoTensors()) or State()).step == 4  # type: ignore[arg-type]
    assert again.save(TwoTensors(), State(step=5), "s64") is not None  # type: ignore[arg-type]
    assert [int(path.name[-1]) for path in runfolder.checkpoints(tmp_path)] == [6, 5, 4]
    assert again.save(TwoTensors(), State(step=6), "s64") is not None  # type: ignore[arg-type]
    assert [int(path.name[-1]) for path in runfolder.checkpoints(tmp_path)] == [6, 5]


def test_a_checkpoint_from_before_the_guards_counts_is_read(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, ALONE, keep=2, spare_gib=0.0).save(TwoTensors(), State(step=3, spikes=2), "s64")  # type: ignore[arg-type]
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("spikes") == 2
    del state["mute"]
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state_sha256"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    read = Checkpoints(tmp_path, ALONE, keep=2, spare_gib=0.0).load(TwoTensors())  # type: ignore[arg-type]
    assert read is not None
    assert (read.step, read.spikes, read.mute) == (3, 0, 0)


def test_nothing_intact_is_an_error_that_says_so(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 2)
    for file in tmp_path.glob("stages/*/checkpoints/*/rank*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(RunFailed, match="none of the 2 checkpoints"):
        checkpoints.load(TwoTensors())  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # any file beyond 64 bytes fails, as on a full disk
    try:
        assert checkpoints.save(TwoTensors(9.0), State(step=2), "s64") is None  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the previous one is intact" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("stages/*/checkpoints/.*"))
    state = checkpoints.load(TwoTensors())  # type: ignore[arg-type]
    assert state is not None
    assert state.step == 1


def test_too_little_free_disk_is_seen_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2, spare_gib=2.0**40)
    assert checkpoints.save(TwoTensors(), State(step=1), "s64") is None  # type: ignore[arg-type]
    assert "GiB needed" in " ".join(capsys.readouterr().err.split())


def room_for_two(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full as long as two checkpoints lie on it."""
    disk = checkpoint.shutil.disk_usage(run)
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage",
        lambda _: disk._replace(free=disk.free if len(runfolder.checkpoints(run)) < 2 else 0),
    )  # fmt: skip


def test_a_full_disk_and_a_lower_keep_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room for two checkpoints, and an earlier start kept two."""
    saved(tmp_path, 2)
    room_for_two(tmp_path, monkeypatch)
    fewer = Checkpoints(tmp_path, ALONE, keep=1, spare_gib=0.0)
    assert (fewer.load(TwoTensors()) or State()).step == 2  # type: ignore[arg-type]
    assert fewer.save(TwoTensors(), State(step=3), "s64") is not None  # type: ignore[arg-type]
    assert [path.name for path in runfolder.checkpoints(tmp_path)] == ["step00000003"]


def test_a_full_disk_is_not_filled_by_a_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 2)
    (tmp_path / "stages/s64/checkpoints/step00000002/rank00000.safetensors").write_bytes(b"")
    room_for_two(tmp_path, monkeypatch)
    again = Checkpoints(tmp_path, ALONE, keep=2, spare_gib=0.0)
    assert (again.load(TwoTensors()) or State()).step == 1  # type: ignore[arg-type]
    assert again.save(TwoTensors(), State(step=3), "s64") is not None  # type: ignore[arg-type]
    assert [path.name for path in runfolder.checkpoints(tmp_path)] == ["step00000003", "step00000001"]


def test_what_the_system_refuses_to_all_ranks_is_told_with_its_remedy() -> None:
    with (
        pytest.raises(RunFailed, match=r"tokenizing failed on rank 0: /x/y cannot be .*: No space left .*; free some"),
        ALONE.agree("tokenizing"),
    ):
        raise OSError(28, "No space left on device", "/x/y")
    with pytest.raises(UserError, match=r"^model\.tokenizer=/m cannot be read"), ALONE.agree("loading"):
        raise UserError("model.tokenizer=/m cannot be read (Permission denied (os error 13)); fetch its files again")


def test_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    other = TwoTensors()
    other.tensors["b"] = torch.zeros(8)
    with pytest.raises(UserError, match=r"another model: b is \[7\] there and \[8\] here"):
        checkpoints.load(other)  # type: ignore[arg-type]


def test_a_run_without_any_checkpoint_names_the_way_from_its_last_model(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No save found room on the disk, and neither does the second stage's model."""
    made = config(tmp_path / "run", documents, checkpoint={"spare_gib": 1e6}, accept=["disk"])
    exporting = import_module("longctx.model.export")
    check = exporting._check_disk
    monkeypatch.setattr(
        exporting, "_check_disk", lambda folder, needed: check(folder, 1 << 60 if "s128" in str(folder) else needed)
    )
    way = rf"model.path={tmp_path}/run/stages/s64/model 'curriculum.only=\[s128\]'"
    with pytest.raises(RunFailed, match=rf"free some space; no checkpoint was written, so .* cannot go on: .* {way}"):
        train_run(made)
    assert "s64 ends, and the run has no checkpoint: until one is written" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(UserError, match=rf"has a finished stage and no checkpoint, .* or with {way}"):
        train_run(made)
