"""Options of long sweeps: timeouts, resuming, shards, the plan."""

# no postponed annotations: an option that is written wrongly is an error where it stands

import re
from typing import Annotated

from .card import card_bytes
from .numbers import decimal
from .option import Option, OptionGroup, all_or_number, list_of, path, switch
from .shard import Shard

_LEAST_S = 0.001
_CLIENT = re.compile(r"ray://[^\s:/]+:[0-9]{1,5}|ray://\[[0-9a-fA-F:]+\]:[0-9]{1,5}")
_STATUSES = ("oom", "error", "crashed", "invalid", "skipped")


def _seconds(typed: str) -> float:
    value = decimal(typed)
    # the system's clock has microseconds, and takes an alarm of nothing for none; of more than a few years it refuses one
    if not _LEAST_S <= value <= 1e8:
        raise ValueError(f"must lie between {_LEAST_S:g} and 1e8 s")
    return value


def _statuses(typed: str) -> tuple[str, ...]:
    if typed.strip().lower() == "none":
        return ()
    found: tuple[str, ...] = list_of(str)(typed)
    for status in found:
        if status not in _STATUSES:
            raise ValueError(f"{status} is no status of a failed case; use {', '.join(_STATUSES)}, or none")
    return found


def _card(typed: str) -> str:
    card_bytes(typed, "--kv-plan-card")
    return typed


def _cluster(typed: str) -> str:
    if typed in ("local", "auto") or _CLIENT.fullmatch(typed):
        return typed
    raise ValueError("use local, auto, or ray://host:port")


class SweepOptions(OptionGroup, frozen=True, kw_only=True):
    """What ends a case, which cases run, where, and whether any does."""

    # fmt: off
    timeout: Annotated[float | None, Option(
        _seconds, "",
        "Seconds that a case may take, loading included; then it is stopped, or its process is killed, and its "
        "record says so, e.g. --kv-timeout=600.",
        example="600",
    )]
    resume: Annotated[str | None, Option(
        path, "",
        "Finish an earlier run in its own folder: latest, or a run folder, e.g. --kv-resume=latest. Finished "
        "cases are left out.",
        example="latest",
    )]
    resume_rerun: Annotated[tuple[str, ...], Option(
        _statuses, "crashed,error",
        "Statuses of cases that a resumed run measures again, comma separated: oom, error, crashed, invalid, "
        "skipped, or none.",
    )]
    shard: Annotated[Shard | None, Option(
        Shard.parse, "",
        "Run part I of N of the selected cases, balanced by expected cost, e.g. --kv-shard=1/4; python -m "
        "kvsuite merge joins the parts.",
        example="1/4",
    )]
    plan: Annotated[bool, Option(
        switch, "false",
        "Measure nothing: list the selected cases with expected time and memory, and what will not fit.",
        is_flag=True,
    )]
    plan_card: Annotated[str | None, Option(
        _card, "",
        "Memory of the device that --kv-plan judges by, e.g. --kv-plan-card=24GiB, where this machine is not the "
        "one that will measure.",
        example="24GiB",
    )]
    cluster: Annotated[str | None, Option(
        _cluster, "",
        "Spread the cases over a cluster of Ray, a worker a GPU: local (one of this host alone), auto (the one that "
        "this host belongs to), or ray://host:port. Needs kvsuite[cluster].",
        example="auto",
    )]
    cluster_cores: Annotated[int | None, Option(
        all_or_number(1, 4096), "all",
        "Cores that a worker of a cluster owns where no GPU is used, e.g. --kv-cluster-cores=8; all is one worker a "
        "host.",
        example="8",
    )]
    # fmt: on
