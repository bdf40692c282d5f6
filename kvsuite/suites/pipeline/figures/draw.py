"""What the figures of the pipeline suite have in common: one row of panels a group, horizontal bars, captions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.reporting.figure_style import house_style

from .arms import COLOURS, Arm, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
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
    legend: bool = True,
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
    legend
        Whether the colours of variants are explained.
    """
    from matplotlib.figure import Figure

    shown = groups[:MOST_GROUPS]
    inches = [heights(group) if heights else 1.2 + 0.34 * len(group.arms) for group in shown]
    with house_style():
        # a line of the suptitle, of the legend and of each group's title beside the panels
        figure = Figure(figsize=(6.6 * columns, sum(inches) + 0.6 * len(shown) + 1.0), layout="constrained")
        figure.suptitle(title, fontsize=14, fontweight="bold")
        rows = figure.subfigures(len(shown), 1, height_ratios=[height + 0.6 for height in inches], squeeze=False)[:, 0]
        for part, group in zip(rows, shown, strict=True):
            part.suptitle("\n".join(textwrap.wrap(group.title, 62 * columns)), fontsize=10)
            draw(list(part.subplots(1, columns, squeeze=False)[0]), group)
        if legend:
            handles = _legend([arm for group in shown for arm in group.arms])
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
        lines = [*notes, *_unfinished(groups), *_left_out(groups)]
        lines.append(f"Run {run.get('run_id')}, kvsuite {run.get('kvsuite_version')}.")
        wrapped = [part for line in lines for part in textwrap.wrap(line, 88 * columns)]
        figure.text(0.01, -0.01, "\n".join(wrapped), ha="left", va="top", fontsize=9)
    return figure


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


def _legend(arms: Sequence[Arm]) -> list[Patch]:
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
