"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import CacheView, require_size, time_order
from .by_factor import ByFactor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class StreamingLLM(ByFactor):
    """Keep the first ``start_size`` tokens (attention sinks) and the last ``recent_size`` (Xiao et al., arXiv 2309.17453).

    The paper's method is ``positions="cache"``; ``original`` leaves the keys as they are.

    Parameters
    ----------
    start_size
        Attention sinks kept, 0 or more; 0 is `RecentOnly`.
    recent_size
        Recent tokens kept, at least 1. With a factor they are what it keeps but for the sinks, and at least 1 as well.
    """

    name: ClassVar[str] = "streaming_llm"
    sequences_apart: ClassVar[bool] = True
    sizes: ClassVar[tuple[str, ...]] = ("recent_size",)

    start_size: int = 4
    recent_size: int = 508

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size("--kv-start-size", self.start_size, minimum=0)
        require_size("--kv-recent-sizes", self.recent_size)

    @property
    def size(self) -> int:
        """Tokens kept at most."""
        return self.start_size + self.recent_size

    def label(self, chosen: Mapping[str, Any] | None) -> str:
        return super().label(chosen) if chosen is not None else f"streaming_{self.size}"

    def caveat(self, length: int) -> str | None:
        kept = self.size_after(length)
        if kept == length:
            return None
        if self.start_size == 0:
            return "no sinks stay: this is recent_only, the control that the method has to beat"
        if kept > self.start_size:
            return None
        return f"{kept} tokens stay, no more than the {self.start_size} sinks: the first {kept - 1} and the last one"

    def own_size_after(self, length: int) -> int:
        return min(length, self.size)

    def keep(self, view: CacheView) -> Tensor:
        import torch

        order, size = time_order(view), self.size_after(view.length)
        if size == view.length:
            return order
        sinks = min(self.start_size, size - 1)
        return torch.cat([order[..., :sinks], order[..., view.length - size + sinks :]], dim=-1)

    def oldest_rule(self, length: int) -> int:
        return min(self.start_size, length - 2)

    def victim(self, view: CacheView) -> Tensor:
        # the oldest behind the sinks, without sorting all
        sinks = self.oldest_rule(view.length)
        return view.positions.topk(sinks + 1, dim=-1, largest=False).indices[..., -1]
