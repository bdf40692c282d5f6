"""The scheduler and the block pool under known step times, without a model: when every request gets its tokens.

What is admitted, fed, found in the prefix cache, compressed and preempted is decided by the code that decides it when serving
(`kvsuite.nanovllm.scheduler`); only the device is replaced, by a function from what a step computes to its seconds. With step
times measured on one machine it answers for any workload, arrivals, pool, policy and number of lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvsuite.compression.base import Policy
from kvsuite.errors import UserError

from .block_pool import PoolFullError
from .block_table import BlockTables, tables_for
from .groups import LayerGroup
from .limits import Limits
from .request import Request, Status
from .reservation import size_after_action
from .sampling import SamplingParameters
from .scheduler import Scheduler, StepPlan

Lane = Literal["both", "prompt", "decode"]


@dataclass(frozen=True)
class StepWork:
    """What a step computes, as far as its time depends on it.

    Parameters
    ----------
    lane
        ``both`` where one lane does everything.
    prompt_tokens
        Tokens of prompts, and of known output that is computed again.
    decode_rows
        Requests that are fed their newest token.
    kv_tokens
        Stored tokens that the decode rows read, their newest among them; where layer groups differ, the mean over layers.
    beside
        What the other lane is at work on when the step is launched, ``None`` if on nothing. A step that is launched later
        does not change the time of this one.
    """

    lane: Lane
    prompt_tokens: int
    decode_rows: int
    kv_tokens: float
    beside: StepWork | None = None


StepTime = Callable[[StepWork], float]


@dataclass(frozen=True)
class AffineStepTime:
    """Seconds of a step as a sum of what it computes, each with its rate.

    Parameters
    ----------
    step_s
        Of any step, however small: the weights are read, kernels are launched.
    prompt_token_s, decode_row_s, kv_token_s
        For each of `StepWork.prompt_tokens`, `StepWork.decode_rows` and `StepWork.kv_tokens`.
    """

    step_s: float
    prompt_token_s: float = 0.0
    decode_row_s: float = 0.0
    kv_token_s: float = 0.0

    def __call__(self, work: StepWork) -> float:
        return (
            self.step_s
            + self.prompt_token_s * work.prompt_tokens
            + self.decode_row_s * work.decode_rows
            + self.kv_token_s * work.kv_tokens
        )


@dataclass(frozen=True)
class Arrival:
    """A request of a simulation.

    Parameters
    ----------
    prompt
        Number of tokens, which no other prompt shares, or the tokens.
    new_tokens
        Output tokens, all of them.
    arrival_s
        Seconds from the start.
    """

    prompt: int | Sequence[int]
    new_tokens: int
    arrival_s: float = 0.0


@dataclass
class SimulatedRequest:
    """When a request got what. All times are seconds from the start of the simulation.

    Parameters
    ----------
    arrival_s
        Scheduled.
    admitted_s
        When it first got blocks.
    token_s
        Of every output token.
    prompt_tokens, cached_tokens
        Length of the prompt; how many of its tokens the prefix cache had.
    computed_tokens
        Prompt tokens, and known output, that were computed, again after a preemption included.
    preemptions
        How often it lost its blocks.
    """

    arrival_s: float
    admitted_s: float = -1.0
    token_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0

    @property
    def ttft_s(self) -> float:
        """Seconds from the scheduled arrival to the first token."""
        return self.token_s[0] - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds from one output token to the next; ``None`` where there is one alone."""
        gaps = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / gaps if gaps else None


@dataclass(frozen=True)
class SimulatedStep:
    """A step: when, what, and how full the pool was at its launch (blocks of the fullest layer group)."""

    work: StepWork
    start_s: float
    end_s: float
    running: int
    waiting: int
    used_blocks: int


@dataclass(frozen=True)
class Simulation:
    """What became of all requests, in the order in which they were given, and of all steps."""

    requests: list[SimulatedRequest]
    steps: list[SimulatedStep]

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return max(request.token_s[-1] for request in self.requests)

    @property
    def output_tokens_s(self) -> float:
        """Output tokens a second, from the start to the last token."""
        return sum(len(request.token_s) for request in self.requests) / self.seconds

    @property
    def mean_running(self) -> float:
        """Running requests, averaged over the time of steps."""
        spent = sum(step.end_s - step.start_s for step in self.steps)
        return sum(step.running * (step.end_s - step.start_s) for step in self.steps) / spent


