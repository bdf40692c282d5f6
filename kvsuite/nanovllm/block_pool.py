"""Which blocks are free, who refers to the others, and which tokens full blocks hold. Plain Python, no tensors."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import numpy as np

#: digest of no tokens: the parent of a sequence's first block
ROOT = b""


class PoolFullError(Exception):
    """Fewer blocks are free than were asked for; nothing was taken."""


class BlockPool:
    """Reference counts of blocks ``1 .. num_blocks`` (block 0 is scratch), and an index of full ones by their tokens.

    A block that nobody refers to is free. If it is published it can still be found by its tokens until it is allocated
    again; of such blocks the one freed longest ago goes first, and only after all others.

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

    @property
    def free(self) -> int:
        """Blocks that nobody refers to."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return self.num_blocks - len(self._free)

    @property
    def published(self) -> int:
        """Blocks that can be found by their tokens, in use or free."""
        return len(self._block)

    def references(self, block: int) -> int:
        """How many tables hold the block."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks; each is referred to once.

        Raises
        ------
        PoolFullError
            If there are fewer; none is taken then.
        """
        if count > len(self._free):
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
            del self._free[block]
        self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Refer to each block once less, the last one first: the start of a text is worth keeping longest."""
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} is released but not in use")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._digest:
                    self._free.move_to_end(block, last=False)

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


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a full block: of its tokens and of all before it (``parent``)."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()
