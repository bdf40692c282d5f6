"""``dse_pareto``: memory, speed and quality of each design point; the points that no other one beats are marked."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.reporting.figure_style import house_style
from kvsuite.suites.dse.columns import AXES

from .inert import verdicts
from .panels import COLOURS
from .points import QUANTITIES, QuantityReading, Sample, Spread, source_of
from .series import condition_labels, shown_setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEMORY, _SPEEDS, _QUALITY = "total_mb", ("decode_tok_s", "chars_s"), "perplexity"
_LISTED = 12


@dataclass(frozen=True)
class Point:
    """Points that differ in axes alone that none of the numbers answers to.

    Parameters
    ----------
    settings
        By axis, of the axes that matter.
    memory
        MB.
    speed
        Pooled over the axes to which the speed does not answer, so that noise makes no front.
    quality
        Perplexity, ``None`` where it was not measured.
    """

    label: str
    family: tuple[str, str, str | None]
    settings: tuple[tuple[str, int], ...]
    memory: float
    speed: Spread
    quality: float | None


def draw_pareto(results: Sequence[Sample], metrics: Sequence[Sample], captions: Sequence[str]) -> Figure | str:
    """Draw the figure, or say why it cannot be drawn.

    Parameters
    ----------
    results, metrics
        Samples of both kinds of files; a tag's speed comes from its metrics CSV where it has one.
    captions
        Lines below the panels.
    """
    from matplotlib.figure import Figure

    every = [*results, *metrics]
    speed = next((name for name in _SPEEDS if any(name in sample.readings for sample in every)), None)
    if speed is None or not any(_MEMORY in sample.readings for sample in every):
        return "it needs memory and speed: a results CSV and a metrics CSV of the same model"
    points = pareto_points(results, metrics, speed)
    if not points:
        return "no point has both memory and speed; give the results CSV and the metrics CSV of the same model"
    with_quality = all(point.quality is not None for point in points)
    best = front(points)
    labels = list(dict.fromkeys(point.label for point in points))
    quantities = [speed, _QUALITY] if any(point.quality is not None for point in points) else [speed]
    with house_style():
        figure = Figure(figsize=(7.0 * len(quantities) + 4.5, 6.0), layout="constrained")
        figure.suptitle(
            "What no other point beats: less memory, more speed" + (", lower perplexity" * with_quality),
            fontsize=13,
            fontweight="bold",
        )
        for axes, name in zip(figure.subplots(1, len(quantities), squeeze=False)[0], quantities, strict=True):
            _panel(axes, points, best, name, labels)
        figure.legend(handles=_handles(labels), loc="outside right upper", fontsize=9, frameon=False)
        lines = [*_words(points, best, speed, with_quality), *captions]
        width = int(figure.get_size_inches()[0] * 14)
        figure.supxlabel(
            "\n".join(part for line in lines for part in textwrap.wrap(line, width, subsequent_indent="    ")),
            fontsize=8,
            x=0.01,
            ha="left",
            parse_math=False,
        )
    return figure


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no point of the same model and machine beats.

    One beats another if it is not worse in any number and better in one. Perplexity counts where all points have it. Speeds
    whose repeats overlap are alike, so that no point is among the best by its noise.
    """
    counts = all(point.quality is not None for point in points)

    def gaps(point: Point, other: Point) -> Iterator[float]:
        """How much worse the point is in each number."""
        yield point.memory - other.memory
        mine, theirs = point.speed, other.speed
        yield 0.0 if mine.low <= theirs.high and theirs.low <= mine.high else theirs.middle - mine.middle
        if counts and point.quality is not None and other.quality is not None:
            yield point.quality - other.quality

    def beaten(point: Point) -> bool:
        rivals = ([*gaps(point, other)] for other in points if other.family == point.family)
        return any(max(worse) > 0 and min(worse) >= 0 for worse in rivals)

    return [point for point in points if not beaten(point)]


def pareto_points(results: Sequence[Sample], metrics: Sequence[Sample], speed: str) -> list[Point]:
    """Join memory, speed and quality of each tag by the settings that matter to one of them."""
    points = []
    for tag in dict.fromkeys(sample.tag for sample in [*results, *metrics]):
        by_name = {name: source_of(results, metrics, tag, name) for name in (_MEMORY, speed, _QUALITY)}
        live = {
            name: [axis for axis, verdict in verdicts(samples, name).items() if verdict.state == "live"]
            for name, samples in by_name.items()
        }
        matter = [axis for axis in AXES if any(axis in axes for axes in live.values())]
        memory, quality = (_pooled(by_name[name], name, live[name]) for name in (_MEMORY, _QUALITY))
        for (_, condition), label in condition_labels(by_name[speed], speed).items():
            own = [sample for sample in by_name[speed] if sample.condition == condition]
            speeds = _pooled(own, speed, live[speed])
            for settings in dict.fromkeys(tuple((axis, s.value(axis)) for axis in matter) for s in own):
                held = _at(memory, settings, live[_MEMORY])
                fast = _at(speeds, settings, live[speed])
                if held is None or fast is None:
                    continue
                found = _at(quality, settings, live[_QUALITY])
                family = (own[0].model, own[0].condition.device, own[0].condition.machine)
                points.append(Point(label, family, settings, held.middle, fast, found.middle if found else None))
    return points


