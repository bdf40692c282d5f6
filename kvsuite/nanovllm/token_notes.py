"""What a policy knows of stored tokens, by slot, beside their keys and values, with which it moves."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenNotes:
    """Logical position, and perhaps a score, of every stored token of a layer group.

    What a slot's note means is known to whoever holds the slot: nothing is cleared. Sequences that share a block share its
    notes, since they share its tokens.

    Parameters
    ----------
    layers, heads
        Layers and key heads, which keep different tokens.
    blocks, block_size
        Blocks of the pool, and tokens of a block.
    scored
        Whether there are scores.
    device
        Of the notes.
    """

    def __init__(
        self, *, layers: int, heads: int, blocks: int, block_size: int, scored: bool, device: torch.device
    ) -> None:
        # scores are float32 in the bits of int32, so that both move at once
        self._numbers = torch.zeros((1 + scored, layers, heads, blocks, block_size), dtype=torch.int32, device=device)
        self._slots = self._numbers.flatten(3)

    @property
    def by_slot(self) -> Tensor:
        """Positions, and scores in the bits of int32 where there are any: ``[1 or 2, layers, heads, slots]``, for kernels."""
        return self._slots

    @property
    def nbytes(self) -> int:
        """Bytes of the notes of all slots."""
        return self._numbers.nbytes

    @property
    def scored(self) -> bool:
        """Whether there are scores."""
        return len(self._numbers) > 1

    def write(self, slots: Tensor, positions: Tensor, scores: Tensor | None) -> None:
        """Note ``positions`` ``[n]``, and ``scores`` ``[layers, heads, n]``, of the tokens in ``slots`` ``[n]``."""
        noted = positions.to(torch.int32).expand(*self._slots.shape[1:3], -1)[None]
        if scores is not None:
            noted = torch.cat([noted, scores.view(torch.int32)[None]])
        self._slots.index_copy_(3, slots, noted)

    def read(self, blocks: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """Positions, int64, and scores, float32, of the first ``length`` tokens in ``blocks`` ``[S, width]``.

        Returns
        -------
        tuple of Tensor
            Each ``[S, layers, heads, length]``.
        """
        found = self._numbers.index_select(3, blocks.flatten())
        found = found.view(*found.shape[:3], len(blocks), -1)[..., :length].movedim(3, 1)
        return found[0].long(), found[1].view(torch.float32) if self.scored else None

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy the notes of whole blocks."""
        self._numbers.index_copy_(3, target, self._numbers.index_select(3, source))

    def keep(self, source: Tensor, target: Tensor) -> None:
        """Copy notes from slots ``source`` ``[k]``, or ``[layers, heads, k]``, to slots ``target`` ``[k]``."""
        if source.dim() == 1:
            found = self._slots.index_select(3, source)
        else:
            found = self._slots.gather(3, source.expand(len(self._slots), -1, -1, -1))
        self._slots.index_copy_(3, target, found)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the notes of slots ``target`` ``[S]`` to slots ``source`` ``[S, layers, heads]``."""
        last = self._slots.index_select(3, target)
        self._slots.scatter_(3, source.movedim(0, -1).expand(len(self._slots), -1, -1, -1), last)
