"""All figures of the pipeline suite as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.reporting.aggregate import Row
from kvsuite.reporting.figure_style import figure_bytes

from .arms import Group, groups_of
from .draw import MOST_ARMS
from .latency import draw_latency
from .scatter import draw_front, draw_quality, draw_sm_share
from .throughput import draw_throughput
from .timeline import draw_timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DRAWINGS: dict[str, Callable[[Sequence[Group], Mapping[str, Any]], Figure | str]] = {
    "pipeline_throughput": draw_throughput,
    "pipeline_latency": draw_latency,
    "pipeline_front": draw_front,
    "pipeline_sm_share": draw_sm_share,
    "pipeline_quality": draw_quality,
    "pipeline_timeline": draw_timeline,
}


def pipeline_figures(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, bytes]:
    """Figures by file name, ``.png`` and ``.svg``; those for which the rows have nothing are left out.

    Groups with more than `MOST_ARMS` arms, whose labels nobody could read, are left out too.
    """
    groups = [group for group in groups_of(rows) if 0 < len(group.arms) <= MOST_ARMS]
    if not groups:
        return {}
    drawn = {name: draw(groups, run) for name, draw in _DRAWINGS.items()}
    return {
        f"{name}.{kind}": figure_bytes(figure, kind, dpi=150)
        for name, figure in drawn.items()
        if not isinstance(figure, str)
        for kind in ("png", "svg")
    }
