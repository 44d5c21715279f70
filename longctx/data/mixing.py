"""Draw the documents that a stage takes from a source, by the source's length policy.

Documents longer than a sequence are cut into pieces. Pieces come in a random order in each epoch, seeded by (seed,
stage, source, epoch), until the source's share of the stage's tokens is reached. A length policy changes the lengths
within a source but not the shares between sources (Fu et al. 2402.10171; ProLong 2410.02660).

D documents, P pieces.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from longctx.config.data import LengthPolicy
from longctx.errors import UserError

PACK, WHOLE, JOIN = 0, 1, 2  # packed or split as data.packing says; never split; joined without boundaries


@dataclass(frozen=True)
class DrawnPieces:
    """The pieces that a stage draws from one source.

    document, start, length: int32 [P], in tokens. placement: int8 [P], PACK, WHOLE or JOIN. epochs: how often, on
    average, a document of the most repeated group (long or short) is drawn; the pieces that the packing leaves over
    count too.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    placement: np.ndarray
    epochs: float

    @property
    def tokens(self) -> int:
        return int(self.length.sum(dtype=np.int64))


def rng_of(seed: int, *words: str | int) -> np.random.Generator:
    """Return a random generator that depends only on the seed and the words, on every machine."""
    return np.random.default_rng([seed, *(zlib.crc32(str(word).encode()) for word in words)])


def draw(
    lengths: np.ndarray,
    policy: LengthPolicy,
    target: int,
    seq_len: int,
    *,
    seed: int,
    words: tuple[str, ...],
    split: bool = True,
) -> DrawnPieces:
    """Draw `target` tokens from documents of these lengths (int32 [D], tokens) by a length policy.

    words: stage and source, for the seed and for messages. split: cut documents longer than a sequence and draw the
    pieces (best-fit packing); otherwise draw whole documents, which are joined later. The policy `cut` cuts them at its
    own length under both. Raises UserError when the
    policy asks for long documents and the source has none.
    """
    where = f"source {words[-1]} in stage {words[0]}"
    joined = policy.kind == "joined"
    longest = seq_len if (split or policy.kind == "prolong") and not joined else 0
    if policy.kind == "cut":
        longest = min(policy.length or seq_len, seq_len)
    pieces = cut(lengths, longest)
    placement = JOIN if joined else PACK
    if policy.kind not in ("upsample", "prolong"):
        return _take(pieces, np.arange(len(pieces.length)), target, placement, seed, (*words, "all"))
    assert policy.share is not None
    if policy.kind == "upsample":
        assert policy.min_len is not None
        wanted, setting = policy.min_len, f"upsample.min_len={policy.min_len}"
        is_long = (lengths >= wanted)[pieces.document]
        long_placement, long_target = PACK, round(target * policy.share)
    else:
        wanted, setting = seq_len, f"prolong.share={policy.share:g}"
        is_long = pieces.length == seq_len
        long_placement, long_target = WHOLE, round(policy.share * target / seq_len) * seq_len
    long, short = np.flatnonzero(is_long), np.flatnonzero(~is_long)
    if long_target and not len(long):
        _refuse_no_long(lengths, wanted, where, setting)
    if not len(short):
        long_target = target
    parts = [
        _take(pieces, long, min(long_target, target), long_placement, seed, (*words, "long")),
        _take(pieces, short, target - min(long_target, target), PACK, seed, (*words, "short")),
    ]
    columns = ("document", "start", "length", "placement")
    joint = [np.concatenate([getattr(part, name) for part in parts]) for name in columns]
    return DrawnPieces(*joint, epochs=max(part.epochs for part in parts))


def longest_wanted(policy: LengthPolicy | None, seq_len: int) -> int:
    """Return the length in tokens that a policy needs of at least one document; 0 when any length serves."""
    if policy is None or not policy.share or policy.kind not in ("upsample", "prolong"):
        return 0
    return seq_len if policy.kind == "prolong" else policy.min_len or 0


