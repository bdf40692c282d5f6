"""What the controller decides: pure functions of what it is given. When it is asked, and its meters, are in `steering`.

The rules are those of FastCache's auto tuner; `docs/controller.md` has them with what is ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvsuite.errors import CaseInvalid

from .cost_model import KINDS, CostModel, MeasuredCost, PublishedCost, kind_of, speedup

COSTS = ("measured", "published")
LEAST_RATIO, MOST_RATIO, RATIO_STEP = 0.10, 0.60, 0.05
MOST_STREAMS = 4
MOST_LAYERS = 8
#: compress samples before green contexts may be switched off as useless
_SAMPLES_BEFORE_OFF = 3


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """What stays the same in a run; JSON types.

    Parameters
    ----------
    method, factor
        The policy, and how many tokens become one.
    layers, kv_heads, head_dim
        The model's.
    weight_bytes, token_bytes
        Read by every step; keys and values of one token, all layers.
    bandwidth, bandwidth_source
        Bytes a second, and where the number comes from.
    cost
        ``measured``, or ``published`` for the original's formulas.
    dual
        Whether it chooses between prompts and decoding as well (``auto_dual_batch``).
    force
        Compress whatever the rules say of lengths and gain (``auto_force_compress``).
    """

    method: str
    factor: float
    layers: int
    kv_heads: int
    head_dim: int
    weight_bytes: int
    token_bytes: int
    bandwidth: float
    bandwidth_source: str = "measured"
    cost: str = "measured"
    dual: bool = False
    force: bool = False
    greenctx: bool = True
    interval: int = 4
    dual_interval: int = 4
    streams: int = 2
    layers_per_step: int = 4
    min_seq_len: int = 256
    min_output_len: int = 64
    min_speedup: float = 1.05

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise CaseInvalid(f"controller: cost={self.cost}; use {' or '.join(COSTS)}")
        if not self.factor >= 1:
            raise CaseInvalid(f"controller: factor={self.factor}; at least 1")
        for name in ("interval", "dual_interval"):
            if getattr(self, name) < 1:
                raise CaseInvalid(f"controller: {name}={getattr(self, name)}; at least 1")

    @property
    def kind(self) -> str:
        """What the method's compression is bound by."""
        return kind_of(self.method)

    @property
    def first_ratio(self) -> float:
        """The prompt lane's share of the SMs at the start."""
        return KINDS[self.kind]


@dataclass(frozen=True, kw_only=True)
class ControllerInputs:
    """What one decision is made of; JSON types.

    Parameters
    ----------
    counter
        Steps with prompts so far, this one included.
    batch, seq_len, expected_output
        Prompts of the step, tokens of the longest of them, mean of their ``max_new_tokens``.
    pending
        Compressions under way.
    prefill_s, decode_s, compress_s
        Means of the meters in seconds, ``None`` before the first sample. Compression: all prompts of a step.
    compress_samples
        How many there were.
    decode_tokens
        Mean tokens in the caches of all sequences of a decode step.
    sm_ratio, streams, layers_per_step
        Where the last decision left them.
    """

    counter: int
    batch: int
    seq_len: int
    expected_output: float
    pending: int
    sm_ratio: float
    streams: int
    layers_per_step: int
    prefill_s: float | None = None
    decode_s: float | None = None
    compress_s: float | None = None
    compress_samples: int = 0
    decode_tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done from now on; JSON types.

    Parameters
    ----------
    pipeline
        ``none``: prompts are not compressed; ``prefill``: at the end of a prompt; ``decode``: some layers after each step.
    async_compress, compression_streams
        Whether compression has streams of its own, and how many.
    decode_layers_per_step
        Layers that the decode pipeline compresses after a step.
    greenctx_enabled, sm_compress_ratio, sm_main_ratio
        Whether lanes own SMs, and which share each.
    sm_ratio
        The prompt lane's share as the rules move it, also while it is not in use.
    speedup
        Estimated gain, ``None`` where lengths decided.
    reasons
        Rule by rule, for a person.
    """

    pipeline: str
    async_compress: bool
    compression_streams: int
    decode_layers_per_step: int
    greenctx_enabled: bool
    sm_compress_ratio: float
    sm_main_ratio: float
    sm_ratio: float
    speedup: float | None
    reasons: tuple[str, ...]

    @property
    def published(self) -> dict[str, Any]:
        """The keys of the original's ``auto_last_decision``."""
        found = asdict(self)
        return {name: value for name, value in found.items() if name not in ("sm_ratio", "speedup", "reasons")}

    def to_dict(self) -> dict[str, Any]:
        """JSON types, every field."""
        return asdict(self) | {"reasons": list(self.reasons)}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Decision:
        """A decision from its JSON."""
        return cls(**{**found, "reasons": tuple(found["reasons"])})


