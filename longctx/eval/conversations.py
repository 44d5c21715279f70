"""Loss on held-out conversations: the assistant's tokens, each conversation by itself in the model's chat template.

Text is cut into rows of one length, without the marks around its documents. Conversations consist of such marks, so
each is read whole, from its first token on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longctx.errors import UserError
from longctx.fingerprint import fingerprint_of

if TYPE_CHECKING:
    from longctx.config.data import DataConfig

Conversation = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class HeldoutChat:
    """Conversations that training does not see, in one tokenizer's tokens.

    key: the fingerprint of documents and tokens. conversations: (tokens int64 [T], whether the assistant's bool [T]).
    """

    key: str
    conversations: tuple[Conversation, ...]


def open_heldout_chat(
    data: DataConfig, source: str, tokenizer: Path | str, cache: Path, *, longest: int, tokens: int
) -> HeldoutChat:
    """Open the conversations of at most `longest` tokens, until they have `tokens` in all.

    A source that no mix reads is held out as a whole. Raises UserError where no conversation is left.
    """
    from longctx.data.check import sources_of
    from longctx.data.stage_opening import open_source
    from longctx.data.tokenizer import tokenizer_at

    split = "heldout" if source in sources_of(data, data.mixes.values()) else "all"
    corpus = open_source(source, data, tokenizer_at(tokenizer, "model.tokenizer"), cache, split=split)
    chosen: list[Conversation] = []
    total = 0
    for number in np.flatnonzero(corpus.lengths <= longest).tolist():
        if total >= tokens:
            break
        length = int(corpus.lengths[number])
        mask = corpus.read_mask(number, 0, length)
        if mask is None or not mask[1:].any():
            continue
        chosen.append((corpus.read(number, 0, length).astype(np.int64), mask.astype(bool)))
        total += length
    if not chosen:
        raise UserError(
            f"data.sources.{source} holds out no conversation of at most {longest:,} tokens with an assistant; raise "
            "data.heldout, or add conversations"
        )
    limits = [corpus.source.min_len, corpus.source.max_len, longest, tokens]
    key = fingerprint_of({"shards": corpus.key, "split": split, "heldout": data.heldout, "tokens": limits})
    return HeldoutChat(key, tuple(chosen))


def answer_loss(model: Any, conversations: Sequence[Conversation]) -> float:
    """The mean negative log likelihood of the assistant's tokens, in nats per token."""
    from longctx.eval.loss import token_losses

    found = [token_losses(model, tokens[None])[0][said[1:]] for tokens, said in conversations]
    return float(np.concatenate(found).mean())
