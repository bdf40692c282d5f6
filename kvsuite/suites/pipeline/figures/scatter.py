"""Figures of points: the front of latencies, the share of the SMs, and quality against throughput."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .arms import PERCENTILES, Arm, Group, highest_percentile, why_missing
from .draw import POINT_LABEL, log_steps, opacity, panels_by_group, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
_MARKERS = {"chunked": "s", "streams-only": "^", "greenctx-only": "D", "auto-tune+greenctx": "P", "triad": "X"}
_MARKS = {
    "chunked": "squares: chunks",
    "streams-only": "triangles: two streams",
    "greenctx-only": "diamonds: partitions",
    "auto-tune+greenctx": "pluses: a controller chooses the partition",
    "triad": "crosses: it chooses between prompts and decoding too",
}


def draw_front(groups: Sequence[Group], run: Mapping[str, Any]) -> Figure:
    """TTFT against gaps between tokens, at the highest percentile that all arms have: who is beaten in both by nobody."""
    notes = [_marks_said([arm for group in groups for arm in group.arms])]
    for group in groups:
        which = highest_percentile(group.arms, "ttft_s", "itl_s")
        if which not in (None, "p99"):
            notes.append(f"{which} in the place of p99, for which {PERCENTILES['p99']} requests are needed.")
            break
    return panels_by_group(
        groups, run, title="Time to the first token against gaps between tokens", draw=_front, columns=1,
        notes=notes, heights=lambda group: 5.5,
    )  # fmt: skip


def _marks_said(arms: Sequence[Arm]) -> str:
    """What is marked how, of the marks that there are."""
    said = "Lower left is better. The black steps join the arms that no other arm beats in both"
    if any(_kind(arm) is not None for arm in arms):
        said += "; chunk sizes and partitions of the same kind are joined by a line"
    marks = [words for variant, words in _MARKS.items() if any(arm.variant == variant for arm in arms)]
    if any(not arm.compresses and arm.variant != "baseline" for arm in arms):
        marks.append("pale: full caches")
    found = "; ".join(marks)
    return f"{said}. {found[0].upper()}{found[1:]}." if found else f"{said}."


def draw_quality(groups: Sequence[Group], run: Mapping[str, Any]) -> Figure | str:
    """KL divergence of what was served from the full cache's against throughput; or why there is nothing to draw."""
    shown = [group for group in groups if any(arm.value("served_kld") is not None for arm in group.arms)]
    if not shown:
        return "quality against throughput: " + why_missing(groups[0].arms, "served_kld")
    notes = [
        "KL divergence of the served continuation from the full cache's, forced tokens through the same pool and arrivals: 0 "
        "is the same distribution. Upper left is better. Factors of one policy and variant are joined by a line."
    ]
    return panels_by_group(
        shown, run, title="Quality against throughput", draw=_quality, columns=1, notes=notes, heights=lambda group: 5.0
    )


def draw_sm_share(groups: Sequence[Group], run: Mapping[str, Any]) -> Figure | str:
    """Throughput and latencies against the SMs of the decode lane; or why there is nothing to draw."""
    shown = [
        replace(
            group, arms=tuple(arm for arm in group.arms if arm.decode_sms is not None or arm.variant == "streams-only")
        )
        for group in groups
        if len({arm.decode_sms for arm in group.arms} - {None}) > 1
    ]
    if not shown:
        return "SM shares: needs at least two partitions that were realised, without a controller"
    notes = [
        "SMs that the driver gave to the decode lane; labels have those of both lanes. Dotted: two streams without any, "
        "where that was measured."
    ]
    return panels_by_group(
        shown, run, title="What a share of the SMs buys", draw=_sm_share, columns=3, notes=notes,
        heights=lambda group: 4.2,
    )  # fmt: skip


def pareto_front(points: Mapping[str, Point]) -> list[str]:
    """Names of points with which no other is level or lower in both, and lower in one, by the first number."""
    kept = [
        name
        for name, (x, y) in points.items()
        if not any(
            other_x <= x and other_y <= y and (other_x, other_y) != (x, y) for other_x, other_y in points.values()
        )
    ]
    return sorted(kept, key=points.__getitem__)


def _front(panels: Sequence[Axes], group: Group) -> None:
    (axes,) = panels
    which = highest_percentile(group.arms, "ttft_s", "itl_s")
    if which is None:
        say(axes, why_missing(group.arms, "itl_p50_s"))
        return
    points = _points(
        group.arms, lambda arm: arm.percentile("ttft_s", which), lambda arm: arm.percentile("itl_s", which, 1e3)
    )
    _lines(axes, group.arms, points, lambda arm: (arm.params.get("chunk") or 0, arm.decode_sms or 0), _kind)
    best = [points[name] for name in pareto_front(points)]
    if len(best) > 1:
        axes.step(*zip(*best, strict=True), where="post", color="black", linewidth=1.2, zorder=1)
    _scatter(axes, group.arms, points)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"TTFT {which} from the scheduled arrival, s, logarithmic")
    axes.set_ylabel(f"gap between tokens, {which}, ms, logarithmic")
    _log_limits(axes, points.values())


