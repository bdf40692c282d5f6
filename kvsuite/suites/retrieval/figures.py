"""``retrieval_map``: exact answers by depth and length for each method. ``retrieval_bytes``: scores over bytes of the cache."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.foreign_text import visible
from kvsuite.reporting.aggregate import Row, suite_rows, value
from kvsuite.reporting.figure_style import GREY, RED, figure_bytes, house_style

from .rows import cells_of, is_discriminative

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: panels of a figure, at most
MOST_PANELS = 60
_KIB = 1024.0
_MARKS = "os^Dv*PX<>hp"
_HATCH = "////"
# scores so near 0 and 1 have dark colours
_DARK = 0.15
# caches of equal bytes stand side by side, so far apart
_APART = 0.06


def retrieval_figures(run: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, bytes]:
    """Both figures as ``.png`` and ``.svg`` by name; none of runs without scores, or of too many cases.

    Raises
    ------
    UserError
        If no row is of the retrieval suite.
    """
    scored = [row for row in suite_rows(rows, "retrieval") if cells_of(row)]
    if not scored or len(_tasks(scored)) * len(_methods(scored)) > MOST_PANELS:
        return {}
    built = {"retrieval_map": build_map(run, scored), "retrieval_bytes": build_bytes(run, scored)}
    return {
        f"{name}.{kind}": figure_bytes(figure, kind, dpi=200)
        for name, figure in built.items()
        for kind in ("png", "svg")
    }


def build_map(run: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Exact answers by length (across) and depth (down), a column a method and a row a task.

    A cell that the full cache itself does not answer is hatched: it says nothing of a method.
    """
    from matplotlib.figure import Figure

    tasks, methods = _tasks(rows), _methods(rows)
    lengths = sorted({_length(row) for row in rows})
    with house_style():
        wide = max(2.2 + 0.7 * len(lengths), 2.8)
        figure = Figure(figsize=(1.5 + wide * len(methods), 1.2 + 2.6 * len(tasks)), layout="constrained")
        figure.suptitle("Exact answers by depth and length", fontsize=14, fontweight="bold")
        panels = figure.subplots(len(tasks), len(methods), squeeze=False)
        for task, line in zip(tasks, panels, strict=True):
            depths = _depths([row for row in rows if _task(row) == task])
            for method, axes in zip(methods, line, strict=True):
                own = {_length(row): row for row in rows if (_task(row), _method(row)) == (task, method)}
                _draw_map(axes, own, lengths, depths)
                axes.set_title("\n".join(textwrap.wrap(visible(method), 24)), fontsize=9)
            line[0].set_ylabel(f"{task}\ndepth")
        for axes in panels[-1]:
            axes.set_xlabel("tokens of the context")
        figure.text(0.01, -0.01, _caption(run, rows), ha="left", va="top", fontsize=8)
    return figure


