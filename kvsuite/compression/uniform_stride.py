"""Uniform stride: every so-manieth token of the prompt, whatever it says. What a FastCache pipeline ran as h2o and snapkv."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from .base import CacheView, time_order
from .by_factor import ByFactor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class UniformStride(ByFactor):
    """Keep the first ``n`` of the tokens ``0, s, 2 s, ...`` with ``s = max(1, length // n)``; no paper.

    ``n`` is what the factor keeps. Below a factor of 2 the stride is 1: the first ``n`` tokens stay, and the most recent ones
    are dropped.

    Parameters
    ----------
    factor
        One of so many tokens stays, at least 1.
    """

    name: ClassVar[str] = "uniform_stride"

    acts: Literal["prompt", "decode"] = field(default="prompt", init=False, repr=False)
    factor: float | None = 2.0

    def __post_init__(self) -> None:
        if self.factor is None:
            raise self._wrong("factor=None", "the stride is made of a factor; give a number of at least 1")
        super().__post_init__()

    def own_size_after(self, length: int) -> int:
        return length

    def caveat(self, length: int) -> str | None:
        kept = self.size_after(length)
        if kept == length or length // kept > 1:
            return super().caveat(length)
        return f"the stride is 1: the first {kept} of {length} tokens stay, and the most recent {length - kept} go"

    def keep(self, view: CacheView) -> Tensor:
        kept = self.size_after(view.length)
        return time_order(view)[..., :: max(1, view.length // kept)][..., :kept]
