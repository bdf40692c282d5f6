"""What is served under load, and when it arrives: the workload of a case, before any prompt is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvsuite.errors import UserError

from .arrivals import CLOSED, KINDS, POISSON, TRACE

HEAVY, LIGHT, LONG = NAMES = ("heavy-trace", "light-dataset", "synthetic-long")
#: output tokens of light-dataset, and the fewest and most of its prompts
LIGHT_OUTPUT, LIGHT_TOKENS = 64, (32, 128)
UNIQUE, IDENTICAL = CONTENTS = ("unique", "identical")


@dataclass(frozen=True, kw_only=True)
class ServingWorkload:
    """What is served and when it arrives, in JSON types.

    Parameters
    ----------
    name
        ``heavy-trace`` (rows of a trace with long prompts and answers), ``light-dataset`` (short texts),
        ``synthetic-long`` (prompts of one length).
    requests
        How many: sequences of a batch times batches.
    max_model_len
        Tokens of a request at most; the prompt is clipped to what its output leaves.
    context, output
        Prompt and output tokens of synthetic-long; an output of 0 or less is a quarter of ``max_model_len``, 512 at most.
    prompts
        ``unique``: no two prompts of heavy-trace and synthetic-long agree in their first 16 tokens. ``identical``: one fill
        token is repeated, as the original did, so that a prefix cache has nearly all of them.
    dialogue, token
        synthetic-long repeats a dialogue, or this text, which wins; where prompts are unique, 16 tokens of each one's own
        stand before it.
    arrivals
        ``closed`` (all at once), ``poisson`` at ``arrival_rate``, ``trace`` as in the trace.
    arrival_rate
        Requests a second in the mean; for ``trace`` it may stand in the place of ``time_scale``.
    time_scale
        How many times as fast as the trace.
    image
        What every prompt begins with, ``random`` or the name of a file; its tokens count as the prompt's. ``None``: text.

    Raises
    ------
    UserError
        If a value is impossible, or two contradict each other.
    """

    name: str
    requests: int
    max_model_len: int
    context: int = 3072
    output: int = 512
    prompts: str = UNIQUE
    dialogue: bool = False
    token: str = ""
    arrivals: str = CLOSED
    arrival_rate: float | None = None
    time_scale: float = 1.0
    image: str | None = None

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--kv-workloads", self.name, NAMES),
            ("serving workload: prompts", self.prompts, CONTENTS),
            ("--kv-arrivals", self.arrivals, KINDS),
        ):
            if value not in choices:
                raise UserError(f"{option}={value}: unknown; use {', '.join(choices)}")
        if self.requests < 1:
            raise UserError(f"serving workload {self.name}: {self.requests} requests; ask for at least 1")
        if self.arrivals == POISSON and self.arrival_rate is None:
            raise UserError("--kv-arrivals=poisson: give --kv-arrival-rate, in requests a second")
        if self.arrival_rate is not None and not 0 < self.arrival_rate < float("inf"):
            raise UserError(f"--kv-arrival-rate={self.arrival_rate:g}: must be a number above 0, requests a second")
        if self.arrivals == CLOSED and self.arrival_rate is not None:
            raise UserError(
                f"--kv-arrival-rate={self.arrival_rate:g}: all requests arrive at once; add --kv-arrivals=poisson or trace"
            )
        if self.time_scale != 1 and (self.arrivals != TRACE or self.arrival_rate is not None):
            raise UserError(
                f"--kv-trace-time-scale={self.time_scale:g}: goes with --kv-arrivals=trace and without --kv-arrival-rate, "
                "which sets the speed of a trace as well"
            )

    @classmethod
    def of(cls, workload: Mapping[str, Any]) -> ServingWorkload:
        """The fields of this class in a mapping that may have others."""
        return cls(**{field.name: workload[field.name] for field in fields(cls) if field.name in workload})

    def to_dict(self) -> dict[str, Any]:
        """Every field that is set."""
        return {name: value for name, value in asdict(self).items() if name != "image" or value is not None}

    @property
    def needs_trace(self) -> bool:
        """Whether a trace has to be given."""
        return self.name == HEAVY or self.arrivals == TRACE
