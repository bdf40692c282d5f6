"""False alarms and power of the verdicts on times, on recorded and on drawn samples."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison_samples import record, side

from kvsuite.comparison import Side, compare, parse_rules
from kvsuite.comparison.noise import FALSE_ALARMS, PROCESS_NOISE, timed_change

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "comparison" / "same_code_busy_cpu.json").read_text())[
    "runs"
]
RULES = parse_rules("ttft:+10%,tpot:+5%,decode_tok_s:-5%,prefill_tok_s_computed:-5%")


def recorded(*runs: int) -> Side:
    """Recorded runs of the same code as one side."""
    processes = []
    for index in runs:
        rows = []
        for name, found in RECORDED[index].items():
            metrics = {("host_wait_share" if key == "wait" else key): value for key, value in found.items()}
            rows.append(record(name, metrics))
        processes.append(rows)
    return side(*processes)


def alarms(pairs: Sequence[tuple[Side, Side]]) -> int:
    return sum(bool(compare(base, now, RULES).failures) for base, now in pairs)


def test_recorded_runs_of_the_same_code_give_no_more_false_alarms_than_designed() -> None:
    sides = [recorded(index) for index in range(len(RECORDED))]
    medians = [side.runs[0].rows[0].metrics["tpot_s"].value or 0.0 for side in sides]
    assert max(medians) > 3 * min(medians), "a hard sample: the machine was busy"
    pairs = list(itertools.permutations(sides, 2))
    assert len(pairs) == 24 * 23
    assert alarms(pairs) <= FALSE_ALARMS * len(pairs)


@pytest.mark.parametrize("processes", [2, 4])
def test_recorded_runs_taken_as_ab_processes_give_no_more_than_designed(processes: int) -> None:
    turns = ("ABBA" * processes)[: 2 * processes]
    pairs = []
    for start in range(len(RECORDED) - len(turns) + 1):
        base, head = (
            recorded(*(start + place for place, turn in enumerate(turns) if turn == wanted)) for wanted in "AB"
        )
        pairs += [(base, head), (head, base)]
    assert len(pairs) >= 30
    assert alarms(pairs) <= FALSE_ALARMS * len(pairs)


def drawn(rng: Any, processes: int, *, noise: float, rounds: int = 7, slower: float = 1.0, cases: int = 3) -> Side:
    """A side whose processes differ by ``noise`` and whose rounds by 2 %, log-normal."""
    made = []
    for _ in range(processes):
        rows = []
        for case in range(cases):
            centre = 0.01 * slower * rng.lognormal(0, noise)
            times = (centre * rng.lognormal(0, 0.02, rounds)).tolist()
            rows.append(record(f"c{case}", {"tpot_s": times, "decode_tok_s_agg": [1 / time for time in times]}))
        made.append(rows)
    return side(*made)


# processes a side, their noise, whether it is assumed
DESIGNS = {"one process, as noisy as assumed": (1, PROCESS_NOISE), "two": (2, 0.02), "four": (4, 0.02)}


@pytest.mark.parametrize(("processes", "noise"), DESIGNS.values(), ids=DESIGNS)
def test_drawn_samples_keep_the_rate_over_all_cases_and_metrics_together(processes: int, noise: float) -> None:
    rng = np.random.default_rng(20261121)
    trials = 150
    pairs = [(drawn(rng, processes, noise=noise), drawn(rng, processes, noise=noise)) for _ in range(trials)]
    # 150 draws at 1 %: more than 6 has a probability of 0.1 %
    assert alarms(pairs) <= 6


def test_power() -> None:
    rng = np.random.default_rng(7)
    one = [(drawn(rng, 1, noise=0.02), drawn(rng, 1, noise=0.02, slower=1.5)) for _ in range(40)]
    assert alarms(one) >= 38
    # -8 % speed
    four = [
        (drawn(rng, 4, noise=0.01, cases=1), drawn(rng, 4, noise=0.01, slower=1 / 0.92, cases=1)) for _ in range(40)
    ]
    assert alarms(four) >= 38


def entries(rows: Side, name: str = "tpot_s") -> list[Any]:
    return [run.rows[0].metrics[name] for run in rows.runs]


def test_the_band_is_wider_for_more_questions_and_narrower_for_more_processes() -> None:
    rng = np.random.default_rng(3)
    few, many = drawn(rng, 1, noise=0.01), drawn(rng, 4, noise=0.01)

    def width(rows: Side, family: int) -> float:
        found = timed_change(entries(rows), entries(rows), family)
        assert found is not None
        return found.high

    assert width(few, 1) < width(few, 10) < width(few, 1000)
    assert width(many, 4) < width(few, 4)


def test_waiting_widens_the_band_on_the_side_that_it_may_have_caused() -> None:
    rows = drawn(np.random.default_rng(3), 1, noise=0.01)
    for name, wider, kept in (("tpot_s", "high", "low"), ("decode_tok_s_agg", "low", "high")):
        times = entries(rows, name)
        quiet, waited = (timed_change(times, times, 1, waits) for waits in ((0.0, 0.0), (0.0, 0.04)))
        assert getattr(waited, kept) == getattr(quiet, kept)
        assert abs(getattr(waited, wider)) > abs(getattr(quiet, wider)), name


@pytest.mark.parametrize("times", [[0.01] * 4, [0.0] * 5, [-1.0] * 5])
def test_too_few_rounds_and_impossible_times_have_no_verdict(times: list[float]) -> None:
    good, bad = side([record("a", {"tpot_s": [0.01] * 5})]), side([record("a", {"tpot_s": times})])
    assert timed_change(entries(good), entries(bad), 1) is None
    (row,) = compare(good, bad, parse_rules("tpot:+5%")).rows
    assert row.verdict == "unstable"


def test_separated_rounds_with_ties_are_told_apart() -> None:
    base = side([record("a", {"tpot_s": [0.01, 0.01, 0.0101, 0.01, 0.01]})])
    now = side([record("a", {"tpot_s": [0.02, 0.02, 0.0201, 0.02, 0.02]})])
    (row,) = compare(base, now, parse_rules("tpot:+5%")).rows
    assert (row.verdict, row.rule) == ("regression", "tpot:+5%")
    (row,) = compare(now, base, parse_rules("tpot:+5%")).rows
    assert row.verdict == "better"
