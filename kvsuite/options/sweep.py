"""Options of long sweeps: timeouts, resuming, shards, the plan. Part of the table in `kvsuite.options.table`."""

from __future__ import annotations

from .option import Option, _list, _switch, _text

_STATUSES = ("oom", "error", "crashed", "invalid", "skipped")


def _seconds(text: str) -> float:
    value = float(text)
    # an alarm of more than a few years is refused by the system
    if not 0 < value <= 1e8:
        raise ValueError("must lie above 0, and below 1e8 s")
    return value


def _statuses(text: str) -> tuple[str, ...]:
    if text.strip().lower() == "none":
        return ()
    found: tuple[str, ...] = _list(str)(text)
    for status in found:
        if status not in _STATUSES:
            raise ValueError(f"{status} is no status of a failed case; use {', '.join(_STATUSES)}, or none")
    return found


def _shard(text: str) -> str:
    from kvsuite.distribution.shards import Shard

    return str(Shard.parse(text))


def _card(text: str) -> str:
    from kvsuite.memory_model.fit import parse_card

    parse_card(text, 1.0, option="--kv-plan-card")
    return text


SWEEP_OPTIONS: tuple[Option, ...] = (
    Option("timeout", _seconds, "", "Seconds that a case may take, loading included; then it is stopped, or its process is "
           "killed, and its record says so, e.g. --kv-timeout=600.", example="600"),
    Option("resume", _text, "", "Finish an earlier run in its own folder: latest, or a run folder, e.g. --kv-resume=latest. "
           "Finished cases are left out.", example="latest"),
    Option("resume-rerun", _statuses, "crashed,error", "Statuses of cases that a resumed run measures again, comma separated: "
           "oom, error, crashed, invalid, skipped, or none."),
    Option("shard", _shard, "", "Run part I of N of the selected cases, balanced by expected cost, e.g. --kv-shard=1/4; "
           "python -m kvsuite merge joins the parts.", example="1/4"),
    Option("plan", _switch, "false", "Measure nothing: list the selected cases with expected time and memory, and what will "
           "not fit."),
    Option("plan-card", _card, "", "Memory of the device that --kv-plan judges by, e.g. --kv-plan-card=24GiB, where this "
           "machine is not the one that will measure.", example="24GiB"),
)  # fmt: skip
SWEEP_FLAGS = frozenset({"plan"})
