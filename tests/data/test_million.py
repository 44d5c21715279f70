import tracemalloc

import numpy as np
import pytest

from longctx.bench.data import random_stage

SEQ_LEN, RANKS = 2**20, 8


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return random_stage(tmp_path_factory.mktemp("million"), SEQ_LEN, 2, seed=0)


def _zigzag(rank):
    chunk = SEQ_LEN // (2 * RANKS)
    late = 2 * RANKS - 1 - rank
    return np.r_[rank * chunk : (rank + 1) * chunk, late * chunk : (late + 1) * chunk]


def _peak(call):
    tracemalloc.start()
    try:
        return call(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_million_tokens_reach_eight_ranks_without_any_holding_the_others(stage, monkeypatch):
    """Each rank reads its own tokens and one more after each run, and allocates a fraction of the sequence."""
    whole, most = _peak(lambda: stage.sequence(0))
    corpus = stage._corpora["text"]
    read = []
    real = corpus.read
    monkeypatch.setattr(corpus, "read", lambda d, start, count: read.append(count) or real(d, start, count))
    together = np.full(SEQ_LEN, -1)
    for rank in range(RANKS):
        positions = _zigzag(rank)
        read.clear()
        part, peak = _peak(lambda at=positions: stage.local(0, at))
        assert sum(read) <= SEQ_LEN // RANKS + 2
        assert peak < most / 2
        together[positions] = part.tokens
        following = positions[positions < SEQ_LEN - 1] + 1
        assert np.array_equal(part.labels[: len(following)], whole.tokens[following])
    assert np.array_equal(together, whole.tokens)
