"""Whether two runs measured in the same way: code, options, packages, machine. And if not, in what they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsuite.meters.environment import machine
from kvsuite.store.records_file import code_of

#: options that decide what a run does with its cases, and nothing of what a case measures
_OTHER_PURPOSES = frozenset(
    {
        "report_dir", "cache_dir", "timeout", "resume", "resume_rerun", "shard", "plan", "plan_card", "compare", "fail",
        "mlc_timeout", "mlc_compile_timeout",
    }
)  # fmt: skip
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
        *_code(code_of(then), code_of(now)),
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
    ]


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


def _pairs(prefix: str, then: Any, now: Any, more: set[str]) -> Iterator[str]:
    then, now = (side if isinstance(side, Mapping) else {} for side in (then, now))
    ignored = _OTHER_PURPOSES - {"shard"} | more
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name), now.get(name)
        if name not in ignored and before != after:
            yield _line(prefix + str(name).replace("_", "-"), before, after)


def _code(then: Any, now: Any) -> Iterator[str]:
    if now is None:
        return
    if not isinstance(then, Mapping):
        yield "code: the earlier run did not record it"
        return
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name) and (name in then) == (name in now):
            yield f"the code of {name} has changed"
        elif name not in then and name.endswith("conftest.py"):
            yield f"{name} is new"
        elif name not in now and name.endswith("conftest.py"):
            yield f"{name} is gone"


def _line(name: str, then: Any, now: Any) -> str:
    before, after = (_NOTHING if value is None else value for value in (then, now))
    return f"{name}: then {before}, now {after}"
