from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longctx.data.loader import Loader, multiset, share_of

from .test_stage import _config, _open, _write_books

SEQUENCES = 48


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tokenizer):
    """Two stages of a curriculum over the same documents."""
    folder = tmp_path_factory.mktemp("books")
    _write_books(folder, 40, seed=1)
    config = _config(folder, {"books": 0.7, "needles": {"weight": 0.3, "length": {"loguniform": {"min_len": 96}}}})
    cache = tmp_path_factory.mktemp("cache")
    return [_open(config, tokenizer, cache, seq_len=n, sequences=SEQUENCES, stage=f"s{n}") for n in (128, 256)]


def _zigzag(seq_len: int, rank: int, ranks: int) -> np.ndarray:
    chunk = seq_len // (2 * ranks)
    late = 2 * ranks - 1 - rank
    return np.r_[rank * chunk : (rank + 1) * chunk, late * chunk : (late + 1) * chunk]


def _consume(stage, cursor, steps, batch, dp, cp, ahead):
    """Run `steps` steps on dp x cp ranks; returns the cursor and the sequences seen, their tokens checked."""
    loaders = {
        (d, c): Loader(
            stage,
            batch=batch,
            cursor=cursor,
            dp_rank=d,
            dp=dp,
            positions=_zigzag(stage.seq_len, c, cp),
            ahead=ahead,
        )
        for d in range(dp)
        for c in range(cp)
    }
    seen: list[int] = []
    try:
        iterators = {rank: iter(loader) for rank, loader in loaders.items()}
        for _ in range(steps):
            batches = {rank: next(iterator) for rank, iterator in iterators.items()}
            for d in range(dp):
                indices = {batches[d, c].indices for c in range(cp)}
                assert len(indices) == 1  # every rank of a group reads the same sequences
                for place, index in enumerate(indices.pop()):
                    tokens = np.full(stage.seq_len, -1)
                    for c in range(cp):
                        tokens[_zigzag(stage.seq_len, c, cp)] = batches[d, c].sequences[place].tokens
                    assert np.array_equal(tokens, stage.tokens(index, np.arange(stage.seq_len)))
                    seen.append(index)
            cursors = {loader.cursor for loader in loaders.values()}
            assert len(cursors) == 1
            cursor = cursors.pop()
    finally:
        for loader in loaders.values():  # a kill: what was read ahead is thrown away
            loader.close()
    return cursor, seen


layouts = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 3))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kills_and_other_world_sizes_lose_and_repeat_nothing(data, stages):
    """Random dp, cp, batch and prefetch, changed at every resume, over two stages: the documents consumed are
    exactly the plan's."""
    for stage in stages:
        cursor, seen = 0, []
        while cursor < SEQUENCES:
            dp, cp, ahead = data.draw(layouts)
            batch = dp * data.draw(st.integers(1, max(1, 8 // dp)))
            left = (SEQUENCES - cursor) // batch
            if left == 0:
                dp, batch, left = 1, 1, SEQUENCES - cursor
            steps = data.draw(st.integers(1, left))
            cursor, more = _consume(stage, cursor, steps, batch, dp, cp, ahead)
            seen += more
        assert sorted(seen) == list(range(SEQUENCES))
        plan = Counter(stage.plan.names[s] for s in stage.plan.source)
        consumed = multiset(stage, seen)
        assert consumed == multiset(stage, range(SEQUENCES))
        assert sum(consumed.values()) == len(stage.plan.source)
        assert Counter(name.split(":")[0] for name, n in consumed.items() for _ in range(n)) == plan


def test_the_order_of_the_batch_does_not_depend_on_dp():
    for dp in (1, 2, 4, 8):
        assert [i for d in range(dp) for i in share_of(40, 8, d, dp)] == list(range(40, 48))
    with pytest.raises(ValueError, match="batch=6 sequences do not divide over dp=4"):
        share_of(0, 6, 0, 4)


def test_the_loader_ends_with_the_last_whole_batch_and_reports_errors(stages, monkeypatch):
    stage = stages[0]
    with Loader(stage, batch=5) as loader:
        assert [batch.cursor for batch in loader] == list(range(5, SEQUENCES, 5))
    with Loader(stage, batch=4, cursor=SEQUENCES - 4) as loader:
        assert [batch.indices for batch in loader] == [tuple(range(SEQUENCES - 4, SEQUENCES))]
    assert not loader._thread.is_alive()

    def fail(index, positions):
        raise OSError("the disk is gone")

    monkeypatch.setattr(stage, "local", fail)
    with Loader(stage, batch=4) as loader, pytest.raises(OSError, match="the disk is gone"):
        next(iter(loader))


def test_resuming_reads_nothing_of_what_came_before(stages, monkeypatch):
    stage = stages[0]
    read = []
    real = stage.local
    monkeypatch.setattr(stage, "local", lambda index, positions: read.append(index) or real(index, positions))
    with Loader(stage, batch=2, cursor=40, ahead=1) as loader:
        next(iter(loader))
    assert min(read) == 40
