"""Fixed-size cache: protect recent tokens, choose among the older ones by key norm or at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvsuite.errors import UserError

from .base import CacheView, require_size
from .ranked import NormRule, RankedPolicy
from .ratio import protected_count

if TYPE_CHECKING:
    from torch import Tensor

STRATEGIES = ("keep_low", "keep_high", "random")
_MASK = (1 << 62) - 1


@dataclass(kw_only=True, eq=False)
class FixSizeL2(RankedPolicy):
    """Keep ``size`` tokens: the last ``int(size * keep_ratio)`` always, the others from the older zone by ``strategy``.

    Parameters
    ----------
    size
        Tokens kept at most, at least 1.
    keep_ratio
        Fraction of ``size`` that is *protected* (recent), in [0, 1]; 1 is `RecentOnly`.
    strategy
        ``keep_low`` (lowest key norm stays), ``keep_high`` or ``random``.
    seed
        Seed of ``random``: the choice depends on seed, layer, head, step and position, on nothing else.
    """

    name: ClassVar[str] = "fix_size_l2"
    sequences_apart: ClassVar[bool] = True
    sizes: ClassVar[tuple[str, ...]] = ("size",)

    size: int = 1024
    keep_ratio: float = 0.0
    strategy: str = "keep_low"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size("--kv-fix-kv-sizes", self.size)
        if self.strategy not in STRATEGIES:
            raise UserError(f"--kv-strategies={self.strategy}: unknown strategy; use {', '.join(STRATEGIES)}")
        if not 0 <= self.keep_ratio <= 1:
            raise UserError(f"--kv-keep-ratios={self.keep_ratio}: the protected fraction must lie in [0, 1]")

    def label(self, chosen: Mapping[str, Any] | None) -> str:
        return super().label(chosen) if chosen is not None else f"fix{self.size}_{self.strategy}_kr={self.keep_ratio}"

    def caveat(self, length: int) -> str | None:
        kept = self.size_after(length)
        if kept == length or self.protected_of(length) < kept:
            return super().caveat(length)
        return f"all of the {kept} tokens that stay are protected as recent: norms decide nothing, as in recent_only"

    def protected_of(self, length: int) -> int:
        """How many of those that stay of ``length`` tokens are protected as recent."""
        return protected_count(self.size_after(length), self.keep_ratio)

    def own_size_after(self, length: int) -> int:
        return min(length, self.size)

    def norm_rule(self, length: int) -> NormRule | None:
        if self.strategy == "random":
            return None
        return NormRule(sign=-1 if self.strategy == "keep_low" else 1, protected=self.protected_of(length))

    def priority(self, view: CacheView) -> Tensor:
        assert view.scores is not None
        if self.strategy == "random":
            score = self._random(view)
        else:
            score = -view.scores if self.strategy == "keep_low" else view.scores
        # the last `protected` logical positions are never evicted, so position alone tells them
        return score.masked_fill(view.positions > view.newest - self.protected_of(view.length), float("inf"))

    def _random(self, view: CacheView) -> Tensor:
        """Uniform float32 in [0, 1) from a counter: the finaliser of SplitMix64 (Steele et al., 2014) on 62-bit words."""
        import torch

        assert view.scores is not None
        layer = torch.as_tensor(view.layer, device=view.positions.device)
        heads = torch.as_tensor(view.heads, device=view.positions.device)
        stream = _mix(_mix(_mix(layer + 0x9E37) ^ (heads + 0x79B9)) ^ (view.step + (self.seed * 0x7F4A7C15 & _MASK)))
        word = _mix(stream.unsqueeze(-1) ^ _mix(view.positions))
        return ((word & 0xFFFFFF).float() / float(1 << 24)).expand(view.scores.shape)

    def parameters(self) -> dict[str, Any]:
        found = super().parameters()
        if self.strategy != "random":
            del found["seed"]
        return found


def _mix(word: Tensor) -> Tensor:
    # int64 multiplication wraps the same way on every device; the mask keeps the shifts logical
    word = ((word ^ ((word & _MASK) >> 30)) * -0x40A7B892E31B1A47) & _MASK
    word = ((word ^ (word >> 27)) * -0x6B2FB644ECCEEE15) & _MASK
    return word ^ (word >> 31)
