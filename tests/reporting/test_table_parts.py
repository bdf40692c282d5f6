"""Notes that tables and the page share."""

from __future__ import annotations

from kvsuite.reporting.table_parts import warnings_of


def test_a_time_that_varies_is_one_warning_whatever_by_how_much() -> None:
    unstable = "unstable: {} varies by {}% between rounds (bound 10%), so its differences mean nothing"
    rows = {
        "a": {"warnings": [unstable.format("ttft_s", 24), "one  timed\nround"]},
        "b": {"warnings": [unstable.format("ttft_s", 103), unstable.format("tpot_s", 12)]},
        "c": {},
        "d": {"warnings": [unstable.format("ttft_s", 24), "one timed round", "a share of 5%"]},
        "e": {"warnings": ["a share of 6%"]},
    }
    assert warnings_of(rows) == {
        unstable.format("ttft_s", "up to 103"): ["a", "b", "d"],
        "one timed round": ["a", "d"],
        unstable.format("tpot_s", 12): ["b"],
        "a share of 5%": ["d"],
        "a share of 6%": ["e"],
    }