def decide(settings: ControllerSettings, inputs: ControllerInputs) -> Decision:
    """Rules 1 to 6 of the original's controller, in their order."""
    reasons: list[str] = []
    pipeline, gain = _pipeline(settings, inputs, reasons)
    if pipeline == "none":
        return Decision(
            pipeline="none",
            async_compress=False,
            compression_streams=inputs.streams,
            decode_layers_per_step=inputs.layers_per_step,
            greenctx_enabled=False,
            sm_compress_ratio=0.0,
            sm_main_ratio=1.0,
            sm_ratio=inputs.sm_ratio,
            speedup=gain,
            reasons=tuple(reasons),
        )
    ratio = sm_ratio(settings, inputs)
    streams, layers, is_async = inputs.streams, inputs.layers_per_step, True
    if pipeline == "prefill":
        streams = stream_count(inputs)
        is_async = _is_async(inputs)
    else:
        layers = layers_per_step(settings, inputs)
    return Decision(
        pipeline=pipeline,
        async_compress=is_async,
        compression_streams=streams,
        decode_layers_per_step=layers,
        greenctx_enabled=_parts_sms(settings, inputs, pipeline, reasons),
        sm_compress_ratio=ratio,
        sm_main_ratio=main_ratio(ratio),
        sm_ratio=ratio,
        speedup=gain,
        reasons=tuple(reasons),
    )


def cost_of(settings: ControllerSettings, inputs: ControllerInputs) -> CostModel:
    """The cost model of a decision: measured, or the original's."""
    if settings.cost == "published":
        return PublishedCost(
            bandwidth=settings.bandwidth,
            method=settings.method,
            kv_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            layers=settings.layers,
        )
    return MeasuredCost(
        bandwidth=settings.bandwidth,
        weight_bytes=settings.weight_bytes,
        token_bytes=settings.token_bytes,
        factor=settings.factor,
        step_s=inputs.decode_s,
        step_tokens=inputs.decode_tokens,
        compress_measured_s=inputs.compress_s,
    )


def ratios() -> list[float]:
    """Shares of the prompt lane that rule 3 can give."""
    steps = round((MOST_RATIO - LEAST_RATIO) / RATIO_STEP)
    return [round(LEAST_RATIO + RATIO_STEP * step, 4) for step in range(steps + 1)]


def main_ratio(ratio: float) -> float:
    """The decode lane's share beside the prompt lane's."""
    return max(0.05, round(1 - ratio, 4))


def _pipeline(settings: ControllerSettings, inputs: ControllerInputs, reasons: list[str]) -> tuple[str, float | None]:
    """Rules 1 and 2: whether it pays, and which of the two pipelines."""
    is_short = inputs.seq_len < settings.min_seq_len or inputs.expected_output < settings.min_output_len
    if is_short and not settings.force:
        reasons.append(
            f"rule 1: {inputs.seq_len} prompt tokens, {inputs.expected_output:g} new ones; "
            f"it takes {settings.min_seq_len} and {settings.min_output_len}"
        )
        return "none", None
    is_decode = settings.kind == "gemm" and inputs.batch >= 4
    gain = speedup(
        cost_of(settings, inputs),
        batch=inputs.batch,
        tokens=inputs.seq_len,
        factor=settings.factor,
        output=max(1, int(inputs.expected_output)),
        is_async=is_decode,
    )
    if gain < settings.min_speedup and not settings.force:
        reasons.append(f"rule 2: a gain of {gain:.3f} ({settings.cost}); it takes {settings.min_speedup:g}")
        return "none", gain
    return ("decode" if is_decode else "prefill"), gain


def sm_ratio(settings: ControllerSettings, inputs: ControllerInputs) -> float:
    """Rule 3: the prompt lane's share, moved by what compression takes beside the step that hides it."""
    upper, lower = (1.10, 0.60) if settings.kind == "gemm" else (0.80, 0.40)
    beside = inputs.decode_s if settings.kind == "gemm" else inputs.prefill_s
    moved = inputs.sm_ratio
    if inputs.compress_s is not None and beside is not None:
        if inputs.compress_s > upper * beside:
            moved += RATIO_STEP
        elif inputs.compress_s < lower * beside:
            moved -= RATIO_STEP
    if inputs.pending > inputs.streams:
        moved += RATIO_STEP
    return round(min(max(moved, LEAST_RATIO), MOST_RATIO), 4)


