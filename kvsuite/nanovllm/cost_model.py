"""What compressing would gain, before it is done: from measured times, or by the formulas and the GPU table of the original.

The measured model reads weights and the keys and values of all layers at the bandwidth that a copy reached here, and takes
the place of its own estimates with what steps took. The published one (FastCache) knows one layer's attention, no weights and
seven GPUs; it is kept to compare with, and a record that used it says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from kvsuite.errors import CaseInvalid

#: what a method's compression is bound by, and the share of SMs that its lane starts with
KINDS = {"gemm": 0.40, "memory": 0.20, "mixed": 0.25}
_GEMM = {"mlp", "mlp_residual"}
_MEMORY = {
    "streaming_llm", "knorm", "random", "observed_attention",
    # ours, which look at key norms or positions alone, or read every vector once
    "mean_pool", "l2_compress", "fix_size_l2", "recent_only", "uniform_stride",
}  # fmt: skip


def kind_of(method: str) -> str:
    """``gemm``, ``memory`` or ``mixed``; methods that nobody has sorted are mixed."""
    if method in _GEMM:
        return "gemm"
    return "memory" if method in _MEMORY else "mixed"


class CostModel(Protocol):
    """Seconds that steps would take."""

    def decode_s(self, batch: int, tokens: int) -> float:
        """A decode step of ``batch`` sequences of ``tokens`` each."""

    def compress_s(self, batch: int, tokens: int) -> float:
        """Compressing the prompts of a step."""


def speedup(cost: CostModel, *, batch: int, tokens: int, factor: float, output: int, is_async: bool) -> float:
    """Time of decoding ``output`` tokens without compression, divided by the time with it, compression included.

    Parameters
    ----------
    cost
        What steps take.
    batch, tokens
        Sequences of a step and tokens of each.
    factor
        One token of so many stays.
    output
        Tokens that each sequence gets.
    is_async
        Whether decoding goes on, at full cost, until compression is done.
    """
    full, small = cost.decode_s(batch, tokens), cost.decode_s(batch, max(1, int(tokens / factor)))
    compress = cost.compress_s(batch, tokens)
    if is_async:
        beside = min(output, int(compress / full) + 1)
        with_it = max(compress, beside * full) + (output - beside) * small
    else:
        with_it = compress + small * output
    return full * output / with_it


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """Weights and keys and values at a measured bandwidth, corrected by what steps took.

    Parameters
    ----------
    bandwidth
        Bytes a second.
    weight_bytes
        Read by every step.
    token_bytes
        Keys and values of one token, all layers.
    factor
        Compression reads all tokens and writes one of so many, until it was measured.
    step_s, step_tokens
        Mean time of decode steps and mean tokens in the caches of all their sequences, if any was measured.
    compress_measured_s
        Mean time of compressing the prompts of a step, if it was measured.
    """

    bandwidth: float
    weight_bytes: int
    token_bytes: int
    factor: float
    step_s: float | None = None
    step_tokens: float | None = None
    compress_measured_s: float | None = None

    def __post_init__(self) -> None:
        require_bandwidth(self.bandwidth)

    def decode_s(self, batch: int, tokens: int) -> float:
        """What the bytes take at least, or a measured step and the bytes that differ from it."""
        floor = (self.weight_bytes + batch * tokens * self.token_bytes) / self.bandwidth
        if not self.step_s or self.step_tokens is None:
            return floor
        return max(floor, self.step_s + (batch * tokens - self.step_tokens) * self.token_bytes / self.bandwidth)

    def compress_s(self, batch: int, tokens: int) -> float:
        """As measured; before that what the bytes take that are read and written."""
        if self.compress_measured_s:
            return self.compress_measured_s
        return batch * tokens * self.token_bytes * (1 + 1 / self.factor) / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class PublishedCost:
    """The original's formulas, in seconds: attention bytes of one layer, no weights.

    Parameters
    ----------
    bandwidth
        Bytes a second, of `published_bandwidth`.
    method
        Name of the policy.
    kv_heads, head_dim, layers
        The model's.
    """

    bandwidth: float
    method: str
    kv_heads: int
    head_dim: int
    layers: int

    def __post_init__(self) -> None:
        require_bandwidth(self.bandwidth)

    def decode_s(self, batch: int, tokens: int) -> float:
        """Two 16-bit tensors of one layer, and the host's share."""
        attention = batch * tokens * self.kv_heads * self.head_dim * 4 / self.bandwidth
        return attention + 2e-5 * (1 + 0.1 * math.log2(batch))

    def compress_s(self, batch: int, tokens: int) -> float:
        """By method; one that the original does not know costs what ``random`` does."""
        work = tokens * batch
        milliseconds = {
            "h2o": 3e-7 * work,
            "streaming_llm": 0.1,
            "knorm": work / 1e8,
            "simlayer": 1.5 * work / 1e7,
            "expected_attention": 128 * work / 1e8,
            "snapkv": (64 * work * 1e-10 + tokens * math.log2(tokens) * 5e-10) * 1000,
        }.get(self.method, work / 1e7)
        if kind_of(self.method) == "gemm":
            efficiency = min(1.0, 0.3 + 0.7 * (1 - math.exp(-batch / 8)))
            milliseconds = work * self.layers * 3 * 640 * 128 * 2 / (150e12 * efficiency) * 1000
        return milliseconds / 1000


#: name, SMs, GB/s, fp16 TFLOP/s; looked for in this order in a device's name
GPUS = (
    ("A100", 108, 2039.0, 312.0),
    ("H100", 132, 3350.0, 989.0),
    ("RTX 4090", 128, 1008.0, 165.0),
    ("RTX 4080", 76, 716.8, 97.5),
    ("RTX 3090", 82, 936.2, 71.0),
    ("V100", 80, 900.0, 125.0),
)


def published_bandwidth(name: str, memory_bytes: int | None) -> tuple[float, str]:
    """Bytes a second of a GPU by the original's table, and where the number comes from.

    A GPU that the table does not know gets 100 GB/s for each GiB of memory, which makes 14 TB/s of an H200.

    Raises
    ------
    CaseInvalid
        If it is not known and its memory is not known either.
    """
    plain = name.replace(" ", "").upper()
    for known, _, bandwidth, _ in GPUS:
        if known.replace(" ", "") in plain:
            return bandwidth * 1e9, f"published: {known}"
    if not memory_bytes or memory_bytes < 0:
        raise CaseInvalid(
            f"controller: {name or 'this device'} is not in the published table, and its memory is unknown"
        )
    return memory_bytes / 2**30 * 100e9, f"published: {name or 'unknown GPU'} by its memory"


def require_bandwidth(bandwidth: float) -> None:
    """Refuse what nothing can be divided by.

    Raises
    ------
    CaseInvalid
        If it is not a positive number.
    """
    if not (math.isfinite(bandwidth) and bandwidth > 0):
        raise CaseInvalid(f"controller: a bandwidth of {bandwidth} bytes a second; measure it again")
