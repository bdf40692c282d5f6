"""Options of long sweeps: timeouts, resuming, shards, the plan."""

# no postponed annotations: an option that is written wrongly is an error where it stands

import re
from typing import Annotated

from kvsuite.errors import UserError

from .card import card_bytes
from .nodes import NodesText
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
    if typed in ("local", "auto") or (_CLIENT.fullmatch(typed) and 0 < int(typed.rpartition(":")[2]) < 1 << 16):
        return typed
    raise ValueError("use local, auto, or ray://host:port")


def _nodes(typed: str) -> str:
    NodesText.parse_all(typed)
    return typed


def _hours(typed: str) -> float | None:
    if typed.strip().lower() == "none":
        return None
    value = decimal(typed)
    if not 0.1 <= value <= 1e6:
        raise ValueError("must lie between 0.1 and 1e6 hours, or be none")
    return value


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
    nodes: Annotated[str | None, Option(
        _nodes, "",
        "Plan for workers elsewhere (with --kv-plan), each with a card of its own, e.g. --kv-nodes=8xH200,2xL40S: "
        "expected hours, what fits where, and what losses cost.",
        example="8xH200,2xL40S",
    )]
    node_hours: Annotated[float | None, Option(
        _hours, "100",
        "Mean hours after which a worker of --kv-nodes is lost, for the losses that the plan draws; none draws none.",
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

    def check(self, given: frozenset[str]) -> None:
        """Refuse options that exclude each other, or need another.

        Raises
        ------
        UserError
            Naming both.
        """
        if self.cluster is None and self.cluster_cores is not None:
            raise UserError(
                f"--kv-cluster-cores={self.cluster_cores}: cores of the workers of a cluster; add --kv-cluster, or leave it out"
            )
        nodes = self.nodes
        if nodes is not None and not self.plan:
            raise UserError(f"--kv-nodes={nodes}: only plans; add --kv-plan, or leave it out")
        if nodes is not None and self.plan_card is not None:
            raise UserError(
                f"--kv-plan-card={self.plan_card}: --kv-nodes={nodes} names the cards; leave one of both out"
            )
        if nodes is None and "node_hours" in given:
            raise UserError(
                "--kv-node-hours: says how often workers of --kv-nodes are lost; name them, such as --kv-nodes=8xH200"
            )
