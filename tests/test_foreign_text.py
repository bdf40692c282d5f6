"""What others wrote steers no terminal and runs in no spreadsheet."""

from __future__ import annotations

import csv
import io
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvsuite.errors import UserError
from kvsuite.foreign_text import MESSAGE_LIMIT, csv_cell, visible
from kvsuite.options.resolve import default_options

ANY_TEXT = st.text(st.characters(codec=None, categories=None))
HOSTILE = {
    "clipboard": "a\x1b]52;c;aGFjaw==\x07b",
    "c1": "a\x9b31mb",
    "line": "a\nerror: b",
    "return": "a\rb",
    "bidi": "a\u202eb\u2066",
    "separator": "a\u2028b\u2029",
    "surrogate": "a\udcffb",
    "no width": "a\u200bb\ufeff",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_steers_a_terminal_is_written_out(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert shown.startswith("a")
    assert "b" in shown
    assert shown.encode("utf-8")
    assert str(UserError(f"--kv-model={text}: no such model")) == f"--kv-model={shown}: no such model"


def test_what_is_printable_stays() -> None:
    assert visible("Qwen3-8B · ±3 % Größe 北京 🙂") == "Qwen3-8B · ±3 % Größe 北京 🙂"


@given(ANY_TEXT)
@example("\x1b[2J")
def test_any_text_is_one_printable_line_and_stays_it(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert visible(shown) == shown
    assert str(UserError(str(UserError(text)))) == str(UserError(text))


@given(st.text(min_size=200), st.integers(40, 150))
def test_of_long_text_both_ends_are_shown_and_its_length_is_said(text: str, limit: int) -> None:
    shown = visible(text, limit)
    assert f"...({len(text)} characters)..." in shown
    assert len(shown) <= limit
    assert shown.startswith(visible(text)[:3])
    assert shown.endswith(visible(text)[-3:])


def test_a_message_keeps_its_mend_and_survives_the_way_between_processes() -> None:
    error = UserError(f"--kv-text={'x' * 100_000}: too long; give a shorter one")
    assert len(str(error)) <= MESSAGE_LIMIT
    assert str(error).startswith("--kv-text=xxx")
    assert str(error).endswith("too long; give a shorter one")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("value", ["9" * 4000 + "x", "\x1b]0;title\x07", "1\n2"], ids=["long", "escape", "lines"])
def test_the_value_of_an_option_is_echoed_short_and_on_one_line(value: str) -> None:
    with pytest.raises(UserError, match="--kv-rounds=") as raised:
        default_options(rounds=value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", " =1", "\uff1d1", "=1\n=2"])
def test_a_formula_is_text_in_a_cell(text: str) -> None:
    cell = csv_cell(text)
    assert cell.startswith("'")
    assert cell.isprintable()
    assert csv_cell(cell) == cell


@pytest.mark.parametrize("value", ["-1", "+5", "-1.5e-05", "-inf", 3, -2.5, None, True, "hf-window-1", "q4f16_1", ""])
def test_numbers_and_our_own_ids_stay_as_they_are(value: object) -> None:
    assert csv_cell(value) is value or csv_cell(value) == value


@given(ANY_TEXT)
def test_a_cell_of_any_text_is_on_one_line_and_comes_back(text: str) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerow(["first", csv_cell(text)])
    line = stream.getvalue().encode("utf-8").decode("utf-8")
    assert line.count("\n") == 1
    assert next(csv.reader([line])) == ["first", csv_cell(text)]