def simulate(
    arrivals: Sequence[Arrival],
    limits: Limits,
    step_time: StepTime,
    *,
    policy: Policy | None = None,
    groups: Sequence[LayerGroup] | None = None,
    lanes: int = 1,
) -> Simulation:
    """Serve requests in simulated time.

    Parameters
    ----------
    arrivals
        The requests.
    limits
        Of the runtime; the pool has to be given in blocks.
    step_time
        Seconds of a step. A step's tokens are there when it ends, and its prompts are compressed then.
    policy
        What is removed, by its sizes alone.
    groups
        Layer groups; one of full attention, on which the policy acts, if left out.
    lanes
        1, or 2: prompts and decoding at the same time, each on a clock of its own.

    Raises
    ------
    UserError
        If the pool is not given in blocks, a request does not fit it even alone, or a step takes no time.
    """
    return Simulator(limits, step_time, policy, groups, lanes).run(arrivals)


@dataclass
class Launched:
    """A step under way, and whom it gives a token."""

    plan: StepPlan
    step: SimulatedStep
    sampled: list[Request]


class Simulator:
    """What `simulate` does, step by step; parameters are its own."""

    def __init__(
        self,
        limits: Limits,
        step_time: StepTime,
        policy: Policy | None,
        groups: Sequence[LayerGroup] | None,
        lanes: int,
    ) -> None:
        if limits.num_blocks is None:
            raise UserError("num_blocks: a simulation has no memory to take a share of; give the pool in blocks")
        if lanes not in (1, 2):
            raise UserError(f"lanes={lanes}: use 1 or 2")
        if groups is None:
            window, sinks = limits.sliding_window, limits.attention_sinks
            compressed = policy is not None and window is None
            groups = [LayerGroup((0,), 1, 1, window=window, sinks=sinks, compressed=compressed)]
        self.limits = limits
        self.tables = [tables_for(group, limits, limits.num_blocks) for group in groups]
        self._layers = [len(group.layers) for group in groups]
        self._policies = [policy if group.compressed else None for group in groups]
        self._step_time = step_time
        self._lanes = lanes
        acted = [group.compressed for group in groups]
        self.scheduler = Scheduler(limits, self.tables, policy=policy, compressed=acted, lanes=lanes)
        self._done: set[tuple[int, int]] = set()
        self.scheduler.on_release = lambda row: self._done.difference_update({(row, i) for i in range(len(acted))})
        self._books: dict[Request, SimulatedRequest] = {}
        self._steps: list[SimulatedStep] = []

    def run(self, arrivals: Sequence[Arrival]) -> Simulation:
        """Serve requests to their end."""
        requests = [self.request(arrival) for arrival in arrivals]
        # the earliest last: they are popped; equal ones in the order given
        coming = sorted(requests, key=lambda request: self._books[request].arrival_s)[::-1]
        under_way: dict[Lane, Launched] = {}
        lanes: tuple[Lane, ...] = ("both",) if self._lanes == 1 else ("decode", "prompt")
        now = 0.0
        while True:
            while coming and self._books[coming[-1]].arrival_s <= now:
                self.scheduler.add(coming.pop())
            for lane in lanes:
                if lane not in under_way and (launched := self.launch(lane, now, under_way)):
                    under_way[lane] = launched
            times = [one.step.end_s for one in under_way.values()]
            if not times and not coming:
                break
            if coming and (self._lanes == 2 or not times):
                times.append(self._books[coming[-1]].arrival_s)
            now = min(times)
            for lane in [lane for lane, one in under_way.items() if one.step.end_s <= now]:
                self.land(under_way.pop(lane), now)
        assert not [*self.scheduler.running, *self.scheduler.waiting]
        return Simulation(list(self._books.values()), self._steps)

    def request(self, arrival: Arrival) -> Request:
        """A request, which waits for `Scheduler.add`."""
        number = len(self._books)
        # no token of a text is negative
        tokens = [-1 - number] * arrival.prompt if isinstance(arrival.prompt, int) else list(arrival.prompt)
        request = Request(tokens, SamplingParameters(max_new_tokens=arrival.new_tokens, ignore_eos=True))
        request.longest = len(tokens) + arrival.new_tokens
        if not tokens or request.longest > self.limits.max_model_len:
            raise UserError(
                f"request {number}: {len(tokens)} + {arrival.new_tokens} tokens in max_model_len="
                f"{self.limits.max_model_len}; give at least one token and raise the limit"
            )
        self._books[request] = SimulatedRequest(arrival.arrival_s, prompt_tokens=request.prompt_length)
        return request

    def launch(self, lane: Lane, now: float, under_way: dict[Lane, Launched]) -> Launched | None:
        """Plan a step and begin it; ``None`` if there is nothing to do."""
        if lane == "both":
            plan = self.scheduler.plan()
        elif lane == "prompt":
            plan = self.scheduler.plan_prompts(self.limits.max_num_batched_tokens)
        else:
            plan = self.scheduler.plan_decodes()
        if plan.misfits:
            length = plan.misfits[0].largest
            raise UserError(
                f"num_blocks={self.limits.num_blocks}: a request of {length} tokens does not fit even alone; give more"
            )
        if not plan.requests:
            return None
        for request in plan.requests:
            book = self._books[request]
            if book.admitted_s < 0:
                book.admitted_s, book.cached_tokens = now, request.prefix_hits
        work = self._work(lane, plan, next((one.step.work for one in under_way.values()), None))
        seconds = self._step_time(work)
        if not seconds > 0:
            raise UserError(f"step time {seconds} of {work}: a step takes time; give more than 0 seconds")
        used = max(table.pool.used for table in self.tables)
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        step = SimulatedStep(work, now, now + seconds, running, waiting, used)
        self._steps.append(step)
        for request, fed in zip(plan.requests, plan.counts, strict=True):
            for table in self.tables:
                table.commit(request.row, fed)
            request.computed += fed
        sampled = [request for request in plan.requests if request.computed == len(request.tokens)]
        for request in sampled:
            request.in_flight = True
        return Launched(plan, step, sampled)

    def _work(self, lane: Lane, plan: StepPlan, beside: StepWork | None) -> StepWork:
        prompts, rows, kv = 0, 0, 0.0
        for request, fed in zip(plan.requests, plan.counts, strict=True):
            if fed == 1 and request.computed >= request.prefill:
                rows += 1
                stored = [int(table.lengths[request.row]) + 1 for table in self.tables]
                kv += sum(n * layers for n, layers in zip(stored, self._layers, strict=True)) / sum(self._layers)
            else:
                prompts += fed
                self._books[request].computed_tokens += fed
        return StepWork(lane, prompts, rows, kv, beside)

    def land(self, launched: Launched, now: float) -> None:
        """A step is over: its tokens are there, its prompts are compressed, requests with their last token are gone."""
        # the other lane may have preempted some of them
        for request in launched.plan.requests:
            if request.row >= 0:
                self.scheduler.publish(request)
        for request in launched.plan.requests:
            self._compress(request)
            if request.row >= 0 and request.computed >= request.prefill:
                self.scheduler.hand_over(request)
        for request in launched.sampled:
            self._books[request].token_s.append(now)
            request.in_flight = False
            request.tokens.append(request.prompt[0])
            if len(request.tokens) >= request.longest:
                self._books[request].preemptions = request.preemptions
                self.scheduler.remove(request)
                request.status = Status.FINISHED

    def _compress(self, request: Request) -> None:
        for index, (table, policy) in enumerate(zip(self.tables, self._policies, strict=True)):
            if policy is None or request.row < 0 or request.computed < request.prompt_length:
                continue
            self._compress_one(request, table, policy, index)

    def _compress_one(self, request: Request, table: BlockTables, policy: Policy, index: int) -> None:
        stored, key = int(table.lengths[request.row]), (request.row, index)
        prompt = request.computed == request.prompt_length
        left = size_after_action(policy, stored, request.computed, done=key in self._done, prompt=prompt)
        if left == stored:
            return
        while True:
            try:
                table.replace(request.row, left)
            except PoolFullError:
                if self.scheduler.preempt_for(request):
                    continue
                raise UserError(
                    f"num_blocks={self.limits.num_blocks}: no room to compress a request; give more"
                ) from None
            break
        self._done.add(key)
        request.compressed = True
