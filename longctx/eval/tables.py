"""Tables of evaluations: needles found, loss, and loss by position, with one row or column per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from longctx.eval.evaluate import EvalResult
from longctx.eval.grid import percent

if TYPE_CHECKING:
    from rich.table import Table

MARK = "*"


def tables(results: Sequence[EvalResult]) -> list[object]:
    """Return the tables of the measurements, and one line for each model whose window is exceeded."""
    made: list[object] = []
    grids = [result for result in results if result.grid is not None]
    if grids:
        made.append(_needles(grids))
    if any(result.losses for result in results):
        made.append(_losses(results))
        made.append(_by_position(results))
    notes = [note for result in results if (note := beyond_window(result))]
    return [*made, *(f"{MARK} {note}" for note in notes)]


def beyond_window(result: EvalResult) -> str | None:
    """Say which measured lengths exceed the model's window; None when no length does."""
    lengths = sorted({*(result.grid.lengths if result.grid else ()), *result.losses})
    beyond = [f"{length:,}" for length in lengths if result.beyond(length)]
    if not beyond:
        return None
    return f"{result.target.name}: {', '.join(beyond)} tokens exceed its window of {result.window:,} (config.json)"


def _needles(results: Sequence[EvalResult]) -> Table:
    from rich.table import Table

    lengths = sorted({length for result in results if result.grid for length in result.grid.lengths})
    table = Table("model", title="needles found, percent")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    table.add_column("all", justify="right")
    for result in results:
        assert result.grid is not None
        found = result.grid.by_length()
        cells = [f"{percent(found[length])}{_mark(result, length)}" for length in lengths]
        table.add_row(result.target.name, *cells, percent(result.grid.pooled()))
    return table


def _losses(results: Sequence[EvalResult]) -> Table:
    from rich.table import Table

    lengths = sorted({length for result in results for length in result.losses})
    table = Table("model", title="loss on held-out text, nats per token")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for result in results:
        cells = [f"{result.losses[length]:.4f}{_mark(result, length)}" for length in lengths]
        table.add_row(result.target.name, *cells)
    return table


def _by_position(results: Sequence[EvalResult]) -> Table:
    """Make the table of loss by position in the longest sequences."""
    from rich.table import Table

    columns = {result.target.name: longest_curve(result) for result in results}
    ends = sorted({end for curve in columns.values() for end in curve})
    table = Table(title=f"loss by position in {ends[-1]:,} tokens of held-out text, nats per token")
    table.add_column("positions", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for start, end in zip([0, *ends], ends, strict=False):
        cells = [f"{columns[result.target.name][end]:.4f}{_mark(result, end)}" for result in results]
        table.add_row(f"{start + 1:,} to {end:,}", *cells)
    return table


def longest_curve(result: EvalResult) -> Mapping[int, float]:
    """Return the loss by position in the longest sequences; empty when no sequence was read."""
    return result.by_position[max(result.by_position)] if result.by_position else {}


def _mark(result: EvalResult, length: int) -> str:
    return MARK if result.beyond(length) else ""
