"""The packing of a stage: which pieces of which documents form each sequence, as flat arrays.

The packing is a pure function of the config, the documents' lengths, the seed and the stage. It does not depend on
the ranks, the workers or the batch size, so a run can resume at any sequence with other numbers of them.

N sequences, P pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from longctx.config.data import DataConfig, LengthPolicy, Mix
from longctx.data.mixing import DrawnPieces, Pieces, draw, longest_piece, rng_of, synthetic
from longctx.data.packing import best_fit, join_and_split
from longctx.errors import UserError
from longctx.host_memory import free_memory

# Bytes of a piece at the peak, while pieces are sorted. 98 to 143 bytes were measured; 90 is below them, so nothing
# that fits is refused.
_BYTES_PER_PIECE = 90.0
_MOST_PADDING = 0.1


@dataclass(frozen=True)
class SourceUse:
    """The tokens and documents that a stage takes from a source.

    cuts: pieces that begin within a document. cut: documents that are split at least once. epochs: see DrawnPieces.
    """

    tokens: int
    documents: int
    cuts: int
    cut: int
    epochs: float


@dataclass(frozen=True)
class StagePacking:
    """The pieces of all sequences of a stage, in order.

    first: int64 [N+1], sequence i is made of pieces first[i]:first[i+1]. source: int16 [P], an index into `names`.
    document, start, length: int32 [P], in tokens. joined: bool [P], attention crosses from the piece before into this
    one. padding: the share of positions without a token. left_over: pieces that were drawn but not used, because they
    were packed into sequences beyond N.
    """

    seq_len: int
    names: tuple[str, ...]
    first: np.ndarray
    source: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    joined: np.ndarray
    use: Mapping[str, SourceUse]
    padding: float
    left_over: int

    def __len__(self) -> int:
        return len(self.first) - 1

    def fingerprint(self) -> str:
        """A hash of which pieces of which documents form which sequence."""
        digest = hashlib.sha256("|".join(self.names).encode())
        for column in (self.first, self.source, self.document, self.start, self.length, self.joined):
            digest.update(column.tobytes())
        return digest.hexdigest()[:16]


def pack_stage(
    data: DataConfig,
    mix: Mix,
    lengths: Mapping[str, np.ndarray],
    *,
    seq_len: int,
    sequences: int,
    seed: int,
    stage: str,
) -> StagePacking:
    """Draw a stage's documents, pack them into `sequences` sequences of `seq_len` tokens, and shuffle these.

    lengths: the documents' lengths (int32, tokens) of each source with files. Raises UserError when a length policy
    cannot be met, and before it begins when the host's memory cannot hold so many pieces.
    """
    names = tuple(name for name, entry in mix.items() if entry.weight > 0)
    _check_memory(mix, lengths, seq_len, sequences, stage)
    drawn = _draw_all(data, mix, names, lengths, seq_len, sequences, seed, stage)
    packed, bins = _pack(data, list(drawn.values()), seq_len, rng_of(seed, stage, "concat"))
    rng = rng_of(seed, stage, "order")
    place = _choose(packed, bins, sequences, rng)
    target = place[packed.bin]
    kept = np.flatnonzero(target >= 0)
    # Joined pieces keep their order; packed pieces are shuffled within the sequence.
    tie = rng.integers(0, 2**31, size=len(kept), dtype=np.int64)
    ordered = packed.joined[kept]
    tie[ordered] = np.flatnonzero(ordered)
    order = kept[np.argsort((target[kept].astype(np.int64) << 31) | tie, kind="stable")]
    first = np.searchsorted(target[order], np.arange(sequences + 1)).astype(np.int64)
    source, pieces, joined = packed.source[order], packed.pieces[order], packed.joined[order]
    joined[first[:-1][first[:-1] < len(joined)]] = False
    return StagePacking(
        seq_len, names, first, source, pieces.document, pieces.start, pieces.length, joined,
        use=_use(names, source, pieces, drawn, lengths), padding=1 - pieces.tokens / (sequences * seq_len),
        left_over=len(packed.bin) - len(order),
    )  # fmt: skip


def _check_memory(mix: Mix, lengths: Mapping[str, np.ndarray], seq_len: int, sequences: int, stage: str) -> None:
    """Raise UserError when the pieces of a stage would take more than the host's free memory."""
    pieces = 0.0
    for name, entry in mix.items():
        documents = lengths.get(name, np.zeros(0, np.int32))
        count = -(-documents // longest_piece(entry.length, seq_len)).sum(dtype=np.int64)
        mean = max(1.0, documents.sum(dtype=np.int64) / count) if count else seq_len
        pieces += sequences * entry.weight * seq_len / mean
    need, free = _BYTES_PER_PIECE * pieces, free_memory()
    if need > free:
        name, _, split = stage.partition("/")
        fewer = "a lower evaluate.heldout_sequences" if split == "heldout" else "fewer tokens or steps"
        raise UserError(
            f"curriculum.stages.{name}: packing {sequences:,} sequences of {seq_len:,} tokens takes about "
            f"{need / 2**30:,.1f} GiB of host memory, of which {free / 2**30:,.1f} GiB are free; give it {fewer}, or "
            "a machine with more memory (configs/curriculum)"
        )


def empty_packing(seq_len: int) -> StagePacking:
    """Return a packing without sequences."""
    none = np.zeros(0, np.int32)
    first, source, joined = np.zeros(1, np.int64), none.astype(np.int16), none.astype(bool)
    return StagePacking(seq_len, (), first, source, none, none, none, joined, use={}, padding=0.0, left_over=0)


@dataclass(frozen=True)
class _Packed:
    """Pieces of several sources, [P] each: source (int16), the piece, joined (bool, see StagePacking), bin (int32)."""

    source: np.ndarray
    pieces: Pieces
    joined: np.ndarray
    bin: np.ndarray


def policy_of(data: DataConfig, mix: Mix, name: str) -> LengthPolicy:
    """Return the length policy of a source in a mix: full for synth sources and natural for others by default."""
    synth = data.sources[name].kind == "synth"
    return mix[name].length or LengthPolicy(kind="full" if synth else "natural")


def describe_padding(data: DataConfig, mix: str, packing: StagePacking, stage: str) -> str | None:
    """Say what pads a stage and what to do about it; None where at most a tenth of its positions is padding.

    mix: the name of the mix that was packed. The source that is named has the most tokens beside the padding.
    """
    if packing.padding <= _MOST_PADDING:
        return None
    ends = np.concatenate([[0], np.cumsum(packing.length, dtype=np.int64)])
    filled = np.diff(ends[packing.first])
    padded = np.repeat(1 - filled / packing.seq_len, np.diff(packing.first))
    beside = np.bincount(packing.source, padded * packing.length, minlength=len(packing.names))
    name = packing.names[int(beside.argmax())]
    policy = policy_of(data, data.mixes[mix], name)
    ways: list[str] = []
    if policy.length and packing.seq_len % policy.length:
        even = packing.seq_len // -(-packing.seq_len // policy.length)
        ways.append(f"take a length of {even:,} tokens (data.mixes.{mix}.{name}.length)")
    if data.packing == "best_fit" and data.sources[name].kind != "synth":
        ways.append("set data.packing=concat, which splits documents where a sequence ends")
    return (
        f"stage {stage}: {packing.padding:.0%} of its positions are padding, because documents of source {name} "
        f"(length policy {policy.kind}) leave room in sequences of {packing.seq_len:,} tokens that no other fits; "
        + ", or ".join([*ways, f"give data.mixes.{mix} more short documents"])
    )


def _draw_all(
    data: DataConfig,
    mix: Mix,
    names: tuple[str, ...],
    lengths: Mapping[str, np.ndarray],
    seq_len: int,
    sequences: int,
    seed: int,
    stage: str,
) -> dict[str, DrawnPieces]:
    """Draw the pieces of every source.

    Synth sources come first, because their documents are never cut; text sources fill the rest of the stage.
    """
    budget = sequences * seq_len
    synth = [name for name in names if data.sources[name].kind == "synth"]
    texts = [name for name in names if name not in synth]
    drawn: dict[str, DrawnPieces] = {}
    for name in synth:
        target = round(mix[name].weight * budget)
        drawn[name] = synthetic(policy_of(data, mix, name), target, seq_len, seed=seed, words=(stage, name))
    left = budget - sum(part.tokens for part in drawn.values())
    if left > 0 and not texts:  # synth documents rounded down: draw more of the largest source
        name = max(synth, key=lambda key: mix[key].weight)
        extra = drawn[name].tokens + left + seq_len
        drawn[name] = synthetic(policy_of(data, mix, name), extra, seq_len, seed=seed, words=(stage, name))
    share = sum(mix[name].weight for name in texts)
    for number, name in enumerate(texts):
        before = sum(drawn[key].tokens for key in texts[:number])
        target = max(left, 0) - before if name == texts[-1] else round(max(left, 0) * mix[name].weight / share)
        if target > 0 and not len(lengths[name]):
            raise UserError(
                f"source {name} in stage {stage} has no document to draw, and {target:,} tokens are wanted; "
                "loosen its min_len and max_len, or hold out fewer (data.heldout)"
            )
        policy = policy_of(data, mix, name)
        drawn[name] = draw(
            lengths[name], policy, target, seq_len,
            seed=seed, words=(stage, name), split=data.packing == "best_fit",
        )  # fmt: skip
    return {name: drawn[name] for name in names}


def _pack(data: DataConfig, drawn: list[DrawnPieces], seq_len: int, rng: np.random.Generator) -> tuple[_Packed, int]:
    """Pack the drawn pieces of all sources; returns them with the bin of each, and the number of bins.

    Each source's joined pieces are laid end to end by themselves, split ones (packing=concat) in random order.
    """
    whole, packed, joined = (
        [(source, getattr(part, column)) for source, part in enumerate(drawn)]
        for column in ("whole", "packed", "joined")
    )
    if data.packing == "best_fit":
        to_fit, to_split = [*chain(*zip(whole, packed, strict=True))], []
    else:
        to_fit, to_split = whole, packed
    source, pieces = _together(to_fit)
    bin_of, count = best_fit(pieces.length, seq_len)
    done = [_Packed(source, pieces, np.zeros(len(pieces), bool), bin_of)]
    runs = [(*_together([part]), True) for part in joined]
    if to_split:
        source, pieces = _together(to_split)
        order = rng.permutation(len(pieces))
        runs.append((source[order], pieces[order], False))
    for source, pieces, is_joined in runs:
        if len(pieces):
            done.append(_split(source, pieces, seq_len, count, joined=is_joined))
            count = int(done[-1].bin[-1]) + 1
    columns = [np.concatenate([getattr(part, name) for part in done]) for name in ("source", "joined", "bin")]
    return _Packed(columns[0], Pieces.concatenated([part.pieces for part in done]), columns[1], columns[2]), count


def _together(parts: list[tuple[int, Pieces]]) -> tuple[np.ndarray, Pieces]:
    """The pieces of several sources one after the other, and the source of each."""
    source = np.repeat(np.array([number for number, _ in parts], np.int16), [len(pieces) for _, pieces in parts])
    return source, Pieces.concatenated([pieces for _, pieces in parts])


def _split(source: np.ndarray, pieces: Pieces, seq_len: int, first_bin: int, *, joined: bool) -> _Packed:
    """Lay pieces end to end and split them at every `seq_len` tokens; the bins count from `first_bin` on."""
    which, start, length, bin_of = join_and_split(pieces.length, seq_len)
    again = pieces[which]
    parts = Pieces(again.document, (again.start + start).astype(np.int32), length.astype(np.int32))
    return _Packed(source[which], parts, np.full(len(parts), joined), (bin_of + first_bin).astype(np.int32))


def _choose(packed: _Packed, bins: int, sequences: int, rng: np.random.Generator) -> np.ndarray:
    """Return the sequence that each of the bins becomes, int32 [bins]; -1 for a bin that is left out.

    Packing makes a few bins more than N. The emptiest bins are left out, or random ones when there are so many that
    leaving out the emptiest would change the mix.
    """
    chosen = np.arange(bins)
    if bins > sequences:
        few = bins - sequences <= max(1, sequences // 20)
        fill = np.bincount(packed.bin, packed.pieces.length, minlength=bins)
        ranked = np.argsort(-fill, kind="stable") if few else rng.permutation(bins)
        chosen = np.sort(ranked[:sequences])
    place = np.full(bins, -1, np.int32)
    place[chosen] = rng.permutation(len(chosen)).astype(np.int32)
    return place


def _use(
    names: tuple[str, ...],
    source: np.ndarray,
    pieces: Pieces,
    drawn: Mapping[str, DrawnPieces],
    lengths: Mapping[str, np.ndarray],
) -> dict[str, SourceUse]:
    """What the stage takes from each source; source: of each piece, an index into names."""
    use: dict[str, SourceUse] = {}
    for number, name in enumerate(names):
        mine = pieces[source == number]
        split = mine.document[mine.length < lengths[name][mine.document]] if name in lengths else mine.document[:0]
        use[name] = SourceUse(
            tokens=mine.tokens,
            documents=_distinct(mine.document),
            cuts=int((mine.start > 0).sum()),
            cut=_distinct(split),
            epochs=drawn[name].epochs,
        )
    return use


def _distinct(documents: np.ndarray) -> int:
    """How many different documents there are."""
    return int((np.bincount(documents) > 0).sum()) if len(documents) else 0
