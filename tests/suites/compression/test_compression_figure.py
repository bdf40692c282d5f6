from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import pytest
from matplotlib.colors import to_hex

from kvsuite.errors import UserError
from kvsuite.reporting.figure_style import figure_bytes, fixed, three_digits
from kvsuite.suites.compression.figure import MOST_CASES, build_figure, colour, render_benchmark_comparison
from kvsuite.suites.compression.table import comparison_legend

GREY, GREEN, RED, BLUE = "#808080", "#2ecc71", "#e74c3c", "#3498db"
THROUGHPUT, TPOT, TTFT, PERPLEXITY, VRAM, CACHE = range(6)
# that of the rows, which is that of the space
ORDER = ["baseline", "recent_only_32", "recent_only_64", "streaming_32", "streaming_64"]


def bars(axes):
    return [(patch.get_x() + patch.get_width() / 2, patch.get_height()) for patch in axes.containers[0]]


def whiskers(axes):
    """(x, low, high) of each error bar."""
    (container,) = [c for c in axes.containers if type(c).__name__ == "ErrorbarContainer"]
    (lines,) = container.lines[2]
    return [(*segment[0], segment[1][1]) for segment in lines.get_segments()]


def words(axes):
    return [text.get_text() for text in axes.texts]


def by_case(rows):
    return {row["case"]["name"]: row for row in rows}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, GREY),
        ("streaming_llm", GREEN),
        ("recent_only", RED),
        ("fix_size_l2", BLUE),
        ("kvpress:StreamingLLM", BLUE),
    ],
)
def test_colours_are_the_policies_whatever_a_case_is_called(row, policy, expected):
    one = row("streaming_recent_only_baseline")
    one["case"]["policy"] = policy
    assert colour(one) == expected


@pytest.mark.parametrize(
    ("number", "decimals", "text"), [(12.34, 1, "12.3"), (0.004, 1, "0.004"), (0.0, 1, "0.0"), (15.916, 2, "15.92")]
)
def test_small_numbers_do_not_print_as_zero(number, decimals, text):
    assert fixed(number, decimals) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.01234, "0.0123"), (29.06, "29.1"), (977.4, "977"), (3234.6, "3,235"), (-1673.5, "-1,674")]
)
def test_numbers_of_four_digits_have_no_exponent(number: float, text: str) -> None:
    assert three_digits(number) == text


def test_figure_is_the_originals(run, rows):
    figure = build_figure(run, rows)
    assert tuple(figure.get_size_inches()) == (20, 12)
    assert figure.get_suptitle() == "KV Cache Compression Benchmark Results"
    subtitle = figure.texts[1].get_text()
    for fact in ("SmolLM2-135M", "cpu", "float32", "streaming-decode", "original", "192", "32", "rounds 3"):
        assert fact in subtitle
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "Tokens / Second", "Milliseconds", "Seconds", "PPL Score", "Memory (GB)", "Tokens"
    ]  # fmt: skip
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split(" ")[0] for title in titles] == ["Throughput", "TPOT", "TTFT", "Perplexity", "Peak", "KV"]
    assert "prefill + compression + first token" in titles[TTFT]


def test_bars_have_the_values_and_colours_of_the_rows(run, rows):
    figure = build_figure(run, rows)
    cases = by_case(rows)
    for panel, metric, scale in [
        (THROUGHPUT, "output_tok_s", 1),
        (TPOT, "tpot_s", 1e3),
        (TTFT, "ttft_s", 1),
        (PERPLEXITY, "perplexity", 1),
        (CACHE, "cache_tokens_mean", 1),
    ]:
        axes = figure.axes[panel]
        assert [label.get_text() for label in axes.get_xticklabels()] == ORDER
        assert [label.get_rotation() for label in axes.get_xticklabels()] == [45] * 5
        expected = [(x, cases[name]["metrics"][metric]["value"] * scale) for x, name in enumerate(ORDER)]
        assert bars(axes) == [pytest.approx(pair) for pair in expected]
        assert [to_hex(patch.get_facecolor()) for patch in axes.containers[0]] == [GREY, RED, RED, GREEN, GREEN]
        for patch in axes.containers[0]:
            assert patch.get_alpha() == 0.8
            assert to_hex(patch.get_edgecolor()) == "#000000"
        assert len(words(axes)) == 5
    assert words(figure.axes[CACHE]) == ["224", "32", "32", "45", "64"]
    assert words(figure.axes[THROUGHPUT]) == ["91.0", *["≈91.0"] * 4]
    assert words(figure.axes[TTFT]) == ["0.0220", *["≈0.0220"] * 4]
    assert all(text.get_fontsize() == 9 for text in figure.axes[TPOT].texts)


