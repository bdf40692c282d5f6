"""Quality against bytes, and the traps: of constructed rows, whose places in the figure are known."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from matplotlib.colors import to_hex

from kvsuite.console import console_text
from kvsuite.metrics.registry import MetricRegistry
from kvsuite.suites.compression.divergence_figure import build_divergence, render_divergence
from kvsuite.suites.compression.figure import build_figure
from kvsuite.suites.compression.results_json import results_json
from kvsuite.suites.compression.rows import baseline_for, format_name, is_baseline, is_trap_row
from kvsuite.suites.compression.suite import CompressionSuite
from kvsuite.suites.compression.table import comparison_legend, comparison_table

MIB = 2**20
REGISTRY = MetricRegistry()
RED, GREY = "#e74c3c", "#808080"


@pytest.fixture
def compared(row):
    """A row in a number format, with its distance to the full cache where it has one."""

    def build(group, stored="auto", kv=1.0, *, kld=None, same=0.9, difference=0.1, **fields):
        name = group if stored == "auto" else f"{group}_{stored}"
        fields |= {"policy": None} if group == "baseline" else {}
        one = row(name, kv_bytes=int(kv * MIB), **fields)
        if group == "baseline":
            one["case"]["policy_params"] = {}
        if stored != "auto":
            one["case"]["params"]["kv_cache_dtype"] = stored
        if kld is not None:
            numbers = {
                "kld": kld, "kld_se": kld / 10, "same_top1": same, "nll_difference": difference, "nll_difference_se": 0.01,
            }  # fmt: skip
            one["metrics"] |= {metric: REGISTRY.value(metric, number) for metric, number in numbers.items()}
        return one

    return build


@pytest.fixture
def formats(compared):
    return [
        compared("baseline", kv=8),
        compared("streaming_64", kv=4, kld=0.3),
        compared("baseline", "int8", kv=2, kld=0.001, same=0.99, difference=-0.002),
        compared("streaming_64", "int8", kv=1, kld=0.31),
        compared("baseline", "int8:int4", kv=1.5, kld=0.01, same=0.95, difference=0.01),
        compared("streaming_64", "int8:int4", kv=0.75, kld=0.32),
    ]


def lines(axes):
    """The lines of the methods: those of more than one point that are neither whiskers nor rules."""
    return [
        [tuple(point) for point in line.get_xydata()] for line in axes.lines
        if len(line.get_xdata()) > 1 and line.get_linewidth() == 1.3
    ]  # fmt: skip


def rings(axes):
    return [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_markersize() == 16]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_line_is_a_group_in_all_its_formats_by_bytes(run, formats):
    figure = build_divergence(run, formats)
    left, _ = figure.axes
    assert left.get_xscale() == left.get_yscale() == "log"
    assert lines(left) == [[(0.75, 0.32), (1, 0.31), (4, 0.3)], [(1.5, 0.01), (2, 0.001)]]
    assert legend(figure) == ["streaming_64", "baseline", "auto", "int8", "int8:int4", "† trap"]
    colours = [to_hex(handle.get_color()) for handle in figure.legends[0].get_lines()]
    assert colours[1] == GREY != colours[0]
    marks = [handle.get_marker() for handle in figure.legends[0].get_lines()[2:5]]
    assert len(set(marks)) == 3


def test_of_equal_bytes_the_worse_comes_first(run, compared):
    rows = [
        compared("baseline", stored, kv=kv, kld=kld)
        for stored, kv, kld in (
            ("int8", 2, 0.001),
            ("int8:int4", 1.5, 0.01),
            ("int4:int8", 1.5, 0.08),
            ("int4", 1, 0.09),
        )
    ]
    assert lines(build_divergence(run, rows).axes[0]) == [[(1, 0.09), (1.5, 0.08), (1.5, 0.01), (2, 0.001)]]


def test_without_formats_a_line_is_a_policy_in_all_its_sizes(run, compared):
    rows = [
        compared("baseline", kv=8),
        compared("streaming_32", kv=1, kld=0.9),
        compared("streaming_64", kv=2, kld=0.3),
        compared("recent_only_32", kv=1, kld=2.0, policy="recent_only"),
    ]
    for size, one in zip((32, 64), rows[1:3], strict=True):
        one["case"]["policy_params"]["recent_size"] = size
    figure = build_divergence(run, rows)
    assert lines(figure.axes[0]) == [[(1, 0.9), (2, 0.3)]]
    assert legend(figure) == ["streaming_llm", "recent_only"]


def test_two_engines_are_two_lines(run, compared):
    rows = [
        compared("streaming_64", stored, kv=kv, kld=kld, engine=engine)
        for engine in ("hf", "nano") for stored, kv, kld in (("auto", 4, 0.3), ("int8", 1, 0.31))
    ]  # fmt: skip
    assert legend(build_divergence(run, rows))[:2] == ["streaming_64 hf", "streaming_64 nano"]


@pytest.mark.parametrize(
    ("same", "difference", "marked"),
    [(0.99, -0.002, True), (0.99, 0.002, False), (0.99, 0.0, False), (1.0, -0.002, False)],
)
def test_a_trap_is_a_better_loss_with_other_most_likely_tokens(run, compared, same, difference, marked):
    rows = [compared("baseline", kv=8), compared("baseline", "int8", kv=2, kld=0.001, same=same, difference=difference)]
    assert is_trap_row(rows[1]) is marked
    figure = build_divergence(run, rows)
    left, right = figure.axes
    assert rings(left) == ([(2, 0.001)] if marked else [])
    assert rings(right) == ([(pytest.approx(100 * (1 - same)), difference)] if marked else [])
    assert ("† trap" in legend(figure)) is marked
    table = console_text(comparison_table(rows))
    assert ("†1.0300±0.0040" in table) is marked
    assert ("† trap:" in comparison_legend(rows)) is marked


def test_a_case_that_failed_is_no_trap(compared):
    one = compared("baseline", "int8", kld=0.001, same=0.9, difference=-0.1)
    one["status"] = "failed"
    assert not is_trap_row(one)


def test_a_divergence_of_zero_stands_at_the_lower_edge(run, compared):
    rows = [compared("streaming_64", kv=4, kld=0.3), compared("streaming_256", kv=8, kld=0.0, same=1.0, difference=0.0)]
    left, _ = build_divergence(run, rows).axes
    ((_, (x, y)),) = lines(left)
    assert x == 8
    assert left.get_ylim()[0] < y < 0.3
    assert "0" in [text.get_text() for text in left.texts]


def test_all_divergences_may_be_zero(run, compared):
    rows = [compared("streaming_256", kv=8, kld=0.0, same=1.0, difference=0.0)]
    assert render_divergence(run, rows)["kv_divergence.png"].startswith(b"\x89PNG")


def test_cases_without_a_divergence_are_named(run, formats, compared):
    figure = build_divergence(run, [*formats, compared("streaming_32", "int4")])
    assert "without a KL divergence: streaming_32_int4" in figure.texts[-1].get_text()


def test_it_is_drawn_only_where_rows_have_divergences(run, rows, formats):
    assert not any("divergence" in name for name in CompressionSuite().figures(run, rows))
    drawn = render_divergence(run, formats)
    assert drawn.keys() == {"kv_divergence.png", "kv_divergence.svg"}
    assert drawn == render_divergence(run, formats)
    text = "".join(ET.fromstring(drawn["kv_divergence.svg"].decode()).itertext())
    assert "mathdefault" not in text
    assert "int8:int4" in text


def test_it_is_drawn_without_torch():
    program = (
        "import sys, kvsuite.suites.compression.divergence_figure, kvsuite.suites.compression.table; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_packed_full_caches_are_compared_with_the_baseline(formats):
    assert [is_baseline(one) for one in formats] == [True, *[False] * 5]
    assert all(baseline_for(one, formats) is formats[0] for one in formats)
    table = console_text(comparison_table(formats))
    changes = table[table.index("Change against baseline") :]
    assert "baseline_int8 " in changes
    assert "-75.0%" in changes
    # one that is not there takes no other's place
    assert baseline_for(formats[3], formats[2:]) is None
    assert "no full cache in the model's dtype (--kv-cache-dtype=auto,...)" in console_text(
        comparison_table(formats[2:])
    )


def test_the_baseline_of_the_results_is_in_the_models_dtype(run, formats):
    assert results_json(run, formats[2:])["baseline_name"] is None
    assert results_json(run, formats[2:] + formats[:2])["baseline_name"] == "baseline"


def test_bars_stand_apart_by_format_and_show_bytes(run, formats, rows):
    figure = build_figure(run, formats)
    cache = figure.axes[5]
    assert cache.get_ylabel() == "MiB"
    assert [patch.get_height() for patch in cache.containers[0]] == [8, 4, 2, 1, 1.5, 0.75]
    headings = [(text.get_text(), text.get_position()[0]) for text in cache.texts if text.get_fontweight() == "bold"]
    assert headings == [("auto", 0.5), ("int8", 2.5), ("int8:int4", 4.5)]
    assert [line.get_xdata()[0] for line in cache.lines if line.get_linestyle() == ":"] == [1.5, 3.5]
    assert to_hex(cache.containers[0][2].get_facecolor()) == GREY
    assert "keys and values auto, int8, int8:int4" in figure.texts[1].get_text()
    plain = build_figure(run, rows).axes[5]
    assert plain.get_ylabel() == "Tokens"
    assert not any(text.get_fontweight() == "bold" for text in plain.texts)


def test_a_format_by_layer_stands_there_by_its_label(compared):
    """As in the case's name, so that it is one line with the other formats of its group; in full it would fill the figure."""
    stored = "by_layer(int8*20|int8:int4*10)"
    row = compared("streaming_64", stored, 1, kld=0.01)
    label = format_name(row)
    assert label.startswith("by_layer-")
    assert len(label) == len("by_layer-") + 8
    row["case"]["name"] = f"streaming_64_{label}"
    figure = build_divergence({}, [compared("streaming_64", kv=4, kld=0.3), row])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["streaming_64", "auto", label]
