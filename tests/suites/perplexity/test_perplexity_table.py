"""The perplexity suite's table: what its notes and its legend say of the columns that are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvsuite.console import console_text
from kvsuite.metrics.registry import Metric, MetricRegistry
from kvsuite.reporting.table_parts import case_table, own_columns
from kvsuite.suites.outputs import run_table as drawn_run_table
from kvsuite.suites.perplexity.table import perplexity_legend
from kvsuite.suites.perplexity.table import perplexity_table as drawn_table

Rows = Callable[..., dict[str, Any]]


def perplexity_table(rows: list[dict[str, Any]]) -> str:
    return console_text(drawn_table(rows))


def run_table(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    return console_text(drawn_run_table(run, rows))


@pytest.fixture
def scored(row: Rows) -> Rows:
    """A row of the suite; ``metrics`` by name, a text is the reason of one that lacks."""
    value = MetricRegistry().value

    def build(
        name: str, protocol: str = "hf-strided", metrics: dict[str, float | str] | None = None, **more: Any
    ) -> dict[str, Any]:
        built = row(name, suite="perplexity", **more)
        built["case"]["workload"] |= {"protocol": protocol, "max_length": 512, "stride": 256}
        built["dataset"] = {"name": "text.txt", "bos": "none", "text_hash": "sha256:0123456789", "notes": []}
        built["tokens"] = {"scored": 1, "text": 2}
        if built["status"] == "ok":
            given = {"mem_weights_bytes": 2**20, "bits_per_weight": 4.5, "score_tok_s": 10.0} | (metrics or {})
            built["metrics"] |= {
                metric: value(metric, None, reason=found) if isinstance(found, str) else value(metric, found)
                for metric, found in given.items()
            }
        return built

    return build


def notes(rows: list[dict[str, Any]]) -> list[str]:
    return perplexity_table(rows).rpartition("=\n")[2].split("\n")[1:-1]


def test_a_protocol_is_named_by_whose_rule_it_is(scored: Rows) -> None:
    table = perplexity_table([scored("one"), scored("two", "hf-docs")])
    assert "text.txt: strided (original program), window 512, step 256" in table
    assert "text.txt: strided (Hugging Face documentation), window 512, step 256" in table


def test_a_note_names_the_column_that_lacks_its_value(scored: Rows) -> None:
    one = scored("one", metrics={"perplexity_se": "one token only"})
    assert notes([one, scored("two")]) == ["PPL±: one token only (one)"]
    # of a value that lacks with its spread the value is named
    neither = scored("one", metrics={"perplexity": "not finite", "perplexity_se": "not finite"})
    assert notes([neither, scored("two")]) == ["PPL: not finite (one)"]


def test_words_are_lm_eval_rollings_alone(scored: Rows) -> None:
    words = {"word_perplexity": 30.0, "bits_per_byte": 1.0}
    strided = scored("strided")
    # what rounded weights lack for another reason
    strided["inert"] = {"speed": "kept dense: quality only"}
    assert notes([strided, scored("rolling", "lm-eval-rolling", words)]) == [
        "Word PPL, Bits/byte: only lm-eval-rolling has them (strided)"
    ]
    unsaid = scored("unsaid", "lm-eval-rolling")
    assert "Word PPL, Bits/byte: not in the record (unsaid)" in notes(
        [unsaid, scored("rolling", "lm-eval-rolling", words)]
    )


def test_a_note_about_every_case_with_numbers_lists_none(scored: Rows) -> None:
    rows = [scored(name, metrics={"perplexity_se": "one token only"}, tpots=(0.01,)) for name in ("a", "b")]
    for each in rows:
        each["warnings"] = ["one round"]
    wanted = [
        "PPL±: one token only (all cases)",
        "TPOT±: needs at least 2 rounds (all cases)",
        "warning: one round (all cases)",
    ]
    assert notes(rows) == wanted
    # a case without numbers has none to explain
    skipped = scored("c", status="skipped", reason="no")
    assert notes([*rows, skipped]) == wanted
    rows[1]["warnings"] = []
    skipped["warnings"] = ["one round"]
    assert notes([*rows, skipped])[2:] == ["warning: one round (a, c)"]
    # the only case needs no name
    assert notes(rows[:1])[0] == "PPL±: one token only"


def test_the_legend_explains_the_columns_that_are_there(scored: Rows) -> None:
    without = [scored("none")]
    assert "PPL/ref" not in run_table({}, without)
    assert "PPL±: 1 standard error." in perplexity_legend(without)
    compared = [scored("none", metrics={"ppl_ratio_reference": "this is the reference"}), scored("q4f16_1")]
    assert "PPL/ref" in perplexity_table(compared)
    assert " PPL/ref: against the reference weights" in perplexity_legend(compared)
    assert run_table({}, compared).endswith(perplexity_legend(compared) + "\n")


def test_a_metric_of_others_is_a_column(scored: Rows) -> None:
    metric = Metric("joules_per_token", "J", "lower", "timed", "energy / tokens", label="Energy", format=".3f")
    one, two = scored("one"), scored("two")
    one["metrics"]["joules_per_token"] = MetricRegistry([metric]).value("joules_per_token", 1.23456)
    title, _, *rows = console_text(case_table("Case", {"one": one, "two": two}, own_columns([one, two]))).splitlines()
    assert title.split() == ["Case", "Energy(J)"]
    assert [line.split() for line in rows[:2]] == [["one", "1.235"], ["two", "n/a"]]
    assert "Energy(J)" in perplexity_table([one, two])
    assert "Energy: not in the record (two)" in notes([one, two])