def test_the_legend_says_what_colours_and_hatching_mean(run, rows, row):
    assert [text.get_text() for text in build_figure(run, rows).legends[0].get_texts()] == [
        "full cache",
        "control: the last tokens alone",
        "StreamingLLM: first and last tokens",
        "time uncertain by more than 10%: no order",
    ]
    quiet = {"tpots": (0.01, 0.01001, 0.01002), "throughput": (90.0, 90.1, 90.2)}
    alone = row("fix32", policy="fix_size_l2", **quiet)
    for entry in (alone["metrics"]["ttft_s"], alone["metrics"]["e2e_s"]):
        entry["ci95"] = [0.99 * entry["mean"], 1.01 * entry["mean"]]
    assert [text.get_text() for text in build_figure(run, [alone]).legends[0].get_texts()] == ["other methods"]


def test_a_time_that_is_too_uncertain_is_hatched(run, row):
    cases = [
        row("baseline", tpots=(0.0100, 0.0101, 0.0099)),
        row("streaming_32", tpots=(0.0050, 0.0051, 0.0049)),
        row("streaming_64", tpots=(0.0050, 0.0100, 0.0020)),
        row("streaming_96", tpots=(0.0050,)),
    ]
    axes = build_figure(run, cases).axes[TPOT]
    assert [patch.get_hatch() is not None for patch in axes.containers[0]] == [False, False, True, True]
    assert [text.startswith("≈") for text in words(axes)] == [False, False, True, True]


def test_timed_whiskers_are_half_the_interval_of_the_mean(run, rows):
    axes = build_figure(run, rows).axes[TPOT]
    entry = rows[0]["metrics"]["tpot_s"]
    half = (entry["ci95"][1] - entry["ci95"][0]) / 2 * 1e3
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert whiskers(axes) == [pytest.approx((x, 11 - half, 11 + half)) for x in range(5)]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 11 + half


def test_one_round_has_no_whisker(run, row):
    axes = build_figure(run, [row("baseline"), row(tpots=(0.01,))]).axes[TPOT]
    assert [place for place, _, _ in whiskers(axes)] == [0]
    alone = build_figure(run, [row(tpots=(0.01,))]).axes[TPOT]
    assert len(alone.containers) == 1


def test_perplexity_whiskers_and_range(run, rows):
    axes = build_figure(run, rows).axes[PERPLEXITY]
    values = [by_case(rows)[name]["metrics"]["perplexity"]["value"] for name in ORDER]
    assert whiskers(axes) == [pytest.approx((x, v * 0.98, v * 1.02)) for x, v in enumerate(values)]
    low, high = axes.get_ylim()
    assert low <= 0.95 * min(values)
    assert high >= 1.05 * max(values)
    for row in rows:
        row["metrics"]["perplexity_se"] |= {"value": None, "reason": "one token"}
    assert build_figure(run, rows).axes[PERPLEXITY].get_ylim() == pytest.approx(
        (0.95 * min(values), 1.05 * max(values))
    )
    rows[0]["metrics"]["perplexity_se"] |= {"value": values[0]}
    figure = build_figure(run, rows)
    figure.draw_without_rendering()
    axes = figure.axes[PERPLEXITY]
    assert axes.get_ylim()[0] < 0
    assert axes.get_ylim()[1] > 2 * values[0]
    assert axes.texts[0].get_window_extent().y1 <= axes.get_window_extent().y1


def test_cache_whiskers_only_where_layers_differ(run, rows):
    assert whiskers(build_figure(run, rows).axes[CACHE]) == [pytest.approx((3, 32, 224))]


