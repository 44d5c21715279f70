"""README's commands are run as they stand there, with the tiny model in place of MODEL and short stages."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from longctx.assets import tiny_model
from longctx.cli import main
from tests.started import SHORT, longctx

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for _, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("longctx ")
]

# What a command takes so long for: replaced by something small of the same kind.
SMALL = {
    "train": ["experiment=quickstart", "hooks=none", *SHORT[:2], "evaluate.heldout_sequences=1"],
    "eval": ["needle.per_cell=1", "needle.seeds=[1]", "loss_windows=2"],
    "plan": ["hardware=cpu"],  # the tiny model is float32, which a GPU's plan refuses
}


def test_readme_has_the_commands():
    assert {command.split()[1] for command in COMMANDS} >= {"theta", "plan", "train", "lora-merge", "eval"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, quickstart, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("A line of text about nothing in particular.\n" * 4000)
    (tmp_path / "docs" / "b.txt").write_text("Another one, so that one file can be held out.\n" * 4000)
    sibling = quickstart.folder / "side" / "sibling" / "stages" / "sibling" / "model"
    places = {
        "SIBLING-1048k": str(quickstart.folder / "merged") if "eval" in command else str(tmp_path / "out"),
        "SIBLING": str(sibling), "MODEL": str(tiny_model()), "DOCS": str(tmp_path / "docs"),
        "runs/run/adapter": str(quickstart.folder / "adapter"), "8k_to_1048k": "tiny_16x", "nproc=8": "nproc=2",
        "[8192,131072]": "[512,1024]", "from=8192 to=131072": "from=512 to=8192",
    }  # fmt: skip
    for name, place in places.items():
        command = command.replace(name, place)
    verb, *words = shlex.split(command)[1:]
    if verb == "train":
        words = [word for word in words if not word.startswith("curriculum=")]
        words += ["curriculum=tiny_16x", f"run_dir={tmp_path / 'run'}", "curriculum.mix=default"]
        words += [*SHORT[:2], "evaluate.heldout_sequences=1", "parallel=ring"]
    done = longctx(verb, *words, *(SMALL[verb] if verb in ("eval", "plan") else []), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout or done.stderr


def test_the_plan_accepts_what_the_readme_advises_for_an_8b_on_eight_h100(tmp_path, capsys):
    """Every stage fits, and `train` is given the settings that were planned."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}))  # fmt: skip
    plan, train = (
        shlex.split(next(command for command in COMMANDS if command.startswith(f"longctx {verb} ")))[2:]
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
    assert max(stage["memory"]["total"] for stage in document["stages"].values()) < 38 * 2**30
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
