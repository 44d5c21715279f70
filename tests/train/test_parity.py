"""cp x dp x ZeRO x accumulation, packed uneven documents: the same loss and gradients as one process.

The full matrix, about ten minutes on two cores: `pytest -m slow tests/train/test_parity.py`.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.dist.ranks import run_ranks

from .parity import Case, check, check_attention_once, check_isolation

TWO = [
    Case(cp=2),
    Case(cp=1, accumulation=3, rows=2),
    Case(cp=2, dtype="float64", accumulation=3),
    Case(cp=1, dtype="float64", variant="mute"),
    Case(cp=2, variant="frozen"),
    Case(cp=2, variant="lora"),
    Case(cp=2, layout="contiguous", rows=2),
    Case(cp=2, length=47, rows=2),
    Case(cp=2, length=45, layout="documents"),
]
ZERO = [Case(cp=2, zero=2, accumulation=3), Case(cp=2, zero=3, variant="frozen")]  # a process each
FOUR = [Case(cp=4, dtype="float64"), Case(cp=2, accumulation=3, variant="mute"), Case(cp=4, variant="lora")]
FOUR += [Case(cp=4, length=45, dtype="float64"), Case(cp=4, length=9, layout="contiguous", rows=3)]


def told(failures: dict[Case, list[str]]) -> str:
    return "\n".join(f"{case}: {text[0]}" for case, text in failures.items())


GROUPS = {"two": (2, TWO), "four": (4, FOUR), "zero2": (2, ZERO[:1]), "zero3": (2, ZERO[1:])}


@pytest.mark.parametrize(("world", "cases"), GROUPS.values(), ids=GROUPS.keys())
def test_a_step_equals_one_process(tmp_path: Path, world: int, cases: list[Case]) -> None:
    failures = run_ranks(world, check, cases, tmp_path / "store")
    assert not failures, told(failures)


def test_a_changed_document_leaves_the_others_bit_unchanged(tmp_path: Path) -> None:
    cases = [Case(cp=2), Case(cp=2, layout="contiguous")]
    failures = run_ranks(2, check_isolation, cases, tmp_path / "store")
    assert not failures, told(failures)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_attention_runs_once_per_layer_and_step(tmp_path: Path, zero: int) -> None:
    failures = run_ranks(2, check_attention_once, [Case(cp=2, zero=zero, accumulation=2)], tmp_path / "store")
    assert not failures, told(failures)


def matrix(cp: int, dp: int) -> list[Case]:
    variants = ("plain", "mute", "frozen", "lora") if cp * dp > 1 else ("plain", "frozen", "lora")
    options = product((0, 2, 3), (1, 3), variants)
    cases = [Case(cp, zero, accumulation, variant=variant) for zero, accumulation, variant in options]
    return cases + [Case(cp, 0, accumulation, dtype="float64") for accumulation in (1, 3)]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("cp", "dp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
def test_the_whole_matrix(tmp_path: Path, cp: int, dp: int) -> None:
    failures = run_ranks(cp * dp, check, matrix(cp, dp), tmp_path / "store", timeout=2900.0)
    assert not failures, told(failures)
