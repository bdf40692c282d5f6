"""Who computes what in the next step: decoding sequences first, then chunks of prompts, within one budget of tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvsuite.compression.base import Policy

from .block_pool import ROOT, chain
from .block_table import BlockTables, Copy
from .limits import Limits
from .request import Acts, Request, Status
from .reservation import Reservation
from .sequence_rotary import SequenceRotary


@dataclass
class StepPlan:
    """What a step computes.

    Parameters
    ----------
    requests
        In the order of the batch.
    counts
        Tokens that each of them is fed.
    copies
        Per layer group, blocks to copy before anything is written.
    misfits
        Requests that the pool cannot hold even alone.
    """

    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    copies: list[list[Copy]] = field(default_factory=list)
    misfits: list[Request] = field(default_factory=list)


class Scheduler:
    """Queues of waiting and running requests over the block tables of all layer groups.

    Requests are admitted in the order in which they came, each when `Limits.admission` allows it; one that nobody runs
    beside is admitted at once. When the pool is full all the same, the request admitted last gives all its blocks back and
    later computes its tokens again (those of its blocks that the prefix cache still has excepted).

    One lane asks for `plan`, two ask for `plan_prompts` and `plan_decodes`: the same requests in the same order. A request
    whose prompt is complete is in neither until `hand_over`.

    Parameters
    ----------
    limits
        Sizes.
    tables
        Block tables, one per layer group.
    policy
        What the runtime compresses with.
    compressed
        Per layer group whether the policy acts on it; on all of them if left out.
    lanes
        1 or 2.
    rotary
        Where frequencies change with the length: only sequences with the same ones share a prefix.
    """

    def __init__(
        self,
        limits: Limits,
        tables: Sequence[BlockTables],
        *,
        policy: Policy | None = None,
        compressed: Sequence[bool] | None = None,
        lanes: int = 1,
        rotary: SequenceRotary | None = None,
    ) -> None:
        self._rotary = rotary
        self._limits = limits
        self._lanes = lanes
        self._tables = tables
        self._acts: Acts = None if policy is None else policy.acts
        #: what running requests will still take, per layer group
        self.reservations = [
            Reservation(table, limits.max_num_batched_tokens, policy if acts else None)
            for table, acts in zip(tables, compressed or [True] * len(tables), strict=True)
        ]
        #: called with the row of a sequence whose blocks were given back
        self.on_release: Callable[[int], None] = lambda row: None
        #: whether the policy is expected to leave a waiting request's prompt as it is
        self.expects_spared: Callable[[Request], bool] = lambda request: False
        #: tokens behind the prompt of a waiting request that are expected to be fed before it is merged
        self.expects_merged_after: Callable[[Request], int] = lambda request: 0
        self._rows = list(range(limits.max_num_seqs))[::-1]
        self.waiting: deque[Request] = deque()
        #: in order of admission
        self.running: list[Request] = []
        self.preemptions = 0
        #: tokens that the prefix cache gave to requests admitted first, and to preempted ones that were resumed
        self.prefix_hits = 0
        self.resumed_hits = 0
        self._preempted = False
        #: whether full blocks are made findable
        self.publishes = limits.prefix_caching

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out of its queue, and its blocks back."""
        if request.row >= 0:
            self.running.remove(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def take_row(self, request: Request) -> None:
        """Let a request run at once, with no blocks yet.

        Raises
        ------
        IndexError
            If ``max_num_seqs`` requests run already.
        """
        request.row = self._rows.pop()
        if request.admitted_at is None:
            request.admitted_at = time.perf_counter()
        request.status = Status.RUNNING
        self.running.append(request)
        for reservation in self.reservations:
            reservation.enter(request)

    def settle(self, request: Request, *, spared: bool, merged_after: int) -> None:
        """Know now what the policy does to a running request's prompt, and when: what it will take depends on it."""
        if (spared, merged_after) != (request.spared, request.merged_after):
            request.spared, request.merged_after = spared, merged_after
            self.reserve_anew(request)

    def reserve_anew(self, request: Request) -> None:
        """Count a running request anew: what it holds from now on is not what it would have held."""
        for reservation in self.reservations:
            reservation.enter(request)

    def hand_over(self, request: Request) -> None:
        """Let the decode lane have a request whose prompt is complete."""
        request.handed_over = True

    def preempt_for(self, request: Request) -> bool:
        """Preempt the request admitted last that is not ``request``; return whether there was one."""
        for victim in reversed(self.running):
            if victim is not request:
                self._preempt(victim)
                return True
        return False

    def plan(self) -> StepPlan:
        """Decide the next step and reserve its blocks. The plan is empty if nothing is left to do."""
        plan = StepPlan(copies=[[] for _ in self._tables])
        self._preempted = False
        budget = self._limits.max_num_batched_tokens
        while not plan.requests and (self.running or self.waiting):
            if self._limits.prefill_first:
                self._feed_prompts(plan, budget)
                self._admit(plan, budget - sum(plan.counts))
                if not plan.requests:
                    self._decode(plan, self.running)
            else:
                self._decode(plan, self.running)
                self._feed_prompts(plan, budget - sum(plan.counts))
                self._admit(plan, budget - sum(plan.counts))
            if not plan.requests and not self._wait_for_blocks() and not self._make_progress(plan):
                break
        return plan

    def plan_prompts(self, budget: int) -> StepPlan:
        """Decide the next step of the prompt lane and reserve its blocks: at most ``budget`` tokens of prompts.

        Empty if no prompt can be computed now. Requests whose last token is still under way from the decode lane that they
        were taken from are not admitted yet.
        """
        plan = StepPlan(copies=[[] for _ in self._tables])
        if not self.running:
            # whoever took the blocks has given them back
            self._preempted = False
        while not plan.requests and (self.running or self.waiting):
            left = budget
            for request in self.running:
                if left > 0 and request.computed < request.prefill:
                    left -= self._feed(request, plan, left)
            self._admit(plan, left)
            # what decodes, or waits for its hand-over, gives its blocks back one day; prompts that wait for each other do not
            if not self.running or any(request.computed >= request.prefill for request in self.running):
                break
            if not plan.requests and not self._wait_for_blocks() and not self._make_progress(plan):
                break
        # a decode step that took somebody's blocks keeps him out of one step, not of all
        self._preempted = False
        return plan

    def plan_decodes(self) -> StepPlan:
        """Decide the next step of the decode lane and reserve its blocks: a token of every request handed over.

        Empty if there is none whose last token is known or under way.
        """
        plan = StepPlan(copies=[[] for _ in self._tables])
        handed = [request for request in self.running if request.handed_over]
        self._decode(plan, handed)
        if not plan.requests and len(self.running) == 1 and self.running[0].handed_over and self._ready(self.running):
            self._make_progress(plan)
        return plan

    def promised(self) -> list[int]:
        """Blocks that running requests hold at a time from now on at most, per layer group, if nobody else is admitted."""
        prompting, steps = self._outlook()
        return [reservation.promised(self.running, prompting, steps) for reservation in self.reservations]

    def publish(self, request: Request) -> None:
        """Make the full blocks that steps completed findable by their tokens."""
        if not self.publishes or request.compressed:
            return
        size = self._limits.block_size
        last = request.prompt_length if self._acts == "decode" else request.computed
        full = min(request.computed, last) // size
        if full <= request.published:
            return
        self._extend_digests(request, full)
        for table in self._tables:
            gone = int(table.dropped[request.row]) // size
            for index in range(request.published, full):
                table.publish(request.row, index - gone, request.digests[index])
        request.published = full

    def _ready(self, requests: Sequence[Request]) -> list[Request]:
        """Those of which the next step feeds one token: all earlier ones are computed."""
        if self._acts == "decode":
            return [
                r for r in requests if r.computed + 1 == len(r.tokens) or r.prompt_length <= r.computed < len(r.tokens)
            ]
        return [r for r in requests if r.computed + 1 == len(r.tokens)]

    def _decode(self, plan: StepPlan, requests: Sequence[Request]) -> None:
        """Plan one token for every one of ``requests`` that is ready for it."""
        ready = self._ready(requests)
        if not ready:
            return
        rows = np.array([request.row for request in ready])
        for table in self._tables:
            if table.window is not None:
                positions = np.array([request.computed for request in ready])
                for row, position in table.expiring(rows, positions):
                    table.expire(row, position)
        short = [table.short(rows) for table in self._tables]
        if all(len(lacking) <= table.pool.free for table, lacking in zip(self._tables, short, strict=True)):
            for table, lacking, copies in zip(self._tables, short, plan.copies, strict=True):
                if len(lacking):
                    copies += table.reserve_next(lacking)
        else:
            ready = [request for request in ready if self._fit_next(request, plan)]
        plan.requests += ready
        plan.counts += [1] * len(ready)

    def _fit_next(self, request: Request, plan: StepPlan) -> bool:
        """Reserve one token's room, at the cost of requests admitted later; whether the request still runs then."""
        while request.row >= 0:
            if self._room(request, 1) >= 1:
                self._reserve(request, 1, plan)
                return True
            if self._wait_for_blocks():
                continue
            if len(self.running) == 1:
                return False
            self._preempt(self.running[-1])
        return False

    def _feed_prompts(self, plan: StepPlan, budget: int) -> None:
        """Plan chunks of admitted requests that have more than one token to go."""
        if len(plan.requests) == len(self.running):
            return
        planned = set(map(id, plan.requests))
        for request in self.running:
            if budget < 1:
                return
            if id(request) in planned or (self._limits.prefill_first and request.pending == 1):
                continue
            budget -= self._feed(request, plan, budget)

    def _feed(self, request: Request, plan: StepPlan, budget: int) -> int:
        """Plan a chunk of one request, as much as budget and pool allow; return its tokens."""
        for table in self._tables:
            table.expire(request.row, request.computed)
        count = min(request.chunk(self._acts), budget)
        count = min(count, self._room(request, count))
        if count < 1:
            return 0
        self._reserve(request, count, plan)
        plan.requests.append(request)
        plan.counts.append(count)
        return count

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting requests while budget, rows and blocks last; not in a step that preempted."""
        while self.waiting and self._rows and budget > 0 and not self._preempted:
            request = self.waiting[0]
            if self._lanes == 2 and request.in_flight:
                # only the lane that it was taken from could fill in the token
                return
            found = self._find_prefix(request)
            request.prefill = request.prompt_length if self._acts == "decode" else len(request.tokens)
            request.spared = self.expects_spared(request)
            request.merged_after = 0 if request.spared else self.expects_merged_after(request)
            if self.running and not self._has_room(request, found):
                return
            self.waiting.popleft()
            self.take_row(request)
            for table, blocks in zip(self._tables, found, strict=True):
                table.adopt(request.row, blocks)
            request.computed = len(found[0]) * self._limits.block_size
            if request.preemptions:
                self.resumed_hits += request.computed
            else:
                self.prefix_hits += request.computed
                request.prefix_hits = request.computed
            request.published = len(found[0])
            budget -= self._feed(request, plan, budget)

    def _outlook(self, more: int = 0) -> tuple[list[bool], int | None]:
        """Which running requests do not decode yet, and in how many steps they all do, ``more`` prompt tokens behind them.

        The number is the most that it can be, ``None`` if that is unknown.
        """
        if self._lanes == 2:
            return [not request.handed_over for request in self.running], None
        prompting = [request.computed < request.prefill for request in self.running]
        if self._limits.prefill_first:
            # whoever has one token to go is fed it beside the decoding ones
            return prompting, 1
        left = self._limits.max_num_batched_tokens - len(self.running) - bool(more)
        pending = sum(max(request.prefill - request.computed, 0) for request in self.running) + more
        # in the step that admits it a request gets what is left of the budget, perhaps nothing
        return prompting, 1 - (-pending // left) if left > 0 else None

    def _has_room(self, request: Request, found: list[list[int]]) -> bool:
        """Whether a waiting request may run beside those that do (`Limits.admission`)."""
        if self._limits.admission == "reserve":
            prompting, steps = self._outlook(request.prefill)
            return all(
                reservation.fits(request, blocks, self.running, prompting, steps)
                for reservation, blocks in zip(self.reservations, found, strict=True)
            )
        # half a prompt helps nobody
        size = self._limits.block_size
        for table, blocks in zip(self._tables, found, strict=True):
            tokens = len(request.tokens)
            if table.window is not None:
                # what a chunk and the window before it hold at a time, with sinks and a block cut at either end
                tokens = min(tokens, table.window + table.sinks + self._limits.max_num_batched_tokens + 2 * size)
            revived = sum(table.pool.is_free(block) for block in blocks)
            if -(-tokens // size) - len(blocks) + revived > table.pool.free:
                return False
        return True

    def _wait_for_blocks(self) -> bool:
        """Wait for blocks that work on another stream holds back, before anybody has to go for them; whether there were any."""
        return any(table.pool.wait() for table in self._tables)

    def _make_progress(self, plan: StepPlan) -> bool:
        """Nobody could be planned: let the last one go, or give up the only one. Whether planning again makes sense."""
        if len(self.running) > 1:
            self._preempt(self.running[-1])
            # the others now go first, and the one just preempted must not come straight back
            return True
        if self.running:
            request = self.running[0]
            self.remove(request)
            plan.misfits.append(request)
        self._preempted = False
        return True

    def _room(self, request: Request, wanted: int) -> int:
        """Tokens, at most ``wanted``, for which every layer group has blocks."""
        room = wanted
        for table in self._tables:
            lacking = table.missing(request.row, room) - table.pool.free
            if lacking > 0:
                slack = -(int(table.lengths[request.row]) + room) % self._limits.block_size
                room -= lacking * self._limits.block_size - slack
            # a shared last block has to be copied whatever the number of tokens
            if room > 0 and table.missing(request.row, room) > table.pool.free:
                return 0
        return max(room, 0)

    def _reserve(self, request: Request, count: int, plan: StepPlan) -> None:
        for table, copies in zip(self._tables, plan.copies, strict=True):
            copies += table.reserve(request.row, count)

    def _find_prefix(self, request: Request) -> list[list[int]]:
        """Published blocks of the first tokens, per layer group: as many as every group has."""
        if not self.publishes:
            return [[] for _ in self._tables]
        wanted = request.findable(self._acts) // self._limits.block_size
        found: list[list[int]] = [[] for _ in self._tables]
        for index in range(wanted):
            # no further than needed: the rest is hashed when it is published, behind the step's launch
            self._extend_digests(request, index + 1)
            blocks = [table.pool.find(request.digests[index]) for table in self._tables]
            if any(block is None for block in blocks):
                break
            for held, block in zip(found, blocks, strict=True):
                assert block is not None
                held.append(block)
        return found

    def _extend_digests(self, request: Request, count: int) -> None:
        size, known = self._limits.block_size, request.digests
        root = ROOT if self._rotary is None else chain(ROOT, [self._rotary.row(request.together)])
        while len(known) < count:
            at = len(known) * size
            parent = known[-1] if known else root
            known.append(chain(parent, request.tokens[at : at + size], request.images_digest(at, at + size)))

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.status = Status.PREEMPTED
        request.preemptions += 1
        self.preemptions += 1
        self._preempted = True
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        request.stored = [int(table.lengths[request.row]) for table in self._tables]
        for table in self._tables:
            table.release(request.row)
        self.on_release(request.row)
        self._rows.append(request.row)
        request.row = -1
        request.computed = request.published = 0
        request.compressed = request.handed_over = False
