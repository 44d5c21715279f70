"""Config schema of an evaluation: which models, which lengths and depths, how many needles a cell, which phrasing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from longctx.config.base import AboveZero, Format, Given, Length, Samples, Seed, Share, Text, Window, schema
from longctx.config.data import DataConfig, check_template
from longctx.config.model import ModelConfig

NEEDLE = "The pass key of {key} is {value}."
QUESTION = "What is the pass key of {key}? The pass key of {key} is {value}."


@schema
class NeedleConfig:
    """The needle grid: context lengths by depths."""

    lengths: tuple[Length, ...] = (512, 1024, 2048, 4096, 8192)  #: context lengths in tokens, question included
    #: depths of the needles; 0: the haystack's start, 1: its end
    depths: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    per_cell: Samples = 10  #: needles per cell and seed
    seeds: tuple[Seed, ...] = (11, 22, 33)  #: random seeds of keys, values and haystacks
    single: bool = False  #: one needle per haystack, instead of one at every depth, all asked for
    needle: str = NEEDLE  #: phrasing of the needle, with {key} and {value}
    question: str = QUESTION  #: phrasing of the question at the end, with {key} and {value}

    def __post_init__(self) -> None:
        if len(set(self.depths)) != len(self.depths):
            raise ValueError(f"depths={list(self.depths)} must be different numbers")
        if not self.lengths or not self.seeds or not self.depths:
            raise ValueError("lengths, depths and seeds need at least one entry each")
        if len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"lengths={list(self.lengths)} must be different numbers")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} must be different numbers")
        check_template("needle", self.needle)
        check_template("question", self.question)


@schema
class EvalModel:
    """One of several models. path: a folder or hub id; tokenizer: None looks in `path`.

    theta, rope, window: evaluate the model with another rope than its config.json says, nothing trained. theta
    replaces rope_theta; rope is merged over the model's rope_parameters; window replaces max_position_embeddings.
    """

    path: Given  #: the model: a folder or hub id
    tokenizer: Given | None = None  #: a folder or hub id; null: found in path
    theta: Annotated[AboveZero, Field(gt=1)] | None = None  #: rope theta, in place of the model's own
    rope: dict[str, Any] | None = None  #: keys merged over the model's rope_parameters
    window: Window | None = None  #: tokens: replaces the model's max_position_embeddings


def default_name(path: str) -> str:
    """A model's name where none is given: its folder's, or its stage's where the folder is RUN/stages/STAGE/model."""
    parts = PurePath(path).parts
    if len(parts) >= 3 and parts[-1] == "model" and parts[-3] == "stages":
        return parts[-2]
    return parts[-1] if parts else path


def _named(value: Any) -> Any:
    """[A, {name: b, path: B}] or {a: A, b: {path: B}} as {name: {path: ...}}. Raises ValueError for two of one name."""
    if isinstance(value, Mapping):
        return {name: {"path": entry} if isinstance(entry, str) else entry for name, entry in value.items()}
    if not isinstance(value, list | tuple):
        return value
    found: dict[str, Any] = {}
    for entry in value:
        settings = {"path": entry} if isinstance(entry, str) else dict(entry)
        name = str(settings.pop("name", None) or default_name(str(settings.get("path", ""))))
        if name in found:
            raise ValueError(
                f"holds two models named {name!r} ({found[name].get('path')} and {settings.get('path')}); give names: "
                "'models={base: FOLDER, tuned: FOLDER}'"
            )
        found[name] = settings
    return found


@schema
class EvalConfig:
    """`longctx eval model.path=FOLDER`, or several models as 'models=[A,B]' or 'models={base: A, tuned: B}'.

    Each is evaluated as plain transformers loads it: needle grids, held-out loss and loss by position.
    """

    model: ModelConfig | None = None
    #: several models by name, instead of one
    models: Annotated[dict[str, EvalModel] | None, BeforeValidator(_named)] = None
    data: DataConfig
    source: Text = "stdlib"  #: source of haystack and held-out text
    needle: NeedleConfig = NeedleConfig()
    loss_lengths: tuple[Window, ...] = (512, 8192)  #: windows of held-out text; the longest gives the loss by position
    loss_sequences: Samples = 32  #: held-out sequences per length
    out: Given | None = None  #: folder for eval.json, eval.png and models/NAME.json; null: on screen only
    cache: Given = "runs/data"  #: folder of tokenized documents
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        if self.models is not None and not self.models:
            raise ValueError("models is empty; name at least one")
        for name in self.models or {}:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"models: {name!r} names files and titles; use letters, digits, '.', '_' and '-'")
        if len(set(self.loss_lengths)) != len(self.loss_lengths):
            raise ValueError(f"loss_lengths={list(self.loss_lengths)} must be different numbers")
