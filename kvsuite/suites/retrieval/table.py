"""The console table of the retrieval suite: how much each cache still knows, in all and by depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite import console
from kvsuite.reporting.aggregate import Row, by_name, suite_rows, value
from kvsuite.reporting.table_parts import MISSING, Column, case_table, footnotes, own_columns

from .rows import MARK, MARK_MEANING, cells_of, is_discriminative

if TYPE_CHECKING:
    from rich.console import RenderableType


def _with_error(metric: str, spec: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        mean, error = value(row, metric), value(row, f"{metric}_se")
        if mean is None:
            return MISSING
        text = format(mean, spec)
        return text if error is None else f"{text}±{2 * error:{spec.lstrip('+')}}"

    return cell


def _exact(row: Row) -> str:
    text = _with_error("retrieval_exact", ".2f")(row)
    return text if text == MISSING or is_discriminative(row) else f"{MARK}{text}"


_COLUMNS = (
    Column("retrieval_exact", 11, title="Exact", cell=_exact),
    Column("retrieval_exact_full", 6, title="Full", spec=".2f"),
    Column("retrieval_share", 7, spec=".2f"),
    Column("retrieval_logprob", 13, title="LogProb", cell=_with_error("retrieval_logprob", ".2f")),
    Column("retrieval_logprob_diff", 14, title="LogP-Full", cell=_with_error("retrieval_logprob_diff", "+.2f")),
    Column("kv_bytes_exact_prefill", 10, title="KV(KiB)", cell=lambda row: _kib(row)),
    Column("", 12, title="LogP by depth", cell=lambda row: _by_depth(row)),
)


def retrieval_table(rows: Sequence[Row]) -> RenderableType:
    """The retrieval suite's table with its notes.

    Raises
    ------
    UserError
        If no row is of the retrieval suite.
    """
    rows = suite_rows(rows, "retrieval")
    labelled = by_name(rows)
    columns = [*_COLUMNS, *own_columns(rows)]
    noted = [column for column in columns if column.metric != "retrieval_logprob_diff"]
    return console.stacked([case_table("Case", labelled, columns)], footnotes(labelled, noted))


def retrieval_legend(rows: Sequence[Row]) -> list[str]:
    """What the columns of `retrieval_table` mean."""
    depths = next((_depths(row) for row in rows if cells_of(row)), "")
    legend = [
        "Exact: share of greedy answers that are right in every token. Full: the full cache's on the same samples. Tokens: "
        "share of tokens. LogProb: mean log-probability of the right answer, nats. ±: 2 standard errors over samples, "
        "paired for LogP-Full. KV: bytes once the context is compressed."
    ]
    if depths:
        legend.append(f"LogP by depth: at {depths} of the context (0 is its begin).")
    if not all(is_discriminative(row) for row in rows):
        legend.append(MARK_MEANING)
    return legend


def _kib(row: Row) -> str:
    found = value(row, "kv_bytes_exact_prefill")
    return MISSING if found is None else f"{found / 1024:.0f}"


def _by_depth(row: Row) -> str:
    cells: Sequence[Mapping[str, Any]] = cells_of(row)
    return " ".join(f"{cell['logprob']:.1f}" for cell in cells) or MISSING


def _depths(row: Row) -> str:
    return ", ".join(f"{cell['depth']:g}" for cell in cells_of(row) if cell["depth"] is not None)
