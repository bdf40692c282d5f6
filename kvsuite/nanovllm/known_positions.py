"""Positions of stored tokens where one decision serves every head: the host has them, and finds the oldest without looking."""

from __future__ import annotations

import numpy as np

from .block_table import Ints


class KnownPositions:
    """Logical positions of sequences' stored tokens, by row and in the order of their tables.

    Parameters
    ----------
    rows, tokens
        Sequences, and tokens of one, at most.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self._positions: Ints = np.zeros((rows, tokens), dtype=np.int64)
        # of the token that went last by age: how many older ones stayed, the next position, and where that is thought to be
        self._older: Ints = np.full(rows, -1, dtype=np.int64)
        self._next: Ints = np.zeros(rows, dtype=np.int64)
        self._place: Ints = np.zeros(rows, dtype=np.int64)

    def write(self, rows: Ints, at: Ints, positions: Ints) -> None:
        """Tokens were appended: the ``at``-th of each of ``rows``."""
        self._positions[rows, at] = positions

    def read(self, rows: Ints, length: int) -> Ints:
        """Positions of the first ``length`` tokens of each of ``rows``, a copy ``[S, length]``."""
        found: Ints = self._positions[:, :length][rows]
        return found

    def behind(self, older: int, rows: Ints, length: int) -> Ints:
        """Of ``length`` tokens of each sequence the one that exactly ``older`` ones are older than, ``[S]``.

        Where `drop` took the one before it and nothing else went since, the token of the next position is the one, and lies
        behind the place of the one before: so it is found without looking at the others.
        """
        found: Ints = self._place[rows]
        sure = (self._older[rows] == older) & (found < length) & (self._positions[rows, found] == self._next[rows])
        if not sure.all():
            asked = rows[~sure]
            found[~sure] = np.argpartition(self.read(asked, length), older, axis=-1)[:, older]
        return found

    def drop(self, rows: Ints, gone: Ints, last: Ints, older: int | None = None) -> None:
        """The ``last`` token of each of ``rows``, the youngest, takes the place of another one, which is `behind` ``older``."""
        if older is None:
            self._older[rows] = -1
        else:
            self._older[rows] = older
            self._next[rows] = self._positions[rows, gone] + 1
            self._place[rows] = np.where(gone + 1 < last, gone + 1, older)
        self._positions[rows, gone] = self._positions[rows, last]

    def keep(self, row: int, index: Ints) -> None:
        """Only some of a sequence's tokens stay, in this order."""
        self._positions[row, : len(index)] = self._positions[row, index]
        self._older[row] = -1

    def begin(self, row: int) -> None:
        """A new sequence."""
        self._older[row] = -1

    def fork(self, row: int, target: int) -> None:
        """``target`` stores what ``row`` does."""
        for book in (self._positions, self._older, self._next, self._place):
            book[target] = book[row]
