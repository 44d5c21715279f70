"""The dtype in which a model is trained: model.dtype, or the dtype that the model's folder names.

Only config.json is read, and one safetensors header if config.json names no dtype, so planning and refusals need
neither torch nor transformers. Training keeps float32 masters of bfloat16 weights (longctx.train), so a model keeps its
dtype. float16 becomes bfloat16, because training in float16 would need scaled gradients.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UserError
from longctx.storage.model import read_config

if TYPE_CHECKING:
    from longctx.config.model import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}  # of a number in each dtype that is trained
TRAINED = tuple(BYTES)
_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def resolve(model: ModelConfig) -> tuple[ModelConfig, str]:
    """Replace dtype=auto in `model`; returns the new config, and in words where the dtype was found.

    Raises UserError when the folder names a dtype that cannot be trained (float8, int8).
    """
    if model.dtype != "auto":
        return model, "model.dtype"
    if model.init is not None or model.path is None:
        return dataclasses.replace(model, dtype="float32"), "a model drawn at random"
    dtype, source = found(model.path)
    return dataclasses.replace(model, dtype=dtype), source  # type: ignore[arg-type]


def found(path: str) -> tuple[str, str]:
    """The dtype of the model at a folder or hub id, and in words where it was found."""
    dtype, source = stated(read_config(path)[0]), "config.json"
    if dtype is None:
        dtype, source = stored(Path(path)), "the stored weights, config.json names none"
    if dtype is None:
        return "float32", "neither config.json nor a weight here names one"
    if dtype == "float16":
        return "bfloat16", f"{source}: float16, which is trained as bfloat16"
    if dtype not in TRAINED:
        raise UserError(
            f"{path} is stored in {dtype}, which cannot be trained; give a checkpoint in bfloat16 or float32, or set "
            "model.dtype=bfloat16 if the weights can be read as that (configs/model)"
        )
    return dtype, source


def stated(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json names, read as transformers 5 does: `dtype`, or else version 4's `torch_dtype`."""
    value = config.get("dtype") or config.get("torch_dtype")
    name = str(value).removeprefix("torch.") if isinstance(value, str) else None
    return None if name == "auto" else name


def stored(folder: Path) -> str | None:
    """The most frequent dtype in the header of the folder's first safetensors file; None without such a file."""
    file = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if file is None:
        return None
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size)) if size < 2**27 else {}
    except (OSError, ValueError):  # loading the file reports what is wrong with it
        return None
    kinds = Counter(str(entry.get("dtype")) for name, entry in header.items() if name != "__metadata__")
    return next((_STORED.get(kind, kind.lower()) for kind, _ in kinds.most_common(1)), None)
