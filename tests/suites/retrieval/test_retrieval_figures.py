"""Figures and table of the retrieval suite from rows: cells by depth, the ceiling, and what is not discriminative."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from kvsuite.suites.retrieval.figures import MOST_PANELS, build_bytes, build_map, retrieval_figures
from kvsuite.suites.retrieval.scores import wilson
from kvsuite.suites.retrieval.table import retrieval_legend, retrieval_table

RUN = {"run_id": "run"}


def entry(number: float | None, **facts: Any) -> dict[str, Any]:
    return {"value": number, "reason": None if number is not None else "this is the reference"} | facts


def row(
    method: str, exact: float, *, task: str = "facts4", length: int = 320, full: float = 0.7, kib: int = 100
) -> dict[str, Any]:
    fine = full >= 0.3
    facts = {"contexts": 24, "bound": 0.3, "discriminative": fine}
    metrics = {
        "retrieval_exact": entry(exact, **facts), "retrieval_exact_se": entry(0.05), "retrieval_exact_full": entry(full),
        "retrieval_share": entry(exact, **facts), "retrieval_logprob": entry(-2.0, **facts),
        "retrieval_logprob_se": entry(0.1), "retrieval_logprob_full": entry(-1.0),
        "retrieval_logprob_diff": entry(None if method == "full" else -1.0), "retrieval_logprob_diff_se": entry(0.1),
        "kv_bytes_exact_prefill": entry(kib * 1024),
    }  # fmt: skip
    cells = [
        {
            "depth": depth, "exact": exact, "exact_interval": list(wilson(exact, 24)), "share": exact, "logprob": -2.0,
            "logprob_se": 0.1, "exact_full": full, "samples": 24, "discriminative": fine,
        }
        for depth in (0.0, 1.0)
    ]  # fmt: skip
    name = f"{task}-{length}-{method}"
    return {
        "id": name, "suite": "retrieval", "status": "ok", "metrics": metrics, "samples": {"cells": cells},
        "warnings": [], "effective": {},
        "case": {
            "name": name, "model": "smollm2", "engine": "hf", "policy": None, "policy_params": {}, "params": {"method": method},
            "workload": {"task": task, "prompt_tokens": length},
        },
    }  # fmt: skip


def texts(figure: Any) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_a_map_has_a_panel_a_method_and_a_cell_a_depth_and_length() -> None:
    rows = [
        row(method, exact, length=length) for length in (320, 640) for method, exact in (("full", 0.7), ("small", 0.2))
    ]
    figure = build_map(RUN, rows)
    assert [axes.get_title() for axes in figure.axes] == ["full", "small"]
    for axes, exact in zip(figure.axes, ("0.70", "0.20"), strict=True):
        assert [text.get_text().split("\n")[0] for text in axes.texts] == [exact] * 4
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["320", "640"]
        assert not any(patch.get_hatch() for patch in axes.patches)


def test_what_the_full_cache_does_not_answer_is_hatched_and_marked() -> None:
    rows = [row("full", 0.1, full=0.1), row("small", 0.05, full=0.1)]
    assert all(patch.get_hatch() for axes in build_map(RUN, rows).axes for patch in axes.patches)
    assert "not discriminative" in texts(build_bytes(RUN, rows))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(retrieval_table(rows))
    assert "~0.10" in console.export_text()
    assert any("not discriminative" in line for line in retrieval_legend(rows))
    assert not any("not discriminative" in line for line in retrieval_legend([row("full", 0.7)]))


def test_bytes_have_the_ceiling_and_every_method_beside_it() -> None:
    rows = [row("full", 0.7, kib=400), row("small", 0.2), row("other", 0.3)]
    figure = build_bytes(RUN, rows)
    for axes, ceiling in zip(figure.axes, (0.7, -1.0), strict=True):
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [line.get_ydata()[0] for line in dashed] == [ceiling]
        _, labels = axes.get_legend_handles_labels()
        assert set(labels) == {"full", "small", "other", "ceiling: the full cache"}
    assert "not discriminative" not in texts(figure)


def test_runs_without_scores_and_of_too_many_panels_have_no_figures() -> None:
    none = row("full", 0.7) | {"samples": {}}
    assert retrieval_figures(RUN, [none]) == {}
    assert retrieval_figures(RUN, [row(f"m{index}", 0.5) for index in range(MOST_PANELS + 1)]) == {}


def test_an_interval_is_none_of_no_width() -> None:
    assert wilson(0.0, 24)[0] == 0
    assert 0.1 < wilson(0.0, 24)[1] < 0.2
    assert wilson(1.0, 24)[1] == 1


def test_caches_of_equal_bytes_alone_are_moved_apart() -> None:
    rows = [row("full", 0.7, kib=1000), row("a", 0.3, kib=200), row("b", 0.2, kib=200), row("c", 0.1, kib=100)]
    [above, _] = build_bytes(RUN, rows).axes
    places = [float(line.get_xdata()[0]) for line in above.lines if line.get_marker() in list("os^D")]
    assert places[0] == 1000
    assert places[1] == 200 < places[2]
    assert places[3] == 100