def _draw_map(axes: Axes, rows: Mapping[int, Row], lengths: Sequence[int], depths: Sequence[float | None]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["RdYlGn"]
    for across, length in enumerate(lengths):
        cells = {cell["depth"]: cell for cell in cells_of(rows[length])} if length in rows else {}
        for down, depth in enumerate(depths):
            cell = cells.get(depth)
            if cell is None:
                continue
            fine = bool(cell["discriminative"])
            axes.add_patch(
                Rectangle(
                    (across - 0.5, down - 0.5), 1, 1, facecolor=colours(cell["exact"]) if fine else "white",
                    edgecolor="white" if fine else GREY, hatch=None if fine else _HATCH, linewidth=1,
                )
            )  # fmt: skip
            low, high = cell["exact_interval"]
            ink = "white" if fine and not _DARK < cell["exact"] < 1 - _DARK else "black"
            axes.text(
                across, down, f"{cell['exact']:.2f}\n{low:.2f}-{high:.2f}", ha="center", va="center", fontsize=7,
                color=ink,
                bbox=None if fine else {"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(depths) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), ["all" if depth is None else f"{depth:g}" for depth in depths])


def build_bytes(run: Mapping[str, Any], rows: Sequence[Row]) -> Figure:
    """Scores over the bytes of the compressed cache: exact answers above, log-probability below, a column a task and length.

    The dashed line is the full cache's, with its two standard errors; where it is no ceiling (the model cannot do the task)
    the panel is hatched.
    """
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((_task(row), _length(row)) for row in rows))
    methods = _methods(rows)
    with house_style():
        colours = _colours(methods)
        figure = Figure(figsize=(3.4 + 3.6 * len(columns), 7), layout="constrained")
        figure.suptitle("What is still known, over the bytes of the cache", fontsize=14, fontweight="bold")
        panels = figure.subplots(2, len(columns), squeeze=False)
        for index, column in enumerate(columns):
            own = [row for row in rows if (_task(row), _length(row)) == column]
            for axes, metric in zip(panels[:, index], ("retrieval_exact", "retrieval_logprob"), strict=True):
                _draw_bytes(axes, own, metric, colours)
            panels[0, index].set_title(f"{column[0]}, {column[1]} tokens", fontsize=10)
            panels[1, index].set_xlabel("KV cache of the context (KiB)")
        panels[0, 0].set_ylabel("exact answers")
        panels[1, 0].set_ylabel("log-probability of the answer (nats)")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
        figure.text(0.01, -0.01, _caption(run, rows), ha="left", va="top", fontsize=8)
    return figure


def _draw_bytes(axes: Axes, rows: Sequence[Row], metric: str, colours: Mapping[str, tuple[Any, str]]) -> None:
    ceiling, error = value(rows[0], f"{metric}_full"), None
    drawn: Counter[float] = Counter()
    for row in rows:
        mean, size = value(row, metric), value(row, "kv_bytes_exact_prefill")
        if value(row, "retrieval_logprob_diff") is None:
            error = value(row, f"{metric}_se")
        if mean is None or size is None:
            continue
        colour, mark = colours[_method(row)]
        spread = value(row, f"{metric}_se")
        axes.errorbar(
            size / _KIB * (1 + _APART * drawn[size]), mean,
            yerr=None if spread is None else 2 * spread, color=colour, marker=mark, linestyle="none",
            capsize=3, label=visible(_method(row)),
        )  # fmt: skip
        drawn[size] += 1
    if ceiling is not None:
        axes.axhline(ceiling, color=GREY, linestyle="--", linewidth=1, label="ceiling: the full cache")
        if error is not None:
            axes.axhspan(ceiling - 2 * error, ceiling + 2 * error, color=GREY, alpha=0.12, linewidth=0)
    if not all(map(is_discriminative, rows)):
        axes.patch.set(hatch=_HATCH, edgecolor="#cccccc")
        axes.text(0.5, 0.5, "not discriminative", color=RED, ha="center", va="center", transform=axes.transAxes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axes.grid(alpha=0.3)
    if metric == "retrieval_exact":
        axes.set_ylim(-0.05, 1.05)


def _colours(methods: Sequence[str]) -> dict[str, tuple[Any, str]]:
    from matplotlib import colormaps

    palette = colormaps["tab10"]
    return {
        method: (palette(index % 10), _MARKS[(index // 10 + index) % len(_MARKS)])
        for index, method in enumerate(methods)
    }


def _caption(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    facts = rows[0]["metrics"]["retrieval_exact"]
    models = ", ".join(dict.fromkeys(str(row["case"]["model"]) for row in rows))
    text = (
        f"{visible(models)}; {facts['contexts']} samples a task and length. Cells: exact answers with Wilson's 95 % interval; "
        "whiskers: 2 standard errors over samples; equal bytes stand side by side. Hatched: the full cache answers fewer than "
        f"{facts['bound']:g} exactly, which says nothing of a method. Run {visible(str(run.get('run_id', '')))}."
    )
    return "\n".join(textwrap.wrap(text, 120))


def _task(row: Row) -> str:
    return str(row["case"]["workload"]["task"])


def _length(row: Row) -> int:
    return int(row["case"]["workload"]["prompt_tokens"])


def _method(row: Row) -> str:
    """The case's name behind task and length: method, number format, weight format."""
    return str(row["case"]["name"]).removeprefix(f"{_task(row)}-{_length(row)}-")


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(map(_task, rows)))


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(map(_method, rows)))


def _depths(rows: Sequence[Row]) -> list[float | None]:
    found = {cell["depth"] for row in rows for cell in cells_of(row)}
    return sorted(found, key=lambda depth: -1.0 if depth is None else depth)
