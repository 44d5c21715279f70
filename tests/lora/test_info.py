"""lora info, the verbs on the command line, hub ids, the loss check and the benchmark, each once on
something tiny.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longctx.cli import main
from longctx.config.lora import ExtractConfig, InfoConfig
from longctx.lora import pictures
from longctx.lora.adapter import Adapter
from longctx.lora.describe import describe
from longctx.lora.extract import extract
from longctx.lora.sizes import adapter_size
from tests.started import longctx

from .conftest import Trio, tensors

Make = Callable[..., Trio]


def test_published_size_of_llama3_70b() -> None:
    """The published adapters have these sizes: 837.1 MB at rank 32 with lm_head, 828.4 without."""
    size = adapter_size("llama3_70b", 32, dtype="bfloat16", lm_head=True, embeddings=False)
    assert round(size.bytes / 1e6, 1) == 837.1
    assert size.matrices == 561
    without = adapter_size("llama3_70b", 32, dtype="bfloat16", lm_head=False, embeddings=False)
    assert round(without.bytes / 1e6, 1) == 828.4
    assert round(without.bytes_per_rank / 1e6, 3) == 25.887


def test_planned_size_is_the_written_size(trio: Make, tmp_path: Path) -> None:
    """The plan counts the factors' numbers; extract and info tell the size of their file, which has a header too."""
    pair = trio("llama")
    made = extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "a"), rank=40))
    planned = adapter_size(pair.base, 40, dtype="bfloat16", lm_head=True, embeddings=False)
    with Adapter(made.out) as adapter:
        assert sum(entry.nbytes for entry in adapter.weights.entries.values()) == planned.bytes
    file = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert describe(made.out).bytes == made.bytes == file
    assert planned.bytes < file < planned.bytes + 640 * planned.matrices + 1024


def test_planned_size_of_a_tied_model_is_the_written_size(trio: Make, tmp_path: Path) -> None:
    """Both verbs with their defaults: a tied model's adapter holds the embedding's factors, twice."""
    pair = trio("gemma")
    made = extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "a"), rank=16))
    asked = InfoConfig(plan=pair.base, rank=16)
    planned = adapter_size(pair.base, 16, dtype=asked.dtype, lm_head=asked.lm_head, embeddings=asked.embeddings)
    with Adapter(made.out) as adapter:
        assert sum(entry.nbytes for entry in adapter.weights.entries.values()) == planned.bytes


def test_spectra_are_those_of_the_product(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama", rank=4)
    extract(
        ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "a"), rank=4, rslora=True, dtype="float32")
    )
    base, tuned = tensors(pair.base), tensors(pair.tuned)
    info = describe(str(tmp_path / "a"))
    assert (info.window, info.rope, info.extends) == (2048, "theta 154,243", True)
    for item in info.modules:
        want = torch.linalg.svdvals(tuned[f"{item.module}.weight"] - base[f"{item.module}.weight"])[:4]
        assert torch.tensor(item.spectrum) == pytest.approx(want, rel=1e-3)


