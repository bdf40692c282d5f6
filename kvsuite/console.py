"""Tables for the console, laid out by rich: they fit the width there is, and a pipe or a file gets the same as plain text.

Whatever text is shown is text: rich interprets no markup in it.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .foreign_text import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

#: of a file, and of a pipe unless COLUMNS says otherwise: nothing wraps, who reads it has a width of their own
WIDE = 10_000
#: a narrower console gets lines of this width
_LEAST_WIDTH = 40
_GAP = 1

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Column:
    """A column of a `Sheet`: its title and its least width."""

    title: str
    width: int = 0
    justify: Side = "right"


@dataclass(frozen=True)
class Sheet:
    """A table of numbers. Columns that do not fit beside each other stand below each other, each part with the labels.

    Parameters
    ----------
    head
        Title of the labels.
    columns
        The columns behind the labels.
    rows
        A label with a cell for each column, or with a sentence instead of them; ``None`` is a line across.
    label_width
        Least width of the labels.
    label_justify
        On which side they stand.
    ruled
        Whether a line stands below the titles, and a double one at the end.
    """

    head: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[str] | str] | None]
    label_width: int = 0
    label_justify: Side = "left"
    ruled: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        # finished lines: a rich table measures and styles every cell anew, 2 ms a row
        return (Segment(line + "\n") for line in self._lines(options.max_width))

    def _lines(self, room: int) -> Iterator[str]:
        head, titles = visible(self.head), [visible(column.title) for column in self.columns]
        rows = [row and (visible(row[0]), _visible_cells(row[1])) for row in self.rows]
        filled = [row[1] for row in rows if row is not None and not isinstance(row[1], str)]
        widths = [
            max(column.width, *map(_width_of, (title, *(cells[place] for cells in filled))))
            for place, (title, column) in enumerate(zip(titles, self.columns, strict=True))
        ]
        label = max(self.label_width, *map(_width_of, (head, *(row[0] for row in rows if row is not None))))
        label = max(1, min(label, max(room // 2, room - max(widths, default=0) - _GAP)))
        # of a column that is wider than what is left beside the labels the cells are folded
        widths = [max(1, min(width, room - label - _GAP)) for width in widths]
        for number, places in enumerate(_parts(widths, room - label)):
            part = [label, *(widths[place] for place in places)]
            sides = [self.label_justify, *(self.columns[place].justify for place in places)]
            across = sum(part) + _GAP * len(places)
            if number:
                yield ""
            yield from _row([head, *(titles[place] for place in places)], part, sides)
            if self.ruled:
                yield "-" * across
            for row in rows:
                if row is None:
                    yield "-" * across
                elif not isinstance(row[1], str):
                    yield from _row([row[0], *(row[1][place] for place in places)], part, sides)
                elif not number:  # a sentence stands in the first part alone
                    yield from _row([row[0], row[1]], [label, max(1, room - label - _GAP)], ["left", "left"])
            if self.ruled:
                yield "=" * across


def lines(texts: Sequence[str]) -> RenderableType:
    """Texts one below the other, as they are; what is longer than the console wraps."""
    from rich.text import Text

    return Text("\n".join(visible(text) for text in texts), overflow="fold")


def stacked(*parts: Sequence[RenderableType]) -> RenderableType:
    """Parts one below the other, a line between any two; those without anything are left out. Texts are texts."""
    from rich.console import Group

    shown: list[RenderableType] = []
    for part in filter(None, parts):
        shown += [lines([""])] if shown else []
        shown += [lines([one]) if isinstance(one, str) else one for one in part]
    return Group(*shown)


def console_text(renderable: RenderableType, *, width: int = WIDE, color: bool = False) -> str:
    """What is shown as text, each line with its end; ``color`` adds the sequences that a terminal colours by."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(
        file=stream,
        width=max(width, _LEAST_WIDTH),
        force_terminal=color,
        no_color=not color,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    console.print(renderable)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


def console_width(is_terminal: bool) -> int:
    """How wide to print: as COLUMNS says, else as the terminal is; `WIDE` into a pipe or a file."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return shutil.get_terminal_size().columns if is_terminal else WIDE


def _parts(widths: Sequence[int], room: int) -> Iterator[list[int]]:
    """Places of the columns that stand beside each other."""
    part: list[int] = []
    used = 0
    for place, width in enumerate(widths):
        if part and used + _GAP + width > room:
            yield part
            part, used = [], 0
        part.append(place)
        used += _GAP + width
    yield part


def _visible_cells(cells: Sequence[str] | str) -> Sequence[str] | str:
    return visible(cells) if isinstance(cells, str) else [visible(cell) for cell in cells]


def _row(texts: Sequence[str], widths: Sequence[int], sides: Sequence[Side]) -> Iterator[str]:
    """The lines of texts beside each other; a text that is wider than its column is folded."""
    columns = [_folded(text, width) for text, width in zip(texts, widths, strict=True)]
    for place in range(max(map(len, columns))):
        yield (
            (" " * _GAP)
            .join(
                _padded(column[place] if place < len(column) else "", width, side)
                for column, width, side in zip(columns, widths, sides, strict=True)
            )
            .rstrip()
        )


def _folded(text: str, width: int) -> list[str]:
    if _width_of(text) <= width:
        return [text]
    from rich.console import Console
    from rich.text import Text

    return [line.plain.rstrip() for line in Text(text).wrap(Console(width=width), width, overflow="fold")]


def _padded(text: str, width: int, side: Side) -> str:
    room = " " * (width - _width_of(text))
    return text + room if side == "left" else room + text


def _width_of(text: str) -> int:
    """How many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
