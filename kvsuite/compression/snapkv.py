"""SnapKV: keep what the prompt's last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvsuite.errors import UserError

from .base import Needs, require_size
from .prompt_ranked import PromptRanked
from .prompt_view import PromptView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class SnapKV(PromptRanked):
    """Keep the last ``window`` tokens, and of the older ones those to which these attend most (Li et al., arXiv 2404.14469).

    ``importance_j = mean over the query heads of a key head of pool(mean over the window's queries of attention_ij)``, with a
    mean pool of ``kernel`` neighbours, zeros beyond the ends; kvpress' ``SnapKVPress``.

    Parameters
    ----------
    window
        Queries at the end of the prompt that are asked, and tokens that always stay; at least 1.
    kernel
        Width of the pool, odd.
    """

    name: ClassVar[str] = "snapkv"
    heads_apart: ClassVar[bool] = True

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size("snapkv(window)", self.window)
        require_size("snapkv(kernel)", self.kernel)
        if self.kernel % 2 == 0:
            raise UserError(f"--kv-method=snapkv(kernel={self.kernel}): the pool has a middle; give an odd number")

    @property
    def needs(self) -> Needs:
        return Needs(prompt=True, queries=self.window)

    def caveat(self, length: int) -> str | None:
        kept = self.size_after(length)
        if kept == length or (length > self.window and kept > self.window):
            return None
        if length <= self.window:
            return f"the prompt has {length} tokens, and all of them lie in the window of {self.window}: the first ones stay"
        return f"{kept} tokens stay, no more than the window of {self.window}: the first of the window, whatever is attended to"

    def importance(self, view: PromptView) -> Tensor:
        import torch

        older = view.length - self.window
        if older <= 0:
            return torch.full(view.keys.shape[:2], float("inf"), device=view.keys.device)
        seen = view.mean_attention(self.window)[..., :older]
        pooled = torch.nn.functional.avg_pool1d(seen, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.nn.functional.pad(view.per_kv_head(pooled), (0, self.window), value=float("inf"))
