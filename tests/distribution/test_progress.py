from __future__ import annotations

import pytest

from kvsuite.case import Case
from kvsuite.distribution.progress import Progress, about, duration
from kvsuite.distribution.time_left import Correction, Planned, TimeLeft
from kvsuite.suites.footprint import Footprint


class Now:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def lines() -> list[str]:
    return []


def test_a_line_when_a_case_ends(now: Now, lines: list[str]) -> None:
    progress = Progress(lines.append, 4, now=now)
    progress.case("hf-baseline")
    now.seconds += 30
    progress.finished("ppl 12.3")
    assert lines == ["  [1/4] hf-baseline: ppl 12.3 · 0:30 elapsed, about 2 min left"]
    for _ in range(3):
        now.seconds += 10
        progress.case("hf-next")
        progress.finished("ok")
    assert lines[-1] == "  [4/4] hf-next: ok · 1:00 elapsed, done"


def test_a_long_phase_speaks_every_ten_seconds(now: Now, lines: list[str]) -> None:
    progress = Progress(lines.append, 2, now=now)
    progress.case("hf-slow")
    for done in range(1, 101):
        now.seconds += 0.5
        progress.phase("scoring text 1/1", done, 100)
    # 50 seconds: at 10, 20, 30 and 40; the end of the phase itself is no news
    assert len(lines) == 4
    assert lines[0] == "  [1/2] hf-slow: scoring text 1/1 20/100, about 40 s left in this phase"
    assert lines[-1] == "  [1/2] hf-slow: scoring text 1/1 80/100, about 10 s left in this phase"


def test_a_short_phase_is_silent(now: Now, lines: list[str]) -> None:
    progress = Progress(lines.append, 1, now=now)
    progress.case("hf-fast")
    for done in range(1, 6):
        now.seconds += 1
        progress.phase("timed rounds", done, 5)
    assert lines == []


def test_the_rest_of_a_phase_is_counted_from_its_own_start(now: Now, lines: list[str]) -> None:
    progress = Progress(lines.append, 1, now=now)
    progress.case("hf-slow")
    now.seconds += 1000  # loading
    progress.phase("scoring", 1, 10)
    lines.clear()
    for done in (1, 2, 3):
        now.seconds += 20
        progress.phase("timed rounds", done, 5)
    assert lines[0].endswith("timed rounds 1/5, about 80 s left in this phase")
    assert lines[-1].endswith("timed rounds 3/5, about 40 s left in this phase")


def test_the_next_case_begins_its_own_phases(now: Now, lines: list[str]) -> None:
    progress = Progress(lines.append, 2, now=now)
    for name in ("hf-a", "hf-b"):
        progress.case(name)
        now.seconds += 20
        progress.phase("scoring", 1, 3)
        now.seconds += 20
        progress.phase("scoring", 2, 3)
        progress.finished("ok")
    left = [line.rpartition("about ")[2] for line in lines if "this phase" in line]
    assert left == ["40 s left in this phase", "20 s left in this phase"] * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (75.4, "1:15"), (3600, "1:00:00"), (36_061, "10:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "about 5 s"), (7, "about 10 s"), (44, "about 40 s"), (89, "about 90 s"), (91, "about 2 min"),
     (1348, "about 22 min"), (89 * 60, "about 89 min"), (7800, "about 2 h 10 min"), (7200, "about 2 h")],
)  # fmt: skip
def test_an_estimate_reads_as_one(seconds: float, words: str) -> None:
    assert about(seconds) == words
    assert ":" not in words


def planned(name: str, seconds: float | None, quantization: str | None = None) -> Planned:
    case = Case("compression", "hf", "m", name, "cpu", "float32", quantization)
    return Planned(case, seconds, "model", Footprint())


def row(each: Planned, took: float, status: str = "ok") -> dict[str, object]:
    return {"case": each.case.to_dict(), "status": status, "duration_s": took}


def test_the_first_estimate_is_that_of_the_plan_and_not_the_first_case_times_the_rest(
    now: Now, lines: list[str]
) -> None:
    cases = [planned("first", 5), planned("dear", 300, "q4f16_1"), planned("cheap", 5)]
    left = TimeLeft(cases)
    assert left.seconds == 310
    progress = Progress(lines.append, 3, left, now=now)
    now.seconds += 5
    progress.case("first")
    progress.finished("ok", row(cases[0], 5))
    assert lines[-1].endswith("0:05 elapsed, about 5 min left")
    now.seconds += 1
    progress.case("cheap")
    # it could not run, which says nothing about time
    progress.finished("skipped", row(cases[2], 0.01, "skipped"))
    assert lines[-1].endswith("about 5 min left")
    now.seconds += 300
    progress.finished("ok", row(cases[1], 300))
    assert lines[-1].endswith("5:06 elapsed, done")


def test_finished_cases_correct_what_is_left_of_their_kind_most() -> None:
    dense, packed = [planned(f"d{k}", 10) for k in range(4)], [planned(f"p{k}", 10, "q4f16_1") for k in range(4)]
    left = TimeLeft([*dense, *packed])
    for each in packed[:3]:
        left.finished(row(each, 50))  # five times as long
    learnt = Correction()
    for _ in range(3):
        learnt.add(("cpu", "hf", "q4f16_1", "compression"), 10, 50)
    own, other = (
        learnt.factor(("cpu", "hf", "q4f16_1", "compression")),
        learnt.factor(("cpu", "hf", "none", "compression")),
    )
    assert 4.5 < own < 5
    assert 1 < other < own, "what nobody has measured is corrected less"
    assert learnt.factor(("cuda", "hf", "none", "compression")) < other
    assert left.seconds == pytest.approx(40 * other + 10 * own)


def test_cases_that_run_at_the_same_time_share_what_is_left() -> None:
    cases = [planned(f"c{k}", 10) for k in range(4)]
    assert TimeLeft(cases, workers=2).seconds == 20
    assert TimeLeft(cases, workers=8).seconds == 10


def test_cases_of_unknown_time_take_what_the_others_took() -> None:
    cases = [planned("a", None), planned("b", None), planned("c", 10)]
    left = TimeLeft(cases)
    assert left.seconds is None
    left.finished(row(cases[0], 30))
    assert left.seconds == 30 + 10
