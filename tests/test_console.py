"""Results on the screen: no table is cut off, whatever the width of the screen."""

from __future__ import annotations

import pytest
from rich.table import Table

from longctx import console


def test_a_table_wider_than_the_screen_keeps_every_number_and_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As an evaluation of eight models prints it."""
    monkeypatch.setenv("COLUMNS", "60")
    table = Table(title="loss by position")
    table.add_column("positions", no_wrap=True)
    for name in (
        "base",
        "theta changed, nothing trained",
        "control",
        "extended",
        "sibling",
        "merged",
        "unseen",
        "other",
    ):
        table.add_column(name, justify="right")
    table.add_row("32,769 to 65,536", *[f"{number}.0763*" for number in range(8)])
    console.emit(table)
    out = capsys.readouterr().out
    assert "…" not in out
    (row,) = [line for line in out.splitlines() if "32,769" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "32,769 to 65,536", *(f"{number}.0763*" for number in range(8)),
    ]  # fmt: skip
    assert {"changed,", "nothing", "extended"} <= set(out.split())


def test_long_text_in_a_cell_is_still_wrapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "60")
    table = Table("kernel", "")
    table.add_row("flash_attn_3", "needs CUDA tensors, " * 20)
    console.emit(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


@pytest.mark.parametrize("text", ["runs/x[lr]/model", "problem in [/data/a] and [/]", r"a\b[0]", "['a', 'b'] [red]"])
def test_brackets_of_paths_and_errors_are_printed(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """[bold] and [yellow] are markup; everything else is what somebody named a folder, or an error's words."""
    text = text.replace("[/]", "")
    console.say(f"[bold]stage[/] done: [yellow]{text}[/]")
    assert capsys.readouterr().err == f"stage done: {text}\n"
