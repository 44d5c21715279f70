"""Load and check a tokenizer before anything is tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UserError, named
from longctx.storage import hub
from longctx.storage.model import check_tokenizer

if TYPE_CHECKING:
    from longctx.config.model import ModelConfig


def check_tokenizer_of(model: ModelConfig, *, vocab_size: int | None = None) -> None:
    """Check the files of the tokenizer that a model config names (model.tokenizer, or the model's own)."""
    check_tokenizer(model.tokenizer or model.path, vocab_size=vocab_size, named=model.tokenizer is not None)


def load_tokenizer(model: ModelConfig, *, vocab_size: int | None = None) -> Any:
    """Load the tokenizer that a model config names: model.tokenizer, or the model's own."""
    check_tokenizer_of(model, vocab_size=vocab_size)
    source = str(model.tokenizer or model.path)
    return tokenizer_at(source, "model.tokenizer" if model.tokenizer else "model.path", vocab_size=vocab_size)


def plain_tokenizer(json: str) -> Any:
    """Make the tokenizer of a tokenizer.json without the truncation and padding that the file may have."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json)
    made.no_truncation()
    made.no_padding()
    return made


def tokenizer_at(source: str | Path, what: str, *, vocab_size: int | None = None) -> Any:
    """Load the tokenizer of a folder or hub id; `what` is the config key that names it.

    Raises UserError when it cannot be read, or when a bos, eos or pad id has no row in the model's embedding.
    """
    from transformers import AutoTokenizer

    check_tokenizer(str(source), vocab_size=vocab_size, named=what == "model.tokenizer")
    local = hub.looks_local(str(source))
    try:
        made: Any = AutoTokenizer.from_pretrained(source, local_files_only=not local and hub.offline())
    except Exception as error:  # tokenizers raises bare Exceptions; a damaged file makes transformers raise others
        reason = named(error) if local else hub.why_not(error, str(source))
        raise UserError(
            f"{what}={source}: its tokenizer cannot be read ({reason}); fetch its files again, "
            "or name another with model.tokenizer= (configs/model)"
        ) from None
    marks = {name: getattr(made, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    beyond = {name: mark for name, mark in marks.items() if mark is not None and mark >= (vocab_size or mark + 1)}
    if beyond:
        name, mark = next(iter(beyond.items()))
        raise UserError(
            f"{what}={source}: its {name} token has the id {mark} and the model has vocab_size={vocab_size}, so that "
            "token has no row in the embedding; use the model's own tokenizer (model.tokenizer=), or resize the "
            "embedding first (tokenizer_config.json)"
        )
    return made
