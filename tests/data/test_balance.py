import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.balance import balanced_order, imbalances
from longctx.data.packing import best_fit
from longctx.layout import SequenceLayout


def _layout(lengths, seq_len, ranks):
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    bounds = bounds if bounds[-1] == seq_len else np.append(bounds, seq_len)
    return SequenceLayout(seq_len, ranks, boundaries=bounds).imbalance()


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=30), scale=st.integers(1, 8))
def test_the_measure_is_the_layouts_own(lengths, scale):
    """Holds for sequences without padding whose length 2 x 16 chunks divide."""
    values = np.array(lengths) * scale
    values[-1] += -int(values.sum()) % 32
    seq_len = int(values.sum())
    want = np.mean([_layout(values, seq_len, ranks) for ranks in (4, 16)])
    assert np.isclose(imbalances(values[None], seq_len)[0], want)


def test_chosen_orders_are_evener_than_shuffled_ones_on_other_rank_counts_too():
    rng = np.random.default_rng(0)
    documents = np.minimum(np.exp(rng.normal(6.8, 1.2, 1500)).astype(np.int32) + 1, 8192)
    bins, count = best_fit(documents, 8192)
    shuffled, chosen = [], []
    for number in range(0, count - 5, 5):  # the last bins are not full
        lengths = rng.permutation(documents[bins == number])
        order = balanced_order(lengths, 8192, np.random.default_rng(number))
        assert sorted(order.tolist()) == list(range(len(lengths)))
        shuffled.append(_layout(lengths, 8192, 8))
        chosen.append(_layout(lengths[order], 8192, 8))
    assert np.mean(chosen) - 1 < 0.7 * (np.mean(shuffled) - 1)