def _quality(panels: Sequence[Axes], group: Group) -> None:
    (axes,) = panels
    points = _points(group.arms, lambda arm: arm.value("served_kld"), lambda arm: arm.value("output_tok_s"))
    _lines(axes, group.arms, points, lambda arm: (float(arm.params.get("factor") or 1),), _method)
    _scatter(axes, group.arms, points)
    axes.set_xlabel("KL divergence from the full cache, nats a token")
    axes.set_ylabel("output tokens / s")
    widest = max(x for x, _ in points.values())
    axes.set_xlim(-0.06 * (widest or 1), 1.25 * (widest or 1))
    axes.set_ylim(0, 1.15 * max(y for _, y in points.values()))
    axes.grid(linestyle="--", alpha=0.3)


def _sm_share(panels: Sequence[Axes], group: Group) -> None:
    which = highest_percentile(group.arms, "ttft_s", "itl_s") or "p50"
    read: list[tuple[str, str, Callable[[Arm], float | None]]] = [
        ("Throughput (higher is better)", "output tokens / s", lambda arm: arm.value("output_tok_s")),
        (f"Gap between tokens, {which} (lower is better)", "ms", lambda arm: arm.percentile("itl_s", which, 1e3)),
        (f"TTFT, {which} (lower is better)", "s", lambda arm: arm.percentile("ttft_s", which)),
    ]
    split = [arm for arm in group.arms if arm.decode_sms is not None]
    for axes, (title, unit, number) in zip(panels, read, strict=True):
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel("SMs of the decode lane")
        points = _points(split, lambda arm: arm.decode_sms, number)
        if not points:
            say(axes, why_missing(split, "itl_p50_s"), width=34)
            continue
        _lines(axes, split, points, lambda arm: (arm.decode_sms or 0,), _kind)
        _scatter(axes, split, points, _split_name)
        axes.set_xticks(sorted({int(x) for x, _ in points.values()}))
        axes.margins(x=0.12)
        apart = [
            (arm, level) for arm in group.arms if arm.variant == "streams-only" and (level := number(arm)) is not None
        ]
        for arm, level in apart:
            axes.axhline(level, linestyle=":", color=arm.colour, label=arm.label)
        if apart:
            axes.legend(fontsize=9)
        axes.set_ylim(0, 1.15 * max([*(y for _, y in points.values()), *(level for _, level in apart)]))
        axes.grid(linestyle="--", alpha=0.3)


def _split_name(arm: Arm) -> str:
    prompt = (arm.row["partition"].get("realised") or {}).get("prompt_sms")
    return f"{arm.decode_sms}/{prompt}" + (f" {arm.variant}" if arm.variant != "greenctx-only" else "")


def _points(
    arms: Sequence[Arm], x: Callable[[Arm], float | None], y: Callable[[Arm], float | None]
) -> dict[str, Point]:
    found = {arm.label: (x(arm), y(arm)) for arm in arms}
    return {name: (a, b) for name, (a, b) in found.items() if a is not None and b is not None}


def _kind(arm: Arm) -> tuple[Any, ...] | None:
    """What arms share that differ in their chunk or partition alone; ``None`` for one that has neither."""
    if arm.params.get("chunk") is None and arm.decode_sms is None:
        return None
    return arm.variant, arm.layers_per_step, arm.row["case"]["policy"], str(arm.row["case"]["policy_params"])


def _method(arm: Arm) -> tuple[Any, ...] | None:
    """What arms share that differ in their factor alone."""
    if not arm.compresses:
        return None
    params = {name: value for name, value in arm.row["case"]["policy_params"].items() if name != "factor"}
    kind = arm.variant, arm.params.get("chunk"), arm.decode_sms, arm.layers_per_step
    return *kind, arm.row["case"]["policy"], str(params)


def _lines(
    axes: Axes,
    arms: Sequence[Arm],
    points: Mapping[str, Point],
    order: Callable[[Arm], tuple[float, ...]],
    shared: Callable[[Arm], tuple[Any, ...] | None],
) -> None:
    series: dict[tuple[Any, ...], list[Arm]] = {}
    for arm in arms:
        if (key := shared(arm)) is not None and arm.label in points:
            series.setdefault(key, []).append(arm)
    for members in series.values():
        ordered = sorted(members, key=order)
        axes.plot(
            *zip(*[points[arm.label] for arm in ordered], strict=True), color=members[0].colour, linewidth=1.2, alpha=0.6,
            zorder=2,
        )  # fmt: skip


def _scatter(
    axes: Axes, arms: Sequence[Arm], points: Mapping[str, Point], name: Callable[[Arm], str] = lambda arm: arm.label
) -> None:
    for arm in arms:
        if arm.label in points:
            axes.plot(
                *points[arm.label], _MARKERS.get(arm.variant, "o"), color=arm.colour, alpha=opacity(arm),
                markeredgecolor="black", markersize=9, linestyle="none", zorder=3,
            )  # fmt: skip
            axes.annotate(
                name(arm), points[arm.label], xytext=(8, 5), textcoords="offset points", fontsize=8, zorder=4,
                gid=POINT_LABEL, in_layout=False,
            )  # fmt: skip


def _log_limits(axes: Axes, points: Iterable[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = list(points)
    for numbers, set_limits, axis in (
        ([x for x, _ in found], axes.set_xlim, axes.xaxis),
        ([y for _, y in found], axes.set_ylim, axes.yaxis),
    ):
        low, high = min(numbers), max(numbers)
        room = max(1.25, (high / low) ** 0.15)
        # labels stand at the right of their points
        set_limits(low / room, high * room ** (2 if axis is axes.xaxis else 1))
        axis.set_major_locator(LogLocator(subs=log_steps(low, high)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", linestyle="--", alpha=0.3)
