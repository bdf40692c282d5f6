"""A selection of cases cut into parts of about equal cost, the same parts on every host."""

from __future__ import annotations

from collections.abc import Sequence


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
