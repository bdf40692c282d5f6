"""Draw the same design points on several engines: decode step, first token and memory against batch.

    python docs/measurements/engines_figure.py docs/figures/h200_engines.png RUN RUN ...
    python docs/measurements/engines_figure.py docs/figures/h200_engines.png reports/*/records.jsonl
    python docs/measurements/engines_figure.py docs/figures/h200_mlc_nano.png docs/measurements/h200_mlc_nano.csv

From run folders, or from a CSV of the numbers of runs whose records are not kept (``COLUMNS``; an empty field: not measured).
A line for every engine, KV format and context; dotted is the floor of a decode step, weights and live keys and values at the
copy bandwidth that the runs of that format and context measured. Of a point that was measured more than once the last counts.
Memory is the peak of torch's allocator; of `mlc`, which has none, the driver's number less that before its server started, CUDA
context included.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from dataclasses import dataclass
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
    ("memory_bytes", 2**-30, "peak of torch's allocator, GiB"),
)
MARKS = {"nano": "o", "vllm": "s", "mlc": "^", "hf": "D", "llamacpp": "v"}
COLUMNS = ("model", "engine", "kv_format", "context", "batch", "decode_step_ms", "floor_ms", "ttft_ms", "memory_mib")


@dataclass(frozen=True)
class Point:
    """A design point on an engine; None is what was not measured."""

    name: str
    model: str
    engine: str
    kv_format: str
    context: int
    batch: int
    decode_step_s: float | None
    floor_s: float | None
    ttft_s: float | None
    memory_bytes: float | None


def points_of(paths: list[Path]) -> list[Point]:
    """The measured design points, each engine's last of a point."""
    found: dict[tuple[str, str], Point] = {}
    for path in paths:
        for point in numbers_of(path) if path.suffix == ".csv" else records_of(path):
            found[point.engine, point.name] = point
    return list(found.values())


def records_of(run: Path) -> list[Point]:
    """Those of a run folder."""
    points = []
    for row in read_records(run)[1]:
        if row["suite"] == "dse" and row["status"] == "ok":
            case, params = row["case"], row["case"]["params"]
            points.append(
                Point(
                    name=case["name"],
                    model=str(case["model"]),
                    engine=case["engine"],
                    kv_format=stored_as(row),
                    context=int(params["context"]),
                    batch=int(params["batch"]),
                    decode_step_s=value(row, "decode_step_s"),
                    floor_s=value(row, "tpot_floor_s"),
                    ttft_s=value(row, "ttft_s"),
                    memory_bytes=memory(row),
                )
            )
    return points


def numbers_of(table: Path) -> list[Point]:
    """Those of a CSV of numbers."""
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{table}: {error.strerror}") from error
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"{table}: its first line is not {','.join(COLUMNS)}")

    def number(text: str, scale: float) -> float | None:
        return float(text) * scale if text else None

    return [
        Point(
            name=f"{line['kv_format']}-ctx{line['context']}-bs{line['batch']}",
            model=line["model"],
            engine=line["engine"],
            kv_format=line["kv_format"],
            context=int(line["context"]),
            batch=int(line["batch"]),
            decode_step_s=number(line["decode_step_ms"], 1e-3),
            floor_s=number(line["floor_ms"], 1e-3),
            ttft_s=number(line["ttft_ms"], 1e-3),
            memory_bytes=number(line["memory_mib"], 2**20),
        )
        for line in reader
    ]


def value(row: Row, name: str) -> float | None:
    """A metric's value, None where the record has none."""
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


def draw(points: list[Point]) -> Any:
    """One panel a metric, batches from left to right."""
    lines: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.batch):
        lines[point.engine, point.kv_format, point.context].append(point)
    stored = sorted({(kv_format, context) for _, kv_format, context in lines})
    batches = sorted({point.batch for point in points})
    figure, axes = plt.subplots(1, len(PANELS), figsize=(5.0 * len(PANELS), 4.4), layout="constrained")
    for axis, (metric, scale, label) in zip(axes, PANELS, strict=True):
        for (engine, kv_format, context), own in sorted(lines.items()):
            known = [(point.batch, getattr(point, metric)) for point in own]
            drawn = [(batch, number * scale) for batch, number in known if number is not None]
            if drawn:
                name = f"{engine}, {kv_format}" + (f", context {context:,}" if len({c for _, c in stored}) > 1 else "")
                axis.plot(
                    *zip(*drawn, strict=True),
                    "-" if engine == "nano" else "--",
                    marker=MARKS.get(engine, "x"),
                    ms=5,
                    lw=1.3,
                    color=f"C{stored.index((kv_format, context))}",
                    label=name,
                )
        if metric == "decode_step_s":
            for number, kind in enumerate(stored):
                floor: dict[int, list[float]] = defaultdict(list)
                for point in points:
                    if (point.kv_format, point.context) == kind and point.floor_s is not None:
                        floor[point.batch].append(point.floor_s * scale)
                if floor:
                    axis.plot(
                        sorted(floor), [min(floor[batch]) for batch in sorted(floor)], ":", lw=1, color=f"C{number}"
                    )
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        if metric == "memory_bytes":
            axis.set_ylim(bottom=0)
        else:
            axis.set_yscale("log", base=2)
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75) if high < 8 * low else (1.0,)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.3g}"))
        axis.set_xlabel("sequences")
        if metric == "memory_bytes" and any(point.engine == "mlc" for point in points):
            label += "; mlc: what the driver saw come"
        axis.set_title(label, loc="left", fontsize=10)
        axis.grid(visible=True, alpha=0.25)
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, their records.jsonl, or CSVs of numbers")
    parser.add_argument("--title")
    asked = parser.parse_args()
    try:
        points = points_of(asked.runs)
    except UserError as error:
        parser.error(str(error))
    if not points:
        parser.error("no design point that was measured in these runs")
    models = sorted({point.model for point in points})
    if len(models) > 1:
        parser.error(f"runs of several models: {', '.join(models)}; name those of one")
    figure = draw(points)
    figure.suptitle(asked.title or models[0].removeprefix("dummy:"), x=0.01, ha="left", fontsize=11)
    figure.savefig(asked.picture, dpi=110)


if __name__ == "__main__":
    main()
