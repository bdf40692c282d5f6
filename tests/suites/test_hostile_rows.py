"""Rows of strangers: nothing that they hold steers the terminal that shows their tables, or runs in a spreadsheet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from record_rows import build_row, build_run

from kvsuite.console import console_text
from kvsuite.suites.outputs import run_table, write_outputs

HOSTILE = "=cmd|'/C calc'!A0\x1b]52;c;aGFjaw==\x07\x9b31m\nerror: forged\r\u202e"


def rows() -> list[dict[str, Any]]:
    spoilt = build_row("streaming_64", warnings=[HOSTILE])
    spoilt["case"]["name"] = spoilt["case"]["model"] = HOSTILE
    spoilt["model"]["label"] = HOSTILE
    spoilt["metrics"]["perplexity"] |= {"value": None, "reason": HOSTILE}
    failed = build_row("broken", status="error", error={"type": HOSTILE, "message": HOSTILE})
    skipped = build_row("skipped", status="skipped", reason=HOSTILE)
    strange = build_row("strange", suite="a suite of another", warnings=[HOSTILE])
    strange["case"]["name"] = HOSTILE
    return [build_row("baseline"), spoilt, failed, skipped, strange]


def test_a_table_is_made_of_printable_lines(tmp_path: Path) -> None:
    text = console_text(run_table(build_run(model=HOSTILE), rows()))
    lines = text.split("\n")
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith("error: forged")]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_what_is_written_for_people_is_printable_and_no_formula(tmp_path: Path) -> None:
    written = write_outputs(tmp_path, build_run(model=HOSTILE), rows(), figures=False)
    for path in written:
        if path.suffix == ".txt":
            assert all(line.isprintable() for line in path.read_text().split("\n")), path
        if path.suffix == ".csv":
            for fields in csv.reader(path.read_text().splitlines()):
                assert all(field.isprintable() for field in fields), path
                assert not [field for field in fields if field.startswith(("=", "@", "+"))], path
