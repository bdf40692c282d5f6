"""Which rows of a comparison a reader sees first, and which are only counted."""

from __future__ import annotations

from comparison_samples import record, side

from kvsuite.comparison.compare import compare
from kvsuite.comparison.rules import parse_rules
from kvsuite.comparison.tables import SCREEN_ROWS, comparison_markdown, comparison_text, shown_rows
from kvsuite.comparison.verdicts import Verdict, Word

HEADLINE = ("perplexity", "ttft_s", "tpot_s", "decode_tok_s_agg", "kv_bytes_exact", "next_token_acc")


def verdict(case: str, metric: str, word: Word = "same", change: float = 0.0, rule: str = "") -> Verdict:
    return Verdict(case, metric, "1", 1.0, 1.0 + change, change, word, rule)


def test_regressions_come_first_whatever_the_order_of_the_cases() -> None:
    rows = [verdict("a", "perplexity"), verdict("a", "ttft_s", "worse", 0.1), verdict("b", "tpot_s", "regression", 0.5)]
    assert [(row.case, row.verdict) for row in shown_rows(rows)] == [("b", "regression"), ("a", "worse"), ("a", "same")]


def test_what_is_equal_to_the_last_digit_is_no_news_for_want_of_a_verdict() -> None:
    equal, moved = verdict("a", "tpot_s", "unstable"), verdict("a", "ttft_s", "unstable", 0.02)
    assert shown_rows([equal, moved]) == [moved]
    assert shown_rows([equal, moved], everything=True) == [equal, moved]
    # under a rule as well: identical runs break none
    gated = verdict("a", "tpot_s", "unstable", rule="tpot:+5%")
    assert shown_rows([gated]) == []


def test_five_cases_fit_a_screen_and_no_regression_is_left_out() -> None:
    rows = [verdict(f"case{k}", metric) for k in range(5) for metric in HEADLINE]
    assert len(rows) > SCREEN_ROWS
    assert len(shown_rows(rows)) == SCREEN_ROWS
    broken = [verdict(f"case{k}", f"m{n}", "regression", 0.5) for k in range(5) for n in range(10)]
    assert shown_rows([*rows, *broken]) == broken


def test_what_the_machine_was_like_is_said_once() -> None:
    times = [0.01, 0.0101, 0.0099, 0.01, 0.0102, 0.01, 0.01]
    quiet = [record(f"case{k}", {"tpot_s": times, "host_wait_share": 0.0}) for k in range(5)]
    slow = [
        record(f"case{k}", {"tpot_s": [2 * one for one in times], "host_wait_share": 0.5 + k / 100}) for k in range(5)
    ]
    result = compare(side(quiet), side(slow), parse_rules("tpot:+5%"))
    for text in (comparison_text(result), comparison_markdown(result)):
        assert text.count(" of its speed") == 1
        assert "lacked up to 54% of its speed" in text
    # each row of the file has its own
    assert sum("lacked 5" in row["note"] for row in result.to_dict()["rows"]) == 5
