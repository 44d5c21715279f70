"""Counts the bytes that a rank sends, by link level and payload; tests compare the counts with formulas."""

from __future__ import annotations

from collections import Counter

from longctx.topology import Level


class ByteCounter:
    """Counts the bytes that this rank has sent, per (level, payload)."""

    def __init__(self) -> None:
        self.sent: Counter[tuple[Level, str]] = Counter()

    def add(self, level: Level, payload: str, count: int) -> None:
        self.sent[level, payload] += count

    def per_level(self) -> dict[Level, int]:
        total: dict[Level, int] = {"inner": 0, "outer": 0}
        for (level, _), count in self.sent.items():
            total[level] += count
        return total

    def reset(self) -> None:
        self.sent.clear()
