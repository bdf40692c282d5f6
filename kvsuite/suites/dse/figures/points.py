"""What design-space figures are drawn from: samples of points, out of the rows of results and metrics CSVs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from kvsuite.case import model_tag
from kvsuite.reporting.gathered_csv import CsvRow
from kvsuite.suites.dse.columns import AXES, KEY
from kvsuite.suites.dse.csv_files import METRICS, CsvSheet

Settings = tuple[int, ...]
OFF = "off"


@dataclass(frozen=True)
class Quantity:
    """What a figure can have on its y axis.

    Parameters
    ----------
    label
        With the unit.
    short
        For tables.
    better
        ``"lower"`` or ``"higher"``.
    timed
        Whether it is a time or a rate, which repeats scatter, rather than a sum of bytes.
    original
        Its name in the original's metrics CSV.
    """

    label: str
    short: str
    better: str
    timed: bool = True
    original: str | None = None


QUANTITIES = {
    "kvcache_mb": Quantity("KVCache (MB)", "KVCache", "lower", timed=False),
    "total_mb": Quantity("total memory (MB)", "total", "lower", timed=False),
    "prefill_tok_s": Quantity("prefill (computed tok/s)", "prefill tok/s", "higher", original="prefill_tokens_per_s"),
    "decode_tok_s": Quantity("decode (tok/s)", "decode tok/s", "higher", original="decode_tokens_per_s"),
    "e2e_s": Quantity(
        "end-to-end latency of the last request (s)",
        "end to end",
        "lower",
        original="last_finished_request_end_to_end_latency_s",
    ),
    "ttft_s": Quantity("TTFT of the last request (s)", "TTFT", "lower", original="last_finished_request_ttft_s"),
    "chars_s": Quantity("approx chars/s", "chars/s", "higher"),
    "perplexity": Quantity("perplexity", "perplexity", "lower", timed=False),
}
_FROM_RESULTS = ("prefill_tok_s", "decode_tok_s", "ttft_s", "perplexity")
_BY_BATCH = "decode_time_by_batch_size_count{batch_size="
# a weight format in a model's name, as MLC writes it
_FORMAT = re.compile(r"-?(?:q\d+b?f\d+(?:_\d+|_\w+)?|e\dm\d_\w+|fp8_\w+)(?=-|$)")
#: the original's prompt has 39 tokens on Llama, 66 on Mistral
_SHORT_PROMPT = 128
#: memory columns by quantity, and what they are; the first that a file has is drawn
MEMORY_COLUMNS = {
    "kvcache_mb": {
        "mem_measured_kvcache_mb": "the measured size of the cache's buffers",
        "gpu_mem_kvcache_mb": "the engine's own estimate, not measured",
        "mem_predicted_kvcache_mb": "predicted by formula, not measured",
    },
    "total_mb": {
        "mem_measured_peak_mb": "the measured peak of allocations",
        "gpu_mem_total_mb": "the engine's own estimate, not measured",
        "mem_predicted_total_mb": "predicted by formula, not measured",
    },
}


class Condition(NamedTuple):
    """What must be equal, beside the axes, for two samples to be repeats of one measurement."""

    device: str
    machine: str | None
    num_runs: int
    max_tokens: int
    #: whether the last prompt was partly taken from a prefix cache; ``None`` where the file does not say
    cached: bool | None


class QuantityReading(NamedTuple):
    """A quantity of one sample: its values, and how many measurements they stand for."""

    values: tuple[float, ...]
    measurements: int


@dataclass(frozen=True)
class Sample:
    """A row or a block of rows: the settings of all axes and what was read there.

    Parameters
    ----------
    tag
        Series by model and weight format.
    model
        What its weight formats have in common.
    settings
        By `AXES`.
    own
        Whether kvsuite wrote the row, so that ``inert`` is the engine's answer; else it is empty because nobody asked.
    inert
        Reason by axis.
    alone
        Whether requests were short and ran one at a time, as the original's do, for all the row says.
    readings
        By name of `QUANTITIES`.
    """

    tag: str
    model: str
    settings: Settings
    condition: Condition
    own: bool
    inert: Mapping[str, str]
    alone: bool
    readings: Mapping[str, QuantityReading]

    def value(self, axis: str) -> int:
        """Setting of an axis."""
        return self.settings[AXES.index(axis)]


@dataclass(frozen=True)
class Spread:
    """Repeats of one point."""

    middle: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(readings: Sequence[QuantityReading]) -> Spread:
        """Median, smallest and largest of all values."""
        values = [value for reading in readings for value in reading.values]
        return Spread(median(values), min(values), max(values), sum(reading.measurements for reading in readings))


def written(axis: str, value: int) -> str:
    """A setting as a figure shows it."""
    return OFF if axis == "sliding_window_size" and value <= 0 else f"{value:,}".replace(",", " ")


def samples_of(sheet: CsvSheet) -> list[Sample]:
    """The samples of a file: a row of a results CSV each, a block of a metrics CSV each. Failed points have none."""
    rows = [row for row in sheet.rows if row["status"] in (None, "ok")]
    if sheet.table is METRICS:
        return [_of_block(sheet.tag, block) for block in blocks(rows)]
    columns = {name: memory_column(rows, name) for name in MEMORY_COLUMNS}
    return [_of_row(sheet.tag, row, columns) for row in rows]


def blocks(rows: Iterable[CsvRow]) -> Iterator[list[CsvRow]]:
    """Rows of a metrics CSV by point and repeat: a metric's second row begins another block."""
    block: list[CsvRow] = []
    key: tuple[Any, ...] = ()
    seen: set[str] = set()
    for row in rows:
        found = tuple(row[name] for name in (*KEY, "kvsuite_run_id", "case_key"))
        if block and (found != key or row["metric_name"] in seen):
            yield block
            block, seen = [], set()
        key = found
        seen.add(row["metric_name"])
        block.append(row)
    if block:
        yield block


