"""Compression by a factor: any policy, once, at the end of the prompt, keeping one of so many tokens."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from kvsuite.errors import UserError

from .base import Policy
from .ratio import factor_count, removed_by_factor

Rounding = Literal["exact", "kvpress_compat"]


@dataclass(kw_only=True, eq=False)
class ByFactor(Policy):
    """A policy that can be given a factor in the place of its sizes.

    With a factor it acts once, at the end of the prompt, and ``max(1, floor(length / factor))`` tokens stay; what comes
    later stays as well.

    Parameters
    ----------
    factor
        At least 1, at which everything stays; ``None``: the policy's own sizes and schedule.
    rounding
        ``exact``, or ``kvpress_compat`` (`kvsuite.compression.ratio.factor_count`).
    """

    #: own parameters in whose place a factor is given
    sizes: ClassVar[tuple[str, ...]] = ()

    factor: float | None = None
    rounding: Rounding = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding not in ("exact", "kvpress_compat"):
            raise self._wrong(f"rounding={self.rounding}", "unknown; use exact or kvpress_compat")
        if self.factor is None:
            if self.rounding != "exact":
                raise self._wrong(f"rounding={self.rounding}", "it rounds what a factor keeps; give a factor too")
            return
        number = isinstance(self.factor, int | float) and not isinstance(self.factor, bool)
        # written so that NaN fails as well
        if not (number and 1 <= self.factor < math.inf):
            raise self._wrong(
                f"factor={self.factor}", "one of so many tokens stays; give a number of at least 1, 5 to keep a fifth"
            )
        self.factor = float(self.factor)
        own = {one.name: one.default for one in fields(self)}
        for name in self.sizes:
            if getattr(self, name) != own[name]:
                raise self._wrong(
                    f"factor={self.factor:g},{name}={getattr(self, name)}",
                    "both say how many tokens stay; leave out one of them",
                )
        self.acts = "prompt"

    @abstractmethod
    def own_size_after(self, length: int) -> int:
        """`size_after` by the policy's own sizes."""

    def size_after(self, length: int) -> int:
        if self.factor is None:
            return self.own_size_after(length)
        return factor_count(length, self.factor, kvpress_compat=self.rounding == "kvpress_compat")

    @property
    def ratio_requested(self) -> float | None:
        return None if self.factor is None else removed_by_factor(self.factor)

    def caveat(self, length: int) -> str | None:
        if self.factor is None or length >= self.factor:
            return None
        return f"a factor of {self.factor:g} leaves nothing of {length} tokens: one token stays"

    @classmethod
    def swept(cls, given: Collection[str]) -> dict[str, str]:
        return super().swept({*given, *cls.sizes} if "factor" in given else given)

    def label(self, chosen: Mapping[str, Any] | None) -> str:
        factor = (chosen or {}).get("factor")
        if isinstance(factor, float) and factor.is_integer():
            chosen = {**(chosen or {}), "factor": int(factor)}
        return super().label(chosen)

    def parameters(self) -> dict[str, Any]:
        found = super().parameters()
        # a case without a factor is the case that it was before there were any
        silent = ("factor", "rounding") if self.factor is None else self.sizes
        if self.rounding == "exact":
            silent = (*silent, "rounding")
        return {name: value for name, value in found.items() if name not in silent}

    def _wrong(self, given: str, what: str) -> UserError:
        return UserError(f"--kv-method={self.name}({given}): {what}")
