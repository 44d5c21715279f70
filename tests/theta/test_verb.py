"""`longctx theta` from the command line: output, speed and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from longctx.cli import main
from longctx.rope import inv_freq, wavelengths

SHAPE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
}


def model(folder: Path, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, **values}))
    return folder


def document(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["theta", *words, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["theta", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def test_gradient_llama3_8b_as_json(capsys: pytest.CaptureFixture[str]):
    found = document(capsys, "curriculum=gradient_llama3_8b")
    stages = found["stages"]
    assert [s["seq_len"] for s in stages] == [65536, 262144, 524288, 1048576]
    assert [s["theta"] for s in stages] == [15296098, 207112184, 1062356830, 2804339835]
    assert [s["supported_length"] for s in stages] == [138114, 754858, None, None]
    assert [s["checked_to"] for s in stages] == [2**20] * 4
    assert [s["rules"]["ntk"]["theta"] for s in stages] == [4134231, 16904847, 34183734, 69123823]
    assert [s["rules"]["ntk"]["supported_length"] for s in stages] == [56262, 194367, 203848, 517574]
    assert [s["rules"]["scaling-law"]["theta"] for s in stages] == [
        22443169,
        283461213,
        1007391702,
        3580165449,
    ]
    assert [s["rules"]["dynamic-ntk"]["theta"] for s in stages][:3] == [15296098, 207112184, 1062356830]
    assert stages[0]["critical_dimension"] == 70
    assert all(s["warnings"] == [] for s in stages)
    for stage in stages:
        frequencies = inv_freq({"rope_theta": stage["theta"]}, 128, window=stage["seq_len"])
        beyond = int((wavelengths(frequencies) > stage["seq_len"]).sum()) * 2
        assert stage["dims_beyond_window"] == beyond
    assert found["paste"]["transformers_4"]["rope_theta"] == 2804339835


def test_a_stage_shorter_than_the_window_keeps_it(capsys: pytest.CaptureFixture[str]):
    only = ("curriculum.keep_window=true", "curriculum.only=[s2048]", "curriculum.stages.s2048.seq_len=256")
    found = document(capsys, "model=tiny", "curriculum=tiny_16x", *only)
    assert (found["stages"][0]["seq_len"], found["stages"][0]["window"], found["stages"][0]["theta"]) == (
        256,
        512,
        10000,
    )
    assert found["paste"]["transformers_5"]["max_position_embeddings"] == 512


def test_a_theta_too_small_for_its_stage_is_warned_of(capsys: pytest.CaptureFixture[str]):
    assert main(["theta", "head_dim=128", "theta=500000", "from=8192", "to=65536", "rule=ntk"]) == 0
    printed = capsys.readouterr()
    assert "56,262 !" in printed.out
    assert "theta 4,134,231 supports 56,262 tokens, fewer than the stage's 65,536" in printed.err


def test_a_model_and_two_lengths_give_lines_to_paste(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = model(tmp_path / "m", rope_theta=500000.0)
    assert main(["theta", f"model.path={folder}", "from=8192", "to=64k", "rule=scaling-law"]) == 0
    out = capsys.readouterr().out
    blocks = [json.loads(text) for text in re.findall(r"^\{.*?^\}", out, re.MULTILINE | re.DOTALL)]
    assert blocks == [
        {
            "max_position_embeddings": 65536,
            "rope_parameters": {"rope_type": "default", "rope_theta": 22443169},
        },
        {"max_position_embeddings": 65536, "rope_theta": 22443169, "rope_scaling": None},
    ]


def test_both_styles_load_into_the_same_frequencies(capsys: pytest.CaptureFixture[str]):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    for rule in ("dynamic-ntk", "yarn", "linear", "llama3", "yarn-paper"):
        words = ("head_dim=32", "theta=10000", "from=512", "to=4096", f"rule={rule}")
        paste = document(capsys, *words)["paste"]
        new = LlamaRotaryEmbedding(LlamaConfig(**shape, **paste["transformers_5"])).inv_freq
        old = LlamaRotaryEmbedding(LlamaConfig(**shape, **paste["transformers_4"])).inv_freq
        assert np.array_equal(new.numpy(), old.numpy()), rule


def test_a_scaled_model_starts_from_what_it_has(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    folder = model(tmp_path / "m", rope_theta=500000.0, rope_scaling=llama3, max_position_embeddings=131072)
    found = document(capsys, f"model.path={folder}", "to=1M", "rule=ntk")
    assert found["stages"][0]["rope_parameters"] == {**llama3, "rope_theta": 4134231}
    assert "already llama3" in found["model"]["note"]
    yarn = found["stages"][0]["rules"]["yarn"]
    assert (yarn["rope_parameters"]["factor"], yarn["why"]) == (128.0, None)  # from the original length
    paper = found["stages"][0]["rules"]["yarn-paper"]
    assert paper["theta"] is None
    assert "cannot be extended by rule 'yarn-paper'" in paper["why"]
    assert main(["theta", f"model.path={folder}", "to=1M", "rule=ntk"]) == 0
    assert "this model's rope is already llama3" in capsys.readouterr().out


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path):
    code = (
        "import sys; from longctx.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    folder = model(tmp_path / "m", rope_theta=500000.0)
    words = ["theta", f"model.path={folder}", "from=8192", "to=131072"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    dynamic_ntk = int(500000 * (4 * 16 - 3) ** (128 / 126))
    assert f'"rope_theta": {dynamic_ntk}' in done.stdout


def test_the_picture_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    png = tmp_path / "deep" / "waves.png"
    assert main(["theta", "curriculum=8k_to_1048k", f"png={png}"]) == 0
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    pixels = imread(png)
    assert pixels.shape[0] > 400
    assert pixels.std() > 0.05


def test_overrides_reach_the_table(capsys: pytest.CaptureFixture[str]):
    found = document(capsys, "curriculum=8k_to_1048k", "~curriculum.stages.s16k", "curriculum.only=[s64k]")
    assert [s["name"] for s in found["stages"]] == ["s64k"]
    found = document(capsys, "curriculum=tiny_16x", "head_dim=32", "theta=10000", "from=512", "rope=yarn")
    assert [s["rule"] for s in found["stages"]] == ["yarn", "yarn"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no model to start from: give model.path=FOLDER, or head_dim and theta and from"),
        (
            ["head_dim=128", "theta=500000", "from=8k"],
            "the length to reach is missing: give to=",
        ),
        (["head_dim=127", "theta=500000", "from=8k", "to=64k"], "head_dim=127 must be a multiple of 2"),
        (
            ["head_dim=128", "theta=500000", "from=8k", "to=4k"],
            "longctx: to=4096 is shorter than the window of 8192, and",
        ),
        (
            ["model.path=meta-llama/Llama-3.1-8B-Instruct", "to=1M", "rule=linear"],
            "longctx: rule=linear: rope_type='llama3'",
        ),
        (
            ["head_dim=128", "theta=500000", "from=8k", "to=64k", "rule=yarm"],
            "is not a rule; did you mean 'yarn'?",
        ),
        (
            ["curriculum=gradient_llama3_8b", "to=64k"],
            "to and rule describe one step, but a curriculum is given",
        ),
        (["curriculum=gradient_llama_8b"], "did you mean curriculum=gradient_llama3_8b?"),
        (["curriculum=gradient_llama3_8b", "theta=1e9"], "is below the 1000000000 it starts from"),
        (["head_dim=128", "theta=500000", "from=8k", "to=64k", "fromat=json"], "fromat"),
        (["model.path=/nowhere/m", "to=64k"], "model.path=/nowhere/m does not exist"),
        (
            ["curriculum=tiny_16x", "head_dim=32", "theta=10000", "from=512", "search=true"],
            "search=true reads documents",
        ),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert message in refused(capsys, *words)


def test_a_model_without_rotary_embeddings_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 768, "n_head": 12}))
    err = refused(capsys, f"model.path={folder}", "to=64k")
    assert "model_type='gpt2' has no rotary position embedding" in err
    assert str(folder / "config.json") in err


def test_a_model_and_numbers_together_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = model(tmp_path / "m", rope_theta=500000.0)
    assert "theta and a model are both given" in refused(capsys, f"model.path={folder}", "theta=1e6", "to=64k")


def test_no_cell_is_cut_off_at_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Eight stages up to 1,048,576 tokens and thetas of eleven digits, the widest of configs/curriculum."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["theta", "curriculum=8k_to_1048k", "rope=dynamic_ntk"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert {"s1048k", "1,048,576", "dynamic-ntk", "46711444102", ">1,048,576", "5.1e+08"} <= set(out.split())