def _pooled(samples: Sequence[Sample], name: str, axes: Sequence[str]) -> dict[tuple[int, ...], Spread]:
    found: dict[tuple[int, ...], list[QuantityReading]] = {}
    for sample in samples:
        if name in sample.readings:
            found.setdefault(tuple(sample.value(axis) for axis in axes), []).append(sample.readings[name])
    return {key: Spread.of(readings) for key, readings in found.items()}


def _at(
    pooled: dict[tuple[int, ...], Spread], settings: tuple[tuple[str, int], ...], axes: Sequence[str]
) -> Spread | None:
    return pooled.get(tuple(dict(settings)[axis] for axis in axes))


def _panel(axes: Axes, points: Sequence[Point], best: Sequence[Point], name: str, labels: Sequence[str]) -> None:
    for place, label in enumerate(labels):
        heights = {p: p.quality if name == _QUALITY else p.speed.middle for p in points if p.label == label}
        own = {point: height for point, height in heights.items() if height is not None}
        if not own:
            continue
        xs, ys = [point.memory for point in own], list(own.values())
        colour = COLOURS[place % len(COLOURS)]
        if name != _QUALITY:
            ends = [(point.speed.low, point.speed.high) for point in own]
            axes.vlines(xs, *zip(*ends, strict=True), color=colour, alpha=0.25, linewidth=1.0)
        axes.plot(xs, ys, linestyle="none", marker="o", markersize=5, color=colour)
        marked = [(point.memory, y) for point, y in own.items() if point in best]
        if marked:
            axes.plot(
                *zip(*marked, strict=True), linestyle="none", marker="o", markersize=12, markerfacecolor="none",
                markeredgecolor="black", markeredgewidth=1.6, gid="front",
            )  # fmt: skip
    axes.set_xlabel(QUANTITIES[_MEMORY].label)
    axes.set_ylabel(f"{QUANTITIES[name].label}, {QUANTITIES[name].better} is better")
    # from 0, with room for the marks of the largest
    axes.set_xlim(0, 1.04 * max(point.memory for point in points))
    if name != _QUALITY:
        axes.set_ylim(bottom=0)
    axes.grid(linestyle="--", alpha=0.3)


def _handles(labels: Sequence[str]) -> list[object]:
    from matplotlib.lines import Line2D

    handles: list[object] = [
        Line2D([], [], color=COLOURS[place % len(COLOURS)], marker="o", linestyle="none", label=label)
        for place, label in enumerate(labels)
    ]
    ring = Line2D(
        [], [], color="black", marker="o", markerfacecolor="none", markersize=12, linestyle="none", label="not beaten"
    )
    bar = Line2D([], [], color="black", marker="|", markersize=14, linestyle="none", label="smallest to largest")
    return [*handles, ring, bar]


def _words(points: Sequence[Point], best: Sequence[Point], speed: str, with_quality: bool) -> list[str]:
    lines = [
        f"{len(points)} points, {len(best)} not beaten by another of the same model and machine. Points that "
        "differ in inert axes alone are one; speeds are pooled over the axes that they do not answer to. Speeds whose bars "
        "overlap count as alike."
    ]
    if not with_quality:
        lines.append(
            "Quality is not measured at all points of these files and does not count: a smaller weight format looks better "
            "here than it is."
        )
    for point in best[:_LISTED]:
        settings = ", ".join(shown_setting(axis, value) for axis, value in point.settings) or "any setting"
        quality = "" if point.quality is None else f", perplexity {point.quality:.4g}"
        label = " ".join(point.label.split())
        fast = f"{QUANTITIES[speed].short} {point.speed.middle:.1f}"
        lines.append(f"Not beaten: {label}: {settings}: {_memory(point.memory)}, {fast}{quality}")
    if len(best) > _LISTED:
        lines.append(f"and {len(best) - _LISTED} more")
    return lines


def _memory(mib: float) -> str:
    """``5472 MB``, and of a small model ``0.409 MB``."""
    return f"{mib:.0f} MB" if mib >= 100 else f"{mib:.3g} MB"
