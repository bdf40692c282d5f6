"""``<dataset>_ppl_vs_quant``: one bar a weight format, one panel a model, from rows of a perplexity CSV."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UserError
from kvsuite.reporting.files import write_atomic
from kvsuite.reporting.perplexity_csv import quantization_tag

from .style import GREY, figure_bytes, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CsvRow = Mapping[str, Any]

_DPI = 200
_HEIGHT, _ASPECT = 4.0, 1.1
_AS_LOADED = {"fp16", "float32", "float16", "bfloat16"}
_COLOURS = ("#3498db", "#e74c3c", "#2ecc71", "#9b59b6", "#f39c12", "#1abc9c", "#34495e", "#d35400")
# rows without a hash: what is known of these two data sets' texts (both published CSVs agree in every digit)
_SAME_TEXT = {("wikitext103", "test"): "wikitext2", ("wikitext103", "validation"): "wikitext2"}


def draw_perplexity(rows: Sequence[CsvRow], folder: Path) -> list[Path]:
    """Draw into ``folder``: ``<dataset>_ppl_vs_quant.png`` and ``.svg`` for every text.

    Raises
    ------
    UserError
        If there is no row, or the folder cannot be written.
    """
    rendered = render_perplexity(rows)
    for name, content in rendered.items():
        write_atomic(folder / name, content)
    return [folder / name for name in rendered]


def render_perplexity(rows: Sequence[CsvRow]) -> dict[str, bytes]:
    """The same files as bytes by name."""
    rendered = {}
    for dataset, figure in build_figures(rows).items():
        rendered[f"{dataset}_ppl_vs_quant.png"] = _png(figure)
        rendered[f"{dataset}_ppl_vs_quant.svg"] = figure_bytes(figure, "svg")
    return rendered


def build_figures(rows: Sequence[CsvRow]) -> dict[str, Figure]:
    """Build one figure for every text, by the name of its data set.

    Rows of two data sets with one text (found by its hash; in the original's CSVs, which have none, the test and validation
    splits of wikitext103 and wikitext2) are one result, and the figure says so. Of rows with the same model, settings, format,
    dtype and device the last one counts.

    Parameters
    ----------
    rows
        From `kvsuite.reporting.perplexity_csv.read_rows` or ``csv_row``, in the order in which they were measured.

    Raises
    ------
    UserError
        If there is no row.
    """
    if not rows:
        raise UserError("no perplexity row to draw; run benchmarks/test_perplexity.py first, or give a CSV with rows")
    figures: dict[str, Figure] = {}
    for group in _by_text(rows):
        names = list(dict.fromkeys(str(row["dataset"]) for row in group))
        dataset = "wikitext2" if "wikitext2" in names else names[0]
        figures[dataset] = _figure(dataset, group)
    return figures


def _by_text(rows: Sequence[CsvRow]) -> list[list[CsvRow]]:
    names: dict[str, str] = {}
    for row in rows:
        if row["text_sha256"]:
            known = names.setdefault(row["text_sha256"], str(row["dataset"]))
            names[row["text_sha256"]] = "wikitext2" if row["dataset"] == "wikitext2" else known
    groups: dict[str, list[CsvRow]] = {}
    for row in rows:
        name = str(row["dataset"])
        same = names[row["text_sha256"]] if row["text_sha256"] else _SAME_TEXT.get((name, str(row["split"])), name)
        groups.setdefault(same, []).append(row)
    return list(groups.values())


def _figure(dataset: str, rows: Sequence[CsvRow]) -> Figure:
    from matplotlib.figure import Figure

    panels: dict[str, list[CsvRow]] = {}
    for row in rows:
        panels.setdefault(_panel_title(row), []).append(row)
    bars = {title: _bars(group) for title, group in panels.items()}
    colours = _colours([tag for group in bars.values() for tag in map(quantization_tag, group.values())])
    width = _HEIGHT * _ASPECT * sum(max(1.0, len(group) / 6) for group in bars.values())
    top = max(row["ppl"] + (row["perplexity_se"] or 0.0) for group in bars.values() for row in group.values())
    with house_style():
        figure = Figure(figsize=(max(width, 6.0), _HEIGHT + 1.4), layout="constrained")
        figure.suptitle(f"{dataset} PPL vs quantization", fontweight="bold")
        grid = figure.subplots(
            1, len(bars), sharey=True, squeeze=False, width_ratios=[max(1.0, len(group) / 6) for group in bars.values()]
        )
        for axes, (title, group) in zip(grid[0], bars.items(), strict=True):
            _draw(axes, group, colours)
            axes.set_title(title, fontsize=9, parse_math=False)
        # the y axis is shared; room for the numbers
        grid[0][0].set_ylim(0, 1.12 * top)
        grid[0][0].set_ylabel(f"PPL ({dataset})", parse_math=False)
        wide = int(16 * figure.get_size_inches()[0])
        figure.supxlabel("\n".join(textwrap.wrap(_caption(dataset, rows, bars), wide)), fontsize=8)
    return figure


def _panel_title(row: CsvRow) -> str:
    """Model and settings: what must be equal for two bars to compare."""
    protocol = row["protocol"] or "hf-strided, original program and formula"
    lines = [
        str(row["hf_model"]),
        f"{protocol}, {row['max_length']}/{row['stride']}"
        if "strided" in protocol
        else f"{protocol}, {row['max_length']}",
        ", ".join(
            part
            for part in (
                f"{row['split']} split" if row["split"] else "",
                f"{row['num_targets']:,} scored tokens" if row["num_targets"] else "",
                f"prefix rule {row['bos']}" if row["bos"] else "",
                f"text {row['text_sha256'][:8]}" if row["text_sha256"] else "",
            )
            if part
        ),
    ]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 52))


def _bars(rows: Sequence[CsvRow]) -> dict[str, CsvRow]:
    """The last row of each key, by a label that tells them apart."""
    last: dict[tuple[str, str, str], CsvRow] = {}
    for row in rows:
        last[quantization_tag(row), str(row["dtype"] or ""), str(row["device"]).partition(":")[0]] = row
    labels = {}
    for key, row in last.items():
        others = [other for other in last if other[0] == key[0]]
        differing = [
            key[place] for place in (1, 2) if len({other[place] for other in others}) > 1 and key[place] != key[0]
        ]
        labels[f"{key[0]} ({', '.join(filter(None, differing))})" if any(differing) else key[0]] = row
    return labels


def _colours(tags: Sequence[str]) -> dict[str, str]:
    chosen = [tag for tag in dict.fromkeys(tags) if tag not in _AS_LOADED]
    return dict.fromkeys(tags, GREY) | {tag: _COLOURS[at % len(_COLOURS)] for at, tag in enumerate(chosen)}


def _draw(axes: Axes, bars: Mapping[str, CsvRow], colours: Mapping[str, str]) -> None:
    heights = [row["ppl"] for row in bars.values()]
    errors = [row["perplexity_se"] or 0.0 for row in bars.values()]
    axes.bar(
        range(len(bars)),
        heights,
        color=[colours[quantization_tag(row)] for row in bars.values()],
        alpha=0.85,
        edgecolor="black",
    )
    known = [place for place, row in enumerate(bars.values()) if row["perplexity_se"] is not None]
    if known:
        axes.errorbar(
            known,
            [heights[place] for place in known],
            yerr=[errors[place] for place in known],
            fmt="none",
            ecolor="black",
            capsize=4,
        )
    for place, height in enumerate(heights):
        axes.annotate(
            f"{height:.2f}",
            (place, height + errors[place]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
        )
    axes.set_xticks(range(len(bars)), list(bars), rotation=30, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_xlabel("quantization")
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.grid(axis="y", linestyle="--", alpha=0.3)


def _caption(dataset: str, rows: Sequence[CsvRow], panels: Mapping[str, Mapping[str, CsvRow]]) -> str:
    drawn = [row for group in panels.values() for row in group.values()]
    parts = []
    same = [
        f"{name} ({', '.join(splits)})"
        for name in dict.fromkeys(str(row["dataset"]) for row in rows)
        if name != dataset and (splits := dict.fromkeys(str(row["split"]) for row in rows if row["dataset"] == name))
    ]
    if same:
        parts.append(f"{', '.join(same)}: same text as {dataset}, one result.")
    elif any(_SAME_TEXT.get((str(row["dataset"]), str(row["split"])), dataset) != dataset for row in rows):
        parts.append("Same text as wikitext2, not a second result.")
    if any(row["perplexity_se"] is not None for row in drawn):
        parts.append("Whiskers: 1 standard error, a lower bound since losses correlate.")
    if any(row["perplexity_se"] is None for row in drawn):
        parts.append("No whisker: no standard error in the file.")
    if len(drawn) < len(rows):
        parts.append(f"{len(rows)} rows, the last one of each case drawn.")
    labels = dict.fromkeys(str(row["mlc_model"]) for row in drawn if row["mlc_model"])
    if labels:
        parts.append("MLC models are labels, none was run.")
    return " ".join(parts)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = BytesIO()
    with house_style():
        figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
