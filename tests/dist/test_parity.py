"""Every schedule on every (M, W) equals dense attention in fp64; ranks start once per world size."""

from __future__ import annotations

import pytest

from tests.dist.parity import cases, check
from tests.dist.ranks import run_ranks


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_schedule_equals_dense_attention(world, tmp_path):
    every = cases(world)
    failures = run_ranks(world, check, every, tmp_path / "store")
    shown = "\n".join(f"{case}: {texts[0]}" for case, texts in list(failures.items())[:3])
    assert not failures, f"{len(failures)} of {len(every)} cases failed\n{shown}"
