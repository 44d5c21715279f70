"""The search on log theta finds a minimum, widens at an edge, tries no theta twice, and stores its trials."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import RunFailed
from longctx.fingerprint import fingerprint_of
from longctx.theta.bracket import narrow
from longctx.theta.trials import Trial, TrialFile


def valley(best: float):
    """A loss whose only minimum on log theta is at `best`, and the list of thetas that were tried."""
    asked: list[int] = []

    def score(theta: int, phase: str) -> float:
        asked.append(theta)
        return 2.0 + abs(math.log(theta / best)) ** 1.5

    return score, asked


@given(st.floats(2e5, 5e7), st.integers(3, 9), st.integers(0, 8))
def test_finds_the_valley_within_the_bracket(best: float, points: int, rounds: int):
    score, asked = valley(best)
    found = narrow(score, 2_000_000, bracket=32, points=points, rounds=rounds, attempts=3)
    step = 2 * math.log(32) / (points - 1)
    assert len(asked) == len(set(asked)) == len(found.tried)
    assert found.edge is None
    assert abs(math.log(found.theta / best)) <= step
    assert found.score == min(found.tried.values()) <= score(2_000_000, "again")


def test_golden_section_closes_in():
    score, _ = valley(3_456_789.0)
    errors = []
    for rounds in (0, 4, 12):
        found = narrow(score, 2_000_000, bracket=8, points=5, rounds=rounds, attempts=0)
        errors.append(abs(math.log(found.theta / 3_456_789)))
    assert errors[2] < 0.02 < errors[0]


def test_an_edge_is_said_and_the_bracket_widened():
    said: list[str] = []
    score, _ = valley(500e6)
    found = narrow(score, 1_000_000, bracket=8, points=5, rounds=0, attempts=4, say=said.append)
    assert found.edge is None
    assert found.theta > 100e6
    assert said
    assert all("lies on the high edge of the bracket; widening it" in text for text in said)


def test_an_edge_that_stays_is_reported():
    score, _ = valley(1e30)
    found = narrow(score, 1_000_000, bracket=8, points=5, rounds=0, attempts=1)
    assert found.edge == "high"
    assert found.theta == max(found.tried)


def test_nothing_under_the_lowest_is_asked_and_that_is_no_edge():
    score, asked = valley(1_000.0)
    found = narrow(score, 1_000_000, bracket=64, points=7, rounds=3, attempts=3, lowest=500_000)
    assert min(asked) == 500_000 == found.theta
    assert found.edge is None


def test_a_candidate_that_diverged_is_never_the_best():
    score, _ = valley(2_000_000)
    found = narrow(
        lambda theta, phase: math.nan if theta < 500_000 else score(theta, phase),
        1_000_000, bracket=8, points=7, rounds=3, attempts=2,
    )  # fmt: skip
    assert 500_000 < found.theta < 8_000_000
    assert math.isfinite(found.score)
    with pytest.raises(RunFailed, match=r"no theta from [\d,]+ to [\d,]+ has a finite loss"):
        narrow(lambda theta, phase: math.nan, 1_000_000, bracket=8, points=3, rounds=1, attempts=1)


def trial(theta: int) -> Trial:
    return Trial(theta, 2.0 + theta / 1e9, 1.0, "grid", 0.5)


def test_trials_are_kept_and_others_keys_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = TrialFile(tmp_path / "t.jsonl", "a")
    for theta in (10, 20, 30):
        file.add(trial(theta))
    again = TrialFile(tmp_path / "t.jsonl", "a")
    assert again.done == {10: trial(10), 20: trial(20), 30: trial(30)}
    assert TrialFile(tmp_path / "t.jsonl", "b").done == {}
    assert "3 trials of another model, text, stage or setting" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_cut_off_last_line_is_dropped_and_the_file_goes_on(
    tmp_path: Path, cut: int, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "t.jsonl"
    file = TrialFile(path, "a")
    file.add(trial(10))
    file.add(trial(20))
    path.write_bytes(path.read_bytes()[:-cut])
    again = TrialFile(path, "a")
    assert again.done == {10: trial(10)}
    assert "the last line is incomplete" in capsys.readouterr().err
    again.add(trial(20))
    assert TrialFile(path, "a").done == {10: trial(10), 20: trial(20)}


def test_a_broken_line_in_the_middle_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "t.jsonl"
    file = TrialFile(path, "a")
    file.add(trial(10))
    with path.open("a") as stream:
        stream.write('what\n[1]\n{"key": "a", "theta": 3}\n')
    file.add(trial(20))
    assert set(TrialFile(path, "a").done) == {10, 20}
    assert "line 2 is no trial" in capsys.readouterr().err


def test_the_key_depends_on_every_value():
    assert fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1}) != fingerprint_of({"a": 1, "b": 3})
