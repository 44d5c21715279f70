"""Make the tiny model's tokenizer: byte-level BPE over the Python standard library, with digits in pairs.

A six-digit number is three tokens from an alphabet of a hundred, which a tiny model learns to copy in minutes
(docs/log.md compares larger alphabets). `python -m longctx.assets.tokenizer FOLDER` makes a tokenizer, but its merges
depend on the standard library of the running Python; the tiny model needs the tokenizer in its own folder.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

from longctx.data.stdlib import stdlib_files

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")
DIGITS = "0123456789"
# One or two digits; words with their space; indentation; line ends; runs of punctuation.
PIECES = r"\p{N}{1,2}| ?[A-Za-z]+|[^\S\r\n]+(?=\s)|\s*[\r\n]+| ?[^\s\p{L}\p{N}]+|\s+| ?\p{L}+"


def make(vocab: int = 512, files: int = 3) -> Any:
    """Train a PreTrainedTokenizerFast of `vocab` symbols on every `files`-th file of the standard library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from transformers import PreTrainedTokenizerFast

    pieces = pre_tokenizers.Sequence(
        [Split(Regex(PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pairs = list(product(DIGITS, DIGITS))
    alphabet = sorted(ByteLevel.alphabet())
    learned_merges = vocab - len(SPECIAL) - len(alphabet) - len(pairs)
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pieces  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + learned_merges, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    learned.train_from_iterator(_texts(files), trainer)
    merges = [*pairs, *_merges(learned)[:learned_merges]]
    symbols = dict.fromkeys([*SPECIAL, *alphabet, *("".join(pair) for pair in merges)])
    made = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    made.pre_tokenizer = pieces  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.add_special_tokens(list(SPECIAL))
    begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=begin, eos_token=end, pad_token=end, model_max_length=512
    )


def _texts(every: int) -> list[str]:
    """Read the source files without digits, which have merges of their own."""
    texts = [path.read_text("utf-8", errors="ignore") for path, _ in stdlib_files()[::every]]
    return ["".join(c for c in text if not c.isdigit()) for text in texts]


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


if __name__ == "__main__":
    make().save_pretrained(Path(sys.argv[1]))
