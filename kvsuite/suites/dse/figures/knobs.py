"""``dse_knobs``: which knob buys what: the elasticity of every number along every axis, and what the weight format does."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

from kvsuite.reporting.figure_style import house_style
from kvsuite.suites.dse.columns import AXES

from .inert import pairs_along, verdicts
from .points import QUANTITIES, Sample, source_of, spreads
from .series import WORDS, short_tags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY = "#e3e3e3"
_CELL = (1.25, 0.62)


@dataclass(frozen=True)
class Elasticity:
    """``d log number / d log axis`` over pairs of points that differ in that axis alone.

    Parameters
    ----------
    state
        ``"live"``, ``"inert"``, ``"fixed"`` (the axis has one value).
    values
        One a pair; empty unless live.
    steps
        Ratios of the number where the window is on, or the sink above 0, to where it is not: what has no logarithm.
    """

    state: str
    values: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()


def elasticities(samples: Sequence[Sample], name: str) -> dict[str, Elasticity]:
    """Measure all axes for one quantity.

    Repeats of a point count as their median.

    Parameters
    ----------
    samples
        Of one tag.
    name
        Of `QUANTITIES`.
    """
    points = spreads(samples, name)
    found = {}
    for axis, verdict in verdicts(samples, name).items():
        if verdict.state != "live":
            found[axis] = Elasticity(verdict.state)
            continue
        values, steps = [], []
        for group in pairs_along(points, axis).values():
            for low, high in combinations(sorted(value for value in group if group[value].middle > 0), 2):
                ratio = group[high].middle / group[low].middle
                if low > 0:
                    values.append(math.log(ratio) / math.log(high / low))
                else:
                    steps.append(ratio)
        found[axis] = Elasticity("live", tuple(values), tuple(steps))
    return found


def draw_knobs(results: Sequence[Sample], metrics: Sequence[Sample], captions: Sequence[str]) -> Figure | str:
    """Draw the page: a table for every tag, and one of the weight formats for every model that has several; or say why not.

    Parameters
    ----------
    results, metrics
        Samples of both kinds of files; a tag's number comes from its metrics CSV where that has it.
    captions
        Lines below the tables.
    """
    from matplotlib.figure import Figure

    every = [*results, *metrics]
    tags = list(dict.fromkeys(sample.tag for sample in every))
    names = [name for name in QUANTITIES if any(name in sample.readings for sample in every)]
    if not names:
        return "the files have no number that a figure shows"
    by_model: dict[str, list[str]] = {}
    for tag in tags:
        by_model.setdefault(next(sample.model for sample in every if sample.tag == tag), []).append(tag)
    found = {model: format_ratios(results, metrics, own, names) for model, own in by_model.items()}
    formats = {model: ratios for model, ratios in found.items() if ratios}
    tables = len(tags) + len(formats)
    cols = 1 if tables == 1 else 2
    rows = math.ceil(tables / cols)
    size = (cols * (_CELL[0] * len(names) + 1.6), rows * (_CELL[1] * len(AXES) + 1.1) + 1.6)
    with house_style():
        figure = Figure(figsize=(max(size[0], 8.0), size[1]), layout="constrained")
        figure.suptitle("Which knob buys what: d log number / d log axis", fontsize=13, fontweight="bold")
        grid = list(figure.subplots(rows, cols, squeeze=False).flat)
        for axes, tag in zip(grid, tags, strict=False):
            _table(axes, tag, results, metrics, names)
        for axes, (model, ratios) in zip(grid[len(tags) :], formats.items(), strict=False):
            _formats(axes, model, ratios, names)
        for axes in grid[tables:]:
            axes.set_axis_off()
        lines = [
            "Elasticity: when the axis doubles, +1 doubles the number, +0.1 adds 7 %, -1 halves it. Median, smallest to "
            "largest, over all pairs of points that differ in that axis alone. A window that is off and a sink of 0 have no "
            "logarithm; where there are no other pairs, the cell has the ratio of on to off.",
            "Green: turning the knob up makes the number better; pink: worse. Grey: the number does not answer to the axis "
            "(inert: see docs/dse_figures.md for how that is decided), or no pair.",
            *captions,
        ]
        if formats and any(not sample.own for sample in every):
            lines.append(
                "The original's files do not say which machine ran which row: a ratio between files may hold one."
            )
        width = int(figure.get_size_inches()[0] * 14)
        figure.supxlabel(
            "\n".join(part for line in lines for part in textwrap.wrap(line, width)),
            fontsize=8, x=0.01, ha="left", parse_math=False,
        )  # fmt: skip
    return figure


def format_ratios(
    results: Sequence[Sample], metrics: Sequence[Sample], tags: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Numbers of every tag over those of the one that needs most memory, at points that differ in nothing else.

    Parameters
    ----------
    results, metrics
        Samples of both kinds of files.
    tags
        Weight formats of one model: a ratio between models would be no weight format's.
    names
        Of `QUANTITIES`.

    Returns
    -------
    dict[str, dict[str, list[float]]]
        Ratios by tag and quantity, the reference first with ratios of 1; empty for fewer than two tags.
    """
    held = {tag: _largest(source_of(results, metrics, tag, "total_mb")) for tag in tags}
    if len(tags) < 2 or max(held.values()) <= 0:
        return {}
    reference = max(tags, key=lambda tag: held[tag])
    found: dict[str, dict[str, list[float]]] = {}
    for tag in [reference, *(tag for tag in tags if tag != reference)]:
        found[tag] = {}
        for name in names:
            own, base = (spreads(source_of(results, metrics, which, name), name) for which in (tag, reference))
            found[tag][name] = [own[key].middle / base[key].middle for key in own if key in base and base[key].middle]
    return found