def memory_column(rows: Sequence[CsvRow], quantity: str) -> str | None:
    """The column of a file to draw, ``None`` if all are empty."""
    columns = MEMORY_COLUMNS[quantity]
    return next((column for column in columns if any(row.get(column) is not None for row in rows)), None)


def _of_row(tag: str, row: CsvRow, columns: Mapping[str, str | None]) -> Sample:
    found: dict[str, float | None] = {name: row[name] for name in _FROM_RESULTS}
    found |= {name: row[column] for name, column in columns.items() if column}
    # the original's time is of its client, its metrics CSV has the engine's
    found["e2e_s"] = row["time_s"] if row["engine"] else None
    if row["time_s"] and row["approx_chars"] is not None:
        found["chars_s"] = row["approx_chars"] / row["time_s"]
    readings = {name: QuantityReading((value,), 1) for name, value in found.items() if value is not None}
    return _sample(tag, row, {}, readings)


def _of_block(tag: str, block: Sequence[CsvRow]) -> Sample:
    by_name = {row["metric_name"]: row for row in block if row["metric_value"] is not None}
    readings = {}
    for name, quantity in QUANTITIES.items():
        for metric in (quantity.original, name):
            if metric in by_name:
                row = by_name[metric]
                ends = [row["smallest"], row["metric_value"], row["largest"]]
                values = tuple(float(value) for value in ends if value is not None)
                readings[name] = QuantityReading(values, row["samples"] or 1)
                break
    return _sample(tag, block[0], by_name, readings)


def _is_cached(by_name: Mapping[str, CsvRow]) -> bool | None:
    for computed, prompt in (
        ("last_finished_request_prefill_tokens", "last_finished_request_prompt_tokens"),
        ("prefill_tokens_sum", "prompt_tokens_sum"),
    ):
        if computed in by_name and prompt in by_name:
            return bool(by_name[computed]["metric_value"] < by_name[prompt]["metric_value"])
    return None


def _is_alone(by_name: Mapping[str, CsvRow]) -> bool:
    prompt = by_name.get("last_finished_request_prompt_tokens")
    batched = [name for name in by_name if name.startswith(_BY_BATCH) and name != f"{_BY_BATCH}1}}"]
    return not batched and (prompt is None or bool(prompt["metric_value"] <= _SHORT_PROMPT))


def model_of(row: CsvRow) -> str:
    """The model without its weight format: by the row's own field, of the original's rows, which have none, by the name."""
    tag = model_tag(str(row["model"]))
    if row["engine"] is None:
        return _FORMAT.sub("", tag)
    return re.sub(rf"-?{re.escape(row['quantization'])}(?=-|$)", "", tag) if row["quantization"] else tag


def _sample(tag: str, row: CsvRow, by_name: Mapping[str, CsvRow], readings: Mapping[str, QuantityReading]) -> Sample:
    machine = " ".join(str(row[name]) for name in ("host", "device_name") if row[name]) or None
    return Sample(
        tag=tag,
        model=model_of(row),
        # any value below 1 means off
        settings=tuple(-1 if axis == "sliding_window_size" and row[axis] <= 0 else row[axis] for axis in AXES),
        condition=Condition(row["device"], machine, row["num_runs"], row["max_tokens"], _is_cached(by_name)),
        own=row["engine"] is not None,
        inert=row["inert_axes"] or {},
        alone=row["engine"] is None and _is_alone(by_name),
        readings=readings,
    )


def spreads(samples: Iterable[Sample], name: str) -> dict[tuple[Settings, Condition], Spread]:
    """Repeats of each point taken together, where the quantity was read; runs and caches do not change a sum of bytes."""
    found: dict[tuple[Settings, Condition], list[QuantityReading]] = {}
    for sample in samples:
        if name in sample.readings:
            condition = sample.condition
            if not QUANTITIES[name].timed:
                condition = condition._replace(num_runs=0, max_tokens=0, cached=None)
            found.setdefault((sample.settings, condition), []).append(sample.readings[name])
    return {key: Spread.of(readings) for key, readings in found.items()}


def source_of(results: Sequence[Sample], metrics: Sequence[Sample], tag: str, name: str) -> list[Sample]:
    """A tag's samples with a quantity: those of its metrics CSV where that has it, else those of its results CSV."""
    for samples in (metrics, results):
        found = [sample for sample in samples if sample.tag == tag and name in sample.readings]
        if found:
            return found
    return []
