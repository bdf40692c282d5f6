"""What a comparison reads of records: only the fields it needs, checked while they are decoded.

A report of 10,000 cases is hundreds of megabytes, most of it raw samples: msgspec walks over what no field asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import msgspec

from kvsuite.errors import UserError
from kvsuite.metrics.registry import Better, MetricClass
from kvsuite.record import Status
from kvsuite.store.files import utf8


class MetricEntry(msgspec.Struct, frozen=True, gc=False, rename={"kind": "class"}):
    """One metric of one record; ``values`` stays JSON text until a test needs the rounds."""

    value: float | None
    unit: str
    better: Better
    kind: MetricClass
    version: int = 1
    clock: str | None = None
    protocol: str | None = None
    pooled: str | None = None
    reason: str | None = None
    limit: str = ""
    n: int | None = None
    cv: float | None = None
    values: msgspec.Raw = msgspec.Raw(b"[]")

    def rounds(self) -> list[float]:
        """The raw samples; what is no list of numbers counts as none."""
        try:
            return msgspec.json.decode(self.values, type=list[float])
        except msgspec.DecodeError:
            return []


class RecordRow(msgspec.Struct, frozen=True):
    """One record."""

    schema: Literal["kvsuite.record/1"]
    id: str
    case_key: str
    suite: str
    status: Status
    case: dict[str, Any]
    metrics: dict[str, MetricEntry]
    effective: dict[str, Any] = {}
    rounds: int = 0
    sidecar: str | None = None
    reason: str | None = None
    error: dict[str, Any] | None = None

    @property
    def bracket(self) -> str:
        """The case's part of the pytest id: ``hf-streaming_64``."""
        return self.id.partition("[")[2].removesuffix("]") or self.id

    @property
    def name(self) -> str:
        """The case's name inside its suite."""
        return str(self.case.get("name", self.bracket))

    @property
    def identity(self) -> dict[str, Any]:
        """The case as asked for, with the kind of its device: what a key is made of, revisions left out."""
        return self.case | {"device": str(self.case.get("device", "")).partition(":")[0]}

    @property
    def why(self) -> str:
        """Why the case has no result."""
        return str(self.reason or (self.error or {}).get("message") or "no reason given")


class RunFacts(msgspec.Struct, frozen=True):
    """The run line; ``sessions`` are further processes that measured parts of the run, each with its environment."""

    schema: str
    run_id: str
    started_utc: str = ""
    environment: dict[str, Any] = {}
    options: dict[str, Any] = {}
    sessions: list[dict[str, Any]] = []

    @property
    def environments(self) -> list[dict[str, Any]]:
        """Environments of all processes of the run."""
        found = [session.get("environment", session) for session in self.sessions]
        return [self.environment, *(one for one in found if isinstance(one, dict))]


class Section(msgspec.Struct, frozen=True):
    """A report, or the ``kvsuite`` section of a file of pytest-benchmark."""

    schema: str
    run: RunFacts
    records: list[RecordRow]
    environment: dict[str, Any] | None = None


class Document(msgspec.Struct, frozen=True):
    """Any JSON file that may hold records: a report, or a file of pytest-benchmark."""

    schema: str | None = None
    kvsuite: Section | None = None
    benchmarks: msgspec.Raw = msgspec.Raw()


Decoded = TypeVar("Decoded")

_ROW = msgspec.json.Decoder(RecordRow)
_RUN = msgspec.json.Decoder(RunFacts)
_SECTION = msgspec.json.Decoder(Section)
_DOCUMENT = msgspec.json.Decoder(Document)


def decode_row(data: bytes, where: str) -> RecordRow:
    """Decode a record; see `_decode` for errors."""
    return _decode(_ROW.decode, data, where)


def decode_run(data: bytes, where: str) -> RunFacts:
    """Decode a run line."""
    return _decode(_RUN.decode, data, where)


def decode_section(data: bytes, where: str) -> Section:
    """Decode a report."""
    return _decode(_SECTION.decode, data, where)


def decode_document(data: bytes, where: str) -> Document:
    """Decode what tells the kinds of JSON files apart."""
    return _decode(_DOCUMENT.decode, data, where)


def row_of(record: dict[str, Any]) -> RecordRow:
    """The row of a record of this process."""
    return decode_row(_encoded(record), f"record {record.get('id')!r}")


def section_of(section: object, where: str) -> Section:
    """The section of a file of pytest-benchmark that is already parsed."""
    try:
        return decode_section(_encoded(section), where)
    except (TypeError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({error}); measure the baseline again") from error


# half of a pair is how Python holds a byte of a file name that is not UTF-8; whole pairs and escaped backslashes go before it
_LONE_SURROGATE = re.compile(
    rb"(\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)


def _written_out(found: re.Match[bytes]) -> bytes:
    return found[0] if found[1] else b"\\" + found[0].lower()


def _encoded(document: object) -> bytes:
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError:
        return utf8(json.dumps(document))


def _decode(decode: Callable[[bytes], Decoded], data: bytes, where: str) -> Decoded:
    """Decode, with NaN and the infinities taken for null: another program may have written them.

    Raises
    ------
    UserError
        Naming ``where``, the place inside and the mend.
    """
    try:
        try:
            return decode(data)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            return decode(msgspec.json.encode(json.loads(_LONE_SURROGATE.sub(_written_out, data))))
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise UserError(f"{where}: not a run of kvsuite ({error}); measure it again or give another path") from error
