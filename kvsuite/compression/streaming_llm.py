"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.errors import UserError

from .base import CacheView, Policy, require_size, time_order

if TYPE_CHECKING:
    from torch import Tensor


class StreamingLLM(Policy):
    """Keep the first ``start_size`` tokens (attention sinks) and the last ``recent_size`` (Xiao et al., arXiv 2309.17453).

    The paper's method is ``positions="cache"``; ``original`` leaves the keys as they are.

    Parameters
    ----------
    start_size
        Attention sinks kept, 0 or more; 0 is `RecentOnly`.
    recent_size
        Recent tokens kept, at least 1.
    """

    name: ClassVar[str] = "streaming_llm"

    def __init__(self, *, start_size: int = 4, recent_size: int = 508, **common: Any) -> None:
        super().__init__(**common)
        self.start_size = require_size("--kv-start-size", start_size, minimum=0)
        self.recent_size = require_size("--kv-recent-sizes", recent_size)

    @classmethod
    def of_total(cls, total: int, *, start_size: int = 4, **common: Any) -> StreamingLLM:
        """Build the policy whose sinks and recent tokens together fill ``total``.

        Raises
        ------
        UserError
            If the sinks leave no room for a recent token.
        """
        require_size("--kv-start-size", start_size, minimum=0)
        if start_size >= total:
            raise UserError(
                f"--kv-start-size={start_size}: the sinks do not fit a window of {total}; "
                "lower --kv-start-size or raise the cache size"
            )
        return cls(start_size=start_size, recent_size=total - start_size, **common)

    @property
    def size(self) -> int:
        """Tokens kept at most."""
        return self.start_size + self.recent_size

    def size_after(self, length: int) -> int:
        return min(length, self.size)

    def keep(self, view: CacheView) -> Tensor:
        import torch

        order = time_order(view)
        if view.length <= self.size:
            return order
        return torch.cat([order[..., : self.start_size], order[..., view.length - self.recent_size :]], dim=-1)

    def evict_for_space(self, view: CacheView, num_coming: int) -> Tensor:
        """Indices that stay so that ``num_coming`` more tokens fit: the sinks and the last ``recent_size - num_coming``.

        Raises
        ------
        UserError
            If the coming tokens do not fit beside the sinks.
        """
        import torch

        require_size("num_coming", num_coming)
        if num_coming > self.recent_size:
            raise UserError(f"num_coming={num_coming}: more than recent_size={self.recent_size}; feed smaller chunks")
        order = time_order(view)
        if view.length + num_coming <= self.size:
            return order
        recent_from = view.length - (self.recent_size - num_coming)
        return torch.cat([order[..., : self.start_size], order[..., max(recent_from, self.start_size) :]], dim=-1)

    def parameters(self) -> dict[str, Any]:
        return {"start_size": self.start_size, "recent_size": self.recent_size}
