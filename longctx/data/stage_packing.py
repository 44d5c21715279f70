"""The packing of a stage: which pieces of which documents form each sequence, as flat arrays.

The packing is a pure function of the config, the documents' lengths, the seed and the stage. It does not depend on
the ranks, the workers or the batch size, so a run can resume at any sequence with other numbers of them.

N sequences, P pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from longctx.config.data import DataConfig, LengthPolicy, Mix
from longctx.data.mixing import JOIN, PACK, WHOLE, DrawnPieces, draw, rng_of, synthetic
from longctx.data.packing import best_fit, join_and_split
from longctx.errors import UserError
from longctx.host_memory import free_memory

# Bytes of a piece at the peak, while pieces are sorted: 98 to 143 are measured, and less refuses nothing that fits.
_BYTES_PER_PIECE = 90.0


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
    pieces, bins, count = _pack(data, list(drawn.values()), seq_len, rng_of(seed, stage, "concat"))
    rng = rng_of(seed, stage, "order")
    place = _choose(bins, pieces.length, count, sequences, rng)
    target = place[bins]
    kept = np.flatnonzero(target >= 0)
    # Joined pieces keep their order; packed pieces are shuffled within the sequence.
    tie = rng.integers(0, 2**31, size=len(kept), dtype=np.int64)
    ordered = pieces.placement[kept] == JOIN
    tie[ordered] = np.flatnonzero(ordered)
    order = kept[np.argsort((target[kept].astype(np.int64) << 31) | tie, kind="stable")]
    sequence = target[order]
    first = np.searchsorted(sequence, np.arange(sequences + 1)).astype(np.int64)
    joined = pieces.placement[order] == JOIN
    joined[first[:-1][first[:-1] < len(joined)]] = False
    length = pieces.length[order]
    used = int(length.sum(dtype=np.int64))
    return StagePacking(
        seq_len, names, first,
        pieces.source[order], pieces.document[order], pieces.start[order], length, joined,
        use=_use(names, pieces, order, drawn, lengths), padding=1 - used / (sequences * seq_len),
        left_over=len(pieces.length) - len(order),
    )  # fmt: skip


def _check_memory(mix: Mix, lengths: Mapping[str, np.ndarray], seq_len: int, sequences: int, stage: str) -> None:
    """Raise UserError when the pieces of a stage would take more than the host's free memory."""
    pieces = 0.0
    for name, entry in mix.items():
        length = float(lengths[name].mean()) if len(lengths.get(name, ())) else seq_len
        if entry.length is not None and entry.length.kind == "cut":
            length = min(length, entry.length.length or seq_len)
        pieces += sequences * entry.weight * max(1.0, seq_len / max(length, 1.0))
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
class _StagePieces:
    source: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    placement: np.ndarray


def policy_of(data: DataConfig, mix: Mix, name: str) -> LengthPolicy:
    """Return the length policy of a source in a mix: full for synth sources and natural for others by default."""
    synth = data.sources[name].kind == "synth"
    return mix[name].length or LengthPolicy(kind="full" if synth else "natural")


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


def _pack(
    data: DataConfig, drawn: list[DrawnPieces], seq_len: int, rng: np.random.Generator
) -> tuple[_StagePieces, np.ndarray, int]:
    """Pack the drawn pieces; returns all pieces, the bin of each, and the number of bins."""
    parts: list[_StagePieces] = []
    bins: list[np.ndarray] = []
    count = 0
    split = PACK if data.packing == "concat" else None
    loose = [_select(i, part, {PACK, WHOLE} - {split}) for i, part in enumerate(drawn)]
    runs = [_select(i, part, {JOIN}) for i, part in enumerate(drawn)]
    if split is not None:
        whole = _concatenate([_select(i, part, {split}) for i, part in enumerate(drawn)])
        runs.append(_reorder(whole, rng.permutation(len(whole.length))))
    packed = _concatenate(loose)
    if len(packed.length):
        bin_of, count = best_fit(packed.length, seq_len)
        parts.append(packed)
        bins.append(bin_of)
    for run in runs:
        if len(run.length):
            document, start, length, bin_of = join_and_split(run.length, seq_len)
            again = _reorder(run, document)
            parts.append(
                _StagePieces(again.source, again.document, (again.start + start).astype(np.int32),
                        length.astype(np.int32), again.placement)
            )  # fmt: skip
            bins.append((bin_of + count).astype(np.int32))
            count += int(bin_of[-1]) + 1
    return _concatenate(parts), np.concatenate(bins), count


def _select(source: int, drawn: DrawnPieces, placements: Collection[int | None]) -> _StagePieces:
    keep = np.isin(drawn.placement, [placement for placement in placements if placement is not None])
    number = np.full(int(keep.sum()), source, np.int16)
    return _StagePieces(number, drawn.document[keep], drawn.start[keep], drawn.length[keep], drawn.placement[keep])


def _reorder(pieces: _StagePieces, order: np.ndarray) -> _StagePieces:
    return _StagePieces(
        pieces.source[order],
        pieces.document[order],
        pieces.start[order],
        pieces.length[order],
        pieces.placement[order],
    )


def _concatenate(parts: list[_StagePieces]) -> _StagePieces:
    return _StagePieces(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("source", "document", "start", "length", "placement")
        )
    )


def _choose(bins: np.ndarray, length: np.ndarray, count: int, sequences: int, rng: np.random.Generator) -> np.ndarray:
    """Return the sequence that each bin becomes, int32 [bins]; -1 for a bin that is left out.

    Packing makes a few bins more than N. The emptiest bins are left out, or random ones when there are so many that
    leaving out the emptiest would change the mix.
    """
    chosen = np.arange(count)
    if count > sequences:
        few = count - sequences <= max(1, sequences // 20)
        fill = np.bincount(bins, length, minlength=count)
        ranked = np.argsort(-fill, kind="stable") if few else rng.permutation(count)
        chosen = np.sort(ranked[:sequences])
    place = np.full(count, -1, np.int32)
    place[chosen] = rng.permutation(len(chosen)).astype(np.int32)
    return place


def _use(
    names: tuple[str, ...],
    pieces: _StagePieces,
    order: np.ndarray,
    drawn: Mapping[str, DrawnPieces],
    lengths: Mapping[str, np.ndarray],
) -> dict[str, SourceUse]:
    use: dict[str, SourceUse] = {}
    for number, name in enumerate(names):
        mine = order[pieces.source[order] == number]
        documents = pieces.document[mine]
        count = np.bincount(documents) if len(documents) else np.zeros(0, int)
        later = (pieces.start[mine] > 0).sum()
        part = documents[pieces.length[mine] < lengths[name][documents]] if name in lengths else documents[:0]
        use[name] = SourceUse(
            int(pieces.length[mine].sum(dtype=np.int64)),
            int((count > 0).sum()),
            int(later),
            int((np.bincount(part) > 0).sum()) if len(part) else 0,
            drawn[name].epochs,
        )
    return use
