"""The console table of the perplexity suite: what every number's protocol is, then quality, bytes and speed by format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvsuite import console
from kvsuite.reporting.aggregate import Row, by_name, suite_rows, value
from kvsuite.reporting.table_parts import (
    MISSING,
    SPREAD,
    MetricColumn,
    case_table,
    footnotes,
    own_columns,
    tpot_spread,
)
from kvsuite.workloads.windows import protocol_title

if TYPE_CHECKING:
    from rich.console import RenderableType


def _ratio(row: Row) -> str:
    ratio, se = value(row, "ppl_ratio_reference"), value(row, "ppl_ratio_reference_se")
    if ratio is None:
        return MISSING
    return f"{ratio:.4f}" if se is None else f"{ratio:.4f}±{2 * se:.4f}"


_QUALITY = (MetricColumn("perplexity", spec=".3f"), MetricColumn("perplexity_se", 8), MetricColumn("accuracy", 8))
_DISTANCE = (MetricColumn("ppl_ratio_reference", 15, cell=_ratio), MetricColumn("kld", 9), MetricColumn("same_top1", 8))
_WORDS = (MetricColumn("word_perplexity"), MetricColumn("bits_per_byte", 9))
_REST = (
    MetricColumn("mem_weights_bytes", 9),
    MetricColumn("bits_per_weight", 7),
    MetricColumn("ttft", 9),
    MetricColumn("tpot", 9),
    MetricColumn("tpot", 7, title="TPOT±", cell=tpot_spread),
    MetricColumn("score_tok_s", 9),
)


def perplexity_table(rows: Sequence[Row]) -> RenderableType:
    """The perplexity suite's table.

    A line for each protocol first: perplexities of different lines do not compare. Columns that no case has are left out.
    ``PPL±`` is one standard error, ``PPL/ref`` the paired ratio to the reference weights ± 2 standard errors.

    Raises
    ------
    UserError
        If no row is of the perplexity suite.
    """
    rows = suite_rows(rows, "perplexity")
    labelled = by_name(rows)
    optional = (group for group in (_DISTANCE, _WORDS) if _has(rows, group))
    columns = [*_QUALITY, *(column for group in optional for column in group), *_REST, *own_columns(rows)]
    return console.stacked(_settings(labelled), [case_table("Case", labelled, columns)], footnotes(labelled, columns))


def perplexity_legend(rows: Sequence[Row]) -> str:
    """What the columns mean that `perplexity_table` shows of these rows."""
    distance = " PPL/ref: against the reference weights on the same tokens ± 2 standard errors."
    shown = distance if _has(suite_rows(rows, "perplexity"), _DISTANCE) else ""
    return f"W: weights in memory. Bits/w: per weight, embeddings in. {SPREAD}{shown} Scored/s: scored tokens a second."


def _has(rows: Iterable[Row], group: Sequence[MetricColumn]) -> bool:
    return any(group[0].metric in row["metrics"] for row in rows)


def _settings(labelled: Mapping[str, Row]) -> list[str]:
    """What must be equal for two perplexities to compare, once each."""
    lines = []
    for row in labelled.values():
        if row["status"] != "ok":
            continue
        workload, dataset = row["case"]["workload"], row["dataset"]
        protocol = protocol_title(workload["protocol"])
        lines.append(
            f"{dataset['name']}: {protocol}, window {workload['max_length']}, step {workload['stride']}, prefix "
            f"rule {dataset['bos']}, {row['tokens']['scored']:,} of {row['tokens']['text']:,} tokens scored, text "
            f"{dataset['text_hash'].removeprefix('sha256:')[:8]}"
        )
        lines += [f"  note: {note}" for note in dataset["notes"]]
    return list(dict.fromkeys(lines))
