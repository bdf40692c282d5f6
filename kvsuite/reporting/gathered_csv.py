"""CSVs that gather the rows of many runs: a file grows by whole rows, and only where every line of it can be read."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.foreign_text import csv_cell
from kvsuite.store.files import write_atomic

__all__ = ["CsvRow", "GatheredCsv", "Line", "lines_of", "read_text", "records_of"]

CsvRow = Mapping[str, Any]
#: the number of its last line in the file, and its fields
Line = tuple[int, list[str]]

_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class GatheredCsv:
    """A kind of file that many runs append to.

    Parameters
    ----------
    content
        What it is, for messages: ``"perplexity"``.
    columns
        In the order in which kvsuite writes them.
    lock
        Name of the lock file, one for all files of a folder: they are checked together.
    header_fault
        What keeps a header from being one of this kind, ``None`` if nothing does.
    format_field
        Column and value to what is written.
    parse
        Text and what it is called in messages to rows with all columns; raises `UserError`.
    identity
        What two records of one result share; ``None`` for a row that cannot be told from others.
    """

    content: str
    columns: tuple[str, ...]
    lock: str
    header_fault: Callable[[Sequence[str]], str | None]
    format_field: Callable[[str, Any], str]
    parse: Callable[[str, str], list[dict[str, Any]]]
    identity: Callable[[CsvRow], tuple[Any, ...] | None]

    def text(self, rows: Iterable[CsvRow], *, header: bool = True) -> str:
        """``rows`` with all columns as lines; ``None`` is an empty field, and text is written by `csv_cell`."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows({name: csv_cell(self.format_field(name, row[name])) for name in self.columns} for row in rows)
        return buffer.getvalue()

    def check_appendable(self, path: Path) -> None:
        """Find out whether rows can be appended to a file, which may be missing.

        Raises
        ------
        UserError
            If it has another header than kvsuite's, or a line that cannot be read.
        """
        if path.exists():
            self._appendable(path)

    def check_row(self, row: CsvRow) -> None:
        """What is written must come back, or a later reader refuses the whole file.

        Raises
        ------
        ValueError
            If the row has other columns, or a value that `parse` would not give back.
        """
        if set(row) != set(self.columns):
            raise ValueError(f"columns differ: {sorted(set(row) ^ set(self.columns))}")
        try:
            (again,) = self.parse(_decoded(self.text([row]).encode()), "the row")
        except UserError as error:
            raise ValueError(f"could not be read again: {error}") from error
        differing = [name for name in self.columns if again[name] not in (row[name], csv_cell(row[name]))]
        if differing:
            raise ValueError(f"cannot be written to a CSV: {', '.join(f'{name}={row[name]!r}' for name in differing)}")

    def append(self, folder: Path, added: Mapping[Path, Sequence[CsvRow]]) -> list[Path]:
        """Append checked rows to files in ``folder``; those that a file already has, by `identity`, are left out.

        No file grows before all of them were checked. Each is written once and replaced by rename, so no reader sees half a
        row; writers wait for each other at the lock file.

        Returns
        -------
        list[Path]
            The files that grew.

        Raises
        ------
        UserError
            If a file has another header, or cannot be read or written.
        """
        if not added:
            return []
        with _alone(folder / self.lock):
            grown = {path: text for path, rows in added.items() if (text := self._grown(path, rows))}
            for path, text in grown.items():
                write_atomic(path, text)
        return list(grown)

    def _grown(self, path: Path, rows: Sequence[CsvRow]) -> str | None:
        """The file's text with the rows that it lacks, ``None`` if it lacks none."""
        before, present = self._appendable(path) if path.exists() else ("", [])
        known = {self.identity(row) for row in present} - {None}
        new = []
        for row in rows:
            identity = self.identity({name: csv_cell(value) for name, value in row.items()})
            if identity not in known:
                new.append(row)
            if identity is not None:
                known.add(identity)
        if not new:
            return None
        return before + ("" if before.endswith("\n") or not before else "\n") + self.text(new, header=not before)

    def _appendable(self, path: Path) -> tuple[str, list[dict[str, Any]]]:
        text = read_text(path, self.content)
        if not text:
            return text, []
        header = lines_of(text, str(path))[0][1]
        if header != list(self.columns):
            fault = self.header_fault(header) or "lacks columns, has others, or has them in another order"
            raise UserError(
                f"{path}: its header is not the one that kvsuite writes ({fault}), so no row is added; "
                "move the file away or give another folder"
            )
        return text, self.parse(text, str(path))


def read_text(path: Path, content: str) -> str:
    """The text of a CSV; ``content`` says in the error what is looked for."""
    try:
        text = _decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read ({reason}); give a {content} CSV") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path}: line {line} holds a NUL byte, the file is damaged; restore it, or remove the line")
    return text


def header_of(path: Path) -> list[str]:
    """The names in a CSV's first line; none of an empty file.

    Raises
    ------
    UserError
        If the file cannot be read.
    """
    return next(csv.reader(io.StringIO(read_text(path, "results"), newline="")), [])


def lines_of(text: str, where: str) -> list[Line]:
    """Every row of a CSV, the header first; a header without fields where there is nothing.

    Raises
    ------
    UserError
        Naming the line that cannot be read.
    """
    # strict: an open quote would swallow the rows that are appended
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader] or [(0, [])]
    except csv.Error as error:
        raise UserError(
            f"{where}: line {reader.line_num} cannot be read as CSV ({error}); mend or remove it"
        ) from error
    header = lines[0][1]
    if len(header) == 1 and (other := next((mark for mark in _OTHER_SEPARATORS if mark in header[0]), None)):
        raise UserError(
            f"{where}: its columns are separated by {_OTHER_SEPARATORS[other]}, and commas are read; save it with commas"
        )
    return lines


# what spreadsheets write in the place of commas
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def cut_note(text: str, where: str) -> str | None:
    """What to tell of a file that does not end where a line does: its last number may lack digits and still be one."""
    if not text or text.endswith("\n"):
        return None
    return f"{where}: the last line has no end, so the file may be cut off inside its last number; compare it with the original"


def records_of(lines: Sequence[Line], where: str) -> Iterator[Line]:
    """The lines below the header that are not empty, each with as many fields as the header.

    Raises
    ------
    UserError
        Naming the line that has more or fewer.
    """
    (_, header), *rest = lines
    for number, fields in rest:
        if not fields:
            continue
        if len(fields) != len(header):
            s = "" if len(fields) == 1 else "s"
            raise UserError(f"{where}: line {number} has {len(fields)} field{s}, {len(header)} are needed; mend it")
        yield number, fields


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig").replace("\r\n", "\n")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=_LOCK_TIMEOUT_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{path}: another process has held it for {_LOCK_TIMEOUT_S:.0f} s; end that process, or give another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be locked ({reason}); give a folder that can be written") from error
    try:
        yield
    finally:
        lock.release()
