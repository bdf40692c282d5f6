"""``pipeline_latency``: percentiles of the time to the first token and of the time per output token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.reporting.figure_style import three_digits

from .arms import PERCENTILES, Arm, Group, why_missing
from .draw import arm_axis, log_steps, opacity, panels_by_group, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = {"p50": "o", "p90": "D", "p99": "s"}


def draw_latency(groups: Sequence[Group], run: Mapping[str, Any]) -> Figure:
    """Percentiles on one line an arm, and the limits that goodput is counted by."""
    missing = {
        which
        for group in groups
        for arm in group.arms
        for metric in ("ttft_s", "tpot_s")
        for which in PERCENTILES
        if arm.percentile(metric, which) is None
    }
    notes = ["Circle p50, diamond p90, square p99 over requests. Dashed: the limit of goodput."]
    notes += [
        f"No {which} where there are fewer than {PERCENTILES[which]} requests: it would be the largest one."
        for which in PERCENTILES
        if which in missing
    ]
    return panels_by_group(groups, run, title="Latency of requests by variant", draw=_draw, notes=notes)


def _draw(panels: Sequence[Axes], group: Group) -> None:
    limits = group.slo or (None, None)
    _lines(panels[0], group.arms, "ttft_s", 1.0, "TTFT from the scheduled arrival", "seconds", limits[0])
    _lines(panels[1], group.arms, "tpot_s", 1e3, "TPOT, mean of a request", "milliseconds", limits[1], labels=False)


def _lines(
    axes: Axes,
    arms: Sequence[Arm],
    metric: str,
    scale: float,
    title: str,
    unit: str,
    limit: float | None,
    *,
    labels: bool = True,
) -> None:
    axes.set_title(f"{title} (lower is better)")
    found = {
        arm.label: {w: number for w in PERCENTILES if (number := arm.percentile(metric, w, scale)) is not None}
        for arm in arms
    }
    if not any(found.values()):
        say(axes, why_missing(arms, metric.removesuffix("_s") + "_p50_s"))
        return
    for place, arm in enumerate(arms):
        numbers = found[arm.label]
        if not numbers:
            axes.annotate("n/a", (0.01, place), xycoords=axes.get_yaxis_transform(), va="center", fontsize=9)
            continue
        axes.plot(
            [min(numbers.values()), max(numbers.values())],
            [place, place],
            color=arm.colour,
            linewidth=2.5,
            alpha=opacity(arm),
        )
        for which, number in numbers.items():
            axes.plot(
                number,
                place,
                _MARKERS[which],
                color=arm.colour,
                markeredgecolor="black",
                markersize=7,
                alpha=opacity(arm),
            )
        highest = max(numbers.values())
        ends = [three_digits(number) for number in (min(numbers.values()), highest)]
        axes.annotate(
            " … ".join(dict.fromkeys(ends)), (highest, place), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.set_xscale("log")
    every = [number for numbers in found.values() for number in numbers.values()] + ([limit * scale] if limit else [])
    low, high = min(every), max(every)
    # room for the numbers at the right
    axes.set_xlim(low / 1.15, high * max(1.15, (high / low) ** 0.35 * 1.1))
    axes.set_xlabel(f"{unit}, logarithmic")
    _plain_ticks(axes)
    if limit:
        axes.axvline(limit * scale, linestyle="--", color="black", linewidth=1, zorder=0)
    arm_axis(axes, arms, labels=labels)
    axes.grid(axis="x", which="both", linestyle="--", alpha=0.3)


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=log_steps(low, high)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
