"""Recent-only: keep the youngest tokens, no sinks. The control that shows what attention sinks are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import CacheView, require_size, time_order
from .by_factor import ByFactor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class RecentOnly(ByFactor):
    """Keep the last ``window`` tokens ("window attention" in arXiv 2309.17453, section 2).

    Parameters
    ----------
    window
        Tokens kept, at least 1.
    """

    name: ClassVar[str] = "recent_only"
    sequences_apart: ClassVar[bool] = True
    sizes: ClassVar[tuple[str, ...]] = ("window",)

    window: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size("--kv-recent-sizes", self.window)

    def label(self, chosen: Mapping[str, Any] | None) -> str:
        return super().label(chosen) if chosen is not None else f"recent_only_{self.window}"

    def own_size_after(self, length: int) -> int:
        return min(length, self.window)

    def keep(self, view: CacheView) -> Tensor:
        return time_order(view)[..., view.length - self.size_after(view.length) :]

    def oldest_rule(self, length: int) -> int:
        return 0

    def victim(self, view: CacheView) -> Tensor:
        return view.positions.argmin(dim=-1)
