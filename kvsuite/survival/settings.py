"""Whether two runs measured in the same way: all that `settings_hash` is made of. And if not, in what they differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvsuite.entry_points import OURS
from kvsuite.meters.environment import machine
from kvsuite.store.records_file import code_of

#: options that decide what a run does with its cases, and nothing of what a case measures
_OTHER_PURPOSES = frozenset(
    {
        "report_dir", "cache_dir", "timeout", "resume", "resume_rerun", "shard", "plan", "plan_card", "nodes",
        "node_hours", "compare", "fail", "mlc_timeout", "mlc_compile_timeout",
    }
)  # fmt: skip
#: options that choose cases, as ``-k`` does: what they mean for a case is in the case
_CHOOSING = frozenset({"variants"})
_PACKAGES = ("transformers", "kvpress", "bitsandbytes", "triton")
_NOTHING = "none"


def differences(then: Mapping[str, Any], now: Mapping[str, Any], *, shards: bool = False) -> list[str]:
    """In what ``now`` measures otherwise than ``then`` did: ``--kv-rounds: then 5, now 3``.

    Parameters
    ----------
    then, now
        Run lines. What is not known yet of ``now`` (an environment without its GPU) may be missing there.
    shards
        Whether another ``--kv-shard`` is a difference.
    """
    found = [
        *_pairs("--kv-", then.get("options"), now.get("options"), set() if shards else {"shard"}),
        *_code(code_of(then), code_of(now), _version_of(then), _version_of(now)),
    ]
    if "environment" in now:
        found += machine_differences(then.get("environment") or {}, now["environment"])
    return found


def machine_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the machines of two environments differ; while one has not looked for its GPU, GPUs are no difference.

    Who has not looked has no ``gpu``; who looked and measures on the CPU has ``{}``.
    """
    before, after = _facts(then), _facts(now)
    blind = "gpu" not in then or "gpu" not in now
    return [
        _line(name, before.get(name), after.get(name))
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name) and not (blind and name.startswith("gpu "))
    ] + [*_engine_differences(then, now)]


def software_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what the software that measures differs between two environments: torch, what computes beside it, engines, Python."""
    before, after = then["packages"], now["packages"]
    versions = [".".join(str(one["python"]).split(".")[:2]) for one in (then, now)]
    found = [
        _line(name, old, new)
        for name, old, new in (
            *((name, before.get(name), after.get(name)) for name in ("torch", *_PACKAGES)),
            ("Python", *versions),
        )
        if old != new
    ]
    return [*found, *_engine_differences(then, now)]


def metric_differences(rows: Iterable[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """Metrics of ``rows`` whose definition has another version ``now`` (versions by name); those not known now are none."""
    then: dict[str, Any] = {}
    for row in rows:
        then |= {name: entry.get("version") for name, entry in row["metrics"].items()}
    return [
        f"the definition of {name}: then version {version}, now {now[name]}"
        for name, version in sorted(then.items())
        if name in now and now[name] != version
    ]


def case_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two cases of one test id differ: ``params.serving.max_num_seqs: then 4, now 2``."""
    return list(_fields("", then, now))


def _fields(inside: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _fields(f"{inside}{name}.", old, new)
        elif old != new:
            yield _line(inside + name, old, new)


def known_machine(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """The environment of a run's first process that looked for its GPU; one that died before that did not."""
    environments = [run["environment"], *(session["environment"] for session in run.get("sessions", ()))]
    return next((one for one in environments if "gpu" in one), environments[0])


def _facts(environment: Mapping[str, Any]) -> dict[str, Any]:
    try:
        facts = machine(dict(environment))
    except (KeyError, TypeError, AttributeError):
        # another tool's or an older file's
        return {}
    gpu = facts.pop("gpu")
    packages = environment["packages"]
    return facts | {f"gpu {name}": value for name, value in gpu.items()} | {n: packages.get(n) for n in _PACKAGES}


def _engine_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Versions of what computes in engines that both runs used (`kvsuite.engines.engine.Engine.version`)."""
    # an older run has none, nor has one that has not loaded anything yet
    before, after = _mapping(then.get("engines")), _mapping(now.get("engines"))
    for engine in sorted(before.keys() & after.keys()):
        old, new = _mapping(before[engine]), _mapping(after[engine])
        for name in sorted({*old, *new} - {"torch", *_PACKAGES}):
            if old.get(name) != new.get(name):
                yield _line(f"{name} of engine {engine}", old.get(name), new.get(name))


def _pairs(prefix: str, then: Any, now: Any, more: set[str]) -> Iterator[str]:
    then, now = _mapping(then), _mapping(now)
    ignored = _OTHER_PURPOSES - {"shard"} | _CHOOSING | more
    # nodes and addresses may change; whether there is a cluster decides what is beside a case
    then, now = ({**one, "cluster": "a cluster"} if one.get("cluster") else one for one in (then, now))
    for name in dict.fromkeys([*then, *now]):
        if name in ignored or (name in then and name in now and then[name] == now[name]):
            continue
        typed = prefix + str(name).replace("_", "-")
        if name not in now:
            yield f"{typed}: then {_shown(then[name])}, and no option of this version"
        elif name not in then:
            yield f"{typed}: no option of that version, now {_shown(now[name])}"
        else:
            yield _line(typed, then[name], now[name])


def _code(then: Any, now: Any, version_then: str, version_now: str) -> Iterator[str]:
    if now is None:
        return
    if not isinstance(then, Mapping):
        yield "code: the earlier run did not record it"
        return
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name) and (name in then) == (name in now):
            of = [one for one in (version_then, version_now) if one and name == OURS]
            yield f"the code of {name} has changed" + (f" (then {of[0]}, now {of[1]})" if len(of) == 2 else "")
        elif name not in then and name.endswith("conftest.py"):
            yield f"{name} is new"
        elif name not in now and name.endswith("conftest.py"):
            yield f"{name} is gone"


def _version_of(run: Mapping[str, Any]) -> str:
    """Version and commit of kvsuite, as far as a run line tells them."""
    told = _mapping(_mapping(run.get("environment")).get("kvsuite"))
    version, commit = str(told.get("version") or ""), str(told.get("commit") or "")[:9]
    changed = " with changes" if told.get("dirty") else ""
    return " ".join(filter(None, (version, f"at {commit}{changed}" if commit else "")))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _line(name: str, then: Any, now: Any) -> str:
    before, after = _shown(then), _shown(now)
    if before == after:
        # nothing, and the word for it
        before, after = repr(then), repr(now)
    return f"{name}: then {before}, now {after}"


def _shown(value: Any) -> str:
    return _NOTHING if value is None else str(value)
