"""One text, one result: under which data set a text was scored first."""

from __future__ import annotations

from typing import Any

from .case import digest


class FirstTexts:
    """Data sets by everything else that decides a perplexity.

    A process skips the second case of a text before it is scored. Workers of xdist do not know each other's texts, so the
    process that writes the rows looks once more.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def refusal(self, case: dict[str, Any], tokens_hash: str) -> str | None:
        """Why a case (`kvsuite.case.Case.to_dict`) is no result of its own, ``None`` if it is one."""
        name = case["workload"]["dataset"]
        first = self._names.get(_key(case, tokens_hash), name)
        return None if first == name else f"the same text as {first}, whose result it is: never two results of one text"

    def remember(self, case: dict[str, Any], tokens_hash: str) -> None:
        """``case`` has the result of its text."""
        self._names.setdefault(_key(case, tokens_hash), case["workload"]["dataset"])

    def demote(self, row: dict[str, Any]) -> None:
        """Turn a finished perplexity row into a skipped one, in place, if an earlier row has the result of its text."""
        if row["suite"] != "perplexity" or row["status"] != "ok":
            return
        case, tokens_hash = row["case"], row["dataset"]["tokens_hash"]
        reason = self.refusal(case, tokens_hash)
        if reason:
            row |= {"status": "skipped", "reason": reason, "metrics": {}}
        else:
            self.remember(case, tokens_hash)


def _key(case: dict[str, Any], tokens_hash: str) -> str:
    return digest([case | {"name": "", "workload": case["workload"] | {"dataset": ""}}, tokens_hash])
