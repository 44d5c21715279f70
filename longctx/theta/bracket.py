"""Minimize a score over log theta: an even grid around a rule's value, then golden section (Kiefer 1953).

The grid is widened while its best value lies on its edge. The score is a function of an integer theta and is asked at
most once for each value, so a search can replay stored trials and continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from longctx.errors import RunFailed

_GOLDEN = (3 - math.sqrt(5)) / 2  # 0.382
_CLOSE = 1.02  # thetas that differ by less than 2 % count as equal


@dataclass(frozen=True)
class BestTheta:
    """The theta with the lowest score; `tried` holds all scores by theta.

    edge: "low" or "high" when the best theta is the lowest or highest one tried, otherwise None.
    """

    theta: int
    score: float
    tried: dict[int, float]
    edge: str | None


def narrow(
    score: Callable[[int, str], float],
    center: int,
    *,
    bracket: float,
    points: int,
    rounds: int,
    attempts: int,
    lowest: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> BestTheta:
    """Find the theta with the lowest score.

    score(theta, phase): phase is "grid", "widen" or "golden"; NaN and infinity are worse than every number. The grid
    has `points` thetas from center / bracket to center * bracket, but none below `lowest`, and center itself. While
    the best theta lies on the edge, the grid is extended in that direction, at most `attempts` times. Then `rounds`
    golden-section steps follow around the best. Raises RunFailed when no score is finite.
    """
    tried: dict[int, float] = {}

    def ask(theta: float, phase: str) -> None:
        whole = max(lowest, round(theta))
        if whole not in tried:
            found = score(whole, phase)
            tried[whole] = found if math.isfinite(found) else math.inf  # NaN is neither above nor below another loss

    spread = [bracket ** (2 * i / (points - 1) - 1) for i in range(points)]
    for factor in sorted({*spread, 1.0}):
        ask(center * factor, "grid")
    step = bracket ** (2 / (points - 1))
    for _ in range(attempts):
        edge = _edge(tried, lowest)
        if edge is None:
            break
        best = _best(tried)
        say(f"the best theta so far, {best:,}, lies on the {edge} edge of the bracket; widening it")
        for i in range(1, points // 2 + 1):
            ask(best * step**i if edge == "high" else best / step**i, "widen")
    for _ in range(rounds):
        asked = _golden(sorted(tried), _best(tried))
        if asked is None:
            break
        ask(asked, "golden")
    best = _best(tried)
    if tried[best] == math.inf:
        raise RunFailed(
            f"no theta from {min(tried):,} to {max(tried):,} has a finite loss: the candidates diverge; lower "
            "trials.adapt_lr, or check the model's weights"
        )
    return BestTheta(best, tried[best], dict(sorted(tried.items())), _edge(tried, lowest))


def _best(tried: dict[int, float]) -> int:
    return min(tried, key=lambda theta: (tried[theta], theta))


def _edge(tried: dict[int, float], lowest: int) -> str | None:
    """Return the edge on which the best theta lies; the lowest allowed theta does not count as an edge."""
    best = _best(tried)
    if best == max(tried):
        return "high"
    return "low" if best == min(tried) and best > lowest else None


def _golden(thetas: list[int], best: int) -> float | None:
    """Return the next theta, 0.382 into the wider gap next to the best on log theta; None when both are narrow."""
    at = thetas.index(best)
    gaps = [(thetas[side] / best, thetas[side]) for side in (at - 1, at + 1) if 0 <= side < len(thetas)]
    if not gaps:
        return None
    ratio, _ = max(gaps, key=lambda gap: abs(math.log(gap[0])))
    return best * ratio**_GOLDEN if abs(math.log(ratio)) > 2 * math.log(_CLOSE) else None
