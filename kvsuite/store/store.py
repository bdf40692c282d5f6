"""Writing a run: its folder, and one fsynced JSONL, first line the run, then one record a line."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvsuite import __version__
from kvsuite.case import digest, id_token
from kvsuite.errors import UserError
from kvsuite.record import RECORD_SCHEMA, RUN_SCHEMA, check_schema

from .files import sync_folder, utf8, write_atomic
from .inside import inside
from .records_file import RECORDS_FILE, code_of, session_of, whole_lines
from .validate import validate

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["RecordStore", "create_run_folder", "open_run"]

#: of the file with a case's raw tokens
SIDECAR_SUFFIX = ".parquet"
_NAME_LIMIT = 80  # of each part: a file name may have 255 bytes
#: held by the process that writes the records; free once that process is gone, however it ended
_LOCK_FILE = ".records.lock"


def create_run_folder(base: Path, *, method: str, model: str, started: datetime) -> Path:
    """Create a new ``{method}_{model}_{YYYYmmdd_HHMMSS}`` folder under ``base``; an existing one is never used again.

    Parameters
    ----------
    base
        Folder that holds the runs; created if missing.
    method
        Suite or method; lower-cased, anything but letters, digits and ``_`` becomes ``_``.
    model
        Model as the user named it; its last path component is kept.
    started
        Start of the run.

    Returns
    -------
    Path
        The new folder. Where the name is taken it ends in ``_2``, ``_3``, ...

    Raises
    ------
    UserError
        If ``base`` cannot be made or written.
    """
    method = re.sub(r"[^a-z0-9_]+", "_", method.lower())[:_NAME_LIMIT].strip("_") or "run"
    model = id_token(re.split(r"[/\\]+", model.rstrip("/\\"))[-1])[:_NAME_LIMIT] or "model"
    name = f"{method}_{model}_{started:%Y%m%d_%H%M%S}"
    try:
        base.mkdir(parents=True, exist_ok=True)
        for count in itertools.count(1):
            folder = base / (name if count == 1 else f"{name}_{count}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise UserError(
            f"--kv-report-dir={base}: cannot create a run folder there ({error.strerror or error}); "
            "give a folder that can be written"
        ) from error
    raise AssertionError("unreachable: count() does not end")


def open_run(base: Path, *, method: str, model: str, started: datetime, facts: Mapping[str, Any]) -> RecordStore:
    """Make the folder of a new run and start its records.

    Parameters
    ----------
    base, method, model, started
        As for `create_run_folder`.
    facts
        The run line but for what the folder decides: ``run_id, method, model, started_utc``.

    Raises
    ------
    UserError
        As `create_run_folder` and `RecordStore.create`.
    """
    folder = create_run_folder(base, method=method, model=model, started=started)
    named = {
        "run_id": folder.name,
        "method": method,
        "model": model,
        "started_utc": started.isoformat(timespec="seconds"),
    }
    return RecordStore.create(folder, named | dict(facts))


class RecordStore:
    """Writer of one run's ``records.jsonl``. What ``append`` has returned from is on the disk."""

    def __init__(self, folder: Path, fd: int, lock: BaseFileLock) -> None:
        self.folder = folder
        self.path = folder / RECORDS_FILE
        self._fd: int | None = fd
        self._lock = lock

    @classmethod
    def create(cls, folder: Path, run: Mapping[str, Any]) -> RecordStore:
        """Start the JSONL of a run.

        Parameters
        ----------
        folder
            An existing folder without a ``records.jsonl``.
        run
            ``run_id, method, model, started_utc, command, options, environment, seed``; the schema, the kvsuite version
            and ``env`` (sha256 of the environment) are added. Other fields are kept.

        Raises
        ------
        UserError
            If the file exists or cannot be written, or the run line breaks ``run.schema.json``.
        """
        line = {
            "schema": RUN_SCHEMA,
            "kvsuite_version": __version__,
            "env": digest(run.get("environment")),
            **run,
        }
        path = folder / RECORDS_FILE
        validate("run", line, str(path))
        data = _line(line, "run")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot start {path} ({error.strerror}); give another folder with --kv-report-dir"
            ) from error
        store = cls(folder, fd, _locked(fd, path))
        store._write(data)
        sync_folder(folder)
        return store

    @classmethod
    def reopen(cls, folder: Path, *, patience_s: float = 0) -> RecordStore:
        """Go on writing the records of a run whose process is gone. Half a line at the end is cut off.

        Parameters
        ----------
        folder
            Of the run.
        patience_s
            Seconds to wait for a process that is ending, which holds the file until the last of its threads is gone.

        Raises
        ------
        UserError
            If the file cannot be written, or another process still writes it.
        """
        path = folder / RECORDS_FILE
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise UserError(
                f"cannot go on with {path} ({error.strerror}); give the folder of a run that you may write to"
            ) from error
        store = cls(folder, fd, _locked(fd, path, patience_s))
        try:
            data = path.read_bytes()
            whole = whole_lines(data)
            os.ftruncate(fd, len(whole))
        except OSError as error:
            store.close()
            raise UserError(f"cannot go on with {path} ({error.strerror}); make it readable and writable") from error
        if whole and not whole.endswith(b"\n"):
            store._write(b"\n")
        return store

    def append_session(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write a further run line: records that follow have an environment of their own.

        Parameters
        ----------
        facts
            ``run_id, method, model, started_utc, command, options, environment, seed`` of the session.

        Returns
        -------
        dict
            The session as `read_records` will list it.
        """
        line = {"schema": RUN_SCHEMA, "kvsuite_version": __version__, "env": digest(facts.get("environment")), **facts}
        validate("run", line, str(self.path))
        self._write(_line(line, "run"))
        return session_of(line)

    def with_session(self, run: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """See to it that the run has a line with environment and code of the row that comes next.

        It has none for a worker on another GPU, or for the command that goes on with a run.

        Parameters
        ----------
        run
            As `read_records` gives it.
        facts
            As for `open_run`.

        Returns
        -------
        dict
            As `read_records` would give it now.
        """
        sessions = run.get("sessions", [])
        known, code = code_of(run) or {}, facts.get("code") or {}
        environments = {run["env"], *(session["env"] for session in sessions)}
        if digest(facts["environment"]) in environments and known | code == known:
            return dict(run)
        named = {name: run[name] for name in ("run_id", "method", "model")}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return dict(run) | {"sessions": [*sessions, self.append_session(named | {"started_utc": now} | dict(facts))]}

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one record row as one line and wait until it is on the disk.

        Raises
        ------
        UserError
            If the schema is not the record's, the disk refuses the line or the file is no longer in its folder.
        ValueError
            If the row holds NaN or an infinity, or the store is closed.
        """
        check_schema(row.get("schema"), RECORD_SCHEMA, f"record {row.get('id')!r}")
        self._write(_line(row, str(row.get("id"))))
        self.require_in_place()

    def write_sidecar(self, row_id: str, table: Mapping[str, Sequence[Any]]) -> str:
        """Write raw per-token data beside the records.

        Parameters
        ----------
        row_id
            Id of the record that names the file.
        table
            Columns by name, all of one length.

        Returns
        -------
        str
            Path relative to the run folder, for ``Record.sidecar``.

        Raises
        ------
        UserError
            If it cannot be written.
        """
        import pyarrow as pa
        from pyarrow import parquet

        # the digest keeps two ids apart that become the same file name
        name = f"{id_token(row_id)[-_NAME_LIMIT:]}-{digest(row_id).removeprefix('sha256:')[:8]}{SIDECAR_SUFFIX}"
        try:
            # of a run that goes on, the folder is as somebody left it
            path = inside(self.folder, f"tokens/{name}")
        except ValueError as error:
            raise UserError(f"{self.folder / 'tokens'}: {error}; remove it") from error
        buffer = pa.BufferOutputStream()
        parquet.write_table(pa.table({key: pa.array(column) for key, column in table.items()}), buffer)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {path.parent} ({error.strerror}); make room on that disk") from error
        write_atomic(path, buffer.getvalue().to_pybytes())
        return f"tokens/{name}"

    def require_in_place(self) -> None:
        """Refuse to go on where what was written is no longer there: who deletes a folder deletes no open file.

        Raises
        ------
        UserError
            If the folder was deleted, moved or replaced since.
        """
        if self._fd is None:
            return
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            there = False
        if not there:
            raise UserError(
                f"{self.path} was deleted or moved while the run wrote it, and its rows with it; move it back and go on with "
                f"--kv-resume={self.folder}, or measure again"
            )

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            # while it is held: whoever has it open already finds it gone and asks for a new one
            with suppress(OSError):
                os.unlink(self._lock.lock_file)
            self._lock.release()

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        before = os.fstat(self._fd).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as error:
            # half a line would make one damaged line of the next record
            with suppress(OSError):
                os.ftruncate(self._fd, before)
            raise UserError(f"cannot write {self.path} ({error.strerror}); make room on that disk") from error


def _line(row: Mapping[str, Any], name: str) -> bytes:
    try:
        return utf8(json.dumps(row, allow_nan=False, ensure_ascii=False)) + b"\n"
    except ValueError as error:
        raise ValueError(f"record {name!r} cannot be written as JSON: {error}") from error


def _locked(fd: int, path: Path, patience_s: float = 0) -> BaseFileLock:
    """Keep other writers out of ``path``, which is open as ``fd``, until the lock is released or this process is gone."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(_LOCK_FILE))
    try:
        lock.acquire(timeout=patience_s)
    except Timeout as error:
        os.close(fd)
        raise UserError(f"{path}: another process is writing it; wait for that run, or end it") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    return lock
