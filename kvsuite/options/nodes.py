"""How the workers of several hosts are written: ``8xH200,2xL40S``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvsuite.errors import UserError
from kvsuite.foreign_text import VALUE_LIMIT, visible

from .card import card_bytes

MOST_WORKERS = 4096
_PART = re.compile(
    r"([0-9]{1,6})x([A-Za-z0-9][A-Za-z0-9_.-]{0,63})(?::([^:]+):([0-9]{1,9}(?:\.[0-9]{1,9})?)([GT])B/s)?"
)
_UNITS = {"G": 1e9, "T": 1e12}
_FORM = "use workers and their card, such as 8xH200,2xL40S, or 2xNAME:24GiB:300GB/s for a card that is not known"


@dataclass(frozen=True)
class NodesText:
    """Some workers that have a card each.

    Parameters
    ----------
    count
        How many.
    card
        Its name as typed.
    memory_bytes, bandwidth
        Of the card, bytes and bytes a second, where they are given.
    """

    count: int
    card: str
    memory_bytes: int | None = None
    bandwidth: float | None = None

    @classmethod
    def parse_all(cls, text: str) -> tuple[NodesText, ...]:
        """Read a comma-separated list.

        Raises
        ------
        UserError
            If it is none, naming ``--kv-nodes``.
        """
        shown = f"--kv-nodes={visible(text, VALUE_LIMIT)}"
        found = []
        for part in text.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None:
                raise UserError(f"{shown}: no list of workers; {_FORM}")
            count, name, memory, speed, unit = match.groups()
            given = speed is not None
            try:
                memory_bytes = card_bytes(memory, "") if given else None
            except UserError as error:
                raise UserError(f"{shown}: {visible(memory, VALUE_LIMIT)} is no size of a card; {_FORM}") from error
            found.append(cls(int(count), name, memory_bytes, float(speed) * _UNITS[unit] if given else None))
        if any(one.count < 1 or one.bandwidth == 0 for one in found):
            raise UserError(f"{shown}: every card needs a worker and a bandwidth above 0; {_FORM}")
        if sum(one.count for one in found) > MOST_WORKERS:
            raise UserError(f"{shown}: no more than {MOST_WORKERS} workers can be planned for; give fewer")
        names = [one.card.lower() for one in found]
        if len({*names}) < len(names):
            raise UserError(f"{shown}: names a card twice; add its workers")
        return tuple(found)
