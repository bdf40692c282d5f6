"""``benchmark_comparison``: six panels that put cost and quality of cache compression side by side."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvsuite.reporting.aggregate import (
    GIB,
    MIB,
    Row,
    by_name,
    ci_half_width,
    failure,
    missing_reason,
    suite_rows,
    value,
)
from kvsuite.reporting.figure_style import BLUE, GREEN, GREY, RED, figure_bytes, fixed, house_style
from kvsuite.reporting.noise import MARK, MOST_UNCERTAIN, inside_noise, is_uncertain

from .rows import CONTROL, baseline_for, format_name, has_formats, is_baseline, is_full

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

TITLE = "KV Cache Compression Benchmark Results"
NAME = "benchmark_comparison"
#: cases that six panels of bars can show
MOST_CASES = 100

Interval = tuple[float, float]


@dataclass(frozen=True)
class MetricPanel:
    """One panel: which metric, how it is labelled, and what its whisker is (distances below and above the bar)."""

    metric: str
    title: str
    measured: str
    y_label: str
    scale: float
    text: Callable[[float], str]
    whisker: Callable[[Row], Interval | None]


def _ci(metric: str) -> Callable[[Row], Interval | None]:
    def whisker(row: Row) -> Interval | None:
        half = ci_half_width(row, metric)
        return None if half is None else (half, half)

    return whisker


def _standard_error(row: Row) -> Interval | None:
    se = value(row, "perplexity_se")
    return None if se is None else (se, se)


def _layers(row: Row) -> Interval | None:
    low, mean, high = (value(row, f"cache_tokens_{which}") for which in ("min", "mean", "max"))
    if low is None or mean is None or high is None or low == high:
        return None
    return mean - low, high - mean


PANELS = (
    MetricPanel(
        "output_tok_s",
        "Throughput (higher is better)",
        "generated tokens / wall time, first token included",
        "Tokens / Second",
        1.0,
        lambda v: fixed(v, 1),
        _ci("output_tok_s"),
    ),
    MetricPanel(
        "tpot_s",
        "TPOT / Latency (lower is better)",
        "(last token - first token) / (n - 1), eviction included",
        "Milliseconds",
        1e3,
        lambda v: fixed(v, 1),
        _ci("tpot_s"),
    ),
    MetricPanel(
        "ttft_s",
        "TTFT / Prefill (lower is better)",
        "prefill + compression + first token",
        "Seconds",
        1.0,
        lambda v: fixed(v, 4),
        _ci("ttft_s"),
    ),
    MetricPanel(
        "perplexity",
        "Perplexity / Quality (lower is better)",
        "exp(loss pooled over texts); axis does not start at 0",
        "PPL Score",
        1.0,
        lambda v: fixed(v, 2),
        _standard_error,
    ),
    MetricPanel(
        "mem_measured_peak_bytes",
        "Peak VRAM Usage (lower is better)",
        "peak allocated, weights included; 1 GB = 1024³ bytes",
        "Memory (GB)",
        1 / GIB,
        lambda v: fixed(v, 2) + " GB",
        lambda row: None,
    ),
    MetricPanel(
        "cache_tokens_mean",
        "KV Cache Size",
        "at the end of decode, mean over layers",
        "Tokens",
        1.0,
        lambda v: f"{v:.0f}",
        _layers,
    ),
)
# where formats differ the tokens of a cache do not tell its size
_BYTES = MetricPanel(
    "kv_bytes_exact",
    "KV Cache Size (lower is better)",
    "keys and values as they are stored, scales included",
    "MiB",
    1 / MIB,
    lambda v: fixed(v, 2),
    lambda row: None,
)


def render_benchmark_comparison(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, bytes]:
    """``benchmark_comparison.png`` and ``.svg`` as bytes by name; none of more than `MOST_CASES`, whose bars nobody could read.

    Raises
    ------
    UserError
        If no row is of the compression suite.
    """
    if len(suite_rows(rows, "compression")) > MOST_CASES:
        return {}
    figure = build_figure(run, rows)
    return {f"{NAME}.{kind}": figure_bytes(figure, kind) for kind in ("png", "svg")}


def build_figure(run: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Build the figure from rows alone: 2 x 3 panels, bars in the order of the rows, which is that of the space.

    Bars are headline values (medians of the rounds); whiskers are half the 95 % interval of the mean for timed
    metrics, one standard error for perplexity, fewest and most tokens of a layer for the cache. A case that did not
    finish has no bar and is named below the panels. A time that is too uncertain to be put in order with others is hatched,
    and the number of one that differs from its baseline by no more than its noise has a mark before it.

    Raises
    ------
    UserError
        If no row is of the compression suite.
    """
    from matplotlib.figure import Figure

    labelled = by_name(suite_rows(rows, "compression"))
    finished = {name: row for name, row in labelled.items() if row["status"] == "ok"}
    with house_style():
        figure = Figure(figsize=(20, 12), layout="constrained")
        figure.suptitle(TITLE, fontsize=16, fontweight="bold", y=0.985)
        heading = textwrap.wrap(subtitle(finished or labelled), 200)
        figure.text(0.5, 0.958, "\n".join(heading), ha="center", va="top", fontsize=11)
        engine = figure.get_layout_engine()
        assert engine is not None
        engine.set(rect=(0, 0, 1, 0.93 - 0.018 * len(heading)), h_pad=0.12, w_pad=0.12)  # type: ignore[call-arg]
        panels = (*PANELS[:-1], _BYTES) if has_formats(finished.values()) else PANELS
        for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
            _draw(axes, panel, finished)
        if finished:
            below = (0.5, 0.96 - 0.018 * len(heading))
            figure.legend(
                handles=_colours(finished),
                loc="upper center",
                bbox_to_anchor=below,
                fontsize=11,
                ncols=5,
                frameon=False,
            )
        figure.text(0.01, -0.01, _caption(run, labelled), ha="left", va="top", fontsize=10)
    return figure


