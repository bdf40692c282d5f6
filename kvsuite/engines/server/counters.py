"""A server's counters: Prometheus text, and what was counted between two readings of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_LINE = re.compile(r'([A-Za-z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
#: what a client of Prometheus tells of the interpreter that serves
_OF_THE_PROCESS = ("python_", "process_")
#: labels that are the same in every line of a server
_NO_NEWS = ("model_name", "engine", "model")
#: mean times by the names of our metrics: the sum and count of the histograms in which vLLM and SGLang tell them
_TIMES = {
    "engine_ttft_s": ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "engine_tpot_s": ("vllm:request_time_per_output_token_seconds", "sglang:time_per_output_token_seconds"),
}
_PREEMPTIONS = ("vllm:num_preemptions_total", "vllm:num_preemptions")


def read_counters(text: str) -> dict[str, float]:
    """Counters, sums and counts of histograms by name, with the labels that tell anything; no buckets, no gauges."""
    kinds: dict[str, str] = {}
    found: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind, *_ = [*line.split(), "", ""]
            kinds[name] = kind
        match = None if line.startswith("#") else _LINE.match(line)
        if match is None:
            continue
        name, labels, written = match[1], match[2] or "", match[3]
        if not _counts(name, kinds):
            continue
        try:
            value = float(written)
        except ValueError:
            continue
        said = [f'{label}="{is_}"' for label, is_ in _LABEL.findall(labels) if label not in _NO_NEWS]
        key = name + ("{" + ",".join(said) + "}" if said else "")
        if math.isfinite(value):
            found[key] = found.get(key, 0.0) + value
    return found


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted between two readings; nothing is known where there is no first one."""
    if not before:
        return {}
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def engine_times(counted: Mapping[str, float], requests: int) -> dict[str, float]:
    """The server's own mean times, where it tells them of just these requests and no others."""
    found = {}
    for name, histograms in _TIMES.items():
        for histogram in histograms:
            count = counted.get(f"{histogram}_count")
            if count == requests:
                found[name] = counted[f"{histogram}_sum"] / count
    return found


def preemptions(counted: Mapping[str, float]) -> int | None:
    """Preemptions among what was counted, ``None`` where the server does not count them."""
    return next((int(counted[name]) for name in _PREEMPTIONS if name in counted), None)


def _counts(name: str, kinds: Mapping[str, str]) -> bool:
    """Whether a line is part of what grows: a counter, the sum or count of a histogram; nothing of Python."""
    if name.startswith(_OF_THE_PROCESS):
        return False
    if kinds.get(name, kinds.get(name.removesuffix("_total"))) == "counter":
        return True
    whole = re.sub(r"_(sum|count)$", "", name)
    return whole != name and kinds.get(whole) in ("histogram", "summary")
