"""Damaged model folders: every verb refuses them in one paragraph, before any long work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longctx import cli
from longctx.assets import tiny_model
from longctx.errors import UserError
from longctx.storage.model import check_model, check_tokenizer, read_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2103336\n"
WEIGHTS, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
CONFIG, TOKENS = "config.json", "tokenizer.json"


def edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return do


def numbers(**values: Any) -> Callable[[Path], None]:
    return edit(CONFIG, lambda content: content.update(values))


def write(file: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def without(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    (folder / INDEX).unlink()


def a_missing_shard(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


DAMAGED_CONFIG = {
    "no config": (without(CONFIG), "has no config.json"),
    "half a config": (write(CONFIG, '{"model_type": "llama", '), "config.json is not JSON"),
    "a list": (write(CONFIG, "[1, 2]"), "config.json is a JSON list and not an object"),
    "a config that is a pointer": (write(CONFIG, POINTER), "config.json is a git-lfs pointer"),
    "a config in bytes": (write(CONFIG, b"\xff\xfe\x00"), "config.json cannot be read"),
    "hidden_size in words": (numbers(hidden_size="wide"), "hidden_size='wide', and that is a whole number"),
    "no heads": (numbers(num_attention_heads=0), "num_attention_heads=0, and that is a whole number of 1 or more"),
}
DAMAGED_WEIGHTS = {
    "a pointer": (write(WEIGHTS, POINTER), f"{WEIGHTS} is a git-lfs pointer.*git lfs pull"),
    "cut short": (weights(lambda data: data[:-100]), f"{WEIGHTS} is truncated"),
    "nothing": (write(WEIGHTS, b""), "is not a whole safetensors file"),
    "a header beyond the file": (
        weights(lambda data: (10**9).to_bytes(8, "little") + data[8:]), "is not a whole safetensors file",
    ),
    "a broken header": (weights(lambda data: data[:8] + b"#" * 40 + data[48:]), "the header of .* is damaged"),
    "a missing shard": (a_missing_shard, "shard model-00002-of-00002.safetensors is missing"),
    "an index beyond its shards": (
        edit(INDEX, lambda index: index["weight_map"].update({"model.x": WEIGHTS})), "promises 1 tensors .* model.x",
    ),
    "an index without a map": (write(INDEX, '{"weight_map": 3}'), "it has no weight_map"),
    "no weights": (without(WEIGHTS, INDEX), "has no model.safetensors and no index"),
    "pickles": (pickled, "holds pickles"),
    "another width": (numbers(hidden_size=256), r"embed_tokens.weight: \[512, 128\] in .* \[512, 256\] by config"),
    "another number of heads": (numbers(num_key_value_heads=4), "k_proj.weight: .* by config.json"),
    "more layers": (numbers(num_hidden_layers=9), "63 weights .* are in none .* model.layers.2.input_layernorm"),
    "fewer layers": (numbers(num_hidden_layers=1), "num_hidden_layers=1, and the safetensors hold more"),
    "another family": (numbers(model_type="phi3"), "is a 'phi3' model, and longctx trains llama"),
    "no family": (edit(CONFIG, lambda content: content.pop("model_type")), "has no model_type"),
    "quantized": (numbers(quantization_config={"quant_method": "gptq"}), "is quantized \\(gptq\\)"),
    "a sliding window": (numbers(model_type="mistral", sliding_window=64), "attends to a window of 64 tokens"),
}  # fmt: skip
DAMAGED_TOKENIZER = {
    "no tokenizer": (without(TOKENS), "holds no tokenizer .* with model.tokenizer="),
    "half a tokenizer": (write(TOKENS, '{"model": '), "tokenizer.json is not JSON"),
    "a pointer": (write(TOKENS, POINTER), "tokenizer.json is a git-lfs pointer"),
    "no vocabulary": (edit(TOKENS, lambda content: content["model"].pop("vocab")), "holds no vocabulary"),
    "an unknown kind": (
        edit(TOKENS, lambda content: content["model"].update(type="Nope")), "cannot be read as a tokenizer",
    ),
    "broken settings": (write("tokenizer_config.json", "{"), "tokenizer_config.json is not JSON"),
    "beyond the embedding": (
        edit(TOKENS, lambda content: content["model"]["vocab"].update(zz=900)), "ids up to 900 .* vocab_size=512",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model, its weights in a shard that an index names."""
    made = Path(shutil.copytree(tiny_model(), tmp_path / "model"))
    (made / "model.safetensors").rename(made / WEIGHTS)
    edit(INDEX, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], WEIGHTS)))(made)
    return made


