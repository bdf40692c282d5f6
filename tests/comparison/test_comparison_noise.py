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
from kvsuite.comparison.noise import FALSE_ALARMS, PROCESS_NOISE, Machine, timed_change

DATA = Path(__file__).parents[1] / "data" / "comparison"
NAMES = {"wait": "host_wait_share", "probe": "host_probe_s"}
RULES = parse_rules("ttft:+10%,tpot:+5%,decode_tok_s:-5%,prefill_tok_s_computed:-5%")


def recorded(runs: list[Any], *without: str) -> Side:
    """Recorded runs of the same code as one side."""
    return side(
        *(
            [
                record(name, {NAMES.get(key, key): value for key, value in found.items() if key not in without})
                for name, found in run.items()
            ]
            for run in runs
        )
    )


def alarms(pairs: Sequence[tuple[Side, Side]]) -> int:
    return sum(bool(compare(base, now, RULES).failures) for base, now in pairs)


@pytest.mark.parametrize(
    ("file", "spread", "tells"), [("same_code_busy_cpu", 3, "wait"), ("same_code_other_tenants", 2, "probe")]
)
def test_recorded_runs_of_the_same_code_give_no_more_false_alarms_than_designed(
    file: str, spread: int, tells: str
) -> None:
    runs = json.loads((DATA / f"{file}.json").read_text())["runs"]
    sides = [recorded([run]) for run in runs]
    medians = [side.runs[0].rows[0].metrics["tpot_s"].value or 0.0 for side in sides]
    assert max(medians) > spread * min(medians), "a hard sample"
    pairs = list(itertools.permutations(sides, 2))
    assert len(pairs) == 24 * 23
    allowed = FALSE_ALARMS * len(pairs)
    assert alarms(pairs) <= allowed
    # what the machine says of itself is what keeps them down
    assert alarms(list(itertools.permutations([recorded([run], tells) for run in runs], 2))) > 3 * allowed


@pytest.mark.parametrize("processes", [2, 4])
def test_recorded_runs_taken_as_ab_processes_give_no_more_than_designed(processes: int) -> None:
    runs = json.loads((DATA / "same_code_busy_cpu.json").read_text())["runs"]
    turns = ("ABBA" * processes)[: 2 * processes]
    pairs = []
    for start in range(len(runs) - len(turns) + 1):
        taken = runs[start : start + len(turns)]
        base, head = (
            recorded([run for run, turn in zip(taken, turns, strict=True) if turn == wanted]) for wanted in "AB"
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
        quiet, waited = (timed_change(times, times, 1, Machine.of((0.0, lack), 0.0)) for lack in (0.0, 0.04))
        assert getattr(waited, kept) == getattr(quiet, kept)
        assert abs(getattr(waited, wider)) > abs(getattr(quiet, wider)), name


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 6])
def test_a_busy_machine_is_allowed_for_however_many_runs_the_base_has(runs: int) -> None:
    times = [0.01, 0.0101, 0.0099, 0.01, 0.0102, 0.01, 0.01]
    quiet = record("a", {"tpot_s": times, "host_wait_share": 0.0, "host_probe_s": 0.004})
    for busy in ({"host_wait_share": 0.5}, {"host_probe_s": 0.008}):
        now = record("a", {"tpot_s": [2 * one for one in times], "host_wait_share": 0.0, "host_probe_s": 0.004} | busy)
        result = compare(side(*[[quiet]] * runs), side([now]), parse_rules("tpot:+5%"))
        (row,) = [row for row in result.rows if row.metric == "tpot_s"]
        assert (row.verdict, result.failures) == ("unstable", [])
        assert "on a machine that lacked 50% of its speed" in row.why
    # as fast as before in the median, and now and then three times slower
    uneven = {"host_probe_s": [0.004] * 6 + [0.012] * 4, "tpot_s": [1.6 * one for one in times]}
    (row,) = [
        row
        for row in compare(side(*[[quiet]] * runs), side([record("a", uneven)]), parse_rules("tpot:+5%")).rows
        if row.metric == "tpot_s"
    ]
    assert row.verdict == "unstable"
    assert "whose speed varied by " in row.why
    # with as many on both sides the spread of the processes says it all
    slow = record("a", {"tpot_s": [2 * one for one in times], "host_wait_share": 0.5})
    assert bool(compare(side(*[[quiet]] * runs), side(*[[slow]] * runs), RULES).failures) == (runs > 1)


def test_the_change_that_is_shown_is_the_one_that_is_judged() -> None:
    def process(middle: float) -> list[dict[str, Any]]:
        return [record("a", {"tpot_s": [middle * (1 + 1e-4 * i) for i in range(-3, 4)]})]

    base = side(*(process(one) for one in (9.99, 10.0, 10.01, 10.0, 9.98, 10.02)))
    now = side(*(process(one) for one in (10.4, 10.42, 10.45, 10.41, 10.9, 10.95)))
    (row,) = compare(base, now, parse_rules("tpot:+5%")).rows
    assert row.verdict == "regression"
    assert isinstance(row.change, float)
    assert row.change > 0.05
    assert row.base is not None
    assert row.now == pytest.approx(row.base * (1 + row.change))


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


def probed(seconds: list[float], interpreter: str) -> Side:
    one = record("a", {"tpot_s": [0.01, 0.0101, 0.0099, 0.01, 0.01], "host_probe_s": seconds})
    one["metrics"]["host_probe_s"]["protocol"] = interpreter
    return side([one])


def test_the_row_says_what_the_machine_lacked_and_how_it_varied() -> None:
    steady, slow, restless = [0.004] * 20, [0.008] * 20, [0.004, 0.006] * 10
    for now, interpreter, said in (
        (slow, "CPython 3.12.3", "on a machine that lacked 50% of its speed"),
        (restless, "CPython 3.12.3", "whose speed varied by 21%"),
    ):
        (row,) = (
            row
            for row in compare(probed(steady, "CPython 3.12.3"), probed(now, interpreter), RULES).rows
            if row.metric == "tpot_s"
        )
        assert row.verdict == "unstable"
        assert said in row.why
    # probes of two interpreters are two probes
    rows = compare(probed(steady, "CPython 3.12.3"), probed(slow, "CPython 3.13.0"), RULES).rows
    (row,) = (row for row in rows if row.metric == "tpot_s")
    assert row.verdict == "same"
    assert "lacked" not in row.why


@pytest.mark.parametrize("processes", [1, 2])
def test_rounds_that_vary_widen_the_band_below_the_noise_of_processes_too(processes: int) -> None:
    def width(spread: float) -> float:
        times = [0.01 * (1 + spread * sign) for sign in (-1, 0, 1, -1, 0, 1, 0)]
        rows = side(*[[record("a", {"tpot_s": times})]] * processes)
        found = timed_change(entries(rows), entries(rows), 1)
        assert found is not None
        assert found.cv < PROCESS_NOISE
        return found.high

    assert 0 <= width(0.0) < width(0.01) < width(0.04)
