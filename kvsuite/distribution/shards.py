"""A selection of cases cut into parts of about equal cost, the same parts on every host."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible

_SHARD = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``of``, counted from 1."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``1/4``.

        Raises
        ------
        UserError
            If it is no part of a whole.
        """
        found = _SHARD.fullmatch(text.strip())
        if found is None:
            raise UserError(f"--kv-shard={visible(text, VALUE_LIMIT)}: write I/N, for example --kv-shard=1/4")
        shard = cls(int(found[1]), int(found[2]))
        if not 1 <= shard.index <= shard.of:
            raise UserError(
                f"--kv-shard={text}: parts count from 1 to N; give 1/{max(shard.of, 1)} to {shard.of}/{shard.of}"
            )
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def assign(costs: Sequence[float], parts: int) -> list[int]:
    """Part of each case, from 1: the dearest first, each to the part that has least so far (longest processing time first).

    Parameters
    ----------
    costs
        Of the cases in an order that is the same on every host, any unit.
    parts
        How many.

    Returns
    -------
    list of int
        No part costs more than 4/3 of the best possible (Graham 1969). Equal input gives equal output on every host.
    """
    loads = [0.0] * parts
    chosen = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        part = min(range(parts), key=lambda part: (loads[part], part))
        loads[part] += costs[place]
        chosen[place] = part + 1
    return chosen
