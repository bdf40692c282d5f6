"""Policies of every token on blocks against plain lists of tokens, after any sequence of append, fork, choice by hand, end."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvsuite.compression import get_policy
from kvsuite.compression.base import Policy
from kvsuite.nanovllm.block_table import tables_for
from kvsuite.nanovllm.decode_eviction import Decided, DecodeEviction
from kvsuite.nanovllm.groups import LayerGroup
from kvsuite.nanovllm.kv_pool import KVPool
from kvsuite.nanovllm.limits import Limits

ROWS, HEADS, WIDTH, SIZE, STAYS = 4, 2, 16, 4, 6
#: tokens of a head: position, and norm of its key
Tokens = list[tuple[int, int]]


class OldestBehindSinks(RuleBasedStateMachine):
    """Every token's value says its position, and its key's norm is a number of its own in each head."""

    policy: Policy = get_policy("streaming_llm", start_size=2, recent_size=STAYS - 2)

    def __init__(self) -> None:
        super().__init__()
        group = LayerGroup((0,), HEADS, WIDTH, compressed=True)
        limits = Limits(max_model_len=200, max_num_seqs=ROWS, num_blocks=60, block_size=SIZE)
        self.pool = KVPool(group, num_blocks=60, block_size=SIZE, device=torch.device("cpu"), dtype=torch.float32)
        self.tables = tables_for(group, limits, 60)
        self.eviction = DecodeEviction(self.policy, group, self.tables, self.pool)
        self.tokens: dict[int, list[Tokens]] = {}
        self.seen: dict[int, int] = {}
        self.random = np.random.default_rng(0)

    def victim(self, head: Tokens) -> tuple[int, int]:
        return sorted(head)[2]

    def write(self, row: int, count: int) -> None:
        self.pool.copy_blocks(self.tables.reserve(row, count))
        for slot in self.tables.slots(row, count).tolist():
            position = self.seen[row]
            for head, own in enumerate(self.tokens[row]):
                norm = int(self.random.integers(1, 1 << 20))
                own.append((position, norm))
                place = self.pool.keys[0, slot // SIZE, slot % SIZE, head]
                place.zero_()
                place[0] = norm
                self.pool.values[0, slot // SIZE, slot % SIZE, head] = position
            self.seen[row] += 1
        self.tables.commit(row, count)

    def act(self, rows: list[int], *, prompt: bool = False) -> None:
        """As `kvsuite.nanovllm.compression_stage.CompressionStage` has it."""
        every, seen = np.array(rows), np.array([self.seen[row] for row in rows])
        steady = self.eviction.steady(every)
        if steady.any():
            self.eviction.go_on(every[steady], seen[steady])
        decided: Iterable[Decided] = self.eviction.decide(every[~steady], seen[~steady], prompt=prompt)
        for one in decided:
            for _, change in self.eviction.apply(one):
                change()
        for row in rows:
            for head in self.tokens[row]:
                while len(head) > STAYS:
                    head.remove(self.victim(head))

    @property
    def free(self) -> int:
        return min(set(range(ROWS)) - set(self.tokens))

    def a_row(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.tokens)))

    @precondition(lambda self: len(self.tokens) < ROWS)
    @rule(count=st.integers(1, 2 * STAYS))
    def add(self, count: int) -> None:
        row = self.free
        self.tokens[row], self.seen[row] = [[] for _ in range(HEADS)], 0
        for _ in range(count):
            self.write(row, 1)
            assert not self.eviction.steady(np.array([row])).any(), "its prompt is not complete"
        self.eviction.enter(row)
        self.act([row], prompt=True)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), steps=st.integers(1, 9))
    def append(self, data: st.DataObject, steps: int) -> None:
        """A token after another for several sequences at once."""
        self.append_to(sorted(data.draw(st.sets(st.sampled_from(sorted(self.tokens)), min_size=1))), steps)

    def append_to(self, rows: list[int], steps: int) -> None:
        for _ in range(steps):
            for row in rows:
                self.write(row, 1)
            self.act(rows)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(2, 4))
    def feed(self, data: st.DataObject, count: int) -> None:
        """Several tokens at once."""
        row = self.a_row(data)
        self.write(row, count)
        self.act([row])

    @precondition(lambda self: 0 < len(self.tokens) < ROWS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.fork_of(self.a_row(data))

    def fork_of(self, row: int) -> None:
        target = self.free
        self.tables.fork(row, target)
        self.eviction.fork(row, target)
        self.tokens[target], self.seen[target] = [list(head) for head in self.tokens[row]], self.seen[row]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        """By hand, the same places for all heads."""
        row = self.a_row(data)
        self.choose_of(row, sorted(data.draw(st.sets(st.integers(0, len(self.tokens[row][0]) - 1), min_size=1))))

    def choose_of(self, row: int, index: list[int]) -> None:
        stored = self.stored(row)
        self.eviction.select(row, torch.tensor(index))()
        self.tokens[row] = [[head[at] for at in index] for head in stored]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        row = self.a_row(data)
        self.tables.release(row)
        self.eviction.leave(row)
        del self.tokens[row], self.seen[row]

    def stored(self, row: int) -> list[Tokens]:
        slots = torch.from_numpy(self.tables.stored_slots(row))
        positions, norms = self.pool.values_of(slots)[0, :, :, 0].int(), self.pool.keys_of(slots)[0, :, :, 0].int()
        return [list(zip(*both, strict=True)) for both in zip(positions.tolist(), norms.tolist(), strict=True)]

    @invariant()
    def what_is_stored_is_what_stays(self) -> None:
        self.check()

    def check(self) -> None:
        for row, heads in self.tokens.items():
            assert [sorted(head) for head in self.stored(row)] == [sorted(head) for head in heads]


class LowestNorms(OldestBehindSinks):
    """Of the older ones those of lowest norm stay."""

    policy = get_policy("fix_size_l2", size=STAYS, keep_ratio=0.34)

    def victim(self, head: Tokens) -> tuple[int, int]:
        protected = int(STAYS * 0.34)
        newest = max(position for position, _ in head)
        return max((each for each in head if each[0] <= newest - protected), key=lambda each: each[1])


@pytest.mark.parametrize("machine", [OldestBehindSinks, LowestNorms])
def test_a_fork_writes_no_block_that_another_one_holds(machine: type[OldestBehindSinks]) -> None:
    found = machine()
    found.add(8)
    found.append_to([0], 3)
    found.fork_of(0)
    found.append_to([0], 8)
    found.check()
    found.append_to([0, 1], 8)
    found.check()


@pytest.mark.parametrize("machine", [OldestBehindSinks, LowestNorms])
def test_what_was_not_asked_for_yet_is_known_after_a_fork_and_a_choice(machine: type[OldestBehindSinks]) -> None:
    found = machine()
    found.add(2)
    found.append_to([0], 2)
    found.fork_of(0)
    found.choose_of(1, [0, 2, 3])
    found.append_to([0, 1], 9)
    found.check()


for _machine in (OldestBehindSinks, LowestNorms):
    _machine.TestCase.settings = settings(max_examples=30, stateful_step_count=20)
TestOldestBehindSinks, TestLowestNorms = OldestBehindSinks.TestCase, LowestNorms.TestCase
