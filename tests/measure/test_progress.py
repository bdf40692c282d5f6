from __future__ import annotations

import pytest

from kvsuite.measure.progress import Progress, duration


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
    assert lines == ["  [1/4] hf-baseline: ppl 12.3 · 0:30 elapsed, ETA 1:30"]
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
    assert lines[0] == "  [1/2] hf-slow: scoring text 1/1 20/100, about 0:40 left in this phase"
    assert lines[-1] == "  [1/2] hf-slow: scoring text 1/1 80/100, about 0:10 left in this phase"


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
    assert lines[0].endswith("timed rounds 1/5, about 1:20 left in this phase")
    assert lines[-1].endswith("timed rounds 3/5, about 0:40 left in this phase")


def test_the_next_case_begins_its_own_phases(now: Now, lines: list[str]) -> None:
    progress = Progress(lines.append, 2, now=now)
    for name in ("hf-a", "hf-b"):
        progress.case(name)
        now.seconds += 20
        progress.phase("scoring", 1, 3)
        now.seconds += 20
        progress.phase("scoring", 2, 3)
        progress.finished("ok")
    left = [line.rpartition("about ")[2] for line in lines if "left" in line]
    assert left == ["0:40 left in this phase", "0:20 left in this phase"] * 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (75.4, "1:15"), (3600, "1:00:00"), (36_061, "10:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
