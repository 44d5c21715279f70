"""`longctx import`: read a GGUF file with transformers and write it as a folder in Hugging Face format.

Weights are dequantized and rounded to one dtype. Tokenizer and chat template come from the file, rope and window too,
written under the names of new and of older readers.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longctx.config.imports import ImportConfig
from longctx.console import emit, emit_json
from longctx.errors import UserError, first_line
from longctx.model.architectures import check_config
from longctx.model.export import served_config
from longctx.model.gguf_rope import scaled_rope
from longctx.rope.config import describe_rope
from longctx.shape import head_dim_of
from longctx.storage.files import replacing, write_json

_MAGIC = b"GGUF"


def run(config: ImportConfig) -> int:
    """Import the file and say what it is; returns 0."""
    found = import_gguf(config)
    if config.format == "json":
        emit_json(found)
    else:
        emit(
            f"{found['out']}: {found['family']}, {found['parameters'] / 1e6:.0f}M parameters in {config.dtype}, window "
            f"{found['window']:,}, {describe_rope(found['rope_parameters'])}"
        )
    return 0


def import_gguf(config: ImportConfig) -> dict[str, Any]:
    """Write the folder and return its family, parameters, window and rope.

    Raises UserError for a file that is missing or no GGUF, an architecture that transformers cannot read from GGUF or
    longctx cannot train, a missing package, and a folder that exists.
    """
    file, out = Path(config.gguf), Path(config.out)
    _check(file, out)
    model, tokenizer = _read(file, config.dtype)
    check_config(model.config, str(file))
    plain, window = dict(model.config.rope_parameters), int(model.config.max_position_embeddings)
    rope, window = scaled_rope(file, plain, window, head_dim_of(model.config.to_dict(), str(file)))
    with replacing(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        stored = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        for written in partial.iterdir():  # safetensors lets nobody else read its files
            written.chmod((partial / "config.json").stat().st_mode)
        write_json(partial / "config.json", served_config(stored, rope, window, config.dtype))
    return {
        "out": str(out),
        "family": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "window": window,
        "theta": float(rope["rope_theta"]),
        "rope_parameters": rope,
        "dtype": config.dtype,
    }


def _check(file: Path, out: Path) -> None:
    if not file.is_file():
        raise UserError(f"gguf={file} is no file; give the path of a .gguf file")
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise UserError(
                f"gguf={file} is not a GGUF file (it does not begin with GGUF); give one, or model.path=FOLDER"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists; remove it, or give another folder")
    if find_spec("gguf") is None:
        raise UserError(
            "`longctx import` needs the package gguf, which transformers reads such files with: pip install gguf"
        )


def _read(file: Path, dtype: str) -> tuple[Any, Any]:
    """The model, its weights dequantized to `dtype`, and the tokenizer."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would warn of a missing GPU
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    place, name = str(file.parent), file.name
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    except Exception as error:  # transformers raises many types of errors for what it does not know or cannot read
        first = first_line(error)
        raise UserError(
            f"gguf={file}: transformers cannot read it ({first}); where its source lists more than "
            f"{file.stat().st_size:,} bytes, the file was cut short: fetch it again"
        ) from None
    # The weights are plain now, and transformers would refuse to save what it takes for a quantized model.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.to(getattr(torch, dtype)), tokenizer
