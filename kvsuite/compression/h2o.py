"""H2O: keep heavy hitters, the tokens that got most attention, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Needs
from .prompt_ranked import PromptRanked
from .prompt_view import PromptView
from .ratio import protected_count

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class H2O(PromptRanked):
    """Keep the most recent tokens, and of the older ones those that all queries together attended to most.

    Zhang et al., "H2O: Heavy-Hitter Oracle" (arXiv 2306.14048): ``importance_j = sum over the prompt's queries i >= j of
    attention_ij``, mean over the query heads of a key head. The paper goes on while decoding; this acts once, at the end of
    the prompt, so that decode steps stay as they are. All attention weights of the prompt are computed a second time, a
    block at a time, which costs about what its attention does.

    Parameters
    ----------
    recent_share
        Fraction of the kept tokens that are the most recent ones, in [0, 1]; the paper's half.
    """

    name: ClassVar[str] = "h2o"
    heads_apart: ClassVar[bool] = True

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        protected_count(1, self.recent_share)

    @property
    def needs(self) -> Needs:
        return Needs(prompt=True, attention_sums=True)

    def caveat(self, length: int) -> str | None:
        kept = self.size_after(length)
        if kept == length or protected_count(kept, self.recent_share) < kept:
            return None
        return f"{kept} tokens stay, all of them the most recent: attention decides nothing, as in recent_only"

    def importance(self, view: PromptView) -> Tensor:
        recent = protected_count(self.size_after(view.length), self.recent_share)
        found = view.per_kv_head(view.attention_sums())
        found[:, view.length - recent :] = float("inf")
        return found
