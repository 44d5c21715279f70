"""README's commands run as it prints them, on a tiny model of another family and with short stages."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import torch

from longctx.assets import tiny_model
from longctx.cli import main
from longctx.config.model import InitConfig
from longctx.model import init_from
from tests.started import longctx

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for _, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("longctx ") and "# needs" not in line  # tests/test_docs.py composes what needs GPUs
]


def test_readme_has_the_commands():
    assert {command.split()[1] for command in COMMANDS} >= {"theta", "plan", "train", "lora", "eval"}


def make_model(folder: Path, seed: int) -> None:
    """A tiny bfloat16 Qwen3 with the tiny tokenizer."""
    from transformers import AutoTokenizer

    shape = InitConfig(
        family="qwen3", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=512, seed=seed
    )
    init_from(shape, dtype="bfloat16").save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(folder)


def test_the_commands_run_in_order_on_a_model_of_another_family(tmp_path, quickstart):
    """theta, plan, train, merge, eval as in README, with shorter stages; each reads the files of the one before.

    The quickstart's folder has the standard library's tokens already.
    """
    make_model(tmp_path / "MODEL", seed=0)
    make_model(tmp_path / "SIBLING", seed=1)
    (tmp_path / "DOCS").mkdir()
    for name, line in (("a", "A line of text about nothing in particular.\n"), ("b", "Another one, to be held out.\n")):
        (tmp_path / "DOCS" / f"{name}.txt").write_text(line * 4000)
    smaller = {
        "8k_to_1048k": "tiny_16x",
        "nproc=8": "nproc=2",
        "8192,131072": "512,1024",
        "512,131072": "512,1024",
    }
    short = ["curriculum.lr.warmup_steps=0", *(f"curriculum.stages.{name}.tokens=8192" for name in ("s2048", "s8192"))]
    more = {
        "plan": ["hardware=h100"],
        "train": ["curriculum.mix=default", *short, "evaluate.heldout_sequences=1", "parallel=ring"],
        "eval": ["needle.per_cell=1", "needle.seeds=[1]", "loss_sequences=2", f"cache={quickstart.folder / 'data'}"],
    }
    said = {}
    for command in COMMANDS:
        for long, short in smaller.items():
            command = command.replace(long, short)
        verb, *words = shlex.split(command)[1:]
        done = longctx(verb, *words, *more.get(verb, []), cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        said[verb] = done.stdout + done.stderr
    assert "dynamic-ntk" in said["theta"]
    assert "bfloat16" in said["plan"]
    assert "bfloat16 weights with float32 masters" in said["train"]
    assert "sibling" in said["eval"]
    assert "merged" in said["eval"]
    for folder in ("runs/run/stages/s8192/model", "SIBLING-1048k"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["model_type"] == "qwen3"
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
        assert config["max_position_embeddings"] == 8192
        assert config["rope_theta"] > 10000


def test_the_plan_accepts_what_the_readme_advises_for_an_8b_on_eight_h100(tmp_path, capsys):
    """Every stage fits, and `train` is given the settings that were planned."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}))  # fmt: skip
    plan, train = (
        shlex.split(next(command for command in COMMANDS if command.startswith(f"longctx {verb} model.path")))[2:]
        for verb in ("plan", "train")
    )
    beside = {"data", "data.path", "launch.nproc", "ranks"}  # neither memory nor time depends on the documents
    assert {word for word in plan if word.split("=")[0] not in beside} == {
        word for word in train if word.split("=")[0] not in beside
    }
    assert "ranks=8" in plan
    assert "launch.nproc=8" in train
    words = [word.replace("MODEL", str(tmp_path)) for word in plan]
    assert main(["plan", *words, "hardware=h100", "format=json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dtype"] == "bfloat16"
    assert document["kernel"] != "reference"
    assert document["stages"]["s1048k"]["seq_len"] == 2**20
    assert all(stage["fits"] for stage in document["stages"].values())
    assert max(stage["memory"]["total"] for stage in document["stages"].values()) < 43 * 2**30
    assert max(stage["memory"]["host"] for stage in document["stages"].values()) * 8 < 517 * 2**30
    assert main(["plan", *words, "hardware=h100"]) == 0
    assert "!" not in capsys.readouterr().out


def test_the_python_of_the_readme_equals_dense_attention():
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 128, 16, dtype=torch.float64) for heads in (4, 2, 2))
    names = {"q": q, "k": k, "v": v}
    exec(code.replace('nodes=2, schedule="double_ring"', 'nodes=1, schedule="double_ring"'), names)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(names["out"], dense, atol=1e-10, rtol=0)
