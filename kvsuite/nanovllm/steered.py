"""A controller at a runtime: what it is asked, what its meters are fed, and what its decisions do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvsuite.errors import CaseInvalid

from .controller import ratios
from .request import Request
from .spans import Spans
from .steering import Controller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .compression_stage import CompressionStage
    from .scheduler import StepPlan
    from .stage_streams import Work


def require_steerable(
    controller: Controller, *, has_policy: bool, is_async: bool, lanes: int, shares: Iterable[float]
) -> None:
    """Refuse what a runtime cannot do of what a controller may decide.

    Parameters
    ----------
    controller
        Decides.
    has_policy, is_async, lanes
        Of the runtime.
    shares
        Shares of the prompt lane for which it was given partitions.

    Raises
    ------
    CaseInvalid
        With the reason.
    """
    settings = controller.settings
    if not has_policy:
        raise CaseInvalid("controller: it decides how prompts are compressed, and there is no policy; give one")
    if not is_async:
        raise CaseInvalid(
            "controller: it chooses when to compress beside the steps, and stage=sync never does; use async"
        )
    given = sorted(shares)
    if settings.greenctx and lanes == 1:
        raise CaseInvalid("controller: it parts the SMs between two lanes; use lanes=2, or greenctx=False")
    if settings.greenctx and given != ratios():
        raise CaseInvalid(f"controller: it may part the SMs by {ratios()}, and partitions were given for {given}")
    if given and not settings.greenctx:
        raise CaseInvalid("controller: partitions were given, and greenctx=False never uses one; leave them out")


@dataclass
class _Compressions:
    """Those of the prompts of one step: the meter takes them together."""

    left: int = 0
    seconds: float = 0.0
    is_closed: bool = False


class Steered:
    """Asks a controller before steps with prompts, and does what it decides.

    Pipeline ``none`` leaves prompts that end meanwhile as they are, for good: one that is preempted and computed again
    keeps what was decided for it. Asynchronous or not is where the compression stage works.

    Parameters
    ----------
    controller
        Decides.
    stage
        Compresses; has a place aside.
    bind
        Moves the lanes to the partition of a share, ``None`` for none, and says what that is.
    has_lanes
        Whether there are two: the prompt lane then compresses, beside the decoding.
    lengths
        Tokens in the cache by row, ``[rows]``, as the tables keep them.
    device
        Of the runtime.
    """

    def __init__(
        self,
        controller: Controller,
        stage: CompressionStage,
        *,
        lengths: Any,
        device: torch.device,
        bind: Callable[[float | None], dict[str, int] | None],
        has_lanes: bool,
    ) -> None:
        self.controller = controller
        self._stage, self._lengths = stage, lengths
        self._bind, self._has_lanes = bind, has_lanes
        self._spans = Spans(device, controller.now)
        self._pending = 0
        self._step = _Compressions()
        stage.spares = self._spares
        stage.timed = self._timed
        if has_lanes:
            controller.inert["async_compress"] = (
                "with two lanes the prompt lane compresses, beside the decoding, whatever is decided"
            )
        if controller.settings.dual and controller.settings.kind == "gemm":
            controller.inert["auto_dual"] = (
                "prompts and decoding have a lane each and go on at the same time: there is nothing to choose between, and the "
                "schedule is that of auto-tune+greenctx"
                if has_lanes
                else "steps take prompts first or beside decoding as the runtime's limits say, whatever is decided"
            )
        controller.inert["compression_streams"] = (
            "compression has one stream here, as it has beside a partition in the original; the number decides nothing"
        )

    def planned(self, plan: StepPlan) -> None:
        """See a step before it is launched: a decision, if it has prompts and one is due."""
        self._spans.collect()
        prompts = [
            request
            for request, count in zip(plan.requests, plan.counts, strict=True)
            if count > 1 or request.computed < request.prompt_length
        ]
        if not prompts:
            rows = [request.row for request in plan.requests]
            self.controller.decode_tokens.add(float(self._lengths[rows].sum()))
            return
        self._close_step()
        decision, is_new = self.controller.prompts(
            batch=len(prompts),
            seq_len=max(request.prompt_length for request in prompts),
            expected_output=sum(map(_new_tokens, prompts)) / len(prompts),
            pending=self._pending,
        )
        if not is_new:
            return
        self._stage.works_aside = decision.async_compress or self._has_lanes
        self._stage.layers_per_step = decision.decode_layers_per_step if decision.pipeline == "decode" else None
        self.controller.applied(
            {
                "pipeline": decision.pipeline,
                "async_compress": decision.async_compress or self._has_lanes,
                "compression_streams": 1,
                "layers_per_step": self._stage.layers_per_step,
                "partition": self._bind(decision.sm_compress_ratio if decision.greenctx_enabled else None),
            }
        )

    def begin(self, *, decode_only: bool) -> Any:
        """A mark before the forward pass, if this step is one of the fourth that are timed."""
        return self._spans.mark() if self.controller.next_step_is_sampled(decode_only=decode_only) else None

    def end(self, begun: Any, *, decode_only: bool) -> None:
        """The forward pass is launched."""
        if begun is not None:
            meter = self.controller.decode if decode_only else self.controller.prefill
            self._spans.add(begun, self._spans.mark(), meter.add)

    def _spares(self) -> bool:
        """Whether the policy leaves prompts that end now alone."""
        decision = self.controller.decision
        return decision is not None and decision.pipeline == "none"

    def _timed(self, work: Work) -> Work:
        """Compression work that tells how long it took."""
        step = self._step
        step.left += 1
        self._pending += 1

        def timed() -> None:
            start = self._spans.mark()
            try:
                work()
            finally:
                self._spans.add(start, self._spans.mark(), lambda seconds: self._compressed(step, seconds))

        return timed

    def _compressed(self, step: _Compressions, seconds: float) -> None:
        self._pending -= 1
        step.left -= 1
        step.seconds += seconds
        self._tell(step)

    def _close_step(self) -> None:
        """The prompts of the step before have ended, and what they began is all."""
        step, self._step = self._step, _Compressions()
        step.is_closed = True
        self._tell(step)

    def _tell(self, step: _Compressions) -> None:
        if step.is_closed and not step.left and step.seconds:
            self.controller.compress.add(step.seconds)
            step.seconds = 0.0


def _new_tokens(request: Request) -> int:
    return request.sampling.max_new_tokens if request.forced is None else len(request.forced)
