"""The two sides of a comparison, read from whatever holds records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvsuite.errors import UserError
from kvsuite.foreign_text import visible
from kvsuite.options.paths import expanded
from kvsuite.record import REPORT_SCHEMA, RUN_SCHEMA, check_schema
from kvsuite.store.inside import inside
from kvsuite.store.records_file import RECORDS_FILE, REPORT_FILE

from .records import RecordRow, RunFacts, Section, decode_document, decode_row, decode_run, decode_section
from .tokens import Tokens, read_tokens

LATEST = "latest"
_RUN_LINE = b'{"schema": "' + RUN_SCHEMA.encode()
_GIVE = f"give a run's folder, its {RECORDS_FILE} or {REPORT_FILE}, a file of pytest-benchmark, or a folder of runs"


@dataclass(frozen=True)
class Run:
    """One process that measured.

    Parameters
    ----------
    facts
        Its run line.
    rows
        Its records, one a case.
    folder
        Where sidecars are looked for, ``None`` if that is not known.
    live
        Raw token columns of cases that have no sidecar yet, by record id.
    """

    facts: RunFacts
    rows: tuple[RecordRow, ...]
    folder: Path | None
    live: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)

    def tokens(self, row: RecordRow) -> Tokens | None:
        """Raw token losses of a case, ``None`` where they are not at hand."""
        if row.id in self.live:
            return Tokens.of(self.live[row.id])
        return None if self.folder is None or row.sidecar is None else read_tokens(self.folder, row.sidecar)


@dataclass(frozen=True)
class Side:
    """One side: a run, or several runs of the same code, which are judged together."""

    label: str
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    @property
    def run_id(self) -> str:
        """Names of the runs."""
        return ", ".join(run.facts.run_id for run in self.runs)


def read_side(given: str, *, option: str, report_dir: Path = Path("reports")) -> Side:
    """Read one side.

    Parameters
    ----------
    given
        A path, or ``latest``: the newest run under ``report_dir``. The runs of a folder of runs become one side.
    option
        What messages call the argument: ``--kv-compare``, ``BASE``.

    Raises
    ------
    UserError
        Naming the option, the value and the mend.
    """
    if given == LATEST:
        return latest_run(report_dir, option=option)
    try:
        path = expanded(given)
        return _read(path)
    except UserError as error:
        raise UserError(f"{option}={given}: {str(error).removeprefix(visible(f'{given}: '))}") from error
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{option}={given}: cannot be read ({reason}); {_GIVE}") from error


def latest_run(
    report_dir: Path, *, option: str, brackets: frozenset[str] | None = None, but: Path | None = None
) -> Side:
    """The newest run under ``report_dir``; of those with a case of these `RecordRow.bracket`, where they are given.

    ``but`` is no candidate: the folder of a run that goes on.

    Raises
    ------
    UserError
        If there is none.
    """
    found = _run_folders(report_dir) if report_dir.is_dir() else []
    if but is not None:
        found = [folder for folder in found if folder.resolve() != but.resolve()]
    for folder in sorted(found, key=_age, reverse=True):
        try:
            side = _read(folder)
        except UserError:  # the run before it may be whole
            continue
        if brackets is None or any(row.bracket in brackets for run in side.runs for row in run.rows):
            return side
    wanted = "" if brackets is None else " that has a case of this one"
    raise UserError(
        f"{option}={LATEST}: no run under {report_dir}{wanted}; measure once without {option}, or give a path"
    )


def side_of_section(section: Section, label: str | None = None) -> Side:
    """The side that a file of pytest-benchmark holds; raw tokens are looked for where the run wrote its folder."""
    facts = section.run
    folder: Path | None
    try:
        folder = inside(Path(str(facts.options.get("report_dir", "reports"))), facts.run_id)
    except ValueError:  # the name of a folder is another's word
        folder = None
    return Side(label or facts.run_id, (Run(facts, _last_by_id(section.records), folder),))


def _age(folder: Path) -> tuple[str, str]:
    """Start of a run; the name decides between runs of one second."""
    file = _records(folder)
    if file is not None and file.name == RECORDS_FILE:
        try:
            with file.open("rb") as lines:
                return decode_run(lines.readline(), str(file)).started_utc, folder.name
        except (OSError, UserError):
            pass
    return "", folder.name


def _records(folder: Path) -> Path | None:
    return next((path for name in (RECORDS_FILE, REPORT_FILE) if (path := folder / name).is_file()), None)


def _run_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and _records(path) is not None)


def _read(path: Path) -> Side:
    if not path.is_dir():
        return _read_file(path, path.stem if path.name not in (RECORDS_FILE, REPORT_FILE) else path.parent.name)
    file = _records(path)
    if file is not None:
        return _read_file(file, path.name)
    sides = [_read(folder) for folder in _run_folders(path)]
    if not sides:
        raise UserError(f"no records in it; {_GIVE}")
    runs = tuple(run for side in sides for run in side.runs)
    return Side(path.name or str(path), runs, tuple(note for side in sides for note in side.notes))


def _read_file(path: Path, label: str) -> Side:
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            return _read_lines(path, lines, label)
    data = path.read_bytes()
    document = decode_document(data, str(path))
    if document.kvsuite is not None:
        return side_of_section(document.kvsuite, label)
    if document.benchmarks != msgspec.Raw():
        raise UserError(
            "a file of pytest-benchmark without records of kvsuite; measure again with the kvsuite plugin on"
        )
    check_schema(document.schema, REPORT_SCHEMA, str(path))
    report = decode_section(data, str(path))
    facts = report.run
    if report.environment is not None:
        facts = msgspec.structs.replace(facts, environment=report.environment)
    return Side(label, (Run(facts, _last_by_id(report.records), path.parent),))


def _read_lines(path: Path, lines: Iterable[bytes], label: str) -> Side:
    facts: RunFacts | None = None
    notes: tuple[str, ...] = ()
    rows: list[RecordRow] = []
    sessions: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        if not line.strip():
            continue
        if facts is None:
            facts = decode_run(line, where)
            check_schema(facts.schema, RUN_SCHEMA, where)
            sessions += facts.sessions
        elif line.startswith(_RUN_LINE):  # another process of the same run
            sessions.append(decode_run(line, where).environment)
        else:
            try:
                rows.append(decode_row(line, where))
            except UserError:
                # only the line that was being written when the process ended has no newline
                if line.endswith(b"\n"):
                    raise
                notes = (f"{path}: the last line is cut off and was left out: the run ended while writing it",)
    if facts is None:
        raise UserError("is empty; measure again")
    facts = msgspec.structs.replace(facts, sessions=sessions)
    return Side(label, (Run(facts, _last_by_id(rows), path.parent),), notes)


def _last_by_id(rows: Sequence[RecordRow]) -> tuple[RecordRow, ...]:
    """Of rows with one id the last counts, in the first one's place."""
    return tuple({row.id: row for row in rows}.values())
