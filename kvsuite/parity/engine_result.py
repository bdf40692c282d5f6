"""What was found of one engine, and what it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = "kvsuite.parity/1"
#: with which every engine is compared, and for which they promise: transformers
REFERENCE = "hf"

#: ``missing``: not installed, or not for this device. ``invalid``: cannot take the model, or what is asked of it
State = Literal["ok", "missing", "invalid", "error"]


@dataclass
class EngineResult:
    """One engine on the model and the tokens that all are given.

    Parameters
    ----------
    engine
        Its name.
    state, reason
        Whether it was measured, and why not: with the install line where it is missing.
    versions
        Of what computes.
    dtype
        In which it computes.
    perplexity
        Over the scored tokens.
    difference
        ``perplexity / that of the reference - 1``.
    bound
        Of the difference, what the engine promises; ``None`` where it promises nothing in this dtype.
    kld, kld_max, same_top1
        Divergence from the reference in nats, mean and largest, and the share of equal most likely tokens.
    kv_bytes_token
        Bytes of a token's keys and values in its cache.
    ttft_s, tpot_s
        Medians of the rounds.
    clock
        Of these.
    unknown
        Why a number is missing, by its name.
    """

    engine: str
    state: State = "ok"
    reason: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    perplexity: float | None = None
    difference: float | None = None
    bound: float | None = None
    kld: float | None = None
    kld_max: float | None = None
    same_top1: float | None = None
    kv_bytes_token: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    clock: str | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def exceeds(self) -> bool:
        """Whether it promises the same numbers and gives others."""
        return self.difference is not None and self.bound is not None and not abs(self.difference) <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"exceeds": self.exceeds}


def exit_code(results: Sequence[EngineResult], named: Sequence[str]) -> int:
    """1: an engine breaks its promise; 3: one that was named has no numbers, or any failed; else 0."""
    if any(one.exceeds for one in results):
        return 1
    unmeasured = [one for one in results if one.state == "error" or (one.state != "ok" and one.engine in named)]
    return 3 if unmeasured else 0