def _parts_sms(settings: ControllerSettings, inputs: ControllerInputs, pipeline: str, reasons: list[str]) -> bool:
    """Rule 4: whether lanes own SMs."""
    if not settings.greenctx:
        reasons.append("green contexts are not asked for")
        return False
    if settings.kind == "gemm" and (inputs.batch < 8 or inputs.expected_output < 128):
        reasons.append(f"rule 4: {inputs.batch} prompts with {inputs.expected_output:g} new tokens; it takes 8 and 128")
        return False
    beside = inputs.decode_s if pipeline == "decode" else inputs.prefill_s
    if (
        inputs.compress_samples >= _SAMPLES_BEFORE_OFF
        and inputs.compress_s is not None
        and beside is not None
        and inputs.compress_s < 0.35 * beside
    ):
        reasons.append(f"rule 4: compression takes {inputs.compress_s / beside:.2f} of the step beside it, under 0.35")
        return False
    return True


def stream_count(inputs: ControllerInputs) -> int:
    """Rule 5: streams of the prefill pipeline."""
    moved = inputs.streams
    if inputs.compress_s is not None and inputs.prefill_s is not None:
        moved += (inputs.compress_s > 0.80 * inputs.prefill_s) - (inputs.compress_s < 0.40 * inputs.prefill_s)
    if inputs.pending > inputs.streams:
        moved += 1
    elif inputs.pending == 0:
        moved -= 1
    return min(max(moved, 1), MOST_STREAMS)


def _is_async(inputs: ControllerInputs) -> bool:
    """Rule 5: whether the prefill pipeline compresses on streams of its own."""
    if inputs.pending:
        return True
    if inputs.compress_s is not None and inputs.prefill_s is not None:
        return inputs.compress_s > 0.40 * inputs.prefill_s
    return inputs.batch >= 8


def layers_per_step(settings: ControllerSettings, inputs: ControllerInputs) -> int:
    """Rule 6: one nearer to the layers that a decode step hides. In the original its plan's chunk size always overrode it."""
    now = inputs.layers_per_step
    if inputs.decode_s is not None and inputs.compress_s:
        wanted = round(inputs.decode_s / (inputs.compress_s / settings.layers))
        now += (wanted > now) - (wanted < now)
    return min(max(now, 1), MOST_LAYERS)


@dataclass(frozen=True, kw_only=True)
class PhaseInputs:
    """What the choice between prompts and decoding is made of; JSON types.

    Parameters
    ----------
    waiting, running
        Requests without and with a prompt computed.
    pipeline
        That of the last decision.
    prefill_s, decode_s
        Means of the meters.
    slot, decoded
        Place of the step in its window of ``dual_interval`` steps, and decode steps in it so far.
    """

    waiting: int
    running: int
    pipeline: str
    slot: int
    decoded: int
    prefill_s: float | None = None
    decode_s: float | None = None


def choose_phase(settings: ControllerSettings, inputs: PhaseInputs) -> tuple[str, str]:
    """Rule 7: ``prefill`` or ``decode`` for the next step, and why. Nothing waits and nothing runs: ``prefill``."""
    if not inputs.waiting:
        return ("decode", "nothing waits") if inputs.running else ("prefill", "nothing runs")
    if not inputs.running:
        return "prefill", "nothing runs"
    if not settings.dual or inputs.pipeline in ("none", "prefill"):
        return "prefill", "dual batch is off" if not settings.dual else f"pipeline {inputs.pipeline}"
    together = inputs.waiting + inputs.running
    waiting, running = inputs.waiting / together, inputs.running / together
    if waiting >= 0.65:
        return "prefill", f"{waiting:.2f} wait"
    if running >= 0.85:
        return "decode", f"{running:.2f} run"
    known = inputs.decode_s is not None and inputs.prefill_s is not None
    if known and inputs.decode_s > 1.80 * inputs.prefill_s and waiting <= 0.40:  # type: ignore[operator]
        return "decode", "decode steps take more than 1.8 times those with prompts"
    budget = decode_budget(settings, inputs)
    return ("decode" if inputs.decoded < budget else "prefill"), f"{budget} decode steps in {settings.dual_interval}"


def decode_budget(settings: ControllerSettings, inputs: PhaseInputs) -> int:
    """Decode steps in a window of ``dual_interval`` steps where both wait, one less than all at most."""
    share = inputs.running / (inputs.waiting + inputs.running)
    if inputs.decode_s is not None and inputs.prefill_s is not None:
        share += 0.15 * ((inputs.decode_s > 1.25 * inputs.prefill_s) - (inputs.decode_s < 0.80 * inputs.prefill_s))
    share += 0.15 * (inputs.pipeline == "decode")
    share = min(max(share, 0.25), 0.85)
    return min(round(share * settings.dual_interval), settings.dual_interval - 1)


def inert_axes(settings: ControllerSettings) -> dict[str, str]:
    """What was asked for and can do nothing, with the reason."""
    if settings.dual and settings.kind != "gemm":
        return {
            "auto_dual": (
                f"{settings.method} is compressed at the end of prompts, and dual batch then always takes prompts first: "
                "the schedule is that of auto-tune+greenctx"
            )
        }
    return {}
