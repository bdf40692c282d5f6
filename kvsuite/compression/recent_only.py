"""Recent-only: keep the youngest tokens, no sinks. The control that shows what attention sinks are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from .base import CacheView, Policy, require_size, time_order

if TYPE_CHECKING:
    from torch import Tensor


class RecentOnly(Policy):
    """Keep the last ``window`` tokens ("window attention" in arXiv 2309.17453, section 2).

    Parameters
    ----------
    window
        Tokens kept, at least 1.
    """

    name: ClassVar[str] = "recent_only"

    def __init__(self, *, window: int = 512, **common: Any) -> None:
        super().__init__(**common)
        self.window = require_size("--kv-recent-sizes", window)

    def size_after(self, length: int) -> int:
        return min(length, self.window)

    def keep(self, view: CacheView) -> Tensor:
        return time_order(view)[..., view.length - self.size_after(view.length) :]

    def parameters(self) -> dict[str, Any]:
        return {"window": self.window}
