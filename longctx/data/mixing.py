"""Draw the documents that a stage takes from a source, by the source's length policy.

Documents longer than a sequence are cut into pieces. Pieces come in a random order in each epoch, seeded by (seed,
stage, source, epoch), until the source's share of the stage's tokens is reached. A length policy changes the lengths
within a source but not the shares between sources (Fu et al. 2402.10171; ProLong 2410.02660).

D documents, P pieces.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from longctx.config.data import LengthPolicy
from longctx.errors import UserError


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents of one source, in order: document, start and length (tokens), int32 [P] each."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, which: np.ndarray) -> Pieces:
        """The pieces that an index or a mask chooses."""
        return Pieces(self.document[which], self.start[which], self.length[which])

    @property
    def tokens(self) -> int:
        return int(self.length.sum(dtype=np.int64))

    @classmethod
    def concatenated(cls, parts: Sequence[Pieces]) -> Pieces:
        return cls(*(np.concatenate([getattr(part, column) for part in parts]) for column in _COLUMNS))


_COLUMNS = ("document", "start", "length")


def no_pieces() -> Pieces:
    return Pieces(*(np.zeros(0, np.int32) for _ in _COLUMNS))


@dataclass(frozen=True)
class DrawnPieces:
    """The pieces that a stage draws from one source, by how they become sequences.

    whole: never split. packed: packed or split as data.packing says. joined: joined without boundaries. epochs: how
    often, on average, a document of the most repeated group (long or short) is drawn; the pieces that the packing
    leaves over count too.
    """

    epochs: float
    whole: Pieces = field(default_factory=no_pieces)
    packed: Pieces = field(default_factory=no_pieces)
    joined: Pieces = field(default_factory=no_pieces)

    @property
    def tokens(self) -> int:
        return self.whole.tokens + self.packed.tokens + self.joined.tokens


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
    pieces (best-fit packing); otherwise draw whole documents, which are joined later. The policy `cut` draws pieces of
    its length either way. Raises UserError when the policy asks for long documents and the source has none.
    """
    where = f"source {words[-1]} in stage {words[0]}"
    if policy.kind == "joined":
        joined, epochs = _take(cut_documents(lengths, 0), target, seed, (*words, "all"))
        return DrawnPieces(epochs, joined=joined)
    split = split or policy.kind in ("prolong", "cut")
    pieces = cut_documents(lengths, longest_piece(policy, seq_len) if split else 0)
    if policy.kind not in ("upsample", "prolong"):
        packed, epochs = _take(pieces, target, seed, (*words, "all"))
        return DrawnPieces(epochs, packed=packed)
    assert policy.share is not None
    if policy.kind == "upsample":
        assert policy.min_len is not None
        wanted, setting = policy.min_len, f"upsample.min_len={policy.min_len}"
        is_long = (lengths >= wanted)[pieces.document]
        long_target = round(target * policy.share)
    else:
        wanted, setting = seq_len, f"prolong.share={policy.share:g}"
        is_long = pieces.length == seq_len
        long_target = round(policy.share * target / seq_len) * seq_len
    if long_target and not is_long.any():
        _refuse_no_long(lengths, wanted, where, setting)
    long_target = target if is_long.all() else min(long_target, target)
    long, long_epochs = _take(pieces[is_long], long_target, seed, (*words, "long"))
    short, short_epochs = _take(pieces[~is_long], target - long_target, seed, (*words, "short"))
    epochs = max(long_epochs, short_epochs)
    if policy.kind == "prolong":
        return DrawnPieces(epochs, whole=long, packed=short)
    return DrawnPieces(epochs, packed=Pieces.concatenated([long, short]))


def longest_piece(policy: LengthPolicy | None, seq_len: int) -> int:
    """Return the most tokens that a piece of a document may have under a policy."""
    return min(policy.length, seq_len) if policy is not None and policy.kind == "cut" and policy.length else seq_len


def longest_wanted(policy: LengthPolicy | None, seq_len: int) -> int:
    """Return the length in tokens that a policy needs of at least one document; 0 when any length serves."""
    if policy is None or not policy.share or policy.kind not in ("upsample", "prolong"):
        return 0
    return seq_len if policy.kind == "prolong" else policy.min_len or 0


def cut_documents(lengths: np.ndarray, most: int) -> Pieces:
    """Cut documents into consecutive pieces of at most `most` tokens; 0 cuts none."""
    document = np.arange(len(lengths), dtype=np.int32)
    if not len(lengths) or not most or int(lengths.max()) <= most:
        return Pieces(document, np.zeros_like(document), lengths)
    count = -(-lengths // most)
    owner = np.repeat(document, count)
    firsts = np.cumsum(count, dtype=np.int64) - count
    start = ((np.arange(len(owner)) - np.repeat(firsts, count)) * most).astype(np.int32)
    return Pieces(owner, start, np.minimum(lengths[owner] - start, most).astype(np.int32))


def _take(pieces: Pieces, target: int, seed: int, words: tuple[str, ...]) -> tuple[Pieces, float]:
    """Draw pieces, epoch after epoch, until they have `target` tokens; the last piece is cut to fit.

    Returns them and the number of epochs.
    """
    total = pieces.tokens
    drawn: list[np.ndarray] = [np.zeros(0, np.int64)]
    left, epoch = target, 0
    while left > 0 and total:
        order = rng_of(seed, *words, epoch).permutation(len(pieces))
        if left < total:
            ends = np.cumsum(pieces.length[order], dtype=np.int64)
            order = order[: int(np.searchsorted(ends, left)) + 1]
        drawn.append(order)
        left -= min(left, total)
        epoch += 1
    chosen = pieces[np.concatenate(drawn)]
    if len(chosen):
        chosen.length[-1] -= chosen.tokens - target
    return chosen, target / total if total else 0.0


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
    return DrawnPieces(1.0, whole=Pieces(number, np.zeros_like(number), lengths))
