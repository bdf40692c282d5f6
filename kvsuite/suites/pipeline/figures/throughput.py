"""``pipeline_throughput``: output tokens a second and goodput of every variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.reporting.figure_style import fixed

from .arms import Arm, Group, interval, why_missing
from .draw import horizontal_bars, panels_by_group, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OUTPUT, _GOODPUT = "output_tok_s", "goodput_req_s"


def draw_throughput(groups: Sequence[Group], run: Mapping[str, Any]) -> Figure:
    """Bars of throughput, with how many times the baseline's it is, and of goodput."""
    return panels_by_group(
        groups,
        run,
        title="Throughput and goodput by variant",
        draw=_draw,
        notes=[
            "Output tokens alone, cached and prompt tokens are not counted; median of the rounds, whiskers half the 95 % "
            "interval of the mean. In brackets: in units of the baseline. Goodput: requests a second that meet both "
            "limits, TTFT from the scheduled arrival."
        ],
    )


def _draw(panels: Sequence[Axes], group: Group) -> None:
    _bars(panels[0], group.arms, _OUTPUT, "Output throughput (higher is better)", "output tokens / s")
    limits = group.arms[0].params.get("slo")
    title = f"Goodput at {limits} (TTFT : TPOT; higher is better)" if limits else "Goodput (higher is better)"
    _bars(panels[1], group.arms, _GOODPUT, title, "requests / s within the limits", labels=False)


def _bars(axes: Axes, arms: Sequence[Arm], metric: str, title: str, x_label: str, *, labels: bool = True) -> None:
    numbers = {arm.label: number for arm in arms if (number := arm.value(metric)) is not None}
    if not numbers:
        axes.set_title(title)
        say(axes, why_missing(arms, metric))
        return
    base = next((numbers.get(arm.label) for arm in arms if arm.variant == "baseline"), None)
    texts = {
        label: fixed(number, 1 if metric == _OUTPUT else 2) + (f"  ({number / base:.2f}x)" if base else "")
        for label, number in numbers.items()
    }
    found = {arm.label: half for arm in arms if (half := interval(arm, metric)) is not None}
    horizontal_bars(axes, arms, numbers, title=title, x_label=x_label, texts=texts, whiskers=found, labels=labels)
