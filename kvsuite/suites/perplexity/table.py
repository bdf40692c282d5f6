"""The console table of the perplexity suite: what every number's protocol is, then quality, bytes and speed by format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvsuite.reporting.aggregate import MIB, Row, by_name, failure, suite_rows, value
from kvsuite.reporting.table_parts import (
    MISSING,
    SPREAD,
    Column,
    footnotes,
    format_number,
    join_cells,
    scaled,
    tpot_spread,
)
from kvsuite.workloads.windows import protocol_title

_QUALITY: tuple[Column, ...] = (("PPL", 10, "perplexity"), ("PPL±", 8, "perplexity_se"), ("Acc", 8, "accuracy"))
_DISTANCE: tuple[Column, ...] = (("PPL/ref", 15, "ppl_ratio_reference"), ("KLD", 9, "kld"), ("Top1", 8, "same_top1"))
_WORDS: tuple[Column, ...] = (("Word PPL", 10, "word_perplexity"), ("Bits/byte", 9, "bits_per_byte"))
_REST: tuple[Column, ...] = (
    ("W MiB", 9, "mem_weights_bytes"),
    ("Bits/w", 7, "bits_per_weight"),
    ("TTFT(s)", 9, "ttft"),
    ("TPOT(s)", 9, "tpot"),
    ("TPOT±", 7, "tpot"),
    ("Scored/s", 9, "score_tok_s"),
)
_FORMATS = {
    "perplexity": ".3f",
    "perplexity_se": ".3f",
    "accuracy": ".2%",
    "kld": ".5f",
    "same_top1": ".2%",
    "word_perplexity": ".3f",
    "bits_per_byte": ".4f",
    "bits_per_weight": ".3f",
    "ttft": ".4f",
    "tpot": ".4f",
    "score_tok_s": ".0f",
}


def perplexity_table(rows: Sequence[Row]) -> str:
    """Render the perplexity suite as text.

    A line for each protocol first: perplexities of different lines do not compare. Columns that no case has are left out.
    ``PPL±`` is one standard error, ``PPL/ref`` the paired ratio to the reference weights ± 2 standard errors.

    Raises
    ------
    UserError
        If no row is of the perplexity suite.
    """
    labelled = by_name(suite_rows(rows, "perplexity"))
    first = max(25, *(len(name) for name in labelled))
    optional = (group for group in (_DISTANCE, _WORDS) if _has(labelled.values(), group))
    columns = (*_QUALITY, *(column for group in optional for column in group), *_REST)
    header = join_cells("Case", first, [f"{title:>{width}}" for title, width, _ in columns])
    rule = max(100, len(header))
    lines = [*_settings(labelled), header, "-" * rule]
    for name, row in labelled.items():
        if row["status"] != "ok":
            lines.append(f"{name:<{first}} {failure(row)}")
            continue
        lines.append(join_cells(name, first, [f"{_cell(row, column):>{column[1]}}" for column in columns]))
    lines.append("=" * rule)
    notes = footnotes(labelled, columns)
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


def perplexity_legend(rows: Sequence[Row]) -> str:
    """What the columns mean that `perplexity_table` shows of these rows."""
    distance = " PPL/ref: against the reference weights on the same tokens ± 2 standard errors."
    shown = distance if _has(suite_rows(rows, "perplexity"), _DISTANCE) else ""
    return f"W: weights in memory. Bits/w: per weight, embeddings in. {SPREAD}{shown} Scored/s: scored tokens a second."


def _has(rows: Iterable[Row], group: Sequence[Column]) -> bool:
    return any(group[0][2] in row["metrics"] for row in rows)


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
    return list(dict.fromkeys(lines)) + ([""] if lines else [])


def _cell(row: Row, column: Column) -> str:
    title, _, metric = column
    if title == "TPOT±":
        return tpot_spread(row)
    if title == "W MiB":
        return format_number(scaled(value(row, metric), MIB), ".1f")
    if title == "PPL/ref":
        ratio, se = value(row, metric), value(row, "ppl_ratio_reference_se")
        if ratio is None:
            return MISSING
        return f"{ratio:.4f}" if se is None else f"{ratio:.4f}±{2 * se:.4f}"
    return format_number(value(row, metric), _FORMATS[metric])
