"""Policies that rank the tokens of a complete prompt per head, and keep a share of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from .base import CacheView, Needs
from .by_factor import ByFactor
from .prompt_view import PromptView
from .ranked import highest
from .ratio import protected_count, removed_from_keep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class PromptRanked(ByFactor):
    """Keep the tokens of highest `importance` of each key head, once, at the end of the prompt; what comes later stays.

    Of equally important tokens the older stays, on every engine alike.

    Parameters
    ----------
    keep_ratio
        Fraction of the prompt kept, in (0, 1]; ``max(1, floor(keep_ratio * length))`` tokens, as kvpress counts.
    """

    shared_across_heads: ClassVar[bool] = False
    sizes: ClassVar[tuple[str, ...]] = ("keep_ratio",)
    swept_by_options: ClassVar[Mapping[str, str]] = {"keep_ratio": "keep_ratios"}

    acts: Literal["prompt", "decode"] = field(default="prompt", init=False, repr=False)
    keep_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        removed_from_keep(self.keep_ratio)

    @property
    def needs(self) -> Needs:
        return Needs(prompt=True)

    @property
    def ratio_requested(self) -> float | None:
        return removed_from_keep(self.keep_ratio) if self.factor is None else super().ratio_requested

    def own_size_after(self, length: int) -> int:
        return min(length, max(1, protected_count(length, self.keep_ratio)))

    @abstractmethod
    def importance(self, view: PromptView) -> Tensor:
        """Importance of every token, float32 ``[kv_heads, n]``; infinity protects it."""

    def prompt_score(self, view: CacheView) -> Tensor:
        assert isinstance(view, PromptView)
        return self.importance(view)

    def keep(self, view: CacheView) -> Tensor:
        scores = self.prompt_score(view) if isinstance(view, PromptView) else view.scores
        assert scores is not None
        return highest(scores, self.size_after(view.length))
