"""The console tables of the sensitivity suite: formats by their size, then layers by what they lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvsuite import console
from kvsuite.meters.divergence import is_trap
from kvsuite.reporting.aggregate import Row, by_name, suite_rows, value
from kvsuite.reporting.table_parts import MISSING, MetricColumn, case_table, footnotes, own_columns

from .cases import LAYER

if TYPE_CHECKING:
    from rich.console import RenderableType

LEGEND = (
    "KLD: from the full cache in the model's dtype, nats a token ± 1 standard error; dKLD: less that of the base, dNLL: loss "
    "- full cache's, both paired ± 2 standard errors.",
    "† trap: a better loss than the full cache's, but other most likely tokens: no improvement.",
    "A layer's line: this layer's keys (k) or values (v) alone are in the format, all others in the model's dtype.",
)


def sensitivity_table(rows: Sequence[Row]) -> RenderableType:
    """Formats for all layers and mixed assignments, largest first; then layers, the most sensitive first.

    Raises
    ------
    UserError
        If no row is of the suite.
    """
    labelled = by_name(suite_rows(rows, "sensitivity"))
    whole = {name: row for name, row in labelled.items() if row["case"]["params"]["kind"] != LAYER}
    layers = {name: row for name, row in labelled.items() if name not in whole}
    whole = dict(sorted(whole.items(), key=lambda one: -(value(one[1], "kv_bits") or 0.0)))
    layers = dict(sorted(layers.items(), key=lambda one: -(value(one[1], "kld") or 0.0)))
    distance = [
        MetricColumn("kld", 17, cell=lambda row: _with_error(row, "kld", 1, ".5f")),
        MetricColumn("kld_p99", 8, title="p99", spec=".4f"),
        MetricColumn("same_top1", 8),
        MetricColumn("nll_difference", 17, cell=_loss),
    ]
    of_format = [
        MetricColumn("kv_bits", 7),
        MetricColumn("kv_bytes_exact", 8),
        *distance,
        MetricColumn("kld_difference", 19, cell=lambda row: _with_error(row, "kld_difference", 2, "+.5f")),
        *own_columns(rows),
    ]
    tables: list[RenderableType] = []
    if whole:
        tables.append(case_table("Format", whole, of_format))
    if layers:
        tables.append(case_table("Layer alone", layers, distance))
    # a trap has its sign beside the loss
    quiet = {
        name: {**row, "warnings": [text for text in row["warnings"] if not str(text).startswith("trap: ")]}
        for name, row in labelled.items()
    }
    return console.stacked(tables, footnotes(quiet, distance))


def _loss(row: Row) -> str:
    difference, same = value(row, "nll_difference"), value(row, "same_top1")
    is_marked = difference is not None and same is not None and is_trap(difference, same)
    return "†" * is_marked + _with_error(row, "nll_difference", 2, "+.4f")


def _with_error(row: Row, metric: str, times: int, spec: str) -> str:
    number, error = value(row, metric), value(row, f"{metric}_se")
    if number is None:
        return MISSING
    shown = format(number, spec)
    return shown if error is None else f"{shown}±{format(times * error, spec.replace('+', ''))}"
