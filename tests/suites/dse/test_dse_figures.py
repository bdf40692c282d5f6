"""What the original's figures got wrong (systems.md 1.16) must not come back; and what figures say of themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from dse_samples import PUBLISHED, Q0, Q4, changed, own_sheets, record, sheet
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvsuite.errors import UserError
from kvsuite.reporting.figure_style import figure_bytes
from kvsuite.suites.dse.csv_files import CsvSheet, read_sheet
from kvsuite.suites.dse.figures import draw as dse
from kvsuite.suites.dse.figures.draw import render_dse
from kvsuite.suites.dse.figures.panels import draw
from kvsuite.suites.dse.figures.points import samples_of
from kvsuite.suites.dse.figures.series import FigurePlan, Layout, arrange, short_tags

A = {plan.name: plan for plan in dse.MEMORY_PLANS}
EVERY = {plan.name: plan for plan in (*dse.MEMORY_PLANS, *dse.COMPARISON_PLANS, *dse.SPEED_PLANS, *dse.CHARS_PLANS)}


def sorted_out(name: str, *sheets: CsvSheet) -> Layout:
    layout = arrange(EVERY[name], [sample for each in sheets for sample in samples_of(each)])
    assert layout is not None
    return layout


def drawn(name: str, *sheets: CsvSheet) -> Figure:
    return draw(sorted_out(name, *sheets), name, [])


def lines(figure: Figure, gid: str) -> list[Any]:
    return [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]


def marks(figure: Figure) -> int:
    return sum(len(line.get_xdata()) for line in lines(figure, "points"))


def caption(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


@cache
def all_figures() -> tuple[dict[str, Figure], list[str]]:
    notes: list[str] = []
    sheets = [sheet(kind, tag) for kind in ("results", "metrics") for tag in (Q4, Q0)]
    return dict(dse._figures(sheets, notes)), notes


def titles(axes: list[Axes]) -> list[str]:
    return [each.get_title() for each in axes]


# the set


def test_every_figure_of_the_original_has_its_name() -> None:
    figures, notes = all_figures()
    memory = [f"{tag}_mem_{rest}" for tag in (Q4, Q0) for rest in
              ("kvcache_vs_context", "total_vs_context", "kvcache_vs_sliding")]  # fmt: skip
    speed = [f"{stem}_vs_{axis}" for stem in
             ("throughput_prefill", "throughput_decode", "latency_e2e", "latency_ttft", "chars_throughput")
             for axis in ("context", "batch", "sliding", "sink")]  # fmt: skip
    compare = ["kv_cache_quant_compare", "kv_cache_quant_compare_total"]
    assert list(figures) == [*memory, *compare, *speed, "dse_pareto", "dse_knobs"]
    assert notes == []


@pytest.mark.parametrize("name", [name for name in EVERY if "mem" not in name])
def test_every_selected_point_has_one_mark(name: str) -> None:
    sheets = [sheet("metrics" if EVERY[name] in dse.SPEED_PLANS else "results", tag) for tag in (Q4, Q0)]
    layout = sorted_out(name, *sheets)
    assert marks(draw(layout, name, [])) == sum(len(s.points) for panel in layout.panels.values() for s in panel)
    # and no row is lost on the way to a mark
    read = sum(s.spread(x).count for panel in layout.panels.values() for s in panel for x in s.points)
    assert read == len(layout.samples)


def test_every_figure_names_its_files_and_units() -> None:
    for name, figure in all_figures()[0].items():
        assert "Source: " in caption(figure), name
        if "knobs" not in name:
            label = figure.axes[0].get_ylabel()
            assert any(unit in label for unit in ("MB", "tok/s", "(s)", "chars/s")), name


# 1: a prefix-cache hit is not a TTFT


def test_ttft_of_computed_and_of_cached_prompts_never_share_a_point() -> None:
    layout = sorted_out("latency_ttft_vs_context", sheet("metrics"))
    assert len(layout.hues) == 2
    for panel in layout.panels.values():
        for series in panel:
            values = [value for readings in series.points.values() for r in readings for value in r.values]
            assert (min(values) > 0.05) is (series.condition is not None and not series.condition.cached)
    figure = draw(layout, "t", [])
    assert {line.get_markerfacecolor() == "white" for line in lines(figure, "points")} == {True, False}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("prompt computed" in text for text in legend)
    assert any("from the prefix cache" in text for text in legend)


def test_the_hits_are_counted() -> None:
    figures, _ = all_figures()
    assert "blocks the last prompt came from the prefix cache" in caption(figures["latency_ttft_vs_context"])
    assert "blocks the last prompt" not in caption(figures["throughput_decode_vs_context"])


# 2 and 3: inert axes


@pytest.mark.parametrize("name", [plan.name for plan in (*dse.SPEED_PLANS, *dse.CHARS_PLANS)])
def test_no_line_along_an_axis_that_the_original_never_brought_to_the_engine(name: str) -> None:
    figure = all_figures()[0][name]
    assert lines(figure, "line") == []
    assert lines(figure, "trunk") == []
    assert len(lines(figure, "points")) > 0
    assert "inert: points are not joined" in figure.axes[-1].get_xlabel()
    assert "Inert: " in caption(figure)


def test_the_inert_window_and_sink_of_the_memory_figures() -> None:
    figure = all_figures()[0][f"{Q4}_mem_kvcache_vs_sliding"]
    assert lines(figure, "line") == []
    assert "inert: points are not joined" in figure.axes[0].get_xlabel()
    figure = all_figures()[0][f"{Q4}_mem_kvcache_vs_context"]
    # the context is live: one line through all that differs in inert axes alone, none for a window of its own
    assert lines(figure, "line") == []
    assert len(lines(figure, "trunk")) == len(figure.axes)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any(text.startswith("sliding_window_size (inert") for text in legend)


def test_live_axes_are_lines() -> None:
    figure = drawn("kv_cache_quant_compare", sheet("results"), sheet("results", Q0))
    found = {tuple(line.get_ydata()) for line in lines(figure, "line")}
    assert found == {(722.068, 1234.072), (600.521, 1112.526)}
    assert figure.axes[0].get_xlabel() == "context_window_size"


def test_a_tag_that_answers_and_one_that_does_not_share_a_figure() -> None:
    ours = own_sheets()[2]
    figure = drawn("throughput_decode_vs_batch", ours, sheet("metrics"))
    joined = lines(figure, "line")
    assert joined
    points = lines(figure, "points")
    assert len(points) > len(joined)
    assert f"({Q4})" in caption(figure)


# 4 and 9: an estimate is called one


def test_the_memory_numbers_say_what_they_are() -> None:
    for name, figure in all_figures()[0].items():
        if "mem_" in name or "quant_compare" in name or name.startswith("dse_"):
            assert "the engine's own estimate, not measured" in caption(figure), name
    notes: list[str] = []
    figures = dict(dse._figures(own_sheets()[1:2], notes))
    assert "total (MB of 2^20 bytes): the measured peak of allocations." in caption(
        figures["kv_cache_quant_compare_total"]
    )


# 5: the KV cache is the slope, whatever the weights


def test_the_kv_cache_of_two_weight_formats_is_the_same() -> None:
    said = caption(all_figures()[0]["kv_cache_quant_compare"])
    assert "q4f16_1 131 073 bytes a token + 210.1 MB; q0f16 131 073 bytes a token + 88.5 MB" in said


# 6: repeats


def test_repeats_are_a_range_and_never_a_mean() -> None:
    layout = sorted_out("throughput_decode_vs_context", sheet("metrics"))
    figure = draw(layout, "t", [])
    bars = [path.vertices[:, 1] for axes in figure.axes for c in axes.collections for path in c.get_paths()]
    ends = {(round(bar.min(), 6), round(bar.max(), 6)) for bar in bars}
    for panel in layout.panels.values():
        for series in panel:
            for readings in series.points.values():
                values = [value for r in readings for value in r.values]
                assert (round(min(values), 6), round(max(values), 6)) in ends
    assert max(high / low for low, high in ends) > 1.3
    said = caption(all_figures()[0]["throughput_decode_vs_context"])
    assert "Repeats of one point differ by up to: q4f16_1 1.39 x. The files do not say which machine" in said


def test_rows_of_one_and_of_three_runs_are_never_pooled() -> None:
    for plan in dse.SPEED_PLANS:
        layout = sorted_out(plan.name, sheet("metrics"))
        kinds = {s.condition.num_runs for panel in layout.panels.values() for s in panel if s.condition}
        assert kinds == {1, 3}, plan.name


def test_hosts_are_never_pooled() -> None:
    one = own_sheets([record(context=context) for context in (256, 512)])[1]
    other = changed(one, host="other")
    layout = sorted_out("throughput_decode_vs_context", one, other)
    assert [" ".join(str(hue).split()) for hue in layout.hues] == [
        "SmolLM2-q4f16_1 box H200", "SmolLM2-q4f16_1 other H200",
    ]  # fmt: skip


# 7: the prefill chunk


def test_the_prefill_chunk_has_panels_of_its_own_where_it_acts() -> None:
    figures, _ = all_figures()
    found = titles(figures[f"{Q4}_mem_total_vs_context"].axes)
    assert found == [f"prefill chunk {chunk}, batch {batch}" for chunk in ("1 024", "4 096") for batch in (1, 8)]
    assert titles(figures["kv_cache_quant_compare_total"].axes) == ["prefill chunk 1 024", "prefill chunk 4 096"]
    assert titles(figures["kv_cache_quant_compare"].axes) == [""]


@pytest.mark.parametrize("name", list(EVERY))
def test_no_mark_stands_for_settings_that_act(name: str) -> None:
    """No averaging over live axes: on our runtime every axis acts, so each mark is one point's rounds."""
    results, metrics = own_sheets()[1], own_sheets()[3]
    plan = EVERY[name]
    found = metrics if plan in dse.SPEED_PLANS else results
    layout = sorted_out(name, found)
    for panel in layout.panels.values():
        for series in panel:
            assert all(series.spread(x).count == 3 for x in series.points)
    assert layout.pooled == ()
    if plan.quantity in ("total_mb", "kvcache_mb"):
        assert all(
            s.spread(x).low == s.spread(x).high for panel in layout.panels.values() for s in panel for x in s.points
        )


