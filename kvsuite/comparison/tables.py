"""A comparison for people: a table for the terminal, Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvsuite.console import WIDE, console_text, lines
from kvsuite.foreign_text import visible
from kvsuite.metrics.registry import is_headline

from .compare import Comparison
from .verdicts import STATUS, Verdict, Word, change_text, number_pair

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES: dict[Word, str] = {
    "better": "green", "same": "", "worse": "yellow", "regression": "bold red", "unstable": "magenta", "information": "dim",
}  # fmt: skip
_HEADER = ("case", "metric", "base", "now", "change", "verdict", "rule or reason")
#: rows of a table that a person may still read; beyond, what matters most is shown
MOST_ROWS = 200
#: rows that a screen has room for, with what stands around them
SCREEN_ROWS = 24


def shown_rows(rows: Sequence[Verdict], *, everything: bool = False) -> list[Verdict]:
    """Rows that a reader looks for, what matters most first: regressions, what moved, what is gated, the headline metrics.

    What moved is shown up to `MOST_ROWS`; the others fill a screen (`SCREEN_ROWS`) and are counted beyond. A number that is
    the same to the last digit is no news because its spread would forbid a verdict.
    """
    if everything:
        return list(rows)
    moved: list[list[Verdict]] = [[], []]
    others: list[list[Verdict]] = [[], []]
    for row in rows:
        if row.verdict == "regression":
            moved[0].append(row)
        elif row.verdict in ("worse", "better") or row.metric == STATUS:
            moved[1].append(row)
        elif row.verdict == "unstable" and row.change == 0:
            continue
        elif row.rule:
            others[0 if row.verdict == "unstable" else 1].append(row)
        elif is_headline(row.metric):
            others[1].append(row)
    news = [*moved[0], *moved[1]][:MOST_ROWS]
    return news + [*others[0], *others[1]][: max(SCREEN_ROWS - len(news), 0)]


def comparison_text(
    result: Comparison,
    *,
    width: int = WIDE,
    color: bool = False,
    everything: bool = False,
    more: str = "--all shows them",
) -> str:
    """Render as text: the table by case and metric, what is missing, new or renamed, notes, a summary.

    ``more`` says how the rows that are left out can be seen.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = shown_rows(result.rows, everything=everything)
    shown: list[RenderableType] = [lines([f"base: {result.base.label}", f"now:  {result.now.label}"])]
    if rows:
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        for title in _HEADER:
            right = title in ("base", "now", "change")
            table.add_column(title, justify="right" if right else "left", overflow="fold", no_wrap=right)
        names = short_names([row.case for row in rows])
        for row in rows:
            cells = (names[row.case], *_cells(row))
            table.add_row(*(Text(visible(cell)) for cell in cells), style=_STYLES[row.verdict])
        shown.append(table)
    shown += [lines([line]) for line in _machine(rows)]
    left_out = len(result.rows) - len(rows)
    if left_out:
        shown.append(lines([f"{left_out} more rows that matter less: {more}"]))
    shown += [lines([line]) for line in _lists(result)]
    shown.append(Text(summary(result), style="bold red" if result.failures else ""))
    return console_text(Group(*shown), width=width, color=color)


def comparison_markdown(result: Comparison, *, everything: bool = False) -> str:
    """Render for a pull request: the summary, what fails, and the table behind a fold."""
    rows, failures = shown_rows(result.rows, everything=everything), result.failures
    text = [
        f"**kvsuite: {summary(result)}**",
        "",
        f"{_escaped(result.now.label)} against {_escaped(result.base.label)}",
        "",
    ]
    text += [f"- {_escaped(line)}" for line in failures[:MOST_ROWS]]
    text += [f"- {len(failures) - MOST_ROWS} more against the rules"] if len(failures) > MOST_ROWS else []
    text += [f"- {_escaped(line)}" for line in _lists(result)]
    if rows:
        text += ["", "<details><summary>Metrics</summary>", "", f"| {' | '.join(_HEADER)} |"]
        text.append("| --- | --- | ---: | ---: | ---: | --- | --- |")
        names = short_names([row.case for row in rows])
        for row in rows:
            cells = [names[row.case], *_cells(row)]
            text.append(f"| {' | '.join(_escaped(cell) for cell in cells)} |")
        text += ["", *map(_escaped, _machine(rows))]
        left_out = len(result.rows) - len(rows)
        text += ["", f"{left_out} more rows that matter less: --all shows them"] if left_out else []
        text += ["", "</details>"]
    return "\n".join(text) + "\n"


def summary(result: Comparison) -> str:
    """One line: cases compared, verdicts, cases that one side lacks."""
    counts = result.counts
    words = [f"{counts[word]} {_plural(word, counts[word])}" for word in _STYLES if counts.get(word)]
    lists = (("missing", result.missing), ("new", result.new), ("renamed", result.renamed))
    words += [f"{len(found)} {word}" for word, found in lists if found]
    failing = f"; {len(result.failures)} against the rules" if result.rules else "; no rules, so nothing fails"
    return f"{result.compared} cases compared: {', '.join(words) or 'nothing'}{failing}"


def short_names(ids: Sequence[str]) -> dict[str, str]:
    """Ids as short as they can be: the bracket of the pytest id, the whole id where two cases share it."""
    distinct = list(dict.fromkeys(ids))
    brackets = {case: case.partition("[")[2].removesuffix("]") or case for case in distinct}
    seen: dict[str, int] = {}
    for bracket in brackets.values():
        seen[bracket] = seen.get(bracket, 0) + 1
    return {case: bracket if seen[bracket] == 1 else case for case, bracket in brackets.items()}


def _cells(row: Verdict) -> tuple[str, str, str, str, str, str]:
    before, after = ("", "") if row.metric == STATUS else number_pair(row.base, row.now, row.unit)
    reason = "; ".join(part for part in (row.rule, row.note) if part)
    return row.metric, before, after, change_text(row.change), row.verdict, reason


def _machine(rows: Sequence[Verdict]) -> list[str]:
    """What the machine was like, once for all rows whose noise it made wider."""
    slowed = [row for row in rows if row.machine]
    if not slowed:
        return []
    lacked, varied = max(row.lacked for row in slowed), max(row.varied for row in slowed)
    words = [f"lacked up to {lacked:.0%} of its speed"] if lacked else []
    words += [f"had a speed that varied by up to {varied:.0%}"] if varied else []
    return [f"the machine {' and '.join(words)}, which makes the noise of {len(slowed)} of these times wider"]


def _lists(result: Comparison) -> list[str]:
    found_lines: list[str] = []
    for word, cases in (
        ("missing", result.missing),
        ("new", result.new),
        ("renamed", [f"{before} is now {after}" for before, after in result.renamed]),
    ):
        found_lines += [f"{word}: {case}" for case in cases[:MOST_ROWS]]
        found_lines += [f"{word}: {len(cases) - MOST_ROWS} more"] if len(cases) > MOST_ROWS else []
    return found_lines + [f"note: {note}" for note in result.notes]


def _plural(word: Word, count: int) -> str:
    return "regressions" if word == "regression" and count != 1 else word


def _escaped(cell: str) -> str:
    """Text that Markdown and the HTML inside it leave alone."""
    text = visible(" ".join(cell.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in ("\\", "|", "*", "_", "`", "[", "]", "~", "#"):
        text = text.replace(mark, "\\" + mark)
    return text
