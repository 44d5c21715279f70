"""Which documents a stage draws from a source, and how long they are there.

Documents come in a random order per epoch, seeded by (seed, stage, source, epoch), until the source's share of
the stage's tokens is reached; the last one is cut to reach it exactly. Policies change lengths inside a source
and leave the shares between sources alone (Fu et al. 2402.10171; ProLong 2410.02660). D documents, P pieces.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from longctx.config.data import LengthPolicy
from longctx.errors import UserError

PACK, WHOLE, JOIN = 0, 1, 2  # packed or split as the stage says; never split; joined without boundaries


@dataclass(frozen=True)
class Drawn:
    """Pieces of a source's documents: int32 [P] each; kind is PACK, WHOLE or JOIN; epochs: how often a document
    of the most repeated pool is seen, on average."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    kind: np.ndarray
    epochs: float

    @property
    def tokens(self) -> int:
        return int(self.length.sum(dtype=np.int64))


def rng_of(seed: int, *words: str | int) -> np.random.Generator:
    """A generator that depends on the seed and the words alone, on every machine."""
    return np.random.default_rng([seed, *(zlib.crc32(str(word).encode()) for word in words)])


def draw(
    lengths: np.ndarray, policy: LengthPolicy, target: int, seq_len: int, *, seed: int, words: tuple[str, ...]
) -> Drawn:
    """`target` tokens out of documents with these lengths (int32 [D]), by a source's policy.

    words: stage and source, for the seed and for messages. Raises UserError when the policy's long documents do
    not exist.
    """
    where = f"source {words[-1]} in stage {words[0]}"
    if policy.kind == "upsample":
        return _upsample(lengths, policy, target, seed, words, where)
    if policy.kind == "prolong":
        return _prolong(lengths, policy, target, seq_len, seed, words, where)
    everything = np.arange(len(lengths), dtype=np.int32)
    kind = JOIN if policy.kind == "joined" else PACK
    return _take(lengths, everything, target, kind, seed, (*words, "all"))


def _take(
    lengths: np.ndarray, pool: np.ndarray, target: int, kind: int, seed: int, words: tuple[str, ...]
) -> Drawn:
    """Documents of a pool, epoch after epoch, until `target` tokens are reached."""
    total = int(lengths[pool].sum(dtype=np.int64))
    drawn: list[np.ndarray] = []
    left, epoch = target, 0
    while left > 0 and total:
        order = pool[rng_of(seed, *words, epoch).permutation(len(pool))]
        if left < total:
            ends = np.cumsum(lengths[order], dtype=np.int64)
            order = order[: int(np.searchsorted(ends, left)) + 1]
        drawn.append(order)
        left -= total if left >= total else left
        epoch += 1
    document = np.concatenate(drawn) if drawn else np.zeros(0, np.int32)
    length = lengths[document].copy()
    over = int(length.sum(dtype=np.int64)) - target
    if len(length) and over > 0:
        length[-1] -= over
    start = np.zeros(len(document), np.int32)
    return Drawn(document, start, length, np.full(len(document), kind, np.int8), target / total if total else 0.0)


def _upsample(
    lengths: np.ndarray, policy: LengthPolicy, target: int, seed: int, words: tuple[str, ...], where: str
) -> Drawn:
    assert policy.min_len is not None and policy.share is not None
    long = np.flatnonzero(lengths >= policy.min_len).astype(np.int32)
    short = np.flatnonzero(lengths < policy.min_len).astype(np.int32)
    if policy.share > 0 and not len(long):
        _no_long(lengths, policy.min_len, where, f"upsample.min_len={policy.min_len}")
    wanted = round(target * (policy.share if len(short) else 1.0))
    return _join([
        _take(lengths, long, wanted, PACK, seed, (*words, "long")),
        _take(lengths, short, target - wanted, PACK, seed, (*words, "short")),
    ])  # fmt: skip


def _prolong(
    lengths: np.ndarray,
    policy: LengthPolicy,
    target: int,
    seq_len: int,
    seed: int,
    words: tuple[str, ...],
    where: str,
) -> Drawn:
    """Full sequences out of single long documents; what remains of those, and shorter documents, are packed."""
    assert policy.share is not None
    pool = np.flatnonzero(lengths >= seq_len).astype(np.int32)
    short = np.flatnonzero(lengths < seq_len).astype(np.int32)
    full = round(policy.share * target / seq_len)
    if full and not len(pool):
        _no_long(lengths, seq_len, where, f"prolong.share={policy.share:g}")
    whole = lengths - lengths % seq_len
    long = _take(whole, pool, full * seq_len, WHOLE, seed, (*words, "long"))
    pieces = cut(long, seq_len)
    ended = long.length == whole[long.document]
    tails = long.document[ended & (lengths[long.document] > whole[long.document])]
    room = target - full * seq_len
    keep = np.cumsum((lengths - whole)[tails], dtype=np.int64) <= room
    tail_length = (lengths - whole)[tails][keep]
    tail = Drawn(
        tails[keep], whole[tails][keep], tail_length, np.full(int(keep.sum()), PACK, np.int8), long.epochs
    )
    rest = room - tail.tokens
    others = short if len(short) else pool
    return _join([pieces, tail, _take(lengths, others, rest, PACK, seed, (*words, "short"))])


def _no_long(lengths: np.ndarray, wanted: int, where: str, setting: str) -> None:
    longest = int(lengths.max()) if len(lengths) else 0
    raise UserError(
        f"{where}: {setting} asks for documents of {wanted:,} tokens and no document is that long; the longest has "
        f"{longest:,}, {wanted - longest:,} tokens are missing: add longer documents, or let the mix use the length "
        "policy natural or joined (data.mixes)"
    )


def _join(parts: list[Drawn]) -> Drawn:
    return Drawn(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("document", "start", "length", "kind")
        ),
        epochs=max(part.epochs for part in parts),
    )


def cut(drawn: Drawn, seq_len: int) -> Drawn:
    """Documents longer than a sequence in consecutive pieces of at most `seq_len` tokens."""
    if not len(drawn.length) or int(drawn.length.max()) <= seq_len:
        return drawn
    count = -(-drawn.length // seq_len)
    ends = np.cumsum(count, dtype=np.int64)
    owner = np.repeat(np.arange(len(count)), count)
    number = (np.arange(int(ends[-1])) - np.repeat(ends - count, count)).astype(np.int32)
    start = drawn.start[owner] + number * np.int32(seq_len)
    length = np.minimum(drawn.length[owner] - number * np.int32(seq_len), seq_len).astype(np.int32)
    return Drawn(drawn.document[owner], start, length, drawn.kind[owner], drawn.epochs)


def synthetic(policy: LengthPolicy, target: int, seq_len: int, *, seed: int, words: tuple[str, ...]) -> Drawn:
    """Virtual documents of a synth source, close to `target` tokens: at least one where target > 0."""
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
    return Drawn(number, np.zeros_like(number), lengths, np.full(len(number), WHOLE, np.int8), 1.0)
