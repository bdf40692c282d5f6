"""``pipeline_timeline``: the course of a run, that a person can follow: requests, lanes, what ran and waited, decisions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.reporting.figure_style import BLUE, GREEN, house_style

from ..timeline import TIMELINE
from .arms import Arm, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: runs below each other, requests and decisions of each that are drawn
MOST_RUNS, MOST_REQUESTS, MOST_DECISIONS = 3, 32, 12
_QUEUED, _BOTH = "#dddddd", "#e67e22"
_KINDS = {"prompt": BLUE, "decode": GREEN, "both": _BOTH}
_LANES = {"both": "one stream", "prompt": "prompt lane", "decode": "decode lane"}


def draw_timeline(groups: Sequence[Group], run: Mapping[str, Any]) -> Figure | str:
    """The last round of the baseline, of the fastest arm and of one with two lanes or decisions, on one axis of time.

    Of the first group that has timelines; or why there is nothing to draw.
    """
    group = next((group for group in groups if any(_course(arm) for arm in group.arms)), None)
    if group is None:
        return "timeline: no record holds one"
    from matplotlib.figure import Figure

    arms = chosen(group.arms)
    end = max(_end(arm) for arm in arms)
    inches = [_heights(arm) for arm in arms]
    with house_style():
        figure = Figure(figsize=(13.2, sum(map(sum, inches)) + 0.75 * len(arms) + 1.2), layout="constrained")
        figure.suptitle("Course of a run", fontsize=14, fontweight="bold")
        parts = figure.subfigures(len(arms), 1, height_ratios=[sum(each) + 0.75 for each in inches], squeeze=False)[
            :, 0
        ]
        for part, arm, heights in zip(parts, arms, inches, strict=True):
            part.suptitle(arm.label, fontsize=11, fontweight="bold")
            panels = part.subplots(3, 1, sharex=True, height_ratios=heights)
            _draw(list(panels), arm, end)
        figure.legend(handles=_legend(), loc="outside lower center", ncols=6, frameon=False)
        lines = [group.title, *_notes(arms), f"Run {run.get('run_id')}, kvsuite {run.get('kvsuite_version')}."]
        figure.text(
            0.01,
            -0.01,
            "\n".join(part for line in lines for part in textwrap.wrap(line, 176)),
            ha="left",
            va="top",
            fontsize=9,
        )
    return figure


def chosen(arms: Sequence[Arm]) -> list[Arm]:
    """The arms whose course is worth a look, at most `MOST_RUNS`, in their order."""
    with_course = [arm for arm in arms if _course(arm)]
    by_speed = sorted(with_course, key=lambda arm: -(arm.value("output_tok_s") or 0.0))
    wanted = [
        *[arm for arm in with_course if arm.variant == "baseline"][:1],
        *[arm for arm in by_speed if arm.variant != "baseline"][:1],
        *[arm for arm in with_course if _course(arm)["decisions"]][:1],
        *[arm for arm in with_course if "prompt" in _course(arm)["spans"]["lane"]][:1],
        *with_course,
    ]
    kept = {arm.label for arm in list({arm.label: arm for arm in wanted}.values())[:MOST_RUNS]}
    return [arm for arm in with_course if arm.label in kept]


def _course(arm: Arm) -> Mapping[str, Any]:
    found: Mapping[str, Any] = arm.row["samples"].get(TIMELINE) or {}
    return found


def _end(arm: Arm) -> float:
    course = _course(arm)
    return float(course["until_s"] or course["end_s"])


def _shown(arm: Arm) -> list[int]:
    """Requests that are drawn: the first ones by arrival."""
    arrivals = _course(arm)["requests"]["arrival_s"]
    return sorted(range(len(arrivals)), key=arrivals.__getitem__)[:MOST_REQUESTS]


def _lanes(arm: Arm) -> list[str]:
    there = set(_course(arm)["spans"]["lane"])
    return [lane for lane in _LANES if lane in there]


def _heights(arm: Arm) -> list[float]:
    """Of requests, lanes and state, in inches."""
    return [0.3 + 0.15 * len(_shown(arm)), 0.25 + 0.3 * len(_lanes(arm)), 1.2]


def _draw(panels: Sequence[Axes], arm: Arm, end: float) -> None:
    requests, lanes, state = panels
    _draw_requests(requests, arm)
    _draw_lanes(lanes, arm)
    _draw_state(state, arm)
    for number, decision in enumerate(_decisions(arm), 1):
        for axes in panels:
            axes.axvline(decision["time_s"], color="black", linestyle=":", linewidth=1)
        requests.annotate(
            str(number), (decision["time_s"], 1.0), xycoords=requests.get_xaxis_transform(), xytext=(0, 2),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
    state.set_xlim(0, 1.01 * end)
    state.set_xlabel("seconds from the start")


def _draw_requests(axes: Axes, arm: Arm) -> None:
    found = _course(arm)["requests"]
    for place, index in enumerate(_shown(arm)):
        arrival, admitted, first, last = (
            found[name][index] for name in ("arrival_s", "admitted_s", "first_token_s", "last_token_s")
        )
        axes.broken_barh([(arrival, admitted - arrival)], (place - 0.4, 0.8), color=_QUEUED)
        if first is not None:
            axes.broken_barh([(admitted, first - admitted)], (place - 0.4, 0.8), color=BLUE)
            axes.broken_barh([(first, last - first)], (place - 0.4, 0.8), color=GREEN)
        axes.plot(arrival, place, "|", color="black", markersize=7)
        if found["preemptions"][index]:
            text = "preempted" + (f" {found['preemptions'][index]}x" if found["preemptions"][index] > 1 else "")
            axes.annotate(
                text, (last or admitted, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_ylim(len(_shown(arm)) - 0.4, -0.6)
    axes.set_yticks([])
    axes.set_ylabel("requests")


def _draw_lanes(axes: Axes, arm: Arm) -> None:
    spans, lanes = _course(arm)["spans"], _lanes(arm)
    for kind, colour in _KINDS.items():
        for place, lane in enumerate(lanes):
            bars = [
                (start, stop - start)
                for own, named, start, stop in zip(
                    spans["lane"], spans["kind"], spans["start_s"], spans["end_s"], strict=True
                )
                if own == lane and named == kind
            ]
            axes.broken_barh(bars, (place - 0.4, 0.8), color=colour)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_yticks(range(len(lanes)), [_LANES[lane] for lane in lanes])


def _draw_state(axes: Axes, arm: Arm) -> None:
    state = _course(arm)["state"]
    times, end = state["t_s"], _end(arm)
    for name, style in (("running", "-"), ("waiting", "--")):
        axes.step([0.0, *times, end], [0, *state[name], *state[name][-1:]][: len(times) + 2], style, where="post", color="black",
                  linewidth=1.2, label=name)  # fmt: skip
    axes.set_ylabel("requests")
    axes.set_ylim(0, 1.1 * max([1, *state["running"], *state["waiting"]]))
    axes.grid(axis="y", linestyle="--", alpha=0.3)
    pool = (arm.params.get("serving") or {}).get("pool_blocks")
    beside = axes.twinx()
    used = state["used_blocks"]
    beside.fill_between(
        [0.0, *times, end], [0, *used, *used[-1:]][: len(times) + 2], step="post", color=BLUE, alpha=0.25
    )
    beside.set_ylim(0, 1.1 * (pool or max([1, *used])))
    beside.set_ylabel("blocks")
    if pool:
        beside.axhline(pool, color=BLUE, linewidth=0.8, linestyle=":")


def _decisions(arm: Arm) -> list[Mapping[str, Any]]:
    """Decisions that changed something, the first ones."""
    found: list[Mapping[str, Any]] = []
    for decision in _course(arm)["decisions"]:
        if not found or _decided(decision) != _decided(found[-1]):
            found.append(decision)
    return found[:MOST_DECISIONS]


def _decided(decision: Mapping[str, Any]) -> Mapping[str, Any]:
    found = decision.get("decision", decision)
    return {name: value for name, value in found.items() if name not in ("time_s", "inputs", "counter", "reason")}


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
        Line2D([], [], color="black", linestyle="--", label="waiting"),
        Patch(facecolor=BLUE, alpha=0.25, label="blocks in use (dotted: the pool)"),
    ]


def _notes(arms: Sequence[Arm]) -> list[str]:
    lines = ["The last timed round. All runs have one axis of time, which ends with the slowest."]
    for arm in arms:
        course = _course(arm)
        left_out = len(course["requests"]["arrival_s"]) + course["requests_left_out"] - len(_shown(arm))
        parts = [f"{left_out} later requests are not drawn"] * (left_out > 0)
        parts += [f"steps are kept to {course['until_s']:.2f} s of {course['end_s']:.2f}"] * (
            course["until_s"] is not None
        )
        parts += [
            f"decision {number} at {decision['time_s']:.2f} s: "
            + ", ".join(f"{name} {value}" for name, value in _decided(decision).items())
            for number, decision in enumerate(_decisions(arm), 1)
        ]
        if parts:
            lines.append(f"{arm.label}: {'; '.join(parts)}.")
    return lines
