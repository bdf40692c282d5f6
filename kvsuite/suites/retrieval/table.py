"""The console table of the retrieval suite: how much each cache still knows, in all and by depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsuite import console
from kvsuite.reporting.aggregate import Row, by_name, suite_rows, value
from kvsuite.reporting.table_parts import MISSING, MetricColumn, case_table, footnotes, own_columns

from .rows import MARK, MARK_MEANING, cells_of, is_discriminative, is_published, is_reuse

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


def _marked(metric: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        text = _with_error(metric, ".2f")(row)
        return text if text == MISSING or is_discriminative(row) else f"{MARK}{text}"

    return cell


_exact, _score = _marked("retrieval_exact"), _marked("task_score")


_COLUMNS: tuple[MetricColumn, ...] = (
    MetricColumn("retrieval_exact", 11, title="Exact", cell=_exact),
    MetricColumn("retrieval_exact_full", 6, title="Full", spec=".2f"),
    MetricColumn("retrieval_share", 7, spec=".2f"),
    MetricColumn("retrieval_logprob", 13, title="LogProb", cell=_with_error("retrieval_logprob", ".2f")),
    MetricColumn("retrieval_logprob_diff", 14, title="LogP-Full", cell=_with_error("retrieval_logprob_diff", "+.2f")),
    MetricColumn("kv_bytes_exact_prefill", 10, title="KV(KiB)", cell=lambda row: _kib(row)),
    MetricColumn("", 12, title="LogP by depth", cell=lambda row: _by_depth(row)),
)
_TIMES = (MetricColumn("ttft_s"), MetricColumn("compress_s", title="Compress(s)", spec=".4f"))
_PUBLISHED_COLUMNS: tuple[MetricColumn, ...] = (
    MetricColumn("task_score", 11, title="Score", cell=_score),
    MetricColumn("task_score_full", 6, title="Full", spec=".2f"),
    MetricColumn("task_score_diff", 12, title="Score-Full", cell=_with_error("task_score_diff", "+.2f")),
    MetricColumn("task_context_tokens", 8, title="Context", spec=".0f"),
    MetricColumn("task_kept_tokens", 8, title="Kept", spec=".0f"),
    MetricColumn("kv_bytes_exact_prefill", 10, title="KV(KiB)", cell=lambda row: _kib(row)),
)
_REUSE_COLUMNS: tuple[MetricColumn, ...] = (
    MetricColumn("retrieval_exact", 11, title="Exact", cell=_exact),
    MetricColumn("reuse_differing", 7),
    MetricColumn("reuse_hit_tokens", 7),
    MetricColumn("ttft_s", 10, title="TTFT cold", spec=".4f"),
    MetricColumn("ttft_cached_s", 10, title="TTFT warm", spec=".4f"),
)


# the full cache has none of these, which is no gap
_OF_THE_REST = ("retrieval_logprob_diff", "task_score_diff")


def retrieval_table(rows: Sequence[Row]) -> RenderableType:
    """The retrieval suite's table with its notes.

    Raises
    ------
    UserError
        If no row is of the retrieval suite.
    """
    rows = suite_rows(rows, "retrieval")
    own = own_columns(rows)
    parts: list[Any] = []
    for head, columns, shown in (
        ("Case", _COLUMNS, [row for row in rows if not is_reuse(row) and not is_published(row)]),
        ("Published task", _PUBLISHED_COLUMNS, [row for row in rows if is_published(row)]),
        ("Requests in turn", _REUSE_COLUMNS, [row for row in rows if is_reuse(row)]),
    ):
        if shown:
            # of random weights there is nothing else to tell
            if columns is _COLUMNS:
                columns = (*columns, *(one for one in _TIMES if any(value(row, one.metric) for row in shown)))
            labelled = by_name(shown)
            noted = [column for column in (*columns, *own) if column.metric not in _OF_THE_REST]
            parts += [case_table(head, labelled, [*columns, *own]), *footnotes(labelled, noted)]
    return console.stacked(parts)


def retrieval_legend(rows: Sequence[Row]) -> list[str]:
    """What the columns of `retrieval_table` mean."""
    depths = next((_depths(row) for row in rows if cells_of(row)), "")
    legend = []
    if not all(is_reuse(row) or is_published(row) for row in rows):
        legend.append(
            "Exact: share of greedy answers that are right in every token. Full: the full cache's on the same samples. Tokens: "
            "share of tokens. LogProb: mean log-probability of the right answer, nats. ±: 2 standard errors over samples, "
            "paired for LogP-Full. KV: bytes once the context is compressed."
        )
    if depths:
        legend.append(f"LogP by depth: at {depths} of the context (0 is its begin).")
    if any(map(is_published, rows)):
        legend.append(
            "Score: by the task's own rule, 0 to 1; Full: the full cache's on the same samples; ±: 2 standard errors, paired "
            "for Score-Full. Context, Kept: tokens of a context, and positions a layer holds of them: means. KV: the longest."
        )
    if any(map(is_reuse, rows)):
        legend.append(
            "In turn: Differ counts requests whose output a warm prefix cache changed. Hits: prompt tokens found. TTFT: "
            "seconds, both of requests behind the first of a context; cold is without a prefix cache."
        )
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
