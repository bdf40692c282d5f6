"""When requests arrive: all at once, at random at a rate, or as in a trace. Pure functions; seconds from the start."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.errors import UserError

CLOSED, POISSON, TRACE = KINDS = ("closed", "poisson", "trace")
#: keeps the gaps apart from other numbers that are drawn from the same seed
_STREAM = 0x6A9


def poisson_arrivals(count: int, *, rate: float, seed: int) -> list[float]:
    """Arrivals of a Poisson process: independent exponential gaps, the first request at 0.

    The gaps of one seed are the same at every rate but for their scale, so that a search for the highest rate compares like
    with like, and the first ``n`` arrivals do not depend on ``count``.

    Parameters
    ----------
    count
        Number of requests.
    rate
        Requests a second in the mean, above 0.
    seed
        Of the gaps.

    Raises
    ------
    UserError
        If the rate is no finite number above 0.
    """
    import numpy as np

    _require_positive("--kv-arrival-rate", rate, "requests a second")
    if count < 1:
        return []
    gaps = np.random.default_rng([seed, _STREAM]).standard_exponential(count - 1, method="inv")
    return [0.0, *(np.cumsum(gaps) / rate).tolist()]


def trace_arrivals(times_s: Sequence[float], *, time_scale: float = 1.0) -> list[float]:
    """Arrivals of a trace, the first one at 0, in the order of ``times_s``.

    Parameters
    ----------
    times_s
        Times of the trace in seconds from any origin.
    time_scale
        How many times as fast as the trace: 2 halves every gap.

    Raises
    ------
    UserError
        If the scale is no finite number above 0.
    """
    _require_positive("--kv-trace-time-scale", time_scale, "times the speed of the trace")
    first = min(times_s, default=0.0)
    return [(time - first) / time_scale for time in times_s]


def mean_rate(arrivals_s: Sequence[float]) -> float | None:
    """Requests a second between the first and the last arrival; ``None`` where all come at once."""
    span = max(arrivals_s, default=0.0) - min(arrivals_s, default=0.0)
    return (len(arrivals_s) - 1) / span if span > 0 else None


def _require_positive(option: str, value: float, unit: str) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"{option}={value:g}: must be a number above 0, {unit}")
