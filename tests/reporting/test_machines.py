"""A run of two machines: what depends on speed is set against nothing of the other one, what does not is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from record_rows import row, run

from kvsuite.console import console_text
from kvsuite.reporting.machines import MEANING
from kvsuite.reporting.noise import inside_noise
from kvsuite.reporting.page.cases import case_data
from kvsuite.reporting.page.columns import identity_columns, metric_columns
from kvsuite.reporting.page.facts import machine_line
from kvsuite.suites.outputs import run_table
from kvsuite.suites.pipeline.rows import speedup

__all__ = ["row", "run"]

A, B = ({"node": {"name": name, "ip": f"10.0.0.{at}", "id": f"{at}f"}} for at, name in enumerate("ab", 1))


def test_the_table_says_which_machine_and_compares_no_times_across(
    row: Callable[..., dict[str, Any]], run: dict[str, Any]
) -> None:
    fast = {"tpots": (0.005, 0.005, 0.005), "throughput": (200.0, 200.0, 200.0)}
    rows = [
        row("baseline", effective=A, **fast), row("streaming_32", effective=A), row("streaming_64", effective=B),
    ]  # fmt: skip
    text = console_text(run_table(run, rows), width=300)
    lines = {words[0]: words for line in text.splitlines() if (words := line.split())}
    # the last table of a name is that of the changes
    assert "+" in lines["streaming_32"][1] or "-" in lines["streaming_32"][1]
    assert lines["streaming_64"][1:3] == ["n/a", "n/a"]
    assert lines["streaming_64"][-1] == lines["streaming_32"][-1] != "n/a", "bytes are compared"
    assert "Machine" in text
    assert "b (10.0.0.2)" in text
    assert MEANING in text
    one = console_text(run_table(run, [row("baseline", effective=A), row("streaming_32", effective=A)]), width=300)
    assert "Machine" not in one


def test_no_difference_of_times_of_two_machines_is_known(row: Callable[..., dict[str, Any]]) -> None:
    here, there = row("baseline", effective=A), row("streaming_32", effective=B, tpots=(0.5, 0.5, 0.5))
    assert inside_noise(there, here, "tpot_s")
    assert not inside_noise(there | {"effective": A}, here, "tpot_s")
    assert not inside_noise(there, here, "kv_bytes_exact")


def test_the_page_plots_machines_apart_and_names_them(
    row: Callable[..., dict[str, Any]], run: dict[str, Any], tmp_path: Any
) -> None:
    rows = [row("baseline", effective=A), row("streaming_32", effective=B), row("streaming_64", effective=B)]
    data = case_data(tmp_path, rows, metric_columns(rows))
    assert data["plot"]["group"] == [0, 1, 1]
    assert data["cells"]["machine"] == ["a (10.0.0.1)", "b (10.0.0.2)", "b (10.0.0.2)"]
    assert machine_line(run, rows).startswith("2 machines (a (10.0.0.1), b (10.0.0.2))")
    assert "machine" not in [column.key for column in identity_columns(rows[1:])]


def test_a_speedup_is_of_one_machine() -> None:
    def served(variant: str, tokens: float, effective: dict[str, Any]) -> dict[str, Any]:
        case: dict[str, Any] = dict.fromkeys(("engine", "model", "quantization", "dtype", "workload"), "x")
        metrics = {"total_tok_s_logical": {"value": tokens}}
        params = {"variant": variant, "serving": {}}
        return {
            "status": "ok",
            "case": case | {"device": "cuda:0", "params": params},
            "metrics": metrics,
            "effective": effective,
        }

    rows = [served("baseline", 10.0, A), served("both", 20.0, A), served("both", 20.0, B)]
    assert [speedup(one, rows) for one in rows] == [1.0, 2.0, None]
