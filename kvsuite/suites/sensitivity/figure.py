"""``sensitivity``: what each layer's keys and values lose alone, and mixed assignments beside uniform formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.foreign_text import visible
from kvsuite.reporting.aggregate import Row, suite_rows, value
from kvsuite.reporting.figure_style import GREY, RED, figure_bytes, house_style

from .assignment import KEYS, SIDES
from .cases import LAYER, MIXED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "sensitivity"
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf")


def render_sensitivity(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, bytes]:
    """``sensitivity.png`` and ``.svg`` as bytes by name; none of runs without divergences.

    Raises
    ------
    UserError
        If no row is of the suite.
    """
    if not any(value(row, "kld") for row in suite_rows(rows, "sensitivity")):
        return {}
    figure = build_sensitivity(run, rows)
    return {f"{NAME}.{kind}": figure_bytes(figure, kind, dpi=200) for kind in ("png", "svg")}


def build_sensitivity(run: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Build the figure from rows alone.

    Left: KL divergence of each layer's keys and of its values alone in a format (log scale, one standard error), by layer.
    Right: KL divergence over bits an element; the line are the mixed assignments, marks with names uniform formats.

    Raises
    ------
    UserError
        If no row is of the suite.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    compared = [row for row in suite_rows(rows, "sensitivity") if value(row, "kld")]
    case = compared[0]["case"]
    with house_style():
        figure = Figure(figsize=(15, 6.5), layout="constrained")
        figure.suptitle("Which layer's keys and values can do with fewer bits", fontsize=15, fontweight="bold")
        left, right = figure.subplots(1, 2)
        left.set_title("One layer's keys or values alone, all others in the model's dtype", fontsize=11)
        right.set_title("Mixed assignments beside one format for all layers", fontsize=11)
        _draw_layers(left, [row for row in compared if row["case"]["params"]["kind"] == LAYER])
        _draw_pareto(right, [row for row in compared if row["case"]["params"]["kind"] != LAYER])
        for axes in (left, right):
            axes.set_yscale("log")
            # powers would be mathematical text, which the house style leaves as it is
            axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(linestyle="--", alpha=0.3)
            axes.set_ylabel("KL divergence from the full cache, nats a token (log)")
        facts = (
            f"{visible(case['model'])}, {case['dtype']}, {case['device']}, {case['workload']['max_tokens']} tokens. Whiskers: "
            f"1 standard error. Run {run.get('run_id')}, kvsuite {run.get('kvsuite_version')}."
        )
        figure.text(0.01, -0.01, facts, ha="left", va="top", fontsize=9)
    return figure


def _draw_layers(axes: Axes, rows: Sequence[Row]) -> None:
    formats = list(dict.fromkeys(str(row["case"]["params"]["format"]) for row in rows))
    lines = [(chosen, side) for chosen in formats for side in SIDES]
    for number, (chosen, side) in enumerate(lines):
        own = [
            row for row in rows if (row["case"]["params"]["format"], row["case"]["params"]["side"]) == (chosen, side)
        ]
        if own:
            axes.errorbar(
                [int(row["case"]["params"]["layer"]) for row in own], [value(row, "kld") or 0.0 for row in own],
                yerr=[value(row, "kld_se") or 0.0 for row in own], color=_COLOURS[number % len(_COLOURS)],
                fmt="o-" if side == KEYS else "s--", markersize=5, linewidth=1.2, capsize=2, elinewidth=1,
                label=f"{side} in {visible(chosen)}",
            )  # fmt: skip
    axes.set_xlabel("layer")
    if lines:
        axes.legend(fontsize=9, frameon=False)


def _draw_pareto(axes: Axes, rows: Sequence[Row]) -> None:
    def at(row: Row) -> tuple[float, float, float]:
        return value(row, "kv_bits") or 0.0, value(row, "kld") or 0.0, value(row, "kld_se") or 0.0

    mixed = sorted((row for row in rows if row["case"]["params"]["kind"] == MIXED), key=at)
    sizes = [at(row)[0] for row in rows]
    for row in rows:
        if row not in mixed:
            bits, kld, error = at(row)
            axes.errorbar(
                [bits], [kld], yerr=[error], fmt="D", color=GREY, markeredgecolor="black", capsize=3, zorder=2
            )
            # a name at the right edge reaches to the left, where there is room
            is_right = bits > 0.3 * min(sizes) + 0.7 * max(sizes)
            axes.annotate(
                visible(row["case"]["name"]), (bits, kld), xytext=(-7 if is_right else 7, 5), textcoords="offset points",
                ha="right" if is_right else "left", fontsize=9,
            )  # fmt: skip
    if mixed:
        points = list(map(at, mixed))
        axes.errorbar(
            [bits for bits, _, _ in points], [kld for _, kld, _ in points], yerr=[error for _, _, error in points],
            fmt="o-", color=RED, markeredgecolor="black", capsize=3, zorder=3, label="mixed by layer, under a budget",
        )  # fmt: skip
        axes.legend(fontsize=9, frameon=False)
    axes.margins(x=0.12)
    axes.set_xlabel("bits an element of keys and values, scales included")
