"""What was found of one engine, and what it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = "kvsuite.parity/1"
#: with which every engine is compared, and for which they promise: transformers
REFERENCE = "hf"

#: standard errors within which a difference may be chance
_CHANCE = 1.96

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
    difference_se
        Its standard error, of the losses' differences token by token.
    bound
        Of the difference, what the engine promises; ``None`` where it promises nothing in this dtype.
    kld, kld_se, kld_max, same_top1
        Divergence from the reference in nats: mean, its standard error, largest; and the share of equal most likely tokens.
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
    difference_se: float | None = None
    bound: float | None = None
    kld: float | None = None
    kld_se: float | None = None
    kld_max: float | None = None
    same_top1: float | None = None
    kv_bytes_token: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    clock: str | None = None
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def exceeds(self) -> bool:
        """Whether it promises the same numbers and gives others: by more than its bound, and than is left to chance."""
        if self.difference is None or self.bound is None:
            return False
        if self.kld is not None and self.kld > self.bound + _CHANCE * (self.kld_se or 0.0):
            # by so much ln(perplexity) is larger on a text of the reference's own: the same promise, with less chance in it
            return True
        return abs(self.difference) > self.bound + _CHANCE * (self.difference_se or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self) | {"exceeds": self.exceeds}


def exit_code(results: Sequence[EngineResult], named: Sequence[str]) -> int:
    """1: an engine breaks its promise; 3: one that was named has no numbers, or any failed; else 0."""
    if any(one.exceeds for one in results):
        return 1
    unmeasured = [one for one in results if one.state == "error" or (one.state != "ok" and one.engine in named)]
    return 3 if unmeasured else 0
