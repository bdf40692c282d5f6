"""Times with a unit."""

from __future__ import annotations

import pytest

from kvsuite.options.durations import duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("1s", 1.0), ("25ms", 0.025), (" .5s", 0.5), ("100us", 1e-4), ("7µs", 7e-6)]
)
def test_seconds(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize("text", ["", "1", "ms", "1 s", "-1s", "1e3s", "1m", "٣s", "0ms", "nan s"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no time|must be more than 0"):
        duration(text)
