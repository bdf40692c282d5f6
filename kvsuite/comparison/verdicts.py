"""One verdict, and how its numbers are written."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from kvsuite.foreign_text import visible

Word = Literal["better", "same", "worse", "regression", "unstable", "information"]
#: the metric of a verdict on how a case ended
STATUS = "status"


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What became of one metric of one case.

    Parameters
    ----------
    case
        Record id, that of now where both sides have the case.
    metric, unit
        As in the record; ``status`` is how the case ended.
    base, now
        Values, ``None`` for none; of several processes their median, of their times the geometric mean.
    change
        Relative change, the words of a change of status, or ``None`` where there is none (from 0, to nothing).
    verdict
        ``regression`` breaks a rule, or lost what the base had; ``worse`` does not; ``unstable`` says that the spread forbids a
        verdict; ``information`` that none is due.
    rule
        The rule that gates the metric, empty without.
    note
        Why, in words.
    lacked, varied
        Share of its speed that the machine of a side lacked, and by which its speed varied, where that made the noise wider.
    """

    case: str
    metric: str
    unit: str
    base: float | None
    now: float | None
    change: float | str | None
    verdict: Word
    rule: str = ""
    note: str = ""
    lacked: float = 0.0
    varied: float = 0.0

    @property
    def machine(self) -> str:
        """What the note ends in where the machine made the noise wider."""
        lacked = f", on a machine that lacked {self.lacked:.0%} of its speed" if self.lacked else ""
        return lacked + (f", whose speed varied by {self.varied:.0%}" if self.varied else "")

    @property
    def why(self) -> str:
        """The note, with what the machine was like."""
        return self.note + self.machine

    @property
    def line(self) -> str:
        """The verdict in one line: case, metric, both values, change, rule, reason."""
        before, after = number_pair(self.base, self.now, self.unit)
        values = str(self.change) if self.metric == STATUS else f"{before} -> {after} ({change_text(self.change)})"
        parts = [f"{self.case}: {self.metric} {values}", self.verdict]
        parts += [f"rule {self.rule}"] if self.rule else []
        parts += [self.why] if self.why else []
        return visible("; ".join(parts))

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON types; a number that JSON cannot hold is null."""
        return {
            "case": self.case,
            "metric": self.metric,
            "unit": self.unit,
            "base": _finite(self.base),
            "now": _finite(self.now),
            "change": _finite(self.change) if isinstance(self.change, float) else self.change,
            "verdict": self.verdict,
            "rule": self.rule,
            "note": self.why,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def change_text(change: float | str | None) -> str:
    """``+3.0 %``; a change that one decimal would hide keeps more digits."""
    if change is None:
        return "n/a"
    if isinstance(change, str):
        return change
    percent = 100 * change
    if percent and abs(percent) < 0.05:
        return f"{percent:+.2g} %"
    return f"{percent + 0.0:+.1f} %"


def number_pair(base: float | None, now: float | None, unit: str) -> tuple[str, str]:
    """Both values in one readable unit, exact where rounding would make two different ones look equal."""
    scale, name = _readable(max((abs(value) for value in (base, now) if value is not None), default=0.0), unit)
    texts = [_text(value, scale, name) for value in (base, now)]
    if base != now and texts[0] == texts[1]:
        texts = [_exact(value, unit) for value in (base, now)]
    return texts[0], texts[1]


def _readable(size: float, unit: str) -> tuple[float, str]:
    if unit == "bytes":
        for scale, name in ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
            if size >= scale:
                return scale, name
        return 1.0, "B"
    if unit == "s" and 0 < size < 1:
        return (1e-3, "ms") if size >= 1e-3 else (1e-6, "us")
    return 1.0, "" if unit == "1" else unit


def _text(value: float | None, scale: float, name: str) -> str:
    if value is None:
        return "none"
    scaled = value / scale
    number = f"{scaled:.0f}" if scaled == int(scaled) and abs(scaled) < 1e6 else f"{scaled:.4g}"
    return f"{number} {name}".rstrip()


def _exact(value: float | None, unit: str) -> str:
    if value is None:
        return "none"
    number = f"{value:,.0f}" if value.is_integer() else repr(value)
    return number if unit == "1" else f"{number} {unit}"
