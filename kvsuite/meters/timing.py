"""Formulas from time stamps to metrics (docs/metrics.md), pure, so that a scripted clock checks them exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RequestTimes:
    """Stamps of one request, in seconds after an origin that all requests of a round share.

    Parameters
    ----------
    prompt_tokens
        Tokens of the prompt.
    prefill_computed
        Prompt tokens that really went through the model.
    start
        t0: the tokenised request enters the loaded, warmed-up engine.
    chunks
        ``(time, tokens)`` whenever output tokens became usable: t1 is the first. A chunk may hold several tokens.
    prefill_end
        End of the prompt forward, ``None`` where the engine does not tell.
    """

    prompt_tokens: int
    prefill_computed: int
    chunks: Sequence[tuple[float, int]]
    start: float = 0.0
    prefill_end: float | None = None

    @property
    def generated(self) -> int:
        """Output tokens n, the prompt excluded."""
        return sum(tokens for _, tokens in self.chunks)

    @property
    def ttft_s(self) -> float:
        """``t1 - t0``."""
        return self.chunks[0][0] - self.start

    @property
    def e2e_s(self) -> float:
        """``tn - t0``."""
        return self.chunks[-1][0] - self.start

    @property
    def tpot_s(self) -> float | None:
        """``(e2e - ttft) / (n - 1)``; ``None`` when n < 2, never 0."""
        return None if self.generated < 2 else (self.e2e_s - self.ttft_s) / (self.generated - 1)

    @property
    def itl_s(self) -> list[float]:
        """Raw gaps between chunks; the TTFT is never among them."""
        times = [time for time, _ in self.chunks]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


@dataclass(frozen=True)
class RoundTimes:
    """One measured repetition: the requests that ran in it."""

    requests: Sequence[RequestTimes]
    clock: str

    def full_batch(self) -> tuple[float, float] | None:
        """Seconds of a decode step and tokens a second while all requests decode, ``None`` if they never do.

        That is from the last request's first token to the first one's last. Prompts that are fed meanwhile would be in it.
        """
        begin = max(r.chunks[0][0] for r in self.requests)
        end = min(r.chunks[-1][0] for r in self.requests)
        tokens = sum(count for r in self.requests for time, count in r.chunks if begin < time <= end)
        if not tokens:
            return None
        return (end - begin) * len(self.requests) / tokens, tokens / (end - begin)

    def prefill_phase(self) -> tuple[float, float, float] | None:
        """Seconds until all prompts are computed, and computed and logical prompt tokens a second, of all together.

        ``None`` without the stamps.
        """
        ends = [r.prefill_end for r in self.requests if r.prefill_end is not None]
        if len(ends) < len(self.requests):
            return None
        seconds = max(ends) - min(r.start for r in self.requests)
        computed, logical = (
            sum(getattr(r, name) for r in self.requests) for name in ("prefill_computed", "prompt_tokens")
        )
        return seconds, computed / seconds, logical / seconds

    def metrics(self) -> dict[str, float | None]:
        """Every timing metric of the round; ``None`` where it is not defined (n < 2, no prefill stamp).

        With several requests the per-request numbers are means over the requests, throughputs are aggregates.
        """
        requests = self.requests
        first = min(r.chunks[0][0] for r in requests)
        last = max(r.chunks[-1][0] for r in requests)
        wall = last - min(r.start for r in requests)
        decoded = sum(r.generated - 1 for r in requests)
        tpots = [r.tpot_s for r in requests]
        tpot = None if any(t is None for t in tpots) else _mean([t for t in tpots if t is not None])
        prefills = [r.prefill_end - r.start for r in requests if r.prefill_end is not None]
        prefill = _mean(prefills) if len(prefills) == len(requests) else None
        return {
            "ttft_s": _mean([r.ttft_s for r in requests]),
            "e2e_s": _mean([r.e2e_s for r in requests]),
            "tpot_s": tpot,
            "prefill_s": prefill,
            "prefill_tok_s_computed": _rate(sum(r.prefill_computed for r in requests) / len(requests), prefill),
            "prefill_tok_s_logical": _rate(sum(r.prompt_tokens for r in requests) / len(requests), prefill),
            "decode_tok_s_req": _rate(1, tpot),
            "decode_tok_s_agg": _rate(decoded, last - first) if decoded else None,
            "output_tok_s": _rate(sum(r.generated for r in requests), wall),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rate(amount: float, seconds: float | None) -> float | None:
    return None if not seconds else amount / seconds