def test_verbs_end_to_end(trio: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair, a, m = trio("llama"), tmp_path / "a", tmp_path / "m"
    assert (
        main(["lora", "extract", f"base={pair.base}", f"tuned={pair.tuned}", f"out={a}", "rank=4", "format=json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert 0 < document["share"]["factors"] < 1
    assert "rank=4" in (a / "README.md").read_text()
    assert main(["lora", "merge", f"target={pair.sibling}", f"adapter={a}", f"out={m}"]) == 0
    assert "reads 2048 tokens, theta 154,243" in capsys.readouterr().out
    assert main(["lora", "merge", f"target={m}", f"adapter={a}", f"out={tmp_path / 'n'}"]) == 2
    assert "rope=keep" in capsys.readouterr().err
    assert (
        main(
            [
                "lora",
                "merge",
                f"target={m}",
                f"adapter=[{a},{a}]",
                "scale=[1,-1]",
                f"out={tmp_path / 'n'}",
                "rope=keep",
            ]
        )
        == 0
    )
    assert main(["lora", "info", f"adapter={a}", f"plots={tmp_path / 'plots'}"]) == 0
    assert "extends the window to 2048" in capsys.readouterr().out
    for name in ("spectra.png", "shares.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    assert main(["lora", "info", "plan=llama3_70b", "measure=false"]) == 0
    assert "837.1 MB" in capsys.readouterr().out
    assert main(["lora", "info", "plan=llama3_70bb"]) == 2
    assert "did you mean llama3_70b?" in capsys.readouterr().err
    assert main(["lora", "extract", f"base={pair.base}", "rnak=3"]) == 2
    assert "rank" in capsys.readouterr().err


def test_time_is_extrapolated_from_a_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "info", "plan=llama3_8b", "rank=4", "format=json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["seconds"] == pytest.approx(document["elements"] / document["throughput"])


def test_hub_ids_load_shards_only_when_rows_are_read(
    trio: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder replaces the hub here; a wrong pair is refused without fetching any weights."""
    import huggingface_hub

    from longctx.storage import hub

    pair, other = trio("llama"), trio("mistral")
    folders = {"some/base": pair.base, "some/tuned": pair.tuned, "some/other": other.tuned}
    fetched: list[str] = []

    def download(name: str, file: str) -> str:
        fetched.append(file)
        return str(Path(folders[name]) / file)

    class Api:
        def parse_safetensors_file_metadata(self, name: str, file: str) -> Any:
            with open(Path(folders[name]) / file, "rb") as handle:
                table = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
            table.pop("__metadata__")
            return SimpleNamespace(tensors={key: SimpleNamespace(**value) for key, value in table.items()})

    monkeypatch.setattr(hub, "offline", lambda: False)
    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda name: [p.name for p in Path(folders[name]).iterdir()]
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.chdir(tmp_path)
    assert main(["lora", "extract", "base=some/base", "tuned=some/other", "out=a"]) == 2
    assert not [file for file in fetched if file.endswith(".safetensors")]
    assert main(["lora", "extract", "base=some/base", "tuned=some/tuned", "out=a", "rank=4"]) == 0
    assert main(["lora", "extract", f"base={pair.base}", f"tuned={pair.tuned}", "out=b", "rank=4"]) == 0
    same = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert same[0] == same[1]


def test_losses_on_held_out_text(trio: Make, tmp_path: Path) -> None:
    """base + a full-rank adapter reads text exactly as tuned does."""
    import shutil

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pair = trio("llama")
    words = {f"w{number}": number for number in range(90)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tuned, text = tmp_path / "tuned", tmp_path / "text.txt"
    shutil.copytree(pair.tuned, tuned)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tuned)
    text.write_text(" ".join(f"w{(7 * number) % 89}" for number in range(300)))
    result = extract(
        ExtractConfig(
            base=pair.base, tuned=str(tuned), out=str(tmp_path / "a"), rank=1000, embeddings=True,
            dtype="float32", verify="loss", text=str(text), text_tokens=200, text_seq_len=64,
        )
    )  # fmt: skip
    assert result.losses is not None
    assert result.losses.tokens == 200
    assert result.losses.merged == pytest.approx(result.losses.tuned, abs=1e-4)
    assert abs(result.losses.base - result.losses.tuned) > 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "text.txt", "tuned"]


def test_bench_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without mergekit only longctx is measured, and the output says so."""
    small = ["layers=1", "hidden=64", "vocab=128", "delta_rank=4", "rank=4", "repeats=1", "shallow=null"]
    done = longctx("bench", "lora", *small, f"folder={tmp_path}", f"out={tmp_path / 'figures.json'}")
    assert done.returncode == 0, done.stderr
    assert "mergekit was not given" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ours"]["residual_excess"] < 0.005
    assert main(["bench", "lora", "mergekit=/absent/mergekit-extract-lora"]) == 2
    assert "is not an executable" in capsys.readouterr().err


def test_the_last_panel_of_every_column_numbers_its_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five panels: the last row has one, and the columns beside it end in the row above."""
    from matplotlib import pyplot

    numbered: list[bool] = []
    monkeypatch.setattr(
        pictures, "save_figure",
        lambda figure, *_, **__: numbered.extend(
            axis.xaxis.get_tick_params()["labelbottom"] for axis in figure.axes[:5]
        ),
    )  # fmt: skip
    pictures._spectra(pyplot, {name: [] for name in "abcde"}, tmp_path / "spectra.png")
    assert numbered == [False, True, True, True, True]
