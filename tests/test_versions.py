"""The least releases of pyproject.toml are those that are checked and pinned, and the verbs work with them.

launch/lowest.sh runs this file with the least releases. The suite leaves out the smoke, whose parts its other tests do
with the pinned releases; `pytest -m smoke` runs it there.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

import longctx
from longctx import versions
from longctx.assets import tiny_model
from longctx.cli import main
from tests.started import longctx as command

pytestmark = pytest.mark.timeout(900)  # CI leaves the smoke what its other work does not take of the cores

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
USED += [
    line for line in PROJECT["optional-dependencies"]["dev"] if re.match("(peft|pytest|pytest-timeout|gguf)>", line)
]
LEAST = dict(line.split(">=") for line in USED)


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "launch" / name).read_text().splitlines() if line and not line.startswith("#")]
    return {key.lower(): release for key, release in (line.split("==") for line in lines)}


# ---- the numbers


def test_the_releases_that_are_checked_are_the_declared_ones():
    assert {name: LEAST[name] for name in versions.MINIMUM} == versions.MINIMUM
    assert set(versions.EVERY_VERB) <= versions.MINIMUM.keys()


def test_the_least_releases_are_pinned_for_their_own_environment():
    """launch/lowest.txt has each as pyproject.toml declares it, and none is newer than the pinned set."""
    least, pinned = pins("lowest.txt"), pins("constraints.txt")
    for name, release in LEAST.items():
        assert versions._numbers(least[name]) == versions._numbers(release), name
        assert versions._numbers(least[name]) <= versions._numbers(pinned[name.replace("-extensions", "_extensions")])


@pytest.mark.parametrize(
    ("name", "old", "fine"),
    [
        ("torch", "2.10.1+cu128", ("2.11.0+cu130", "2.13.0", "3.0.0a0")),
        ("transformers", "4.57.6", ("5.0.0", "5.23.0", "6.0.dev0")),
        ("hydra-core", "1.3.1", ("1.3.2", "1.4")),
    ],
)
def test_a_package_that_is_too_old_is_said_in_one_line(monkeypatch, capsys, name, old, fine):
    installed = {name: old}
    monkeypatch.setattr(versions, "version", lambda package: installed.get(package, "999"))
    assert main(["theta", "--help"]) == 2
    least = versions.MINIMUM[name]
    assert capsys.readouterr().err == (
        f"longctx: {name} {old} is older than longctx needs: pip install '{name}>={least}' (pyproject.toml)\n"
    )
    for installed[name] in fine:
        versions.check_versions()


@pytest.mark.parametrize(
    ("package", "words"),
    [("deepspeed", "engine=deepspeed"), ("accelerate", "engine=deepspeed"), ("wandb", "logging=wandb")],
)
def test_a_package_that_only_some_runs_need_is_judged_in_those(monkeypatch, capsys, tmp_path, package, words):
    monkeypatch.setattr(versions, "version", lambda name: "0.1" if name == package else "999")
    said = f"longctx: {package} 0.1 is older than longctx needs: pip install '{package}>={versions.MINIMUM[package]}'"
    assert main(["train", "experiment=quickstart", "logging=local", words, f"run_dir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(said)
    versions.check_versions()


# ---- the smoke: a run of two stages on two ranks, and what a user does with it


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first stage is trained by DDP and whose second one by ZeRO-2, each on two ranks."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder = tmp_path_factory.mktemp("versions")
    docs = folder / "docs"
    docs.mkdir()
    texts = [f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" * 60 for n in range(24)]
    pq.write_table(pa.table({"text": texts[::2]}), docs / "a.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[1::2])
    (docs / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    words = [
        "train", "model=tiny", "curriculum=tiny_16x", "parallel=ring", "launch.nproc=2", "launch.threads=1",
        "data=text", f"data.path={docs}", "data.heldout=0.2", f"run_dir={folder / 'run'}", "logging=wandb",
        "engine.device=cpu",
        "curriculum.lr.warmup_steps=0", "curriculum.stages.s2048.tokens=8192", "curriculum.stages.s2048.batch=2",
        "curriculum.stages.s8192.tokens=16384", "evaluate.heldout_sequences=1", "after_training.lora.rank=8",
    ]  # fmt: skip
    for more in (["launch.until=s2048"], ["engine=deepspeed"]):
        done = command(*words, *more, timeout=800)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


@pytest.mark.smoke
def test_both_stages_are_trained_and_exported(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["stage"], line["loss"]) for line in lines if line.get("loss") is not None]
    assert [stage for stage, _ in losses] == ["s2048", "s2048", "s8192", "s8192"]
    assert losses[-1][1] < losses[0][1]
    assert list((run / "wandb").glob("offline-run-*"))
    config = json.loads((run / "stages/s8192/model/config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (8192, 2379094)


@pytest.mark.smoke
def test_the_adapter_in_peft_equals_the_merged_model(run, tmp_path):
    """Extracted once more, without the norms that peft does not read; merged; read by transformers and by peft."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base, tuned, adapter = str(tiny_model()), run / "stages/s8192/model", tmp_path / "adapter"
    extract = [f"base={base}", f"tuned={tuned}", f"out={adapter}", "rank=8", "profile=serving", "dtype=float32"]
    assert main(["lora", "extract", *extract]) == 0
    mine, runs = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, run / "adapter"))
    assert all(torch.allclose(tensor, runs[name], atol=1e-6) for name, tensor in mine.items())
    assert main(["lora", "merge", f"target={base}", f"adapter={adapter}", f"out={tmp_path / 'merged'}"]) == 0
    ids = torch.arange(3, 99)[None]
    with torch.inference_mode():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(base)
        longctx.set_rope(plain, *longctx.rope_for(plain, window=8192, rule=2379094))
        before = plain(ids).logits
        beside = PeftModel.from_pretrained(plain, str(adapter)).eval()(ids).logits
        after = merged(ids).logits
    assert merged.config.max_position_embeddings == 8192
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, beside, atol=1e-4, rtol=0)


