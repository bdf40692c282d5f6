"""``<dataset>_ppl_vs_quant``: one bar a weight format, one panel a model, from rows of a perplexity CSV."""

from __future__ import annotations

import colorsys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UserError
from kvsuite.reporting.figure_style import BLUE, GREEN, GREY, RED, figure_bytes, house_style
from kvsuite.reporting.gathered_csv import cut_note, read_text
from kvsuite.suites.suite import CsvFigures

from .csv_files import file_token, read_rows
from .panels import Chart, CsvRow, build_charts
from .rows import quantization_tag

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 200
_HEIGHT, _ASPECT = 4.0, 1.1
_BARS_A_PANEL = 6
#: a linear axis would show bars in such a ratio as nothing
_LOG_RATIO = 50.0
#: a taller bar ends at the top of the axis, and its number says so
_LARGEST = 1e12
#: of the weight formats of kvsuite.quantization.registry; greys are as loaded, by dtype
COLOURS = {
    "none": GREY,
    "fp32": GREY,
    "float32": GREY,
    "bf16": "#b5b5b5",
    "bfloat16": "#b5b5b5",
    "fp16": "#4d4d4d",
    "float16": "#4d4d4d",
    "q0f32": "#c8d6e5",
    "q0f16": "#34495e",
    "8bit": GREEN,
    "4bit": BLUE,
    "fake_q3": RED,
    "q3f16_1": "#f39c12",
    "q4f16_0": "#9b59b6",
    "q4f16_1": "#00a8a8",
    "q4f16_2": "#fd79a8",
    "q4f32_1": "#f1e05a",
}


def figures_of_files(paths: Sequence[Path], kinds: Sequence[str]) -> CsvFigures:
    """Figures of CSVs, the rows of all together.

    Raises
    ------
    UserError
        If one cannot be read, or has no row.
    """
    rows: list[CsvRow] = []
    notes: list[str] = []
    for path in paths:
        own = read_rows(path)
        if not own:
            raise UserError(
                f"{path}: no perplexity row to draw, only a header; run benchmarks/test_perplexity.py first, or give a CSV "
                "with rows"
            )
        rows += own
        notes += [note] if (note := cut_note(read_text(path, "perplexity"), str(path))) else []
    return CsvFigures(render_perplexity(rows, kinds), len(rows), notes)


def render_perplexity(rows: Sequence[CsvRow], kinds: Sequence[str] = ("png", "svg")) -> dict[str, bytes]:
    """``<dataset>_ppl_vs_quant.png`` and ``.svg`` for every data set, as bytes by name.

    Raises
    ------
    UserError
        If there is no row.
    """
    rendered = {}
    for dataset, figure in build_figures(rows).items():
        for kind in kinds:
            rendered[f"{file_token(dataset)}_ppl_vs_quant.{kind}"] = figure_file(figure, kind)
    return rendered


def figure_file(figure: Figure, kind: str) -> bytes:
    """A figure as ``"png"`` (200 dpi, as the original's) or ``"svg"``."""
    return figure_bytes(figure, kind, dpi=_DPI)


def build_figures(rows: Sequence[CsvRow]) -> dict[str, Figure]:
    """Build one figure for every data set, by its name.

    Rows of two data sets with one text are one result, and the figure says so; see `build_charts`. Of rows with the same model,
    text, settings, format, dtype and device the last one counts.

    Parameters
    ----------
    rows
        From `kvsuite.suites.perplexity.csv_files.read_rows` or ``csv_row``, in the order in which they were measured.

    Raises
    ------
    UserError
        If there is no row.
    """
    if not rows:
        raise UserError("no perplexity row to draw; run benchmarks/test_perplexity.py first, or give a CSV with rows")
    return {chart.dataset: _figure(chart) for chart in build_charts(rows)}


