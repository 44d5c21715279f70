import contextlib
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longctx.data.loader import Loader
from longctx.decide import Shares

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


def _reader(stage, batch, dp, d, cp, c, per=1):
    """The sequences of rank (d, c): [(index, LocalSequence)] of the step that begins at a cursor."""
    share, positions = Shares(dp, d, batch // dp, per), _zigzag(stage.seq_len, c, cp)

    def read(cursor):
        return [(index, stage.local(index, positions)) for part in share.sequences(cursor) for index in part]

    return read


def _consume(stage, cursor, steps, batch, dp, cp, ahead):
    """Run `steps` steps on dp x cp ranks; returns the cursor and the sequences seen, their tokens checked."""
    end = len(stage)
    seen: list[int] = []
    with contextlib.ExitStack() as ranks:  # left like at a kill: what was read ahead is thrown away
        loaders = {
            (d, c): ranks.enter_context(
                Loader(_reader(stage, batch, dp, d, cp, c), batch=batch, cursor=cursor, end=end, ahead=ahead)
            )
            for d in range(dp)
            for c in range(cp)
        }
        for _ in range(steps):
            read = {rank: next(loader) for rank, loader in loaders.items()}
            for d in range(dp):
                groups = {tuple(index for index, _ in read[d, c]) for c in range(cp)}
                assert len(groups) == 1  # every rank of a group reads the same sequences
                for place, index in enumerate(groups.pop()):
                    tokens = np.full(stage.seq_len, -1)
                    for c in range(cp):
                        tokens[_zigzag(stage.seq_len, c, cp)] = read[d, c][place][1].tokens
                    assert np.array_equal(tokens, stage.tokens(index, np.arange(stage.seq_len)))
                    seen.append(index)
        cursors = {loader.cursor for loader in loaders.values()}
        assert len(cursors) == 1
    return cursors.pop(), seen


def _multiset(stage, indices):
    """How often each document's piece occurs in these sequences; no resume may change it."""
    return Counter(name for index in indices for name in stage.documents(index))


layouts = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 3))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_kills_and_other_world_sizes_lose_and_repeat_nothing(data, stages):
    """Random dp, cp, batch and prefetch, changed at every resume, over two stages: the documents consumed are
    exactly those of the packing."""
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
        packing = Counter(stage.packing.names[s] for s in stage.packing.source)
        consumed = _multiset(stage, seen)
        assert consumed == _multiset(stage, range(SEQUENCES))
        assert sum(consumed.values()) == len(stage.packing.source)
        assert Counter(name.split(":")[0] for name, n in consumed.items() for _ in range(n)) == packing


@pytest.mark.parametrize("per", [1, 2])
def test_the_order_of_the_batch_does_not_depend_on_dp(per):
    for dp in (1, 2, 4):
        shares = [Shares(dp, d, 8 // dp, per) for d in range(dp)]
        assert [i for share in shares for part in share.sequences(40) for i in part] == list(range(40, 48))


def test_the_loader_ends_with_the_last_whole_batch_and_reports_errors(stages, monkeypatch):
    stage = stages[0]
    with Loader(lambda cursor: cursor, batch=5, cursor=0, end=SEQUENCES) as loader:
        assert list(loader) == list(range(0, SEQUENCES - 4, 5))
        assert loader.cursor == 45
    read = _reader(stage, 4, 1, 0, 1, 0)
    with Loader(read, batch=4, cursor=SEQUENCES - 4, end=SEQUENCES) as loader:
        assert [[index for index, _ in step] for step in loader] == [list(range(SEQUENCES - 4, SEQUENCES))]
    assert not any(thread.name.startswith("longctx-loader") for thread in threading.enumerate())

    def fail(index, positions):
        raise OSError("the disk is gone")

    monkeypatch.setattr(stage, "local", fail)
    with Loader(read, batch=4, cursor=0, end=SEQUENCES) as loader, pytest.raises(OSError, match="the disk is gone"):
        next(loader)


def test_resuming_reads_nothing_of_what_came_before(stages, monkeypatch):
    stage = stages[0]
    read = []
    real = stage.local
    monkeypatch.setattr(stage, "local", lambda index, positions: read.append(index) or real(index, positions))
    with Loader(_reader(stage, 2, 1, 0, 1, 0), batch=2, cursor=40, end=SEQUENCES) as loader:
        next(loader)
    assert min(read) == 40
