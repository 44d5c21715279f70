"""Config schema of `longctx import`."""

from __future__ import annotations

from typing import Annotated, Literal

from longctx.config.base import AsDtype, Format, Given, schema


@schema
class ImportConfig:
    """The root of configs/import.yaml: a model in a GGUF file becomes a folder that everything else reads."""

    gguf: Given  #: the GGUF file; transformers reads its weights, quantized or not, and its tokenizer
    out: Given  #: the model's folder, in Hugging Face format
    dtype: Annotated[Literal["bfloat16", "float32"], AsDtype] = "bfloat16"  #: dtype of the weights written
    format: Format = "text"  #: format of what is printed
