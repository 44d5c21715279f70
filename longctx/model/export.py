"""Exports a model folder in Hugging Face format from a stream of tensors, for evaluation, extraction and users.

Tensors are written as they arrive, so no rank holds the whole model. The config states theta and window both as
transformers 5 reads them (rope_parameters) and as older readers do (rope_theta, rope_scaling). The folder is written
under a hidden name, read back, and renamed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longctx import signals
from longctx.config.model import InitConfig, ModelConfig
from longctx.errors import RunFailed
from longctx.model.shards import ShardWriter, verify
from longctx.rope.config import with_rope
from longctx.storage.files import size_words, sync, write_json

SHARD_BYTES = 4 << 30


def export(
    state: Iterable[tuple[str, Tensor]],
    source: ModelConfig | str | Path,
    tokenizer: Any,
    out: str | Path,
    *,
    rope: Mapping[str, Any],
    window: int,
    write: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the model whose (name, tensor) pairs `state` yields to the folder `out`, replacing an older folder.

    source: a ModelConfig, folder or hub id that gives the config and the generation config. tokenizer: a transformers
    tokenizer, or None. rope, window: rope_parameters and max_position_embeddings of the exported model. write=False
    only consumes the stream; ranks that do not write must do so, because the stream's collectives need every rank.
    Names may have the prefix `model.` of a LossModel. Raises RunFailed when a weight is missing or unknown, when the
    disk is too small, or when the folder does not read back as written.
    """
    out = Path(out)
    if not write:
        for _ in state:
            pass
        return out
    with signals.temporary(signals.beside(out)) as partial:
        _write(partial, out, state, source, tokenizer, rope, window, shard_bytes)
    return out


def _write(
    beside: Path, out: Path, state: Iterable[tuple[str, Tensor]], source: ModelConfig | str | Path, tokenizer: Any,
    rope: Mapping[str, Any], window: int, shard_bytes: int,
) -> None:  # fmt: skip
    """Write the folder `beside`, read it back, and move it to `out`."""
    config, generation = _configs(source, tokenizer)
    expected = _expected(config)
    beside.mkdir(parents=True)
    _check_disk(beside, sum(expected.values()))
    writer = ShardWriter(beside, limit=shard_bytes, names=expected)
    dtype = "float32"
    for name, tensor in state:
        writer.add(_known(name, expected), tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
    if missing := sorted(expected.keys() - writer.hashes.keys()):
        raise RunFailed(f"export to {out}: {len(missing)} weights did not come, the first {missing[0]}")
    writer.close()
    write_json(beside / "config.json", served_config(config.to_diff_dict(), rope, window, dtype))
    generation.save_pretrained(beside)
    if tokenizer is not None:
        _carry_tokenizer(tokenizer, beside, window)
    try:
        verify(beside, writer.hashes)
        _verify_rope(beside, rope, window)
    except RuntimeError as error:
        raise RunFailed(f"export to {out} failed: {error}") from None
    _publish(beside, out)


def served_config(config: Mapping[str, Any], rope: Mapping[str, Any], window: int, dtype: str) -> dict[str, Any]:
    """Return `config` (the content of a config.json) with rope, window and dtype under the new and the older keys."""
    kept = {key: value for key, value in config.items() if not key.startswith("_attn")}
    changed = with_rope(kept, {"rope_type": "default", **rope}, window)
    return {**changed, "dtype": dtype, "torch_dtype": dtype, "use_cache": True}


def _configs(source: ModelConfig | str | Path, tokenizer: Any) -> tuple[Any, Any]:
    """The transformers config and generation config of the model that training began with.

    The config of a randomly initialised model has no special tokens, so the tokenizer's are taken.
    """
    from transformers import GenerationConfig

    from longctx.model.load import config_of, read_config

    if isinstance(source, ModelConfig) and isinstance(source.init, InitConfig):
        config = config_of(source.init)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name, None))
        return config, GenerationConfig.from_model_config(config)
    path = str(source.path if isinstance(source, ModelConfig) else source)
    config = read_config(path)
    try:
        return config, GenerationConfig.from_pretrained(path)
    except OSError:  # many folders have no generation config; transformers then derives one, and so do we
        return config, GenerationConfig.from_model_config(config)


def _expected(config: Any) -> dict[str, int]:
    """Bytes of every weight by name, counted in fp32 from a model on the meta device; tied weights count once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.tie_weights()  # transformers 5.0 leaves a model on the meta device untied
    config.architectures = [type(model).__name__]
    return {name: weight.numel() * 4 for name, weight in model.named_parameters()}


def _known(name: str, expected: Mapping[str, int]) -> str:
    for candidate in (name, name.removeprefix("model."), name.removeprefix("module.model.")):
        if candidate in expected:
            return candidate
    raise RunFailed(
        f"export: {name} is no weight of the model; adapters are merged (longctx lora merge) before a folder in "
        "Hugging Face format is written"
    )


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunFailed(
            f"{folder.parent} has {size_words(free)} free and the model may need {size_words(needed)}; free some space"
        )


def _carry_tokenizer(tokenizer: Any, folder: Path, window: int) -> None:
    """Save the tokenizer with the new window as its model_max_length."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**settings, "model_max_length": int(window)})


def _verify_rope(folder: Path, rope: Mapping[str, Any], window: int) -> None:
    """Raise RuntimeError unless transformers reads the given rope and window from the written config.json."""
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(folder)
    wrong = [key for key, value in rope.items() if read.rope_parameters.get(key) != value]
    if wrong or read.max_position_embeddings != window:
        raise RuntimeError(
            f"config.json reads back with {read.rope_parameters} and window {read.max_position_embeddings}, not "
            f"{dict(rope)} and {window}"
        )


def _publish(beside: Path, out: Path) -> None:
    """Sync the folder and rename it to `out`; a reader sees the old folder, for an instant none, then the new one."""
    for path in (*beside.iterdir(), beside):
        sync(path)
    with signals.temporary(signals.beside(out.with_name(f"{out.stem}-old{out.suffix}"))) as old:
        if out.exists():
            out.rename(old)
        beside.rename(out)
    sync(out.parent)
