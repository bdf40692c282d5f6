"""What the suites' console tables share: columns of metrics, cells, and the notes below a table."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from kvsuite import console
from kvsuite.metrics.registry import is_builtin, metric_of

from .aggregate import Row, ci_half_width, entry, failure, missing_reason, value
from .machines import has_several_machines, machine_of

MISSING = "n/a"
#: what the spread columns of every suite mean
SPREAD = "TPOT±: half the 95 % interval of the mean. PPL±: 1 standard error."
_LABEL_WIDTH = 25
# by how much a time varies, which is another number in every case
_VARIES = re.compile(r"(?<=varies by )\d+(?=%)")


@dataclass(frozen=True)
class MetricColumn:
    """A column of a suite's table.

    Parameters
    ----------
    metric
        Name or alias of the metric that it shows, whose lack is noted below the table; empty for one that shows none.
    width
        Least width.
    title
        What stands above it; the metric's own where it is empty.
    spec
        How the number is written, in place of the metric's own format.
    cell
        The whole cell of a finished case, in place of the metric's number.
    """

    metric: str
    width: int = 10
    title: str = ""
    spec: str = ""
    cell: Callable[[Row], str] | None = None

    @property
    def heading(self) -> str:
        """What stands above it."""
        return self.title or metric_of(self.metric).column

    def text(self, row: Row) -> str:
        """Its cell of a finished case."""
        if self.cell is not None:
            return self.cell(row)
        found = value(row, self.metric)
        return MISSING if found is None else metric_of(self.metric, entry(row, self.metric)).text(found, self.spec)


def own_columns(rows: Sequence[Row]) -> list[MetricColumn]:
    """A column for each metric that is not kvsuite's and of which any of the rows has a number."""
    found = {name: one for row in rows for name, one in row["metrics"].items() if not is_builtin(name)}
    return [
        MetricColumn(name, title=metric_of(name, one).column)
        for name, one in found.items()
        if any(value(row, name) is not None for row in rows)
    ]


def case_table(head: str, labelled: Mapping[str, Row], columns: Sequence[MetricColumn]) -> console.Sheet:
    """A line a case: its numbers, or how it ended without; and the machine that its times are of, where there are several."""
    if has_several_machines(labelled.values()):
        columns = [*columns, MetricColumn("", 20, title="Machine", cell=machine_of)]
    return console.Sheet(
        head,
        [console.Column(column.heading, column.width) for column in columns],
        [
            (name, failure(row) if row["status"] != "ok" else [column.text(row) for column in columns])
            for name, row in labelled.items()
        ],
        _LABEL_WIDTH,
    )


def number_in(row: Row, metric: str, unit: int, spec: str) -> str:
    """A metric in another unit than its own, which is so many times larger."""
    return format_number(value(row, metric), spec, unit)


def format_number(number: float | None, spec: str, unit: int = 1) -> str:
    """``number`` in a larger unit by ``spec``, or that it is missing."""
    return MISSING if number is None else format(number / unit, spec)


def tpot_spread(row: Row) -> str:
    """Half the 95 % interval of TPOT's mean, in percent of the mean."""
    half, mean = ci_half_width(row, "tpot"), entry(row, "tpot").get("mean")
    return MISSING if half is None or not mean else f"{half / mean:.1%}"


def footnotes(labelled: Mapping[str, Row], columns: Sequence[MetricColumn]) -> list[str]:
    """Why cells are empty, each reason once, and the rows' warnings."""
    finished = {name: row for name, row in labelled.items() if row["status"] == "ok"}
    titles: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for column in columns:
        names: dict[str, list[str]] = {}
        for name, row in finished.items():
            if column.metric and value(row, column.metric) is None:
                names.setdefault(missing_reason(row, column.metric), []).append(name)
        for reason, affected in names.items():
            titles.setdefault((reason, tuple(affected)), []).append(column.heading.partition("(")[0])
    notes = [
        f"{', '.join(_without_spreads(of))}: {reason}" + which(affected, labelled)
        for (reason, affected), of in titles.items()
    ]
    single = [name for name, row in finished.items() if value(row, "tpot") is not None and tpot_spread(row) == MISSING]
    if single:
        notes.append("TPOT±: needs at least 2 rounds" + which(single, labelled))
    return notes + [f"warning: {text}" + which(names, labelled) for text, names in warnings_of(labelled).items()]


def warnings_of(labelled: Mapping[str, Row]) -> dict[str, list[str]]:
    """Warnings of rows, each with the names of those that have it; that a time varies is one, whatever by how much."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for name, row in labelled.items():
        for warning in row.get("warnings") or []:
            text = " ".join(str(warning).split())
            alike.setdefault(_VARIES.sub("", text), []).append((text, name))
    return {
        _of_most({text for text, _ in found}): list(dict.fromkeys(name for _, name in found))
        for found in alike.values()
    }


def _of_most(texts: Collection[str]) -> str:
    """The warning that speaks for others which differ in a share alone."""
    most = max(texts, key=lambda text: [int(share) for share in _VARIES.findall(text)])
    if len(texts) == 1:
        return most
    return most.replace("varies by ", "varies by up to ", 1)


def _without_spreads(titles: Sequence[str]) -> list[str]:
    """Titles without those of the spread of a value that lacks for the same reason."""
    return [title for title in titles if not (title.endswith("±") and title[:-1] in titles)]


def which(affected: Sequence[str], labelled: Mapping[str, Row]) -> str:
    """The cases that a note is about: their names, or that they are all of the table that have numbers."""
    shown = {name for name, row in labelled.items() if row["status"] == "ok"}
    if set(affected) not in (shown, set(labelled)):
        return f" ({', '.join(affected)})"
    return " (all cases)" if len(affected) > 1 else ""
