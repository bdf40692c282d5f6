"""Which blocks are free, who refers to the others, and which tokens full blocks hold. Plain Python, no tensors."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .fences import Fence

#: digest of no tokens: the parent of a sequence's first block
ROOT = b""


class PoolFullError(Exception):
    """Fewer blocks are free than were asked for; nothing was taken."""


class BlockPool:
    """Reference counts of blocks ``1 .. num_blocks`` (block 0 is scratch), and an index of full ones by their tokens.

    A block that nobody refers to is free. If it is published it can still be found by its tokens until it is allocated
    again; of such blocks the one freed longest ago goes first, and only after all others.

    A block that work on another stream may still read or write is released *after a fence*: it is not free, nor may its last
    holder write it, before all its fences have passed. It can be found by its tokens and shared meanwhile, since readers do
    not disturb one another.

    Parameters
    ----------
    num_blocks
        Blocks that sequences can own.
    block_size
        Tokens a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * (num_blocks + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._digest: dict[int, bytes] = {}
        self._block: dict[bytes, int] = {}
        # fences that have not passed yet, oldest first, with the blocks that were released after them
        self._fences: dict[Fence, list[int]] = {}
        # how many of those fences a block waits for
        self._waits: dict[int, int] = {}
        # blocks that nobody refers to and that wait for a fence
        self._held: set[int] = set()

    @property
    def free(self) -> int:
        """Blocks that nobody refers to and that no fence holds back."""
        if self._fences:
            self.reclaim()
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks that nobody refers to and that a fence holds back."""
        return len(self._held)

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return self.num_blocks - len(self._free) - len(self._held)

    @property
    def published(self) -> int:
        """Blocks that can be found by their tokens, in use or free."""
        return len(self._block)

    def references(self, block: int) -> int:
        """How many tables hold the block."""
        return self._references[block]

    def is_free(self, block: int) -> bool:
        """Whether the block is one of those that `free` counts."""
        return block in self._free

    def exclusive(self, block: int) -> bool:
        """Whether one table alone holds the block and nobody who held it may still be reading: it may be written."""
        if self._fences:
            self.reclaim()
        return self._references[block] == 1 and block not in self._waits

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks; each is referred to once. Where that many are lacking, fences are waited for.

        Raises
        ------
        PoolFullError
            If there are fewer; none is taken then.
        """
        if count > len(self._free) and not self.wait_for(count):
            raise PoolFullError(f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} free")
        blocks = list(islice(self._free, count))
        for block in blocks:
            del self._free[block]
            self._references[block] = 1
            self.forget(block)
        return blocks

    def share(self, block: int) -> None:
        """Refer to a block once more; a free one that is published comes back into use."""
        if self._references[block] == 0:
            if block not in self._digest:
                raise RuntimeError(f"block {block} is free and holds nothing")
            if block in self._held:
                self._held.remove(block)
            else:
                del self._free[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int], after: Fence | None = None) -> None:
        """Refer to each block once less, the last one first: the start of a text is worth keeping longest.

        Parameters
        ----------
        blocks
            Blocks in use.
        after
            What has to pass before they are given to somebody else; nothing if left out.
        """
        waits = self._waits
        if after is not None and blocks and not after.passed():
            self._fences.setdefault(after, []).extend(reversed(blocks))
            for block in blocks:
                waits[block] = waits.get(block, 0) + 1
        references = self._references
        for block in reversed(blocks):
            left = references[block] - 1
            if left < 0:
                raise RuntimeError(f"block {block} is released but not in use")
            references[block] = left
            if not left:
                if block in waits:
                    self._held.add(block)
                else:
                    self._set_free(block)

    def reclaim(self) -> None:
        """Let blocks be free whose fences have passed."""
        for fence in [fence for fence in self._fences if fence.passed()]:
            for block in self._fences.pop(fence):
                self._waits[block] -= 1
                if self._waits[block] == 0:
                    del self._waits[block]
                    if block in self._held:
                        self._held.remove(block)
                        self._set_free(block)

    def wait(self) -> bool:
        """Wait for the oldest fence, if any holds blocks back; whether one did."""
        if not self._held:
            return False
        next(iter(self._fences)).wait()
        self.reclaim()
        return True

    def wait_for(self, count: int) -> bool:
        """Wait for fences, the oldest first, until ``count`` blocks are free; at once where that would not help.

        Returns
        -------
        bool
            Whether so many are free.
        """
        while self.free < count <= len(self._free) + len(self._held):
            self.wait()
        return count <= len(self._free)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block findable. It must not be written from now on, until `forget`.

        Another block of the same tokens may be published already; that one then stays the one to be found.
        """
        if self._references[block] < 1:
            raise RuntimeError(f"block {block} is published but not in use")
        if block not in self._digest and digest not in self._block:
            self._digest[block] = digest
            self._block[digest] = block

    def forget(self, block: int) -> None:
        """Make a block unfindable, because its content is about to change."""
        digest = self._digest.pop(block, None)
        if digest is not None:
            del self._block[digest]

    def find(self, digest: bytes) -> int | None:
        """The published block with this digest."""
        return self._block.get(digest)

    def findable(self, block: int) -> bool:
        """Whether the block can be found by its tokens."""
        return block in self._digest

    def _set_free(self, block: int) -> None:
        self._free[block] = None
        if block not in self._digest:
            self._free.move_to_end(block, last=False)


def chain(parent: bytes, tokens: Sequence[int], images: bytes = b"") -> bytes:
    """Digest of a full block: of its tokens, of the images that stand in it, and of all before it (``parent``)."""
    own = np.asarray(tokens, dtype=np.int64).tobytes()
    return hashlib.blake2b(parent + own + images, digest_size=16).digest()
