"""What the suites' console tables share: cells, and the notes below a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsuite.foreign_text import visible

from .aggregate import Row, ci_half_width, entry, missing_reason, value

MISSING = "n/a"
#: what the spread columns of every suite mean
SPREAD = "TPOT±: half the 95 % interval of the mean. PPL±: 1 standard error."
#: title, width, metric
Column = tuple[str, int, str]


def join_cells(name: str, first: int, cells: Sequence[str]) -> str:
    """One line: the label left, ``first`` wide, and the cells behind it."""
    return " ".join([f"{name:<{first}}", *cells])


def format_number(number: float | None, spec: str) -> str:
    """``number`` by ``spec``, or that it is missing."""
    return MISSING if number is None else format(number, spec)


def scaled(number: float | None, unit: int) -> float | None:
    """``number`` in a larger unit."""
    return None if number is None else number / unit


def tpot_spread(row: Row) -> str:
    """Half the 95 % interval of TPOT's mean, in percent of the mean."""
    half, mean = ci_half_width(row, "tpot"), entry(row, "tpot").get("mean")
    return MISSING if half is None or not mean else f"{half / mean:.1%}"


def footnotes(labelled: Mapping[str, Row], columns: Sequence[Column]) -> list[str]:
    """Why cells are empty, each reason once, and the rows' warnings."""
    finished = {name: row for name, row in labelled.items() if row["status"] == "ok"}
    titles: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for title, _, metric in columns:
        names: dict[str, list[str]] = {}
        for name, row in finished.items():
            if value(row, metric) is None:
                names.setdefault(missing_reason(row, metric), []).append(name)
        for reason, affected in names.items():
            titles.setdefault((reason, tuple(affected)), []).append(title.partition("(")[0])
    notes = [
        f"{', '.join(_without_spreads(of))}: {reason}" + which(affected, labelled)
        for (reason, affected), of in titles.items()
    ]
    single = [name for name, row in finished.items() if value(row, "tpot") is not None and tpot_spread(row) == MISSING]
    if single:
        notes.append("TPOT±: needs at least 2 rounds" + which(single, labelled))
    warnings: dict[str, list[str]] = {}
    for name, row in labelled.items():
        for warning in row["warnings"]:
            warnings.setdefault(" ".join(str(warning).split()), []).append(name)
    notes += [f"warning: {text}" + which(names, labelled) for text, names in warnings.items()]
    return [visible(note) for note in notes]


def _without_spreads(titles: Sequence[str]) -> list[str]:
    """Titles without those of the spread of a value that lacks for the same reason."""
    return [title for title in titles if not (title.endswith("±") and title[:-1] in titles)]


def which(affected: Sequence[str], labelled: Mapping[str, Row]) -> str:
    """The cases that a note is about: their names, or that they are all of the table that have numbers."""
    shown = {name for name, row in labelled.items() if row["status"] == "ok"}
    if set(affected) not in (shown, set(labelled)):
        return f" ({', '.join(affected)})"
    return " (all cases)" if len(affected) > 1 else ""
