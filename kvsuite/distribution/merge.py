"""Parts of a sweep joined into one run, or refused: never a wrong merge."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsuite.errors import UserError
from kvsuite.options.shard import Shard
from kvsuite.store.inside import inside
from kvsuite.store.records_file import code_of, read_records
from kvsuite.store.store import SIDECAR_SUFFIX, RecordStore
from kvsuite.store.validate import validate
from kvsuite.survival.resume import planned_key
from kvsuite.survival.settings import differences, known_machine, machine_differences, metric_differences


@dataclass(frozen=True)
class Part:
    """One run that takes part.

    Parameters
    ----------
    path
        As given.
    run, rows
        Its run line and its records, valid against their schemas.
    """

    path: Path
    run: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def folder(self) -> Path:
        """Where its sidecars lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def shard(self) -> Shard | None:
        """Which shard it is."""
        text = (self.run.get("options") or {}).get("shard")
        return Shard.parse(text) if isinstance(text, str) else None


@dataclass(frozen=True)
class Merged:
    """What parts become.

    Parameters
    ----------
    run
        Run line without a ``run_id``, which the folder gives.
    sessions
        Further run lines: an environment each that rows refer to.
    rows
        Every case once, each with the part that it comes from.
    notes
        What a reader must know: missing shards, several machines, cut lines.
    """

    run: dict[str, Any]
    sessions: list[dict[str, Any]]
    rows: list[tuple[Part, dict[str, Any]]]
    notes: list[str]


def read_part(path: Path) -> tuple[Part, list[str]]:
    """Read a run folder, a ``records.jsonl`` or a ``report.json``; notes say what was left out.

    Raises
    ------
    UserError
        If it cannot be read, or something in it breaks its schema.
    """
    run, rows, notes = read_records(path)
    validate("run", run, str(path))
    if not isinstance(run["environment"], dict):
        raise UserError(f"{path}: its environment is no object; measure again")
    for row in rows:
        validate("record", row, f"{path}: record {row.get('id')!r}")
    return Part(path, run, rows), notes


def join(parts: Sequence[Part], *, other_machines: bool = False) -> Merged:
    """Join parts of one sweep.

    Parameters
    ----------
    parts
        At least one.
    other_machines
        Whether parts may come from machines that differ in what decides speed.

    Raises
    ------
    UserError
        If parts measured in different ways, or the same case with different results, or are not shards of one whole. The
        message names the parts and what differs.
    """
    first = parts[0]
    notes: list[str] = []
    for part in parts[1:]:
        _require_same(first, part, other_machines, notes)
    _note_shards(parts, notes)
    rows = _rows(parts)
    run = {name: value for name, value in first.run.items() if name not in ("run_id", "sessions", "schema", "env")}
    run["options"] = dict(first.run["options"]) | {"shard": None}
    # a part that was resumed may know of more files
    code = {name: value for part in reversed(parts) for name, value in (code_of(part.run) or {}).items()}
    run |= {"code": code} if code else {}
    run["merged"] = [str(part.run["run_id"]) for part in parts]
    counts = [part.run.get("cases") for part in parts]
    complete = [count for count in counts if isinstance(count, int)]
    overlapping = sum(len(part.rows) for part in parts) != len(rows)
    whole = not overlapping and len(complete) == len(parts) and not _missing(parts)
    run["cases"] = sum(complete) if whole and complete else None
    return Merged(run, _sessions(parts), rows, notes)


