"""Layouts hold every token once, and cover every query-key pair of the causal document mask exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.layout import LAYOUT_KINDS, SequenceLayout


@st.composite
def layouts(draw):
    positions, ulysses = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (2, 2), (5, 1)]))
    seq_len = draw(st.integers(2 * positions * ulysses, 90))
    inner = draw(st.sets(st.integers(1, seq_len - 1), max_size=8))
    boundaries = np.array([0, *sorted(inner), seq_len])
    return SequenceLayout(
        seq_len, positions, kind=draw(st.sampled_from(LAYOUT_KINDS)), boundaries=boundaries, ulysses=ulysses
    )


def position_indices(layout: SequenceLayout, position: int) -> np.ndarray:
    ranks = range(position * layout.ulysses, (position + 1) * layout.ulysses)
    return np.concatenate([layout.indices(rank) for rank in ranks])


def mask(layout: SequenceLayout) -> np.ndarray:
    doc = np.searchsorted(layout.boundaries, np.arange(layout.seq_len), side="right")
    return np.tril(doc[:, None] == doc[None, :])


def cover(layout: SequenceLayout, count: np.ndarray, position: int, blocks, part, keys: np.ndarray) -> None:
    queries = position_indices(layout, position)
    for rect in layout.rects(position, blocks, part):
        rows, columns = queries[rect.q0 : rect.q1], keys[rect.k0 : rect.k1]
        assert len(rows)
        assert len(columns)
        assert rows.min() >= 0, "padding is a query"
        assert columns.min() >= 0, "padding is a key"
        seen = np.ones((len(rows), len(columns)), int)
        count[np.ix_(rows, columns)] += np.tril(seen) if rect.causal else seen


@given(layouts())
@settings(max_examples=150)
def test_every_token_lies_on_one_rank_in_ascending_order(layout):
    ranks = range(layout.count * layout.ulysses)
    everyone = [layout.indices(rank) for rank in ranks]
    assert {len(x) for x in everyone} == {layout.rank_len}
    assert sorted(np.concatenate(everyone)[np.concatenate(everyone) >= 0]) == list(range(layout.seq_len))
    for position in range(layout.count):
        real = position_indices(layout, position)
        assert (np.diff(real[real >= 0]) > 0).all()
        assert (real[: (real >= 0).sum()] >= 0).all(), "padding comes last"


@given(layouts(), st.sampled_from([1, 2, 3]))
@settings(max_examples=150)
def test_pairs_of_ranks_cover_the_mask_exactly_once(layout, shares):
    count = np.zeros((layout.seq_len, layout.seq_len), int)
    for p in range(layout.count):
        for part in range(shares):
            cover(layout, count, p, (p,), (part, shares), position_indices(layout, p))
        for other in set(range(layout.count)) - {p}:
            cover(layout, count, p, (other,), (0, 1), position_indices(layout, other))
            assert bool(layout.rects(p, (other,))) == layout.work[p, other]
    assert (count == mask(layout)).all()
    assert layout.loads().sum() == mask(layout).sum()


@given(layouts())
@settings(max_examples=100)
def test_gathered_blocks_cover_the_mask_exactly_once(layout):
    count = np.zeros((layout.seq_len, layout.seq_len), int)
    for p in range(layout.count):
        cover(layout, count, p, (p,), (0, 1), position_indices(layout, p))
        others = tuple(sorted(set(range(layout.count)) - {p}))
        if not others:
            continue
        keys = np.full(sum(len(position_indices(layout, b)) for b in others), -1)
        for copy in layout.ascending_order(others):
            source = position_indices(layout, others[copy.block])[copy.source : copy.source + copy.length]
            keys[copy.target : copy.target + copy.length] = source
        cover(layout, count, p, others, (0, 1), keys)
    assert (count == mask(layout)).all()


@pytest.mark.parametrize("positions", [2, 4, 8, 64])
def test_document_wise_zigzag_balances_one_long_document_beside_short_ones(positions):
    length = 65536
    boundaries = np.r_[np.arange(0, length // 2, length // 64), length // 2, length]
    zigzag = SequenceLayout(length, positions, kind="zigzag", boundaries=boundaries)
    documents = SequenceLayout(length, positions, kind="documents", boundaries=boundaries)
    assert documents.imbalance() <= 1.25
    assert documents.padding == 0
    assert zigzag.imbalance() > 1.3  # what the document-wise layout is for


def test_zigzag_balances_one_document_and_contiguous_does_not():
    assert SequenceLayout(4096, 8).imbalance() < 1.001
    assert SequenceLayout(4096, 8, kind="contiguous").imbalance() > 1.8


def test_documents_of_a_sixteenth_leave_a_sixteenth_of_the_work():
    whole = SequenceLayout(16384, 2).loads().sum()
    packed = SequenceLayout(16384, 2, boundaries=np.arange(0, 16385, 1024)).loads().sum()
    assert 15 < whole / packed < 17


def test_short_documents_in_zigzag_meet_only_neighbours():
    layout = SequenceLayout(1024, 8, boundaries=np.arange(0, 1025, 32))
    offsets = {int((i - j) % 8) for i, j in zip(*np.nonzero(layout.work), strict=True)}
    assert offsets == {0}  # 32 divides the chunks of 64: nothing crosses
    crossing = SequenceLayout(1024, 8, boundaries=np.r_[0, np.arange(16, 1024, 32), 1024])
    offsets = {int((i - j) % 8) for i, j in zip(*np.nonzero(crossing.work), strict=True)}
    assert offsets == {0, 1, 7}


def test_positions_run_through_or_restart():
    layout = SequenceLayout(10, 2, kind="contiguous", boundaries=np.array([0, 3, 10]))
    assert layout.positions(0).tolist() == [0, 1, 2, 3, 4]
    assert layout.positions(0, restart=True).tolist() == [0, 1, 2, 0, 1]
    assert layout.local_boundaries(0).tolist() == [0, 3, 5]
    assert layout.local_boundaries(1).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("boundaries", "words"),
    [
        ([0, 5, 5, 16], "strictly increasing"),
        ([0, 9, 4, 16], "strictly increasing"),
        ([0, 8], "end at seq_len=16"),
        ([1, 16], "begin at 0"),
        ([0.0, 16.0], "integers"),
        ([[True] * 16] * 16, "dense mask"),
        ([0], "integers"),
    ],
)
def test_bad_boundaries_are_named(boundaries, words):
    with pytest.raises(ValueError, match="documents") as caught:
        SequenceLayout(16, 2, boundaries=np.array(boundaries))
    assert words in str(caught.value)


def test_a_sequence_shorter_than_2n_is_refused():
    with pytest.raises(ValueError, match=r"seq_len=7 is shorter than 2N = 8"):
        SequenceLayout(7, 4)
    with pytest.raises(ValueError, match="kind='stripes'"):
        SequenceLayout(64, 4, kind="stripes")  # type: ignore[arg-type]
