"""``kv_divergence``: how far the predictions of each cache are from the full cache's, against its bytes, and the traps."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kvsuite.foreign_text import visible
from kvsuite.reporting.aggregate import MIB, Row, suite_rows, value
from kvsuite.reporting.figure_style import GREY, RED, figure_bytes, house_style

from .figure import MOST_CASES, subtitle
from .rows import TRAP_MARK, TRAP_MEANING, format_name, has_formats, is_baseline, is_full, is_trap_row, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Stroke = Literal["-", "--", "-.", ":"]
#: colour and stroke of a line
Style = tuple[str, Stroke]

NAME = "kv_divergence"
_LINES = (
    "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#003f5c", "#7a5195",
)  # fmt: skip
_MARKS = "os^Dv*PX<>hp"
_STROKES: tuple[Stroke, ...] = ("-", "--", "-.", ":")
# what the right panel shows linearly: nats, per cent
_SMALLEST_LOSS, _SMALLEST_SHARE = 0.01, 1.0
_RING: dict[str, Any] = {
    "marker": "o", "markersize": 16, "markerfacecolor": "none", "markeredgecolor": RED, "markeredgewidth": 1.8,
    "linestyle": "none",
}  # fmt: skip


def render_divergence(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, bytes]:
    """``kv_divergence.png`` and ``.svg`` as bytes by name; none of runs without divergences, or of too many cases.

    Raises
    ------
    UserError
        If no row is of the compression suite.
    """
    rows = suite_rows(rows, "compression")
    if len(rows) > MOST_CASES or not _compared(rows):
        return {}
    figure = build_divergence(run, rows)
    return {f"{NAME}.{kind}": figure_bytes(figure, kind, dpi=200) for kind in ("png", "svg")}


def build_divergence(run: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Build the figure from rows alone.

    Left: KL divergence from the full cache (log scale, nats) over the bytes of the cache, one standard error as a whisker. A
    line is a method: with number formats in the run all formats of a group, else all sizes of a policy. The mark is the
    format. A divergence of 0 stands at the lower edge. Right: difference of the mean loss (nats, two standard errors) over the
    share of tokens whose most likely one is another; the shaded part is where perplexity improves and nothing else does, and
    cases there have a ring and a sign in both panels.

    Raises
    ------
    UserError
        If no row is of the compression suite.
    """
    from matplotlib.figure import Figure

    rows = suite_rows(rows, "compression")
    compared = _compared(rows)
    methods = _methods(compared)
    styles = _styles(methods)
    marks = dict(zip(dict.fromkeys(map(format_name, compared)), itertools.cycle(_MARKS), strict=False))
    with house_style():
        figure = Figure(figsize=(16, 8), layout="constrained")
        figure.suptitle("Distance of each KV cache from the full one", fontsize=16, fontweight="bold")
        left, right = figure.subplots(1, 2)
        left.set_title("\n".join(textwrap.wrap(subtitle({row["id"]: row for row in compared}), 95)), fontsize=9)
        _draw_bytes(left, rows, methods, styles, marks)
        _draw_traps(right, methods, styles, marks)
        figure.legend(handles=_legend(styles, marks, compared), loc="outside right center", fontsize=9, frameon=False)
        figure.text(0.01, -0.01, _caption(run, rows, compared), ha="left", va="top", fontsize=9)
    return figure


def _compared(rows: Iterable[Row]) -> list[Row]:
    """Cases whose predictions were compared with the full cache's."""
    return [row for row in rows if value(row, "kld") is not None]


