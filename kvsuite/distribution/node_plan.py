"""``--kv-plan --kv-nodes``: what a sweep takes on workers that are elsewhere, and what fits their cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite.case import Case
from kvsuite.console import Column, Sheet, stacked
from kvsuite.meters.environment import host_facts
from kvsuite.options.common import CommonOptions
from kvsuite.options.resolve import Options
from kvsuite.options.sweep import SweepOptions
from kvsuite.quantization.formats import GROUP_FORMATS
from kvsuite.suites.footprint import Footprint
from kvsuite.survival.resume import planned_key

from .cards import CPU, KNOWN_CARDS, REFERENCE, GpuCard, Workers, this_cpu, workers_of
from .cost import SPEEDS, Speed, footprint_of, seconds, work_of
from .order import session_key
from .plan import is_on, size_text
from .progress import about
from .recorded import RecordedCase, last_runs, recorded_cases
from .simulation import Losses, SimulatedRun, SweepSimulation, Times
from .time_left import Correction, Kind, kind_of

if TYPE_CHECKING:
    from rich.console import RenderableType

#: what a worker takes until it can measure: pytest, torch, CUDA
START_S = 12.0
# simulated cases in all: as many draws as a few seconds allow
_DRAWN_CASES, _MOST_DRAWS = 20_000, 20
_MODEL = "model"
_SCALED, _MODELLED = "~", "*"


@dataclass(frozen=True)
class CardTime:
    """What a case is expected to take on a card.

    Parameters
    ----------
    seconds
        Without loading; ``None`` where nothing tells.
    mark
        Empty for a record of that card, `_SCALED` for one of another card, `_MODELLED` for none.
    source
        Where it comes from.
    """

    seconds: float | None
    mark: str
    source: str


@dataclass(frozen=True)
class NodeCase:
    """A case on the cards of some workers: what it needs, and its times in their order."""

    case: Case
    memory: Footprint
    times: tuple[CardTime, ...]
    fits: tuple[str, ...]


class Records:
    """What earlier runs tell of some cards.

    Parameters
    ----------
    cards
        The cards asked for; records of others are taken too, where the driver's name of theirs is known.
    recorded
        Finished cases, oldest first.
    models
        Those of the sweep: only cases of these say how wrong the model of speed is.
    options
        Of the sweep.
    """

    def __init__(
        self, cards: Sequence[GpuCard], recorded: Iterable[RecordedCase], models: Collection[str], options: Options
    ) -> None:
        self._options = options
        self._by_device = {device: card for known in (KNOWN_CARDS, cards) for card in known for device in card.devices}
        self._host, self._cpu = host_facts()["host"], this_cpu()
        self._found: dict[str, dict[GpuCard, RecordedCase]] = {}
        self._loads: dict[tuple[str | None, ...], dict[GpuCard, float]] = {}
        self._correction = Correction()
        for one in recorded:
            card = self._card_of(one)
            if card is None:
                continue
            self._found.setdefault(planned_key(one.case.to_dict()), {})[card] = one
            if one.load_s:
                self._loads.setdefault(_shared(one.case), {})[card] = one.load_s
            if one.case.model in models:
                expected = self._by_model(one.case, card, footprint_of(one.case, options))
                if expected is not None:
                    self._correction.add(_kind(one.case, card), expected, one.seconds - one.load_s)

    def time(self, case: Case, card: GpuCard, memory: Footprint) -> CardTime:
        """Expected on ``card``: its own record, one of another card by the ratio of bandwidths, or the model."""
        found = self._found.get(planned_key(case.to_dict()), {})
        if card in found:
            one = found[card]
            return CardTime(one.seconds - one.load_s, "", one.run)
        if found and (near := _nearest(card, found)) is not None:
            other, scale = near
            one = found[other]
            return CardTime((one.seconds - one.load_s) * scale, _SCALED, f"{one.run} on {other.name}")
        expected = self._by_model(case, card, memory)
        if expected is None:
            return CardTime(None, _MODELLED, _MODEL)
        learnt = f", corrected by {self._correction.cases} measured cases" if self._correction.cases else ""
        return CardTime(expected * self._correction.factor(_kind(case, card)), _MODELLED, _MODEL + learnt)

    def load_s(self, case: Case, card: GpuCard, memory: Footprint) -> float:
        """Seconds of loading for the case on ``card``: as recorded there, or on another card, or by the model."""
        found = self._loads.get(_shared(case))
        if found:
            return found.get(card, max(found.values()))
        return memory.weight_bytes / speed_of(card).load_bytes_s

    def _card_of(self, one: RecordedCase) -> GpuCard | None:
        if one.case.device_kind == "cpu":
            return self._cpu if is_on(one.environment, self._host) else None
        gpu = one.environment.get("gpu")
        return self._by_device.get(str(gpu.get("name"))) if isinstance(gpu, Mapping) else None

    def _by_model(self, case: Case, card: GpuCard, memory: Footprint) -> float | None:
        if not memory.elements or not memory.weight_bytes:
            return None
        return seconds(
            work_of(case, self._options), speed_of(card), elements=memory.elements, weight_bytes=memory.weight_bytes,
            loads=False, packed=case.quantization in GROUP_FORMATS,
        )  # fmt: skip


def speed_of(card: GpuCard) -> Speed:
    """The model's speed of a card: that of its reference, scaled by bandwidth."""
    if card.bandwidth is None:
        return SPEEDS["cpu"]
    reference = next(each.bandwidth for each in KNOWN_CARDS if each.name == REFERENCE)
    assert reference is not None
    scale, plain = card.bandwidth / reference, SPEEDS["cuda"]
    return replace(plain, flops=plain.flops * scale, bytes_s=plain.bytes_s * scale)