def test_vram_in_gib(run, row):
    axes = build_figure(run, [row("baseline", peak_vram=3 * 2**29), row()]).axes[VRAM]
    assert bars(axes) == [pytest.approx((0, 1.5))]
    assert words(axes) == ["1.50 GB", "n/a"]
    assert axes.get_ylabel() == "Memory (GB)"


def test_a_panel_nobody_measured_says_why(run, row):
    figure = build_figure(run, [row("baseline", kind="dummy"), row(kind="dummy")])
    for panel, text in [(VRAM, "not measured on cpu"), (PERPLEXITY, "not measured: random weights")]:
        axes = figure.axes[panel]
        assert words(axes) == [text]
        assert not axes.containers
        assert list(axes.get_yticks()) == []
    assert "random weights" in figure.texts[1].get_text()


def test_failed_cases_have_no_bar_but_a_line(run, rows, row):
    rows.append(row("streaming_128", status="oom", error={"type": "OOM", "message": "x", "traceback": ""}))
    figure = build_figure(run, rows)
    assert all(len(bars(axes)) == 5 for axes in figure.axes if axes.containers)
    assert "streaming_128  oom: OOM: x" in figure.texts[-1].get_text()
    nothing = build_figure(run, rows[-1:])
    assert [words(axes) for axes in nothing.axes] == [["not measured: no case finished"]] * 6


def test_floor_markers(run, rows):
    plain = build_figure(run, rows).axes[TPOT]
    assert plain.get_legend() is None
    for row in rows[:2]:
        row["metrics"]["tpot_floor_s"] = row["metrics"]["tpot_s"] | {"value": 0.004}
    axes = build_figure(run, rows).axes[TPOT]
    (marks,) = [line for line in axes.get_lines() if line.get_marker() == "_" and line.get_label()[0] != "_"]
    assert sorted(zip(marks.get_xdata(), marks.get_ydata(), strict=True)) == [(0, 4.0), (1, 4.0)]
    assert axes.get_legend().get_texts()[0].get_text() == "floor (bytes / measured bandwidth)"


def test_values_of_twelve_groups_do_not_overlap(run, row):
    rows = [row(f"streaming_{n}", peak_vram=12 * 2**30, throughput=(1234.5, 1250.0)) for n in range(10, 22)]
    figure = build_figure(run, rows)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 12
        # neighbours may not touch, nor may a number leave the panel
        assert not any(left.overlaps(right) for left, right in itertools.pairwise(boxes))
        assert all(box.y1 <= axes.get_window_extent().y1 for box in boxes)


HARD = ["a$b$c", "<script>&amp;", "x & y", "50 %", "\\alpha_{2}^", "naïve"]


def test_names_are_text_not_markup(run, row):
    names = ["baseline", *HARD]
    rows = [row(name) for name in names] + [row("failed", status="skipped", reason="costs $1 and $2 & <more>")]
    rows[0]["model"]["label"] = "model $x^2$"
    root = ET.fromstring(figure_bytes(build_figure(run, rows), "svg").decode())
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in names:
        assert texts.count(name) == 5  # six panels, of which VRAM is not measured
    assert any("model $x^2$" in text for text in texts)
    assert any("costs $1 and $2 & <more>" in text for text in texts)


def test_rendering_leaves_the_process_alone_and_repeats(run, rows):
    import matplotlib

    before = dict(matplotlib.rcParams)
    first = render_benchmark_comparison(run, rows)
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "text.usetex": True}):
        assert render_benchmark_comparison(run, rows) == first
    assert first["benchmark_comparison.png"].startswith(b"\x89PNG")
    assert b"date" not in first["benchmark_comparison.svg"].lower()


def test_empty_selection_is_refused(run, row):
    with pytest.raises(UserError, match="no compression case among the 0 records"):
        build_figure(run, [])
    with pytest.raises(UserError, match="no compression case among the 1 records"):
        build_figure(run, [row(suite="dse")])


def test_more_cases_than_bars_can_show_are_not_drawn_and_the_table_says_so(run, row):
    many = [row(f"streaming_{budget}", budget=budget) for budget in range(MOST_CASES + 1)]
    assert render_benchmark_comparison(run, many) == {}
    assert f"No figure: its bars can show {MOST_CASES} cases, these are {MOST_CASES + 1}" in comparison_legend(many)
    assert "No figure" not in comparison_legend(many[1:])