# missing, foreign, empty


def test_an_empty_selection_is_said_and_the_rest_drawn() -> None:
    rows = [row for row in sheet("results").rows if row["sliding_window_size"] <= 0]
    notes: list[str] = []
    figures = dict(dse._figures([CsvSheet(sheet("results").table, Q4, "x.csv", rows)], notes))
    assert "chars_throughput_vs_sliding: not drawn, no row has window on" in notes
    assert "chars_throughput_vs_sink: not drawn, no row has window on" in notes
    assert "dse_pareto" in figures  # of characters a second, which results CSVs have
    assert len(figures) == 3 + 2 + 2 + 2


def test_a_figure_of_one_point_is_not_drawn() -> None:
    found = sheet("results")
    first = next(row for row in found.rows if row["max_batch_size"] == 1 and row["sliding_window_size"] < 0)
    others = [row for row in found.rows if row["max_batch_size"] > 1 and row["sliding_window_size"] < 0]
    notes: list[str] = []
    figures = dict(dse._figures([CsvSheet(found.table, Q4, "x.csv", [first, *others])], notes))
    assert "chars_throughput_vs_context: not drawn, it would show one point alone" in notes
    assert "chars_throughput_vs_batch" in figures
    # the same point of two weight formats is a comparison
    beside = dict(dse._figures([CsvSheet(found.table, tag, "x.csv", [first]) for tag in (Q4, Q0)], []))
    assert "chars_throughput_vs_context" in beside


