"""Table and CSV of rows of which nothing is known but what every record has."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite.case import canonical_json, id_token
from kvsuite.console import stacked
from kvsuite.foreign_text import csv_cell
from kvsuite.metrics.registry import Metric, metric_of
from kvsuite.record import metric_value
from kvsuite.reporting.aggregate import Row, by_name, failure
from kvsuite.reporting.table_parts import MetricColumn, case_table, footnotes, own_columns

if TYPE_CHECKING:
    from rich.console import RenderableType

#: columns of a table without a headline: more do not fit a terminal
_MOST_COLUMNS = 6
_AXES = ("engine", "model", "device", "dtype", "quantization", "policy")


def generic_table(suite: str, rows: Sequence[Row], headline: Sequence[str] = ()) -> RenderableType:
    """A line a case: its headline metrics, or the first ones that any case has, each as it says that it is shown."""
    labelled = by_name(rows)
    metrics = list(headline) or _metrics(rows)[:_MOST_COLUMNS]
    shown = [MetricColumn(name, title=_metric(rows, name).column) for name in metrics]
    columns = [*shown, *(column for column in own_columns(rows) if column.metric not in metrics)]
    return stacked([case_table(suite, labelled, columns)], footnotes(labelled, columns))


def generic_csv(run: Mapping[str, Any], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row for every case: what it was, how it ended, and the value of every metric under the metric's name."""
    metrics = _metrics(rows)
    params = list(dict.fromkeys(name for row in rows for name in row["case"]["params"]))
    return [
        {
            "run_id": run.get("run_id"),
            "id": row["id"],
            "case_key": row["case_key"],
            "name": row["case"]["name"],
            "status": row["status"],
            "reason": None if row["status"] == "ok" else failure(row),
            **{axis: row["case"][axis] for axis in _AXES},
            **{f"params.{name}": row["case"]["params"].get(name) for name in params},
            **{name: metric_value(dict(row), name) for name in metrics},
        }
        for row in rows
    ]


def generic_files(suite: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """``<suite>_results.csv``."""
    if not rows:
        return {}
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _field(value) for name, value in row.items()} for row in rows)
    return {f"{id_token(suite).lstrip('.') or 'suite'}_results.csv": buffer.getvalue()}


def _metrics(rows: Sequence[Row]) -> list[str]:
    """Metrics that any of the rows has a value of, in the order of the records."""
    return list(
        dict.fromkeys(name for row in rows for name, entry in row["metrics"].items() if entry.get("value") is not None)
    )


def _metric(rows: Sequence[Row], name: str) -> Metric:
    return metric_of(name, next((row["metrics"][name] for row in rows if name in row["metrics"]), None))


def _field(value: Any) -> Any:
    return csv_cell(canonical_json(value) if isinstance(value, dict | list) else value)
