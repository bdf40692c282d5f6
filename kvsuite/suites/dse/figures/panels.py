"""Draws an arranged design-space figure: panels, points with their range, lines along live axes only, and what they mean."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kvsuite.reporting.figure_style import house_style
from kvsuite.suites.dse.columns import AXES

from .inert import MEASURED
from .points import QUANTITIES, written
from .series import TAG, WORDS, Cell, Layout, Series, short_tags, shown_setting

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#984ea3", "#e6ab02", "#e7298a", "#666666", "#17becf", "#8c564b", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
TRUNK = "#999999"
_WIDTH, _HEIGHT, _PANEL = 12.0, 6.0, (4.6, 3.3)
_LOG_RATIO = 12.0
_LOG_X_RATIO = 8.0
#: medians that differ by less than that share of the y axis look equal
_SAME = 0.004
#: half of the place of a setting on the x axis
_SLOT = 0.4


def draw(layout: Layout, title: str, captions: Sequence[str]) -> Figure:
    """Draw the figure.

    Every point is the median of its repeats, a vertical bar reaches from their smallest to their largest value, and dots are
    the repeats themselves. Settings of x stand side by side in their order, not to scale.

    Parameters
    ----------
    layout
        From `arrange`.
    title
        Without what is said of axes.
    captions
        Lines below the panels: sources, what the numbers are not.
    """
    from matplotlib.figure import Figure

    rows, cols = len(layout.rows), len(layout.cols)
    alone = rows == cols == 1
    size = (_WIDTH, _HEIGHT) if alone else (_PANEL[0] * cols + 3.2, _PANEL[1] * rows + 1.8)
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        width = int(size[0] * 14)
        figure.suptitle("\n".join(textwrap.wrap(title, int(size[0] * 8))), fontsize=13, fontweight="bold")
        grid = figure.subplots(rows, cols, squeeze=False, sharex=True, sharey=True)
        for axes_row, row in zip(grid, layout.rows, strict=True):
            for axes, col in zip(axes_row, layout.cols, strict=True):
                _panel(axes, layout, (row, col))
        for axes_row in grid:
            axes_row[0].set_ylabel(_y_label(layout))
        for axes in grid[-1]:
            axes.set_xlabel(_x_label(layout))
        _scale(grid[0][0], layout)
        figure.legend(
            handles=legend(layout),
            loc="outside right upper",
            fontsize=9,
            frameon=False,
            borderaxespad=0.2,
            labelspacing=0.6,
        )
        lines = [line for text in (*axis_captions(layout), *captions) for line in textwrap.wrap(text, width)]
        figure.supxlabel("\n".join(lines), fontsize=8, x=0.01, ha="left", parse_math=False)
    return figure


def _panel(axes: Axes, layout: Layout, cell: Cell) -> None:
    to_scale = layout.is_to_scale()
    places = {x: float(x) if to_scale else place for place, x in enumerate(layout.xs)}
    row, col = cell
    facts = [
        shown_setting(axis, setting) + (" (inert axis)" if layout.is_inert(axis) else "")
        for axis, setting in ((layout.row_axis, row), (layout.col_axis, col))
        if axis is not None
    ]
    axes.set_title(", ".join(facts), fontsize=10)
    for trunk in layout.trunks.get(cell, []):
        xs = sorted(trunk.points)
        axes.plot(
            [places[x] for x in xs],
            [trunk.spread(x).middle for x in xs],
            color=TRUNK,
            linewidth=1.0,
            linestyle=dash(layout, trunk),
            zorder=1,
            gid="trunk",
        )
    for series in layout.panels.get(cell, []):
        _series(axes, layout, cell, series, places)
    if not layout.panels.get(cell):
        axes.text(0.5, 0.5, "no such point", ha="center", va="center", color="#888888", transform=axes.transAxes)
    _x_axis(axes, layout, places)
    axes.grid(axis="y", linestyle="--", alpha=0.3)


def _x_axis(axes: Axes, layout: Layout, places: Mapping[int, float]) -> None:
    names = [written(layout.plan.x, x) for x in layout.xs]
    if layout.is_to_scale():
        if layout.xs[-1] / layout.xs[0] > _LOG_X_RATIO:
            axes.set_xscale("log", base=2)
            axes.set_xlim(layout.xs[0] / 1.2, layout.xs[-1] * 1.2)
        else:
            margin = 0.12 * max(layout.xs[-1] - layout.xs[0], 1)
            axes.set_xlim(layout.xs[0] - margin, layout.xs[-1] + margin)
        axes.set_xticks(layout.xs, names)
        axes.minorticks_off()
        return
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xticks(range(len(places)), names)
    for place in range(1, len(places)):
        axes.axvline(place - 0.5, color="#dddddd", linewidth=0.6, zorder=0)


def _series(axes: Axes, layout: Layout, cell: Cell, series: Series, places: Mapping[int, float]) -> None:
    to_scale = layout.is_to_scale()
    shift = 0.0 if to_scale else _shift(layout, series)
    hue, shape = colour(layout, series.hue), marker(layout, series.style)
    crowd = len(layout.slots)
    # equal lines lie on each other: the later ones are thinner
    below = _equals_after(layout, cell, series) if to_scale else 0
    xs = sorted(series.points)
    at = [places[x] + shift for x in xs]
    spreads = [series.spread(x) for x in xs]
    axes.vlines(at, [s.low for s in spreads], [s.high for s in spreads], color=hue, linewidth=1.2, zorder=2)
    dots = [(place, value) for place, x in zip(at, xs, strict=True) for r in series.points[x] for value in r.values]
    if any(len(series.points[x]) > 1 for x in xs) and max(s.high for s in spreads) > min(s.low for s in spreads):
        axes.plot(*zip(*dots, strict=True), linestyle="none", marker=".", markersize=3, alpha=0.25, color=hue, zorder=2)
    # hollow: the number is of a request that the prefix cache served
    cached = series.condition is not None and series.condition.cached is True
    size = min(_size(crowd) + 3 * below, 19)
    axes.plot(
        at,
        [s.middle for s in spreads],
        color=hue,
        marker=shape,
        markersize=size,
        markerfacecolor="white" if cached else hue,
        markeredgecolor=hue if cached else "white",
        markeredgewidth=1.0 if cached else 0.5,
        linestyle="none",
        zorder=3,
        gid="points",
    )
    # "off" is no number that a line could begin at
    joined = [place for place, x in enumerate(xs) if x >= 0] if series.joined else []
    if len(joined) > 1:
        axes.plot(
            [at[place] for place in joined],
            [spreads[place].middle for place in joined],
            color=hue,
            linestyle=dash(layout, series),
            linewidth=min(1.5 + 2.2 * below, 10),
            zorder=2.5,
            gid="line",
        )


def _equals_after(layout: Layout, cell: Cell, series: Series) -> int:
    """How many later series of the panel have the same medians, for an eye."""
    panel = layout.panels[cell]
    top = max(each.spread(x).high for each in panel for x in each.points)
    return sum(
        all(
            abs(series.spread(x).middle - each.spread(x).middle) < _SAME * top
            for x in series.points
            if x in each.points
        )
        for each in panel[panel.index(series) + 1 :]
    )


def _size(crowd: int) -> float:
    return 7.0 if crowd <= 6 else 5.0 if crowd <= 12 else 3.6


def _shift(layout: Layout, series: Series) -> float:
    """Where a series stands in the place of a setting, so that equal numbers stay visible."""
    count, index = len(layout.slots), layout.slots.index((series.hue, series.style))
    return 0.0 if count == 1 else min(_SLOT, 0.09 * count) * (2 * index / (count - 1) - 1)


def _scale(axes: Axes, layout: Layout) -> None:
    """Scale the y axis, which all panels share: from 0, or logarithmic where a linear one would hide the small numbers."""
    values = [
        v for panel in layout.panels.values() for s in panel for x in s.points for r in s.points[x] for v in r.values
    ]
    if min(values) > 0 and max(values) / min(values) > _LOG_RATIO:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    else:
        axes.set_ylim(0, 1.08 * max(values) or 1.0)


def _y_label(layout: Layout) -> str:
    values = [v for sample in layout.samples for v in sample.readings[layout.plan.quantity].values]
    is_log = min(values) > 0 and max(values) / min(values) > _LOG_RATIO
    return textwrap.fill(QUANTITIES[layout.plan.quantity].label, 34) + (",\nlogarithmic axis" if is_log else "")


def _x_label(layout: Layout) -> str:
    label = layout.plan.x
    if layout.is_inert(layout.plan.x):
        return f"{label}\ninert: points are not joined"
    return label


def colour(layout: Layout, hue: Any) -> str:
    """Colour of a tag or a setting."""
    return COLOURS[layout.hues.index(hue) % len(COLOURS)]


def marker(layout: Layout, style: int | None) -> str:
    """Marker of a setting."""
    return _MARKERS[layout.styles.index(style) % len(_MARKERS)]


def dash(layout: Layout, series: Series) -> Any:
    """Dash of what nothing else tells apart."""
    return _DASHES[layout.splits.index(series.split) % len(_DASHES)]


def legend(layout: Layout) -> list[Artist]:
    """What colours, markers and dashes mean, as handles of a legend."""
    from matplotlib.lines import Line2D

    plan, joined = layout.plan, [s.joined for panel in layout.panels.values() for s in panel]
    line: Literal["-", "none"] = "-" if any(joined) else "none"

    def heading(text: str) -> Line2D:
        return Line2D([], [], linestyle="none", label=textwrap.fill(text, 34))

    def inert(axis: str) -> str:
        return " (inert: not joined)" if axis in layout.inert else ""

    handles = [heading("model / quantization" if plan.hue == TAG else plan.hue + inert(plan.hue))]
    for hue in layout.hues:
        label = str(hue) if plan.hue == TAG else written(plan.hue, int(hue))
        # as its points are
        face = "white" if all(s.condition and s.condition.cached for s in _of_hue(layout, hue)) else colour(layout, hue)
        handles.append(
            Line2D(
                [],
                [],
                color=colour(layout, hue),
                marker="o",
                markerfacecolor=face,
                linestyle=line,
                label=_wrapped(label),
            )
        )
    if plan.style and layout.styles != [None]:
        handles.append(heading(plan.style + inert(plan.style)))
        handles += [
            Line2D(
                [], [], color="black", marker=marker(layout, style), linestyle="none", label=written(plan.style, style)
            )
            for style in layout.styles
            if style is not None
        ]
    if layout.split_axes:
        handles.append(heading("lines by " + ", ".join(layout.split_axes)))
        handles += [
            Line2D(
                [],
                [],
                color="black",
                linestyle=_DASHES[place % len(_DASHES)],
                label=", ".join(shown_setting(axis, part) for axis, part in zip(layout.split_axes, split, strict=True)),
            )
            for place, split in enumerate(layout.splits)
        ]
    if layout.trunks:
        handles.append(
            Line2D(
                [], [], color=TRUNK, linewidth=1.0, label=_wrapped("median of points that differ in inert axes alone")
            )
        )
    if any(s.condition and s.condition.cached for panel in layout.panels.values() for s in panel):
        handles.append(
            Line2D(
                [],
                [],
                color="black",
                marker="o",
                markerfacecolor="white",
                linestyle="none",
                label="hollow: last prompt\nfrom the prefix cache",
            )
        )
    if any(s.spread(x).high > s.spread(x).low for panel in layout.panels.values() for s in panel for x in s.points):
        handles.append(
            Line2D([], [], color="black", marker="|", markersize=14, linestyle="none", label="smallest to largest")
        )
    return [*handles]


def _of_hue(layout: Layout, hue: Any) -> list[Series]:
    return [series for panel in layout.panels.values() for series in panel if series.hue == hue]


def _wrapped(label: str) -> str:
    return "\n".join(part for line in label.split("\n") for part in textwrap.wrap(line, 36, subsequent_indent="  "))


def axis_captions(layout: Layout) -> list[str]:
    """What markers are, what was left out, and which axes are inert and why."""
    counts = [s.spread(x).count for panel in layout.panels.values() for s in panel for x in s.points]
    n = f"n = {min(counts)}" if min(counts) == max(counts) else f"n = {min(counts)} to {max(counts)}"
    captions = [f"Markers: median, {n} readings each."]
    if not layout.is_to_scale():
        captions[0] += f" Settings of {layout.plan.x} side by side, not to scale."
    if layout.plan.where:
        captions[0] += f" Drawn: {', '.join(layout.plan.where)}."
    return captions + [_inert_caption(layout, axis, layout.inert[axis]) for axis in AXES if axis in layout.inert]


def _inert_caption(layout: Layout, axis: str, reasons: dict[str, str]) -> str:
    """Say for which tags an axis is inert and why, tags of one reason together."""
    how = "its settings are pooled in each marker" if axis in layout.pooled else "its settings are not joined"
    if axis in (layout.row_axis, layout.col_axis):
        how = "its panels repeat each other"
    every = list(dict.fromkeys(sample.tag for sample in layout.samples))
    short = short_tags(every)
    by_reason: dict[str, list[str]] = {}
    for tag, reason in reasons.items():
        by_reason.setdefault(reason.partition(MEASURED)[0], []).append(short[tag])
    why = "; ".join(
        reason + ("" if len(tags) == len(every) else f" ({', '.join(tags)})") for reason, tags in by_reason.items()
    )
    changes = {short[tag]: reason.partition(MEASURED)[2] for tag, reason in reasons.items()}
    if len(set(changes.values())) == 1:
        changes = {"": next(iter(changes.values()))}
    moved = ", ".join(f"{tag} {change}".strip() for tag, change in changes.items() if change)
    return f"Inert: {WORDS[axis]}, {how}: {why}{f'. Measured, smallest to largest setting: {moved}' if moved else ''}."
