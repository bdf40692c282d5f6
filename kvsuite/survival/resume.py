"""An earlier run taken up again: which of its cases are finished, and whether the rest would be measured in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvsuite.case import Case, digest
from kvsuite.errors import UserError
from kvsuite.store.files import parse_json
from kvsuite.store.inside import inside
from kvsuite.store.records_file import RECORDS_FILE, read_records
from kvsuite.store.validate import validate

from .settings import (
    case_differences,
    differences,
    known_machine,
    machine_differences,
    metric_differences,
    software_differences,
)

LATEST = "latest"
_UNREADABLE = "unreadable"
_MEND = "measure again without --kv-resume, or go back to what the run had"


def planned_key(case: Mapping[str, Any]) -> str:
    """Hash of what a case asks for, as it is known before anything is loaded: no revision of model or text is in it.

    Parameters
    ----------
    case
        ``Case.to_dict()``, or ``case`` of a row. ``cuda:0`` and ``cuda:1`` are the same case.
    """
    return digest(dict(case) | {"device": str(case["device"]).partition(":")[0]})


@dataclass(frozen=True)
class EarlierRun:
    """A run that is to be finished.

    Parameters
    ----------
    folder
        Its folder.
    run
        Its run line.
    rows
        Its records.
    notes
        What was left out in reading, in words.
    rerun
        Statuses whose cases are measured again.
    """

    folder: Path
    run: Mapping[str, Any]
    rows: Sequence[dict[str, Any]]
    notes: Sequence[str]
    rerun: Sequence[str]

    @property
    def kept(self) -> list[dict[str, Any]]:
        """Rows of finished cases."""
        return [row for row in self.rows if row["status"] not in self.rerun]

    def finished(self) -> list[str]:
        """What names the finished cases: id and key."""
        return [finished_name(row["id"], row["case"]) for row in self.kept]

    def require_same(self, now: Mapping[str, Any], metrics: Mapping[str, Any] = {}) -> None:
        """Refuse to go on with other code, options, metrics or machine.

        Parameters
        ----------
        now
            Run line of what would go on.
        metrics
            Versions of the metrics that it knows, by name.

        Raises
        ------
        UserError
            Naming everything that differs.
        """
        _refuse(self.folder, differences(self.run, now, shards=True) + metric_differences(self.kept, metrics))

    def require_same_plans(self, cases: Iterable[tuple[str, Case]]) -> None:
        """Refuse cases to be measured that ask for something else than the kept row of their test id does.

        Parameters
        ----------
        cases
            Node ids and cases that are not finished.

        Raises
        ------
        UserError
            Naming the case and everything that differs.
        """
        kept = {row["id"]: row["case"] for row in self.kept}
        for node_id, case in cases:
            if node_id in kept:
                _refuse(self.folder, [f"{case.name}: {one}" for one in case_differences(kept[node_id], case.to_dict())])

    def require_same_case(self, row: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Refuse a new row that does not belong to the kept ones: another machine, model or text, found out by loading it.

        Raises
        ------
        UserError
            Naming what differs.
        """
        # a cluster has many machines, and a row names its own
        differ = software_differences if "node" in row["effective"] else machine_differences
        found = differ(known_machine(self.run), environment)
        model, text = row["model"].get("revision"), (row["dataset"] or {}).get("text_hash")
        for what, known, key, new in (
            ("model", self._models, row["case"]["model"], model),
            ("text", self._texts, digest(row["case"]["workload"]), text),
        ):
            old = known.get(key)
            if old is not None and new is not None and old != new:
                found.append(f"{what}: then {old[:23]}, now {new[:23]}")
        _refuse(self.folder, found)

    @cached_property
    def _models(self) -> dict[str, str]:
        return {row["case"]["model"]: row["model"]["revision"] for row in self.kept if row["model"].get("revision")}

    @cached_property
    def _texts(self) -> dict[str, str]:
        texts = ((row["case"]["workload"], (row["dataset"] or {}).get("text_hash")) for row in self.kept)
        return {digest(workload): text for workload, text in texts if text is not None}


def finished_name(node_id: str, case: Mapping[str, Any]) -> str:
    """Name of a case that two processes agree on."""
    return f"{planned_key(case)} {node_id}"


def find_earlier(
    request: str, report_dir: Path, rerun: Sequence[str], *, shard: str | None = None
) -> EarlierRun | None:
    """The run that ``--kv-resume`` names.

    Parameters
    ----------
    request
        ``latest``, a run folder, or its name below ``report_dir``.
    report_dir
        Where runs are.
    rerun
        Statuses whose cases are measured again.
    shard
        ``--kv-shard``; the latest run is that of the same shard.

    Returns
    -------
    EarlierRun or None
        ``None`` if the latest is asked for and there is none yet.

    Raises
    ------
    UserError
        If there is no such run, or it cannot be read.
    """
    if request == LATEST:
        folder = _latest(report_dir, shard)
        if folder is None:
            return None
    else:
        asked = Path(request)
        folder = asked.parent if asked.name == RECORDS_FILE else asked
        if not folder.is_dir() and (report_dir / request).is_dir():
            folder = report_dir / request
    path = folder / RECORDS_FILE
    if not path.is_file():
        raise UserError(f"--kv-resume={request}: no {RECORDS_FILE} in {folder}; give latest, or the folder of a run")
    run, rows, notes = read_records(path)
    validate("run", run, str(path))
    for row in rows:
        where = f"--kv-resume={request}: {path}: {row.get('id')}"
        validate("record", row, where)
        try:
            inside(folder, row["sidecar"] or "none")
        except ValueError as error:
            raise UserError(f"{where} names {row['sidecar']}, which {error}; it is not kvsuite's") from error
    return EarlierRun(folder, run, rows, [note for note in notes if "is there twice" not in note], tuple(rerun))


def _latest(report_dir: Path, shard: str | None) -> Path | None:
    """The run of the shard that was written last; folders without a whole run line were never one."""
    found = [(path.stat().st_mtime_ns, path) for path in report_dir.glob(f"*/{RECORDS_FILE}")]
    for _, path in sorted(found, reverse=True):
        with path.open("rb") as file:
            line = file.readline()
        if line.endswith(b"\n") and _shard_of(line) in (shard, _UNREADABLE):
            return path.parent
    return None


def _shard_of(line: bytes) -> str | None:
    try:
        found = parse_json(line)["options"].get("shard")
    except (ValueError, LookupError, TypeError, AttributeError):
        # taken, so that reading it tells what is wrong
        return _UNREADABLE
    return None if found is None else str(found)


def _refuse(folder: Path, found: Sequence[str]) -> None:
    if found:
        raise UserError(f"--kv-resume={folder}: would mix two measurements: {'; '.join(found)}; {_MEND}")


def is_finished(node_id: str, case: Case, finished: frozenset[str]) -> bool:
    """Whether a collected case is among the ``finished`` ones of an earlier run."""
    return bool(finished) and finished_name(node_id, case.to_dict()) in finished
