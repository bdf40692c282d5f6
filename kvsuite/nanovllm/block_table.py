"""The blocks of every sequence in one layer group, as arrays that are changed in place and never rebuilt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .block_pool import BlockPool, PoolFullError
from .groups import LayerGroup
from .limits import Limits

if TYPE_CHECKING:
    from .fences import Fence

Copy = tuple[int, int]
Ints = NDArray[np.int64]


class BlockTables:
    """Blocks, lengths and free space of ``rows`` sequences.

    A sequence's stored tokens are numbered ``0 .. length - 1`` in the order of its table; token ``i`` lies in block
    ``table[row, i // block_size]``. Before a token is written, `reserve` gives it a place in a block that no other
    sequence holds and that cannot be found by its tokens.

    Parameters
    ----------
    pool
        Where blocks come from.
    rows
        Sequences at most.
    blocks_per_row
        Blocks of a sequence at most.
    window, sinks
        Sliding window: blocks between the sinks and the window are freed by `expire`.
    """

    def __init__(
        self, pool: BlockPool, *, rows: int, blocks_per_row: int, window: int | None = None, sinks: int = 0
    ) -> None:
        self.pool = pool
        #: what has to pass before the blocks that a row gives back are somebody else's (`BlockPool.release`)
        self.fence_of: Callable[[int], Fence | None] = _no_fence
        self.window = window
        self.sinks = sinks
        self._head = -(-sinks // pool.block_size)
        self.table: NDArray[np.int32] = np.zeros((rows, blocks_per_row), dtype=np.int32)
        self.blocks: Ints = np.zeros(rows, dtype=np.int64)
        self.lengths: Ints = np.zeros(rows, dtype=np.int64)
        self.dropped: Ints = np.zeros(rows, dtype=np.int64)
        # whether the half-full last block was filled with others looking on: after `fork` and `shrink` it may be held by
        # another sequence, or be findable
        self._tail_suspect: NDArray[np.bool_] = np.zeros(rows, dtype=np.bool_)
        #: rows whose blocks surely are nobody else's and cannot be found: they may be written without asking
        self.sole: NDArray[np.bool_] = np.ones(rows, dtype=np.bool_)
        # first entry that changed since `forget_changes`, and the one behind the last, by row
        self._first: Ints = np.full(rows, blocks_per_row, dtype=np.int64)
        self._behind: Ints = np.zeros(rows, dtype=np.int64)

    def row_blocks(self, row: int) -> list[int]:
        """Blocks of a sequence in order."""
        held: list[int] = self.table[row, : self.blocks[row]].tolist()
        return held

    def rows(self, rows: Ints) -> NDArray[np.int32]:
        """The tables of some sequences, as they are now: int32 ``[S, blocks of the longest]``."""
        found: NDArray[np.int32] = self.table[:, : int(self.blocks[rows].max())][rows]
        return found

    def missing(self, row: int, tokens: int) -> int:
        """Blocks that `reserve` would take for ``tokens`` more tokens."""
        return self._lacking(row, tokens) + int(self._copies_tail(row))

    def short(self, rows: Ints) -> Ints:
        """Those of ``rows`` whose next token needs a block."""
        full = self.lengths[rows] == self.blocks[rows] * self.pool.block_size
        lacking: Ints = rows[full | self._tail_suspect[rows]]
        return lacking

    def reserve_next(self, rows: Ints) -> list[Copy]:
        """Make room for one more token in each of ``rows``, all of them `short`; return the blocks to copy.

        Raises
        ------
        PoolFullError
            If the pool lacks blocks; ``rows`` before the one that lacks them have their room then.
        """
        copies: list[Copy] = []
        if self._tail_suspect[rows].any():
            for row in rows.tolist():
                copies += self.reserve(row, 1)
            return copies
        fresh, ends = self.pool.allocate(len(rows)), self.blocks[rows]
        self.table[rows, ends] = fresh
        self.blocks[rows] = ends + 1
        self._note(rows, ends, ends + 1)
        return copies

    def reserve(self, row: int, tokens: int) -> list[Copy]:
        """Make room for ``tokens`` more tokens; return the blocks ``(source, target)`` to copy before they are written.

        Raises
        ------
        PoolFullError
            If the pool lacks blocks; nothing has changed then.
        """
        # asked once: a fence may pass at any moment, and change the answer
        copies_tail = self._copies_tail(row)
        fresh = self.pool.allocate(self._lacking(row, tokens) + int(copies_tail))
        copies: list[Copy] = []
        if self._tail_suspect[row]:
            last = int(self.blocks[row]) - 1
            if copies_tail:
                copies.append(self._swap(row, last, fresh.pop()))
            else:
                self.pool.forget(int(self.table[row, last]))
            self._tail_suspect[row] = False
        self._extend(row, fresh)
        return copies

    def commit(self, row: int | Ints, tokens: int | Ints) -> None:
        """Count tokens that were written into reserved room: of one sequence, or of several different ones."""
        self.lengths[row] += tokens

    def slots(self, row: int, tokens: int) -> Ints:
        """Slots of the next ``tokens`` tokens, int64 ``[tokens]``; their room is reserved."""
        return self.slots_at(row, np.arange(self.lengths[row], self.lengths[row] + tokens))

    def next_slots(self, rows: Ints) -> Ints:
        """Slot of the next token of each of ``rows``; their room is reserved."""
        return self.slots_at(rows, self.lengths[rows])

    def stored_slots(self, row: int) -> Ints:
        """Slots of all stored tokens in table order, int64 ``[length]``."""
        return self.slots_at(row, np.arange(self.lengths[row]))

    def slots_at(self, row: int | Ints, at: Ints) -> Ints:
        """Slots of tokens by their numbers ``[n]`` in a sequence, or each in its own."""
        size = self.pool.block_size
        found: Ints = self.table[row, at // size].astype(np.int64) * size + at % size
        return found

    def adopt(self, row: int, blocks: list[int]) -> None:
        """Begin an empty sequence with full published blocks of another one."""
        if self.blocks[row]:
            raise RuntimeError(f"row {row} holds blocks already")
        for block in blocks:
            self.pool.share(block)
        if blocks:
            self.sole[row] = False
        self._extend(row, blocks)
        self.lengths[row] = len(blocks) * self.pool.block_size

    def fork(self, row: int, target: int) -> None:
        """Let the empty row ``target`` hold what ``row`` holds; whoever writes first copies the half-full last block."""
        if self.blocks[target]:
            raise RuntimeError(f"row {target} holds blocks already")
        held = self.row_blocks(row)
        for block in held:
            self.pool.share(block)
        self._extend(target, held)
        self.lengths[target] = self.lengths[row]
        self.dropped[target] = self.dropped[row]
        self.sole[row] = self.sole[target] = False
        half = int(self.lengths[row]) < len(held) * self.pool.block_size
        self._tail_suspect[row] = self._tail_suspect[target] = half

    def publish(self, row: int, index: int, digest: bytes) -> None:
        """Make the ``index``-th block of a sequence findable by its tokens."""
        self.pool.publish(int(self.table[row, index]), digest)
        self.sole[row] = False

    def own(self, row: int, index: int) -> list[Copy]:
        """Make the ``index``-th block of a sequence writable: no longer findable, and a copy where others hold it.

        Raises
        ------
        PoolFullError
            If a copy is needed and no block is free.
        """
        block = int(self.table[row, index])
        if self.pool.exclusive(block):
            self.pool.forget(block)
            return []
        return [self._swap(row, index, self.pool.allocate(1)[0])]

    def note_sole(self, row: int) -> None:
        """Set `sole` of a row again once all of its blocks are its own and cannot be found."""
        pool = self.pool
        if all(pool.exclusive(block) and not pool.findable(block) for block in self.row_blocks(row)):
            self.sole[row], self._tail_suspect[row] = True, False

    def replace(self, row: int, length: int) -> None:
        """Give the blocks back and take others for ``length`` tokens, which the caller has in his hands.

        Where a fence holds back what is given back, and free blocks do not suffice, the row keeps some of those that are its
        own: whoever moves the tokens is behind all who read them in these.

        Raises
        ------
        PoolFullError
            If the pool lacks blocks even with those that come back; nothing has changed then.
        """
        held = self.row_blocks(row)
        count = -(-length // self.pool.block_size)
        own = [block for block in held if self.pool.exclusive(block)]
        if count > self.pool.free + len(own) and not self.pool.wait_for(count - len(own)):
            raise PoolFullError(f"{count} blocks wanted, {self.pool.free + len(own)} of {self.pool.num_blocks} free")
        fence = self.fence_of(row)
        if fence is None:
            self.pool.release(held)
            blocks = self.pool.allocate(count)
        else:
            fresh = self.pool.allocate(min(count, self.pool.free))
            kept = own[: count - len(fresh)]
            for block in kept:
                self.pool.forget(block)
            self.pool.release([block for block in held if block not in kept], fence)
            blocks = kept + fresh
        self._empty(row)
        self._extend(row, blocks)
        self.lengths[row] = length

    def shrink(self, row: int, length: int) -> None:
        """Drop the last tokens; blocks that hold none of the others are given back."""
        keep = -(-length // self.pool.block_size)
        self._give_back(row, self.row_blocks(row)[keep:])
        self._clear(row, keep)
        self._tail_suspect[row] = length % self.pool.block_size != 0 and not self.sole[row]
        self.blocks[row] = keep
        self.lengths[row] = length

    def drop_last(self, rows: Ints) -> None:
        """Drop the last token of each of ``rows``, all different: `shrink` by one."""
        lengths = self.lengths[rows] - 1
        spare = self.blocks[rows] + lengths // -self.pool.block_size
        if spare.any():
            self._drop_last_blocks(rows[spare == 1])
            for row, length in zip(rows[spare > 1].tolist(), lengths[spare > 1].tolist(), strict=True):
                self.shrink(row, length)
        self.lengths[rows] = lengths
        sole = self.sole[rows]
        # of blocks that are its own none is suspect
        if not sole.all():
            self._tail_suspect[rows] = (lengths % self.pool.block_size != 0) & ~sole

    def _drop_last_blocks(self, rows: Ints) -> None:
        """Give back the last block of each of ``rows``, all different."""
        ends = self.blocks[rows] - 1
        blocks = self.table[rows, ends].tolist()
        self.table[rows, ends] = 0
        self.blocks[rows] = ends
        fences = [] if self.fence_of is _no_fence else [self.fence_of(row) for row in rows.tolist()]
        if any(fence is not None for fence in fences):
            for block, fence in zip(blocks, fences, strict=True):
                self.pool.release([block], fence)
        else:
            # the pool begins with the last
            self.pool.release(blocks[::-1])
        self._note(rows, ends, ends + 1)

    def expiring(self, rows: Ints, positions: Ints) -> list[tuple[int, int]]:
        """Those of ``rows`` with something to `expire` before a token at the position given for each, and that position."""
        if self.window is None:
            return []
        some = self._expired(rows, positions) > 0
        return list(zip(rows[some].tolist(), positions[some].tolist(), strict=True))

    def expire(self, row: int, position: int) -> int:
        """Free the blocks that the token at ``position`` and all later ones cannot see; return how many."""
        gone = 0 if self.window is None else int(self._expired(np.array([row]), np.array([position]))[0])
        if gone <= 0:
            return 0
        size = self.pool.block_size
        held = self.row_blocks(row)
        rest = held[: self._head] + held[self._head + gone :]
        self._give_back(row, held[self._head : self._head + gone])
        self.table[row, : len(rest)] = rest
        self._note(row, self._head, len(rest))
        self._clear(row, len(rest))
        self.blocks[row] = len(rest)
        self.lengths[row] -= gone * size
        self.dropped[row] += gone * size
        return gone

    def visible_blocks(self, tokens: int) -> int:
        """Blocks that a sequence behind a window holds at most while ``tokens`` tokens are added to it at a time."""
        assert self.window is not None
        return self._head - (-(self.window - 1 + tokens + self.pool.block_size - 1) // self.pool.block_size)

    def release(self, row: int) -> None:
        """Give all blocks back and forget the sequence."""
        self._give_back(row, self.row_blocks(row))
        self._empty(row)

    def changes(self) -> Ints:
        """Entries of `table` that changed since `forget_changes`: places in the flattened table."""
        rows = np.flatnonzero(self._behind)
        first = self._first[rows]
        counts = self._behind[rows] - first
        before = counts.cumsum() - counts
        places: Ints = np.repeat(rows * self.table.shape[1] + first - before, counts) + np.arange(counts.sum())
        return places

    def forget_changes(self) -> None:
        """Whoever follows the tables has seen all changes."""
        self._first.fill(self.table.shape[1])
        self._behind.fill(0)

    def _note(self, row: int | Ints, first: int | Ints, stop: int | Ints) -> None:
        """Entries ``first .. stop - 1`` of a row have changed, or of several different ones."""
        self._first[row] = np.minimum(self._first[row], first)
        self._behind[row] = np.maximum(self._behind[row], stop)

    def _clear(self, row: int, keep: int) -> None:
        """Empty a row's entries from ``keep`` on."""
        held = int(self.blocks[row])
        if keep < held:
            self.table[row, keep:held] = 0
            self._note(row, keep, held)

    def _expired(self, rows: Ints, positions: Ints) -> Ints:
        assert self.window is not None
        size = self.pool.block_size
        visible_from = positions - self.window + 1
        held_from = self._head * size + self.dropped[rows]
        # no more than is stored: a short text behind many sinks fills no block beyond theirs
        gone: Ints = np.minimum((visible_from - held_from) // size, self.lengths[rows] // size - self._head)
        return gone

    def _lacking(self, row: int, tokens: int) -> int:
        """Blocks that ``tokens`` more tokens need beside those of a row."""
        more = -(-(int(self.lengths[row]) + tokens) // self.pool.block_size) - int(self.blocks[row])
        return max(more, 0)

    def _copies_tail(self, row: int) -> bool:
        """Whether the half-full last block has to be copied: the other holder may have left meanwhile."""
        return bool(self._tail_suspect[row]) and not self.pool.exclusive(int(self.table[row, self.blocks[row] - 1]))

    def _extend(self, row: int, blocks: list[int]) -> None:
        held = int(self.blocks[row])
        if blocks:
            self.table[row, held : held + len(blocks)] = blocks
            self._note(row, held, held + len(blocks))
            self.blocks[row] = held + len(blocks)

    def _swap(self, row: int, index: int, fresh: int) -> Copy:
        """Put ``fresh`` in the place of a block that others hold as well."""
        block = int(self.table[row, index])
        self.table[row, index] = fresh
        self._note(row, index, index + 1)
        self._give_back(row, [block])
        return block, fresh

    def _empty(self, row: int) -> None:
        self._clear(row, 0)
        self.blocks[row] = self.lengths[row] = self.dropped[row] = 0
        self._tail_suspect[row] = False
        self.sole[row] = True

    def _give_back(self, row: int, blocks: list[int]) -> None:
        if blocks:
            self.pool.release(blocks, self.fence_of(row))


def _no_fence(row: int) -> Fence | None:
    return None


def tables_for(group: LayerGroup, limits: Limits, num_blocks: int) -> BlockTables:
    """Empty tables of one layer group over a pool of its own."""
    return BlockTables(
        BlockPool(num_blocks, limits.block_size),
        rows=limits.max_num_seqs,
        blocks_per_row=limits.blocks_per_sequence,
        window=group.window,
        sinks=group.sinks,
    )