def _methods(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Cases by method: its name with what the settings of several have different, and its rows."""
    by_format = has_formats(rows)
    settings = {setting(row) for row in rows}
    differing = [index for index, facts in enumerate(zip(*settings, strict=True)) if len(set(facts)) > 1]
    found: dict[str, list[Row]] = {}
    for row in rows:
        stem = _group(row) if by_format else _policy(row)
        facts = [fact for index, fact in enumerate(setting(row)) if index in differing]
        found.setdefault(visible(" ".join([stem, *facts])), []).append(row)
    return found


def _group(row: Row) -> str:
    """The case without its number format."""
    return str(row["case"]["name"]).removesuffix(f"_{format_name(row)}")


def _policy(row: Row) -> str:
    """The policy with those of its parameters that are words, so that its sizes and ratios make one line."""
    case = row["case"]
    words = [str(one) for name, one in case["policy_params"].items() if isinstance(one, str) and name != "positions"]
    if case["policy_params"].get("positions") == "cache":
        words.append("poscache")
    return " ".join([str(case["policy"] or "full cache"), *words])


def _styles(methods: Mapping[str, Sequence[Row]]) -> dict[str, Style]:
    """Colour and stroke of each method's line: grey the full cache in a number format, others in turn."""
    turns = itertools.cycle((colour, stroke) for stroke in _STROKES for colour in _LINES)
    return {name: (GREY, "-") if all(map(is_full, rows)) else next(turns) for name, rows in methods.items()}


def _draw_bytes(
    axes: Axes,
    rows: Sequence[Row],
    methods: Mapping[str, Sequence[Row]],
    styles: Mapping[str, Style],
    marks: Mapping[str, str],
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sized = {name: [row for row in of if value(row, "kv_bytes_exact")] for name, of in methods.items()}
    positive = [kld for of in sized.values() for row in of if (kld := value(row, "kld"))]
    edge = min(positive, default=1e-6) / 3
    for name, of in sized.items():
        # of equal bytes the worse first, so that the line falls towards more of them
        of = sorted(of, key=lambda row: (_mebibytes(row), -(value(row, "kld") or 0.0)))
        colour, stroke = styles[name]
        heights = [max(value(row, "kld") or 0.0, edge) for row in of]
        axes.plot(list(map(_mebibytes, of)), heights, color=colour, linestyle=stroke, linewidth=1.3, zorder=2)
        for row, height in zip(of, heights, strict=True):
            # downwards no further than the edge: a logarithm has no zero
            error = value(row, "kld_se") or 0.0
            whisker = [[max(min(error, height - edge), 0.0)], [error]]
            _mark(axes, row, _mebibytes(row), height, whisker, colour, marks)
            if not value(row, "kld"):
                axes.annotate("0", (_mebibytes(row), height), xytext=(6, -3), textcoords="offset points", fontsize=9)
    for row in rows:
        if is_baseline(row) and value(row, "kv_bytes_exact"):
            axes.axvline(_mebibytes(row), color=GREY, linestyle="--", linewidth=1, zorder=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    top = max(positive, default=1e-5)
    axes.set_ylim(edge / 1.5 if len(positive) < sum(map(len, sized.values())) else edge * 1.5, top * 3)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    # plain numbers: powers would be mathematical text, which the house style leaves as it is
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("stored keys and values, MiB (log); dashed: full cache, model's dtype")
    axes.set_ylabel("KL divergence from the full cache, nats a token (log)")
    axes.grid(linestyle="--", alpha=0.3)


def _draw_traps(
    axes: Axes, methods: Mapping[str, Sequence[Row]], styles: Mapping[str, Style], marks: Mapping[str, str]
) -> None:
    from matplotlib.ticker import FuncFormatter

    for name, of in methods.items():
        for row in of:
            same, difference = value(row, "same_top1"), value(row, "nll_difference")
            if same is not None and difference is not None:
                error = 2 * (value(row, "nll_difference_se") or 0.0)
                _mark(axes, row, 100 * (1 - same), difference, [[error], [error]], styles[name][0], marks)
    # from the middle, where nothing differs, outwards: differences span three decades
    axes.set_xscale("symlog", linthresh=_SMALLEST_SHARE)
    axes.set_yscale("symlog", linthresh=_SMALLEST_LOSS)
    axes.set_xlim(left=-0.1)
    axes.set_ylim(min(axes.get_ylim()[0], -_SMALLEST_LOSS), max(axes.get_ylim()[1], _SMALLEST_LOSS))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhspan(axes.get_ylim()[0], 0, color=RED, alpha=0.08, zorder=0)
    axes.text(
        0.98, 0.02, "trap: perplexity is better, the most likely tokens are not the same", transform=axes.transAxes,
        ha="right", va="bottom", fontsize=9, color=RED,
    )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:+g}" if number else "0"))
    axes.set_xlabel("tokens with another most likely one than the full cache's, % (linear below 1)")
    axes.set_ylabel("mean loss - full cache's, nats (linear within ±0.01)")
    axes.set_title("What perplexity says, and what changes", fontsize=11)
    axes.grid(linestyle="--", alpha=0.3)


def _mark(
    axes: Axes,
    row: Row,
    x: float,
    y: float,
    whisker: Sequence[Sequence[float]],
    colour: str,
    marks: Mapping[str, str],
) -> None:
    axes.errorbar(
        [x], [y], yerr=whisker, fmt=marks[format_name(row)], color=colour, ecolor=colour, markeredgecolor="black",
        markersize=8, capsize=3, elinewidth=1, zorder=3,
    )  # fmt: skip
    if is_trap_row(row):
        axes.plot([x], [y], **_RING, zorder=4)
        axes.annotate(
            TRAP_MARK, (x, y), xytext=(9, 4), textcoords="offset points", fontsize=13, color=RED, fontweight="bold"
        )


def _mebibytes(row: Row) -> float:
    return (value(row, "kv_bytes_exact") or 0.0) / MIB


def _legend(styles: Mapping[str, Style], marks: Mapping[str, str], compared: Sequence[Row]) -> list[Line2D]:
    """Methods by their lines, then formats by their marks, then what a ring means where there is one."""
    from matplotlib.lines import Line2D

    found = [
        Line2D([], [], color=colour, linestyle=stroke, linewidth=2, label=name)
        for name, (colour, stroke) in styles.items()
    ]
    if has_formats(compared):
        found += [
            Line2D(
                [], [], color="white", marker=mark, markeredgecolor="black", markersize=8, linestyle="none", label=name
            )
            for name, mark in marks.items()
        ]
    if any(map(is_trap_row, compared)):
        found.append(Line2D([], [], **_RING, label=f"{TRAP_MARK} trap"))
    return found


def _caption(run: Mapping[str, Any], rows: Sequence[Row], compared: Sequence[Row]) -> str:
    """What marks and whiskers are, what is not drawn, and the run."""
    lines = [
        "Whiskers: 1 standard error (KL divergence, a lower bound), 2 paired standard errors (loss). A KL divergence of 0 "
        f"stands at the lower edge. Run {run.get('run_id')}, kvsuite {run.get('kvsuite_version')}.",
        *([TRAP_MEANING] if any(map(is_trap_row, compared)) else []),
    ]
    left_out = [visible(row["case"]["name"]) for row in rows if row not in compared and not is_baseline(row)]
    if left_out:
        lines.append(textwrap.fill(f"Not drawn, without a KL divergence: {', '.join(left_out)}", 200))
    return "\n".join(lines)
