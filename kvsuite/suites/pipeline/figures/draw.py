"""What the figures of the pipeline suite have in common: one row of panels a group, horizontal bars, captions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kvsuite.reporting.figure_style import house_style

from .arms import COLOURS, Arm, Group, marks_of

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.patches import Patch

#: groups that one figure has room for, and arms that a panel has
MOST_GROUPS, MOST_ARMS = 6, 40
_DENSE_ALPHA, _ALPHA = 0.45, 0.9
#: draws a group into its row of panels
DrawGroup = Callable[[Sequence["Axes"], Group], None]


def panels_by_group(
    groups: Sequence[Group],
    run: Mapping[str, Any],
    *,
    title: str,
    draw: DrawGroup,
    columns: int = 2,
    notes: Iterable[str] = (),
    heights: Callable[[Group], float] | None = None,
) -> Figure:
    """Build a figure with a row of panels for each group, the first `MOST_GROUPS` of them.

    Parameters
    ----------
    groups
        With arms that finished, at least one.
    run
        The run line, for the caption.
    title
        Of the figure.
    draw
        Draws one group into ``columns`` panels.
    columns
        Panels of a group.
    notes
        Lines of the caption: what is drawn, and what is missing.
    heights
        Of a group's panels in inches; by itself as its arms need.
    """
    from matplotlib.figure import Figure

    shown = groups[:MOST_GROUPS]
    inches = [heights(group) if heights else 1.2 + 0.34 * len(group.arms) for group in shown]
    width = 9.0 if columns == 1 else 6.6 * columns
    arms = [arm for group in shown for arm in group.arms]
    lines = [*notes, *marks_of(arms), *_unfinished(groups), *_left_out(groups), which_run(run)]
    with house_style():
        footer = Footer(legend_of(arms), lines, width)
        figure = Figure(figsize=(width, sum(inches) + 0.7 * len(shown) + footer.height + 0.4), layout="constrained")
        figure.suptitle(title, fontsize=14, fontweight="bold")
        ratios = [*(height + 0.7 for height in inches), footer.height]
        *parts, below = figure.subfigures(len(shown) + 1, 1, height_ratios=ratios, squeeze=False)[:, 0]
        for part, group in zip(parts, shown, strict=True):
            part.suptitle("\n".join(textwrap.wrap(group.title, int(12 * width))), fontsize=10)
            draw(list(part.subplots(1, columns, squeeze=False)[0]), group)
        footer.draw(below)
        settle(figure)
        for part in parts:
            for axes in part.axes:
                spread_labels(axes)
    return figure


def settle(figure: Figure) -> None:
    """Lay the figure out, once and for all, at places that are the same in every run.

    The solver of matplotlib's layout differs in the last bits from one run to the next, and SVG names its clip paths by them.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(6))
        for axes in part.axes:
            axes.set_position(Bbox(axes.get_position().get_points().round(6)))