def test_missing_columns_are_said() -> None:
    empty = dict.fromkeys(("gpu_mem_total_mb", "gpu_mem_params_mb", "gpu_mem_kvcache_mb", "gpu_mem_temp_mb"))
    notes: list[str] = []
    figures = dict(dse._figures([changed(sheet("results"), **empty)], notes))
    assert f"{Q4}_mem_total_vs_context: not drawn, the files have no total" in notes
    assert any(note.startswith("dse_pareto: not drawn, it needs memory and speed") for note in notes)
    assert set(figures) == {f"chars_throughput_vs_{axis}" for axis in ("context", "batch", "sliding", "sink")} | {
        "dse_knobs"
    }


def test_what_is_odd_about_a_file_is_said() -> None:
    from kvsuite.suites.dse.figures.captions import sheet_notes

    found = sheet("results")
    notes = " ".join(sheet_notes(found))
    assert "points are there more than once: drawn as spread" in notes
    assert "rows of num_runs 1 and 3; never pooled where a time is drawn" in notes
    assert "have no row" not in notes
    fewer = [row for row in found.rows if (row["max_batch_size"], row["attention_sink_size"]) != (8, 32)]
    (note,) = [n for n in sheet_notes(CsvSheet(found.table, Q4, "x.csv", fewer)) if "no row" in n]
    assert note.startswith("x.csv: 4 of 24 points have no row: context_window_size 4 096, ")
    assert note.endswith("attention_sink_size 32 and 1 more")
    failed = own_sheets([record(), record(batch=4, status="oom", metrics={}, error={"type": "E", "message": "big"})])
    assert "1 row without a result: oom: E: big" in " ".join(sheet_notes(failed[0]))
    assert list(sheet_notes(CsvSheet(found.table, Q4, "x.csv", []))) == ["x.csv: only a header, nothing to draw"]


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no row to draw in x\.csv"):
        render_dse([CsvSheet(sheet("results").table, Q4, "x.csv", [])])