@dataclass(frozen=True)
class DocumentSlices:
    """Consecutive pieces of documents: document, start and length, int32 [P] each."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def cut(lengths: np.ndarray, seq_len: int) -> DocumentSlices:
    """Cut documents into consecutive pieces of at most `seq_len` tokens; seq_len=0 cuts none."""
    document = np.arange(len(lengths), dtype=np.int32)
    if not len(lengths) or not seq_len or int(lengths.max()) <= seq_len:
        return DocumentSlices(document, np.zeros_like(document), lengths)
    count = -(-lengths // seq_len)
    owner = np.repeat(document, count)
    firsts = np.cumsum(count, dtype=np.int64) - count
    start = ((np.arange(len(owner)) - np.repeat(firsts, count)) * seq_len).astype(np.int32)
    return DocumentSlices(owner, start, np.minimum(lengths[owner] - start, seq_len).astype(np.int32))


def _take(
    pieces: DocumentSlices, pool: np.ndarray, target: int, placement: int, seed: int, words: tuple[str, ...]
) -> DrawnPieces:
    """Draw pieces of a pool, epoch after epoch, until they have `target` tokens; the last piece is cut to fit."""
    total = int(pieces.length[pool].sum(dtype=np.int64))
    drawn: list[np.ndarray] = [pool[:0]]
    left, epoch = target, 0
    while left > 0 and total:
        order = pool[rng_of(seed, *words, epoch).permutation(len(pool))]
        if left < total:
            ends = np.cumsum(pieces.length[order], dtype=np.int64)
            order = order[: int(np.searchsorted(ends, left)) + 1]
        drawn.append(order)
        left -= min(left, total)
        epoch += 1
    chosen = np.concatenate(drawn)
    length = pieces.length[chosen]
    if len(length):
        length[-1] -= int(length.sum(dtype=np.int64)) - target
    placements = np.full(len(chosen), placement, np.int8)
    return DrawnPieces(
        pieces.document[chosen], pieces.start[chosen], length, placements, target / total if total else 0.0
    )


def _refuse_no_long(lengths: np.ndarray, wanted: int, where: str, setting: str) -> None:
    longest = int(lengths.max()) if len(lengths) else 0
    raise UserError(
        f"{where}: {setting} asks for documents of {wanted:,} tokens and no document is that long; the longest has "
        f"{longest:,}, {wanted - longest:,} tokens are missing: add longer documents, leave the stage out "
        "(curriculum.only), or let it take a mix with the length policy natural or joined, as "
        "curriculum.stages.NAME.mix=default of most presets (data.mixes)"
    )


def synthetic(policy: LengthPolicy, target: int, seq_len: int, *, seed: int, words: tuple[str, ...]) -> DrawnPieces:
    """Choose the lengths of a synth source's documents, about `target` tokens; at least one if target > 0."""
    where = f"source {words[-1]} in stage {words[0]}"
    size = policy.length or policy.min_len or seq_len
    if size > seq_len:
        raise UserError(
            f"{where}: the length policy {policy.kind} asks for {size:,} tokens in sequences of {seq_len:,}; "
            "lower it, or use `full` (data.mixes)"
        )
    if target <= 0:
        lengths = np.zeros(0, np.int32)
    elif policy.kind == "loguniform":
        most = target // size + 1
        draws = rng_of(seed, *words, "lengths").uniform(np.log(size), np.log(seq_len + 1), most)
        drawn = np.minimum(np.exp(draws).astype(np.int32), seq_len)
        count = int(np.searchsorted(np.cumsum(drawn, dtype=np.int64), target)) + 1
        lengths = drawn[:count]
    else:
        size = seq_len if policy.kind == "full" else size
        lengths = np.full(max(1, round(target / size)), size, np.int32)
    number = np.arange(len(lengths), dtype=np.int32)
    return DrawnPieces(number, np.zeros_like(number), lengths, np.full(len(number), WHOLE, np.int8), 1.0)
