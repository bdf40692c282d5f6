"""Block pool and block tables against a plain model of what every block holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hand_fence import HandFence
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvsuite.nanovllm.block_pool import ROOT, BlockPool, PoolFullError, chain
from kvsuite.nanovllm.block_table import BlockTables
from kvsuite.nanovllm.device_tables import DeviceTables

SIZE, BLOCKS, ROWS = 4, 14, 5


class Blocks(RuleBasedStateMachine):
    """Sequences of tokens over a small pool. ``memory`` is what the slots hold, ``texts`` what each sequence must read."""

    window: int | None = None
    sinks = 0

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.tables = BlockTables(self.pool, rows=ROWS, blocks_per_row=BLOCKS, window=self.window, sinks=self.sinks)
        self.on_device = DeviceTables(self.tables, torch.device("cpu"))
        self.memory: dict[int, int] = {}
        self.texts: dict[int, list[int]] = {}
        self.seen: dict[int, int] = {}
        self.whole: dict[int, list[int]] = {}
        self.found: dict[bytes, list[int]] = {}

    def rows(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)))

    @property
    def room(self) -> int:
        """Blocks that nobody refers to, whatever still reads them."""
        return self.pool.free + self.pool.held

    def held_back(self, copies: list[tuple[int, int]]) -> int:
        """Copied blocks that nobody refers to any more."""
        return sum(self.pool.references(source) == 0 for source, _ in copies)

    def write(self, slots: list[int], tokens: list[int]) -> None:
        for slot, token in zip(slots, tokens, strict=True):
            block = slot // SIZE
            assert block != 0
            assert self.pool.references(block) == 1, "a shared block is written"
            assert all(self.pool.find(digest) != block for digest in self.found), "a findable block is written"
            self.memory[slot] = token

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        held = {(target, i): self.memory.get(source * SIZE + i) for source, target in pairs for i in range(SIZE)}
        for (target, i), token in held.items():
            if token is not None:
                self.memory[target * SIZE + i] = token

    def append_tokens(self, row: int, tokens: list[int]) -> None:
        room, missing = self.room, self.tables.missing(row, len(tokens))
        before = self.tables.row_blocks(row)
        try:
            copies = self.tables.reserve(row, len(tokens))
        except PoolFullError:
            assert missing > room
            assert self.tables.row_blocks(row) == before
            assert self.room == room
            return
        assert self.room == room - missing + self.held_back(copies)
        self.copy(copies)
        self.write(self.tables.slots(row, len(tokens)).tolist(), tokens)
        self.tables.commit(row, len(tokens))
        self.texts[row] += tokens
        if self.whole.get(row) is not None:
            self.whole[row] += tokens
        self.seen[row] += len(tokens)
        self.publish(row)

    def publish(self, row: int) -> None:
        """Full blocks become findable as soon as there are any, until the sequence is compressed."""
        whole = self.whole.get(row)
        if whole is None or self.tables.dropped[row]:
            return
        digest = ROOT
        for index in range(len(whole) // SIZE):
            tokens = whole[index * SIZE : index * SIZE + SIZE]
            digest = chain(digest, tokens)
            self.tables.publish(row, index, digest)
            self.found[digest] = tokens

    @precondition(lambda self: len(self.texts) < ROWS)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=11))
    def add(self, tokens: list[int]) -> None:
        """A new sequence, which begins with the blocks of an equal text if there are any."""
        row = next(row for row in range(ROWS) if row not in self.texts)
        blocks: list[int] = []
        digest = ROOT
        for at in range(0, len(tokens) // SIZE * SIZE, SIZE):
            digest = chain(digest, tokens[at : at + SIZE])
            block = self.pool.find(digest)
            if block is None:
                break
            blocks.append(block)
        hit = len(blocks) * SIZE
        self.tables.adopt(row, blocks)
        self.texts[row], self.whole[row], self.seen[row] = tokens[:hit], tokens[:hit], hit
        if tokens[hit:]:
            self.append_tokens(row, tokens[hit:])

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def append(self, data: st.DataObject, tokens: list[int]) -> None:
        self.append_tokens(self.rows(data), tokens)

    @precondition(lambda self: self.texts and len(self.texts) < ROWS)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        row = self.rows(data)
        target = next(other for other in range(ROWS) if other not in self.texts)
        room = self.room
        self.tables.fork(row, target)
        assert self.room == room
        self.texts[target], self.seen[target] = list(self.texts[row]), self.seen[row]
        if self.whole.get(row) is not None:
            self.whole[target] = list(self.whole[row])

    @rule()
    def follow(self) -> None:
        """The copy on the device takes over what has changed since it last did, and nothing else."""
        places, blocks = (torch.from_numpy(part) for part in self.on_device.changes())
        self.on_device.update(places, blocks)
        rows = torch.arange(ROWS)
        assert self.on_device.pick(rows, BLOCKS).gather().tolist() == self.tables.table.tolist()
        assert not len(self.tables.changes())

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One token for several sequences at once."""
        rows = sorted(data.draw(st.sets(st.sampled_from(sorted(self.texts)), min_size=1)))
        short = self.tables.short(np.array(rows))
        if len(short) > self.pool.free:
            return
        if len(short):
            self.copy(self.tables.reserve_next(short))
        token = data.draw(st.integers(0, 1))
        for row, slot in zip(rows, self.tables.next_slots(np.array(rows)).tolist(), strict=True):
            self.write([slot], [token])
            self.texts[row] = [*self.texts[row], token]
            if self.whole.get(row) is not None:
                self.whole[row] = [*self.whole[row], token]
            self.seen[row] += 1
        self.tables.commit(np.array(rows), 1)
        for row in rows:
            self.publish(row)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """Also what preemption does."""
        row = self.rows(data)
        mine = [block for block in self.tables.row_blocks(row) if self.pool.references(block) == 1]
        room = self.room
        self.tables.release(row)
        assert self.room == room + len(mine)
        del self.texts[row], self.seen[row]
        self.whole.pop(row, None)

    @precondition(lambda self: self.texts and self.window is None)
    @rule(data=st.data())
    def compress(self, data: st.DataObject) -> None:
        row = self.rows(data)
        text = self.texts[row]
        if not text:
            return
        keep = sorted(data.draw(st.sets(st.sampled_from(range(len(text))), min_size=1)))
        kept = [self.memory[slot] for slot in self.tables.stored_slots(row)[keep].tolist()]
        held, room = self.tables.row_blocks(row), self.room
        try:
            self.tables.replace(row, len(keep))
        except PoolFullError:
            assert (self.tables.row_blocks(row), self.room) == (held, room)
            return
        self.write(self.tables.stored_slots(row).tolist(), kept)
        self.texts[row] = [text[i] for i in keep]
        self.whole.pop(row, None)

    @precondition(lambda self: self.texts and self.window is None)
    @rule(data=st.data(), then=st.lists(st.integers(0, 1), max_size=2))
    def evict_one(self, data: st.DataObject, then: list[int]) -> None:
        """The last token takes the victim's place; mostly another one follows."""
        row = self.rows(data)
        text = self.texts[row]
        if len(text) < 2:
            return
        victim = data.draw(st.integers(0, len(text) - 1))
        sole = bool(self.tables.sole[row])
        try:
            # blocks that are a row's alone may be written as they are
            self.copy([] if sole else self.tables.own(row, victim // SIZE))
        except PoolFullError:
            return
        if not sole:
            self.tables.note_sole(row)
        slots = self.tables.stored_slots(row).tolist()
        self.write([slots[victim]], [self.memory[slots[-1]]])
        self.tables.drop_last(np.array([row]))
        text[victim] = text[-1]
        text.pop()
        self.whole.pop(row, None)
        if then:
            self.append_tokens(row, then)

    @precondition(lambda self: self.texts and self.window is not None)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        row = self.rows(data)
        assert self.window is not None
        positions = self.positions(row)
        self.tables.expire(row, self.seen[row])
        left = set(self.positions(row))
        visible = {p for p in positions if p < self.sinks or p > self.seen[row] - self.window}
        assert visible <= left
        # what is left beside the visible shares a block with a visible one, with a sink, or with a place yet to be filled
        for p in left - visible:
            block = range(p // SIZE * SIZE, p // SIZE * SIZE + SIZE)
            assert any(q in visible or q < self.sinks or q >= self.seen[row] for q in block)
        at = dict(zip(positions, self.texts[row], strict=True))
        self.texts[row] = [at[p] for p in self.positions(row)]

    def positions(self, row: int) -> list[int]:
        head = -(-self.sinks // SIZE) * SIZE
        stored, gone = int(self.tables.lengths[row]), int(self.tables.dropped[row])
        return [i if i < head else i + gone for i in range(stored)]

    @invariant()
    def counts_are_exact(self) -> None:
        held = [block for row in self.texts for block in self.tables.row_blocks(row)]
        for block in range(1, BLOCKS + 1):
            assert self.pool.references(block) == held.count(block)
        assert self.pool.used == len(set(held))
        assert self.room == BLOCKS - len(set(held))
        assert 0 not in held
        for row in range(ROWS):
            blocks = self.tables.row_blocks(row)
            assert len(set(blocks)) == len(blocks)
            assert not self.tables.table[row, len(blocks) :].any()
            assert int(self.tables.lengths[row]) <= len(blocks) * SIZE

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for row, text in self.texts.items():
            assert [self.memory[slot] for slot in self.tables.stored_slots(row).tolist()] == text

    @invariant()
    def what_is_found_is_what_was_published(self) -> None:
        present = {digest: self.pool.find(digest) for digest in self.found}
        for digest, block in present.items():
            if block is not None:
                assert [self.memory[block * SIZE + i] for i in range(SIZE)] == self.found[digest]
        assert self.pool.published == sum(block is not None for block in present.values())
        for row in np.flatnonzero(self.tables.sole).tolist():
            blocks = self.tables.row_blocks(row)
            assert all(map(self.pool.exclusive, blocks))
            assert not set(blocks) & set(present.values())

    def teardown(self) -> None:
        for row in list(self.texts):
            self.tables.release(row)
        assert self.room == BLOCKS
        assert sorted(self.pool.allocate(BLOCKS)) == list(range(1, BLOCKS + 1))


class WindowedBlocks(Blocks):
    window = 6
    sinks = 3


class FencedBlocks(Blocks):
    """Rows whose blocks work on other streams still reads when they give them back: until its fence has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.fences: dict[int, HandFence] = {}
        #: slots that the work before a fence has yet to read
        self.reads: dict[HandFence, set[int]] = {}
        self.tables.fence_of = self.fences.get
        release = self.pool.release

        def noted(blocks: list[int], after: HandFence | None = None) -> None:
            if after is not None and not after.over:
                self.reads.setdefault(after, set()).update(block * SIZE + i for block in blocks for i in range(SIZE))
            release(blocks, after)

        self.pool.release = noted  # type: ignore[assignment, method-assign]

    @rule(row=st.integers(0, ROWS - 1), number=st.none() | st.integers(0, 2))
    def read_by_others(self, row: int, number: int | None) -> None:
        """Another stream works on what a row holds, alone or with other rows; or none does."""
        open_fences = [fence for fence in self.reads if not fence.over]
        self.fences.pop(row, None)
        if number is not None:
            self.fences[row] = open_fences[number] if number < len(open_fences) else HandFence()

    @precondition(lambda self: self.reads)
    @rule(data=st.data())
    def pass_fence(self, data: st.DataObject) -> None:
        """Streams finish in any order."""
        data.draw(st.sampled_from(list(self.reads))).let_pass()

    def write(self, slots: list[int], tokens: list[int]) -> None:
        super().write(slots, tokens)
        for fence, read in self.reads.items():
            assert fence.over or not read & set(slots), "a block is written that others still read"


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=50, stateful_step_count=40)
TestWindowedBlocks = WindowedBlocks.TestCase
TestWindowedBlocks.settings = settings(max_examples=25, stateful_step_count=40)
TestFencedBlocks = FencedBlocks.TestCase
TestFencedBlocks.settings = settings(max_examples=40, stateful_step_count=40)


def test_a_block_that_is_still_read_is_free_only_when_its_fence_has_passed() -> None:
    pool = BlockPool(3, SIZE)
    read, other = pool.allocate(2)
    fence = HandFence()
    pool.release([read], after=fence)
    assert (pool.free, pool.held, pool.used) == (1, 1, 1)
    assert pool.allocate(1) != [read]
    with pytest.raises(PoolFullError):
        pool.allocate(2)
    assert fence.waits == 0, "waited although it could not help"
    fence.let_pass()
    assert (pool.free, pool.held) == (1, 0)
    pool.release([other], after=fence)
    assert pool.free == 2


def test_who_lacks_blocks_waits_for_the_oldest_fences() -> None:
    pool = BlockPool(3, SIZE)
    first, second, third = pool.allocate(3)
    fences = [HandFence() for _ in range(3)]
    for block, fence in zip((second, first, third), fences, strict=True):
        pool.release([block], after=fence)
    assert sorted(pool.allocate(2)) == [first, second]
    assert [fence.waits for fence in fences] == [1, 1, 0]


def test_a_block_waits_for_all_who_read_it() -> None:
    pool = BlockPool(1, SIZE)
    [block] = pool.allocate(1)
    pool.share(block)
    pool.share(block)
    early, late = HandFence(), HandFence()
    pool.release([block], after=late)
    pool.release([block], after=early)
    early.let_pass()
    assert not pool.exclusive(block)
    pool.release([block])
    assert pool.free == 0
    late.let_pass()
    assert pool.free == 1


def test_a_held_block_is_found_by_its_tokens_and_still_held_after_its_finder() -> None:
    pool = BlockPool(1, SIZE)
    [block] = pool.allocate(1)
    pool.publish(block, b"text")
    fence = HandFence()
    pool.release([block], after=fence)
    assert pool.find(b"text") == block
    pool.share(block)
    assert not pool.exclusive(block)
    pool.release([block])
    assert (pool.free, pool.held) == (0, 1)
    fence.let_pass()
    assert pool.free == 1
    assert pool.find(b"text") == block


def test_compressing_in_a_full_pool_takes_blocks_of_its_own_and_none_that_others_read() -> None:
    pool = BlockPool(3, SIZE)
    tables = BlockTables(pool, rows=2, blocks_per_row=3)
    tables.reserve(0, SIZE)
    tables.commit(0, SIZE)
    tables.fork(0, 1)
    [shared] = tables.row_blocks(0)
    tables.reserve(0, 2 * SIZE)
    tables.commit(0, 2 * SIZE)
    reader, mover = HandFence(), HandFence()
    tables.fence_of = lambda row: reader
    tables.release(1)
    tables.fence_of = lambda row: mover
    tables.replace(0, 2 * SIZE)
    assert shared not in tables.row_blocks(0)
    assert (pool.free, pool.held) == (0, 1)
    mover.let_pass()
    assert pool.free == 0
    reader.let_pass()
    assert pool.free == 1


def test_the_last_holder_copies_a_block_that_one_who_left_still_reads() -> None:
    pool = BlockPool(5, SIZE)
    tables = BlockTables(pool, rows=2, blocks_per_row=4)
    tables.reserve(0, SIZE + 1)
    tables.commit(0, SIZE + 1)
    tables.fork(0, 1)
    first, last = tables.row_blocks(0)
    fence = HandFence()
    tables.fence_of = lambda row: fence if row == 1 else None
    tables.release(1)
    [(source, copy)] = tables.reserve(0, 1)
    assert source == last
    assert tables.row_blocks(0) == [first, copy]
    [(source, _)] = tables.own(0, 0)
    assert source == first
    fence.let_pass()
    assert pool.free == 3
    assert tables.own(0, 0) == []


def test_a_block_cannot_be_released_twice() -> None:
    pool = BlockPool(3, SIZE)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="not in use"):
        pool.release(blocks)
    assert pool.free == 3


def test_a_free_block_without_content_cannot_be_shared() -> None:
    with pytest.raises(RuntimeError, match="holds nothing"):
        BlockPool(3, SIZE).share(1)


def test_findable_blocks_are_reused_last_and_the_longest_free_first() -> None:
    pool = BlockPool(5, SIZE)
    first, second, third = pool.allocate(3)
    pool.publish(first, b"first")
    pool.publish(second, b"second")
    pool.release([second])
    pool.release([first, third])
    assert [pool.allocate(1)[0] for _ in range(5)][-2:] == [second, first]
    assert pool.find(b"first") is None


def test_the_start_of_a_text_outlives_its_end() -> None:
    pool = BlockPool(3, SIZE)
    blocks = pool.allocate(3)
    for number, block in enumerate(blocks):
        pool.publish(block, bytes([number]))
    pool.release(blocks)
    pool.allocate(2)
    assert pool.find(bytes([0])) == blocks[0]


def test_a_digest_names_its_tokens_and_all_before_them() -> None:
    assert chain(chain(ROOT, [1, 2]), [3, 4]) != chain(chain(ROOT, [1, 5]), [3, 4])
    assert chain(ROOT, [1, 23]) != chain(ROOT, [12, 3])


def test_a_findable_last_block_is_not_written_after_tokens_were_dropped_from_it() -> None:
    pool = BlockPool(4, SIZE)
    tables = BlockTables(pool, rows=2, blocks_per_row=4)
    tables.reserve(0, 2 * SIZE)
    tables.commit(0, 2 * SIZE)
    last = tables.row_blocks(0)[-1]
    tables.publish(0, 1, b"text")
    tables.shrink(0, 2 * SIZE - 1)
    assert pool.find(b"text") == last
    assert tables.reserve(0, 1) == []
    assert pool.find(b"text") is None


def test_a_shared_last_block_is_copied_after_tokens_were_dropped_from_it() -> None:
    pool = BlockPool(4, SIZE)
    tables = BlockTables(pool, rows=2, blocks_per_row=4)
    tables.reserve(0, 2 * SIZE)
    tables.commit(0, 2 * SIZE)
    tables.fork(0, 1)
    shared = tables.row_blocks(0)
    tables.shrink(0, 2 * SIZE - 1)
    assert tables.short(np.array([0, 1])).tolist() == [0, 1]
    [(source, target)] = tables.reserve(0, 1)
    assert source == shared[1]
    assert tables.row_blocks(0) == [shared[0], target]
    assert tables.row_blocks(1) == shared


class PassingFence(HandFence):
    """A device's event: it passes by itself, between two looks at it."""

    def passed(self) -> bool:
        before, self.over = self.over, True
        return before


def test_a_fence_that_passes_while_room_is_reserved_costs_no_block() -> None:
    tables = BlockTables(BlockPool(8, SIZE), rows=2, blocks_per_row=4)
    fence = PassingFence()
    tables.reserve(0, SIZE + 1)
    tables.commit(0, SIZE + 1)
    tables.fork(0, 1)
    tables.fence_of = lambda row: fence
    tables.release(0)
    fence.over = False
    # its tail has to be copied, or has not: in either case there is room for what was asked
    tables.reserve(1, 2 * SIZE)
    assert int(tables.blocks[1]) * SIZE >= 3 * SIZE + 1
    assert 0 not in tables.row_blocks(1)
