"""TOVA: keep what the prompt's last query looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Needs
from .prompt_ranked import PromptRanked
from .prompt_view import PromptView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class TOVA(PromptRanked):
    """Keep the last token, and of the others those to which it attends most (Oren et al., arXiv 2401.06104).

    ``importance_j = mean over all query heads of attention_nj``, the same for every key head. The paper also drops a token
    at every decode step; this acts once, at the end of the prompt, like kvpress' ``TOVAPress``.
    """

    name: ClassVar[str] = "tova"

    @property
    def needs(self) -> Needs:
        return Needs(prompt=True, queries=1)

    def caveat(self, length: int) -> str | None:
        if not self.size_after(length) == 1 < length:
            return None
        return "1 token stays, the last one: attention decides nothing, as in recent_only"

    def importance(self, view: PromptView) -> Tensor:
        import torch

        seen = view.attention(1)[:, 0, :-1].mean(dim=0)
        wide = torch.nn.functional.pad(seen, (0, 1), value=float("inf"))
        return wide.expand(view.keys.shape[0], view.length)
