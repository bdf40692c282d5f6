"""The prompt lane: prompts of some requests on a stream of their own, beside the decoding of others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .delivery import Delivery
from .fences import Fence, fence_now
from .in_flight import TokensInFlight
from .request import Request
from .scheduler import Scheduler, StepPlan
from .side_streams import side_stream
from .step_launcher import Prepared, StepLauncher, StepWatch, still_wanted
from .turns import Turns


class TwoStreams(Protocol):
    """Streams of both lanes, with SMs of their own (`kvsuite.nanovllm.green_contexts.SmPartition`)."""

    @property
    def decode_stream(self) -> Any:
        """The decode lane's."""

    @property
    def prompt_stream(self) -> Any:
        """The prompt lane's."""


class Watch(StepWatch, Protocol):
    """Sees steps before they are launched, and times them."""

    def planned(self, plan: StepPlan) -> None:
        """A step is about to be launched."""


@dataclass(frozen=True)
class LaneStep:
    """One step of a lane as the host saw it.

    Parameters
    ----------
    lane
        Whose step it was.
    start_s, end_s
        When it was begun, and when the host was done with it: `time.perf_counter`. A step of prompts is delivered then; with
        overlap the tokens of a decode step come while the next one is under way.
    prompt_tokens, decode_tokens
        What it fed.
    """

    lane: Literal["decode", "prompt"]
    start_s: float
    end_s: float
    prompt_tokens: int
    decode_tokens: int


class LaneStreams:
    """Where the lanes compute: two streams of a CUDA device, or one after the other on a CPU.

    Parameters
    ----------
    device
        Of the model.
    partition
        Streams with SMs of their own; without, decoding stays on the current stream and prompts get a plain one.
    """

    def __init__(self, device: torch.device, partition: TwoStreams | None = None) -> None:
        self.device = device
        self._decode: Any = None
        self._prompt: Any = None
        if partition is not None:
            self._decode, self._prompt = partition.decode_stream, partition.prompt_stream
        elif device.type == "cuda":
            self._decode, self._prompt = torch.cuda.current_stream(device), side_stream("prompts", device)
        self._first = self._decode, self._prompt

    def bind(self, partition: TwoStreams | None) -> None:
        """Move both lanes to other streams, behind all that they were given; ``None``: to those they began with."""
        before = self._decode, self._prompt
        after = self._first if partition is None else (partition.decode_stream, partition.prompt_stream)
        self._decode, self._prompt = after
        for stream in after:
            for old in before if stream is not None else ():
                stream.wait_stream(old)

    def decode(self) -> AbstractContextManager[Any]:
        """What is launched inside belongs to the decode lane."""
        return nullcontext() if self._decode is None else torch.cuda.stream(self._decode)

    def prompt(self) -> AbstractContextManager[Any]:
        """What is launched inside belongs to the prompt lane."""
        return nullcontext() if self._prompt is None else torch.cuda.stream(self._prompt)

    def join(self) -> None:
        """Wait for all that the device was given: what one stream made is used on others, or freed."""
        if self._prompt is not None:
            torch.cuda.synchronize(self.device)

    def follow_decodes(self) -> None:
        """Let what the prompt lane is given from now on come behind all that the decode lane was given.

        Blocks that the decode lane gave back are free at once: the prompt lane may write them, or read a prefix in them, and
        waits for a decode step on the device. The other way round nobody waits on the device: a decode step would stand
        behind a whole prompt. There are fences and the hand-over for that, on the host.
        """
        if self._prompt is not None:
            self._prompt.wait_stream(self._decode)


class LaunchFence:
    """The end of what a lane is being given.

    Parameters
    ----------
    complete
        Called by who waits before the end is reached, to reach it.
    """

    def __init__(self, complete: Callable[[], None]) -> None:
        self._complete = complete
        self._fence: Fence | None = None
        self._reached = False

    def reach(self, device: torch.device) -> None:
        """All was given to the current stream."""
        self._fence = fence_now(device)
        self._reached = True

    def passed(self) -> bool:
        """Whether the end was reached, and all work before it is over."""
        return self._reached and (self._fence is None or self._fence.passed())

    def wait(self) -> None:
        """Return when all work before the end is over."""
        if not self._reached:
            self._complete()
        if self._fence is not None:
            self._fence.wait()


@dataclass
class _PromptStep:
    """A step of the prompt lane from its launch to its delivery."""

    plan: StepPlan
    began: float
    rows: list[int]
    #: passes when nothing given so far reads or writes blocks of its rows any more
    fence: LaunchFence
    found: list[tuple[TokensInFlight | None, Tensor]] = field(default_factory=list)
    launched: bool = False


