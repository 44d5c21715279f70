import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.packing import best_fit, join_and_split


def _one_by_one(lengths: list[int], capacity: int) -> tuple[int, list[int]]:
    """Best-fit decreasing, document by document, as the textbook defines it."""
    room: list[int] = []
    for size in sorted(lengths, reverse=True):
        fits = [i for i, left in enumerate(room) if left >= size]
        if fits:
            room[min(fits, key=lambda i: room[i])] -= size
        else:
            room.append(capacity - size)
    return len(room), sorted(room)


@settings(max_examples=150)
@given(data=st.data(), capacity=st.integers(1, 9000))
def test_best_fit_is_best_fit_decreasing(data, capacity):
    top = data.draw(st.integers(1, capacity))
    lengths = data.draw(st.lists(st.integers(1, top), max_size=50))
    bins, count = best_fit(np.array(lengths, np.int32), capacity)
    fill = np.bincount(bins, lengths, minlength=count) if lengths else np.zeros(0)
    assert (count, sorted((capacity - fill).astype(int).tolist())) == _one_by_one(lengths, capacity)


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), capacity=st.integers(1, 400))
def test_join_and_split_covers_every_token_once_and_in_order(lengths, capacity):
    document, start, length, bins = join_and_split(np.array(lengths, np.int32), capacity)
    tokens = [(d, s + i) for d, s, n in zip(document, start, length, strict=True) for i in range(n)]
    assert tokens == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    fill = np.bincount(bins, length)
    assert (fill[:-1] == capacity).all()
    assert 0 < fill[-1] <= capacity


@pytest.mark.parametrize("seq_len", [65_536, 262_144])
def test_padding_stays_below_one_percent_on_realistic_lengths(seq_len):
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(6.8, 1.3, 200_000))
    lengths[:400] = rng.pareto(1.2, 400) * 20_000
    lengths = np.clip(lengths, 1, seq_len).astype(np.int32)
    bins, count = best_fit(lengths, seq_len)
    assert np.bincount(bins, lengths, minlength=count).max() <= seq_len
    assert 1 - lengths.sum(dtype=np.int64) / (count * seq_len) <= 0.01
