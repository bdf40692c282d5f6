"""Positions of stored tokens where one decision serves every head: the host has them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .block_table import Ints


class KnownPositions:
    """Logical positions of sequences' stored tokens, by row and in the order of their tables.

    Where the same number of oldest tokens always stays, every new token takes the place of the next oldest one: the others
    stand in a *ring*, in which a position tells the place.

    Parameters
    ----------
    rows, tokens
        Sequences, and tokens of one, at most.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self._positions: Ints = np.zeros((rows, tokens), dtype=np.int64)
        # what a position and the place in its ring differ by
        self._turns: Ints = np.zeros(rows, dtype=np.int64)

    def write(self, rows: Ints, at: Ints, positions: Ints) -> None:
        """Note the ``at``-th token of each of ``rows``."""
        self._positions[rows, at] = positions

    def read(self, rows: Ints, length: int) -> Ints:
        """Positions of the first ``length`` tokens of each of ``rows``, a copy ``[S, length]``."""
        found: Ints = self._positions[:, :length][rows]
        return found

    def behind(self, older: int, rows: Ints, length: int) -> Ints:
        """Of ``length`` tokens of each sequence the one that exactly ``older`` ones are older than, ``[S]``."""
        found: Ints = np.argpartition(self.read(rows, length), older, axis=-1)[:, older]
        return found

    def move(self, rows: Ints, source: Ints, target: Ints) -> None:
        """A token of each sequence takes the place of another one."""
        self._positions[rows, target] = self._positions[rows, source]

    def keep(self, row: int, index: Ints) -> None:
        """Only some of a sequence's tokens stay, in this order."""
        self._positions[row, : len(index)] = self._positions[row, index]

    def fork(self, row: int, target: int) -> None:
        """``target`` stores what ``row`` does."""
        self._positions[target] = self._positions[row]

    def in_ring(self, older: int, rows: Ints, length: int) -> NDArray[np.bool_]:
        """Which of ``rows`` store ``length`` tokens, the ``older`` oldest in front and the others in a ring behind them."""
        positions, size = self.read(rows, length), length - older
        if size < 1:
            # the newest one goes: there is no ring
            return np.zeros(len(rows), dtype=np.bool_)
        front, ring = positions[:, :older], positions[:, older:]
        least = ring.min(axis=-1)
        self._turns[rows] = -ring[:, 0]
        found: NDArray[np.bool_] = ((ring - ring[:, :1]) % size == np.arange(size)).all(axis=-1)
        found &= ring.max(axis=-1) - least == size - 1
        if older:
            found &= front.max(axis=-1) < least
        return found

    def turn(self, older: int, rows: Ints, length: int, newest: Ints) -> Ints:
        """Let a new token of each of ``rows``, all `in_ring`, take the place of the oldest in the ring; the places ``[S]``."""
        places: Ints = (newest + self._turns[rows]) % (length - older) + older
        self._positions[rows, places] = newest
        return places
