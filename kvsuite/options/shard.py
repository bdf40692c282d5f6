"""Which part of a selection a host runs: ``--kv-shard=I/N``."""

from __future__ import annotations

import re
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
