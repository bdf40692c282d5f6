"""What earlier runs took: finished cases of the last run folders, each with the environment that it was measured in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvsuite.case import Case
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.record import RECORD_SCHEMA
from kvsuite.store.records_file import RECORDS_FILE

from .order import session_key

# an archive of hundreds says no more
_LAST_RUNS = 30


@dataclass(frozen=True)
class RecordedCase:
    """A finished case of an earlier run.

    Parameters
    ----------
    case
        What was measured.
    seconds
        What it took, loading included where it loaded.
    run
        Name of the run's folder.
    environment
        In which it was measured.
    load_s
        Seconds of loading among them, as far as known.
    """

    case: Case
    seconds: float
    run: str
    environment: Mapping[str, Any] = field(default_factory=dict)
    load_s: float = 0.0


def recorded_cases(runs: Iterable[tuple[str, list[dict[str, Any]]]], options: Options) -> list[RecordedCase]:
    """Finished cases of those runs that have as many rounds, in the order of ``runs`` (`last_runs`).

    What cannot be read is left out: a plan needs no whole archive.
    """
    common = options.of(CommonOptions)
    wanted = {"rounds": common.rounds, "num_warmup": common.num_warmup}
    found: list[RecordedCase] = []
    for run, lines in runs:
        given = lines[0].get("options") if lines else None
        if isinstance(given, dict) and {name: given.get(name) for name in wanted} == wanted:
            found += _of_run(lines, run)
    return found


def last_runs(report_dir: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name and lines of the last runs, oldest first; lines that are none are left out."""
    paths = [(path.stat().st_mtime_ns, path) for path in report_dir.glob(f"*/{RECORDS_FILE}")]
    for _, path in sorted(paths)[-_LAST_RUNS:]:
        yield path.parent.name, _lines(path)


def _of_run(lines: list[dict[str, Any]], name: str) -> list[RecordedCase]:
    environments = {
        line["env"]: line["environment"]
        for line in lines
        if isinstance(line.get("env"), str) and isinstance(line.get("environment"), dict)
    }
    loaded: set[Any] = set()
    found = []
    for row in lines:
        environment, took = environments.get(row.get("env")), row.get("duration_s")
        if row.get("schema") != RECORD_SCHEMA or environment is None or not isinstance(took, int | float):
            continue
        case = _case(row.get("case"))
        if case is None:
            continue
        # the first case after a load did it; no two loads, of two workers say, take the same time
        load = _load_s(row)
        shared = row["env"], session_key(case), load
        if shared in loaded:
            load = 0.0
        loaded.add(shared)
        if row.get("status") == "ok":
            found.append(RecordedCase(case, float(took), name, environment, min(load, float(took))))
    return found


def _load_s(row: Mapping[str, Any]) -> float:
    model = row.get("model")
    load = model.get("load_s") if isinstance(model, dict) else None
    return float(load) if isinstance(load, int | float) else 0.0


def _case(found: Any) -> Case | None:
    try:
        return Case(**found)
    except TypeError:  # of another version, or none
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
