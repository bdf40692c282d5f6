"""Machine facts that decide whether times may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite.kernel_builds import prepare_line

from .records import RecordRow
from .sides import Side

# software is left out on purpose: a slower release of torch is what a comparison should find
_FACTS = {
    "GPU": ("gpu", "name"),
    "GPU processors": ("gpu", "sm_count"),
    "GPU memory": ("gpu", "memory_bytes"),
    "driver": ("gpu", "driver"),
    "power limit": ("gpu", "power_limit_w"),
    "OS": ("host", "os"),
    "CPU": ("host", "cpu"),
    "cores": ("host", "cores"),
}
_SETTINGS = {"threads": "set --kv-threads", "concurrent_workers": "run both with the same -n"}
# said by engines that build kernels, of runs that know it
_KERNELS = "kernels"
# said by older records of such engines too
_ATTENTION = ("attention", "decode_attention")


def machine_differences(base: Side, now: Side) -> list[str]:
    """How the machines differ, fact by fact: ``driver 550 -> 560``; empty if times may be compared."""
    found = []
    for name, (part, key) in _FACTS.items():
        before, after = (_values(side, part, key) for side in (base, now))
        if before != after or len(before) > 1:
            found.append(f"{name} {' and '.join(before)} -> {' and '.join(after)}")
    return found


def _values(side: Side, part: str, key: str) -> list[str]:
    return sorted({str(_fact(one, part, key)) for run in side.runs for one in run.facts.environments})


def _fact(environment: Mapping[str, Any], part: str, key: str) -> Any:
    facts = environment.get(part)
    found = facts.get(key) if isinstance(facts, Mapping) else None
    return "none" if found is None else found


def setting_difference(base: Sequence[RecordRow], now: Sequence[RecordRow]) -> str | None:
    """What else makes the times of a case those of two machines; ``None`` if nothing does."""
    nodes = dict.fromkeys(_node(row) for row in (*base, *now))
    if len(nodes) > 1:
        return f"{' -> '.join(nodes)}; times of two machines do not compare"
    for name, mend in _SETTINGS.items():
        first = base[0].effective.get(name)
        other = next((found for row in (*base, *now) if (found := row.effective.get(name)) != first), first)
        if other != first:
            return f"{name} {first} -> {other}; {mend}"
    return _kernel_difference((*base, *now))


def _kernel_difference(rows: Sequence[RecordRow]) -> str | None:
    """Kernels that some rows had and others had not; of records without the fact only what attended tells."""
    knowing = [_KERNELS in row.effective for row in rows]
    names: tuple[str, ...] = (_KERNELS,) if all(knowing) else (_KERNELS, *_ATTENTION)
    for name in names if any(knowing) else ():
        found = list(dict.fromkeys(_words(row.effective[name]) for row in rows if name in row.effective))
        if len(found) > 1:
            case = rows[0].case
            line = prepare_line(*(str(case.get(key, "")) for key in ("model", "device", "dtype")))
            return f"{name} {' -> '.join(found)}; run {line} before both"
    return None


def _words(fact: Any) -> str:
    """A fact, or those of several layer groups."""
    return " and ".join(dict.fromkeys(map(str, fact.values()))) if isinstance(fact, Mapping) else str(fact)


def _node(row: RecordRow) -> str:
    """The node of a cluster that measured a row."""
    node = row.effective.get("node")
    return f"node {node.get('name')} ({node.get('ip')})" if isinstance(node, Mapping) else "no node of a cluster"