def write_merged(merged: Merged, folder: Path) -> Path:
    """Write a merged run into a new folder, which appears when it is whole.

    Raises
    ------
    UserError
        If the folder is taken or cannot be written, a sidecar is gone, or the result breaks a schema.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder}: is there already; give a new folder")
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        run = merged.run | {"run_id": folder.name}
        with RecordStore.create(temporary, run) as store:
            for session in merged.sessions:
                store.append_session(run | session)
            for part, row in merged.rows:
                _copy_sidecar(part, row, temporary)
                store.append(row)
        line, rows, _ = read_records(temporary)
        _derive(temporary, line, rows)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError as error:
        raise UserError(
            f"--out={folder}: cannot be written ({error.strerror or error}); give another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _derive(folder: Path, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    from kvsuite.suites.outputs import write_outputs

    try:
        write_outputs(folder, run, rows)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        # rows of another tool may keep to the schema and still lack what a suite's table needs
        raise UserError(
            f"the records cannot be drawn ({type(error).__name__}: {error}); are they kvsuite's?"
        ) from error


def _require_same(first: Part, part: Part, other_machines: bool, notes: list[str]) -> None:
    found = differences(_without_machine(first.run), _without_machine(part.run))
    versions = {name: entry.get("version") for row in part.rows for name, entry in row["metrics"].items()}
    found += metric_differences(first.rows, versions)
    if first.run["kvsuite_version"] != part.run["kvsuite_version"]:
        found.append(f"kvsuite: then {first.run['kvsuite_version']}, now {part.run['kvsuite_version']}")
    if first.run["seed"] != part.run["seed"]:
        found.append(f"seed: then {first.run['seed']}, now {part.run['seed']}")
    if (code_of(first.run) is None) != (code_of(part.run) is None):
        found.append("code: recorded in one of them only")
    machines = machine_differences(known_machine(first.run), known_machine(part.run))
    between = f"{first.path} and {part.path}"
    if other_machines and machines:
        notes.append(
            f"{between} come from different machines, so that their times do not compare: {'; '.join(machines)}"
        )
    elif machines:
        found += [*machines, "with --other-machines they may differ, and times do not compare"]
    if found:
        told = "; ".join(found).replace("then ", "").replace(", now ", " and ")
        raise UserError(f"{between}: are not parts of one sweep: {told}")


def _without_machine(run: Mapping[str, Any]) -> dict[str, Any]:
    # kvsuite's own version and commit stay; machines are compared apart, since they may be allowed to differ
    return dict(run) | {"environment": {"kvsuite": run["environment"].get("kvsuite")}}


def _rows(parts: Sequence[Part]) -> list[tuple[Part, dict[str, Any]]]:
    by_name: dict[str, tuple[Part, dict[str, Any]]] = {}
    for part in parts:
        for row in part.rows:
            # one case under two ids would be two results of it as well
            names = (f"id {row['id']}", f"case {planned_key(row['case'])} of {row['id'].partition('[')[0]}")
            earlier = next((by_name[name] for name in names if name in by_name), None)
            if earlier is None:
                by_name |= dict.fromkeys(names, (part, dict(row)))
            elif earlier[1] != row:
                raise UserError(
                    f"{earlier[0].path} and {part.path}: both have {row['id']}, as {earlier[1]['status']} and {row['status']}, "
                    "with different results; leave one of them out, or finish one with --kv-resume"
                )
    return list({id(row): (part, row) for part, row in by_name.values()}.values())


def _note_shards(parts: Sequence[Part], notes: list[str]) -> None:
    shards = [part.shard for part in parts]
    known = [shard for shard in shards if shard is not None]
    if not known:
        return
    if len(known) < len(parts) or len({shard.of for shard in known}) > 1:
        named = ", ".join(f"{part.path} is {part.shard or 'no shard'}" for part in parts)
        raise UserError(f"not shards of one sweep: {named}; give the shards of one --kv-shard=I/N")
    if missing := _missing(parts):
        notes.append(f"shards {', '.join(missing)} are missing: the merged run is partial")


def _missing(parts: Sequence[Part]) -> list[str]:
    known = [shard for part in parts if (shard := part.shard) is not None]
    if not known:
        return []
    there = {shard.index for shard in known}
    return [f"{index}/{known[0].of}" for index in range(1, known[0].of + 1) if index not in there]


def _sessions(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Environments beside the first one's, each once."""
    seen = {parts[0].run["env"]}
    found = []
    for part in parts:
        own = {name: part.run[name] for name in ("started_utc", "command", "env", "environment")}
        for session in (own, *part.run.get("sessions", [])):
            if session["env"] not in seen:
                seen.add(session["env"])
                found.append({name: value for name, value in session.items() if name != "env"})
    return found


def _copy_sidecar(part: Part, row: Mapping[str, Any], folder: Path) -> None:
    name = row["sidecar"]
    if name is None:
        return
    # a damaged or hostile record may name any file
    try:
        source, target = inside(part.folder, name), inside(folder, name)
    except ValueError as error:
        raise UserError(f"{part.path}: {row['id']} names {name}, which {error}; measure the case again") from error
    if source.suffix != SIDECAR_SUFFIX:
        raise UserError(f"{part.path}: {row['id']} names {name}, which is no {SIDECAR_SUFFIX}; measure the case again")
    if not source.is_file():
        raise UserError(f"{part.path}: {row['id']} names {name}, which is not in its folder; restore it")
    if target.exists():
        raise UserError(f"{part.path}: {row['id']} names {name}, as another record does; measure the case again")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
