"""Every schedule on every (M, W) equals dense attention in fp64; ranks start once per world size.

4 and 8 ranks test a covering selection; `pytest -m slow tests/dist/test_parity.py` tests every combination.
"""

from __future__ import annotations

import pytest

from tests.dist.parity import cases, check
from tests.dist.ranks import run_ranks


@pytest.mark.parametrize(
    ("world", "every"),
    [(1, True), (2, True), (4, False), (8, False), *(pytest.param(w, True, marks=pytest.mark.slow) for w in (4, 8))],
)
def test_every_schedule_equals_dense_attention(world, every, tmp_path):
    chosen = cases(world, every=every)
    failures = run_ranks(world, check, chosen, tmp_path / "store")
    shown = "\n".join(f"{case}: {texts[0]}" for case, texts in list(failures.items())[:3])
    assert not failures, f"{len(failures)} of {len(chosen)} cases failed\n{shown}"
