"""MLC's own counters: what they say of the requests between two readings, under the names that the original wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BY_BATCH = "decode_time_by_batch_size"
_LAST = "last_finished_request"
_SIZE = re.compile(r"count\{batch_size=(\d+)\}")
#: rate: tokens and seconds that it is made of
_RATES = {
    "prefill_tokens_per_s": ("prefill_tokens_sum", "engine_prefill_time_sum"),
    "decode_tokens_per_s": ("decode_tokens_sum", "engine_decode_time_sum"),
}


def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Counters of the requests between two readings, flat.

    Sums and counts are differences, rates and means are made of those. ``last_finished_request`` is as it is: of one request.

    Returns
    -------
    dict[str, float]
        Names as in the server's Prometheus text: ``prefill_tokens_sum``, ``last_finished_request_ttft_s``,
        ``decode_time_by_batch_size_mean{batch_size=4}``, …
    """
    sums = {name: value - before.get(name, 0) for name, value in after.items() if name.endswith("_sum")}
    found: dict[str, float] = dict(sums)
    for rate, (tokens, seconds) in _RATES.items():
        if sums.get(tokens) and sums.get(seconds):
            found[rate] = sums[tokens] / sums[seconds]
    found |= {f"{_LAST}_{name}": value for name, value in after.get(_LAST, {}).items()}
    for size, steps in decode_steps(before, after).items():
        mean, count = f"mean{{batch_size={size}}}", f"count{{batch_size={size}}}"
        seconds_at = [reading.get(_BY_BATCH, {}) for reading in (before, after)]
        spent = [at.get(mean, 0.0) * at.get(count, 0) for at in seconds_at]
        found[f"{_BY_BATCH}_{mean}"] = (spent[1] - spent[0]) / steps
        found[f"{_BY_BATCH}_{count}"] = steps
    return found


def decode_steps(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[int, int]:
    """Decode steps between two readings by their batch size. MLC leaves out the first step it ever makes of a size."""
    earlier, later = (reading.get(_BY_BATCH, {}) for reading in (before, after))
    steps = {
        int(match[1]): int(count) - int(earlier.get(name, 0))
        for name, count in later.items()
        if (match := _SIZE.fullmatch(name))
    }
    return {size: count for size, count in sorted(steps.items()) if count > 0}
