"""Checks a model's folder before a verb does anything long: config.json, weights and tokenizer.

The checks read only JSON and the headers of safetensors, in a fraction of a second for a model of any size, and import
neither torch nor transformers. Every refusal names the file, the value, the rule and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from longctx.config.model import Family
from longctx.console import remark
from longctx.errors import UserError
from longctx.storage.hub import fetching, looks_local, offline
from longctx.storage.model_files import Folder
from longctx.storage.table import Table, read_object

FAMILIES = get_args(Family)
_MISTRAL_WINDOW = 4096
_COUNTS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
# Files that hold a vocabulary: a tokenizer folder has at least one of them.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "tekken.json")


def read_config(path: str | None, what: str = "model.path") -> tuple[dict[str, Any], str]:
    """The content of a model's config.json, and the name of the file.

    path: a folder or a hub id. what: the config key that names the model, for messages. Raises UserError when the file
    does not exist or is not a JSON object.
    """
    folder = model_folder(path, what)
    config, file = read_object(Folder(folder), "config.json", what), str(folder / "config.json")
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(
                f"{what}={path}: config.json has {key}={value!r}, and that is a whole number of 1 or more; mend it or "
                f"fetch the file again ({file})"
            )
    return config, file


def model_folder(path: str | None, what: str = "model.path") -> Path:
    """The local folder of a model; for a hub id, the cached snapshot that holds its config.json."""
    if path is None or path in ("", "???"):  # Hydra writes ??? for a value that must be given
        raise UserError(f"{what} is missing; give a folder or hub id as {what}=... (configs/model/path.yaml)")
    folder = Path(path)
    if not looks_local(path):
        return _snapshot(path, what)
    if folder.is_file():
        gguf = "; of a GGUF file `longctx import` makes one" if folder.suffix == ".gguf" else ""
        raise UserError(f"{what}={path} is a file; name the folder that holds config.json and the weights{gguf}")
    if not folder.is_dir():
        raise UserError(
            f"{what}={path} does not exist; name a folder with config.json and safetensors, or a hub id such as "
            "meta-llama/Meta-Llama-3-8B"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{what}={path} has no config.json, so it is not a model in Hugging Face format; {_remedy(folder)}"
        )
    return folder


def _remedy(folder: Path) -> str:
    """What to do with a folder that holds no config.json: what else it holds often says which model is meant."""
    if (folder / "adapter_config.json").is_file():
        return f"it is an adapter: merge it first (longctx lora merge target=MODEL adapter={folder} out=FOLDER)"
    if file := next(iter(sorted(folder.glob("*.gguf"))), None):
        return f"import its GGUF file first (longctx import gguf={file} out=FOLDER)"
    return "name the folder that holds it (a run's are under stages/NAME/model)"


def _snapshot(path: str, what: str) -> Path:
    with fetching(path, what):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(path, "config.json", local_files_only=offline())).parent


def check_model(path: str | None, what: str = "model.path") -> dict[str, Any]:
    """Refuse a model that cannot be trained or evaluated; returns the content of its config.json.

    The weights of a hub id are not checked here, because the download checks them. Raises UserError.
    """
    config, _ = read_config(path, what)
    assert path is not None
    check_family(config, path, what)
    if looks_local(path):
        check_shapes(Table(path, what=what), config)
    return config


def check_family(config: Mapping[str, Any], source: str, what: str = "model.path") -> None:
    """Refuse a quantized model, and an architecture that longctx cannot train exactly.

    config: the content of a config.json, or a transformers configuration as a dict. source: the path or id, for the
    message. Raises UserError.
    """
    where, file = f"{what}={source}", f"{source}/config.json"
    kind = config.get("model_type")
    if kind not in FAMILIES:
        if not kind:
            raise UserError(f"{where}: config.json has no model_type, so its architecture is unknown ({file})")
        rotary = any(config.get(key) is not None for key in ("rope_theta", "rope_parameters"))
        reason = (
            "its decoder layer and loss have not been checked against transformers'"
            if rotary
            else "it has no rotary position embedding, so there is no theta to change"
        )
        raise UserError(
            f"{where} is a {kind!r} model, and longctx trains {', '.join(FAMILIES)}: {reason}; choose a model of one "
            f"of these families ({file})"
        )
    if method := config.get("quantization_config"):
        name = method.get("quant_method", "its numbers are codes") if isinstance(method, Mapping) else method
        raise UserError(
            f"{where} is quantized ({name}), and codes can be neither trained nor compared; give the model in "
            f"bf16, fp16 or fp32 ({file})"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name) is not None:
            raise UserError(
                f"{where} has {name}={config[name]}, and the attention has no soft-capping; every layer would differ "
                f"from the model that was trained ({file})"
            )
    layer = sliding_layer(config)
    if layer is not None:
        raise UserError(
            f"{where}: layer {layer} attends to a window of {config.get('sliding_window', _MISTRAL_WINDOW)} tokens, "
            "which context-parallel attention would silently make full; use a model with full attention, or set "
            f"sliding_window to null there if full attention is what you mean to train ({file})"
        )


def remark_untrained(folder: str, source: str) -> None:
    """Warn, for verbs that only calculate, of a model that training refuses.

    folder: where its config.json is. source: the path or id that the user gave.
    """
    try:
        check_family(read_config(folder)[0], source)
    except UserError as refusal:
        remark(f"these are figures only, `longctx train` refuses the model: {refusal}")


def sliding_layer(config: Mapping[str, Any]) -> int | None:
    """The number of the first layer with a sliding window, or None; absent keys take transformers' defaults."""
    kinds = config.get("layer_types")
    if kinds is not None:
        return next((index for index, kind in enumerate(kinds) if kind != "full_attention"), None)
    family = config.get("model_type")
    window = config.get("sliding_window", _MISTRAL_WINDOW if family == "mistral" else None)
    optional = family in ("qwen2", "qwen3")
    if window is None or not config.get("use_sliding_window", not optional):
        return None
    first = config.get("max_window_layers", 28) if optional else 0
    return first if first < config.get("num_hidden_layers", 32) else None