def _largest(samples: Iterable[Sample]) -> float:
    return max((v for s in samples if "total_mb" in s.readings for v in s.readings["total_mb"].values), default=0.0)


def _table(axes: Axes, tag: str, results: Sequence[Sample], metrics: Sequence[Sample], names: Sequence[str]) -> None:
    axes.set_title(tag, fontsize=10, parse_math=False)
    for column, name in enumerate(names):
        samples = source_of(results, metrics, tag, name)
        found = elasticities(samples, name)
        for row, axis in enumerate(AXES):
            if not any(name in sample.readings for sample in samples):
                _cell(axes, row, column, "not in the\nfiles", _GREY)
                continue
            _elasticity_cell(axes, row, column, found[axis], QUANTITIES[name].better)
    _frame(axes, [WORDS[axis] for axis in AXES], names)


def _elasticity_cell(axes: Axes, row: int, column: int, found: Elasticity, better: str) -> None:
    sign = -1 if better == "lower" else 1
    if found.state != "live":
        words = "one setting" if found.state == "fixed" else "inert"
        _cell(axes, row, column, words, _GREY)
    elif found.values:
        middle, low, high = median(found.values), min(found.values), max(found.values)
        text = f"{signed(middle)}\n{signed(low)} … {signed(high)}\n{_pairs(found.values)}"
        _cell(axes, row, column, text, _shade(sign * middle))
    elif found.steps:
        middle = median(found.steps)
        text = f"on: × {middle:.3g}\n{min(found.steps):.3g} … {max(found.steps):.3g}\n{_pairs(found.steps)}"
        _cell(axes, row, column, text, _shade(sign * math.log2(middle)))
    else:
        _cell(axes, row, column, "no pair", _GREY)


def _pairs(found: Sequence[float]) -> str:
    return "1 pair" if len(found) == 1 else f"{len(found)} pairs"


def _formats(axes: Axes, model: str, ratios: dict[str, dict[str, list[float]]], names: Sequence[str]) -> None:
    short = short_tags(list(ratios))
    axes.set_title(
        f"{model}\nthe weight format: ratios at points that differ in nothing else", fontsize=10, parse_math=False
    )
    for row, found in enumerate(ratios.values()):
        for column, name in enumerate(names):
            values = found[name]
            if not row:
                _cell(axes, row, column, "reference", _GREY)
            elif not values:
                _cell(axes, row, column, "no pair", _GREY)
            else:
                middle = median(values)
                change = math.log2(middle) if middle > 0 else 0.0
                text = f"× {middle:.3g}\n{min(values):.3g} … {max(values):.3g}\n{_pairs(values)}"
                _cell(axes, row, column, text, _shade(-change if QUANTITIES[name].better == "lower" else change))
    _frame(axes, [short[tag] for tag in ratios], names)


def signed(number: float) -> str:
    """Two decimals and a sign, three where two would print 0; plain 0 for nothing."""
    text = f"{number:+.2f}" if abs(number) >= 0.095 else f"{number:+.3f}"
    return "0" if float(text) == 0 else text


def _shade(gain: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    # the ends of the map are too dark for black letters
    red, green, blue, alpha = colormaps["PiYG"](0.5 + 0.32 * max(-1.0, min(1.0, gain)))
    return red, green, blue, alpha


def _cell(axes: Axes, row: int, column: int, text: str, colour: str | tuple[float, float, float, float]) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, linespacing=1.15)


def _frame(axes: Axes, rows: Sequence[str], names: Sequence[str]) -> None:
    axes.set_xlim(0, len(names))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks(
        [place + 0.5 for place in range(len(names))],
        [f"{QUANTITIES[name].short}\n({QUANTITIES[name].better} is better)" for name in names],
        fontsize=7,
    )
    axes.set_yticks([place + 0.5 for place in range(len(rows))], rows, fontsize=9)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
