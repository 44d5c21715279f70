"""How a stage is split over ranks: every length, cp and layout keeps all tokens, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from longctx.config.train import ParallelConfig
from longctx.curriculum import LearningRate, Stage
from longctx.decide import choose_cp, tokens_per_rank
from longctx.errors import UserError
from longctx.layout import LAYOUT_KINDS, SequenceLayout

LR = LearningRate(1e-3, 0.0, 0, "constant", 0, 1)


def stage(seq_len: int, *, batch: int = 1, layout: str = "zigzag") -> Stage:
    return Stage("s", 0, seq_len, seq_len, {}, 1e4, seq_len * batch, batch, 1, LR, "default", layout, None, 1, "theta")


@settings(max_examples=300)
@given(
    seq_len=st.integers(2, 3100), world=st.integers(1, 16), batch=st.integers(1, 6),
    cp=st.one_of(st.just("auto"), st.just("all"), st.integers(1, 20)), layout=st.sampled_from(LAYOUT_KINDS),
)  # fmt: skip
def test_a_length_is_shared_out_whole_or_refused_in_words(seq_len, world, batch, cp, layout):
    made = stage(seq_len, batch=batch, layout=layout)
    try:
        chosen = choose_cp(made, ParallelConfig(cp=cp, seq_len_per_rank=64), world)
    except UserError as error:
        event(str(error)[:20])
        cp = world if cp == "all" else cp
        refused = cp == "auto" or world % cp or seq_len < 2 * cp
        chosen = 0
    if not chosen:
        assert refused
        return
    assert world % chosen == 0
    if cp == "all":
        assert chosen == world
    if cp == "auto":
        assert batch % (world // chosen) == 0
    if chosen > 1:
        shared = SequenceLayout(seq_len, chosen, kind=layout)
        held = np.concatenate([shared.indices(rank) for rank in range(chosen)])
        assert sorted(held[held >= 0].tolist()) == list(range(seq_len))
        assert shared.rank_len == tokens_per_rank(made, chosen)


def test_an_odd_length_takes_the_cp_that_was_asked_for():
    assert choose_cp(stage(2999), ParallelConfig(cp=4), 4) == 4
    assert tokens_per_rank(stage(2999), 4) == 750


def test_a_sequence_too_short_for_cp_names_one_that_fits():
    with pytest.raises(UserError, match=r"parallel\.cp=8: a rank needs 2 tokens.*seq_len=9 .*; 4 fits"):
        choose_cp(stage(9), ParallelConfig(cp=8), 8)
