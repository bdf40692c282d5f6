"""Draw the same design points on several engines from their run folders: decode step, first token and memory against batch.

    python docs/measurements/engines_figure.py docs/figures/h200_engines.png RUN RUN ...
    python docs/measurements/engines_figure.py docs/figures/h200_engines.png reports/*/records.jsonl

A line for every engine, KV format and context; dotted is the floor of a decode step, weights and live keys and values at the
copy bandwidth that the runs of that format and context measured. Of a point that was measured more than once the last counts.
Memory is the peak of torch's allocator; of `mlc`, which has none, the driver's number less that before its server started, CUDA
context included.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator

from kvsuite.errors import UserError
from kvsuite.store.records_file import read_records

Row = dict[str, Any]
PANELS = (
    ("decode_step_s", 1e3, "decode step, ms (dotted: floor)"),
    ("ttft_s", 1.0, "time to the first token, mean, s"),
    ("memory", 2**-30, "peak of torch's allocator, GiB"),
)
MARKS = {"nano": "o", "vllm": "s", "mlc": "^", "hf": "D", "llamacpp": "v"}


def rows_of(paths: list[Path]) -> list[Row]:
    """The measured design points, each engine's last record of a point."""
    found: dict[tuple[str, str], Row] = {}
    for path in paths:
        for row in read_records(path)[1]:
            if row["suite"] == "dse" and row["status"] == "ok":
                found[row["case"]["engine"], row["case"]["name"]] = row
    return list(found.values())


def value(row: Row, name: str) -> float | None:
    """A metric's value, None where the record has none."""
    if name == "memory":
        return memory(row)
    number = (row["metrics"].get(name) or {}).get("value")
    return None if number is None else float(number)


def memory(row: Row) -> float | None:
    """Peak of the allocator, or what the driver saw come where the engine is served from a process without torch."""
    driver = row["metrics"].get("mem_measured_driver_bytes") or {}
    if row["case"]["engine"] == "mlc":
        return None if driver.get("value") is None else float(driver["value"] - driver["before_bytes"])
    return value(row, "mem_measured_peak_bytes")


def stored_as(row: Row) -> str:
    """The cache's format: the one asked for, else the dtype that the model is computed in."""
    return str(row["case"]["params"].get("kv_cache_dtype") or row["effective"]["dtype"])


def draw(rows: list[Row]) -> Any:
    """One panel a metric, batches from left to right."""
    lines: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: int(row["case"]["params"]["batch"])):
        lines[row["case"]["engine"], stored_as(row), int(row["case"]["params"]["context"])].append(row)
    stored = sorted({(format_name, context) for _, format_name, context in lines})
    batches = sorted({int(row["case"]["params"]["batch"]) for row in rows})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(5.0 * len(PANELS), 4.4), layout="constrained")
    for axis, (metric, scale, label) in zip(axes, PANELS, strict=True):
        for (engine, format_name, context), own in sorted(lines.items()):
            colour = f"C{stored.index((format_name, context))}"
            points = [(row["case"]["params"]["batch"], value(row, metric)) for row in own]
            points = [(batch, number * scale) for batch, number in points if number is not None]
            if points:
                name = f"{engine}, {format_name}" + (
                    f", context {context:,}" if len({c for _, c in stored}) > 1 else ""
                )
                style = "-" if engine == "nano" else "--"
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    marker=MARKS.get(engine, "x"),
                    ms=5,
                    lw=1.3,
                    color=colour,
                    label=name,
                )
        if metric == "decode_step_s":
            for number, kind in enumerate(stored):
                floor: dict[int, list[float]] = defaultdict(list)
                for row in rows:
                    least = value(row, "tpot_floor_s")
                    if (stored_as(row), row["case"]["params"]["context"]) == kind and least is not None:
                        floor[row["case"]["params"]["batch"]].append(least * scale)
                if floor:
                    axis.plot(
                        sorted(floor), [min(floor[batch]) for batch in sorted(floor)], ":", lw=1, color=f"C{number}"
                    )
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        if metric == "memory":
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log", base=2)
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75) if high < 8 * low else (1.0,)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.3g}"))
        axis.set_xlabel("sequences")
        if metric == "memory" and any(row["case"]["engine"] == "mlc" for row in rows):
            label += "; mlc: what the driver saw come"
        axis.set_title(label, loc="left", fontsize=10)
        axis.grid(visible=True, alpha=0.25)
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders or their records.jsonl")
    parser.add_argument("--title")
    asked = parser.parse_args()
    try:
        rows = rows_of(asked.runs)
    except UserError as error:
        parser.error(str(error))
    if not rows:
        parser.error("no design point that was measured in these runs")
    models = sorted({str(row["case"]["model"]) for row in rows})
    if len(models) > 1:
        parser.error(f"runs of several models: {', '.join(models)}; name those of one")
    figure = draw(rows)
    first = rows[0]
    figure.suptitle(asked.title or str(first["case"]["model"]).removeprefix("dummy:"), x=0.01, ha="left", fontsize=11)
    figure.savefig(asked.picture, dpi=110)


if __name__ == "__main__":
    main()