class Footer:
    """Legend and caption, in a part of the figure of their own.

    Parameters
    ----------
    handles
        Of the legend.
    lines
        Of the caption; wrapped here.
    width
        Of the figure in inches.
    """

    def __init__(self, handles: Sequence[Artist], lines: Iterable[str], width: float) -> None:
        self._handles = handles
        self._columns = max(1, min(len(handles), int(width / 1.9)))
        self._lines = [part for line in lines for part in textwrap.wrap(line, int(15.5 * width))]
        self._legend_height = 0.1 + 0.22 * -(-len(handles) // self._columns)
        #: in inches
        self.height = self._legend_height + 0.17 * len(self._lines) + 0.1

    def draw(self, part: SubFigure) -> None:
        """Draw into an empty part that is as high."""
        part.legend(handles=self._handles, loc="upper center", ncols=self._columns, frameon=False)
        top = 1 - self._legend_height / self.height
        part.text(0.01, top, "\n".join(self._lines), ha="left", va="top", fontsize=9)


#: offsets of a label from its point in points, and the side of the text that is there, best first
_PLACES: tuple[tuple[float, float, Literal["left", "right"]], ...] = (
    (8, 5, "left"), (8, -5, "left"), (-8, 5, "right"), (-8, -5, "right"), (8, 17, "left"), (8, -17, "left"), (-8, 17, "right"),
    (-8, -17, "right"), (8, 29, "left"), (8, -29, "left"), (-8, 29, "right"), (-8, -29, "right"), (8, 41, "left"),
    (8, -41, "left"),
)  # fmt: skip
#: marks the labels that `spread_labels` may move
POINT_LABEL = "point"


def spread_labels(axes: Axes) -> None:
    """Move the labels of points so that none lies on another, on a point, or outside; the figure has to be laid out."""
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    labels = [text for text in axes.texts if isinstance(text, Annotation) and text.get_gid() == POINT_LABEL]
    inside = axes.get_window_extent()
    points = [axes.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for label in labels:
        best = None
        for x, y, side in _PLACES:
            label.set_position((x, y))
            label.set_horizontalalignment(side)
            label.set_verticalalignment("center")
            box = label.get_window_extent()
            hits = sum(box.overlaps(other) for other in taken) + 3 * (
                box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            )
            if best is None or hits < best[0]:
                best = (hits, (x, y), side, box)
            if not hits:
                break
        assert best is not None
        label.set_position(best[1])
        label.set_horizontalalignment(best[2])
        taken.append(best[3])


def horizontal_bars(
    axes: Axes,
    arms: Sequence[Arm],
    numbers: Mapping[str, float],
    *,
    title: str,
    x_label: str,
    texts: Mapping[str, str],
    whiskers: Mapping[str, float] | None = None,
    labels: bool = True,
) -> None:
    """One bar for each arm, the first on top; an arm without a number says so.

    Parameters
    ----------
    axes
        To draw into.
    arms
        In the order of the bars.
    numbers, texts, whiskers
        By label of the arm: lengths, what stands at the end of the bar, and half a whisker's length.
    title, x_label
        Of the panel.
    labels
        Whether arms are named at the left.
    """
    axes.set_title(title)
    axes.set_xlabel(x_label)
    for place, arm in enumerate(arms):
        if arm.label not in numbers:
            axes.annotate("n/a", (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
            continue
        half = (whiskers or {}).get(arm.label)
        axes.barh(
            place, numbers[arm.label], height=0.7, color=arm.colour, alpha=opacity(arm), edgecolor="black",
            linewidth=0.8, xerr=half, error_kw={"capsize": 3, "elinewidth": 1},
        )  # fmt: skip
        axes.annotate(
            texts[arm.label], (numbers[arm.label] + (half or 0), place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    highest = max((number + (whiskers or {}).get(label, 0) for label, number in numbers.items()), default=0)
    axes.set_xlim(0, 1.32 * highest or 1)
    arm_axis(axes, arms, labels=labels)
    axes.grid(axis="x", linestyle="--", alpha=0.3)


def arm_axis(axes: Axes, arms: Sequence[Arm], *, labels: bool = True) -> None:
    """Arms on the y axis, the first on top."""
    names = [arm.label for arm in arms] if labels else [""] * len(arms)
    axes.set_yticks(range(len(arms)), names, parse_math=False)
    axes.set_ylim(len(arms) - 0.4, -0.6)


def opacity(arm: Arm) -> float:
    """Arms with full caches are paler than those that compress."""
    return _ALPHA if arm.compresses or arm.variant == "baseline" else _DENSE_ALPHA


def say(axes: Axes, text: str, *, width: int = 52) -> None:
    """Write why a panel is empty."""
    axes.text(
        0.5, 0.5, textwrap.fill(text, width), ha="center", va="center", fontsize=11, color="#444444",
        transform=axes.transAxes,
    )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])


def log_steps(low: float, high: float) -> tuple[float, ...]:
    """Which multiples of a power of ten are written on a logarithmic axis."""
    if high / low < 8:
        return (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    return (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)


def legend_of(arms: Sequence[Arm]) -> list[Patch]:
    """The variants that are there, and what a pale colour means."""
    from matplotlib.patches import Patch

    there = [arm.variant for arm in arms]
    found = [
        Patch(facecolor=colour, alpha=_ALPHA, edgecolor="black", label=variant)
        for variant, colour in COLOURS.items()
        if variant in there
    ]
    if any(opacity(arm) == _DENSE_ALPHA for arm in arms):
        found.append(Patch(facecolor="#888888", alpha=_DENSE_ALPHA, edgecolor="black", label="pale: full caches"))
    return found


def _unfinished(groups: Sequence[Group]) -> list[str]:
    lines = [line for group in groups for line in group.unfinished]
    return [f"Without numbers: {'; '.join(lines)}"] if lines else []


def _left_out(groups: Sequence[Group]) -> list[str]:
    names = [group.title for group in groups[MOST_GROUPS:]]
    return [f"Not shown, more than {MOST_GROUPS} groups: {'; '.join(names)}"] if names else []


def which_run(run: Mapping[str, Any]) -> str:
    """The last line of a caption."""
    return f"Run {run.get('run_id')}, kvsuite {run.get('kvsuite_version')}."