def _nearest(card: GpuCard, found: Mapping[GpuCard, RecordedCase]) -> tuple[GpuCard, float] | None:
    """The card among ``found`` whose bandwidth is least far off, and what its seconds are multiplied by."""
    scales = {
        other: other.bandwidth / card.bandwidth for other in found if other.bandwidth is not None and card.bandwidth
    }
    if not scales:
        return None
    other = min(scales, key=lambda each: max(scales[each], 1 / scales[each]))
    return other, scales[other]


def _kind(case: Case, card: GpuCard) -> Kind:
    return card.name, *kind_of(case)[1:]


def _shared(case: Case) -> tuple[str | None, ...]:
    # whatever the number of the device
    return session_key(replace(case, device=case.device_kind))


def plan_on_nodes(
    cases: Sequence[Case], options: Options, workers: Sequence[Workers], recorded: Iterable[RecordedCase]
) -> tuple[list[NodeCase], Records]:
    """Every case on every card of ``workers``."""
    cards = [each.card for each in workers]
    records = Records(cards, recorded, {case.model for case in cases}, options)
    found = []
    for case in cases:
        memory = footprint_of(case, options)
        found.append(
            NodeCase(
                case, memory, tuple(records.time(case, card, memory) for card in cards),
                tuple("n/a" if card.memory_bytes is None else memory.fits(card.memory_bytes) for card in cards),
            )
        )  # fmt: skip
    return found, records


def simulated(
    rows: Sequence[NodeCase], records: Records, workers: Sequence[Workers], losses: Losses | None, seed: int
) -> SimulatedRun:
    """One sweep of the cases that fit a card and whose time is known."""
    sessions: dict[tuple[str | None, ...], int] = {}
    numbers = [sessions.setdefault(_shared(row.case), len(sessions)) for row in rows]
    of_session = dict(zip(numbers, rows, strict=True))
    spent = [
        [None if row.fits[card] == "no" else row.times[card].seconds for row in rows] for card in range(len(workers))
    ]
    loads = [
        [records.load_s(of_session[each].case, one.card, of_session[each].memory) for each in range(len(sessions))]
        for one in workers
    ]
    kinds = [card for card, each in enumerate(workers) for _ in range(each.count)]
    return SweepSimulation(Times(numbers, spent, loads), kinds, start_s=START_S, losses=losses, seed=seed).run()


def nodes_table(cases: Sequence[Case], options: Options) -> RenderableType:
    """The plan on ``--kv-nodes`` as a table with its sums.

    Raises
    ------
    UserError
        If a card is not known, or is no device of what the cases ask for.
    """
    sweep = options.of(SweepOptions)
    assert sweep.nodes is not None
    kinds = Counter(case.device_kind for case in cases)
    if not kinds:
        return stacked(["no cases: another shard, or the run that goes on, has all"])
    workers = workers_of(sweep.nodes, next(iter(kinds)))
    recorded = recorded_cases(last_runs(Path(options.of(CommonOptions).report_dir)), options)
    rows, records = plan_on_nodes(cases, options, workers, recorded)
    columns = [Column("memory needed", 13)]
    for each in workers:
        columns += [Column(f"s on {each.card.name}", 9), Column("fits", 8, "left")]
    columns.append(Column("expected from", justify="left"))
    sheet = Sheet("case", tuple(columns), [(row.case.id, _cells(row)) for row in rows], ruled=False)
    return stacked([sheet], [*_sums(rows, records, workers, sweep.node_hours), *_notes(rows, workers)])