def check_shapes(table: Table, config: Mapping[str, Any]) -> None:
    """Check that the headers hold every weight of the decoder in the shape that config.json gives it.

    Architectures that longctx does not train pass. Raises UserError with the first weight that is missing, left over
    or of another shape.
    """
    table.require_floats()
    expected = expected_shapes(config)
    bare = not any(name.startswith("model.") for name in table.entries)  # saved without the head
    names = {name: name.removeprefix("model.") if bare else name for name in expected}
    where = f"{table.what}={table.path}"
    wrong = [n for n, shape in expected.items() if (e := table.entries.get(names[n])) and e.shape != shape]
    if wrong:
        entry, shape = table.entries[names[wrong[0]]], expected[wrong[0]]
        raise UserError(
            f"{where}: {len(wrong)} weights have another shape than config.json gives them, the first "
            f"{entry.name}: {_shape(entry.shape)} in {entry.file}, {_shape(shape)} by config.json; the weights and the "
            "config.json belong to different models, fetch both again"
        )
    missing = [name for name in expected if names[name] not in table.entries]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} weights of the model that config.json describes are in none of its safetensors, "
            f"the first {missing[0]}; the folder is incomplete or belongs to another config.json, fetch it again"
        )
    layers = config.get("num_hidden_layers")
    beyond = f"model.layers.{layers}.self_attn.q_proj.weight"
    if expected and (beyond.removeprefix("model.") if bare else beyond) in table.entries:
        raise UserError(
            f"{where}: config.json says num_hidden_layers={layers}, and the safetensors hold more, {beyond} first; "
            "loading would drop them without a word. Mend config.json, or fetch the folder again"
        )


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a decoder's weights, as far as the numbers in config.json determine them."""
    kind = config.get("model_type")
    numbers = [config.get(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")]
    if kind not in FAMILIES or not all(isinstance(number, int) for number in numbers):
        return {}
    hidden, heads, layers, vocab = (number or 0 for number in numbers)
    kv_heads = config.get("num_key_value_heads") or (heads if kind == "llama" else None)
    head_dim = config.get("head_dim") or (hidden // heads if kind in ("llama", "mistral", "qwen2") else None)
    ffn = config.get("intermediate_size")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if config.get("tie_word_embeddings") is False:
        shapes["lm_head.weight"] = (vocab, hidden)
    layer: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if ffn:
        layer |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    if head_dim:
        layer |= {"self_attn.q_proj": (heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim)}
    if head_dim and kv_heads:
        layer |= {f"self_attn.{part}_proj": (kv_heads * head_dim, hidden) for part in "kv"}
    if head_dim and kind == "qwen3":
        layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{part}.weight": shape for part, shape in layer.items()}
    return shapes


def check_tokenizer(source: str | None, *, vocab_size: int | None = None, named: bool = True) -> None:
    """Refuse a tokenizer that cannot be read, or whose ids exceed the rows of the embedding.

    named: `source` is model.tokenizer and not the model's own folder. A hub id is not checked, because the download
    checks it. Raises UserError.
    """
    what = "model.tokenizer" if named else "model.path"
    if not source or source == "???":
        raise UserError(
            "model.tokenizer is missing: a model drawn with model.init needs the folder or hub id of a tokenizer, "
            "model.tokenizer=... (configs/model)"
        )
    if not looks_local(source):
        return
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(
            f"{what}={source} is not a folder here and no hub id; give the folder or hub id of a tokenizer "
            "(configs/model)"
        )
    files = Folder(folder)
    if not any(files.exists(name) for name in VOCABULARIES):
        remedy = (
            "name the folder that holds one" if named else "name a tokenizer with model.tokenizer=FOLDER or a hub id"
        )
        raise UserError(
            f"{what}={source} holds no tokenizer (none of {', '.join(VOCABULARIES[:3])}, ...); {remedy} (configs/model)"
        )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if files.exists(name):
            read_object(files, name, what)
    if files.exists("tokenizer.json"):
        _check_vocabulary(read_object(files, "tokenizer.json", what), source, what, vocab_size)
        _check_reading(folder / "tokenizer.json", what)


def _check_vocabulary(tokenizer: Mapping[str, Any], source: str, what: str, vocab_size: int | None) -> None:
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    if not isinstance(vocabulary, dict | list) or not vocabulary:
        raise UserError(
            f"{what}={source}: tokenizer.json holds no vocabulary (model.vocab), so it is no tokenizer; fetch it again"
        )
    size = len(vocabulary) if isinstance(vocabulary, list) else 1 + max(vocabulary.values())
    if vocab_size is not None and size > vocab_size:
        raise UserError(
            f"{what}={source}: the tokenizer gives ids up to {size - 1} and the model has vocab_size={vocab_size}, so "
            "some tokens have no row in its embedding; use the model's own tokenizer (model.tokenizer=), or resize the "
            f"model's embedding first ({source}/tokenizer.json)"
        )


def _check_reading(file: Path, what: str) -> None:
    """Read the file with the tokenizers library, in a tenth of the time that importing transformers takes."""
    try:
        from tokenizers import Tokenizer
    except ImportError:  # the light install tokenizes nothing
        return
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{what}={file.parent}: tokenizer.json cannot be read as a tokenizer ({error}); fetch it again, or name "
            "another with model.tokenizer= (configs/model)"
        ) from None


def _shape(shape: tuple[int, ...]) -> str:
    return json.dumps(list(shape))
