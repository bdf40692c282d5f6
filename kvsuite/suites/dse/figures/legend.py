"""Colours, markers and dashes of a design-space figure, and the words around its panels."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Literal

from kvsuite.suites.dse.columns import AXES

from .inert import MEASURED
from .points import written
from .series import TAG, WORDS, Layout, Series, short_tags, shown_setting

if TYPE_CHECKING:
    from matplotlib.artist import Artist

COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#984ea3", "#e6ab02", "#e7298a", "#666666", "#17becf", "#8c564b", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
TRUNK = "#999999"


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
