"""L2 compression by ratio: keep the keys of lowest norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .base import CacheView, Schedule, require_size
from .ranked import NormRule, RankedPolicy
from .ratio import keep_count, removed_from_keep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, eq=False)
class L2Compress(RankedPolicy):
    """Keep ``ceil(keep_ratio * length)`` keys of lowest L2 norm per head once more than ``prune_after`` are stored.

    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression" (arXiv 2406.11430). Applied after
    every token it is a bounded cache, not a ratio: its length saws between ``ceil(keep_ratio * (prune_after + 1))`` and
    ``prune_after``. Hence the mode is part of every label.

    Parameters
    ----------
    keep_ratio
        Fraction kept, in (0, 1].
    prune_after
        Lengths up to this one are left alone.
    mode
        ``single_shot`` (the paper), ``every_token`` (the original program) or ``interval=N``.
    """

    name: ClassVar[str] = "l2_compress"
    sequences_apart: ClassVar[bool] = True
    sizes: ClassVar[tuple[str, ...]] = ("keep_ratio", "prune_after", "mode")
    swept_by_options: ClassVar[Mapping[str, str]] = {
        "keep_ratio": "keep_ratios",
        "prune_after": "prune_after",
        "mode": "l2_mode",
    }

    keep_ratio: float = 1.0
    prune_after: int = 1000
    mode: str = "single_shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        keep_count(1, self.keep_ratio)
        require_size("--kv-prune-after", self.prune_after, minimum=0)
        self.schedule = Schedule(self.mode)

    @property
    def ratio_requested(self) -> float | None:
        return removed_from_keep(self.keep_ratio) if self.factor is None else super().ratio_requested

    def label(self, chosen: Mapping[str, Any] | None) -> str:
        return super().label(chosen) if chosen is not None else f"l2_kr={self.keep_ratio}_{self.schedule.label}"

    def own_size_after(self, length: int) -> int:
        return length if length <= self.prune_after else keep_count(length, self.keep_ratio)

    def norm_rule(self, length: int) -> NormRule:
        return NormRule(sign=-1, protected=0)

    def priority(self, view: CacheView) -> Tensor:
        assert view.scores is not None
        return -view.scores
