"""A point of the KV-cache design space: five axes and the weight format, its id, and the rules between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvsuite.errors import UserError
from kvsuite.options.numbers import MOST_REQUESTS, MOST_TOKENS

#: ``sliding_window_size`` of a point without a window
OFF = -1
# the engine's own rule is sink < window; an eighth is the original's choice
_SINK_SHARE = 8
_ID = re.compile(
    r"(?P<quantization>[A-Za-z0-9_]+)-ctx(?P<context_window_size>[0-9]{1,9})-pc(?P<prefill_chunk_size>[0-9]{1,9})"
    r"-bs(?P<max_batch_size>[0-9]{1,9})-sw(?P<sliding_window_size>off|[0-9]{1,9})-sink(?P<attention_sink_size>[0-9]{1,9})"
)
_FORMAT = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class DesignPoint:
    """One setting of all axes, by the original's names.

    Parameters
    ----------
    quantization
        Weight format by its MLC name.
    context_window_size
        Tokens of a sequence at most, prompt and output together.
    prefill_chunk_size
        Prompt tokens of a step at most.
    max_batch_size
        Sequences at the same time.
    sliding_window_size
        Tokens that a query sees at most; -1 for all.
    attention_sink_size
        First tokens of a sequence that stay visible beside the window.

    Raises
    ------
    UserError
        If a value cannot be one of its axis. What the values are to each other is the rules' matter (`broken_rules`).
    """

    quantization: str
    context_window_size: int
    prefill_chunk_size: int
    max_batch_size: int
    sliding_window_size: int = OFF
    attention_sink_size: int = 0

    def __post_init__(self) -> None:
        if not _FORMAT.fullmatch(self.quantization):
            raise UserError(f"quantization={self.quantization}: a weight format has letters, digits and _ only")
        for axis in AXES:
            value = getattr(self, axis.name)
            if axis.name == "sliding_window_size" and value == OFF:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not axis.minimum <= value <= axis.maximum:
                raise UserError(f"{axis.name}={value}: {axis.must_be}")

    @property
    def has_window(self) -> bool:
        """Whether the sliding window is on."""
        return self.sliding_window_size != OFF

    @property
    def id(self) -> str:
        """``q4f16_1-ctx4096-pc1024-bs16-swoff-sink0``; a case puts its engine in front.

        The batch has two digits, because ``-k bs1`` would take ``bs16`` along.
        """
        window = str(self.sliding_window_size) if self.has_window else "off"
        return (
            f"{self.quantization}-ctx{self.context_window_size}-pc{self.prefill_chunk_size}"
            f"-bs{self.max_batch_size:02d}-sw{window}-sink{self.attention_sink_size}"
        )

    @staticmethod
    def from_id(text: str) -> DesignPoint:
        """The point that an id names.

        Raises
        ------
        UserError
            If the text is no id, or is spelled in another way than `id` spells it.
        """
        found = _ID.fullmatch(text)
        if found is None:
            raise UserError(f"{text}: no id of a design point; they look like q4f16_1-ctx4096-pc1024-bs16-swoff-sink0")
        parts = found.groupdict()
        window = parts.pop("sliding_window_size")
        numbers = {name: int(part) for name, part in parts.items() if name != "quantization"}
        point = DesignPoint(
            parts["quantization"], sliding_window_size=OFF if window == "off" else int(window), **numbers
        )
        if point.id != text:
            raise UserError(f"{text}: no id of a design point; this one is spelled {point.id}")
        return point

    def settings(self) -> dict[str, int]:
        """The five axes without the weight format, by the original's names and in its order."""
        return {axis.name: getattr(self, axis.name) for axis in AXES}


@dataclass(frozen=True)
class Axis:
    """One of the five axes.

    Parameters
    ----------
    name
        The original's option and column.
    short
        What ``--kv-space`` calls it, the first of these in messages.
    values
        The original's values.
    unnamed
        The one value of an axis that ``--kv-space`` does not name.
    minimum, maximum
        Smallest and largest value.
    must_be
        For messages.
    """

    name: str
    short: tuple[str, ...]
    values: tuple[int, ...]
    unnamed: int
    minimum: int = 1
    maximum: int = MOST_TOKENS
    must_be: str = f"must be a whole number of at least 1 and at most {MOST_TOKENS}"


AXES: tuple[Axis, ...] = (
    Axis("context_window_size", ("ctx", "context"), (4096, 8192, 16384), 4096),
    Axis("prefill_chunk_size", ("chunk", "pc", "prefill"), (1024, 2048, 4096), 1024),
    Axis(
        "max_batch_size", ("batch", "bs"), (1, 2, 4, 8), 1, maximum=MOST_REQUESTS,
        must_be=f"must be a whole number of at least 1 and at most {MOST_REQUESTS}",
    ),
    Axis(
        "sliding_window_size", ("window", "sw"), (OFF, 2048, 4096), OFF,
        must_be=f"must be off (-1) or a whole number of at least 1 and at most {MOST_TOKENS}",
    ),
    Axis(
        "attention_sink_size", ("sink",), (0, 32, 64, 128, 256), 0, 0,
        must_be=f"must be a whole number of at least 0 and at most {MOST_TOKENS}",
    ),
)  # fmt: skip
QUANTIZATION = "quantization"

#: what is wrong with a point, ``None`` if nothing is
Check = Callable[[DesignPoint], str | None]


def _sink_needs_window(point: DesignPoint) -> str | None:
    sink = point.attention_sink_size
    return f"attention_sink_size={sink} without a sliding window" if sink and not point.has_window else None


def _sink_within_eighth(point: DesignPoint) -> str | None:
    sink, most = point.attention_sink_size, point.sliding_window_size // _SINK_SHARE
    if not point.has_window or sink <= most:
        return None
    return (
        f"attention_sink_size={sink} is more than an eighth of sliding_window_size={point.sliding_window_size} ({most})"
    )


#: rules of every engine, by name; an engine may have more (`kvsuite.engines.engine.Engine.point_rules`)
RULES: dict[str, Check] = {
    "sink-needs-window": _sink_needs_window,
    "sink-within-eighth-of-window": _sink_within_eighth,
}
TRAINED_LENGTH = "within-trained-length"


@dataclass(frozen=True)
class Broken:
    """A rule that a point breaks: its name, and what is wrong in words."""

    rule: str
    reason: str

    def __str__(self) -> str:
        return f"breaks {self.rule}: {self.reason}"


def broken_rules(point: DesignPoint, own: Mapping[str, Check] = MappingProxyType({})) -> tuple[Broken, ...]:
    """The rules that a point breaks, whatever the model: those of an engine's ``own``, and those of every engine."""
    reasons = {name: check(point) for name, check in {**own, **RULES}.items()}
    return tuple(Broken(name, reason) for name, reason in reasons.items() if reason)