def test_a_sound_folder_passes(folder: Path) -> None:
    assert check_model(str(folder))["vocab_size"] == 512
    check_tokenizer(str(folder), vocab_size=512)


@pytest.mark.parametrize("case", [*DAMAGED_CONFIG, *DAMAGED_WEIGHTS])
def test_damage_is_said_with_file_and_remedy(folder: Path, case: str) -> None:
    damage, words = {**DAMAGED_CONFIG, **DAMAGED_WEIGHTS}[case]
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        check_model(str(folder))
    assert str(folder) in str(raised.value)
    assert "model.path" in str(raised.value)


@pytest.mark.parametrize("case", DAMAGED_TOKENIZER)
def test_a_damaged_tokenizer_is_said(folder: Path, case: str) -> None:
    damage, words = DAMAGED_TOKENIZER[case]
    damage(folder)
    with pytest.raises(UserError, match=words):
        check_tokenizer(str(folder), vocab_size=512, named=False)


def test_a_path_that_is_missing_or_no_folder_says_so(tmp_path: Path) -> None:
    for path in (None, "", "???"):
        with pytest.raises(UserError, match=r"^model\.path is missing; give a folder or hub id as model\.path="):
            read_config(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name the folder"):
        read_config(str(tmp_path / "file"))
    with pytest.raises(UserError, match="does not exist; name a folder"):
        read_config(str(tmp_path / "nowhere"))


ADAPTER = "adapter=/nowhere"
VERBS: dict[str, Callable[[Path, Path], list[str]]] = {
    "train": lambda model, out: ["train", "data=stdlib", f"model.path={model}", f"run_dir={out}", "launch.nproc=2"],
    "eval": lambda model, out: ["eval", f"model.path={model}", f"cache={out}"],
    "theta search": lambda model, out: ["theta", f"model.path={model}", "to=2048", "search=true", f"run_dir={out}"],
    "lora extract": lambda model, out: ["lora", "extract", f"base={tiny_model()}", f"tuned={model}", f"out={out}"],
    "lora merge": lambda model, out: ["lora", "merge", f"target={model}", ADAPTER, f"out={out}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_in_one_paragraph(folder: Path, tmp_path: Path, verb: str, capsys: Any) -> None:
    sound = (folder / WEIGHTS).read_bytes()
    for damage, words in (
        (write(WEIGHTS, POINTER), f"{WEIGHTS} is a git-lfs pointer"),
        (write(WEIGHTS, sound[:-100]), f"{WEIGHTS} is truncated"),
        (without(WEIGHTS), f"shard {WEIGHTS} is missing"),
        (write(CONFIG, "[]"), "config.json is a JSON list"),
    ):
        damage(folder)
        if words.endswith("list"):
            (folder / WEIGHTS).write_bytes(sound)
        assert cli.main(VERBS[verb](folder, tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len([line for line in said.splitlines() if not line.endswith(" ...")]) == 1, (
            said
        )  # "longctx: loading ..."
        assert not (tmp_path / "out").exists()


def test_plan_and_theta_need_config_json_only(folder: Path, capsys: Any) -> None:
    (folder / WEIGHTS).write_text(POINTER)
    assert cli.main(["theta", f"model.path={folder}", "to=2048"]) == 0
    assert cli.main(["plan", f"model.path={folder}", "hardware=cpu", "ranks=2"]) == 0
    (folder / CONFIG).write_text("{")
    for words in (["theta", "to=2048"], ["plan"]):
        assert cli.main([*words, f"model.path={folder}"]) == 2
        assert "config.json is not JSON" in capsys.readouterr().err


def test_a_refusal_waits_for_neither_torch_nor_transformers(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)
    code = (
        "import sys; from longctx import cli; status = cli.main(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules]); sys.exit(status)"
    )
    words = [*VERBS["train"](folder, tmp_path / "out"), "logging.display=none"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.strip() == "[]"
    assert "git-lfs pointer" in done.stderr


def test_a_folder_of_another_kind_is_refused_with_the_command_that_makes_a_model_of_it(tmp_path):
    for file, message in (
        ("some.Q4_1.gguf", r"longctx import gguf=.*some\.Q4_1\.gguf out=FOLDER"),
        ("adapter_config.json", r"it is an adapter: .*longctx lora merge target=MODEL adapter="),
    ):
        (tmp_path / file).write_bytes(b"GGUF")
        with pytest.raises(UserError, match=message):
            read_config(str(tmp_path))
    with pytest.raises(UserError, match=r"is a file; .*`longctx import` makes one"):
        read_config(str(tmp_path / "some.Q4_1.gguf"))
