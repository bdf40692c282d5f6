"""Who runs when, with no model: what a runtime does to scheduler and blocks, in any order that its lanes may take."""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvsuite.compression import get_policy
from kvsuite.nanovllm.limits import Limits
from kvsuite.nanovllm.request import Request
from kvsuite.nanovllm.simulation import AffineStepTime, Arrival, Lane, Launched, Simulator

BLOCKS, SIZE, ROWS = 14, 4, 5
POLICIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("knorm", {"keep_ratio": 0.3}),
    ("streaming_llm", {"start_size": 2, "recent_size": 7}),
    ("l2_compress", {"keep_ratio": 0.5, "prune_after": 6, "mode": "interval=5"}),
)


class Serving(RuleBasedStateMachine):
    """Requests come and steps are launched and end, in any order. Outputs are as long as they may be."""

    lanes: tuple[Lane, ...] = ("both",)
    limits: ClassVar[dict[str, Any]] = {}
    admission = "reserve"

    @initialize(
        policy=st.sampled_from((None, *POLICIES)),
        prefill_first=st.booleans(),
        prefix_caching=st.booleans(),
        tokens=st.sampled_from([ROWS, 9, 40]),
    )
    def begin(
        self, policy: tuple[str, dict[str, Any]] | None, prefill_first: bool, prefix_caching: bool, tokens: int
    ) -> None:
        chosen = None if policy is None or self.limits else get_policy(policy[0], **policy[1])
        limits = Limits(
            max_model_len=BLOCKS * SIZE, max_num_seqs=ROWS, max_num_batched_tokens=tokens, block_size=SIZE,
            num_blocks=BLOCKS, prefix_caching=prefix_caching, prefill_first=prefill_first, admission=self.admission,
            **self.limits,
        )  # fmt: skip
        self.simulator = Simulator(limits, AffineStepTime(1.0), chosen, None, len(self.lanes))
        self.scheduler = self.simulator.scheduler
        self.under_way: dict[Lane, Launched] = {}
        self.requests: list[Request] = []

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24), new_tokens=st.integers(1, 20))
    def come(self, prompt: list[int], new_tokens: int) -> None:
        request = self.simulator.request(Arrival(prompt, new_tokens))
        self.requests.append(request)
        self.scheduler.add(request)

    def launch(self, lane: Lane) -> None:
        if lane in self.under_way:
            return
        launched = self.simulator.launch(lane, 0.0, self.under_way)
        if launched is not None:
            self.under_way[lane] = launched

    def end(self, lane: Lane) -> None:
        if lane in self.under_way:
            self.simulator.land(self.under_way.pop(lane), 1.0)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), times=st.integers(1, 6))
    def go_on(self, data: st.DataObject, times: int) -> None:
        """A lane ends its step, if it has one, and launches the next."""
        lane = data.draw(st.sampled_from(self.lanes))
        for _ in range(times):
            self.end(lane)
            self.nobody_is_promised_what_is_not_there()
            self.launch(lane)

    @invariant()
    def nobody_is_promised_what_is_not_there(self) -> None:
        if not hasattr(self, "scheduler") or self.admission == "optimistic":
            return
        assert self.scheduler.preemptions == 0
        # one lane plans between two steps; only then are the books of compression complete
        if len(self.scheduler.running) > 1 and "both" not in self.under_way:
            assert self.scheduler.promised() <= [BLOCKS] * len(self.simulator.tables)

    @invariant()
    def in_order(self) -> None:
        if not hasattr(self, "scheduler") or self.admission == "optimistic":
            return
        started = [r for r in self.requests if r.row >= 0 or r.status.over]
        assert started == self.requests[: len(started)]
        assert self.scheduler.running == [r for r in self.requests if r.row >= 0]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # everybody is served to the end, by whatever lane has something to do
        for _ in range(4000):
            for lane in self.lanes:
                self.end(lane)
            for lane in self.lanes:
                self.launch(lane)
            if not self.under_way:
                break
        assert [len(r.tokens) for r in self.requests] == [r.longest for r in self.requests]
        assert all(request.status.over for request in self.requests)
        for table in self.simulator.tables:
            assert table.pool.free == BLOCKS
            assert not table.blocks.any()


class WindowedServing(Serving):
    limits: ClassVar[dict[str, Any]] = {"sliding_window": 6, "attention_sinks": 3}


class TwoLanes(Serving):
    lanes = ("decode", "prompt")


class Optimistic(Serving):
    admission = "optimistic"


class OptimisticTwoLanes(TwoLanes):
    admission = "optimistic"


# to shrink a failure takes longer than to understand it
_SETTINGS = settings(max_examples=40, stateful_step_count=25, phases=(Phase.explicit, Phase.reuse, Phase.generate))
TestServing = Serving.TestCase
TestServing.settings = _SETTINGS
TestWindowedServing = WindowedServing.TestCase
TestWindowedServing.settings = _SETTINGS
TestTwoLanes = TwoLanes.TestCase
TestTwoLanes.settings = _SETTINGS
TestOptimistic = Optimistic.TestCase
TestOptimistic.settings = _SETTINGS
TestOptimisticTwoLanes = OptimisticTwoLanes.TestCase
TestOptimisticTwoLanes.settings = _SETTINGS


def test_two_lanes_admit_nobody_whose_last_token_is_under_way_wherever_he_waits() -> None:
    limits = Limits(max_model_len=BLOCKS * SIZE, max_num_seqs=ROWS, block_size=SIZE, num_blocks=BLOCKS)
    scheduler = Simulator(limits, AffineStepTime(1.0), None, None, 2).scheduler
    first, second = Request([1, 2, 3]), Request([4, 5, 6])
    second.tokens.append(-1)
    second.in_flight = True
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.plan_prompts(64).requests == [first]
