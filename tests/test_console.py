"""Tables of the console: they fit, nothing is lost, and text stays text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.console import WIDE, Column, Sheet, console_text, console_width, lines, stacked

CELLS = [[f"{row}.{column}" for column in range(7)] for row in range(3)]
SHEET = Sheet(
    "Method",
    [Column(f"Number {place}", 10) for place in range(7)],
    [("[bold]one[/bold]", CELLS[0]), ("two", "oom: [red]8 GiB[/red] of memory were asked for"), ("three", CELLS[1]),
     None, ("four", CELLS[2])],
    25,
)  # fmt: skip


def words(text: str) -> list[str]:
    return text.split()


def test_a_wide_console_shows_one_table() -> None:
    assert console_text(SHEET).splitlines() == [
        "Method" + " " * 19 + "".join(f"{f'Number {place}':>11}" for place in range(7)),
        "-" * 102,
        "[bold]one[/bold]" + " " * 9 + "".join(f"{cell:>11}" for cell in CELLS[0]),
        "two" + " " * 22 + " oom: [red]8 GiB[/red] of memory were asked for",
        "three" + " " * 20 + "".join(f"{cell:>11}" for cell in CELLS[1]),
        "-" * 102,
        "four" + " " * 21 + "".join(f"{cell:>11}" for cell in CELLS[2]),
        "=" * 102,
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 101])
def test_a_narrow_console_shows_the_columns_below_each_other(width: int) -> None:
    text = console_text(SHEET, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("Method") > 1
    # every number once and whole
    assert sorted(word for word in words(text) if word[0].isdigit() and "." in word) == sorted(
        cell for row in CELLS for cell in row
    )
    assert " ".join(words(text)).count("oom: [red]") == 1


@given(
    width=st.integers(40, 120),
    rows=st.lists(st.tuples(st.text(max_size=60), st.lists(st.sampled_from("0123.n/a±%"), min_size=3, max_size=3))),
)
def test_any_labels_fit_any_width_and_steer_nothing(width: int, rows: list[tuple[str, list[str]]]) -> None:
    from rich.cells import cell_len

    text = console_text(Sheet("x", [Column("a"), Column("b", 12), Column("c")], rows), width=width)
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert text.replace("\n", "").isprintable()


def test_a_title_of_somebody_else_is_one_line_and_a_wide_column_folds() -> None:
    sheet = Sheet("x\ny", [Column("a\x1b[2J")], [("one", ["0123456789" * 5])], ruled=False)
    assert console_text(sheet, width=40).splitlines() == [
        "x\\ny " + f"{'a' + chr(92) + 'x1b[2J':>35}",
        "one  " + ("0123456789" * 5)[:35],
        "     " + f"{('0123456789' * 5)[35:]:>35}",
    ]


def test_texts_are_text() -> None:
    text = console_text(stacked(["[red]a[/red] :smile:"], [], [lines(["b\x1b[31m", "c\nd"])]), color=True)
    assert text == "[red]a[/red] :smile:\n\nb\\x1b[31m\nc\\nd\n"


def test_width_is_what_columns_says_or_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert console_width(False) == console_width(True) == 72
    for nothing in ("", "0", "wide", "-3"):
        monkeypatch.setenv("COLUMNS", nothing)
        assert console_width(False) == WIDE