#: what the colours mean, in the order of the legend
_KINDS = {
    GREY: "full cache", RED: "control: the last tokens alone", GREEN: "StreamingLLM: first and last tokens",
    BLUE: "other methods",
}  # fmt: skip
_HATCH = "///"


def colour(row: Row) -> str:
    """Colour of a case by its policy: grey full cache, green streaming, red control, blue every other."""
    if is_full(row):
        return GREY
    return {"streaming_llm": GREEN, CONTROL: RED}.get(str(row["case"]["policy"]), BLUE)


def _colours(finished: Mapping[str, Row]) -> list[Patch]:
    """The legend: the colours that are there, and what hatching means where there is any."""
    from matplotlib.patches import Patch

    there = {colour(row) for row in finished.values()}
    found = [
        Patch(facecolor=of, alpha=0.8, edgecolor="black", label=text) for of, text in _KINDS.items() if of in there
    ]
    if any(is_uncertain(row, panel.metric) for row in finished.values() for panel in PANELS):
        text = f"time uncertain by more than {MOST_UNCERTAIN:.0%}: no order"
        found.append(Patch(facecolor="white", edgecolor="black", hatch=_HATCH, label=text))
    return found


def _draw(axes: Axes, panel: MetricPanel, finished: Mapping[str, Row]) -> None:
    axes.set_title(f"{panel.title}\n{panel.measured}")
    axes.set_ylabel(panel.y_label)
    places = {name: place for place, name in enumerate(finished)}
    values = {name: value(row, panel.metric) for name, row in finished.items()}
    heights = {name: number * panel.scale for name, number in values.items() if number is not None}
    if not heights:
        _say_why_empty(axes, panel, finished)
        return
    bars = axes.bar(
        [places[name] for name in heights],
        list(heights.values()),
        color=[colour(finished[name]) for name in heights],
        alpha=0.8,
        edgecolor="black",
    )
    for name, bar in zip(heights, bars, strict=True):
        if is_uncertain(finished[name], panel.metric):
            bar.set_hatch(_HATCH)
    texts = {name: _mark(finished, name, panel.metric) + panel.text(height) for name, height in heights.items()}
    found = {name: panel.whisker(finished[name]) for name in heights}
    whiskers = {name: (low * panel.scale, high * panel.scale) for name, (low, high) in _present(found)}
    if whiskers:
        axes.errorbar(
            [places[name] for name in whiskers],
            [heights[name] for name in whiskers],
            yerr=list(zip(*whiskers.values(), strict=True)),
            fmt="none",
            ecolor="black",
            capsize=4,
        )
    floors = _draw_floors(axes, finished, places, panel.scale) if panel.metric == "tpot_s" else False
    longest = max(map(len, texts.values()))
    crowded = (len(finished) > 8 and longest > 5) or (
        len(finished) > 12 and longest > 3 and has_formats(finished.values())
    )
    _limits(axes, panel, heights, whiskers, room=0.1 * (crowded + floors))
    for name, place in places.items():
        if name in heights:
            # a whisker over layers is far longer than the bar: the value stays at the bar, on a ground of its own
            beside = panel.whisker is _layers
            top = heights[name] + (0 if beside or name not in whiskers else whiskers[name][1])
            _write(axes, place, top, texts[name], rotation=90 if crowded else 0, ground=beside)
        else:
            _write(axes, place, axes.get_ylim()[0], "n/a")
    axes.set_xlim(-0.6, len(finished) - 0.4)
    axes.set_xticks(
        range(len(finished)), list(finished), rotation=45, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.grid(axis="y", linestyle="--", alpha=0.3)
    if has_formats(finished.values()):
        _draw_formats(axes, finished, room=0.16 if crowded or axes.get_legend() else 0.08)


def _draw_formats(axes: Axes, finished: Mapping[str, Row], *, room: float) -> None:
    """Set the cases of each number format apart and write it above them; ``room`` is added on top, as a share of the range."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + room * (high - low))
    place = 0
    for name, group in itertools.groupby(finished.values(), format_name):
        cases = len(list(group))
        if place:
            axes.axvline(place - 0.5, color="black", linewidth=0.8, linestyle=":")
        axes.text(
            place + (cases - 1) / 2,
            0.985,
            textwrap.fill(name, 14),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=9,
            fontweight="bold",
        )
        place += cases


def _mark(finished: Mapping[str, Row], name: str, metric: str) -> str:
    row = finished[name]
    base = baseline_for(row, list(finished.values()))
    return MARK if base is not None and not is_baseline(row) and inside_noise(row, base, metric) else ""


def _present(found: Mapping[str, Interval | None]) -> list[tuple[str, Interval]]:
    return [(name, whisker) for name, whisker in found.items() if whisker is not None]


def _say_why_empty(axes: Axes, panel: MetricPanel, finished: Mapping[str, Row]) -> None:
    reasons = dict.fromkeys(missing_reason(row, panel.metric) for row in finished.values())
    text = "; ".join(reasons) or "no case finished"
    text = text if text.startswith("not measured") else f"not measured: {text}"
    axes.text(
        0.5,
        0.5,
        textwrap.fill(text, 48),
        ha="center",
        va="center",
        fontsize=13,
        color="#444444",
        transform=axes.transAxes,
    )
    axes.set_xticks([])
    axes.set_yticks([])


def _write(axes: Axes, x: float, y: float, text: str, *, rotation: float = 0, ground: bool = False) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=9,
        rotation=rotation,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if ground else None,
        zorder=5,
    )


def _draw_floors(axes: Axes, finished: Mapping[str, Row], places: Mapping[str, int], scale: float) -> bool:
    floors = {name: floor for name, row in finished.items() if (floor := value(row, "tpot_floor_s")) is not None}
    if floors:
        axes.plot(
            [places[name] for name in floors],
            [floor * scale for floor in floors.values()],
            linestyle="none",
            marker="_",
            markersize=22,
            markeredgewidth=2.5,
            color="black",
            label="floor (bytes / measured bandwidth)",
        )
        legend = axes.legend(loc="upper right", fontsize=9)
        if has_formats(finished.values()):
            # the names of the formats stand along the upper edge
            legend.set_bbox_to_anchor((1, 0.9), transform=axes.transAxes)
    return bool(floors)


def _limits(
    axes: Axes, panel: MetricPanel, heights: Mapping[str, float], whiskers: Mapping[str, Interval], *, room: float
) -> None:
    """Set the y range; ``room`` is added on top, as a share of the range."""
    lows = [heights[name] - below for name, (below, _) in whiskers.items()]
    highs = [heights[name] + above for name, (_, above) in whiskers.items()]
    if panel.metric == "perplexity":
        low, high = 0.95 * min(heights.values()), 1.05 * max(heights.values())
        span = max([high, *highs]) - min([low, *lows])
        # whiskers beyond the range move it, with room for the number above them
        low = min([low, *(end - 0.05 * span for end in lows)])
        high = max([high, *(end + 0.08 * span for end in highs)])
    else:
        low, high = 0.0, 1.15 * max([*heights.values(), *highs]) or 1.0
    axes.set_ylim(low, high + room * (high - low))


def subtitle(shown: Mapping[str, Row]) -> str:
    """One line of what the cases share: model, device, dtype, protocol, lengths, rounds; several values are listed."""
    rows = list(shown.values())

    def facts(read: Callable[[Row], object]) -> str:
        return ", ".join(dict.fromkeys(str(fact) for row in rows if (fact := read(row)) not in (None, "", [])))

    parts = [
        ("", facts(lambda row: row["model"].get("label") or row["case"]["model"])),
        ("", facts(lambda row: "random weights" if row["model"].get("kind") == "dummy" else None)),
        ("device ", facts(lambda row: row["case"]["device"])),
        ("", facts(lambda row: row["case"]["dtype"])),
        ("keys and values ", facts(format_name) if has_formats(rows) else ""),
        ("weights ", facts(lambda row: row["case"]["quantization"])),
        ("protocol ", facts(lambda row: row["case"]["workload"].get("protocol"))),
        ("positions ", facts(lambda row: row["case"]["policy_params"].get("positions"))),
        ("uncompressed layers ", facts(lambda row: row["case"]["policy_params"].get("skip_layers"))),
        ("prompt tokens ", facts(lambda row: row["case"]["workload"].get("prompt_tokens"))),
        ("decode tokens ", facts(lambda row: row["case"]["workload"].get("max_new_tokens"))),
        ("batch ", facts(lambda row: row["case"]["workload"].get("batch"))),
        ("rounds ", facts(lambda row: row["rounds"])),
    ]
    return "  |  ".join(prefix + text for prefix, text in parts if text)


def _caption(run: Mapping[str, Any], labelled: Mapping[str, Row]) -> str:
    """What bars and whiskers are, and the cases that have no bar."""
    lines = [
        "Bars: median of the rounds where timed. Whiskers: half the 95 % interval of the mean (throughput, TPOT, "
        "TTFT), 1 standard error (perplexity)"
        + (". " if has_formats(labelled.values()) else ", fewest and most tokens of a layer (cache). ")
        + f"Run {run.get('run_id')}, kvsuite {run.get('kvsuite_version')}.",
        f"{MARK} before a number: it differs from that of the full cache by no more than the noise of the rounds.",
    ]
    failed = {name: row for name, row in labelled.items() if row["status"] != "ok"}
    if failed:
        lines.append("Not drawn:")
        lines += [
            textwrap.fill(f"{name}  {failure(row)}", 220, subsequent_indent="    ") for name, row in failed.items()
        ]
    return "\n".join(lines)
