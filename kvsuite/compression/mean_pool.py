"""Mean pooling: so many consecutive tokens become their mean. What a learned compressor has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .merging import Merging, Side

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class MeanPool(Merging):
    """Keys and values of each group are the means of its tokens' stored ones, keys as they are rotated; no paper.

    Parameters
    ----------
    factor
        Tokens that become one.
    """

    name: ClassVar[str] = "mean_pool"

    def pooled(self, groups: Tensor, layers: Sequence[int], side: Side, *, is_image: bool) -> Tensor:
        return mean_of(groups, self.group)


def mean_of(groups: Tensor, tokens: int) -> Tensor:
    """Mean of the ``tokens`` vectors that lie one after the other in each row of ``[..., tokens * width]``, in float32."""
    apart = groups.reshape(*groups.shape[:-1], tokens, groups.shape[-1] // tokens)
    return apart.float().mean(dim=-2).to(groups.dtype)
