"""Rows as figures show them: groups that are compared with each other, what an arm is called, its colour and its numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.foreign_text import visible
from kvsuite.meters.serving_times import Slo
from kvsuite.reporting.aggregate import Row, entry, failure, missing_reason, value
from kvsuite.reporting.figure_style import BLUE, GREEN, GREY, RED
from kvsuite.suites.pipeline.rows import arrivals_of, setting_of, workload_name

#: colours of variants, in the order of a legend
COLOURS = {
    "baseline": GREY,
    "compression-only": GREEN,
    "chunked": BLUE,
    "streams-only": "#e67e22",
    "greenctx-only": RED,
    "auto-tune+greenctx": "#9b59b6",
    "triad": "#34495e",
}
_OTHER = "#000000"
#: percentiles as a record names them, highest first, and the samples that each needs
PERCENTILES = {"p99": 100, "p90": 10, "p50": 2}


@dataclass(frozen=True)
class Arm:
    """One row of a group."""

    label: str
    row: Row

    @property
    def params(self) -> Mapping[str, Any]:
        """Of its case."""
        found: Mapping[str, Any] = self.row["case"]["params"]
        return found

    @property
    def variant(self) -> str:
        """Its word of ``--kv-variants``."""
        return str(self.params.get("variant"))

    @property
    def colour(self) -> str:
        """Of its variant."""
        return COLOURS.get(self.variant, _OTHER)

    @property
    def compresses(self) -> bool:
        """Whether its requests' caches are reduced."""
        return self.row["case"]["policy"] is not None

    @property
    def layers_per_step(self) -> int | None:
        """Layers that are merged after each token behind a prompt; ``None`` where all are at its end."""
        found: int | None = self.params.get("serving", {}).get("layers_per_step")
        return found

    def value(self, metric: str, scale: float = 1.0) -> float | None:
        """Headline value in units of ``1 / scale``."""
        found = value(self.row, metric)
        return None if found is None else found * scale

    def percentile(self, metric: str, which: str, scale: float = 1.0) -> float | None:
        """Percentile of the samples of a metric (``ttft_s`` and ``p99``), ``None`` where there are too few."""
        return self.value(metric.removesuffix("_s") + f"_{which}_s", scale)

    @property
    def decode_sms(self) -> int | None:
        """SMs that its decode lane really had; ``None`` without a partition, or where a controller moved it."""
        if self.params.get("serving", {}).get("controller"):
            return None
        realised = (self.row.get("partition") or {}).get("realised") or {}
        found = realised.get("decode_sms")
        return None if found is None else int(found)


@dataclass(frozen=True)
class Group:
    """Arms that served the same requests in the same pool."""

    title: str
    arms: tuple[Arm, ...]
    unfinished: tuple[str, ...] = ()

    @property
    def slo(self) -> tuple[float, float] | None:
        """TTFT and TPOT that count as served well, in seconds; ``None`` where arms were judged by others."""
        texts = {str(arm.params["slo"]) for arm in self.arms if arm.params.get("slo")}
        if len(texts) != 1:
            return None
        bounds = Slo.parse(texts.pop())
        return bounds.ttft_s, bounds.tpot_s


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows of the pipeline suite by model, workload and pool, in their order; a case without numbers is told, not drawn."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(setting_of(row), []).append(row)
    return [_group(members) for members in found.values()]


def _group(rows: Sequence[Row]) -> Group:
    labels = [_label(row) for row in rows]
    arms = [Arm(label, row) for label, row in zip(labels, rows, strict=True)]
    unfinished = [f"{arm.label}: {failure(arm.row)}" for arm in arms if arm.row["status"] != "ok"]
    return Group(
        _title(rows[0]), tuple(arm for arm in arms if arm.row["status"] == "ok"), tuple(map(visible, unfinished))
    )


def _label(row: Row) -> str:
    """The part of a case's name that tells it from the others of its group."""
    name = str(row["case"]["name"])
    return visible(re.split(r"-bs\d+-", name, maxsplit=1)[-1])


#: pieces of an arm's name, and what one says of the arm
_MARKS = {
    r"c\d+": "c: prompt tokens a step",
    r"f[\d.]+": "f: one of so many prompt tokens stays",
    r"d\d+": "d: layers merged after each token behind a prompt",
    r"sm[\d.]+_[\d.]+(_free)?": "sm: SMs, or shares of them, of the decode and of the prompt lane",
    r"sm[\d.]+_[\d.]+_free": "free: decode steps are not bound to theirs",
}


def marks_of(arms: Sequence[Arm]) -> list[str]:
    """A line that explains the marks in the names of arms, none where they have none."""
    pieces = {piece for arm in arms for piece in arm.label.split("-")}
    said = [meaning for mark, meaning in _MARKS.items() if any(re.fullmatch(mark, piece) for piece in pieces)]
    return [f"In the names: {'; '.join(said)}."] if said else []


def _title(row: Row) -> str:
    case = row["case"]
    workload, plan = case["workload"], case["params"].get("serving") or {}
    pool = f"{plan['pool_blocks']} blocks" if plan.get("pool_blocks") else f"{plan.get('pool_bytes')} bytes"
    parts = [
        row["model"].get("label") or case["model"],
        case["quantization"],
        f"{case['device']}, {case['dtype']}",
        f"{workload_name(row)}, {workload.get('requests')} requests",
        f"at most {workload.get('prompt_tokens')} in, {workload.get('max_new_tokens')} out",
        f"arrivals {arrivals_of(row)}",
        f"pool {pool}",
    ]
    return visible("  |  ".join(str(part) for part in parts if part))


def highest_percentile(arms: Sequence[Arm], *metrics: str) -> str | None:
    """The highest percentile that every arm has of all these metrics; ``None`` where there is none."""
    return next(
        (
            which
            for which in PERCENTILES
            if arms and all(arm.percentile(metric, which) is not None for arm in arms for metric in metrics)
        ),
        None,
    )


def why_missing(arms: Sequence[Arm], metric: str) -> str:
    """Why none of the arms has a metric, each reason once."""
    reasons = dict.fromkeys(missing_reason(arm.row, metric) for arm in arms)
    return "not measured: " + ("; ".join(reasons) or "no case finished")


def interval(arm: Arm, metric: str, scale: float = 1.0) -> float | None:
    """Half the 95 % interval of the mean over rounds; ``None`` below two."""
    found = entry(arm.row, metric).get("ci95")
    return None if found is None else (found[1] - found[0]) / 2 * scale