def _cells(row: NodeCase) -> list[str]:
    found = [size_text(row.memory)]
    for time, fits in zip(row.times, row.fits, strict=True):
        found += ["n/a" if time.seconds is None else f"{time.mark}{time.seconds:.1f}", fits]
    return [*found, "; ".join(dict.fromkeys(time.source for time in row.times))]


def _sums(
    rows: Sequence[NodeCase], records: Records, workers: Sequence[Workers], mean_hours: float | None
) -> list[str]:
    fitting = [row for row in rows if any(fits != "no" for fits in row.fits)]
    known = [row for row in fitting if all(time.seconds is not None for time in row.times)]
    found = []
    count = sum(each.count for each in workers)
    shown = ", ".join(_described(each) for each in workers)
    if known:
        calm = simulated(known, records, workers, None, 0)
        alone = sum(min(time.seconds or 0.0 for time in _usable(row)) for row in known)
        found.append(
            f"{len(known)} cases on {count} workers ({shown}): {about(calm.seconds)}, {START_S:g} s of them to start; "
            f"{about(alone)} one after another on the best card of each"
        )
        first = 0
        shares = []
        for each in workers:
            busy = sum(calm.busy_s[first : first + each.count]) / (each.count * max(calm.seconds - START_S, 1e-9))
            ran = sum(map(len, calm.ran[first : first + each.count]))
            shares.append(f"{each.card.name} {busy:.0%} of the time, {ran} cases")
            first += each.count
        found.append(f"busy: {'; '.join(shares)}; a model is loaded {calm.loads} times")
        if mean_hours is not None:
            found.append(_drawn(known, records, workers, mean_hours))
    nowhere = [row.case.id for row in rows if row not in fitting]
    if nowhere:
        found.append(f"{len(nowhere)} fit no card and are left out: {', '.join(nowhere)}")
    for at, each in enumerate(workers):
        only = [row for row in fitting if row.fits[at] == "no"]
        if only:
            found.append(f"{len(only)} do not fit {each.card.name} and wait for another card")
    missing = len(fitting) - len(known)
    if missing:
        found.append(f"{missing} cases of unknown time left out")
    return found


def _usable(row: NodeCase) -> list[CardTime]:
    return [time for time, fits in zip(row.times, row.fits, strict=True) if fits != "no"]


def _drawn(rows: Sequence[NodeCase], records: Records, workers: Sequence[Workers], mean_hours: float) -> str:
    draws = min(max(_DRAWN_CASES // len(rows), 1), _MOST_DRAWS)
    losses = Losses(mean_hours * 3600)
    runs = [simulated(rows, records, workers, losses, seed) for seed in range(draws)]
    took = sorted(run.seconds for run in runs)
    shortest, longest = about(took[0]), about(took[-1])
    span = shortest if shortest == longest else f"{shortest} to {longest.removeprefix('about ')}"
    crashed, repeated = (max(len(getattr(run, name)) for run in runs) for name in ("crashed", "repeated"))
    return (
        f"a worker lost every {mean_hours:g} h of its own (--kv-node-hours), each on a host of its own, which half of the "
        f"losses take for {losses.away_s / 60:g} min, drawn {draws} times: {span}, at most {crashed} cases crashed and "
        f"{repeated} begun again"
    )


def _described(each: Workers) -> str:
    card = each.card
    if card.bandwidth is None:
        return f"{each.count}x{card.name}"
    memory = 0 if card.memory_bytes is None else card.memory_bytes
    return f"{each.count}x{card.name}, {memory / (1 << 30):.1f} GiB, {card.bandwidth / 1e12:.3g} TB/s"


def _notes(rows: Sequence[NodeCase], workers: Sequence[Workers]) -> list[str]:
    marks = {time.mark for row in rows for time in row.times}
    notes = []
    if _SCALED in marks:
        notes.append(f"{_SCALED}: no record on this card; that of another one, by the ratio of their bandwidths")
    if _MODELLED in marks:
        notes.append(
            f"{_MODELLED}: no record at all; counted tokens and steps over a stated speed, scaled by bandwidth, which is rough "
            "(docs/distribution.md)"
        )
    if any(each.card.name == CPU for each in workers):
        notes.append("cpu: this machine's, as its records have it; workers on one CPU slow each other down")
    notes += dict.fromkeys(f"n/a: {row.memory.reason}" for row in rows if row.memory.reason)
    return notes