@pytest.mark.smoke
def test_the_run_is_evaluated_beside_its_base(run, tmp_path, capsys):
    models = f"models={{base: {tiny_model()}, long: {run / 'stages/s8192/model'}}}"
    small = [
        "needle.lengths=[384,1024]",
        "needle.per_cell=1",
        "needle.seeds=[1]",
        "loss_lengths=[256]",
        "loss_sequences=2",
    ]
    text = ["data=text", f"data.path={run.parent / 'docs'}", "source=text", "data.heldout=0.2", f"cache={run / 'data'}"]
    assert main(["eval", models, *text, *small, f"out={tmp_path}", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert found["base"]["needle"]["by_length"]["384"] > 0.5
    assert all(0 < model["loss"]["256"] < 6 for model in found.values())
    assert (tmp_path / "eval.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.smoke
def test_theta_and_plan_answer(capsys):
    assert main(["theta", "model=tiny", "curriculum=tiny_16x", "format=json"]) == 0
    assert "2379094" in capsys.readouterr().out
    assert main(["plan", "model=tiny", "curriculum=tiny_16x", "ranks=2", "hardware=cpu", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["s8192"]["fits"]
    assert main(["doctor", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["torch"] == torch.__version__


@pytest.mark.smoke
def test_a_notebook_trains_a_step_and_asks_for_needles(run):
    """Use the library in a user's own process: rope, shard, loss, an update, a grid."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tiny_model())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    longctx.set_rope(plain, *longctx.rope_for(plain, window="1k"))
    model, layout = longctx.prepare(plain), longctx.ContextParallel.from_world().layout(256)
    text = (ROOT / "longctx" / "layout.py").read_text()
    batch = longctx.shard_batch(tokenizer(text, return_tensors="pt").input_ids[:, :256], layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model(**batch).loss_sum
    before.backward()
    optimizer.step()
    assert model(**batch).loss_sum < before
    grid = longctx.needle_grid(plain, tokenizer, lengths=[384], text=text, per_cell=1)
    assert grid.window == 1024


@pytest.mark.smoke
def test_the_installed_versions_are_refused_by_no_check():
    versions.check_versions(tuple(versions.MINIMUM))