def _figure(chart: Chart) -> Figure:
    from matplotlib.figure import Figure

    drawn = [row for panel in chart.panels for row in panel.bars.values()]
    colours = _colours([quantization_tag(row) for row in drawn])
    ratios = [max(1.0, len(panel.bars) / _BARS_A_PANEL) for panel in chart.panels]
    with house_style():
        figure = Figure(figsize=(max(_HEIGHT * _ASPECT * sum(ratios), 6.0), _HEIGHT + 1.4), layout="constrained")
        width = figure.get_size_inches()[0]
        title = "\n".join(textwrap.wrap(f"{chart.dataset} PPL vs quantization", int(9 * width)))
        figure.suptitle(title, fontweight="bold")
        grid = figure.subplots(1, len(chart.panels), sharey=True, squeeze=False, width_ratios=ratios)
        _scale(grid[0][0], chart.dataset, drawn)
        for axes, panel in zip(grid[0], chart.panels, strict=True):
            _draw(axes, panel.bars, colours)
            axes.set_title(panel.title, fontsize=9, parse_math=False)
        figure.supxlabel("\n".join(textwrap.wrap(chart.caption, int(16 * width))), fontsize=8)
    return figure


def _scale(axes: Axes, dataset: str, drawn: Sequence[CsvRow]) -> None:
    """Scale the y axis, which all panels share, with room for the numbers."""
    top = min(max(row["ppl"] + (row["perplexity_se"] or 0.0) for row in drawn), _LARGEST)
    name = textwrap.shorten(dataset, 40, placeholder="…")
    if top / min(row["ppl"] for row in drawn) < _LOG_RATIO:
        axes.set_ylim(0, 1.12 * top)
        axes.set_ylabel(f"PPL ({name})", parse_math=False)
        return
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    # matplotlib's own labels are formulas, which the house style prints as they stand
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}" if tick < 1e5 else f"{tick:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    # of 1, the least there can be: the length of a bar is then the mean loss
    axes.set_ylim(1, top**1.12)
    axes.set_ylabel(f"PPL ({name}), logarithmic axis", parse_math=False)


def _colours(tags: Sequence[str]) -> dict[str, str]:
    unknown = [tag for tag in dict.fromkeys(tags) if tag not in COLOURS]
    return COLOURS | {tag: _unknown_colour(at) for at, tag in enumerate(unknown)}


def _unknown_colour(at: int) -> str:
    """One of an endless row of colours, paler than the known ones: hues by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb((0.05 + at * 0.618034) % 1.0, 0.4, 0.85 - 0.2 * (at % 2))
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _draw(axes: Axes, bars: Mapping[str, CsvRow], colours: Mapping[str, str]) -> None:
    """Draw a panel's bars to the scale that its axes have."""
    top = axes.get_ylim()[1]
    within = [row["ppl"] <= _LARGEST for row in bars.values()]
    heights = [row["ppl"] if fits else top for row, fits in zip(bars.values(), within, strict=True)]
    # beyond the top is as good as any larger number, and is a place on the page
    errors = [min(row["perplexity_se"] or 0.0, 2 * top) for row in bars.values()]
    axes.bar(
        range(len(bars)),
        heights,
        color=[colours[quantization_tag(row)] for row in bars.values()],
        alpha=0.85,
        edgecolor="black",
    )
    known = [place for place, row in enumerate(bars.values()) if row["perplexity_se"] is not None and within[place]]
    if known:
        axes.errorbar(
            known,
            [heights[place] for place in known],
            yerr=[errors[place] for place in known],
            fmt="none",
            ecolor="black",
            capsize=4,
        )
    for place, row in enumerate(bars.values()):
        number = f"{row['ppl']:.2f}" if row["ppl"] < 1e5 else f"{row['ppl']:.3g}"
        common: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
        if within[place]:
            end = min(heights[place] + errors[place], _LARGEST)
            axes.annotate(number, (place, end), xytext=(0, 3), va="bottom", **common)
        else:
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
            axes.annotate(f"↑ {number}\noff scale", (place, top), xytext=(0, -4), va="top", bbox=paper, **common)
    axes.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_xlabel("quantization")
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.grid(axis="y", linestyle="--", alpha=0.3)