def test_files_of_one_tag_are_one_series() -> None:
    one, other = sheet("results"), changed(sheet("results"), device="cuda:0")
    rendered_notes = dse._shared_tags([one, other])
    assert rendered_notes == [f"{Q4}: 2 results files are drawn as one, their equal points as repeats"]


# bytes


def test_the_same_bytes_again() -> None:
    plan = FigurePlan("x", "total_mb", "context_window_size", where=("batch 1", "window off", "sink 0"))
    samples = samples_of(sheet("results"))

    def made(kind: str) -> bytes:
        layout = arrange(plan, samples)
        assert layout is not None
        return figure_bytes(draw(layout, "t", []), kind, dpi=200)

    for kind in ("png", "svg"):
        assert made(kind) == made(kind)


def test_rendering_gives_files_by_name() -> None:
    rows = [row for row in sheet("results").rows if row["max_batch_size"] == 1 and row["sliding_window_size"] < 0]
    found = CsvSheet(sheet("results").table, Q4, "x.csv", [row | {"time_s": None} for row in rows])
    rendered = render_dse([found])
    stems = [f"{Q4}_mem_kvcache_vs_context", f"{Q4}_mem_total_vs_context", f"{Q4}_mem_kvcache_vs_sliding",
             "kv_cache_quant_compare", "kv_cache_quant_compare_total", "dse_knobs"]  # fmt: skip
    assert list(rendered.files) == [f"{stem}.png" for stem in stems]
    assert all(content.startswith(b"\x89PNG") for content in rendered.files.values())
    assert len([note for note in rendered.notes if "not drawn" in note]) == 5


def test_short_tags() -> None:
    assert short_tags(["a-q4-M", "a-q0-M"]) == {"a-q4-M": "q4", "a-q0-M": "q0"}
    assert short_tags(["a-q4-M"]) == {"a-q4-M": "a-q4-M"}
    assert short_tags(["a-q4", "b"]) == {"a-q4": "a-q4", "b": "b"}


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published CSVs are not on this machine")
def test_the_published_files_give_34_figures_and_two_more() -> None:
    sheets = [read_sheet(path) for path in sorted(PUBLISHED.glob("kv_cache_dse_*.csv"))]
    first, second = render_dse(sheets), render_dse(sheets)
    assert len(first.files) == 34 + 2
    assert first.files == second.files
    assert not [note for note in first.notes if "not drawn" in note]
