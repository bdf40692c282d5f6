"""The facts of a run as the page lists them: what ran, on what, with which software and options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.reporting.aggregate import GIB, Row
from kvsuite.reporting.machines import has_several_machines, machine_of

Facts = list[tuple[str, str]]

_NOT_KNOWN = "not known"
_GPU_UNITS = {"power_limit_w": "W", "temperature_c": "°C", "sm_clock_mhz": "MHz", "memory_clock_mhz": "MHz"}


def run_facts(run: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, Facts]]:
    """Titled lists of label and text, all of it plain text; unknown fields of the environment are kept."""
    environment = dict(_mapping(run.get("environment")))
    host, gpu = environment.pop("host", None), _mapping(environment.pop("gpu", {}))
    packages, variables = _mapping(environment.pop("packages", {})), _mapping(environment.pop("variables", {}))
    own, tree = environment.pop("kvsuite", None), environment.pop("working_tree", None)
    environment.pop("command", None)
    python = environment.pop("python", None)
    software = [("Python", text_of(python)), *((name, text_of(value)) for name, value in packages.items() if value)]
    parts: list[tuple[str, Facts]] = [
        ("Run", _run(run, rows, own, tree)),
        ("Machine", _host(host) + [(f"GPU {_words(key)}", _gpu_text(key, value)) for key, value in gpu.items()]),
        ("Software", software),
        ("Environment", [(key, text_of(value)) for key, value in (variables | environment).items()]),
        ("Options", [(key, text_of(value)) for key, value in _mapping(run.get("options")).items()]),
    ]
    return [(title, facts) for title, facts in parts if facts]


def machine_line(run: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The machine in a few words: the GPU where there is one, else the processor; of several their names."""
    if has_several_machines(rows):
        machines = sorted(filter(None, set(map(machine_of, rows))))
        return f"{len(machines)} machines ({', '.join(machines)}), whose times are not set against each other"
    environment = _mapping(run.get("environment"))
    gpu, host = _mapping(environment.get("gpu")), environment.get("host")
    if gpu.get("name"):
        return str(gpu["name"])
    if not isinstance(host, Mapping):
        return text_of(host)
    cores = host.get("cores")
    return f"{text_of(host.get('cpu'))}{f', {cores} cores' if cores else ''}, no GPU"


def text_of(value: Any) -> str:
    """Any JSON value as a reader wants it: texts as they are, the rest as JSON."""
    if value is None or value == "":
        return _NOT_KNOWN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _run(run: Mapping[str, Any], rows: Sequence[Row], own: Any, tree: Any) -> Facts:
    command = run.get("command")
    cases = run.get("cases")
    measured = sum(float(row.get("duration_s") or 0.0) for row in rows)
    return [
        ("Run", text_of(run.get("run_id"))),
        ("Started", text_of(run.get("started_utc"))),
        ("Command", shlex.join(map(str, command)) if isinstance(command, list) else text_of(command)),
        ("Cases", f"{len(rows):,} of {cases:,}" if isinstance(cases, int) else f"{len(rows):,}"),
        ("Time in cases", f"{measured:,.0f} s"),
        ("Seed", text_of(run.get("seed"))),
        ("kvsuite", f"{text_of(run.get('kvsuite_version'))}{_commit(own)}"),
        *([("Working tree", _commit(tree).strip(" ()"))] if _commit(tree) else []),
    ]


def _commit(found: Any) -> str:
    commit = _mapping(found).get("commit")
    return f" (commit {str(commit)[:12]}{', changed' if _mapping(found).get('dirty') else ''})" if commit else ""


def _host(host: Any) -> Facts:
    if not isinstance(host, Mapping):
        return [] if host is None else [("Host", text_of(host))]
    facts = [(_words(key), text_of(value)) for key, value in host.items() if key != "ram_bytes"]
    ram = host.get("ram_bytes")
    return facts + ([("RAM", f"{ram / GIB:.1f} GiB")] if isinstance(ram, int | float) else [])


def _gpu_text(key: str, value: Any) -> str:
    if key == "memory_bytes" and isinstance(value, int | float):
        return f"{value / GIB:.1f} GiB"
    return f"{value} {_GPU_UNITS[key]}" if key in _GPU_UNITS and value is not None else text_of(value)


def _words(key: str) -> str:
    return {"cpu": "CPU", "os": "OS"}.get(key, str(key).removesuffix("_bytes").replace("_", " "))


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
