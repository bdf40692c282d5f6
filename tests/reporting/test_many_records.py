"""What a record costs `report`, as work and not as time: calls of functions, which no busy machine changes."""

from __future__ import annotations

import cProfile
from pathlib import Path

from record_rows import build_row, build_run

from kvsuite.reporting.page.render import build_page
from kvsuite.suites.outputs import write_outputs

#: tables that are laid out by rich cell by cell take more than 5,000
MOST_CALLS = 2500


def calls_of_drawing(folder: Path, count: int) -> int:
    rows = [build_row(f"streaming_{place}", budget=place, case_index=place) for place in range(16, 16 + count)]
    folder.mkdir()
    profile = cProfile.Profile()
    profile.enable()
    write_outputs(folder, build_run(cases=count), rows, figures=False)
    build_page(folder, build_run(cases=count), rows)
    profile.disable()
    return sum(one.callcount for one in profile.getstats())


def test_a_record_more_costs_a_bounded_number_of_calls(tmp_path: Path) -> None:
    calls_of_drawing(tmp_path / "warm", 110)  # imports and caches
    few, many = calls_of_drawing(tmp_path / "few", 110), calls_of_drawing(tmp_path / "many", 210)
    each = (many - few) / 100
    assert each < MOST_CALLS
