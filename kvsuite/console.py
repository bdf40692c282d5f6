"""Tables for the console, drawn by rich: they fit the width there is, and a pipe or a file gets the same as plain text.

Whatever text is shown is text: rich interprets no markup in it.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .foreign_text import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
    from rich.table import Table

#: of a file, and of a pipe unless COLUMNS says otherwise: nothing wraps, who reads it has a width of their own
WIDE = 10_000
#: a narrower console gets lines of this width
_LEAST_WIDTH = 40
_GAP = 1


@dataclass(frozen=True)
class Column:
    """A column of a `Sheet`: its title and its least width."""

    title: str
    width: int = 0
    justify: JustifyMethod = "right"


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
    label_justify: JustifyMethod = "left"
    ruled: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.cells import cell_len
        from rich.text import Text

        labels = [self.head, *(row[0] for row in self.rows if row is not None)]
        filled = [row[1] for row in self.rows if row is not None and not isinstance(row[1], str)]
        widths = [
            max(column.width, *map(cell_len, (column.title, *(cells[place] for cells in filled))))
            for place, column in enumerate(self.columns)
        ]
        room = options.max_width
        label = max(self.label_width, *(cell_len(visible(text)) for text in labels))
        label = min(label, max(room // 2, room - max(widths, default=0) - _GAP))
        for number, places in enumerate(_parts(widths, room - label)):
            if number:
                yield Text("")
            yield from self._part(places, [label, *(widths[place] for place in places)], whole=not number)

    def _part(self, places: Sequence[int], widths: Sequence[int], *, whole: bool) -> Iterator[RenderableType]:
        """Some of the columns; sentences stand in the ``whole`` one alone."""
        from rich.text import Text

        across = sum(widths) + _GAP * len(places)
        table = self._table(places, widths, header=True)
        for row in self.rows:
            if row is None or isinstance(row[1], str):
                if table.row_count or table.show_header:
                    yield table
                    table = self._table(places, widths, header=False)
                if row is None:
                    yield Text("-" * across)
                elif whole:
                    yield _sentence(row[0], str(row[1]), widths[0])
                continue
            table.add_row(*(Text(visible(text)) for text in (row[0], *(row[1][place] for place in places))))
        if table.row_count or table.show_header:
            yield table
        if self.ruled:
            yield Text("=" * across)

    def _table(self, places: Sequence[int], widths: Sequence[int], *, header: bool) -> Table:
        from rich.box import Box
        from rich.table import Table
        from rich.text import Text

        # spaces between the columns, a line below the titles
        box = Box("    \n" * 2 + "----\n" + "    \n" * 5, ascii=True)
        table = Table(
            box=box if self.ruled else None, show_edge=False, padding=0 if self.ruled else (0, _GAP, 0, 0), pad_edge=False,
            show_header=header, header_style="",
        )  # fmt: skip
        table.add_column(Text(visible(self.head)), width=widths[0], justify=self.label_justify, overflow="fold")
        for place, width in zip(places, widths[1:], strict=True):
            column = self.columns[place]
            table.add_column(Text(column.title), width=width, justify=column.justify, overflow="fold")
        return table


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


def _sentence(label: str, text: str, width: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(width=width, overflow="fold")
    grid.add_column(overflow="fold")
    grid.add_row(Text(visible(label)), Text(visible(text), overflow="fold"))
    return grid
