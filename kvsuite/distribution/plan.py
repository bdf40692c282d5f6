"""``--kv-plan``: what a sweep will take, before it takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.case import Case
from kvsuite.console import Column, Sheet, stacked
from kvsuite.meters.environment import host_facts
from kvsuite.options.card import card_bytes
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.quantization.formats import GROUP_FORMATS
from kvsuite.suites.footprint import Footprint
from kvsuite.survival.resume import planned_key

from .cost import SPEEDS, footprint_of, seconds, work_of
from .gpus import visible_entries
from .order import session_key
from .progress import about
from .recorded import RecordedCase, last_runs, recorded_cases
from .shards import assign
from .time_left import Correction, Planned, kind_of

if TYPE_CHECKING:
    from rich.console import RenderableType

_GIB, _MIB = 1 << 30, 1 << 20
_MODEL = "model"
_COLUMNS = (
    Column("seconds", 9), Column("memory needed", 13), Column("fits", 8, "left"), Column("expected from", justify="left"),
)  # fmt: skip


def plan(cases: Sequence[Case], options: Options, known: Mapping[str, RecordedCase]) -> list[Planned]:
    """Plan ``cases`` in their order.

    Parameters
    ----------
    cases, options
        What would run.
    known
        What was measured, by `planned_key` (`measured_cases`). What a case of these models took more than the model says is
        taken to hold for others of its kind.
    """
    correction = _learnt(known.values(), {case.model for case in cases}, options)
    source = f"{_MODEL}, corrected by {correction.cases} measured cases" if correction.cases else _MODEL
    loaded: set[tuple[str | None, ...]] = set()
    found: list[Planned] = []
    for case in cases:
        memory = footprint_of(case, options)
        key = session_key(case)
        measured = known.get(planned_key(case.to_dict()))
        if measured is not None:
            found.append(Planned(case, measured.seconds, measured.run, memory))
        else:
            expected = _by_model(case, options, memory, loads=key not in loaded)
            if expected is not None:
                expected *= correction.factor(kind_of(case))
            found.append(Planned(case, expected, source, memory))
        loaded.add(key)
    return found


def _by_model(case: Case, options: Options, memory: Footprint, *, loads: bool) -> float | None:
    if not memory.elements or not memory.weight_bytes:
        return None
    speed = SPEEDS.get(case.device_kind)
    if speed is None:
        return None
    return seconds(
        work_of(case, options), speed, elements=memory.elements, weight_bytes=memory.weight_bytes, loads=loads,
        packed=case.quantization in GROUP_FORMATS,
    )  # fmt: skip


def _learnt(known: Iterable[RecordedCase], models: Collection[str], options: Options) -> Correction:
    correction = Correction()
    for measured in known:
        if measured.case.model in models:
            memory = footprint_of(measured.case, options)
            expected = _by_model(measured.case, options, memory, loads=False)
            if expected is not None:
                correction.add(kind_of(measured.case), expected, measured.seconds)
    return correction


def measured_cases(runs: Iterable[tuple[str, list[dict[str, Any]]]], options: Options) -> dict[str, RecordedCase]:
    """Finished cases on this machine by `planned_key`; the last measurement counts (`recorded_cases`)."""
    host = host_facts()["host"]
    return {
        planned_key(one.case.to_dict()): one for one in recorded_cases(runs, options) if is_on(one.environment, host)
    }


def is_on(environment: Mapping[str, Any], host: Mapping[str, Any]) -> bool:
    """Whether an environment is of a host: name, CPU, cores."""
    there = environment.get("host")
    return isinstance(there, dict) and all(there.get(name) == host[name] for name in ("name", "cpu", "cores"))


def device_bytes(options: Options, device_kind: str) -> tuple[int, str] | None:
    """Memory that a case may have, and whose; ``None`` where it cannot be known.

    Raises
    ------
    UserError
        If ``--kv-plan-card`` is no size.
    """
    card = options.of(SweepOptions).plan_card
    if card is not None:
        return card_bytes(card, "--kv-plan-card"), f"--kv-plan-card={card}"
    if device_kind == "cpu":
        ram = host_facts()["host"]["ram_bytes"]
        return None if ram is None else (int(ram), "this machine's RAM")
    if device_kind == "cuda":
        size = _smallest_gpu()
        return None if size is None else (size, "the smallest GPU to see here")
    return None


def _smallest_gpu() -> int | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        entries = visible_entries(int(pynvml.nvmlDeviceGetCount()))
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(entry))
            if entry.isdecimal()
            else pynvml.nvmlDeviceGetHandleByUUID(entry)
            for entry in entries
        ]
        return min((int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles), default=None)
    except Exception:  # no library, no driver, no such card: then it is not known
        return None


def plan_table(cases: Sequence[Case], options: Options, *, workers: int = 1) -> RenderableType:
    """The plan as a table with its sums.

    Parameters
    ----------
    cases, options
        What would run.
    workers
        Of xdist.

    Raises
    ------
    UserError
        If ``--kv-plan-card`` is no size.
    """
    if not cases:
        return stacked(["no cases: another shard, or the run that goes on, has all"])
    rows = plan(cases, options, measured_cases(last_runs(Path(options.of(CommonOptions).report_dir)), options))
    kinds = Counter(row.case.device_kind for row in rows)
    card = device_bytes(options, next(iter(kinds)))
    sheet = Sheet("case", _COLUMNS, [(row.case.id, _cells(row, card)) for row in rows], ruled=False)
    return stacked([sheet], [*_sums(rows, card, workers), *_notes(rows)])


def _cells(row: Planned, card: tuple[int, str] | None) -> list[str]:
    took = "n/a" if row.seconds is None else f"{row.seconds:.1f}"
    fits = "n/a" if card is None else row.memory.fits(card[0])
    return [took, size_text(row.memory), fits, row.source]


def size_text(memory: Footprint) -> str:
    """Predicted memory in words, a lower bound as one."""
    if memory.bytes is None:
        return "n/a"
    size = f"{memory.bytes / _GIB:.2f} GiB" if memory.bytes >= _GIB else f"{memory.bytes / _MIB:.1f} MiB"
    return f"{'' if memory.is_whole else '≥ '}{size}"


def _sums(rows: Sequence[Planned], card: tuple[int, str] | None, workers: int) -> list[str]:
    known = [row.seconds for row in rows if row.seconds is not None]
    total = f"{len(rows)} cases, {about(sum(known))} one after another"
    if workers > 1:
        loads = [0.0] * workers
        for part, took in zip(assign(known, workers), known, strict=True):
            loads[part - 1] += took
        total += f", {about(max(loads))} on {workers} workers"
    missing = len(rows) - len(known)
    found = [total + (f" ({missing} cases of unknown time left out)" if missing else "")]
    largest = max(rows, key=lambda row: row.memory.bytes or 0.0)
    if largest.memory.bytes is not None:
        found.append(f"largest memory needed: {size_text(largest.memory)} ({largest.case.id})")
    if card is None:
        found.append("the device's memory is not known here; give --kv-plan-card=24GiB, say")
        return found
    large = [row.case.id for row in rows if row.memory.fits(card[0]) == "no"]
    found.append(
        f"{len(large)} will not fit {card[0] / _GIB:.1f} GiB ({card[1]}){': ' if large else ''}{', '.join(large)}"
    )
    return found


def _notes(rows: Sequence[Planned]) -> list[str]:
    notes = [
        "memory needed: predicted for weights, keys and values, and the engine's buffers; Python and torch themselves are "
        "not in it"
    ]
    if any(row.source.startswith(_MODEL) for row in rows):
        notes.append(
            "model: counted tokens and steps over a stated speed of the device, which is rough (docs/distribution.md)"
        )
    if any(row.memory.bytes is not None and not row.memory.is_whole for row in rows):
        notes.append(
            "≥: what is known of weights and a full cache; activations and slack come on top. likely: that much fits"
        )
    notes += dict.fromkeys(f"n/a: {row.memory.reason}" for row in rows if row.memory.reason)
    return notes
