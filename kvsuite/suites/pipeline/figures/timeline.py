"""``pipeline_timeline``: the course of a run, that a person can follow: requests, lanes, what ran and waited, decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvsuite.reporting.figure_style import BLUE, GREEN, RED, house_style, three_digits

from .arms import Arm, Group, marks_of
from .course import Course, decided
from .draw import Footer, settle, which_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: runs below each other, requests and decisions of each that are drawn
MOST_RUNS, MOST_REQUESTS, MOST_DECISIONS = 3, 32, 12
_WIDTH = 13.2
_QUEUED, _BOTH = "#dddddd", "#e67e22"
_KINDS = {"prompt": BLUE, "decode": GREEN, "both": _BOTH}
_LANES = {"both": "one stream", "prompt": "prompt lane", "decode": "decode lane"}


@dataclass(frozen=True)
class ArmCourse:
    """An arm and the course of its first timed round."""

    arm: Arm
    course: Course


def courses_of(group: Group) -> list[ArmCourse]:
    """Arms of a group whose records tell their course."""
    found = [(arm, Course.of(arm.row["samples"])) for arm in group.arms]
    return [ArmCourse(arm, course) for arm, course in found if course is not None]


def draw_timeline(groups: Sequence[Group], run: Mapping[str, Any]) -> Figure | str:
    """The first timed round of the baseline, of the fastest arm and of one with two lanes or decisions, on one axis of time.

    Of the first group whose records tell requests and steps; or why there is nothing to draw.
    """
    found = {group.title: courses_of(group) for group in groups}
    group = next((group for group in groups if found[group.title]), None)
    if group is None:
        return "timeline: no record tells requests and steps"
    from matplotlib.figure import Figure

    runs = chosen(found[group.title])
    end = max(one.course.end_s for one in runs)
    heights = [height for one in runs for height in _heights(one.course)]
    lines = [group.title, *marks_of([one.arm for one in runs]), *_notes(runs), which_run(run)]
    with house_style():
        footer = Footer(_legend(), lines, _WIDTH)
        figure = Figure(figsize=(_WIDTH, sum(heights) + 0.55 * len(runs) + footer.height + 0.4), layout="constrained")
        figure.suptitle("Course of a run", fontsize=14, fontweight="bold")
        ratios = [sum(heights) + 0.55 * len(runs), footer.height]
        upper, lower = figure.subfigures(2, 1, height_ratios=ratios, squeeze=False)[:, 0]
        panels = list(upper.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
        for place, one in enumerate(runs):
            _draw(panels[3 * place : 3 * place + 3], one, end)
        footer.draw(lower)
        settle(figure)
    return figure


def chosen(runs: Sequence[ArmCourse]) -> list[ArmCourse]:
    """Runs that are worth a look, at most `MOST_RUNS`, in their order."""
    by_speed = sorted(runs, key=lambda one: -(one.arm.value("output_tok_s") or 0.0))
    wanted = [
        *[one for one in runs if one.arm.variant == "baseline"][:1],
        *[one for one in by_speed if one.arm.variant != "baseline"][:1],
        *[one for one in runs if one.course.decisions][:1],
        *[one for one in runs if "prompt" in one.course.lanes][:1],
        *runs,
    ]
    kept = list(dict.fromkeys(one.arm.label for one in wanted))[:MOST_RUNS]
    return [one for one in runs if one.arm.label in kept]


def _shown(course: Course) -> Sequence[Mapping[str, Any]]:
    """Requests that are drawn: the first ones by arrival."""
    return sorted(course.requests, key=lambda one: float(one["arrival_s"]))[:MOST_REQUESTS]


def _lanes(course: Course) -> list[str]:
    return [lane for lane in _LANES if lane in course.lanes]


def _heights(course: Course) -> list[float]:
    """Of requests, lanes and state, in inches."""
    return [0.3 + 0.15 * len(_shown(course)), 0.25 + 0.3 * len(_lanes(course)), 1.2]


def _draw(panels: Sequence[Axes], one: ArmCourse, end: float) -> None:
    requests, lanes, state = panels
    course, shown = one.course, one.course.decisions[:MOST_DECISIONS]
    _draw_requests(requests, course)
    _draw_lanes(lanes, course)
    _draw_state(state, one)
    for number, decision in enumerate(shown, 1):
        for axes in panels:
            axes.axvline(decision["time_s"], color="black", linestyle=":", linewidth=1)
        requests.annotate(
            str(number), (decision["time_s"], 1.0), xycoords=requests.get_xaxis_transform(), xytext=(0, 2),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
    requests.set_title(_headline(one), fontsize=11, pad=12 if shown else 6)
    state.tick_params(labelbottom=True)
    state.set_xlim(0, 1.01 * end)
    state.set_xlabel("seconds from the start")


def _headline(one: ArmCourse) -> str:
    speed = one.arm.value("output_tok_s")
    done = f"the last token after {three_digits(one.course.end_s)} s"
    return f"{one.arm.label}: {done}" + (
        f", {three_digits(speed)} output tokens / s (median of the rounds)" if speed else ""
    )


def _draw_requests(axes: Axes, course: Course) -> None:
    shown = _shown(course)
    for place, one in enumerate(shown):
        arrival, admitted, last = one["arrival_s"], one["admitted_s"], one["end_s"]
        first = arrival + one["ttft_s"]
        for start, stop, colour in ((arrival, admitted, _QUEUED), (admitted, first, BLUE), (first, last, GREEN)):
            axes.broken_barh([(start, stop - start)], (place - 0.4, 0.8), color=colour)
        axes.plot(arrival, place, "|", color="black", markersize=7)
        if one["preemptions"]:
            text = "preempted" + (f" {one['preemptions']}x" if one["preemptions"] > 1 else "")
            axes.annotate(
                text, (last, place), xytext=(-4, 0), textcoords="offset points", ha="right", va="center", fontsize=7
            )
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("requests")


def _draw_lanes(axes: Axes, course: Course) -> None:
    lanes = _lanes(course)
    for place, lane in enumerate(lanes):
        for kind, colour in _KINDS.items():
            spans = [span for span in course.spans if span.lane == lane and span.kind == kind]
            bars = [(span.start_s, span.end_s - span.start_s) for span in spans]
            axes.broken_barh(bars, (place - 0.4, 0.8), color=colour, linewidth=0)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(lanes)), [_LANES[lane] for lane in lanes])


def _draw_state(axes: Axes, one: ArmCourse) -> None:
    from matplotlib.ticker import MaxNLocator

    state = one.course.state
    times, running, waiting, used = (
        list(column) for column in zip(*state, (one.course.end_s, *state[-1][1:]), strict=True)
    )
    axes.step(times, running, "-", where="post", color="black", linewidth=1.2)
    # on top: both lines are often at 0, or at the same number
    axes.step(times, waiting, "--", where="post", color=RED, linewidth=1.4, zorder=3)
    axes.set_ylabel("requests")
    axes.set_ylim(0, 1.1 * max([1, *running, *waiting]))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(axis="y", linestyle="--", alpha=0.3)
    pool = (one.arm.params.get("serving") or {}).get("pool_blocks")
    beside = axes.twinx()
    beside.fill_between(times, used, step="post", color=BLUE, alpha=0.25, linewidth=0)
    beside.set_ylim(0, 1.1 * (pool or max([1, *used])))
    beside.set_ylabel("blocks")
    if pool:
        beside.axhline(pool, color=BLUE, linewidth=0.8, linestyle=":")


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], linestyle="none", marker="|", color="black", label="arrival"),
        Patch(facecolor=_QUEUED, label="waits"),
        Patch(facecolor=BLUE, label="prompt"),
        Patch(facecolor=GREEN, label="decodes"),
        Patch(facecolor=_BOTH, label="step with both"),
        Line2D([], [], color="black", label="running"),
        Line2D([], [], color=RED, linestyle="--", label="waiting"),
        Patch(facecolor=BLUE, alpha=0.25, label="blocks in use (dotted: the pool)"),
    ]


def _notes(runs: Sequence[ArmCourse]) -> list[str]:
    lines = [
        "The first timed round. All runs have one axis of time, which ends with the slowest. Running, waiting and blocks are "
        "those of each step, from its start to its end."
    ]
    for one in runs:
        left_out = len(one.course.requests) - len(_shown(one.course))
        parts = [f"{left_out} later requests are not drawn"] * (left_out > 0)
        parts += [
            f"decision {number} at {decision['time_s']:.2f} s: "
            + ", ".join(f"{name} {value}" for name, value in decided(decision).items())
            for number, decision in enumerate(one.course.decisions[:MOST_DECISIONS], 1)
        ]
        more = len(one.course.decisions) - MOST_DECISIONS
        parts += [f"{more} later decisions are not drawn"] * (more > 0)
        if parts:
            lines.append(f"{one.arm.label}: {'; '.join(parts)}.")
    return lines
