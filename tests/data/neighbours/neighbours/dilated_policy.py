"""A policy: every n-th token of the past beside the recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvsuite.compression.base import CacheView, Policy, time_order


@dataclass(kw_only=True, eq=False)
class Dilated(Policy):
    """Keep the last ``recent`` tokens, and of the older ones those whose position is a multiple of ``stride``.

    Child et al., "Generating Long Sequences with Sparse Transformers" (arXiv 1904.10509) attend in such a pattern.
    """

    name: ClassVar[str] = "dilated"

    stride: int = 4
    recent: int = 16

    def size_after(self, length: int) -> int:
        return length if length <= self.recent else self.recent + -(-(length - self.recent) // self.stride)

    def keep(self, view: CacheView) -> Any:
        import torch

        order = time_order(view)
        older = order[: max(view.length - self.recent, 0)]
        return torch.cat([older[:: self.stride], order[len(older) :]])