class PromptLane:
    """One step of prompts at a time: planned, launched in turns, compressed, and handed over when its tokens are there.

    Parameters
    ----------
    scheduler
        Plans.
    launcher
        Of this lane: inputs and runner of its own.
    delivery
        Of this lane.
    streams
        Of both.
    turns
        Launches.
    budget
        Tokens of a step at most.
    finish
        What is done in the books once a step is launched: prefixes, compression.
    on_logits
        Sees the logits of every step with the requests they belong to.
    on_step
        Told about every step that was delivered.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        launcher: StepLauncher,
        delivery: Delivery,
        *,
        streams: LaneStreams,
        turns: Turns,
        budget: int,
        finish: Callable[[StepPlan], None],
        on_logits: Callable[[Sequence[Request], Tensor], None],
        on_step: Callable[[LaneStep], None],
    ) -> None:
        self._scheduler = scheduler
        self._launcher = launcher
        self._delivery = delivery
        self._streams = streams
        self._turns = turns
        self._budget = budget
        self._finish = finish
        self._on_step = on_step
        self._on_logits = on_logits
        self._step: _PromptStep | None = None
        #: seconds that the host waited for prompts
        self.waited_s = 0.0
        #: sees a step before anything of it is launched
        self.before: Callable[[StepPlan], None] = lambda plan: None

    def steer(self, watch: Watch) -> None:
        """Show steps to somebody before anything of them is launched, and have them timed."""
        self.before, self._launcher.watch = watch.planned, watch

    @property
    def launching(self) -> bool:
        """Whether there is something to launch in turns."""
        return self._turns.in_turns and not self._turns.over

    def fence_of(self, row: int) -> Fence | None:
        """What has to pass before blocks that a row gives back are somebody else's (`BlockTables.fence_of`)."""
        step = self._step
        return step.fence if step is not None and row in step.rows else None

    def advance(self) -> StepPlan | None:
        """Do what can be done without waiting for the device; return a plan that was begun, or found requests that cannot be.

        Raises
        ------
        Exception
            What the step under way raised; its requests have failed.
        """
        if self._step is not None and not self._step.launched and self._turns.turn():
            self._end_launch(self._step)
        if self._step is not None and self._step.launched and self._step.fence.passed():
            self._land()
        return self._begin() if self._step is None else None

    def turn(self) -> None:
        """Launch some more layers; what follows the last one is left to `advance`, and so is an error."""
        self._turns.turn()

    def settle(self) -> None:
        """Launch the rest of the step under way, wait for it, and deliver."""
        step = self._step
        if step is None:
            return
        self._turns.finish()
        if not step.launched:
            self._end_launch(step)
        self._land()

    def close(self) -> None:
        """Launch the rest of the step under way for nobody, and end the thread."""
        self._turns.close()
        if self._step is not None:
            self._step.fence.wait()
        self._step = self._delivery.flight = None

    def _begin(self) -> StepPlan:
        plan = self._scheduler.plan_prompts(self._budget)
        if not plan.requests:
            return plan
        rows = [request.row for request in plan.requests]
        step = self._step = _PromptStep(plan, time.perf_counter(), rows, LaunchFence(self._turns.finish))
        try:
            self.before(plan)
            with self._streams.prompt():
                self._streams.follow_decodes()
                prepared = self._launcher.prepare(plan, None)
        except Exception as error:
            with self._streams.prompt():
                step.fence.reach(self._streams.device)
            self._fail(step, error)
            raise
        self._launcher.commit(plan)
        self._turns.start(lambda: self._compute(step, prepared))
        return plan

    def _compute(self, step: _PromptStep, prepared: Prepared) -> None:
        """On the thread."""
        with self._streams.prompt():
            try:
                step.found.append(self._launcher.compute(prepared))
            finally:
                step.fence.reach(self._streams.device)

    def _end_launch(self, step: _PromptStep) -> None:
        """The forward pass is launched: books, compression, tokens."""
        error = self._turns.error()
        if error is not None:
            self._fail(step, error)
            raise error
        step.launched = True
        with self._streams.prompt():
            # compression may take blocks that the decode lane gave back meanwhile
            self._streams.follow_decodes()
            self._renew(step)
            [(flight, logits)] = step.found
            try:
                for request, row in zip(step.plan.requests, step.rows, strict=True):
                    if request.row != row:
                        # what the launch noted of a sequence that was taken away meanwhile
                        self._scheduler.on_release(row)
                if flight is not None:
                    self._on_logits(*still_wanted(flight, logits))
                self._finish(step.plan)
                if flight is not None:
                    self._delivery.take_off(flight)
            except Exception as failure:
                step.fence.reach(self._streams.device)
                self._fail(step, failure)
                raise
            step.fence.reach(self._streams.device)

    def _renew(self, step: _PromptStep) -> None:
        """A fence for what comes next; who waits for it before its end waits for what was given until then."""

        def complete() -> None:
            step.fence.reach(self._streams.device)
            self._renew(step)

        step.fence = LaunchFence(complete)

    def _land(self) -> None:
        step = self._step
        assert step is not None
        started = time.perf_counter()
        step.fence.wait()
        self.waited_s += time.perf_counter() - started
        self._step = None
        for request in step.plan.requests:
            # who was preempted meanwhile has no row
            if request.row >= 0 and not request.status.over and request.computed >= request.prefill:
                self._scheduler.hand_over(request)
        self._delivery.land()
        fed = sum(step.plan.counts)
        self._on_step(LaneStep("prompt", step.began, time.perf_counter(), fed, 0))

    def _fail(self, step: _PromptStep, error: BaseException) -> None:
        # who was preempted meanwhile is computed again
        lost = [request for request in step.plan.requests if request.row >= 0]
        self._delivery.fail(lost, error if isinstance(error, Exception) else RuntimeError(str(error)))
        self._step = None
