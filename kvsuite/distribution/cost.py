"""What a case is expected to cost: counted steps and tokens, and seconds by a stated model of the device.

Counting needs nothing but the case and the options, so that every host cuts the same shards. Seconds are for planning alone: a
model with a few numbers a device is rough, and a record of the same case is better.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.case import Case
from kvsuite.options.resolve import Options
from kvsuite.suites.footprint import Footprint
from kvsuite.suites.registry import suite_of_rows
from kvsuite.suites.suite import Work

# a decode step reads all weights for a token a sequence, and costs about as much as a prompt of so many tokens
_STEP_TOKENS = 32
# tokens that a forward of many takes, where it is a chunk of a prompt
_FORWARD_TOKENS = 128
# loading, probing, writing: what every case costs, in tokens of a prompt
_CASE_TOKENS = 2_000


def work_of(case: Case, options: Options) -> Work:
    """What a case computes, as its suite counts it."""
    return suite_of_rows(case.suite).cost(case, options)


def footprint_of(case: Case, options: Options) -> Footprint:
    """What memory a case needs, as its suite tells it."""
    return suite_of_rows(case.suite).footprint(case, options)


def units(work: Work) -> float:
    """Cost in tokens of a prompt, the unit of shards."""
    return _CASE_TOKENS + work.bulk + _STEP_TOKENS * work.steps


@dataclass(frozen=True)
class Speed:
    """A device, roughly.

    Parameters
    ----------
    flops
        Floating-point operations a second of a prompt's products.
    bytes_s
        Bytes a second that a decode step reads.
    load_bytes_s
        Bytes of weights a second that loading manages.
    step_s, case_s
        Seconds that a forward and a case cost whatever their size.
    unpacked_s
        Elements of packed weights a second that a forward unpacks before its products; ``None`` where kernels read them packed.
    """

    flops: float
    bytes_s: float
    load_bytes_s: float
    step_s: float
    case_s: float
    unpacked_s: float | None = None


SPEEDS = {
    # one core of a server of 2023 under SmolLM2: 90e9 flops, 8e9 bytes/s, 0.35 s to unpack 134.5 million elements
    "cpu": Speed(flops=80e9, bytes_s=10e9, load_bytes_s=0.2e9, step_s=0.005, case_s=2.0, unpacked_s=0.4e9),
    "cuda": Speed(flops=200e12, bytes_s=2e12, load_bytes_s=1e9, step_s=0.002, case_s=2.0),
    "mps": Speed(flops=5e12, bytes_s=200e9, load_bytes_s=1e9, step_s=0.005, case_s=2.0),
}


def seconds(work: Work, speed: Speed, *, elements: int, weight_bytes: int, loads: bool, packed: bool = False) -> float:
    """Expected seconds of a case.

    ``case + [load] + 2 P tokens / flops + steps (step + weights / bandwidth) + [forwards P / unpacked]``.

    Parameters
    ----------
    work
        What it computes.
    speed
        Of the device, one of `SPEEDS` say.
    elements
        Parameters of the model, P.
    weight_bytes
        Their bytes.
    loads
        Whether the case is the first of its model and weight format, and has to load it.
    packed
        Whether its weights are packed groups.
    """
    loading = weight_bytes / speed.load_bytes_s if loads else 0.0
    bulk = 2 * elements * work.bulk / speed.flops
    steps = work.steps * (speed.step_s + weight_bytes / speed.bytes_s)
    unpacking = 0.0
    if packed and speed.unpacked_s is not None:
        unpacking = (work.steps + work.bulk / _FORWARD_TOKENS) * elements / speed.unpacked_s
    return speed.case_s + loading + bulk + steps + unpacking
